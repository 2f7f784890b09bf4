"""Choose the integers of all weights, layer after layer, so that each layer's output errs least (passes/rounding.py).

The walk (layerwise.py) gives the sums over what a layer reads behind the layers that are quantized already; a method
rounds; plain rounding stays where it is no worse. What comes out is what passes/quantize.py writes: integers with their
scales, and the shift of each bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...passes import rounding
from ...passes.weight_writer import WeightFormat, dequantize, weight_format
from .. import model as model_io
from ..fitting.layerwise import Choice, LayerStep, Site, walk
from ..types import Progress, StoredWeight, silent

if TYPE_CHECKING:
    from ...passes.quantize import Quantize


@dataclass(frozen=True, eq=False)
class Roundings:
    """By node name: the weights that were chosen and the shifts of the biases; and a step for each layer, in order."""

    weights: Mapping[str, StoredWeight]
    bias_shift: Mapping[str, np.ndarray]
    steps: tuple[LayerStep, ...]


def round_weights(
    model: ir.Model,
    quantize: Quantize,
    feeds: Sequence[Mapping[str, np.ndarray]],
    method: str = "auto",
    *,
    shrink: float | None = None,
    correct: bool = True,
    follow_skips: bool = True,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> Roundings:
    """Choose the weight of every layer that `quantize` quantizes; the float `model` is left as it is.

    `feeds` are batches of calibration inputs (see `calibration_feeds`). `method` is "nearest" (the weight itself, its
    largest number not clipped) or a name in rounding.METHODS; `shrink` is as for rounding.problem, `correct` and
    `follow_skips` as for layerwise.walk. What is returned takes the place of `quantize.weights` and `.bias_shift`.
    Layers whose weights are no integers, or that have no Gram matrix, are left to `quantize`; their step says why.
    """
    twin = model_io.copy(model)
    replace(quantize, weights={}, bias_shift={})(twin)

    def choose(site: Site) -> Choice | str:
        name = site.node.name or ""
        kind = weight_format(site.node, site.weight.shape, quantize.scheme, quantize.weight_types.get(name))
        return chosen(site, kind, method, shrink)

    steps = walk(
        model,
        twin,
        feeds,
        choose,
        correct=correct,
        follow_skips=follow_skips,
        seed=seed,
        threads=threads,
        progress=progress,
    )
    return Roundings(
        {s.node: s.stored for s in steps if s.stored is not None},
        {s.node: s.shift for s in steps if s.shift is not None},
        steps,
    )


def follow_biases(
    model: ir.Model,
    quantize: Quantize,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    threads: int = 0,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Return the shift of each layer's bias, by node name, with the weights as `quantize` rounds them.

    What is returned takes the place of `quantize.bias_shift`, as of `round_weights`.
    """
    twin = model_io.copy(model)
    replace(quantize, bias_shift={})(twin)
    steps = walk(model, twin, feeds, None, threads=threads, progress=progress)
    return {s.node: s.shift for s in steps if s.shift is not None}


def chosen(site: Site, kind: WeightFormat, method: str, shrink: float | None = None) -> Choice | str:
    """Round one layer's weight into a format by a method; the reason where it cannot be done."""
    if not kind.dtype.endswith(("int8", "int4")):
        return f"{kind.dtype} is no integer type"
    layout, moments = site.dense.layout, site.dense
    gram, cross = moments.gram(), moments.cross()
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        return "what it reads or gives holds NaN or infinity"
    p = rounding.problem(
        layout.matrix(site.weight),
        gram,
        cross,
        low=-int(kind.limit),
        high=int(kind.limit),
        shrink=shrink,
        columns=np.arange(layout.inputs) // kind.block if kind.block else None,
        shared=kind.axis is None,
    )
    plain = best = rounding.nearest(p, p.widest_scales(p.weight))
    if method != "nearest":
        best = rounding.better(p, plain, rounding.METHODS[method](p))
    scales = best.scales.reshape(-1, best.scales.shape[2])  # (out, scales)
    if kind.block is None:
        scales = scales[:, 0] if kind.axis is not None else scales[:1, 0]
    elif layout.transposed:
        scales = scales.T
    integers = np.ascontiguousarray(layout.unmatrix(best.integers))
    stored = StoredWeight(integers, np.ascontiguousarray(scales), kind.axis, kind.dtype, kind.block)
    return Choice(dequantize(stored), stored, plain.objective, best.objective)
