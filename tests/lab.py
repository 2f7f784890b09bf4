"""A compile job over a model and an array of samples, without the command line: for tests of what runs inside one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from edgec.backends.base import Backend
from edgec.backends.ort import OnnxRuntime, Session
from edgec.calib.folder import Folder, open_folder
from edgec.compiler import devices
from edgec.compiler import model as model_io
from edgec.compiler.job import Job
from edgec.compiler.options import Options
from edgec.compiler.types import silent


def folder(path: Path, model: ir.Model, samples: np.ndarray) -> Folder:
    """Return the samples as a folder of calibration data for the model's one input."""
    path.mkdir(parents=True, exist_ok=True)
    np.save(path / "samples.npy", samples.astype(np.float32))
    return open_folder(path, None, model_io.input_specs(model))


def job(
    path: Path, model: ir.Model, samples: np.ndarray | None, *, backend: Backend | None = None, **options: object
) -> Job:
    """Return a job whose images are the samples; nothing is measured, and one thread computes."""
    given = Options(threads=1, calib=path / "calib", **options)  # type: ignore[arg-type]  # fields by name
    images = None if samples is None else folder(path / "calib", model, samples)
    model_io.save(model, path / "model.onnx")
    return Job(
        path=path / "model.onnx",
        options=given,
        profile=devices.find("x86-avx512-vnni"),
        backend=backend or OnnxRuntime(),
        target=None,
        not_measured="not in tests",
        threads=1,
        preprocess=None,
        images=images,
        judged=None,
        metric=None,
        progress=silent,
    )


def outputs(model: ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the model with ONNX Runtime's optimisations off."""
    return Session(model_io.serialize(model), threads=1, optimise=False).run(feed)


def sqnr(exact: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> float:
    """Return the SQNR of the worst output in dB."""

    def one(y: np.ndarray, z: np.ndarray) -> float:
        y, z = y.astype(np.float64), z.astype(np.float64)
        return float(10 * np.log10((y**2).sum() / max(((y - z) ** 2).sum(), 1e-300)))

    return min(one(exact[name], got[name]) for name in exact)
