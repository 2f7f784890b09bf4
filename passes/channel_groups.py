"""Which channels of a network belong together: each element of each tensor gets the number of a variable.

Algebra. Multiply every element x_e of every tensor by a positive factor f[v(e)], v(e) the element's variable:

    y = f(x) commutes with that   where y's elements depend on x's of the same variable only, and f(a x) = a f(x), a > 0
    y = x + z                     needs equal variables on both sides, element by element
    y = W x + b                   W[o,i] -> W[o,i] f[v(y_o)] / f[v(x_i)],   b[o] -> b[o] f[v(y_o)]

A linear operator with constant weights therefore *consumes* the variables of its input and gives its output new ones;
all others hand variables on, tie some of them together, or pin them: variable 0 is pinned, its factor is 1. Graph
inputs and outputs are pinned, and so is everything that an operator reads or writes for which there is no rule
(channel_rules.py). The network's outputs are then the same for any choice of the other factors.

The variables of a tensor are an array of its rank with size 1 along the axes on which they do not depend: (1, C, 1, 1)
for most. What moves data is executed on these arrays, so that shuffles, slices and flattening need no special cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .channel_layout import Dim, shrink
from .channel_rules import LAYERS, RULES, Rule
from .shapes import infer_shapes
from .weights import Stays, changeable

#: The variable whose factor is 1.
PINNED = 0
#: A constant may grow to this many elements, where its elements need factors of their own.
_GROWN = 1 << 16

# ------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False)
class Rescaled:
    """A constant input of a node and the variables that its elements follow.

    With factors f, its new value is `constant * f[up] / f[down]`, where absent is 1. `up` and `down` broadcast with
    the constant; its shape may grow thereby.
    """

    node: ir.Node
    index: int
    up: np.ndarray | None = None
    down: np.ndarray | None = None

    @property
    def value(self) -> ir.Value:
        """The constant."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear operator with a constant weight: the variables of its input and output channels, both 1-D."""

    node: ir.Node
    inputs: np.ndarray
    outputs: np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelVariables:
    """The variables of a model; `count` of them, 0 included.

    `constants` has all that must be rescaled, `layers` those nodes that join two sets of variables by a weight.
    `unclipped` are nodes that limit their input and were said never to do so.
    """

    count: int
    constants: tuple[Rescaled, ...]
    layers: tuple[Layer, ...]
    unclipped: tuple[ir.Node, ...]
    refusals: tuple[Refusal, ...]
    tensors: Mapping[str, np.ndarray]

    def of(self, value: ir.Value | str) -> np.ndarray | None:
        """Return the variables of a tensor of the main graph, int64, of the tensor's rank (see above).

        None where nothing is known of the tensor, which is then pinned.
        """
        name = value if isinstance(value, str) else value.name
        return self.tensors.get(name or "")

    def channels(self, value: ir.Value | str) -> tuple[int | None, np.ndarray]:
        """Return the one axis along which a tensor's variables differ, and the variables along it, 1-D.

        The axis is None where all elements have the same variable (one number then). Tensors whose variables depend
        on several axes have the axis None, too, and count as pinned.
        """
        ids = self.of(value)
        axes = [] if ids is None else [axis for axis, size in enumerate(ids.shape) if size > 1]
        if ids is None or len(axes) > 1:
            return None, np.array([PINNED])
        return (axes[0] if axes else None), ids.reshape(-1)

    @property
    def pinned(self) -> np.ndarray:
        """One boolean a variable: whether its factor must be 1."""
        return np.array([variable == PINNED for variable in range(self.count)])


def analyse(model: ir.Model, unreached: Collection[str] = ()) -> ChannelVariables:
    """Find the channel variables of the main graph; `model` is not changed.

    `unreached` names outputs of Clip nodes whose finite limits no data reaches: they count as ReLUs.
    """
    twin = model.clone()
    fault = infer_shapes(twin)
    work = Analysis(model.graph, {} if fault else _dims(twin.graph), frozenset(unreached))
    if fault:
        work.refusals.append(Refusal("the whole model", "channel-groups", f"its shapes contradict each other: {fault}"))
    for node in model.graph:
        work.visit(node)
    return work.result()


def _dims(graph: ir.Graph) -> dict[str, tuple[Dim, ...]]:
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {
        value.name: tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        for value in values
        if value.name and value.shape is not None
    }


# ------------------------------------------------------------------------------------------- the work


@dataclass
class Analysis:
    """What the rules work with: they read variables, make new ones and tie them; ties are resolved at the end."""

    graph: ir.Graph
    known_dims: Mapping[str, tuple[Dim, ...]]
    unreached: frozenset[str]
    refusals: list[Refusal] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    constants: list[Rescaled] = field(default_factory=list)
    unclipped: list[ir.Node] = field(default_factory=list)
    _ids: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    _ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _read: Counter[ir.Value] = field(default_factory=Counter)
    _count: int = 1

    def visit(self, node: ir.Node) -> None:
        """Apply the node's rule; whatever it reads that the rule did not look at is pinned."""
        self._read.clear()
        marks = len(self.layers), len(self.constants), len(self.unclipped)
        outputs: Sequence[np.ndarray] = ()
        try:
            outputs = [self._fitting(v, ids) for v, ids in zip(node.outputs, _rule(node)(self, node), strict=False)]
        except Stays as why:
            self._read.clear()
            del self.layers[marks[0] :], self.constants[marks[1] :], self.unclipped[marks[2] :]
            if node.op_type in LAYERS or any(self._ids[value].any() for value in self._unread(node)):
                self.refuse(node, str(why))
        for value in self._unread(node):
            self.pin(self._ids[value])
        for value, ids in zip(node.outputs, outputs, strict=False):
            self._ids[value] = ids
            self._pin_what_is_read_outside(node, value)

    def _pin_what_is_read_outside(self, node: ir.Node, value: ir.Value) -> None:
        captured = any(user.graph is not self.graph for user, _ in value.uses())
        if captured and self._ids[value].any():
            self.refuse(node, f"its output {value.name} is read inside the body of a control-flow node")
        if captured or value.is_graph_output():
            self.pin(self._ids[value])

    def result(self) -> ChannelVariables:
        """Resolve the ties and number the variables that are left."""
        names = _components(self._count, self._ties)
        return ChannelVariables(
            count=int(names.max()) + 1,
            constants=tuple(
                Rescaled(c.node, c.index, *(None if ids is None else names[ids] for ids in (c.up, c.down)))
                for c in self.constants
            ),
            layers=tuple(Layer(layer.node, names[layer.inputs], names[layer.outputs]) for layer in self.layers),
            unclipped=tuple(self.unclipped),
            refusals=tuple(self.refusals),
            tensors={value.name: names[ids] for value, ids in self._ids.items() if value.name},
        )

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
        """Tie all to the variable whose factor is 1."""
        self._ties.append((ids, np.full_like(ids, PINNED)))

    def rescale(self, node: ir.Node, index: int, up: np.ndarray | None = None, down: np.ndarray | None = None) -> None:
        """Let a constant input follow variables. Raises Stays if it may not be changed, or would grow too large."""
        tensor = changeable(node.inputs[index])
        shape = tensor.shape.numpy()
        up, down = (_trimmed(ids, len(shape)) for ids in (up, down))
        grown = np.broadcast_shapes(shape, *(ids.shape for ids in (up, down) if ids is not None))
        if grown != tuple(shape) and np.prod(grown) > _GROWN:
            raise Stays(f"{node.inputs[index].name} would grow to {list(grown)}")  # type: ignore[union-attr]  # changeable saw to it
        self.constants.append(Rescaled(node, index, up, down))

    def add_layer(self, node: ir.Node, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Record a linear operator with the variables of its channels."""
        self.layers.append(Layer(node, inputs, outputs))

    def refuse(self, node: ir.Node, why: str) -> None:
        """Record why a node pins what it reads or writes."""
        self.refusals.append(Refusal(node.name or node.outputs[0].name or node.op_type, "channel-groups", why))

    # ----------------------------------------------------------------------------------

    def _fitting(self, value: ir.Value, ids: np.ndarray) -> np.ndarray:
        dims = self.dims(value)
        sizes_fit = all(n == 1 or dim == n or not isinstance(dim, int) for n, dim in zip(ids.shape, dims, strict=False))
        if ids.ndim != len(dims) or not sizes_fit:
            raise Stays(f"its output has shape {list(dims)}, which its inputs do not explain")
        return shrink(ids)

    def _unread(self, node: ir.Node) -> list[ir.Value]:
        """Return the inputs with variables that the rule did not take care of; x * x reads x once only."""
        found = Counter(value for value in node.inputs if value in self._ids)
        return [value for value, count in found.items() if value is not None and self._read[value] < count]


def _rule(node: ir.Node) -> Rule:
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return _no_rule
    return _no_rule if node.domain not in ("", "ai.onnx") else RULES.get(node.op_type, _no_rule)


def _no_rule(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    del work
    raise Stays(f"{node.op_type} does not commute with scaling channels, or there is no rule for it")


def _trimmed(ids: np.ndarray | None, rank: int) -> np.ndarray | None:
    """Drop leading axes of size 1 that a constant of this rank does not have."""
    while ids is not None and ids.ndim > rank and ids.shape[0] == 1:
        ids = ids[0]
    return ids


def _components(count: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the new number of each variable: those that are tied share one, and PINNED keeps its own."""
    from scipy.sparse import coo_array  # heavy
    from scipy.sparse.csgraph import connected_components

    rows, columns = (np.concatenate([[PINNED], *(tie[i].reshape(-1) for tie in ties)]) for i in (0, 1))
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # by first appearance, whatever scipy's order is: 0 stays 0
    return np.asarray(order[numbers], np.int64)
