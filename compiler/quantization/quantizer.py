"""A quantized candidate as data: ranges, weights, biases and precisions of one float model for one backend's scheme.

`build` makes the model; search.py decides what the fields shall be, and driver.py measures what comes out.
A layer is left in float where quantizing it destroys it: its own SQNR is below FLOOR_DB. That is a floor against
collapse, not a tuning knob: 8 bits give 30 to 45 dB on a well-behaved layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...calib import ranges as calib_ranges
from ...passes.anchor_layout import AnchorLayout
from ...passes.quantize import Quantize
from .. import model as model_io
from .. import pipeline
from ..types import OpSupport, PassRecord, Progress, QuantScheme, Range, StoredWeight, TensorStatistics, WeightType
from .closeness import few
from .sensitivity import LayerError, layer_errors

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ...calib.folder import Folder

#: The method where no images are at hand to choose by.
DEFAULT_METHOD = "percentile"
#: An own SQNR below this means that the layer's output is mostly noise.
FLOOR_DB = 12.0
#: Layers' own errors are averaged over so many images, by their input numbers: means settle long before extremes do.
_LEAST_IMAGES, _MOST_IMAGES, _NUMBERS = 40, 200, 200 * 3 * 32 * 32


@dataclass(frozen=True)
class Quantized:
    """One quantized candidate: the model, the passes' records, and the nodes that were kept in float with reasons."""

    model: ir.Model
    records: tuple[PassRecord, ...]
    keep_float: Mapping[str, str]

    @property
    def modified(self) -> bool:
        """Whether anything was quantized."""
        return self.records[0].modified


@dataclass(frozen=True)
class Quantizer:
    """Makes quantized candidates of one float model for one backend's tables and one choice of ranges.

    `errors`: own SQNR in dB by node. `bias_shift`, `weights`, `weight_types`: see passes/quantize.py. `kept`: nodes
    that stay in float, with reasons.
    """

    model: ir.Model
    supports: tuple[OpSupport, ...]
    scheme: QuantScheme
    ranges: Mapping[str, Range] = field(default_factory=dict)
    method: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    bias_shift: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    weight_types: Mapping[str, WeightType] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    def step(self, keep_float: Mapping[str, str] | None = None) -> Quantize:
        """Return the pass that quantizes the model, all but the nodes in `kept` and `keep_float` (name -> reason)."""
        keep = {**self.kept, **(keep_float or {})}
        return Quantize(self.ranges, self.supports, self.scheme, keep, self.bias_shift, self.weight_types, self.weights)

    def build(self, keep_float: Mapping[str, str] | None = None) -> Quantized:
        """Quantize a copy of the model."""
        step = self.step(keep_float)
        passes = [step, AnchorLayout()] if self.scheme.nhwc_kernels else [step]
        result, records = pipeline.run(model_io.copy(self.model), passes, None)
        return Quantized(result, tuple(records), step.keep_float)

    def corrected(self, images: Folder, threads: int, progress: Progress) -> Quantizer:
        """Return a quantizer that knows its layers' own errors on the images and corrects its biases by them."""
        some = few(images)
        size = sum(math.prod(d or 1 for d in spec.shape[1:]) for spec in images.specs)
        most = max(_LEAST_IMAGES, min(_MOST_IMAGES, _NUMBERS // max(size, 1)))
        some = some.subset(range(0, len(some), -(-len(some) // most)))
        first = replace(self, scheme=replace(self.scheme, nhwc_kernels=False)).build()

        def named(what: str, done: int, total: int | None) -> None:
            progress(f"{what} ({self.method})", done, total)

        if not first.modified:
            return self
        found = layer_errors(
            self.model, first.model, some.batches(8), images=len(some), threads=threads,
            simulated=self.scheme.simulated, progress=named,
        )  # fmt: skip
        return replace(
            self,
            errors={name: e.sqnr_db for name, e in found.items()},
            bias_shift={name: e.shift for name, e in found.items() if e.shift is not None},
            kept={**self.kept, **_collapsed(found)},
        )


def choose_ranges(statistics: Mapping[str, TensorStatistics], method: str, scheme: QuantScheme) -> dict[str, Range]:
    """Return each tensor's range by the method, for the scheme's activations."""
    bits = activation_bits(scheme)
    return {
        name: calib_ranges.choose(stats, method, bits=bits, symmetric=scheme.symmetric)
        for name, stats in statistics.items()
    }


def activation_bits(scheme: QuantScheme) -> int:
    """Return the bits of the scheme's activations."""
    return 16 if (scheme.activation or "").endswith("int16") else 8


def _collapsed(errors: Mapping[str, LayerError]) -> dict[str, str]:
    return {
        name: f"its own SQNR would be {e.sqnr_db:.1f} dB, below {FLOOR_DB:g}"
        for name, e in errors.items()
        if e.sqnr_db < FLOOR_DB
    }
