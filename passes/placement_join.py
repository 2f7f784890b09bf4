"""Concats whose inputs share one scale: then the integers are joined as they are, and nothing is rounded again.

A Concat of inputs with scales of their own rounds each of them anew, and takes many times the time of copying bytes.
In a network that joins what it splits off (ShuffleNet, DenseNet) every Concat adds that noise to all that passes through.

Algebra. Tensors tied by a Concat, or by data movement, form a set; the set's range is the union of its ranges,

    [min over the set, max over the set]

so a tensor of width w in a set of width W loses log2(W / w) of its bits. A Concat ties its inputs only as long as no
tensor of the set loses more than log2(WIDEST) bits; equalization (equalize.py) brings the ranges together beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ..compiler.types import Range

if TYPE_CHECKING:
    from .placement import Placement

#: A shared range may be so many times as wide as a range in it: two bits of eight.
WIDEST = 4.0


def share_scales(placement: Placement) -> None:
    """Give what Concats join one range where that costs little, and say which Concats then work on integers."""
    sets = _Sets(placement)
    for node, role in placement.nodes.items():
        if role == "move":
            for out in node.outputs:
                sets.tie([node.inputs[0], out])
    for node in placement.nodes:
        values = [*node.inputs, node.outputs[0]]
        if node.op_type == "Concat" and node.outputs[0] in placement.produced and sets.narrow(values):
            sets.tie(values)
            placement.joined.add(node)
            placement.reads -= {(node, i) for i in range(len(node.inputs))}
    placement.ranges.update({value: sets.range(value) for value in placement.ranges})


class _Sets:
    """Tensors that must have one scale (union-find), with the union and the narrowest width of each set."""

    def __init__(self, placement: Placement) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}
        self._union = dict(placement.ranges)
        self._least = {value: _width(r) for value, r in placement.ranges.items()}

    def _root(self, value: ir.Value) -> ir.Value:
        while (parent := self._parent.get(value, value)) is not value:
            value = parent
        return value

    def tie(self, values: list[ir.Value | None]) -> None:
        roots = list(dict.fromkeys(self._root(v) for v in values if v is not None))
        ranges = [self._union[r] for r in roots if r in self._union]
        least = min((self._least[r] for r in roots if r in self._least), default=None)
        first = roots[0]
        self._parent.update(dict.fromkeys(roots[1:], first))
        if ranges and least is not None:
            self._union[first] = _whole(ranges)
            self._least[first] = least

    def narrow(self, values: list[ir.Value | None]) -> bool:
        """Say whether tying the tensors would leave each enough of the grid."""
        roots = {self._root(v) for v in values if v is not None}
        ranges = [self._union[r] for r in roots if r in self._union]
        least = min((self._least[r] for r in roots if r in self._least), default=0.0)
        return bool(ranges) and _width(_whole(ranges)) <= WIDEST * least

    def range(self, value: ir.Value) -> Range:
        return self._union[self._root(value)]


def _width(r: Range) -> float:
    return max(r.max, 0.0) - min(r.min, 0.0)


def _whole(ranges: list[Range]) -> Range:
    return Range(min(r.min for r in ranges), max(r.max for r in ranges))
