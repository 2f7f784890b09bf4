"""The walk that gives each element of each tensor the number of a variable; two analyses share it.

A rule for each operator says which variables its outputs have: those of its inputs, some of them tied together, or new
ones. What the numbers mean is the analysis's: factors that rescale channels (channel_groups.py), or channels that are
cut together (cut_analysis.py). Variable 0 is pinned: it stays as it is. So are graph inputs and outputs, and whatever
an operator reads or writes for which there is no rule.

The variables of a tensor are an array of its rank with size 1 along the axes on which they do not depend: (1, C, 1, 1)
for most. What moves data is executed on these arrays (channel_moves.py), so that shuffles, slices and flattening need
no special cases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .channel_layout import Dim, shrink
from .shapes import infer_shapes
from .weights import Stays

#: The variable of what stays as it is.
PINNED = 0
#: Linear operators: what they pin is always worth a word.
LINEAR = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


@dataclass
class Analysis(ABC):
    """What the rules work with: they read variables, make new ones and tie them; ties are resolved at the end.

    Subclasses say by which rule a node goes (`rule_of`), and which lists of theirs a rule appends to (`records`).
    """

    title: ClassVar[str]

    graph: ir.Graph
    known_dims: Mapping[str, tuple[Dim, ...]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    _ids: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    _ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _read: Counter[ir.Value] = field(default_factory=Counter)
    _count: int = 1

    def walk(self, model: ir.Model) -> None:
        """Infer the shapes and apply the rules to all nodes of the main graph; `model` is not changed."""
        twin = model.clone()
        _simplify(twin.graph)
        fault = infer_shapes(twin)
        if fault:
            why = f"its shapes contradict each other: {fault}"
            self.refusals.append(Refusal("the whole model", self.title, why))
        else:
            self.known_dims = known_dims(twin.graph)
        for node in model.graph:
            self.visit(node)

    @abstractmethod
    def rule_of(self, node: ir.Node) -> Callable[[ir.Node], Sequence[np.ndarray]]:
        """Return the rule for a node, bound to this analysis. Raises Stays where there is none."""

    def records(self) -> tuple[list[Any], ...]:
        """Return the lists that rules append to: what a rule that raises Stays has appended is taken back."""
        return ()

    def visit(self, node: ir.Node) -> None:
        """Apply the node's rule; whatever it reads that the rule did not look at is pinned."""
        self._read.clear()
        records = [(made, len(made)) for made in self.records()]
        outputs: Sequence[np.ndarray] = ()
        try:
            outputs = [self._fitting(v, ids) for v, ids in zip(node.outputs, self._apply(node), strict=False)]
        except Stays as why:
            self._read.clear()
            for made, length in records:
                del made[length:]
            if node.op_type in LINEAR or any(self._ids[value].any() for value in self._unread(node)):
                self.refuse(node, str(why))
        for value in self._unread(node):
            self.pin(self._ids[value])
        for value, ids in zip(node.outputs, outputs, strict=False):
            self._ids[value] = ids
            self._pin_what_is_read_outside(node, value)

    def _apply(self, node: ir.Node) -> Sequence[np.ndarray]:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise Stays(f"there is no rule for {node.op_type}, which has a body of its own")
        if node.domain not in ("", "ai.onnx"):
            raise Stays(f"there is no rule for {node.op_type} of {node.domain}")
        return self.rule_of(node)(node)

    def _pin_what_is_read_outside(self, node: ir.Node, value: ir.Value) -> None:
        captured = any(user.graph is not self.graph for user, _ in value.uses())
        if captured and self._ids[value].any():
            self.refuse(node, f"its output {value.name} is read inside the body of a control-flow node")
        if captured or value.is_graph_output():
            self.pin(self._ids[value])

    def roots(self) -> np.ndarray:
        """Resolve the ties so far: for each variable the first of those tied to it, int64; 0 where that is pinned."""
        return _roots(self._count, self._ties)

    def names(self) -> np.ndarray:
        """Resolve the ties: the number that each variable has among those that are left, int64; 0 stays 0."""
        return np.unique(self.roots(), return_inverse=True)[1]

    # ---------------------------------------------------------------------------------- for the rules

    def dims(self, value: ir.Value | None) -> tuple[Dim, ...]:
        """Return the dimensions of a tensor. Raises Stays if not even their number is known."""
        dims = self.known_dims.get(value.name or "") if value is not None else None
        if dims is None:
            raise Stays(f"the shape of {value.name if value is not None else 'an absent input'} is unknown")
        return dims

    def read(self, value: ir.Value | None) -> np.ndarray:
        """Return the variables of an input, which the rule thereby takes care of. Constants are pinned."""
        dims = self.dims(value)
        assert value is not None
        self._read[value] += 1
        return self._ids.get(value, np.zeros([1] * len(dims), np.int64))

    def fresh(self, shape: Sequence[int]) -> np.ndarray:
        """Return an array of new variables."""
        count = int(np.prod(shape, dtype=np.int64))
        ids = np.arange(self._count, self._count + count).reshape(shape)
        self._count += count
        return ids

    def tie(self, *ids: np.ndarray) -> np.ndarray:
        """Make arrays that broadcast with each other equal, element by element; return one of them."""
        first, *others = np.broadcast_arrays(*ids)
        self._ties.extend((first, other) for other in others)
        return shrink(first)

    def tie_along(self, ids: np.ndarray, axes: Collection[int]) -> np.ndarray:
        """Make `ids` independent of the axes."""
        for axis in axes:
            ids = self.tie(ids.take([0], axis), ids).take([0], axis)
        return ids

    def pin(self, ids: np.ndarray) -> None:
        """Tie all to the variable of what stays as it is."""
        self._ties.append((ids, np.full_like(ids, PINNED)))

    def refuse(self, node: ir.Node, why: str) -> None:
        """Record why a node pins what it reads or writes."""
        self.refusals.append(Refusal(node.name or node.outputs[0].name or node.op_type, self.title, why))

    # ----------------------------------------------------------------------------------

    def _fitting(self, value: ir.Value, ids: np.ndarray) -> np.ndarray:
        if not value.name:
            return ids  # left out
        dims = self.dims(value)
        sizes_fit = all(n == 1 or dim == n or not isinstance(dim, int) for n, dim in zip(ids.shape, dims, strict=False))
        if ids.ndim != len(dims) or not sizes_fit:
            raise Stays(f"its output has shape {list(dims)}, which its inputs do not explain")
        return shrink(ids)

    def _unread(self, node: ir.Node) -> list[ir.Value]:
        """Return the inputs with variables that the rule did not take care of; x * x reads x once only."""
        found = Counter(value for value in node.inputs if value in self._ids)
        return [value for value, count in found.items() if value is not None and self._read[value] < count]


def _simplify(graph: ir.Graph) -> None:
    """Put what has the same shape in the place of nodes whose shape ONNX does not infer."""
    for node in graph:
        if node.op_type == "GroupNormalization" and not node.domain:
            node.op_type = "Identity"
            node.resize_inputs(1)
            node.attributes.clear()


def known_dims(graph: ir.Graph) -> dict[str, tuple[Dim, ...]]:
    """Return the dimensions of all tensors of a graph whose rank is known, by name."""
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {
        value.name: tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        for value in values
        if value.name and value.shape is not None
    }


def trimmed(ids: np.ndarray | None, rank: int) -> np.ndarray | None:
    """Drop leading axes of size 1 that a constant of this rank does not have."""
    while ids is not None and ids.ndim > rank and ids.shape[0] == 1:
        ids = ids[0]
    return ids


def _roots(count: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return, for each variable, the first of those that it is tied to."""
    from scipy.sparse import coo_array  # heavy
    from scipy.sparse.csgraph import connected_components

    rows, columns = (np.concatenate([[PINNED], *(tie[i].reshape(-1) for tie in ties)]) for i in (0, 1))
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    return np.asarray(first[numbers], np.int64)
