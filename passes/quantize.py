"""INT8 in the Q/DQ form: integers wherever the backend has a kernel for them, floats elsewhere.

Rules
1. placement.py decides which nodes and tensors; this pass only writes.
2. One QuantizeLinear per tensor, one DequantizeLinear behind it, shared by all readers.
3. Weights become int8 initializers behind a DequantizeLinear (or stay float behind a Q/DQ pair, for backends that
   want them so), one scale per output channel. A bias becomes int32 in the accumulator's scale, or stays float.
4. Data movement (Reshape, MaxPool, Pad with zero, …) is done on the integers themselves, between Q and DQ.
5. A graph output keeps its name and is float again.

Not touched: subgraphs, float16 nodes, nodes whose weight is computed. It is lossy: the judge decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import OpSupport, QuantScheme, Range
from .base import Pass, PassResult, Stage
from .placement import Placement, activation_inputs, output_tensor, place
from .quant_params import QParams, activation_params, quantize_bias, quantize_weight, weight_scales

_DTYPES = {"uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8}


@dataclass(frozen=True)
class Quantize(Pass):
    """Write Q/DQ for one backend's integer kernels.

    `ranges` maps tensor names to the interval each shall represent; `supports` and `scheme` are the backend's
    tables; `keep_float` maps node names to the reason why they are left in float; `bias_shift` maps node names to
    what is added to their bias, one number per output channel (bias correction, see compiler/sensitivity.py).
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = "quantize"
    exact: ClassVar[bool] = False

    ranges: Mapping[str, Range] = field(default_factory=dict)
    supports: tuple[OpSupport, ...] = ()
    scheme: QuantScheme = field(default_factory=lambda: QuantScheme("uint8-int8", "uint8", symmetric=False))
    keep_float: Mapping[str, str] = field(default_factory=dict)
    bias_shift: Mapping[str, np.ndarray] = field(default_factory=dict)

    def call(self, model: ir.Model) -> PassResult:
        """Quantize `model` in place."""
        placement = place(model, self.ranges, self.supports, self.scheme, self.keep_float)
        if placement.nodes:
            _Writer(model, placement, self, {row.op: row for row in self.supports}).write()
        return PassResult(
            model,
            modified=bool(placement.nodes),
            rewrites=len(placement.nodes),
            refusals=tuple(placement.refusals),
        )


class _Writer:
    """Rewrites one graph by its placement; lives for one call."""

    def __init__(
        self, model: ir.Model, placement: Placement, options: Quantize, table: Mapping[str, OpSupport]
    ) -> None:
        self.graph, self.placement, self.scheme, self.table = model.graph, placement, options.scheme, table
        self.bias_shift = options.bias_shift
        self.params: dict[ir.Value, QParams] = {
            value: activation_params(chosen, self.scheme.activation, self.scheme.symmetric)
            for value, chosen in placement.ranges.items()
        }
        self.integers: dict[ir.Value, ir.Value] = {}  # float tensor -> its integer form
        self.floats: dict[ir.Value, ir.Value] = {}  # float tensor -> what DequantizeLinear makes of that
        self.constants: dict[tuple[str, QParams], tuple[ir.Value, ir.Value]] = {}
        self.taken = {v.name for n in self.graph for v in n.outputs} | set(self.graph.initializers)

    def write(self) -> None:
        readers = {value: tuple(value.uses()) for value in self.placement.produced}
        for node, role in self.placement.nodes.items():
            self._rewrite(node, role)
        for node, i in self.placement.reads:
            self._read(node, i)
        for value, uses in readers.items():
            self._redirect(value, uses)
        moved = [node for node, role in self.placement.nodes.items() if role == "move"]
        self.graph.remove(moved, safe=True)
        self.graph.sort()
        self._drop_replaced_weights()
        if self.scheme.shield_float:
            for node in [n for n in self.graph if self._looks_quantizable(n)]:
                self._shield(node)

    def _rewrite(self, node: ir.Node, role: str) -> None:
        if role == "move":
            self._move(node)
            return
        for i in activation_inputs(node, self.table[node.op_type]):
            self._read(node, i)
        if role == "linear":
            self._weight(node)

    def _redirect(self, value: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> None:
        """Let every reader of a tensor that now exists as integers only read the dequantized one."""
        for node, i in uses:
            if node.inputs[i] is value and self.placement.nodes.get(node) != "move":
                node.replace_input_with(i, self._dequantized(value))
        if value.is_graph_output():
            self._restore_output(value)

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
        value = self._value(f"{out.name}_shielded", ir.DataType.FLOAT, out.shape)
        shield = ir.node(
            "LeakyRelu", [out], {"alpha": slope}, outputs=[value], name=self._unique(f"{node.name}_shield")
        )
        for reader, i in tuple(shielded.uses()):
            if reader is not shield:
                reader.replace_input_with(i, value)
        node.append(shield)
        if shielded is not out:
            self.graph.remove(follower, safe=True)

    # -------------------------------------------------------------------------------- activations

    def _read(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None
        if value in self.params or value in self.integers:
            node.replace_input_with(index, self._dequantized(value))

    def _integer(self, value: ir.Value) -> ir.Value:
        """Return the integer form of a tensor: its QuantizeLinear, made at first use."""
        if value not in self.integers:
            out = self._value(f"{value.name}_quantized", _DTYPES[self.scheme.activation], value.shape)
            self._node("QuantizeLinear", [value, *self._scale_and_zero(value)], out, value)
            self.integers[value] = out
        return self.integers[value]

    def _dequantized(self, value: ir.Value) -> ir.Value:
        if value not in self.floats:
            out = self._value(f"{value.name}_dequantized", ir.DataType.FLOAT, value.shape)
            self._node("DequantizeLinear", [self._integer(value), *self._scale_and_zero(value)], out, value)
            self.floats[value] = out
        return self.floats[value]

    def _scale_and_zero(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        params = self.params[value]
        key = (value.name or "", params)
        if key not in self.constants:
            zero = np.array(params.zero_point, dtype=params.dtype)
            self.constants[key] = (
                self._constant(f"{value.name}_scale", np.array(params.scale, dtype=np.float32)),
                self._constant(f"{value.name}_zero_point", zero),
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
            self._value(f"{out.name}_quantized", _DTYPES[self.scheme.activation], out.shape) for out in node.outputs
        ]
        self.graph.append(ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=outputs, name=node.name))
        for out, integer in zip(node.outputs, outputs, strict=True):
            self.params[out] = self.params[source]
            self.integers[out] = integer
            self.constants[(out.name or "", self.params[out])] = self._scale_and_zero(source)

    def _restore_output(self, value: ir.Value) -> None:
        """Make the dequantized tensor the graph output, under the old name."""
        final, name = self._dequantized(value), value.name
        index = self.graph.outputs.index(value)
        value.name = self._unique(f"{name}_float")
        final.name, final.shape, final.type = name, value.shape, value.type
        self.graph.outputs[index] = final

    # -------------------------------------------------------------------------------- weights

    def _weight(self, node: ir.Node) -> None:
        value, source = node.inputs[1], node.inputs[0]
        assert value is not None and value.const_value is not None and source is not None
        weight = value.const_value.numpy()
        axis = _channel_axis(node, weight.ndim) if self.scheme.per_channel else None
        bias = self._float_bias(node)
        input_scale = self._input_scale(source)
        integer_bias = bias is not None and self.scheme.bias == "int32"
        limit = self.scheme.weight_max
        scales = weight_scales(weight, axis, limit, bias if integer_bias else None, input_scale)
        node.replace_input_with(1, self._stored_weight(value, weight, scales, axis, limit))
        if bias is None:
            return
        name = f"{value.name}_bias"
        if integer_bias:
            integers, bias_scales = quantize_bias(bias, scales, input_scale)
            stored = self._constant_dq(name, integers, bias_scales, None if axis is None else 0)
        else:
            stored = self._constant(name, bias.astype(np.float32))
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, stored)

    def _float_bias(self, node: ir.Node) -> np.ndarray | None:
        """Return the bias (one float64 per output channel) with its correction, beta multiplied in; None without."""
        value = node.inputs[2] if len(node.inputs) > 2 else None
        shift = self.bias_shift.get(node.name or "")
        bias = None if value is None or value.const_value is None else value.const_value.numpy().reshape(-1)
        if bias is not None and "beta" in node.attributes:
            bias = bias * node.attributes.get_float("beta", 1.0)
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        if shift is None:
            return bias
        return shift.astype(np.float64) + (0.0 if bias is None else bias)

    def _input_scale(self, dequantized: ir.Value) -> float:
        producer = dequantized.producer()
        assert producer is not None and producer.op_type == "DequantizeLinear"
        scale = producer.inputs[1]
        assert scale is not None and scale.const_value is not None
        return float(scale.const_value.numpy())

    def _stored_weight(
        self, value: ir.Value, weight: np.ndarray, scales: np.ndarray, axis: int | None, limit: int
    ) -> ir.Value:
        if self.scheme.stored_weights == "integer":
            return self._constant_dq(value.name, quantize_weight(weight, scales, axis, limit), scales, axis)
        scale, zero = self._scale_constants(value.name, scales, np.int8, axis)
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        integer = self._value(f"{value.name}_quantized", ir.DataType.INT8, ir.Shape(weight.shape))
        self._node("QuantizeLinear", [value, scale, zero], integer, value, attributes)
        out = self._value(f"{value.name}_dequantized", ir.DataType.FLOAT, ir.Shape(weight.shape))
        return self._node("DequantizeLinear", [integer, scale, zero], out, value, attributes)

    def _constant_dq(self, name: str | None, integers: np.ndarray, scales: np.ndarray, axis: int | None) -> ir.Value:
        stored = self._constant(f"{name}_quantized", integers)
        scale, zero = self._scale_constants(name, scales, integers.dtype.type, axis)
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        out = self._value(f"{name}_dequantized", ir.DataType.FLOAT, ir.Shape(integers.shape))
        return self._node("DequantizeLinear", [stored, scale, zero], out, stored, attributes)

    def _scale_constants(
        self, name: str | None, scales: np.ndarray, dtype: type, axis: int | None
    ) -> tuple[ir.Value, ir.Value]:
        shaped = scales if axis is not None else scales.reshape(())
        return (
            self._constant(f"{name}_scale", shaped),
            self._constant(f"{name}_zero_point", np.zeros(shaped.shape, dtype)),
        )

    # -------------------------------------------------------------------------------- graph building

    def _unique(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self.taken:
            n += 1
            candidate = f"{name}_{n}"
        self.taken.add(candidate)
        return candidate

    def _value(self, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
        return ir.Value(name=self._unique(name), type=ir.TensorType(dtype), shape=shape)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=self._unique(name))
        value.const_value = ir.Tensor(array, name=value.name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def _node(
        self,
        op: str,
        inputs: list[ir.Value],
        out: ir.Value,
        near: ir.Value,
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        name = self._unique(f"{near.name}_{op}")
        self.graph.append(ir.Node("", op, inputs, attributes or (), outputs=[out], name=name))
        return out


def _channel_axis(node: ir.Node, rank: int) -> int | None:
    """Return the axis of the weight along which output channels lie; None where one scale must serve all."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":  # (in, out/group, …): with groups, one index is shared by several channels
        return 1 if node.attributes.get_int("group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return rank - 1
