"""calibrate(): a model and a folder of images become a ranges file."""

from __future__ import annotations

from pathlib import Path

from .._version import __version__
from ..backends import base as backends
from ..calib import folder
from ..calib import preprocess as preprocessing
from ..calib import ranges as calib_ranges
from ..passes.placement import observed_tensors
from ..passes.quant_params import needed_opset
from . import devices, pipeline
from . import model as model_io
from .errors import DataError, DeviceError
from .job import honest_specs
from .proof import Prover
from .quantization import conditions
from .quantization.quantizer import DEFAULT_METHOD
from .types import Progress, QuantScheme, Range


def calibrate(
    path: Path,
    images: Path,
    out: Path | None,
    *,
    method: str,
    degrade: str,
    device: str,
    preprocess: str | None,
    seed: int,
    threads: int,
    progress: Progress,
) -> dict[str, Range]:
    """See api.calibrate."""
    plan = conditions.check(degrade, method)
    profile = devices.find(device)
    backend = backends.load(profile.backends[0])
    scheme = backend.schemes(profile)["int8"]
    if not isinstance(scheme, QuantScheme):
        raise DeviceError(str(scheme), where=f"--device {device}", fix="choose a device with INT8: edgec devices")
    original = model_io.load(path)
    specs = honest_specs(path, original)
    if not specs:
        raise DataError("the model has no input", where=str(path), fix="there is nothing to calibrate")
    pre = preprocessing.resolve(preprocess, path, specs[0])
    data, several = conditions.calibrated_on(folder.open_folder(images, pre, specs), degrade, seed)
    model, _ = pipeline.run(original, pipeline.exact_passes(needed_opset(scheme)), Prover(original))
    chosen = (conditions.MINIMAX if several else DEFAULT_METHOD) if method == "auto" else method
    found = conditions.sweep(
        model,
        observed_tensors(model, backend.supports),
        data,
        several,
        histogram=chosen != "minmax",
        seed=seed,
        threads=threads,
        progress=progress,
    )
    ranges = found.ranges(chosen, scheme)
    if out is not None:
        meta = {
            "method": chosen,
            "images": len(data),
            "key": found.key,
            "edgec": __version__,
            "model": path.name,
            **({} if plan.conditions == (conditions.CLEAN,) else {"degrade": plan.text, "seed": seed}),
        }
        calib_ranges.to_json(ranges, out, meta)
    return ranges
