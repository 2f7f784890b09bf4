"""The float model with a switch for every source of rounding: any assignment of precisions is one run of one session.

Sources are the weights of each unit, and the rounding of each link (units.py). At every tensor that a source can change
stands a switch,

    t' = t,    or round(t),    or op(x, W'),    or round(op(x, W'))

W' being the dequantized weights and biases of the quantized model, round its Q/DQ pair. A tensor that its own producer
does not round is rounded by each of its readers for itself, so there stands a switch in front of each of those as well.
So the error of any set of sources is known without building a model for it.

A switch is an If whose branch runs only where it is on; off, it costs one copy of the tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...backends.ort import Session
from ...passes.placement import output_tensor
from .. import model as model_io
from ..quantization.constant_values import evaluate, from_constants

if TYPE_CHECKING:
    from .units import Link, Wiring

_SWITCHES = "edgec::switches"

#: A source, and the QuantizeLinear that says how it rounds; and with the place in the float model that reads it so.
_Rounding = tuple[int, ir.Node]
_Reading = tuple[int, ir.Node, tuple[ir.Node, int]]


@dataclass(frozen=True)
class Source:
    """Something that rounds: the weight of a unit (`kind` weight), or a link's tensor (`kind` tensor).

    It is at work as soon as one of `units` runs on integers, unless `unless` does: a reader need not round by itself
    what comes rounded.
    """

    kind: str
    name: str
    units: tuple[str, ...]
    unless: str | None = None

    def works(self, units: Collection[str]) -> bool:
        """Say whether it is at work when these units, and no others, run on integers."""
        return self.unless not in units and any(unit in units for unit in self.units)


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
        return [i for i, source in enumerate(self.sources) if source.works(chosen)]


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
        weights, (roundings, readings) = self._weights(), self._roundings()
        outputs = list(self.graph.outputs)
        replaced: dict[ir.Value, ir.Value] = {}
        for value in list(self.values.values()):  # in the graph's order: what is computed again reads what is switched
            if value in weights or value in roundings:
                replaced[value] = self._switch(value, weights.get(value), roundings.get(value))
            for reading in readings.get(value, ()):
                self._switch_input(reading, value)
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
            if node.name in names and any(v is not None and from_constants(v) for v in node.inputs):
                found.append(node)
        constants = evaluate(
            self.quantized, [v for n in found for v in n.inputs if v is not None and from_constants(v)]
        )
        weights = {}
        for node in found:
            same = self.nodes[node.name or ""]
            arrays = [None if v is None else constants.get(v.name or "") for v in node.inputs]
            weights[output_tensor(same)] = (len(self.sources), node, arrays)
            self.sources.append(Source("weight", node.name or "", (node.name or "",)))
        return weights

    def _roundings(self) -> tuple[dict[ir.Value, _Rounding], dict[ir.Value, list[_Reading]]]:
        """Map tensors to how they are rounded for all, and to how some readers round them for themselves.

        Moved forms of a tensor share its sources.
        """
        links = {link.tensor: link for link in self.wiring.links}
        found: dict[str, list[tuple[ir.Value, ir.Node]]] = {}
        for node in self.quantized.graph:
            source = node.inputs[0]
            if node.op_type == "QuantizeLinear" and source is not None and not from_constants(source):
                value = self._original(source)
                found.setdefault(self.wiring.link_of[value.name or ""], []).append((value, node))
        whole: dict[ir.Value, _Rounding] = {}
        readings: dict[ir.Value, list[_Reading]] = {}
        for tensor, places in found.items():
            link = links[tensor]
            for_all, alone = _shares(link)
            if for_all:
                whole |= {value: (len(self.sources), node) for value, node in places}
                self.sources.append(Source("tensor", tensor, for_all))
            for reader in alone:
                for value, use in self._uses(tensor, reader):
                    quantize = next((node for place, node in places if place is value), places[0][1])
                    readings.setdefault(value, []).append((len(self.sources), quantize, use))
                self.sources.append(Source("tensor", tensor, (reader,), link.producer if for_all else None))
        return whole, readings

    def _uses(self, tensor: str, reader: str) -> list[tuple[ir.Value, tuple[ir.Node, int]]]:
        """Return where a unit reads a link: the tensor itself, or a moved form of it."""
        node = self.nodes[reader]
        return [
            (value, (node, i))
            for i, value in enumerate(node.inputs)
            if value is not None and self.wiring.link_of.get(value.name or "") == tensor
        ]

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
        rounding: _Rounding | None,
    ) -> ir.Value:
        """Put an If behind the tensor that computes its other forms only where a switch is on."""
        uses, name = tuple(value.uses()), value.name or ""
        stages: list[tuple[ir.Value, list[ir.Node]]] = []
        conditions: list[ir.Value] = []
        if weight is not None:
            conditions.append(self._condition(weight[0], name))
            stages.append(_if(conditions[-1], self._reweighted(weight, value), value, value, f"{name}::weight"))
        if rounding is not None:
            conditions.append(self._condition(rounding[0], name))
            before = stages[-1][0] if stages else value
            stages.append(
                _if(conditions[-1], self._rounded(rounding[1], before, name), before, value, f"{name}::tensor")
            )
        current, nodes = stages[-1][0], [node for _, part in stages for node in part]
        if len(stages) == 2:  # one test, and one copy, where neither is on
            either = ir.Value(name=f"{name}::either", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
            self.graph.append(ir.node("Or", conditions, outputs=[either], name=f"{either.name}"))
            current, nodes = _if(either, (nodes, current), value, value, f"{name}::switched")
        self.graph.extend(nodes)
        for node, i in uses:
            node.replace_input_with(i, current)
        return current

    def _switch_input(self, reading: _Reading, value: ir.Value) -> None:
        """Put an If in front of one input of one node."""
        source, quantize, (node, i) = reading
        before, name = node.inputs[i], f"{value.name}::{node.name}::{i}"
        assert before is not None
        switched, nodes = _if(self._condition(source, name), self._rounded(quantize, before, name), before, value, name)
        self.graph.extend(nodes)
        node.replace_input_with(i, switched)

    def _condition(self, source: int, name: str) -> ir.Value:
        index = self._constant(np.array(source, dtype=np.int64), f"{name}::index{source}")
        out = ir.Value(name=f"{name}::on{source}", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
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

    def _rounded(self, quantize: ir.Node, value: ir.Value, name: str) -> _Branch:
        scales: list[ir.Value | None] = []
        for i, constant in enumerate(quantize.inputs[1:]):
            if constant is None:
                scales.append(None)
                continue
            assert constant.const_value is not None
            scales.append(self._constant(constant.const_value.numpy(), f"{name}::scale{i}"))
        to = _again(quantize.domain, "QuantizeLinear", [value, *scales], quantize, f"{name}::quantize")
        back = _again(quantize.domain, "DequantizeLinear", [to.outputs[0], *scales], None, f"{name}::dequantize")
        return [to, back], back.outputs[0]

    def _constant(self, array: np.ndarray, name: str) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value


_Branch = tuple[list[ir.Node], ir.Value]


def _shares(link: Link) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the units that round a link's tensor for all who read it, and those that do so for themselves alone."""
    readers = tuple(unit for unit in link.rounded_by if unit != link.producer)
    if len(link.readers) == 1:  # the same, whoever rounds it
        return link.rounded_by, ()
    return tuple(unit for unit in link.rounded_by if unit == link.producer), readers


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
