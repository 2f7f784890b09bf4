"""Branches of residual sums that can go whole; the model with some of them silenced, and without them.

Algebra. In y = Add(s, f) let f be made from one layer by what acts element by element or moves axes, t:

    f = t(W x + b)          and with W = 0:          f = t(b), a constant c, per channel where b and t's constants are

so    removed(model, branches) = silenced(model, branches)        up to float rounding, for all finite inputs

where `silenced` has W = 0 and `removed` reads c in f's place, or y is s where c = 0, and all that computes for f alone
is gone (branch_rewrites.py). `Prover(silenced(model, …)).prove(removed(model, …), tolerance)` checks that by running
both.

Which Adds. s has y's shape, nothing but the Add reads f, and f depends on no graph input that s does not depend on.
Then as long as of each Add one operand stays, every tensor that is left depends on the inputs that it depended on: in
the graph's order, each y does by its s, which does by what was said of the Adds before it (`Branches.feasible`).

What f computes may start anywhere: a block behind an identity, the convolution of a projection (either may go, not
both), the attention or the MLP of a transformer as a candidate of its own (Zhang et al. 2024, "FinerCut: Finer-grained
Interpretable Layer Pruning for Large Language Models").

Not touched: Adds in subgraphs, operands that are the skip (the other one is computed from it), and sums over anything
but a layer's output: sums over channels gated by what they hold (squeeze-and-excite behind the last layer) stay whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..compiler.types import Refusal
from .constants import constant
from .shapes import infer_shapes

RULE = "branches"
#: Layers whose weight can be 0.
LINEAR = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
#: What may stand between the layer and the sum: of a constant it makes a constant that is as easily spread out.
_TAIL = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Transpose", "Identity", "Cast", "Abs", "Neg", "Sqrt"),
        *("Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu"),
        *("Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "BatchNormalization"),
    )
)


@dataclass(frozen=True)
class Branch:
    """An operand of a sum that can be a constant.

    `add` is the sum's node, `layer` the one whose weight is set to 0, `nodes` are all that compute for this operand
    alone: names of nodes, `nodes` in the graph's order. `name` is "branch:" and the layer's.
    """

    name: str
    add: str
    layer: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Branches:
    """All branches of a model, in the graph's order, and the sums of which none can go."""

    branches: tuple[Branch, ...]
    refusals: tuple[Refusal, ...]

    def __len__(self) -> int:
        return len(self.branches)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def __getitem__(self, index: int) -> Branch:
        return self.branches[index]

    def feasible(self, chosen: Collection[str]) -> tuple[Branch, ...]:
        """Return the branches of these names without the second of a sum: the first named goes."""
        by_name = {branch.name: branch for branch in self.branches}
        kept: dict[str, str] = {}
        for name in chosen:
            kept.setdefault(by_name[name].add, name)
        return tuple(branch for branch in self.branches if branch.name in kept.values())


def branches(model: ir.Model) -> Branches:
    """Find the branches that can go; `model`, which has been normalised, is not changed."""
    twin = model.clone()
    infer_shapes(twin)
    search = _Search(twin.graph)
    found: list[Branch] = []
    refusals: list[Refusal] = []
    for node in twin.graph:
        if node.op_type == "Add" and not node.domain:
            mine = search.of(node)
            good = [one for one in mine if isinstance(one, Branch)]
            found += good
            refusals += [Refusal(name_of(node), RULE, one) for one in mine if isinstance(one, str) and not good]
    return Branches(tuple(found), tuple(refusals))


def name_of(node: ir.Node) -> str:
    """Return the name by which a node is known."""
    return node.name or node.outputs[0].name or node.op_type


# ------------------------------------------------------------------------------------------- the search


class _Search:
    """A graph, and which nodes and graph inputs each of its values is computed from, as bits of a number."""

    def __init__(self, graph: ir.Graph) -> None:
        self._nodes = list(graph)
        given = [value for value in graph.inputs if not value.is_initializer()]
        self._from: dict[ir.Value, int] = {value: 1 << i for i, value in enumerate(given)}
        self._inputs = (1 << len(given)) - 1
        self._bit = {node: 1 << (len(given) + i) for i, node in enumerate(self._nodes)}
        for node in self._nodes:
            bits = self._bit[node]
            for value in _reads(node):
                bits |= self._from.get(value, 0)
            self._from |= dict.fromkeys(node.outputs, bits)

    def of(self, add: ir.Node) -> list[Branch | str]:
        """Return the branches of a sum, and why operands that look like one are none."""
        first, second = add.inputs
        if first is None or second is None or first is second or self._fixed(first) or self._fixed(second):
            return []
        return [self._operand(add, f, s) for f, s in ((first, second), (second, first)) if not self._makes(f, s)]

    def _fixed(self, value: ir.Value) -> bool:
        return not self._from.get(value, 0) & self._inputs

    def _makes(self, value: ir.Value, other: ir.Value) -> bool:
        """Say whether `other` is computed from `value`, which then is the skip."""
        producer = value.producer()
        bit = self._from[value] if producer is None else self._bit[producer]
        return bool(bit & self._from[other])

    def _operand(self, add: ir.Node, f: ir.Value, s: ir.Value) -> Branch | str:
        end = end_of(f)
        if isinstance(end, str):
            return end
        why = _broadcasts(f, s) or _read_elsewhere(end, add) or _computed_bias(end.layer)
        if why is None and not self._from[f] & self._from[s]:
            why = "its operands have nothing in common: neither is a skip of the other"
        if why is None and self._from[f] & ~self._from[s] & self._inputs:
            why = f"without {f.name} its sum would not depend on all graph inputs that it depends on"
        if why is not None:
            return why
        names = tuple(name_of(node) for node in self._alone(f, add))
        return Branch(f"branch:{name_of(end.layer)}", name_of(add), name_of(end.layer), names)

    def _alone(self, f: ir.Value, add: ir.Node) -> list[ir.Node]:
        """Return the nodes that nobody would need if f were a constant."""
        dead: set[ir.Node] = set()
        for node in reversed(self._nodes):
            if self._bit[node] & self._from[f] and all(
                not value.is_graph_output() and all(use.node in dead or value is f for use in value.uses())
                for value in node.outputs
            ):
                dead.add(node)
        return [node for node in self._nodes if node in dead]


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node and the nodes of its subgraphs read."""
    inner = [n for a in node.attributes.values() for graph in _graphs(a) for n in graph.all_nodes()]
    yield from (value for one in (node, *inner) for value in one.inputs if value is not None)


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


@dataclass(frozen=True, eq=False)
class End:
    """How an operand ends: its last layer, and what stands between that and the sum, in the graph's order."""

    layer: ir.Node
    tail: tuple[ir.Node, ...]


def end_of(f: ir.Value) -> End | str:
    """Return how an operand ends, or why it is not understood."""
    tail: list[ir.Node] = []
    ends: dict[ir.Node, None] = {}
    waiting = [f]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if constant(value) is not None or node in tail:
            continue
        if node is None:
            return f"{f.name} is the graph input {value.name}, and a few numbers on it, no layer's output"
        if node.op_type in LINEAR and not node.domain:
            ends[node] = None
        elif node.op_type in _TAIL and not node.domain and len(node.outputs) == 1:
            tail.append(node)
            waiting += [one for one in node.inputs if one is not None]
        else:
            return f"{f.name} is made by {name_of(node)} ({node.op_type}), no layer with a stored weight"
    if len(ends) != 1:
        return f"{f.name} is made by {len(ends)} layers: {', '.join(map(name_of, ends))}"
    (layer,) = ends
    if constant(layer.inputs[1]) is None:
        return f"{name_of(layer)} has no stored weight"
    return End(layer, tuple(_ordered(tail)))


def _ordered(nodes: Collection[ir.Node]) -> list[ir.Node]:
    """Return nodes of one graph so that each stands behind those that it reads."""
    left, ready = list(nodes), []
    while left:
        free = [node for node in left if not any(v is not None and v.producer() in left for v in node.inputs)]
        ready += free
        left = [node for node in left if node not in free]
    return ready


def _broadcasts(f: ir.Value, s: ir.Value) -> str | None:
    """Say why the sum may have another shape than s; of images there are as many on both sides."""
    if f.shape is None or s.shape is None:
        return f"the shape of {(s if s.shape is None else f).name} is not known"
    wider = len(f.shape) > len(s.shape)
    pairs = zip(reversed(list(f.shape)), reversed(list(s.shape)), strict=False)
    for place, (mine, other) in enumerate(pairs):
        if mine == 1 or (isinstance(other, int) and other != 1) or _equal(mine, other):
            continue
        first = place == len(s.shape) - 1
        wider |= not first or isinstance(mine, int) or isinstance(other, int)
    return f"{f.name} of shape {f.shape} may spread out {s.name} of shape {s.shape}" if wider else None


def _equal(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return a.value is not None and a.value == b.value


def _read_elsewhere(end: End, add: ir.Node) -> str | None:
    for value in (node.outputs[0] for node in (end.layer, *end.tail)):
        if value.is_graph_output():
            return f"{value.name} is a graph output"
        others = [use.node for use in value.uses() if use.node is not add and use.node not in end.tail]
        if others:
            return f"{value.name} is read by {name_of(others[0])} as well"
    return None


def _computed_bias(layer: ir.Node) -> str | None:
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    return None if bias is None or constant(bias) is not None else f"the bias of {name_of(layer)} is computed"
