"""What each layer of a quantized model does to the result, and why: the rows of `inspect --layers` in full.

    what                                         measured by
    SQNR in, out, own                            layer_sqnr.py, on a few images
    share of the error at the outputs            contributions.py: each rounding alone, switchboard.py
    clipped elements, causes                     causes.py, from the statistics of calibration

A layer's share is that of its weights and of the tensor that it hands on; a tensor that a float layer or the input
hands on counts for the graph input, or for the first layer that reads it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...calib.channels import ChannelExtremes, collect_channels
from ...passes.placement import Placement, output_tensor, place
from ...passes.quant_params import LIMITS, activation_params
from ...passes.weight_writer import channel_axis, input_axis, weight_format
from .. import layers
from ..mixed_precision.contributions import Contributions, measure
from ..mixed_precision.switchboard import Source, Switchboard
from ..mixed_precision.units import Wiring, wire
from ..types import Layer, Progress, QuantScheme, Range, Refusal, StepRecord, TensorStatistics, silent
from . import causes, layer_sqnr

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...calib.folder import Folder
    from ..quantization.quantizer import Quantizer

#: Multiply-accumulates that one measurement may take: well below a second on one core.
_WORK = 3e10
#: Images: the most that are looked at, and the fewest for SQNRs.
_MOST, _LEAST = 16, 2
#: After so many seconds no further batch is measured for the shares.
_SECONDS = 10.0
_BATCH = 8


def explain(
    quantizer: Quantizer,
    images: Folder | None,
    *,
    statistics: Mapping[str, TensorStatistics] | None = None,
    contributions: Contributions | None = None,
    steps: Sequence[StepRecord] = (),
    without: tuple[str, ...] = (),
    features: tuple[str, ...] = (),
    refusals: tuple[Refusal, ...] = (),
    threads: int = 0,
    progress: Progress = silent,
) -> tuple[Layer, ...]:
    """Return every layer, join and rounded input of the model that `quantizer` builds, in graph order.

    `quantizer.kept` must hold all nodes that stay in float. Without `images` nothing is measured. `statistics` are
    those of calibration, by tensor; `contributions` those of the same quantizer with every node on integers, if they
    are known already; `steps` and `without` what was tried and left out; `features` those of the device's CPU;
    `refusals` the reasons for nodes left in float.
    """
    subject = _Subject.of(quantizer)
    rows = subject.rows(refusals)
    if images is None or not subject.placement.nodes:
        return rows
    work = sum(row.macs or 0 for row in rows) or 1
    sqnr = layer_sqnr.measure(
        quantizer.model,
        subject.built,
        [row.node for row in rows],
        (some := _some(images, _count(3 * work, _LEAST))).batches(_BATCH),
        images=len(some),
        threads=threads,
        progress=progress,
    )
    extremes = collect_channels(quantizer.model, subject.channel_axes(), some.batches(_BATCH), threads)
    wiring = wire(quantizer.model, subject.placement)
    found = contributions or _contributions(subject, wiring, images, work, threads, progress)
    portions = _portions(subject, wiring, found)
    context = causes.Context(quantizer.scheme, quantizer.method, {s.name: s for s in steps}, without)
    judge = _Judge(subject, statistics or {}, extremes, context, largest_pair(quantizer.scheme, features))
    return tuple(judge.row(row, sqnr.get(row.node), portions.get(row.node)) for row in rows)


def annotate(described: Iterable[Layer], explained: Iterable[Layer]) -> tuple[Layer, ...]:
    """Return the layers of a result that is in float, with what was found of the quantized one that was not taken."""
    known = {layer.node: layer for layer in explained}
    found = []
    for layer in described:
        other = known.get(layer.node)
        if other is not None:
            names = ("sqnr_db", "clipped_percent", "share_percent", "weights_percent", "cause", "remedy")
            layer = replace(layer, **{name: getattr(other, name) for name in names})
        found.append(layer)
    return tuple(found)


def largest_pair(scheme: QuantScheme, features: Iterable[str]) -> float | None:
    """Return the largest sum of two 8-bit products where the CPU adds them in 16 bits (vpmaddubsw), else None."""
    narrow = "avx2" in features and not any("vnni" in feature for feature in features)
    return 2.0 * LIMITS["uint8"][1] * scheme.weight_max if narrow and scheme.activation == "uint8" else None


# ------------------------------------------------------------------------------------------ what is looked at


@dataclass(frozen=True)
class _Subject:
    """A quantizer's float model, where it is rounded, and the quantized model without what only helps kernels."""

    quantizer: Quantizer
    placement: Placement
    built: ir.Model
    nodes: Mapping[str, ir.Node]
    values: Mapping[str, ir.Value]

    @classmethod
    def of(cls, quantizer: Quantizer) -> _Subject:
        plain = replace(quantizer, scheme=replace(quantizer.scheme, nhwc_kernels=False, shield_float=False))
        model = plain.model
        placement = place(model, plain.ranges, plain.supports, plain.scheme, plain.kept)
        rounding = {node: "combine" for node, _ in placement.reads} | placement.nodes  # residual Adds, pools
        placement.nodes = {node: rounding[node] for node in model.graph if node in rounding}
        built = plain.build()
        if not built.modified:  # its opset lacks the types
            placement = Placement()
        values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
        nodes = {node.name or "": node for node in model.graph}
        return cls(plain, placement, built.model, nodes, {v.name or "": v for v in values})

    def rows(self, refusals: tuple[Refusal, ...]) -> tuple[Layer, ...]:
        """Return rows without figures: rounded inputs, then layers and joins in graph order."""
        known = {layer.node: layer for layer in layers.describe(self.built, self.quantizer.errors, refusals)}
        joins = {node for node, role in self.placement.nodes.items() if role in ("combine", "product")}
        inputs = [v for v in self.quantizer.model.graph.inputs if v in self.placement.ranges]
        rows = [self._rounded(v.name or "", "input", v) for v in inputs]
        for node in self.quantizer.model.graph:
            name = node.name or node.op_type
            if name in known:
                rows.append(known.pop(name))
            elif node in joins:
                rows.append(self._rounded(name, node.op_type, output_tensor(node)))
        return (*rows, *known.values())  # those in subgraphs last

    def _rounded(self, name: str, op: str, value: ir.Value) -> Layer:
        span, step = self.span(value)
        return Layer(name, op, self.quantizer.scheme.activation or "float32", span, step, macs=0)

    def span(self, value: ir.Value) -> tuple[Range | None, float | None]:
        """Return what a tensor's numbers of few bits represent, and their scale."""
        scheme, chosen = self.quantizer.scheme, self.placement.ranges.get(value)
        if chosen is None or scheme.activation is None:
            return None, None
        params = activation_params(chosen, scheme.activation, scheme.symmetric)
        return Range(params.low, params.high), params.scale

    def channel_axes(self) -> dict[str, int | None]:
        """Return the rounded tensors with the axis of their channels: 1 in images, else the last."""
        ranks = {v.name or "": len(v.shape) for v in self.placement.ranges if v.shape is not None}
        return {name: 1 if rank > 3 else rank - 1 for name, rank in ranks.items() if rank > 1}


def _some(images: Folder, count: int) -> Folder:
    """Return so many of the images, spread evenly over the folder."""
    count = min(count, len(images))
    return images.subset(i * len(images) // count for i in range(count))


def _count(work: float, least: int = 1) -> int:
    """Return for how many images there is time if one takes so many multiply-accumulates."""
    return max(least, min(_MOST, int(_WORK / work)))


# ------------------------------------------------------------------------------------------ shares


@dataclass(frozen=True)
class _Portion:
    """One row's part of the error at the outputs, a fraction; `tensor` is the rounded tensor with the largest part."""

    weights: float = 0.0
    tensors: float = 0.0
    tensor: str | None = None
    largest: float = 0.0

    def plus(self, source: Source, part: float) -> _Portion:
        """Return the portion with one more source of error."""
        if source.kind == "weight":
            return replace(self, weights=self.weights + part)
        name, largest = (source.name, part) if part >= self.largest else (self.tensor, self.largest)
        return replace(self, tensors=self.tensors + part, tensor=name, largest=largest)


def _contributions(
    subject: _Subject, wiring: Wiring, images: Folder, work: float, threads: int, progress: Progress
) -> Contributions:
    board = Switchboard(subject.quantizer.model, subject.built, wiring, threads=threads)
    some = _some(images, _count(work * max(len(board.sources), 1)))
    return measure(
        board,
        wiring,
        some.batches(_BATCH),
        images=len(some),
        subsets=0,
        cumulative=False,
        deadline=time.monotonic() + _SECONDS,
        progress=progress,
    )


def _portions(subject: _Subject, wiring: Wiring, found: Contributions) -> dict[str, _Portion]:
    """Share the error out among rows: what sources that are at work add, each alone."""
    units = {unit.name for unit in wiring.units}
    working = [
        (replace(source, units=tuple(u for u in source.units if u in units)), float(energy))
        for source, energy in zip(found.sources, found.alone, strict=True)
        if source.works(units)
    ]
    total = sum(energy for _, energy in working)
    if not (math.isfinite(total) and total > 0):
        return {}
    producers = {link.tensor: link.producer for link in wiring.links}
    inputs = {v.name for v in subject.quantizer.model.graph.inputs}
    portions: dict[str, _Portion] = {unit.name: _Portion() for unit in wiring.units}
    for source, energy in working:
        row = source.units[0]
        if source.kind == "tensor":
            row = source.name if source.name in inputs else producers.get(source.name) or row
        portions[row] = portions.get(row, _Portion()).plus(source, energy / total)
    return portions


# ------------------------------------------------------------------------------------------ causes


@dataclass(frozen=True)
class _Judge:
    """Fills in a row's figures and its likely cause."""

    subject: _Subject
    statistics: Mapping[str, TensorStatistics]
    extremes: Mapping[str, ChannelExtremes]
    context: causes.Context
    pair: float | None

    def row(self, row: Layer, sqnr: layer_sqnr.LayerSqnr | None, portion: _Portion | None) -> Layer:
        """Return the row with all that was found of it."""
        node = self.subject.nodes.get(row.node)
        value = self.subject.values.get(row.node) if node is None else output_tensor(node)
        if sqnr is not None:
            row = replace(row, sqnr_in_db=sqnr.in_db, sqnr_out_db=sqnr.out_db, sqnr_db=sqnr.own_db)
        row = replace(row, clipped_percent=self._tensor(value).clipped_percent)
        if portion is None:
            return row
        handed_on = node is not None and value is not None and portion.tensor == value.name
        what: causes.What = "output" if handed_on else "input"
        facts = self._tensor(self.subject.values.get(portion.tensor or ""))
        if portion.weights > portion.tensors:
            what, facts = "weights", self._weight(node)
        cause, remedy = causes.likely(what, replace(facts, pair=self.pair), self.context)
        return replace(
            row,
            share_percent=100 * (portion.weights + portion.tensors),
            weights_percent=100 * portion.weights,
            cause=cause,
            remedy=remedy,
        )

    def _tensor(self, value: ir.Value | None) -> causes.Facts:
        span, step = (None, None) if value is None else self.subject.span(value)
        if span is None or value is None:
            return causes.Facts()
        even = not (self.context.scheme.activation or "").startswith("float8")
        name = value.name or ""
        return causes.of_tensor(span, step if even else None, self.statistics.get(name), self.extremes.get(name))

    def _weight(self, node: ir.Node | None) -> causes.Facts:
        tensor = node.inputs[1].const_value if node is not None and node.inputs[1] is not None else None
        if node is None or tensor is None:
            return causes.Facts()
        scheme, weight = self.context.scheme, tensor.numpy()
        kind = weight_format(node, weight.shape, scheme, self.subject.quantizer.weight_types.get(node.name or ""))
        sharing = _input_axis(node, weight.ndim) if kind.axis is not None else channel_axis(node, weight.ndim)
        levels = None if kind.dtype.startswith("float8") else int(kind.limit)
        return causes.of_weight(weight, None if kind.block else sharing, levels)


def _input_axis(node: ir.Node, rank: int) -> int:
    """Return the axis of a weight along which the channels lie that it reads."""
    known = {"Conv": 1, "ConvTranspose": 0}
    return known[node.op_type] if node.op_type in known else input_axis(node, rank)
