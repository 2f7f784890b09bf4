"""Rules for what moves data, the same for every analysis: the move itself is made with the variables.

An axis along which the variables do not differ has size 1, and most moves leave it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from .channel_layout import LARGEST, plan
from .constants import small_array
from .weights import Stays

if TYPE_CHECKING:
    from .channel_analysis import Analysis

# ------------------------------------------------------------------------------------------- what nodes say


def ints(node: ir.Node, index: int, name: str) -> tuple[int, ...] | None:
    """Return integers that are an attribute in old opsets and an input in new ones, None if absent. Raises Stays."""
    if name in node.attributes:
        return tuple(node.attributes.get_ints(name) or ())
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    array = small_array(value)
    if array is None:
        raise Stays(f"its {name} are computed at run time")
    return tuple(int(number) for number in array.reshape(-1))


def axis_of(node: ir.Node, default: int, rank: int) -> int:
    """Return the node's axis, counted from the front."""
    return node.attributes.get_int("axis", default) % rank


def padded(ids: np.ndarray, rank: int) -> np.ndarray:
    """Add leading axes of size 1, as broadcasting does."""
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def lacks(ids: np.ndarray, axis: int) -> bool:
    """Whether the variables do not depend on the axis."""
    return bool(ids.shape[axis] == 1)


# ------------------------------------------------------------------------------------------- data movement


def reshape(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    """Reshape, Flatten, Squeeze and Unsqueeze, by the dimensions before and after."""
    ids = work.read(node.inputs[0])
    found = plan(ids.shape, work.dims(node.inputs[0]), work.dims(node.outputs[0]))
    ids = work.tie_along(ids, found.tied)
    return [np.broadcast_to(ids, found.full).reshape(found.new)]


def _transpose(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    return [ids.transpose(node.attributes.get_ints("perm", tuple(reversed(range(ids.ndim)))))]


def _concat(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    """Concatenate; along an axis of unknown length all must be equal."""
    parts = [work.read(value) for value in node.inputs]
    axis = axis_of(node, 1, parts[0].ndim)
    lengths = [work.dims(value)[axis] for value in node.inputs]
    known = [length for length in lengths if isinstance(length, int)]
    others = np.broadcast_shapes(*(part.take([0], axis).shape for part in parts))
    if len(known) < len(lengths) or math.prod(others) * sum(known) > LARGEST:
        return [work.tie(*(work.tie_along(part, [axis]) for part in parts))]
    shapes = [[*others[:axis], length, *others[axis + 1 :]] for length in known]
    return [np.concatenate([np.broadcast_to(p, shape) for p, shape in zip(parts, shapes, strict=True)], axis)]


def _split(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    axis = axis_of(node, 0, ids.ndim)
    if lacks(ids, axis):
        return [ids] * len(node.outputs)
    lengths = [work.dims(value)[axis] for value in node.outputs]
    known = [length for length in lengths if isinstance(length, int)]
    if len(known) != len(lengths) or sum(known) != ids.shape[axis]:
        raise Stays("the lengths of its parts are unknown")
    return np.split(ids, np.cumsum(known)[:-1], axis)


def _slice(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    starts, ends = ints(node, 1, "starts") or (), ints(node, 2, "ends") or ()
    axes = ints(node, 3, "axes") or tuple(range(len(starts)))
    steps = ints(node, 4, "steps") or (1,) * len(starts)
    where = [slice(None)] * ids.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not lacks(ids, axis):
            where[axis] = slice(start, end if step > 0 or end >= -ids.shape[axis] else None, step)
    return [ids[tuple(where)]]


def _gather(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    axis = axis_of(node, 0, ids.ndim)
    indices = small_array(node.inputs[1], limit=1 << 20)
    if indices is None or lacks(ids, axis):
        ids = work.tie_along(ids, [axis])
        indices = np.zeros([1] * len(work.dims(node.inputs[1])), np.int64)
    return [np.take(ids, indices.astype(np.int64), axis)]


def _pad_zeros(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    """Pad with zeros, which any factor leaves alone, or with what is there."""
    if node.attributes.get_string("mode", "constant") == "constant" and _fill(node) != 0:
        raise Stays("it pads with something other than 0")
    return pad(work, node)


def pad(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    """Pad with a constant, where variables of their own begin, or with what is there."""
    ids = work.read(node.inputs[0])
    zeros = node.attributes.get_string("mode", "constant") == "constant"
    pads = ints(node, 1, "pads") or ()
    axes = ints(node, 3, "axes") if len(node.inputs) > 3 else None
    axes = tuple(range(ids.ndim)) if axes is None else axes
    if len(pads) != 2 * len(axes):
        raise Stays(f"it has {len(pads)} pads for {len(axes)} axes")
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if not zeros and (begin or end):
            ids = work.tie_along(ids, [axis])
        if not lacks(ids, axis):
            ids = _padded_along(work, ids, axis % ids.ndim, begin, end)
    return [ids]


def _padded_along(work: Analysis, ids: np.ndarray, axis: int, begin: int, end: int) -> np.ndarray:
    """Add new variables for what is added at both ends, or cut where the number is negative."""
    kept = ids.take(range(max(-begin, 0), ids.shape[axis] - max(-end, 0)), axis)
    ends = [[*ids.shape[:axis], max(count, 0), *ids.shape[axis + 1 :]] for count in (begin, end)]
    return np.concatenate([work.fresh(ends[0]), kept, work.fresh(ends[1])], axis)


def _fill(node: ir.Node) -> float:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return float(node.attributes.get_float("value", 0.0) or 0.0)
    array = small_array(node.inputs[2])
    return math.nan if array is None else float(array.any())


def _expand(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    return [padded(work.read(node.inputs[0]), len(work.dims(node.outputs[0])))]


def _tile(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    repeats = ints(node, 1, "repeats") or ()
    if len(repeats) != ids.ndim:
        raise Stays(f"it has {len(repeats)} repeats for {ids.ndim} axes")
    return [np.tile(ids, [1 if size == 1 else n for size, n in zip(ids.shape, repeats, strict=True)])]


def _depth_to_space(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    """Spread blocks of channels over pixels, so that the channels of a block become one."""
    ids = work.read(node.inputs[0])
    ids, block = work.tie_along(ids, (0, 2, 3)), node.attributes.get_int("blocksize", 1) ** 2
    if lacks(ids, 1):
        return [ids]
    first = node.attributes.get_string("mode", "DCR") == "DCR"
    table = ids.reshape((block, -1) if first else (-1, block))
    return [work.tie_along(table, [0 if first else 1]).reshape(1, -1, 1, 1)]


def _space_to_depth(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    ids, block = work.tie_along(ids, (0, 2, 3)), node.attributes.get_int("blocksize", 1) ** 2
    return [ids if lacks(ids, 1) else np.tile(ids, (1, block, 1, 1))]


MOVES: dict[str, Callable[[Analysis, ir.Node], Sequence[np.ndarray]]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad_zeros,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
