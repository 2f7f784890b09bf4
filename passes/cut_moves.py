"""Chains of Reshapes and Transposes that come to one Gather, or to one Transpose.

    channel shuffle    Reshape (N, C, H, W) -> (N, g, C/g, H, W), Transpose, Reshape back (, half of it)    =  Gather
    keys of attention  Reshape (N, h, T, D) -> (N h, T, D), Transpose, Reshape -> (N, h, D, T)              =  Transpose

Channels that are seen as a table of g rows can only be cut by whole rows or columns; a list of them has no such shape.
After a few shuffles that makes the difference between cutting two channels at a time and cutting dozens together.

The chain is executed on a tensor that has its own place in every element: if what comes out is that tensor with the
indices of one axis reordered or left out, it is a Gather; if it is its transpose, a Transpose; whatever the chain is.

Rules
1. The chain has a Reshape and a Transpose, and all of it moves data by constants.
2. Dynamic lengths are tried with two sets of primes that the model has nowhere else: both must say the same.
3. A tensor over 2^22 elements is left alone.

Not touched: graph outputs and their names, and whatever else reads what lies between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from .base import Pass, PassResult, Stage
from .channel_analysis import Analysis, known_dims
from .channel_layout import LARGEST, Dim
from .channel_moves import MOVES, ints
from .constants import Names, add_initializer, supplant
from .shapes import infer_shapes
from .weights import Stays

_RESHAPES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze"))
_MOVES = _RESHAPES | {"Transpose", "Slice", "Split", "Gather"}
_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


@dataclass(frozen=True)
class JoinMoves(Pass):
    """Replace chains of moves that are a Gather, or a Transpose, by one."""

    name: ClassVar[str] = "join-moves"
    stage: ClassVar[Stage] = "normalise"

    def call(self, model: ir.Model) -> PassResult:
        """Replace them in place."""
        twin = model.clone()
        dims = {} if infer_shapes(twin) else known_dims(twin.graph)
        work = _Joining(model.graph, dims, Names.of(model))
        values = [value for node in model.graph if node.op_type in _MOVES for value in node.outputs]
        found = [value for value in values if work.replace(value)]
        for value in found:  # only now, since lengths are known by name
            value.name = work.names.fresh(f"{value.name}_joined")
        if found:
            common.RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(found), rewrites=len(found))


@dataclass(frozen=True, eq=False)
class _Joining:
    graph: ir.Graph
    dims: Mapping[str, tuple[Dim, ...]]
    names: Names

    def replace(self, value: ir.Value) -> bool:
        """Replace what makes `value`, if that is such a chain and goes no further. Say whether it was done."""
        goes_on = any(user.op_type in _MOVES and index == 0 for user, index in value.uses())
        if goes_on or value.is_graph_output() or not value.uses():
            return False
        for source, chain in reversed(list(self._chains(value))):
            made = self._one_for(source, value, chain)
            if made is not None:
                self.graph.insert_before(chain[-1], made)
                supplant(value, made.outputs[0])
                return True
        return False

    def _chains(self, value: ir.Value) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
        """Yield the tensors from which moves alone lead to `value`, and these moves, the nearest tensor first."""
        chain: list[ir.Node] = []
        node = value.producer()
        while node is not None and node.op_type in _MOVES and node.graph is self.graph and not node.domain:
            chain.insert(0, node)
            source = node.inputs[0]
            if source is None:
                return
            ops = {node.op_type for node in chain}
            if "Transpose" in ops and ops & _RESHAPES and source.name in self.dims:
                yield source, list(chain)
            node = source.producer()

    def _one_for(self, source: ir.Value, value: ir.Value, chain: Sequence[ir.Node]) -> ir.Node | None:
        """Return the one node that does the same, None if there is none."""
        taken = {dim for dims in self.dims.values() for dim in dims}
        primes = [prime for prime in _PRIMES if prime not in taken]
        dynamic = any(not isinstance(dim, int) for dim in self.dims[source.name or ""])
        found = [self._found(source, value, chain, primes[i:]) for i in ((0, 1) if dynamic else (0,))]
        if found[0] is None or any(not _same(found[0], other) for other in found):
            return None
        name, (axis, order) = self.names.fresh(f"{chain[-1].name}_joined"), found[0]
        if axis is None:
            return ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", order.tolist())], name=name)
        table = add_initializer(self.graph, self.names.fresh(f"{value.name}_order"), ir.tensor(order))
        return ir.Node("", "Gather", [source, table], [ir.AttrInt64("axis", axis)], name=name)

    def _found(
        self, source: ir.Value, value: ir.Value, chain: Sequence[ir.Node], primes: Sequence[int]
    ) -> _Found | None:
        dims = self.dims[source.name or ""]
        if sum(not isinstance(dim, int) for dim in dims) > len(primes):
            return None
        free = iter(primes)
        stand_ins: dict[str, int] = {}
        lengths = [
            dim if isinstance(dim, int) else stand_ins.setdefault(dim, next(free)) if dim is not None else next(free)
            for dim in dims
        ]
        if not 0 < np.prod(lengths) <= LARGEST:
            return None
        places = np.arange(1, 1 + int(np.prod(lengths))).reshape(lengths)
        moved = _Tracing(self.graph, self.dims).trace(source, places, chain, value)
        return (
            None if moved is None or moved.ndim != places.ndim else _transposed(places, moved) or _taken(places, moved)
        )


#: The axis of a Gather and its indices, int64; or None and the axes of a Transpose.
_Found = tuple[int | None, np.ndarray]


def _same(one: _Found, other: _Found | None) -> bool:
    return other is not None and one[0] == other[0] and np.array_equal(one[1], other[1])


def _transposed(places: np.ndarray, moved: np.ndarray) -> _Found | None:
    for perm in itertools.permutations(range(places.ndim)):
        if perm != tuple(range(places.ndim)) and np.array_equal(places.transpose(perm), moved):
            return None, np.array(perm)
    return None


def _taken(places: np.ndarray, moved: np.ndarray) -> _Found | None:
    for axis, length in enumerate(places.shape):
        stride = int(np.prod(places.shape[axis + 1 :]))
        line = np.moveaxis(moved, axis, -1).reshape(-1, moved.shape[axis])[0] - 1
        order = line // stride % length
        if np.array_equal(places.take(order, axis), moved):
            return None if moved.shape == places.shape and (np.diff(order) == 1).all() else (axis, order)
    return None


@dataclass
class _Tracing(Analysis):
    """Moves data as nodes do; lengths are those of the data."""

    title: ClassVar[str] = "join-moves"

    def rule_of(self, node: ir.Node) -> Callable[[ir.Node], Sequence[np.ndarray]]:
        if node.op_type not in _MOVES:
            raise Stays("it does not move data")
        return partial(MOVES[node.op_type], self)

    def dims(self, value: ir.Value | None) -> tuple[Dim, ...]:
        """Return the lengths of what was moved; of what a reshape is about to make, the one that is not known."""
        found = self._ids.get(value) if value is not None else None
        if value is None or found is not None:
            return super().dims(value) if found is None else found.shape
        node, dims = value.producer(), list(super().dims(value))
        source = self._ids.get(node.inputs[0]) if node is not None and node.inputs[0] is not None else None
        if node is None or source is None or node.op_type not in _RESHAPES:
            return tuple(dims)
        target = (ints(node, 1, "shape") if node.op_type == "Reshape" else None) or [-1] * len(dims)
        dims = [
            dim if isinstance(dim, int) else source.shape[i] if target[i] == 0 else None for i, dim in enumerate(dims)
        ]
        known = int(np.prod([dim for dim in dims if isinstance(dim, int)]))
        if dims.count(None) > 1 or known == 0:
            raise Stays("several of its lengths are unknown")
        return tuple(source.size // known if dim is None else dim for dim in dims)

    def trace(
        self, source: ir.Value, places: np.ndarray, chain: Sequence[ir.Node], value: ir.Value
    ) -> np.ndarray | None:
        """Return what becomes of `places`, the elements of `source`; None where that depends on more than constants."""
        self._ids[source] = places
        for node in chain:
            self.visit(node)
        return None if self._ties else self._ids.get(value)
