"""What nodes must say otherwise once channels are cut: target shapes, lengths of parts, bounds, indices, padding.

A rewrite gets the node and the lengths before and after. With k(i) whether index i of an axis is kept, and n(i) the
number of kept indices before i, its new place:

    Split    a part's length is the number of its kept indices
    Slice    of those taken, the kept ones, at their new places: a range again, or else a Gather
    Gather   the same for its table of indices
    Pad      the number of kept indices among those added (or taken away) at either end
    Reshape, Expand, Resize    the new lengths, as far as lengths were known
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .channel_layout import Dim
from .channel_moves import axis_of, ints
from .constants import Names, add_initializer, small_array
from .cut_shapes import TARGETS, target_axes

_END = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Edit:
    """A graph in which channels are being cut.

    `kept` has, for each tensor that loses something, the axis and a boolean for each index; `dims` the dimensions of
    all tensors before. `reshaped` are nodes whose computed target shape may be another one now.
    """

    graph: ir.Graph
    names: Names
    kept: Mapping[str, tuple[int, np.ndarray]]
    dims: Mapping[str, tuple[Dim, ...]]
    reshaped: frozenset[ir.Node]

    def cut(self, value: ir.Value | None, axis: int) -> np.ndarray | None:
        """Return which indices a tensor keeps along `axis`; None where it keeps them all."""
        found = self.kept.get(value.name or "") if value is not None else None
        return found[1] if found is not None and found[0] == axis else None

    def new_dims(self, value: ir.Value) -> tuple[Dim, ...]:
        """Return a tensor's dimensions after the cut."""
        dims = list(self.dims[value.name or ""])
        if (value.name or "") in self.kept:
            axis, kept = self.kept[value.name or ""]
            dims[axis] = int(kept.sum())
        return tuple(dims)

    def constant(self, node: ir.Node, what: str, array: np.ndarray) -> ir.Value:
        """Add a constant, named after the node that reads it."""
        name = self.names.fresh(f"{node.name or node.outputs[0].name}_{what}")
        return add_initializer(self.graph, name, ir.tensor(np.ascontiguousarray(array), name=name))

    def insert(self, node: ir.Node, op: str, inputs: Sequence[ir.Value], axis: int | None = None) -> ir.Value:
        """Put a new node in front of `node`, and return its output."""
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        new = ir.Node("", op, inputs, attributes, name=self.names.fresh(f"{node.name or node.outputs[0].name}_{op}"))
        new.outputs[0].name = self.names.fresh(f"{new.name}_out")
        self.graph.insert_before(node, new)
        return new.outputs[0]

    def say(self, node: ir.Node, index: int, what: str, numbers: Sequence[int] | np.ndarray) -> None:
        """Give a node other integers, where it has them: in an attribute or as an input."""
        if what in node.attributes:
            node.attributes[what] = ir.AttrInt64s(what, [int(number) for number in numbers])
            return
        old = small_array(node.inputs[index]) if index < len(node.inputs) else None
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        array = np.asarray(numbers, np.int64 if old is None else old.dtype)
        node.replace_input_with(index, self.constant(node, what, array))

    def rewrite(self, node: ir.Node) -> None:
        """Let a node say what holds after the cut."""
        touched = any(v is not None and v.name in self.kept for v in (*node.inputs, *node.outputs))
        if (touched or node in self.reshaped) and not node.domain and node.op_type in _REWRITES:
            _REWRITES[node.op_type](self, node)


# ------------------------------------------------------------------------------------------- target shapes


def _target(edit: Edit, node: ir.Node) -> None:
    """Write all lengths that are known; -1 stays. What is computed is overwritten where it is known."""
    index = TARGETS[node.op_type]
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return  # a Resize by factors
    dims, old = edit.new_dims(node.outputs[0]), small_array(value)
    count = len(old) if old is not None else edit.dims[value.name or ""][0]
    known = [dims[axis] for axis in target_axes(node, count, len(dims))]
    fixed = np.array([isinstance(dim, int) for dim in known], bool)
    lengths = np.array([dim if isinstance(dim, int) else 0 for dim in known], np.int64)
    if old is not None:
        edit.say(node, index, "shape", np.where(fixed & (old != -1), lengths, old))
    elif fixed.any():
        inputs = [edit.constant(node, "known", fixed), edit.constant(node, "lengths", lengths), value]
        node.replace_input_with(index, edit.insert(node, "Where", inputs))


# ------------------------------------------------------------------------------------------- parts


def _split(edit: Edit, node: ir.Node) -> None:
    axis = axis_of(node, 0, len(edit.new_dims(node.outputs[0])))
    lengths = [edit.new_dims(value)[axis] for value in node.outputs]
    source = node.inputs[0]
    if source is None or edit.cut(source, axis) is None:
        return
    node.attributes.pop("num_outputs", None)
    if edit.graph.opset_imports.get("", 1) < 13:
        node.attributes["split"] = ir.AttrInt64s("split", [int(length) for length in lengths])  # type: ignore[arg-type]  # they were analysed, so known
    else:
        edit.say(node, 1, "split", np.array(lengths, np.int64))


def _slice(edit: Edit, node: ir.Node) -> None:
    """Take the same elements, of those that are left."""
    source = node.inputs[0]
    found = edit.kept.get(source.name or "") if source is not None else None
    starts, ends = list(ints(node, 1, "starts") or ()), list(ints(node, 2, "ends") or ())
    axes = ints(node, 3, "axes") or tuple(range(len(starts)))
    if found is None or source is None:
        return
    axis, kept = found
    rank = len(edit.dims[source.name or ""])
    places = [i for i, other in enumerate(axes) if other % rank == axis]
    if not places:
        return
    place, steps = places[0], list(ints(node, 4, "steps") or (1,) * len(starts))
    taken = _new_places(kept, np.arange(len(kept))[_range(starts[place], ends[place], steps[place], len(kept))])
    jumps = set(np.diff(taken).tolist()) or {1}
    if len(jumps) > 1 or min(jumps) < 1 or (jumps != {1} and edit.graph.opset_imports.get("", 1) < 10):
        indices = edit.constant(node, "indices", taken)
        node.replace_input_with(0, edit.insert(node, "Gather", [source, indices], axis))
        starts[place], ends[place], steps[place] = 0, _END, 1
    else:
        starts[place], ends[place], steps[place] = int(taken[0]), int(taken[-1]) + 1, jumps.pop()
    _say_bounds(edit, node, starts, ends, steps)


def _range(start: int, end: int, step: int, length: int) -> slice:
    return slice(start, end if step > 0 or end >= -length else None, step)


def _say_bounds(edit: Edit, node: ir.Node, starts: list[int], ends: list[int], steps: list[int]) -> None:
    small = small_array(node.inputs[1]) if len(node.inputs) > 1 else None
    limit = _END if small is None else np.iinfo(small.dtype).max
    edit.say(node, 1, "starts", starts)
    edit.say(node, 2, "ends", [min(end, int(limit)) for end in ends])
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        edit.say(node, 4, "steps", steps)


def _new_places(kept: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the places of those `indices` that are kept, in their order."""
    places: np.ndarray = np.cumsum(kept) - 1
    left: np.ndarray = places[indices[kept[indices]]]
    return left


def _gather(edit: Edit, node: ir.Node) -> None:
    source, table = node.inputs[0], small_array(node.inputs[1], limit=1 << 20)
    axis = axis_of(node, 0, len(edit.dims[source.name or ""])) if source is not None else 0
    kept = edit.cut(source, axis)
    if kept is None or table is None:
        return
    new = (np.cumsum(kept) - 1)[table]
    for i in range(table.ndim):
        left = edit.cut(node.outputs[0], axis + i)
        new = new if left is None else new.compress(left, i)
    node.replace_input_with(1, edit.constant(node, "indices", new.astype(table.dtype)))


def _pad(edit: Edit, node: ir.Node) -> None:
    either = [edit.kept.get(value.name or "") for value in (node.outputs[0], node.inputs[0]) if value is not None]
    found = either[0] or either[-1]
    pads = list(ints(node, 1, "pads") or ())
    given = ints(node, 3, "axes") if len(node.inputs) > 3 else None
    if found is None or not pads:
        return
    rank, axis = len(edit.dims[node.outputs[0].name or ""]), found[0]
    before, after = edit.cut(node.inputs[0], axis), edit.cut(node.outputs[0], axis)
    for begin, other in enumerate(range(rank) if given is None else given):
        if other % rank == axis:
            end = begin + len(pads) // 2
            pads[begin] = _still(pads[begin], before, after, slice(None, abs(pads[begin])))
            pads[end] = _still(pads[end], before, after, slice(-abs(pads[end]), None))
    edit.say(node, 1, "pads", pads)


def _still(count: int, before: np.ndarray | None, after: np.ndarray | None, where: slice) -> int:
    """Return how many of the elements added at one end, or taken away if negative, there still are."""
    kept = after if count > 0 else before
    if kept is None or count == 0:
        return count
    return int(np.sign(count) * kept[where].sum())


_REWRITES: dict[str, Callable[[Edit, ir.Node], None]] = {
    **dict.fromkeys(TARGETS, _target),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
}
