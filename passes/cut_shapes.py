"""Dimensions as data: what Shape nodes yield, followed to where a Reshape, Expand or Resize takes it as its target.

When channels are cut, Shape yields smaller numbers. That is harmless where a number becomes a dimension of a tensor
whose length there is known before the model runs, since the cut writes all such lengths itself. Everywhere else a
dimension of what may be cut must not be looked at, so that what has it is pinned. All other numbers are let through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from .channel_moves import ints
from .constants import small_array
from .weights import Stays

if TYPE_CHECKING:
    from .cut_analysis import Cutting


class Length(NamedTuple):
    """The length of a tensor along an axis."""

    value: ir.Value
    axis: int


#: Operators with a target shape, and the input that has it.
TARGETS = {"Reshape": 1, "Expand": 1, "Resize": 3}


@dataclass
class Sizes:
    """The lengths that 1-D (or 0-D) tensors hold, of what may be cut; None stands for any other number."""

    known: dict[ir.Value, list[Length | None]] = field(default_factory=dict)
    _moved: set[ir.Node] = field(default_factory=set)

    def concerns(self, node: ir.Node) -> bool:
        """Whether a node reads lengths in another way than as its target shape."""
        target = TARGETS.get(node.op_type)
        return any(value in self.known for index, value in enumerate(node.inputs) if index != target)

    def apply(self, work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
        """Hand lengths on; their variables are 0 in any case. Raises Stays where that is impossible."""
        held = [self.known.get(value) if value is not None else None for value in node.inputs]
        if node.op_type not in _MOVES:
            raise Stays("it computes with dimensions")
        self._hold(work, node, _MOVES[node.op_type](work, node, held))
        self._moved.add(node)
        return []

    def shape(self, work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
        """Shape: the lengths of its input."""
        value = node.inputs[0]
        rank = work.read(value).ndim
        axes = range(rank)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", rank)]
        assert value is not None
        self._hold(work, node, [Length(value, axis) for axis in axes])
        return []

    def check(self, work: Cutting, node: ir.Node) -> None:
        """Pin what has those lengths that a node reads for which it has no use that is known."""
        if node not in self._moved and not (work.reshaped and work.reshaped[-1] is node):
            for value in node.inputs:
                self._pin_all(work, node, self.known.get(value, []) if value is not None else [])

    def _hold(self, work: Cutting, node: ir.Node, lengths: list[Length | None]) -> None:
        value = node.outputs[0]
        lengths = [length if length is not None and _varies(work, length) else None for length in lengths]
        if not any(lengths):
            return
        self.known[value] = lengths
        if value.is_graph_output() or any(user.graph is not work.graph for user, _ in value.uses()):
            self._pin_all(work, node, lengths)

    def fill(self, work: Cutting, node: ir.Node) -> None:
        """Let a node take its target shape from numbers that are computed. Raises Stays."""
        index = TARGETS[node.op_type]
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or small_array(value) is not None:
            return
        lengths, dims = self.known.get(value, []), work.dims(node.outputs[0])
        axes = target_axes(node, work.dims(value)[0], len(dims))
        if lengths and len(lengths) != len(axes):
            raise Stays("the length of its target shape is unknown")
        dynamic = [length for axis, length in zip(axes, lengths, strict=False) if not isinstance(dims[axis], int)]
        self._pin_all(work, node, dynamic)
        work.reshaped.append(node)

    def _pin_all(self, work: Cutting, node: ir.Node, lengths: Sequence[Length | None]) -> None:
        for length in lengths:
            ids = work.variables(length.value) if length is not None else None
            if length is not None and ids is not None:
                work.refuse(node, f"it computes with the number of channels of {length.value.name}")
                work.pin(ids)


def _varies(work: Cutting, length: Length) -> bool:
    ids = work.variables(length.value)
    return ids is not None and ids.shape[length.axis] > 1


def target_axes(node: ir.Node, count: object, rank: int) -> range | list[int]:
    """Return the axes of the output whose lengths a target shape of `count` numbers has. Raises Stays."""
    if not isinstance(count, int) or count > rank:
        raise Stays("the length of its target shape is unknown")
    axes = node.attributes.get_ints("axes") if node.op_type == "Resize" else None
    return [axis % rank for axis in axes] if axes else range(rank - count, rank)


# ------------------------------------------------------------------------------------------- moving lengths

_Lengths = list[Length | None]
_Held = Sequence[_Lengths | None]


def _same(work: Cutting, node: ir.Node, held: _Held) -> _Lengths:
    if held[0] is None or len(work.dims(node.outputs[0])) > 1:
        raise Stays("it makes a table of dimensions")
    return held[0]


def _gather(work: Cutting, node: ir.Node, held: _Held) -> _Lengths:
    del work
    indices = small_array(node.inputs[1])
    if held[0] is None or indices is None or indices.ndim > 1:
        raise Stays("which dimension it takes is computed at run time")
    return [held[0][index] for index in indices.reshape(-1)]


def _slice(work: Cutting, node: ir.Node, held: _Held) -> _Lengths:
    del work
    starts, ends, steps = ints(node, 1, "starts"), ints(node, 2, "ends"), ints(node, 4, "steps") or (1,)
    if held[0] is None or not starts or not ends or steps[0] < 1:
        raise Stays("which dimensions it takes is not clear")
    return held[0][starts[0] : ends[0] : steps[0]]


def _concat(work: Cutting, node: ir.Node, held: _Held) -> _Lengths:
    found: _Lengths = []
    for value, lengths in zip(node.inputs, held, strict=True):
        count = work.dims(value)[0]
        if lengths is None and not isinstance(count, int):
            raise Stays("how many dimensions it joins is unknown")
        found += [None] * int(count or 0) if lengths is None else lengths
    return found


_MOVES: dict[str, Callable[[Cutting, ir.Node, _Held], _Lengths]] = {
    **dict.fromkeys(("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"), _same),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
}
