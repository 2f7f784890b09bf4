"""From calibration images to quantized candidates: ranges, layer errors, what stays in float, how to step back.

A layer is left in float where quantizing it destroys it: its own SQNR (sensitivity.py) is below FLOOR_DB. That is a
floor against collapse, not a tuning knob: 8 bits give 30 to 45 dB on a well-behaved layer. Stepping back from a broken
budget widens the layers with the lowest own SQNR first, doubling their number until the budget holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..calib import ranges as calib_ranges
from ..passes.placement import observed_tensors
from ..passes.quantize import Quantize
from . import model as model_io
from . import pipeline
from .sensitivity import IMAGES, layer_errors
from .types import OpSupport, PassRecord, Progress, QuantScheme, Range, TensorStatistics

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..calib.folder import Folder

#: The method behind `auto`: the best on our benchmark (docs/benchmarks.md).
DEFAULT_METHOD = "mse"
#: An own SQNR below this means that the layer's output is mostly noise.
FLOOR_DB = 12.0


@dataclass(frozen=True)
class Quantized:
    """One quantized candidate: the model, the pass's record, and the nodes that were kept in float with reasons."""

    model: ir.Model
    record: PassRecord
    keep_float: Mapping[str, str]


@dataclass(frozen=True)
class Quantizer:
    """Makes quantized candidates of one float model for one backend's tables."""

    model: ir.Model
    supports: tuple[OpSupport, ...]
    scheme: QuantScheme
    ranges: Mapping[str, Range]

    def build(self, keep_float: Mapping[str, str]) -> Quantized:
        """Quantize a copy of the model, all but the nodes in `keep_float` (name -> reason)."""
        step = Quantize(self.ranges, self.supports, self.scheme, keep_float)
        result, (record,) = pipeline.run(model_io.copy(self.model), [step], None)
        return Quantized(result, record, dict(keep_float))

    def errors(self, quantized: Quantized, images: Folder, threads: int, progress: Progress) -> dict[str, float]:
        """Return each quantized layer's own SQNR in dB on a few calibration images."""
        few = images.subset(range(min(IMAGES, len(images))))
        return layer_errors(
            self.model, quantized.model, few.batches(8), images=len(few), threads=threads, progress=progress
        )


def observed(model: ir.Model, supports: tuple[OpSupport, ...]) -> tuple[str, ...]:
    """Return the tensors whose statistics are needed to quantize `model` with these tables."""
    return observed_tensors(model, supports)


def choose_ranges(statistics: Mapping[str, TensorStatistics], method: str, scheme: QuantScheme) -> dict[str, Range]:
    """Return each tensor's range by the method, for the scheme's activations."""
    return {name: calib_ranges.choose(stats, method, symmetric=scheme.symmetric) for name, stats in statistics.items()}


def collapsed(errors: Mapping[str, float]) -> dict[str, str]:
    """Return the layers whose own error is beyond the floor, with the reason."""
    return {
        name: f"its own SQNR would be {db:.1f} dB, below {FLOOR_DB:g}" for name, db in errors.items() if db < FLOOR_DB
    }


def widened(errors: Mapping[str, float], already: Mapping[str, str]) -> list[dict[str, str]]:
    """Return ever larger sets of layers to keep in float: the 1, 2, 4, … with the lowest own SQNR."""
    ranked = sorted((db, name) for name, db in errors.items() if name not in already)
    steps, count = [], 1
    while count < len(ranked):
        worst = {name: f"kept in float to hold the budget (own SQNR {db:.1f} dB)" for db, name in ranked[:count]}
        steps.append({**already, **worst})
        count *= 2
    return steps
