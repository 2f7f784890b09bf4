"""How the weight and the bias of a linear node are stored: chosen per node, rounded, written.

Forms (W a weight, q its integers, s its scales)

    DequantizeLinear(q, s)                   stored_weights "integer": what ONNX means, per channel or in blocks
    W -> QuantizeLinear -> DequantizeLinear  stored_weights "float": for a runtime that reads no integer initializer
    Cast(q to int8) -> DequantizeLinear      cast_weights, int4: ONNX Runtime folds the Cast when it loads the model,
                                             and its 8-bit kernels run (it fuses no DequantizeLinear of int4)
    Cast(q to float32) x s                   cast_weights, weights only: ONNX Runtime folds both and runs as in float
                                             (a DequantizeLinear it does not fold, but runs at every call)
    DequantizeLinear(q, s, block)            cast_weights, weights only, in blocks: becomes its kernel MatMulNBits, for
                                             which a Gemm must not be transposed

Scales lie along the output channels; blocks along the input channels of Gemm and MatMul. A weight that its block does
not divide, and every Conv, gets a scale per output channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..compiler.types import QuantScheme, StoredWeight, WeightType
from .bias import added_bias
from .float8 import FLOAT8, round_to_float8
from .graph_builder import GraphBuilder, onnx_type
from .quant_params import needed_for_bias, quantize_bias, quantize_weight, spread, weight_scales

#: uint8 weights are symmetric too: integer kernels want one zero point, and it is in the middle.
_UINT8_ZERO = 128
#: Largest magnitude of a weight whose type is not the scheme's own; int8's is in the scheme.
_LIMITS = {"int4": 7.0, **{name: kind.max for name, kind in FLOAT8.items()}}


@dataclass(frozen=True)
class WeightFormat:
    """How one weight shall be stored: its ONNX type, the largest magnitude, and where scales lie.

    One scale for each index of `axis`; with `block`, for each block of so many weights along `axis`; one for all where
    `axis` is None.
    """

    dtype: WeightType
    limit: float
    axis: int | None
    block: int | None = None


def weight_format(
    node: ir.Node, shape: tuple[int, ...], scheme: QuantScheme, dtype: WeightType | None = None
) -> WeightFormat:
    """Return the format of a linear node's weight of `shape`: the scheme's, in another type where `dtype` says so."""
    kind = dtype or scheme.weight
    limit = float(scheme.weight_max) if kind == scheme.weight else _LIMITS.get(kind, float(scheme.weight_max_8bit))
    if scheme.block and node.op_type != "Conv" and node.op_type != "ConvTranspose":
        along = input_axis(node, len(shape))
        if shape[along] % scheme.block == 0:
            return WeightFormat(kind, limit, along, scheme.block)
    return WeightFormat(kind, limit, channel_axis(node, len(shape)) if scheme.per_channel else None)


def channel_axis(node: ir.Node, rank: int) -> int | None:
    """Return the axis of the weight along which output channels lie; None where one scale must serve all."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":  # (in, out/group, …): with groups, one index is shared by several channels
        return 1 if node.attributes.get_int("group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return rank - 1


def input_axis(node: ir.Node, rank: int) -> int:
    """Return the axis of a Gemm's or MatMul's weight along which its inputs lie."""
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    return 1 if transposed else rank - 2


def round_to_nearest(
    weight: np.ndarray, kind: WeightFormat, bias: np.ndarray | None = None, input_scale: float = 1.0
) -> StoredWeight:
    """Return the weight in a format, each number rounded by itself; `bias` as for `weight_scales`."""
    scales = weight_scales(weight, kind.axis, kind.limit, bias, input_scale, kind.block)
    if kind.dtype in FLOAT8:
        scaled = weight.astype(np.float64) / spread(scales.astype(np.float64), weight.ndim, kind.axis, kind.block)
        codes = round_to_float8(scaled, kind.dtype).astype(onnx_type(kind.dtype).numpy())
    else:
        codes = quantize_weight(weight, scales, kind.axis, int(kind.limit), kind.block)
    return StoredWeight(codes, scales, kind.axis, kind.dtype, kind.block)


def dequantize(stored: StoredWeight) -> np.ndarray:
    """Return the float32 weight that a stored one stands for."""
    scales = spread(stored.scales.astype(np.float32), stored.integers.ndim, stored.axis, stored.block)
    return np.asarray(stored.integers.astype(np.float32) * scales)


def _with_room_for(bias: np.ndarray | None, input_scale: float | None, stored: StoredWeight) -> StoredWeight:
    """Return the weight with scales just large enough for its int32 bias, if it has one.

    Nearly always the weight as it is: a bias overflows only beside weights that are nothing next to it.
    """
    if bias is None or input_scale is None:
        return stored
    needed = needed_for_bias(bias, input_scale, per_channel=stored.axis is not None).astype(np.float32)
    scales = np.maximum(stored.scales.reshape(needed.shape), needed)
    if np.array_equal(scales, stored.scales):
        return stored
    ratio = spread(stored.scales.astype(np.float64) / scales, stored.integers.ndim, stored.axis)
    return replace(stored, integers=np.rint(stored.integers * ratio).astype(np.int8), scales=scales)


class WeightWriter:
    """Stores the weights and biases of one graph; lives for one call of the pass."""

    def __init__(
        self,
        build: GraphBuilder,
        scheme: QuantScheme,
        bias_shift: Mapping[str, np.ndarray],
        types: Mapping[str, WeightType],
        given: Mapping[str, StoredWeight],
    ) -> None:
        self.build, self.scheme = build, scheme
        self.bias_shift, self.types, self.given = bias_shift, types, given
        self._written: dict[tuple[object, ...], ir.Value] = {}

    def write(self, node: ir.Node, input_scale: float | None) -> None:
        """Replace weight and bias of a linear node; `input_scale` is None where its input stays in float."""
        value = node.inputs[1]
        assert value is not None
        bias = None
        if node.op_type == "MatMul":
            self._shift_added_bias(node)
        else:
            bias = self._float_bias(node)
        given = self.given.get(node.name or "")
        kind = weight_format(node, _array(value).shape, self.scheme, self.types.get(node.name or ""))
        block = kind.block if given is None else given.block
        bias_scale = input_scale if self.scheme.bias == "int32" and block is None else None  # the input's part of it
        if given is None:
            fitted = bias if bias_scale is not None else None
            stored = round_to_nearest(_array(value), kind, fitted, bias_scale or 1.0)
        else:
            stored = _with_room_for(bias, bias_scale, given)
        node.replace_input_with(1, self._weight(node, value, stored, given is not None))
        if bias is not None:
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(2, self._bias(f"{value.name}_bias", bias, stored, bias_scale))

    def _weight(self, node: ir.Node, value: ir.Value, stored: StoredWeight, given: bool) -> ir.Value:
        if self.scheme.stored_weights == "integer" or stored.block or stored.dtype == "int4":
            return self._once(value, self._for_kernels(node, stored))
        source = self.build.constant(f"{value.name}_rounded", dequantize(stored)) if given else value
        return self._float_pair(source, stored)

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

    def _shift_added_bias(self, node: ir.Node) -> None:
        """Add a MatMul's correction to the constant that an Add behind it adds; nothing to do without either."""
        shift, found = self.bias_shift.get(node.name or ""), added_bias(node)
        if shift is None or found is None:
            return
        add, index = found
        old = add.inputs[index]
        assert old is not None
        array = _array(old)
        new = (array.astype(np.float64) + shift).astype(array.dtype)
        add.replace_input_with(index, self.build.constant(f"{old.name}_shifted", new))

    def _bias(self, name: str, bias: np.ndarray, stored: StoredWeight, input_scale: float | None) -> ir.Value:
        if input_scale is None:
            return self.build.constant(name, bias.astype(np.float32))
        integers, scales = quantize_bias(bias, stored.scales, input_scale)
        constant = self.build.constant(f"{name}_quantized", integers)
        axis = None if stored.axis is None else 0
        return self._dequantize(name, constant, *self._scale_and_zero(name, scales, axis, ir.DataType.INT32), axis)

    # -------------------------------------------------------------------------------- forms

    def _for_kernels(self, node: ir.Node, stored: StoredWeight) -> StoredWeight:
        """Turn a Gemm's blocked weight round where only an untransposed one has a kernel."""
        transposed = node.attributes.get_int("transB", 0) != 0
        if not (self.scheme.cast_weights and self.scheme.activation is None and stored.block and transposed):
            return stored
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
        return replace(stored, integers=stored.integers.T, scales=stored.scales.T, axis=0)

    def _once(self, value: ir.Value, stored: StoredWeight) -> ir.Value:
        """Write a weight, or return what was written for another reader of the same one, equally rounded."""
        arrays = (stored.integers.shape, stored.integers.tobytes(), stored.scales.tobytes())
        key = (value, stored.dtype, stored.axis, stored.block, *arrays)
        if key not in self._written:
            self._written[key] = self._integer(value.name or "", stored)
        return self._written[key]

    def _integer(self, name: str, stored: StoredWeight) -> ir.Value:
        dtype, shape = onnx_type(stored.dtype), ir.Shape(stored.integers.shape)
        integers, zero = _codes(stored)
        constant = self.build.constant(f"{name}_quantized", integers)
        if self.scheme.cast_weights and self.scheme.activation is None and not stored.block and not zero:
            scales = spread(stored.scales, len(shape), stored.axis)
            wide = self._cast(name, constant, ir.DataType.FLOAT)
            out = self.build.value(f"{name}_dequantized", ir.DataType.FLOAT, shape)
            return self.build.node("Mul", [wide, self.build.constant(f"{name}_scale", scales)], out, name)
        if self.scheme.cast_weights and stored.dtype == "int4" and not stored.block:
            constant, dtype = self._cast(name, constant, ir.DataType.INT8), ir.DataType.INT8
        pair = self._scale_and_zero(name, stored.scales, stored.axis, dtype, zero)
        return self._dequantize(name, constant, *pair, stored.axis, stored.block)

    def _cast(self, name: str, constant: ir.Value, dtype: ir.DataType) -> ir.Value:
        out = self.build.value(f"{name}_wide", dtype, constant.shape)
        return self.build.node("Cast", [constant], out, name, [ir.AttrInt64("to", int(dtype))])

    def _float_pair(self, value: ir.Value, stored: StoredWeight) -> ir.Value:
        dtype = onnx_type(stored.dtype)
        scale, zero = self._scale_and_zero(
            value.name or "", stored.scales, stored.axis, dtype, _UINT8_ZERO if stored.dtype == "uint8" else 0
        )
        integer = self.build.value(f"{value.name}_quantized", dtype, ir.Shape(stored.integers.shape))
        attributes = [] if stored.axis is None else [ir.AttrInt64("axis", stored.axis)]
        self.build.node("QuantizeLinear", [value, scale, zero], integer, value.name, attributes)
        return self._dequantize(value.name or "", integer, scale, zero, stored.axis)

    def _dequantize(
        self, name: str, source: ir.Value, scale: ir.Value, zero: ir.Value, axis: int | None, block: int | None = None
    ) -> ir.Value:
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        if block is not None:
            attributes.append(ir.AttrInt64("block_size", block))
        out = self.build.value(f"{name}_dequantized", ir.DataType.FLOAT, source.shape)
        return self.build.node("DequantizeLinear", [source, scale, zero], out, name, attributes)

    def _scale_and_zero(
        self, name: str, scales: np.ndarray, axis: int | None, dtype: ir.DataType, zero: int = 0
    ) -> tuple[ir.Value, ir.Value]:
        shaped = scales.astype(np.float32) if axis is not None else scales.astype(np.float32).reshape(())
        return (
            self.build.constant(f"{name}_scale", np.ascontiguousarray(shaped)),
            self.build.constant(f"{name}_zero_point", np.full(shaped.shape, zero).astype(dtype.numpy())),
        )


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _codes(stored: StoredWeight) -> tuple[np.ndarray, int]:
    """Return what is stored, in the ONNX type's numpy type, and its zero point."""
    zero = _UINT8_ZERO if stored.dtype == "uint8" else 0
    values = stored.integers.astype(np.int16) + zero if zero else stored.integers
    return np.ascontiguousarray(values.astype(onnx_type(stored.dtype).numpy())), zero
