"""The float model with a switch for every source of rounding: any assignment of precisions is one run of one session.

Sources are the weights of each unit, and the rounding of each link (units.py). At every tensor that a source can change
stands a switch,

    t' = t,    or round(t),    or op(x, W'),    or round(op(x, W'))

W' being the dequantized weights and biases of the quantized model, round its Q/DQ pair. So the error of any set of
sources is known without building a model for it. Where a tensor stays float and only some of its readers round it, the
switch rounds it for all: the one difference to the model that is built.

A switch is an If whose branch runs only where it is on; off, it costs one copy of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..backends.ort import Session
from ..passes.placement import output_tensor
from . import model as model_io

if TYPE_CHECKING:
    from .units import Wiring

_SWITCHES = "edgec::switches"


@dataclass(frozen=True)
class Source:
    """Something that rounds: the weight of a unit (`kind` weight), or a link's tensor (`kind` tensor).

    It is at work as soon as one of `units` runs on integers.
    """

    kind: str
    name: str
    units: tuple[str, ...]


class Switchboard:
    """The float model with a switch for every source of rounding that its quantized copy has."""

    def __init__(self, original: ir.Model, quantized: ir.Model, wiring: Wiring, *, threads: int = 0) -> None:
        """`quantized` is `original` with every unit quantized, and none shielded (QuantScheme.shield_float)."""
        board = _Board(original, quantized, wiring)
        self.sources: tuple[Source, ...] = tuple(board.sources)
        self.outputs = model_io.output_names(original)
        with TemporaryDirectory() as folder:
            self._session = Session(model_io.session_source(board.model, Path(folder)), threads=threads)

    def run(self, feed: Mapping[str, np.ndarray], active: Iterable[int]) -> list[np.ndarray]:
        """Return the float outputs with the sources of these indices switched on."""
        switches = np.zeros(max(len(self.sources), 1), dtype=np.bool_)
        switches[list(active)] = True
        found = self._session.run({**feed, _SWITCHES: switches})
        return [y for y in (found[name] for name in self.outputs) if y.dtype.kind == "f"]

    def indices(self, units: Iterable[str]) -> list[int]:
        """Return the sources at work when these units run on integers."""
        chosen = set(units)
        return [i for i, source in enumerate(self.sources) if not chosen.isdisjoint(source.units)]


class _Board:
    """Builds the switched graph; lives for one construction."""

    def __init__(self, original: ir.Model, quantized: ir.Model, wiring: Wiring) -> None:
        self.model = model_io.copy(original)
        self.model.opset_imports.update(quantized.opset_imports)
        self.graph = self.model.graph
        self.nodes = {node.name or "": node for node in self.graph}
        self.values = {v.name or "": v for v in self.graph.inputs} | {
            v.name or "": v for n in self.graph for v in n.outputs
        }
        self.quantized, self.wiring = quantized, wiring
        self.sources: list[Source] = []
        self.switches = ir.Value(name=_SWITCHES, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(["sources"]))
        weights, roundings = self._weights(), self._roundings()
        outputs = list(self.graph.outputs)
        targets = [v for v in self.values.values() if v in weights or v in roundings]
        replaced = {value: self._switch(value, weights.get(value), roundings.get(value)) for value in targets}
        for i, value in enumerate(outputs):
            if value in replaced:  # the name stays with the output
                new, name = replaced[value], value.name
                value.name = f"{name}::exact"
                new.name = name
                self.graph.outputs[i] = new
        self.graph.inputs.append(self.switches)
        self.graph.sort()

    # ---------------------------------------------------------------------------------- what can be switched

    def _weights(self) -> dict[ir.Value, tuple[int, ir.Node, list[np.ndarray | None]]]:
        """Map the tensor that each unit with weights hands on to (source, quantized node, its constant inputs)."""
        names = {unit.name for unit in self.wiring.units}
        found = []
        for node in self.quantized.graph:
            if node.name in names and any(v is not None and _from_constants(v) for v in node.inputs):
                found.append(node)
        constants = _evaluate(
            self.quantized, [v for n in found for v in n.inputs if v is not None and _from_constants(v)]
        )
        weights = {}
        for node in found:
            same = self.nodes[node.name or ""]
            arrays = [None if v is None else constants.get(v.name or "") for v in node.inputs]
            weights[output_tensor(same)] = (len(self.sources), node, arrays)
            self.sources.append(Source("weight", node.name or "", (node.name or "",)))
        return weights

    def _roundings(self) -> dict[ir.Value, tuple[int, ir.Node]]:
        """Map each tensor that goes into QuantizeLinear to (source, that node); moved forms share a link's source."""
        links = {link.tensor: link for link in self.wiring.links}
        numbers: dict[str, int] = {}
        found = {}
        for node in self.quantized.graph:
            source = node.inputs[0]
            if node.op_type != "QuantizeLinear" or source is None or _from_constants(source):
                continue
            value = self._original(source)
            link = links[self.wiring.link_of[value.name or ""]]
            if link.tensor not in numbers:
                numbers[link.tensor] = len(self.sources)
                self.sources.append(Source("tensor", link.tensor, link.rounded_by))
            found[value] = (numbers[link.tensor], node)
        return found

    def _original(self, value: ir.Value) -> ir.Value:
        """Return the float model's tensor: that of the same node, whatever the quantized one calls its output."""
        producer = value.producer()
        same = self.nodes.get(producer.name or "") if producer is not None else None
        if producer is None or same is None:
            return self.values[value.name or ""]
        return same.outputs[producer.outputs.index(value)]

    # ---------------------------------------------------------------------------------- how it is switched

    def _switch(
        self,
        value: ir.Value,
        weight: tuple[int, ir.Node, list[np.ndarray | None]] | None,
        rounding: tuple[int, ir.Node] | None,
    ) -> ir.Value:
        """Put an If behind the tensor that computes its other forms only where a switch is on."""
        uses = tuple(value.uses())
        stages: list[tuple[ir.Value, list[ir.Node]]] = []
        conditions: list[ir.Value] = []
        if weight is not None:
            conditions.append(self._condition(weight[0], value))
            stages.append(_if(conditions[-1], self._reweighted(weight, value), value, value, f"{value.name}::weight"))
        if rounding is not None:
            conditions.append(self._condition(rounding[0], value))
            before = stages[-1][0] if stages else value
            stages.append(_if(conditions[-1], self._rounded(rounding, before), before, value, f"{value.name}::tensor"))
        current, nodes = stages[-1][0], [node for _, part in stages for node in part]
        if len(stages) == 2:  # one test, and one copy, where neither is on
            either = ir.Value(name=f"{value.name}::either", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
            self.graph.append(ir.node("Or", conditions, outputs=[either], name=f"{either.name}"))
            current, nodes = _if(either, (nodes, current), value, value, f"{value.name}::switched")
        self.graph.extend(nodes)
        for node, i in uses:
            node.replace_input_with(i, current)
        return current

    def _condition(self, source: int, value: ir.Value) -> ir.Value:
        index = self._constant(np.array(source, dtype=np.int64), f"{value.name}::index{source}")
        out = ir.Value(name=f"{value.name}::on{source}", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        self.graph.append(ir.node("Gather", [self.switches, index], {"axis": 0}, outputs=[out], name=out.name))
        return out

    def _reweighted(self, part: tuple[int, ir.Node, list[np.ndarray | None]], value: ir.Value) -> _Branch:
        """Compute the node again with the quantized weights, and the activation behind it."""
        _, quantized, arrays = part
        node = self.nodes[quantized.name or ""]
        inputs: list[ir.Value | None] = []
        for i, array in enumerate(arrays):
            same = node.inputs[i] if i < len(node.inputs) else None
            inputs.append(same if array is None else self._constant(array, f"{node.name}::constant{i}"))
        nodes = [_again(node.domain, node.op_type, inputs, quantized, f"{node.name}::again")]
        if node.outputs[0] is not value:
            follower = value.producer()
            assert follower is not None
            rest = [nodes[0].outputs[0], *follower.inputs[1:]]
            nodes.append(_again(follower.domain, follower.op_type, rest, follower, f"{follower.name}::again"))
        return nodes, nodes[-1].outputs[0]

    def _rounded(self, part: tuple[int, ir.Node], value: ir.Value) -> _Branch:
        _, quantize = part
        scales: list[ir.Value | None] = []
        for i, constant in enumerate(quantize.inputs[1:]):
            if constant is None:
                scales.append(None)
                continue
            assert constant.const_value is not None
            scales.append(self._constant(constant.const_value.numpy(), f"{value.name}::scale{i}"))
        to = _again(quantize.domain, "QuantizeLinear", [value, *scales], quantize, f"{value.name}::quantize")
        back = _again(quantize.domain, "DequantizeLinear", [to.outputs[0], *scales], None, f"{value.name}::dequantize")
        return [to, back], back.outputs[0]

    def _constant(self, array: np.ndarray, name: str) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value


_Branch = tuple[list[ir.Node], ir.Value]


def _again(domain: str, op: str, inputs: Sequence[ir.Value | None], like: ir.Node | None, name: str) -> ir.Node:
    attributes = () if like is None else like.attributes.values()
    return ir.Node(domain, op, inputs, attributes, outputs=[ir.Value(name=name)], name=name)


def _if(
    condition: ir.Value, then: _Branch, otherwise: ir.Value, like: ir.Value, name: str
) -> tuple[ir.Value, list[ir.Node]]:
    """Return `then` where the condition holds and the tensor `otherwise` where not, as an If and its output."""
    nodes, result = then
    if result.type is None:
        result.type = like.type
    copied = ir.Value(name=f"{name}::off", type=like.type, shape=like.shape)
    copy = ir.node("Identity", [otherwise], outputs=[copied], name=f"{name}::off")
    out = ir.Value(name=name, type=like.type, shape=like.shape)
    branches = {
        "then_branch": ir.Graph([], [result], nodes=nodes, name=f"{name}::then"),
        "else_branch": ir.Graph([], [copied], nodes=[copy], name=f"{name}::else"),
    }
    attributes = [ir.AttrGraph(key, graph) for key, graph in branches.items()]
    return out, [ir.Node("", "If", [condition], attributes, outputs=[out], name=name)]


def _from_constants(value: ir.Value) -> bool:
    """Say whether a tensor comes from initializers alone."""
    if value.const_value is not None:
        return not value.is_graph_input()
    node = value.producer()
    return node is not None and bool(node.inputs) and all(v is None or _from_constants(v) for v in node.inputs)


def _evaluate(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, np.ndarray]:
    """Return what constant tensors of the graph hold; those behind DequantizeLinear as ONNX Runtime computes them."""
    found = {v.name or "": v.const_value.numpy() for v in values if v.const_value is not None}
    names = {v.name or "" for v in values} - found.keys()
    if not names:
        return found
    part = model_io.copy(model)
    outputs = [v for node in part.graph for v in node.outputs if v.name in names]
    part.graph.outputs.clear()
    part.graph.outputs.extend(outputs)
    needed: set[ir.Node] = set()
    todo = [v.producer() for v in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in needed:
            needed.add(node)
            todo += [v.producer() for v in node.inputs if v is not None]
    part.graph.remove([node for node in part.graph if node not in needed])  # also what subgraphs read
    part.graph.inputs.clear()
    with TemporaryDirectory() as folder:
        return found | Session(model_io.session_source(part, Path(folder)), optimise=False).run({})
