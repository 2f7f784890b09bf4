"""In which order the units of each group would go, and what that costs at the network's outputs.

The default, `obs`: what a layer reads of a group is summed up in X'X (gram.py), of exact inputs; a unit goes where the
reconstruction error of all layers that read the group, refitted, rises least (structured OBS; passes/pruning.py). For
comparison there are

    l1, l2      the norm of the unit's elements of the weights that make it (Li et al., "Pruning Filters for Efficient
                ConvNets", 2017)
    bn          the magnitude of BatchNormalization's scale (Liu et al., "Network Slimming", 2017), of the model before
                it was folded
    energy      the mean square of what is read of the unit

whose errors on the way come from the same sums. A local error says little of the outputs: a group far from them may be
amplified. So the outputs' error is measured with some parts of one group gone and its readers refitted, and the curve
goes through that: e(r) = local(r) * (measured / local), the ratio interpolated over local error.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ...passes import pruning
from ...passes.bias import shift_bias, takes_shift
from ...passes.channel_cuts import ChannelGroup, Member
from ...passes.constants import Names, add_initializer
from .. import model as model_io
from ..fitting import gram
from ..fitting.layerwise import bias_of, is_layer
from ..fitting.layout import Layout, layout_of
from ..fitting.probe import Probe, is_large
from ..fitting.stream import Stream
from ..layers import axes_of
from ..types import Progress, silent

#: The parts of a group that go when its outputs' error is measured.
PROBED = (0.25, 0.5, 0.75)
#: The same of a large network (probe.py).
_LARGE_PROBED = (0.5,)
#: Errors of a residual stream, which several layers read, stay where they are; those inside a block are made up for by
#: the blocks behind it, to two fifths of what was measured before repair on ResNet-20.
_LASTING = 3.0
CRITERIA = ("obs", "l1", "l2", "bn", "energy")


@dataclass(frozen=True, eq=False)
class Ranking:
    """A group's units in the order in which they go, and the outputs' relative error after 0, 1, 2, … of them."""

    order: tuple[int, ...]
    curve: np.ndarray


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that reads a group: its sums, its weight, the unit of each column, and the mean it reads.

    Of each group of a convolution in groups: `gram` (groups, in, in), `weight` (groups, out, in), `units` and `mean`
    (groups, in).
    """

    node: ir.Node
    layout: Layout
    gram: np.ndarray
    weight: np.ndarray
    units: np.ndarray
    mean: np.ndarray


def rank(
    model: ir.Model,
    groups: Sequence[ChannelGroup],
    feeds: Sequence[Mapping[str, np.ndarray]],
    criterion: str = "obs",
    *,
    scales: Mapping[str, np.ndarray] | None = None,
    ridge: float = pruning.RIDGE,
    probes: Sequence[float] | None = None,
    seed: int = 0,
    threads: int = 0,
    deadline: float | None = None,
    progress: Progress = silent,
) -> dict[str, Ranking]:
    """Return the ranking of each group that some layer with a Gram matrix reads, by the group's name.

    What is not ranked at the `deadline`, on time.monotonic's clock, is left out.

    `scales` are BatchNormalization's, by the name of the layer before it, for "bn"; where a group has none, "l1" takes
    its place. Groups that no such layer reads are left out: nothing could be repaired.
    """
    stream, rng = Stream(model, feeds, threads), np.random.default_rng(seed)
    probe = Probe(model, feeds, threads)
    probes = probes or (_LARGE_PROBED if is_large(model) else PROBED)
    left = {group.name: set(group.consumers) for group in groups}
    readers: dict[str, list[_Reader]] = {group.name: [] for group in groups}
    found: dict[str, Ranking] = {}
    for node in [node for node in model.graph if is_layer(node)]:
        if deadline is not None and time.monotonic() >= deadline:
            break
        mine = [group for group in groups if (node.name or "") in left[group.name]]
        read = _read(node, mine, stream, rng) if mine else {}
        for group in mine:
            left[group.name].discard(node.name or "")
            if group.name in read:
                readers[group.name].append(read[group.name])
            if not left[group.name]:
                mine_only = readers.pop(group.name)
                if mine_only:
                    found[group.name] = _ranked(model, group, mine_only, criterion, scales or {}, ridge, probe, probes)
                progress("ranking channels", len(groups) - len(readers), len(groups))
    return found


def batch_norm_scales(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the scale of each BatchNormalization that follows a layer, by the layer's name; of an unfolded model."""
    found = {}
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == "BatchNormalization" and node.inputs[0] else None
        scale = node.inputs[1] if before is not None else None
        if before is not None and before.name and scale is not None and scale.const_value is not None:
            found[before.name] = scale.const_value.numpy().reshape(-1)
    return found


def _read(
    node: ir.Node, groups: Sequence[ChannelGroup], stream: Stream, rng: np.random.Generator
) -> dict[str, _Reader]:
    """Return the sums over what a layer reads, for each group that it reads; nothing where it has no Gram matrix."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    array = weight.const_value.numpy()
    layout = layout_of(node, array.shape)
    mine = [(group, member) for group in groups if (member := _member(group, node, axes_of(node)[0])) is not None]
    if isinstance(layout, str) or not mine:
        return {}
    layout = replace(layout, biased=takes_shift(node))
    x, y = stream.pull(node.inputs[0]), stream.pull(node.outputs[0])
    moments, bias = gram.Moments(layout), bias_of(node, array.size // layout.inputs).reshape(layout.groups, 1, -1)
    most = -(-layout.most // len(x))
    for one, wanted in zip(x, y, strict=True):
        rows, values = layout.rows(one, wanted, most, rng)
        moments.add(rows, values - bias)
    matrix = layout.matrix(array.astype(np.float64))
    found = {}
    for group, member in mine:
        shape = [1] * array.ndim
        shape[member.axis] = -1
        spread = layout.matrix(np.broadcast_to(member.units.reshape(shape), array.shape))
        units = spread[:, 0]  # alike for all outputs: the group is along the inputs
        if (spread == units[:, None]).all():
            found[group.name] = _Reader(node, layout, moments.gram(), matrix, units, moments.mean())
    return found


# ------------------------------------------------------------------------------------------- one group


def _ranked(
    model: ir.Model,
    group: ChannelGroup,
    readers: Sequence[_Reader],
    criterion: str,
    scales: Mapping[str, np.ndarray],
    ridge: float,
    probe: Probe,
    probes: Sequence[float],
) -> Ranking:
    each = [one for reader in readers for one in _weighed(reader)]
    order = None
    if criterion != "obs":
        order = [int(unit) for unit in np.argsort(_scores(model, group, readers, criterion, scales), kind="stable")]
    found = pruning.eliminate(each, group.units, cuts=group.units - 1, ridge=ridge, order=order)
    order, local = found.order.tolist(), found.errors
    factor = _LASTING if len(readers) > 1 else 1.0
    counts = sorted({round(part * group.units) for part in probes} & set(range(1, len(local))))
    lost = [factor * probe.error(_refitted(model, readers, order[:count], ridge)) for count in counts]
    return Ranking(tuple(order), pruning.measured_curve(local, counts, lost) if counts else local)


def _refitted(model: ir.Model, readers: Sequence[_Reader], removed: Sequence[int], ridge: float) -> ir.Model:
    """Return a copy of the model whose readers of a group have lost some units and were refitted."""
    twin = model_io.copy(model)
    nodes, names = {node.name: node for node in twin.graph}, Names.of(twin)
    for reader in readers:
        fitted = np.zeros(reader.weight.shape)
        for new, sums, old, units in zip(fitted, reader.gram, reader.weight, reader.units, strict=True):
            kept = np.flatnonzero(~np.isin(units, list(removed)))
            new[:, kept] = pruning.refit(sums, old @ sums, kept, ridge, old)
        array = np.ascontiguousarray(reader.layout.unmatrix(fitted)).astype(np.float32)
        name = names.fresh(f"{reader.node.name}_refitted")  # a weight of its own: others may share the old one
        own = add_initializer(twin.graph, name, ir.tensor(array, name=name))
        nodes[reader.node.name].replace_input_with(1, own)
        if reader.layout.biased:
            lost = np.einsum("goi,gi->go", reader.weight - fitted, reader.mean).reshape(-1)
            shift_bias(twin.graph, nodes[reader.node.name], lost, names)
    return twin


def _weighed(reader: _Reader) -> list[pruning.Reader]:
    """Return a reader, one for each of its groups, whose errors count relative to what the layer gives."""
    energy = float(np.einsum("goi,gij,goj->", reader.weight, reader.gram, reader.weight, optimize=True))
    counts = 1 / energy if energy > 0 else 0.0
    parts = zip(reader.gram, reader.weight, reader.units, strict=True)
    return [pruning.Reader(sums, weight @ sums, units, counts, weight) for sums, weight, units in parts]


def _scores(
    model: ir.Model,
    group: ChannelGroup,
    readers: Sequence[_Reader],
    criterion: str,
    scales: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return the importance of each unit, by a criterion that looks at one unit alone."""
    scores = np.zeros(group.units)
    if criterion == "energy":
        for reader in readers:
            inside = reader.units >= 0
            np.add.at(scores, reader.units[inside], np.diagonal(reader.gram, axis1=1, axis2=2)[inside])
        return scores
    if criterion == "bn" and any(name in scales for name in group.producers):
        for member in group.members:
            if member.node in scales and len(scales[member.node]) == len(member.units) and member.axis == 0:
                inside = member.units >= 0
                np.add.at(scores, member.units[inside], np.abs(scales[member.node])[inside])
        return scores
    for node in model.graph:
        made = _member(group, node, axes_of(node)[1]) if node.name in group.producers else None
        if made is None:
            continue
        array = np.abs(_array(node).astype(np.float64)) ** (2 if criterion == "l2" else 1)
        sums = array.sum(axis=tuple(axis for axis in range(array.ndim) if axis != made.axis))
        np.add.at(scores, made.units[made.units >= 0], sums[made.units >= 0])
    return scores


def _array(node: ir.Node) -> np.ndarray:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    return weight.const_value.numpy()


def _member(group: ChannelGroup, node: ir.Node, axis: int) -> Member | None:
    """Return which units of a group the indices of a layer's weight are, along an axis."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or weight.const_value is None:
        return None
    return next((m for m in group.members if (m.node, m.tensor, m.axis) == (node.name, weight.name, axis)), None)
