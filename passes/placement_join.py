"""Concats whose inputs share one scale: then the integers are joined as they are, and nothing is rounded again.

A Concat of inputs with scales of their own rounds each of them anew, and takes many times the time of copying bytes.
In a network that joins what it splits off (ShuffleNet, DenseNet) every Concat adds that noise to all that passes.

Algebra. Tensors tied by a Concat, or by data movement, form a set; the set's range is the union of its ranges,

    [min over the set, max over the set]

so a tensor of width w in a set of width W loses log2(W / w) of its bits. A Concat ties its inputs only as long as

- no tensor of the set loses more than log2(WIDEST) bits; equalization (equalize.py) brings the ranges together before
- the set's range does not go beyond where a Relu or Clip ends: the rounding would not absorb that any more, and its
  layer would lose its integer kernel (measured on a Conv with a Relu joined with one without: 2.1x the time)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
        if node.op_type == "Concat" and node.outputs[0] in placement.produced and sets.fit(values):
            sets.tie(values)
            placement.joined.add(node)
    placement.ranges.update({value: sets.range(value) for value in placement.ranges})


class _Sets:
    """Tensors that must have one scale (union-find), with what is known of each set."""

    def __init__(self, placement: Placement) -> None:
        self._parent: dict[ir.Value, ir.Value] = {}
        self._known = {value: _Set.of(value, r) for value, r in placement.ranges.items()}

    def _root(self, value: ir.Value) -> ir.Value:
        while (parent := self._parent.get(value, value)) is not value:
            value = parent
        return value

    def _sets(self, values: list[ir.Value | None]) -> list[_Set]:
        roots = dict.fromkeys(self._root(v) for v in values if v is not None)
        return [self._known[r] for r in roots if r in self._known]

    def tie(self, values: list[ir.Value | None]) -> None:
        found = self._sets(values)
        first, *others = dict.fromkeys(self._root(v) for v in values if v is not None)
        self._parent.update(dict.fromkeys(others, first))
        if found:
            self._known[first] = _Set.union(found)

    def fit(self, values: list[ir.Value | None]) -> bool:
        """Say whether tying the tensors would leave each enough of the grid, and its absorbed activation."""
        found = self._sets(values)
        return bool(found) and _Set.union(found).fits()

    def range(self, value: ir.Value) -> Range:
        return self._known[self._root(value)].range


@dataclass(frozen=True)
class _Set:
    """The union of the set's ranges, the narrowest one's width, and within what the union must stay."""

    range: Range
    narrowest: float
    limit: Range

    @classmethod
    def of(cls, value: ir.Value, chosen: Range) -> _Set:
        return cls(chosen, _width(chosen), _limit(value, chosen))

    @classmethod
    def union(cls, sets: list[_Set]) -> _Set:
        return cls(
            Range(min(s.range.min for s in sets), max(s.range.max for s in sets)),
            min(s.narrowest for s in sets),
            Range(max(s.limit.min for s in sets), min(s.limit.max for s in sets)),
        )

    def fits(self) -> bool:
        return _width(self.range) <= WIDEST * self.narrowest and _within(self.range, self.limit)


def _width(r: Range) -> float:
    return max(r.max, 0.0) - min(r.min, 0.0)


def _within(r: Range, limit: Range) -> bool:
    return limit.min <= min(r.min, 0.0) and r.max <= limit.max


def _limit(value: ir.Value, chosen: Range) -> Range:
    """Return where the Relu or Clip that computes the tensor ends; no limits where its range goes beyond as it is."""
    node, limit = value.producer(), Range(-math.inf, math.inf)
    if node is not None and node.op_type == "Relu":
        limit = Range(0.0, math.inf)
    elif node is not None and node.op_type == "Clip":
        bounds = [*node.inputs[1:], None, None]
        low, high = (None if v is None or v.const_value is None else float(v.const_value.numpy()) for v in bounds[:2])
        limit = Range(-math.inf if low is None else low, math.inf if high is None else high)
    return limit if _within(chosen, limit) else Range(-math.inf, math.inf)
