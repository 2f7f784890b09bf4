"""evaluate(): one model or bundle on a folder of images, beside its original; and opening either kind to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..backends import base as backends
from ..backends.ort import Session
from ..calib import folder as folders
from ..calib import preprocess as preprocessing
from . import bundle, devices, fidelity
from . import model as model_io
from .errors import DataError
from .metrics import load_metric
from .types import Artifact, Fidelity, Preprocess, Progress

if TYPE_CHECKING:
    from ..backends.base import Runner


def evaluate(
    path: Path,
    images: Path,
    *,
    against: Path | None,
    metric: str | None,
    preprocess: str | None,
    threads: int,
    seed: int,
    progress: Progress,
) -> Fidelity:
    """See api.evaluate. DataError where there is neither a reference nor a label to judge by."""
    runner = _judged(path, threads)
    pre = _preprocess(path, preprocess, runner)
    data = folders.open_folder(images, pre, runner.inputs)
    labelled = data.labels() is not None
    other = against or _source(path)
    if other is None and not (labelled and metric is None):
        raise DataError(
            "nothing to judge by",
            where=str(images),
            fix="give --against ORIGINAL, or images in class folders",
        )
    reference = open_any(other, threads, optimise=False) if other is not None else runner
    result = fidelity.compare(
        reference,
        {"result": runner},
        data.batches(8),
        images=len(data),
        metric=load_metric(metric) if metric else None,
        labelled=labelled,
        seed=seed,
        progress=progress,
    )
    found = result["result"]
    if other is None:  # by the labels alone: there is nothing to compare with
        found = replace(
            found, reference=None, reference_top5=None, drop=None, drop_low=None, drop_high=None, outputs=()
        )
    return found


def _judged(path: Path, threads: int) -> Runner:
    """Open a bundle's ONNX, or an ONNX file, to be judged: quality needs no device, so ONNX Runtime does it."""
    if not path.is_dir():
        return open_any(path, threads)
    artifact = bundle.artifact_of(path, bundle.read_manifest(path))
    return Session(artifact.folder / artifact.model, threads=threads)


def open_any(path: Path, threads: int, *, optimise: bool = True, device: str = "local") -> Runner:
    """Open a bundle, or an ONNX file in ONNX Runtime as on `device`, on this machine.

    Raises the errors of model.load, bundle.open_bundle and Session.
    """
    if path.is_dir():
        manifest = bundle.read_manifest(path)
        artifact: Artifact = bundle.artifact_of(path, manifest)
        return backends.load(artifact.backend).open(artifact, threads)
    model_io.load(path)  # its faults are explained better than ONNX Runtime explains them
    if not optimise:
        return Session(path, threads=threads, optimise=False)
    runtime = backends.load("ort")
    return runtime.open(runtime.lower(path, devices.find(device), "as given"), threads)


def _source(path: Path) -> Path | None:
    """Return the original that a bundle was made from, where it still lies there unchanged."""
    if not path.is_dir():
        return None
    source = bundle.read_manifest(path).get("source_path")
    if source is None or not Path(source["path"]).is_file():
        return None
    return Path(source["path"]) if bundle.digest(Path(source["path"])) == source["sha256"] else None


def _preprocess(path: Path, stated: str | None, runner: Runner) -> Preprocess | None:
    if path.is_dir() and stated is None:
        carried = bundle.preprocess_of(bundle.read_manifest(path))
        if carried is not None:
            return carried
    return preprocessing.resolve(stated, path, runner.inputs[0])


def to_json(path: Path, against: Path | None, result: Fidelity) -> dict[str, object]:
    """Return the document that `eval --json` prints: one entry a condition."""
    from .report import serial

    return {
        "model": str(path),
        "against": None if against is None else str(against),
        "conditions": {"clean": serial.plain(result)},
    }
