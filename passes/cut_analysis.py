"""Which channels are cut together: each element of each tensor gets the number of a variable.

Algebra. Cutting a variable removes every element that has it from every tensor. That changes no other element where

    y = f(x, z, …)    element by element: y's elements, and those of all inputs that they depend on, have one variable
    y = W x + b       rows of W and b go with y's variables, columns with x's: removing x_i is setting x_i = 0

and where nothing else depends on more than the number 0 in place of what is cut. A linear operator therefore *consumes*
the variables of its input and gives its output new ones. What combines channels in another way (a softmax over them, a
mean) ties them, or pins them: pinned channels are never cut.

What is left of a tensor must be a tensor: its variables may differ along one axis only. Where they differ along more
(channels seen as groups x positions, or as heads x depth), those along one are tied, so that most variables are left.
And something must be left: a variable that has a whole tensor is pinned.

The idea of cutting what depends on each other as one: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning";
here the dependencies are found by executing what moves data on the variables, not by a rule per pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .channel_analysis import PINNED, Analysis
from .channel_layout import Dim, shrink
from .constants import constant
from .cut_rules import CUT_RULES
from .cut_shapes import Sizes
from .weights import Stays

# ------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False)
class Follower:
    """A constant input of a node and, for each axis along which it is cut, the variable of each index, 1-D."""

    node: ir.Node
    index: int
    axes: Mapping[int, np.ndarray]


@dataclass(frozen=True, eq=False)
class Consumer:
    """An input of a node whose elements are summed up along `axis`, so that those cut count as zeros.

    `ids` has the variable of each index of that axis; `rank` is the input's.
    """

    node: ir.Node
    index: int
    axis: int
    rank: int
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with a weight and the variables that it reads and writes, both 1-D; `fresh` if the latter begin here."""

    node: ir.Node
    inputs: np.ndarray
    outputs: np.ndarray
    fresh: bool


@dataclass(frozen=True, eq=False)
class Grouped:
    """A node that works on groups of channels: the attribute that counts them, and the variable of each group."""

    node: ir.Node
    attribute: str
    ids: np.ndarray


@dataclass(frozen=True, eq=False)
class CutVariables:
    """The variables of a model, `count` of them, and all that must be changed when some are cut.

    `tensors` has, for each tensor, the axis along which its variables differ, and the variable of each index, 1-D;
    tensors of which nothing can be cut are left out. `dims` are all tensors' dimensions.
    `reshaped` are nodes whose target shape is computed from what may be cut.
    """

    count: int
    tensors: Mapping[str, tuple[int, np.ndarray]]
    dims: Mapping[str, tuple[Dim, ...]]
    followers: tuple[Follower, ...]
    consumers: tuple[Consumer, ...]
    layers: tuple[Layer, ...]
    grouped: tuple[Grouped, ...]
    reshaped: frozenset[ir.Node]
    refusals: tuple[Refusal, ...]


def analyse(model: ir.Model) -> CutVariables:
    """Find what can be cut in the main graph; `model`, which has been normalised, is not changed."""
    work = Cutting(model.graph)
    work.walk(model)
    return work.result()


# ------------------------------------------------------------------------------------------- the work


@dataclass
class Cutting(Analysis):
    """The analysis of channels that are cut, with what its rules record."""

    title: ClassVar[str] = "channel-cuts"

    sizes: Sizes = field(default_factory=Sizes)
    layers: list[Layer] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    grouped: list[Grouped] = field(default_factory=list)
    reshaped: list[ir.Node] = field(default_factory=list)
    _followers: list[tuple[ir.Node, int, np.ndarray]] = field(default_factory=list)
    _weights: dict[ir.Value, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def rule_of(self, node: ir.Node) -> Callable[[ir.Node], Sequence[np.ndarray]]:
        """Look the operator up in the table of cut_rules.py; what computes with dimensions has rules of its own."""
        if self.sizes.concerns(node):
            return partial(self.sizes.apply, self)
        if node.op_type not in CUT_RULES:
            raise Stays(f"there is no rule for {node.op_type}")
        return partial(CUT_RULES[node.op_type], self)

    def visit(self, node: ir.Node) -> None:
        """Apply the node's rule, and pin what has the lengths that it reads and does not hand on."""
        super().visit(node)
        self.sizes.check(self, node)

    def records(self) -> tuple[list[Any], ...]:
        """Return all that rules record."""
        return self.layers, self.consumers, self.grouped, self.reshaped, self._followers

    # ---------------------------------------------------------------------------------- for the rules

    def follow(self, node: ir.Node, index: int, ids: np.ndarray) -> None:
        """Let a constant input be cut with variables with which it broadcasts."""
        value = node.inputs[index]
        tensor = constant(value)
        if tensor is None:
            raise Stays(f"{value.name if value is not None else 'an input'} is computed at run time")
        shape = tensor.shape.numpy()
        ids = ids.reshape((1,) * (len(shape) - ids.ndim) + ids.shape)
        for axis in range(ids.ndim - len(shape), ids.ndim):
            if ids.shape[axis] > 1 and shape[axis - ids.ndim] not in (1, ids.shape[axis]):
                raise Stays(f"{value.name} of shape {list(shape)} does not fit {ids.shape[axis]} channels")  # type: ignore[union-attr]  # it has a constant
        self._followers.append((node, index, ids))

    def follow_weight(self, node: ir.Node, *ids: np.ndarray) -> None:
        """Let the weight, input 1 of a layer, be cut along several axes; layers that share it are cut alike."""
        value = node.inputs[1]
        assert value is not None
        for one in ids:
            self.follow(node, 1, one)
        first = self._weights.setdefault(value, ids)
        if [one.shape for one in first] != [one.shape for one in ids]:
            raise Stays(f"its weight {value.name} is shared with a node that reads it otherwise")
        for one, other in zip(first, ids, strict=True):
            self.tie(one, other)

    def consume(self, node: ir.Node, index: int, axis: int, ids: np.ndarray) -> None:
        """Record that a node sums up an input along an axis, and the variables along it, 1-D."""
        rank = len(self.dims(node.inputs[index]))
        self.consumers.append(Consumer(node, index, axis % rank, rank, ids))

    def add_layer(self, node: ir.Node, inputs: np.ndarray, outputs: np.ndarray, fresh: bool = False) -> None:
        """Record a linear operator with the variables of its channels."""
        self.layers.append(Layer(node, inputs, outputs, fresh))

    def regroup(self, node: ir.Node, attribute: str, ids: np.ndarray) -> None:
        """Record that an attribute counts groups, and the variable of each."""
        self.grouped.append(Grouped(node, attribute, ids))

    def variables(self, value: ir.Value) -> np.ndarray | None:
        """Return the variables of a tensor that was made already."""
        return self._ids.get(value)

    # ---------------------------------------------------------------------------------- the end

    def result(self) -> CutVariables:
        """Settle what must be tied or pinned, and number the variables that are left."""
        self._settle()
        self.pin(np.setdiff1d(np.arange(self._count), self._made()))
        names = self.names()
        tensors = {value.name: _along(names[ids]) for value, ids in self._ids.items() if value.name}
        return CutVariables(
            count=int(names.max()) + 1,
            tensors={name: found for name, found in tensors.items() if found is not None},
            dims=self.known_dims,
            followers=tuple(self._followers_by_axis(names)),
            consumers=tuple(Consumer(c.node, c.index, c.axis, c.rank, names[c.ids]) for c in self.consumers),
            layers=tuple(
                Layer(layer.node, names[layer.inputs], names[layer.outputs], layer.fresh) for layer in self.layers
            ),
            grouped=tuple(Grouped(g.node, g.attribute, names[g.ids]) for g in self.grouped),
            reshaped=frozenset(self.reshaped),
            refusals=tuple(self.refusals),
        )

    def _made(self) -> np.ndarray:
        """Return the variables that some layer makes: what is there without one (padding alone) is not cut."""
        roots = self.roots()
        made = [roots[layer.outputs] for layer in self.layers if layer.fresh]
        return np.flatnonzero(np.isin(roots, np.concatenate([[PINNED], *made])))

    def _settle(self) -> None:
        """Tie and pin until every tensor's variables differ along one axis, and none has a tensor to itself."""
        settled = False
        while not settled:
            settled, roots, whole = True, self.roots(), {PINNED}
            for value, ids in self._ids.items():
                now = shrink(roots[ids])
                axes = [axis for axis, size in enumerate(now.shape) if size > 1]
                if len(axes) == 1 or not now.any():
                    continue
                settled = False
                if axes:
                    kept = max(reversed(axes), key=partial(_left, now))
                    self.tie_along(now, [axis for axis in axes if axis != kept])
                elif now.item() not in whole:
                    whole.add(now.item())
                    self._pin_whole(value, now)

    def _pin_whole(self, value: ir.Value, ids: np.ndarray) -> None:
        producer = value.producer()
        if producer is not None:
            self.refuse(producer, f"nothing of its output {value.name} can be cut but all of it")
        self.pin(ids)

    def _followers_by_axis(self, names: np.ndarray) -> Iterator[Follower]:
        found: dict[tuple[ir.Node, int], dict[int, np.ndarray]] = {}
        for node, index, ids in self._followers:
            tensor = constant(node.inputs[index])
            along = _along(names[ids])
            if tensor is None or along is None:
                continue
            axis = along[0] - ids.ndim + len(tensor.shape)
            if axis >= 0 and tensor.shape.numpy()[axis] > 1:
                found.setdefault((node, index), {})[axis] = along[1]
        return (Follower(node, index, axes) for (node, index), axes in found.items())


def _along(ids: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Return the axis along which variables differ, and them; None where there is none, hence nothing to cut."""
    ids = shrink(ids)
    axes = [axis for axis, size in enumerate(ids.shape) if size > 1]
    return (axes[0], ids.reshape(-1)) if axes else None


def _left(ids: np.ndarray, axis: int) -> int:
    """Return how many variables are left, the pinned one not counted, if `ids` are tied along all axes but one."""
    from scipy.sparse import coo_array  # heavy
    from scipy.sparse.csgraph import connected_components

    variables, rows = np.unique(ids, return_inverse=True)
    rows = np.moveaxis(rows.reshape(ids.shape), axis, -1)
    columns = np.broadcast_to(np.arange(ids.shape[axis]), rows.shape).reshape(-1)
    size = len(variables) + ids.shape[axis]
    edges = (np.ones(rows.size, np.int8), (rows.reshape(-1), len(variables) + columns))
    parts = int(connected_components(coo_array(edges, shape=(size, size)), directed=False)[0])
    return parts - int(PINNED in variables)
