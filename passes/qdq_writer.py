"""Writing a placement: Q/DQ around activations, data movement on the integers, shields for layers left in float.

Weights and biases are weight_writer.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..compiler.types import QuantScheme
from .graph_builder import GraphBuilder, onnx_type
from .placement import Placement, output_tensor
from .quant_params import QParams, activation_params
from .weight_writer import WeightWriter


class QdqWriter:
    """Rewrites one graph by its placement; lives for one call."""

    def __init__(self, build: GraphBuilder, weights: WeightWriter, placement: Placement, scheme: QuantScheme) -> None:
        self.build, self.weights, self.placement, self.scheme = build, weights, placement, scheme
        self.graph, self.activation = build.graph, scheme.activation or ""
        self.params: dict[ir.Value, QParams] = {
            value: activation_params(chosen, self.activation, scheme.symmetric)
            for value, chosen in placement.ranges.items()
        }
        self.integers: dict[ir.Value, ir.Value] = {}  # float tensor -> its integer form
        self.floats: dict[ir.Value, ir.Value] = {}  # float tensor -> what DequantizeLinear makes of that
        self.constants: dict[tuple[str, QParams], tuple[ir.Value, ir.Value]] = {}

    def write(self) -> None:
        """Rewrite the graph."""
        readers = {value: tuple(value.uses()) for value in self.placement.produced}
        reads = self._reads()
        for node, role in self.placement.nodes.items():
            self._rewrite(node, role, reads.pop(node, ()))
        for node, indices in reads.items():
            for i in indices:
                self._read(node, i)
        for value, uses in readers.items():
            self._redirect(value, uses)
        moved = [node for node in self.placement.nodes if self._on_integers(node)]
        self.graph.remove(moved, safe=True)
        self.graph.sort()
        self._drop_replaced_weights()
        if self.scheme.shield_float:
            for node in [n for n in self.graph if self._looks_quantizable(n)]:
                self._shield(node)
            for node in [n for n in self.graph if n.op_type == "MaxPool"]:
                self._shield_pool(node)

    def _reads(self) -> dict[ir.Node, Sequence[int]]:
        """Return which inputs of which nodes shall be read dequantized, in the graph's order: names depend on it."""
        found: dict[ir.Node, list[int]] = {}
        for node, i in self.placement.reads:
            found.setdefault(node, []).append(i)
        return {node: sorted(found[node]) for node in self.graph if node in found}

    def _rewrite(self, node: ir.Node, role: str, reads: Sequence[int]) -> None:
        if role == "move":
            self._move(node)
            return
        if node in self.placement.joined:
            self._join(node)
            return
        for i in reads:
            self._read(node, i)
        if role == "linear":
            self.weights.write(node, self._input_scale(node))

    def _redirect(self, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> None:
        """Let every reader of a tensor that now exists as integers only read the dequantized one."""
        for node, i in uses:
            if node.inputs[i] is value and not self._on_integers(node):
                node.replace_input_with(i, self._dequantized(value))
        if value.is_graph_output():
            self._restore_output(value)

    def _on_integers(self, node: ir.Node) -> bool:
        """Say whether the node works on integers without being a kernel that rounds."""
        return self.placement.nodes.get(node) == "move" or node in self.placement.joined

    def _drop_replaced_weights(self) -> None:
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
                del self.graph.initializers[name]

    # -------------------------------------------------------------------------------- layers kept in float

    def _looks_quantizable(self, node: ir.Node) -> bool:
        """Say whether a float layer stands between DequantizeLinear and QuantizeLinear."""
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            return False
        source, weight = (v.producer() if v is not None else None for v in node.inputs[:2])
        if source is None or source.op_type != "DequantizeLinear" or weight is not None:
            return False
        readers = [use.node for use in output_tensor(node).uses()]
        return len(readers) == 1 and readers[0].op_type == "QuantizeLinear"

    def _shield(self, node: ir.Node) -> None:
        """Keep ONNX Runtime from quantizing the layer's weights by itself (see QuantScheme.shield_float).

        A LeakyRelu of slope 1 is the identity, one of slope 0 is a ReLU; ONNX Runtime fuses either into the layer,
        so neither costs time, and its rewrite does not look through it.
        """
        out = node.outputs[0]
        follower = next(iter(out.uses())).node
        if follower.op_type == "Relu":
            slope, shielded = 0.0, follower.outputs[0]
        else:
            slope, shielded = 1.0, out
        value = self.build.value(f"{out.name}_shielded", ir.DataType.FLOAT, out.shape)
        shield = ir.node(
            "LeakyRelu", [out], {"alpha": slope}, outputs=[value], name=self.build.unique(f"{node.name}_shield")
        )
        for reader, i in tuple(shielded.uses()):
            if reader is not shield:
                reader.replace_input_with(i, value)
        node.append(shield)
        if shielded is not out:
            self.graph.remove(follower, safe=True)

    def _shield_pool(self, node: ir.Node) -> None:
        """Keep ONNX Runtime from rounding in front of a float MaxPool: its MaxPool of bytes takes many times as long.

        It moves QuantizeLinear backward through a MaxPool, but not through a LeakyRelu of slope 1.
        """
        out = node.outputs[0]
        readers = [(use.node, use.idx) for use in out.uses() if use.node.op_type == "QuantizeLinear"]
        if not readers:
            return
        value = self.build.value(f"{out.name}_shielded", ir.DataType.FLOAT, out.shape)
        name = self.build.unique(f"{node.name}_shield")
        node.append(ir.node("LeakyRelu", [out], {"alpha": 1.0}, outputs=[value], name=name))
        for reader, i in readers:
            reader.replace_input_with(i, value)

    # -------------------------------------------------------------------------------- activations

    def _input_scale(self, node: ir.Node) -> float | None:
        """Return the scale of a linear node's input; None where that stays in float."""
        if self.scheme.activation is None:
            return None
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert producer is not None and producer.op_type == "DequantizeLinear"
        scale = producer.inputs[1]
        assert scale is not None and scale.const_value is not None
        return float(scale.const_value.numpy())

    def _read(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None
        if value in self.params or value in self.integers:
            node.replace_input_with(index, self._dequantized(value))

    def _integer(self, value: ir.Value) -> ir.Value:
        """Return the integer form of a tensor: its QuantizeLinear, made at first use."""
        if value not in self.integers:
            out = self.build.value(f"{value.name}_quantized", onnx_type(self.activation), value.shape)
            self.build.node("QuantizeLinear", [value, *self._scale_and_zero(value)], out, value.name)
            self.integers[value] = out
        return self.integers[value]

    def _dequantized(self, value: ir.Value) -> ir.Value:
        if value not in self.floats:
            out = self.build.value(f"{value.name}_dequantized", ir.DataType.FLOAT, value.shape)
            self.build.node("DequantizeLinear", [self._integer(value), *self._scale_and_zero(value)], out, value.name)
            self.floats[value] = out
        return self.floats[value]

    def _scale_and_zero(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        params = self.params[value]
        key = (value.name or "", params)
        if key not in self.constants:
            zero = np.array(params.zero_point).astype(onnx_type(params.dtype).numpy())
            self.constants[key] = (
                self.build.constant(f"{value.name}_scale", np.array(params.scale, dtype=np.float32)),
                self.build.constant(f"{value.name}_zero_point", zero),
            )
        return self.constants[key]

    def _move(self, node: ir.Node) -> None:
        """Let a data movement work on the integers: same node, integer input, integer outputs."""
        source = node.inputs[0]
        assert source is not None
        inputs = [self._integer(source), *node.inputs[1:]]
        if node.op_type == "Pad":  # the constant it pads with is the integer that stands for 0
            zero = self._scale_and_zero(source)[1]
            inputs = [*inputs[:2], zero, *inputs[3:]]
        outputs = [
            self.build.value(f"{out.name}_quantized", onnx_type(self.activation), out.shape) for out in node.outputs
        ]
        self.graph.append(ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=outputs, name=node.name))
        for out, integer in zip(node.outputs, outputs, strict=True):
            self.params[out] = self.params[source]
            self.integers[out] = integer
            self.constants[(out.name or "", self.params[out])] = self._scale_and_zero(source)

    def _join(self, node: ir.Node) -> None:
        """Let a Concat work on integers that all have one scale."""
        out = node.outputs[0]
        inputs = [None if v is None else self._integer(v) for v in node.inputs]
        integer = self.build.value(f"{out.name}_quantized", onnx_type(self.activation), out.shape)
        self.graph.append(
            ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=[integer], name=node.name)
        )
        self.integers[out] = integer

    def _restore_output(self, value: ir.Value) -> None:
        """Make the dequantized tensor the graph output, under the old name."""
        final, name = self._dequantized(value), value.name
        index = self.graph.outputs.index(value)
        value.name = self.build.unique(f"{name}_float")
        final.name, final.shape, final.type = name, value.shape, value.type
        self.graph.outputs[index] = final
