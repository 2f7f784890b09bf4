"""The float and the quantized, or pruned, network run side by side over few images, layer by layer, nothing run twice.

Both graphs are cut at their linear layers. What later nodes still read is held in memory for all images, and a segment
runs on that alone. At a layer, the walk has what the float network reads and gives, and what the layer reads behind
the layers that are quantized already; `choose` picks its weight from the sums over those (gram.py), the layer runs
with it, its mean error becomes a shift of its bias, and the walk goes on. So every layer is fitted to the FP32 output
on the quantized prefix (AdaQuant: Hubara et al. 2020, "Improving Post Training Neural Quantization"), and its bias is
corrected there (Nagel et al. 2019, section 4.2, layer after layer).

    target_l = y_l + (r_l - r^_l)       shift_l[c] = mean over images and positions of (target_l - y^_l) in channel c

where r is what a residual Add adds to the layer's output, if that is known already: the layer then also makes up for
the error that the skip branch carries, and errors do not pile up along it (targets.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ...passes.bias import takes_shift
from ..layers import LINEAR
from ..types import Progress, StoredWeight, silent
from . import gram
from .layout import Layout, layout_of
from .stream import Arrays, Stream
from .targets import Beside, Wanted, add_along, beside, wanted

#: Rows are kept of a layer, to forgive what a Relu behind it takes away, where a round takes so many multiply-adds at
#: most: the widest layers of a ResNet-50 would add minutes, and most of a gigabyte.
FORGIVEN_WORK, _LEAST_OUTPUTS = 5e9, 256


@dataclass(frozen=True, eq=False)
class Ahead:
    """What the walk knows at a layer of those behind it: what it reads in both networks, and what is beside those.

    `held_out` says which batches are; `twins` are the nodes of the second network.
    """

    x: Arrays
    coarse_x: Arrays
    held_out: Sequence[bool]
    twins: Mapping[str | None, ir.Node]
    beside: Callable[[ir.Node], Beside]


@dataclass(frozen=True, eq=False)
class Site:
    """One layer to choose a weight for: its node in the float model, and the sums over what it reads and shall give.

    `held_out` is the part of the sums that is of held-out batches; `rows` are kept where a Relu forgives; `ahead` is
    there where it is asked for.
    """

    node: ir.Node
    weight: np.ndarray
    moments: gram.Sums
    held_out: gram.Moments | None = None
    rows: gram.Kept | None = None
    ahead: Ahead | None = None

    @property
    def dense(self) -> gram.Moments:
        """The sums of a walk that leaves out layers without a Gram matrix."""
        assert isinstance(self.moments, gram.Moments)
        return self.moments


@dataclass(frozen=True, eq=False)
class Choice:
    """The float32 weight chosen for a layer, of the shape it has in the float model.

    `stored` is what it is stored as where it is rounded, with the objective of plain rounding and of the choice (see
    passes/rounding.py).
    """

    weight: np.ndarray
    stored: StoredWeight | None = None
    objective_nearest: float | None = None
    objective_chosen: float | None = None
    shift: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class LayerStep:
    """What one layer was found to be on the quantized prefix. Ratios of energies in dB over all images.

    `sqnr_in_db` and `sqnr_out_db` are those of its input and (shifted) output against the float network;
    `sqnr_own_db` is the rounding of its weight alone, on the inputs it really gets. `shift` (float64, one per output
    channel) is what its bias needs; None where it takes none. `weight`, and `stored` where it is rounded, are what was
    chosen; None with a `reason` where nothing was.
    """

    node: str
    sqnr_in_db: float
    sqnr_out_db: float
    sqnr_own_db: float | None = None
    shift: np.ndarray | None = None
    weight: np.ndarray | None = None
    stored: StoredWeight | None = None
    objective_nearest: float | None = None
    objective_chosen: float | None = None
    reason: str | None = None


#: Chooses a layer's weight, or says why it stays as it is.
Choose = Callable[[Site], Choice | str]


def walk(
    original: ir.Model,
    quantized: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    choose: Choose | None = None,
    *,
    floats: bool = False,
    correct: bool = True,
    follow_skips: bool = True,
    forgive: bool = False,
    held_out: Sequence[bool] | None = None,
    ahead: bool = False,
    every: bool = False,
    skip: Collection[str] = (),
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> tuple[LayerStep, ...]:
    """Return a step for each linear layer that both models have, in topological order; neither model is changed.

    `quantized` was made from `original` by passes/quantize.py; or, with `floats`, it is a float model whose weights are
    chosen all the same. `feeds` are batches of inputs; those of `held_out` are summed up apart as well; with `ahead` a
    site knows of what stands behind it; with `every`, layers without a Gram matrix and those with float16 weights are
    chosen for as well. Without `choose` the quantized model's own weights are measured.
    `correct=False` leaves biases alone, `follow_skips=False` the errors of skip branches; with `forgive`, what a Relu
    takes away does not count. Layers named in `skip` are left as they are, and out of the result.
    """
    twins = {node.name: node for node in quantized.graph}
    layers = [
        (n, twins[n.name])
        for n in original.graph
        if is_layer(n, half=every) and _same(n, twins.get(n.name)) and n.name not in skip
    ]
    pair = _Pair(Stream(original, feeds, threads), Stream(quantized, feeds, threads), twins)
    options = _Options(
        choose, floats, correct, follow_skips, forgive, held_out, ahead, every, np.random.default_rng(seed)
    )
    steps = []
    for node, twin in layers:
        steps.append(_step(node, twin, pair, options))
        progress("fitting the layers", len(steps), len(layers))
    return tuple(steps)


def is_layer(node: ir.Node, half: bool = False) -> bool:
    """Say whether a node is linear with a constant float32 weight; or, with `half`, a float16 one."""
    if node.op_type not in LINEAR or node.domain not in ("", "ai.onnx"):
        return False
    weight, types = node.inputs[1], (ir.DataType.FLOAT, ir.DataType.FLOAT16)[: 1 + half]
    return weight is not None and weight.const_value is not None and weight.const_value.dtype in types


def peak_bytes(model: ir.Model, feed: Mapping[str, np.ndarray], threads: int = 0) -> int:
    """Return the most bytes of tensors that one walk over this batch holds at a time."""
    stream, peak = Stream(model, [feed], threads), 0
    for node in model.graph:
        if is_layer(node):
            source = stream.pull(node.inputs[0])
            peak = max(peak, stream.bytes + sum(a.nbytes for a in source))
            stream.pull(node.outputs[0])
            peak = max(peak, stream.bytes + sum(a.nbytes for a in source))
    return peak


# ------------------------------------------------------------------------------------------- one layer


@dataclass(frozen=True)
class _Options:
    choose: Choose | None
    floats: bool
    correct: bool
    follow_skips: bool
    forgive: bool
    held_out: Sequence[bool] | None
    ahead: bool
    every: bool
    rng: np.random.Generator


@dataclass(frozen=True)
class _Pair:
    exact: Stream
    coarse: Stream
    twins: Mapping[str | None, ir.Node]


def _same(node: ir.Node, twin: ir.Node | None) -> bool:
    return twin is not None and twin.op_type == node.op_type


def _step(node: ir.Node, twin: ir.Node, pair: _Pair, options: _Options) -> LayerStep:
    x, coarse_x = pair.exact.pull(node.inputs[0]), pair.coarse.pull(twin.inputs[0])
    sqnr_in = _decibels(x, coarse_x)
    ahead = None
    if options.ahead and options.held_out is not None:
        ahead = Ahead(
            x, coarse_x, options.held_out, pair.twins, lambda n: beside(n, pair.twins, pair.exact, pair.coarse)
        )
    del x
    y = pair.exact.pull(node.outputs[0])
    goal = Wanted(y)
    if options.follow_skips:
        goal = wanted(node, y, pair.twins, pair.exact, pair.coarse, options.forgive)
    weight = twin.inputs[1]
    assert weight is not None
    changes = options.floats or not weight.is_initializer()
    picked = _pick(node, coarse_x, goal, options, ahead) if changes else _Picked(reason="left in float")
    del coarse_x, ahead
    if picked.choice is not None:
        array = picked.choice.weight
        pair.coarse.fix(weight, array.T if _turned(node, twin) else array)
    coarse_y = pair.coarse.pull(twin.outputs[0])
    shift = None
    axis = 1 if node.op_type.startswith("Conv") else coarse_y[0].ndim - 1
    if picked.choice is not None and picked.choice.shift is not None:
        shift = picked.choice.shift
        add_along(coarse_y, shift, axis)
    elif options.correct and changes and takes_shift(node):
        shift = goal.shift(coarse_y, axis)
    choice = picked.choice
    return LayerStep(
        node=node.name or "",
        sqnr_in_db=sqnr_in,
        sqnr_out_db=_decibels(y, coarse_y),
        sqnr_own_db=picked.own_db,
        shift=shift,
        weight=choice.weight if choice else None,
        stored=choice.stored if choice else None,
        objective_nearest=choice.objective_nearest if choice else None,
        objective_chosen=choice.objective_chosen if choice else None,
        reason=picked.reason,
    )


@dataclass(frozen=True, eq=False)
class _Picked:
    choice: Choice | None = None
    own_db: float | None = None
    reason: str | None = None


def _pick(node: ir.Node, x: Arrays, goal: Wanted, options: _Options, ahead: Ahead | None) -> _Picked:
    if options.choose is None:
        return _Picked(reason="measured only")
    assert node.inputs[1] is not None and node.inputs[1].const_value is not None
    weight = node.inputs[1].const_value.numpy()
    layout = layout_of(node, weight.shape, wide=options.every)
    if isinstance(layout, str):
        return _Picked(reason=layout)
    layout = replace(layout, biased=takes_shift(node) and options.correct)
    bias = bias_of(node, weight.size // layout.inputs).reshape(layout.groups, 1, -1)
    site = replace(_summed(node, weight, layout, bias, x, goal, options), ahead=ahead)
    choice = options.choose(site)
    if isinstance(choice, str):
        return _Picked(reason=choice)
    error = layout.matrix(choice.weight.astype(np.float64) - weight)
    return _Picked(choice, _ratio_db(site.moments.energy, site.moments.lost(error)))


def _summed(
    node: ir.Node, weight: np.ndarray, layout: Layout, bias: np.ndarray, x: Arrays, goal: Wanted, options: _Options
) -> Site:
    """Return the sums over rows drawn from all batches, those over held-out batches, and the rows where they serve."""
    moments = gram.sums(layout, layout.rows_of(goal.target)) if options.every else gram.Moments(layout)
    apart = gram.Moments(layout) if options.held_out is not None else None
    most, images = layout.most, sum(map(len, x))
    outputs = weight.size // layout.inputs + _LEAST_OUTPUTS * layout.groups
    rows = gram.Kept(layout) if goal.forgiving and most * layout.inputs * outputs <= FORGIVEN_WORK else None
    for i, (one, target) in enumerate(zip(x, goal.target, strict=True)):
        share = 1 / len(x) if options.held_out is None else len(one) / images  # those parts differ in size
        drawn = layout.draw(target, math.ceil(most * share), options.rng)
        read, values = layout.inputs_at(one, target, drawn), layout.outputs_at(target, drawn)
        moments.add(read, values - bias)  # what the weight has to make
        if apart is not None and options.held_out is not None and options.held_out[i]:
            apart.add(read, values - bias)
        if rows is not None:
            level = np.zeros_like(values) if goal.level is None else layout.outputs_at(goal.level[i], drawn)
            rows.add(read, values - bias, level + bias)
    return Site(node, weight, moments, apart if apart is not None and apart.rows else None, rows)


def bias_of(node: ir.Node, channels: int) -> np.ndarray:
    """Return the layer's constant bias, one float64 per output channel; zeros where it has none."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or value.const_value is None:
        return np.zeros(channels)
    bias = value.const_value.numpy().reshape(-1).astype(np.float64) * node.attributes.get_float("beta", 1.0)
    return np.broadcast_to(bias, (channels,))


def _turned(node: ir.Node, twin: ir.Node) -> bool:
    """Say whether the quantized model stores a Gemm's weight the other way round."""
    return node.attributes.get_int("transB", 0) != twin.attributes.get_int("transB", 0)


def _decibels(exact: Arrays, coarse: Arrays) -> float:
    signal = sum(float(np.square(a, dtype=np.float64).sum()) for a in exact)
    error = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(exact, coarse, strict=True))
    return _ratio_db(signal, error)


def _ratio_db(signal: float, error: float) -> float:
    return 10 * math.log10(max(signal, 1e-300) / max(error, 1e-300))
