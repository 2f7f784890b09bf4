"""Weights of 4 bits for some of a quantizer's layers, of 8 bits for the others.

Two quantizers of one float model, ranges and placement alike, differ in their weights: `wide` stores 8 bits, `narrow`
4. What is between them is rounded anew, layer after layer on its own prefix (rounder.py): a weight that was fitted to
the errors of other weights in front of it loses more than it gains (FastestDet with a tenth of its weights at 8 bits:
4.0 dB with the weights that were fitted to all of them having 4, 10.3 dB rounded anew).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...passes.quant_params import needed_opset
from ...passes.raise_opset import RaiseOpset
from .. import model as model_io
from .. import pipeline
from ..fitting.feeds import calibration_feeds
from ..layers import LINEAR
from ..quantization.quantizer import Quantizer
from ..quantization.rounder import round_weights

if TYPE_CHECKING:
    import numpy as np

    from ..job import Job
    from ..proof import Prover
    from ..types import QuantScheme, WeightType
    from .tradeoff import Point


@dataclass(frozen=True, eq=False)
class Widths:
    """The two ends. What mixes them is rounded on `this` job's images."""

    this: Job
    wide: Quantizer
    narrow: Quantizer

    def mixture(self, point: Point) -> Quantizer:
        """Return the quantizer of a point: its layers' weights of 4 and of 8 bits, rounded on the point's prefix."""
        found = self.unrounded(point)
        as_is = not point.narrow or found is self.narrow or "rounding" in self.this.options.without
        return found if as_is else self._rounded(found)

    def unrounded(self, point: Point) -> Quantizer:
        """Return the same with every number of a mixture rounded by itself: as large a file, for next to no time."""
        layers = {node.name or "" for node in self.narrow.model.graph if node.op_type in LINEAR}
        if not layers & point.narrow:
            return self.wide
        if layers <= point.narrow:
            return self.narrow
        types: dict[str, WeightType] = dict.fromkeys(sorted(layers - point.narrow), "int8")
        kept = {**self.narrow.kept, **point.keep_float}
        return replace(self.narrow, kept=kept, weight_types=types, weights={}, bias_shift={})

    def _rounded(self, quantizer: Quantizer) -> Quantizer:
        bare = replace(quantizer, weights={}, bias_shift={})
        found = round_weights(
            bare.model,
            bare.step(),
            self._feeds,
            correct="bias-correction" not in self.this.options.without,
            seed=self.this.options.seed,
            threads=self.this.threads,
            progress=self.this.progress,
        )
        return replace(bare, weights=found.weights, bias_shift=found.bias_shift)

    @functools.cached_property
    def _feeds(self) -> Sequence[Mapping[str, np.ndarray]]:
        assert self.this.images is not None
        return calibration_feeds(self.narrow.model, self.this.images, threads=self.this.threads)


def narrowed(this: Job, wide: Quantizer, scheme: QuantScheme, prover: Prover) -> Widths | None:
    """Return 4-bit weights beside those of a quantizer that has 8; None where its model cannot hold them."""
    passes = [RaiseOpset(target=needed_opset(scheme))]
    model, _ = pipeline.run(model_io.copy(wide.model), passes, prover)
    wide = replace(wide, model=model)
    narrow = replace(wide, scheme=scheme, weights={}, bias_shift={})
    if not narrow.build().modified:
        return None
    ends = Widths(this, wide, narrow)
    return replace(ends, narrow=ends._rounded(narrow)) if "rounding" not in this.options.without else ends


def widened(this: Job, narrow: Quantizer, scheme: QuantScheme) -> Widths:
    """Return 8-bit weights beside those of a quantizer that has 4."""
    assert this.images is not None
    wide = replace(narrow, scheme=scheme, weights={}, bias_shift={})
    corrected = wide.corrected(this.images, this.threads, this.progress)
    return Widths(this, replace(corrected, kept=narrow.kept), narrow)
