"""Channels that can be cut, in groups; the model without some of them; and the original with these masked.

Algebra: cut_analysis.py. With the channels that are cut taken as 0 by whatever sums them up,

    cut(model, removed)  =  mask(model, removed)        up to float rounding, for all inputs

since sums over fewer terms then miss zeros only. `Prover(mask(model, removed)).prove(cut(model, removed), tolerance)`
of compiler/proof.py checks that by running both.

Not touched: graph inputs and outputs, subgraphs, and all channels that meet an operator without a rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .channel_analysis import PINNED
from .constants import Names, add_initializer, remove_unused
from .cut_analysis import CutVariables, Follower, analyse
from .cut_rewrites import Edit
from .shapes import infer_shapes
from .weights import LAZY_BYTES

#: Group -> the units to remove.
Removed = Mapping[str, Collection[int]]

# ------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, eq=False)
class Member:
    """A tensor of which a group has elements.

    `units` (length of the tensor along `axis`) has the unit of each index, -1 for those of no unit of the group.
    `node` is empty for what nodes compute; a constant is listed for each node that reads it, under that node's name.
    """

    tensor: str
    axis: int
    units: np.ndarray
    node: str = ""

    def indices(self, removed: Collection[int]) -> np.ndarray:
        """Return the indices along `axis` that go with these units."""
        return np.flatnonzero(np.isin(self.units, list(removed)))


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that layers make and read together, as `units`: all elements of a unit are cut, or none.

    `name` is that of the first node that makes them; `producers` are layers that begin them or hand them on
    with weights of their own (depthwise convolutions), `consumers` those that read them: names of nodes, in the
    graph's order. `members` are all tensors and constants that have some of them.
    """

    name: str
    units: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All groups of a model, in the graph's order, and what could not be understood, or must stay whole."""

    groups: tuple[ChannelGroup, ...]
    refusals: tuple[Refusal, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __getitem__(self, index: int) -> ChannelGroup:
        return self.groups[index]

    def feasible(self, removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return `removed` without units that leave a tensor empty: of several the one listed last is given back."""
        left = {name: list(units) for name, units in removed.items()}
        for members in self._by_tensor().values():
            if _emptied(members, left):
                name, member = members[-1]
                left[name].remove(next(unit for unit in reversed(left[name]) if unit in member.units))
        return left

    def _by_tensor(self) -> dict[str, list[tuple[str, Member]]]:
        found: dict[str, list[tuple[str, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                if not member.node:
                    found.setdefault(member.tensor, []).append((group.name, member))
        return found


def _emptied(members: Sequence[tuple[str, Member]], removed: Removed) -> bool:
    gone = sum(len(member.indices(removed.get(name, ()))) for name, member in members)
    return gone == len(members[0][1].units)


def groups(model: ir.Model) -> ChannelGroups:
    """Find the groups of channels that can be cut; `model`, which has been normalised, is not changed.

    Two units are of one group if one layer makes both, or by way of units that others make with them.
    """
    found = analyse(model)
    return _Grouping(found).result()


@dataclass(frozen=True, eq=False)
class _Grouping:
    """The variables of a model, in groups."""

    found: CutVariables

    def result(self) -> ChannelGroups:
        made = tuple(self._group(name, variables) for name, variables in self.variables().items())
        return ChannelGroups(made, self.found.refusals)

    def variables(self) -> dict[str, np.ndarray]:
        """Return the variables of each group, ascending, by the group's name."""
        from scipy.sparse import coo_array  # heavy
        from scipy.sparse.csgraph import connected_components

        made = [(layer.node, np.setdiff1d(layer.outputs, [PINNED])) for layer in self.found.layers if layer.fresh]
        pairs = [np.stack([np.full_like(ids, ids[0]), ids]) for _, ids in made if len(ids)]
        rows, columns = np.concatenate([np.zeros((2, 1), np.int64), *pairs], axis=1)
        size = (self.found.count, self.found.count)
        labels = connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=size), directed=False)[1]
        first: dict[int, ir.Node] = {}
        for node, ids in made:
            if len(ids):
                first.setdefault(int(labels[ids[0]]), node)
        taken = Counter(_name(node) for node in first.values())
        return {
            _name(node) if taken[_name(node)] == 1 else node.outputs[0].name or "": np.flatnonzero(labels == label)
            for label, node in first.items()
        }

    def _group(self, name: str, variables: np.ndarray) -> ChannelGroup:
        units = np.full(self.found.count, -1)
        units[variables] = np.arange(len(variables))
        layers = self.found.layers
        return ChannelGroup(
            name=name,
            units=len(variables),
            producers=_names(layer.node for layer in layers if (units[layer.outputs] >= 0).any()),
            consumers=_names(layer.node for layer in layers if (units[layer.inputs] >= 0).any()),
            members=tuple(self._members(units)),
        )

    def _members(self, units: np.ndarray) -> Iterator[Member]:
        for name, (axis, ids) in self.found.tensors.items():
            if (units[ids] >= 0).any():
                yield Member(name, axis, units[ids])
        for follower in self.found.followers:
            for axis, ids in follower.axes.items():
                if (units[ids] >= 0).any():
                    yield Member(_value(follower).name or "", axis, units[ids], _name(follower.node))


def _names(nodes: Iterable[ir.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_name(node) for node in nodes))


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _value(follower: Follower) -> ir.Value:
    value = follower.node.inputs[follower.index]
    assert value is not None
    return value


# ------------------------------------------------------------------------------------------- cutting


def cut(model: ir.Model, removed: Removed) -> ir.Model:
    """Return `model` without the units `removed` of its groups; `model` is not changed.

    Raises ValueError for a group or unit that there is not, and where a tensor would have nothing left
    (`ChannelGroups.feasible` says which units can go).
    """
    twin = model.clone()
    found = analyse(twin)
    gone = _gone(found, removed)
    kept = {name: (axis, ~gone[ids]) for name, (axis, ids) in found.tensors.items() if gone[ids].any()}
    for name, (_, left) in kept.items():
        if not left.any():
            raise ValueError(f"nothing would be left of {name}")
    if not kept:
        return twin
    names = Names.of(twin)
    edit = Edit(twin.graph, names, kept, found.dims, found.reshaped)
    old = list(twin.graph.initializers.values())
    _cut_constants(edit, found.followers, gone)
    for grouped in found.grouped:
        count = int((~gone[grouped.ids]).sum())
        if count < len(grouped.ids):
            grouped.node.attributes[grouped.attribute] = ir.AttrInt64(grouped.attribute, count)
    for node in list(twin.graph):
        edit.rewrite(node)
    remove_unused(old)
    _check(twin, edit)
    return twin


def _gone(found: CutVariables, removed: Removed) -> np.ndarray:
    """Return a boolean for each variable: whether it is cut."""
    gone = np.zeros(found.count, bool)
    by_name = _Grouping(found).variables()
    for name, units in removed.items():
        if name not in by_name:
            raise ValueError(f"there is no group {name}")
        wrong = [unit for unit in units if not 0 <= unit < len(by_name[name])]
        if wrong:
            raise ValueError(f"group {name} has {len(by_name[name])} units, hence no unit {wrong[0]}")
        gone[by_name[name][list(units)]] = True
    return gone


def _cut_constants(edit: Edit, followers: Iterable[Follower], gone: np.ndarray) -> None:
    """Give every node the part of its constants that it still needs.

    A constant that all its users need the same part of becomes that part; else there is one for each part.
    """
    wanted: dict[ir.Value, dict[bytes, tuple[dict[int, np.ndarray], list[Follower]]]] = {}
    for follower in followers:
        kept = {axis: ~gone[ids] for axis, ids in sorted(follower.axes.items()) if gone[ids].any()}
        if kept:
            key = b"".join(axis.to_bytes(2, "big") + left.tobytes() for axis, left in kept.items())
            wanted.setdefault(_value(follower), {}).setdefault(key, (kept, []))[1].append(follower)
    for value, parts in wanted.items():
        for kept, users in parts.values():
            if len(users) == len(value.uses()) and not value.is_graph_output():
                value.const_value = _part(value, kept)
                value.shape = ir.Shape(value.const_value.shape.numpy())
                continue
            name = edit.names.fresh(f"{value.name}_cut")
            new = add_initializer(edit.graph, name, _part(value, kept))
            for user in users:
                user.node.replace_input_with(user.index, new)


def _part(value: ir.Value, kept: Mapping[int, np.ndarray]) -> ir.TensorProtocol:
    """Return a constant without some indices along some axes; a large one is cut when it is read."""
    tensor = value.const_value
    assert tensor is not None
    shape = [int(kept[axis].sum()) if axis in kept else n for axis, n in enumerate(tensor.shape.numpy())]

    def part() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axis, left in kept.items():
            array = array.compress(left, axis)
        return ir.Tensor(array, dtype=tensor.dtype, name=value.name)

    return ir.LazyTensor(part, tensor.dtype, ir.Shape(shape), name=value.name) if tensor.nbytes > LAZY_BYTES else part()


def _check(model: ir.Model, edit: Edit) -> None:
    """Infer the shapes anew, and see that they are those that the cut is to have."""
    fault = infer_shapes(model)
    assert fault is None, f"the cut contradicts itself: {fault}"
    for node in model.graph:
        for value in node.outputs:
            if value.name not in edit.dims or value.shape is None:
                continue
            want = edit.new_dims(value)
            known = [
                (a, b) for a, b in zip(want, value.shape, strict=True) if isinstance(a, int) and isinstance(b, int)
            ]
            assert all(a == b for a, b in known), f"{value.name} has shape {value.shape} after the cut, not {want}"


# ------------------------------------------------------------------------------------------- masking


def mask(model: ir.Model, removed: Removed) -> ir.Model:
    """Return `model` with the units `removed` taken as 0 by all that sum them up; `model` is not changed.

    The shapes of all tensors stay. Raises ValueError for a group or unit that there is not.
    """
    twin = model.clone()
    infer_shapes(twin)
    found = analyse(twin)
    gone, names = _gone(found, removed), Names.of(twin)
    edit = Edit(twin.graph, names, {}, found.dims, frozenset())
    for consumer in found.consumers:
        if gone[consumer.ids].any():
            source = consumer.node.inputs[consumer.index]
            assert source is not None and source.dtype is not None
            factors = (~gone[consumer.ids]).astype(source.dtype.numpy())
            shape = [-1 if axis == consumer.axis else 1 for axis in range(consumer.rank)]
            masked = edit.insert(
                consumer.node, "Mul", [source, edit.constant(consumer.node, "mask", factors.reshape(shape))]
            )
            consumer.node.replace_input_with(consumer.index, masked)
    return twin
