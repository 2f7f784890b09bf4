"""SQNR of each layer's input and output in a quantized network, with the errors of the layers before it and without.

Three copies of the network run as one graph over the same images: the float model, its quantized copy, and that copy
again with every layer and every QuantizeLinear reading the *float* model's tensors (teacher forcing). With x, y what a
layer reads and gives in the first, x', y' in the second, y* in the third, sums over all images and elements,

    in  = 10 log10( sum x^2 / sum (x - x')^2 )       what reaches the layer, rounded as it reads it
    out = 10 log10( sum y^2 / sum (y - y')^2 )       accumulated: this layer and all before it
    own = 10 log10( sum y^2 / sum (y - y*)^2 )       this layer alone: its rounded inputs and weights

All is reduced inside the graph: a few numbers a layer and batch come back, whatever the tensors' size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...backends.ort import Session
from .. import model as model_io
from ..types import Progress, silent

if TYPE_CHECKING:
    from ..fidelity import Batch

#: What may be compared; tensors without a known type are taken for floats.
_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class LayerSqnr:
    """One layer's SQNRs in dB; None where there is no error at all, `own_db` also where the layer is in float."""

    in_db: float | None
    out_db: float | None
    own_db: float | None


def measure(
    original: ir.Model,
    quantized: ir.Model,
    nodes: Sequence[str],
    batches: Iterable[Batch],
    *,
    images: int,
    threads: int = 0,
    progress: Progress = silent,
) -> dict[str, LayerSqnr]:
    """Return the SQNRs of these nodes, as far as both models have them with the same operator, by name.

    `quantized` was made from `original` by passes/quantize.py alone; neither is changed.
    """
    twin = _Triplet(original, quantized, nodes)
    if not twin.pairs:
        return {}
    sums = np.zeros((len(twin.pairs), 2), dtype=np.float64)
    done = 0
    with TemporaryDirectory() as folder:
        session = Session(model_io.session_source(twin.model, Path(folder)), threads=threads, fuse_quantized=False)
        for batch in batches:
            out = session.run(batch.feed)
            sums += np.array([[out[f"{i}::signal"], out[f"{i}::error"]] for i in range(len(sums))], dtype=np.float64)
            done += batch.count
            progress("judging each layer", done, images)
    return {
        name: LayerSqnr(*(_decibels(sums[found]) if found else None for found in indices))
        for name, indices in twin.layers.items()
    }


def _decibels(sums: np.ndarray) -> float | None:
    """Return the SQNR of rows of (signal, error); None where there is no error."""
    signal, error = sums.sum(0)
    if not math.isfinite(error) or signal <= 0 < error:
        return -math.inf
    return 10 * math.log10(signal / error) if error > 0 else None


class _Triplet:
    """Builds the graph; lives for one construction.

    `pairs` are the tensors to compare, and `layers` maps each node to the pairs that are its inputs, output and own.
    """

    def __init__(self, original: ir.Model, quantized: ir.Model, nodes: Sequence[str]) -> None:
        self.model = model_io.copy(original)
        self.graph = self.model.graph
        self.model.opset_imports.update(quantized.opset_imports)
        self.nodes = {node.name or "": node for node in self.graph}
        self.exact = {v.name: v for node in self.graph for v in node.outputs} | {v.name: v for v in self.graph.inputs}
        self.pairs: dict[tuple[ir.Value, ir.Value], int] = {}
        self.layers: dict[str, tuple[list[int], list[int], list[int]]] = {}
        self.constants = self._constants(quantized)
        coarse = self._copy(quantized, "coarse", forced=False)
        alone = self._copy(quantized, "alone", forced=True)
        wanted = set(nodes)
        for node in quantized.graph:
            same = self.nodes.get(node.name or "")
            if node.name in wanted and same is not None and _in_floats(node, same):
                self._compare(node, same, coarse, alone)
        self.graph.outputs.clear()
        for (exact, other), i in self.pairs.items():
            self._sums(exact, other, i)
        self.graph.sort()
        RemoveUnusedNodesPass()(self.model)

    def _constants(self, quantized: ir.Model) -> dict[ir.Value, ir.Value]:
        copies = {v: self.exact[v.name] for v in quantized.graph.inputs if v.name in self.exact}
        for name, value in quantized.graph.initializers.items():
            copy = self.graph.initializers.get(name)
            if copy is None:
                copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
                self.graph.register_initializer(copy)
            copies[value] = copy
        return copies

    def _copy(self, quantized: ir.Model, suffix: str, *, forced: bool) -> dict[ir.Value, ir.Value]:
        """Append a copy of the quantized graph and return where each of its tensors is; `forced` as in the head."""
        copies = dict(self.constants)
        for node in quantized.graph:
            inputs = [None if v is None else copies.get(v, v) for v in node.inputs]
            if forced:
                inputs = [self._forced(node, i, v) for i, v in enumerate(inputs)]
            outputs = [ir.Value(name=f"{v.name}::{suffix}", type=v.type, shape=v.shape) for v in node.outputs]
            attributes = [_captured_from(copies, attribute) for attribute in node.attributes.values()]
            name = f"{node.name}::{suffix}"
            self.graph.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name))
            copies.update(zip(node.outputs, outputs, strict=True))
        return copies

    def _forced(self, node: ir.Node, index: int, copied: ir.Value | None) -> ir.Value | None:
        """Return the float model's tensor where the node reads an activation that was not just rounded for it."""
        value = node.inputs[index]
        if value is None or from_constants(value):
            return copied
        if node.op_type == "QuantizeLinear":
            return self._same(value) or copied
        same, producer = self.nodes.get(node.name or ""), value.producer()
        rounded = producer is not None and producer.op_type == "DequantizeLinear"
        if same is None or rounded or value.dtype not in _FLOATS:
            return copied
        return same.inputs[index] if index < len(same.inputs) else copied

    def _same(self, value: ir.Value) -> ir.Value | None:
        """Return the float tensor: that of the same node, whatever the quantized one calls its output."""
        producer = value.producer()
        same = self.nodes.get(producer.name or "") if producer is not None else None
        if producer is None or same is None:
            return self.exact.get(value.name)
        return same.outputs[producer.outputs.index(value)]

    def _compare(
        self, node: ir.Node, same: ir.Node, coarse: dict[ir.Value, ir.Value], alone: dict[ir.Value, ir.Value]
    ) -> None:
        read = [
            self._pair(same.inputs[i], coarse[v])
            for i, v in enumerate(node.inputs)
            if v is not None and i < len(same.inputs) and not from_constants(v) and v in coarse
        ]
        given = [self._pair(same.outputs[0], coarse[node.outputs[0]])]
        rounds = any(v is not None and _rounded(v) for v in node.inputs)
        own = [self._pair(same.outputs[0], alone[node.outputs[0]])] if rounds else []
        self.layers[node.name or ""] = (read, given, own)

    def _pair(self, exact: ir.Value | None, other: ir.Value) -> int:
        assert exact is not None
        return self.pairs.setdefault((exact, other), len(self.pairs))

    def _sums(self, exact: ir.Value, other: ir.Value, number: int) -> None:
        difference = self._add("Sub", [exact, other], f"{number}::difference")
        for out, value in (("signal", exact), ("error", difference)):
            total = self._add("ReduceSumSquare", [value], f"{number}::{out}", keepdims=0)
            total.shape = ir.Shape([])
            self.graph.outputs.append(total)

    def _add(self, op: str, inputs: list[ir.Value], out: str, **attributes: int) -> ir.Value:
        value = ir.Value(name=out, type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.append(ir.node(op, inputs, attributes or None, outputs=[value], name=out))
        return value


def _captured_from(copies: Mapping[ir.Value, ir.Value], attribute: ir.Attr) -> ir.Attr:
    """Return the attribute; a subgraph is copied, and what it reads of the graph around it is read from `copies`."""
    if attribute.type != ir.AttributeType.GRAPH:
        return attribute
    graph = attribute.as_graph().clone(allow_outer_scope_values=True)
    for node in graph.all_nodes():
        for i, value in enumerate(node.inputs):
            if value is not None and value in copies:
                node.replace_input_with(i, copies[value])
    return ir.AttrGraph(attribute.name, graph)


def _in_floats(node: ir.Node, same: ir.Node) -> bool:
    """Say whether both compute the same on floats: not so where the quantized one only moves integers."""
    found = [v for v in node.inputs if v is not None and not from_constants(v)]
    return node.op_type == same.op_type and all(v.dtype in _FLOATS for v in found)


def from_constants(value: ir.Value) -> bool:
    """Say whether a tensor comes from initializers alone."""
    if value.const_value is not None:
        return not value.is_graph_input()
    node = value.producer()
    return node is not None and bool(node.inputs) and all(v is None or from_constants(v) for v in node.inputs)


def _rounded(value: ir.Value) -> bool:
    """Say whether a node reads this tensor rounded: an activation, or a weight that is computed from its integers."""
    producer = value.producer()
    return producer is not None and (producer.op_type == "DequantizeLinear" or from_constants(value))
