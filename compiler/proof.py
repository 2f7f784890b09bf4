"""The proof of exact passes: the model before and after give the same outputs on sample inputs.

Both sides run in ONNX Runtime with every optimisation off, since at higher levels it folds BatchNormalization itself
and would compare a fold with a fold. The error is max |after - before| / max |before| over an output, the largest of
all outputs and samples.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.ort import Session
from . import model as model_io
from .types import Proof

if TYPE_CHECKING:
    import onnx_ir as ir

#: Above this many bytes of weights the proof costs more than the passes; --verify makes it all the same.
LARGE = 1 << 30
_SEEDS = (0, 1)


class Prover:
    """Holds the reference outputs of one model; compares others with them."""

    def __init__(self, original: ir.Model, *, verify: bool = False) -> None:
        """Run `original` on sample inputs. ModelError if ONNX Runtime cannot open it at all."""
        self._skip: str | None = None
        self._reference: list[dict[str, np.ndarray]] = []
        self._feeds: list[dict[str, np.ndarray]] = []
        if model_io.weights_bytes(original) > LARGE and not verify:
            self._skip = "the model is over 1 GB; --verify proves it all the same"
            return
        specs = model_io.input_specs(original)
        self._feeds = [model_io.sample_inputs(specs, seed) for seed in _SEEDS]
        first, self._skip = _outputs(original, self._feeds)
        if self._skip is None:
            again, _ = _outputs(original, self._feeds)
            if _largest_error(first, again) > 0:
                self._skip = "the model gives other outputs at each run (a random operator)"
        self._reference = first

    def prove(self, model: ir.Model, tolerance: float) -> Proof:
        """Compare `model` with the original; `error` is None, with the reason, where that is impossible."""
        if self._skip is not None:
            return Proof(None, tolerance, 0, self._skip)
        outputs, problem = _outputs(model, self._feeds)
        if problem is not None:
            return Proof(float("inf"), tolerance, len(self._feeds), problem)
        return Proof(_largest_error(self._reference, outputs), tolerance, len(self._feeds))


def _outputs(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> tuple[list[dict[str, np.ndarray]], str | None]:
    """Run the model; a fault at run time (not at opening) is returned as text: random inputs may be out of range."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    with TemporaryDirectory() as folder:
        session = Session(model_io.session_source(model, Path(folder)), optimise=False)
        try:
            return [session.run(feed) for feed in feeds], None
        except (state.RuntimeException, state.InvalidArgument, state.Fail) as error:
            return [], f"it does not run on random inputs: {str(error).strip().splitlines()[0][:160]}"


def _largest_error(before: list[dict[str, np.ndarray]], after: list[dict[str, np.ndarray]]) -> float:
    return max((_error(b[name], a[name]) for b, a in zip(before, after, strict=True) for name in b), default=0.0)


def _error(before: Any, after: Any) -> float:
    """Return the relative error of one output; infinity where shapes, kinds or non-finite places differ."""
    if not isinstance(before, np.ndarray) or before.dtype.kind not in "fiub":
        return 0.0 if _same(before, after) else float("inf")
    if before.shape != after.shape or before.dtype != after.dtype:
        return float("inf")
    if before.dtype.kind != "f":
        return 0.0 if np.array_equal(before, after) else float("inf")
    finite = np.isfinite(before)
    if not np.array_equal(before[~finite], after[~finite], equal_nan=True):
        return float("inf")
    b, a = before[finite].astype(np.float64), after[finite].astype(np.float64)
    scale = np.abs(b).max(initial=0.0)
    error = np.abs(a - b).max(initial=0.0)
    return float(error / scale) if scale > 0 else float(error)


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, list):
        return len(before) == len(after) and all(_same(b, a) for b, a in zip(before, after, strict=True))
    return bool(np.array_equal(np.asarray(before), np.asarray(after)))
