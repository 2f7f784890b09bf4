"""The layers of an ONNX graph as a person wants to see them: operator, precision, scale, MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from ..passes.float8 import FLOAT8
from ..passes.quant_params import LIMITS, QParams
from .types import Layer, Range, Refusal

#: Operators that count as layers: those that hold weights or do the arithmetic.
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")

#: The reason for a layer of a subgraph.
INSIDE = "it is inside a subgraph (If, Loop, Scan): those are left alone"


def describe(
    model: ir.Model, errors: Mapping[str, float] | None = None, refusals: tuple[Refusal, ...] = ()
) -> tuple[Layer, ...]:
    """Return one Layer for each linear node; `errors` are the layers' own SQNR in dB by node name.

    Of a quantized model also for those in subgraphs, which quantization leaves alone.
    """
    errors = errors or {}
    reasons = {r.node: r.why for r in refusals}
    layers = []
    nodes = model.graph.all_nodes() if is_quantized(model) else model.graph
    for node in nodes:
        if node.op_type not in LINEAR or node.domain not in ("", "ai.onnx"):
            continue
        name = node.name or node.op_type
        if node.graph is not model.graph:
            reasons.setdefault(name, INSIDE)
        dtype = _dequantized_from(node.inputs[0])
        scale, span = (None, None) if dtype is None else _output_scale(node)
        layers.append(
            Layer(
                node=name,
                op=node.op_type,
                precision=_precision(node, dtype),
                output_range=span,
                scale=scale,
                sqnr_db=None if dtype is None else errors.get(name),
                macs=macs(node),
                reason=reasons.get(name),
            )
        )
    return tuple(layers)


def is_quantized(model: ir.Model) -> bool:
    """Say whether the model holds integer arithmetic or Q/DQ pairs already."""
    return any(
        node.op_type.startswith(("QLinear", "QuantizeLinear", "DequantizeLinear")) or node.op_type.endswith("Integer")
        for node in model.graph.all_nodes()
    )


def macs(node: ir.Node) -> int | None:
    """Return the multiply-accumulates of a linear node for one image; None where shapes are unknown."""
    weight = _sizes(node.inputs[1] if len(node.inputs) > 1 else None)
    out, source = _sizes(node.outputs[0]), _sizes(node.inputs[0])
    if node.op_type == "Gemm":
        return None if weight is None else math.prod(weight)
    moving = source if node.op_type == "ConvTranspose" else out  # what the kernel is laid on, once a position
    if weight is None or moving is None or len(weight) < 2:
        return None
    per_position = weight[-2] if node.op_type == "MatMul" else math.prod(weight[1:])
    return math.prod(moving[1:]) * per_position


def _sizes(value: ir.Value | None) -> list[int] | None:
    """Return the shape with 1 for the batch; None where any other dimension is unknown."""
    if value is None or value.shape is None or not len(value.shape):
        return None
    first, *rest = (d if isinstance(d, int) else None for d in value.shape)
    known = [d for d in rest if d is not None]
    return [first or 1, *known] if len(known) == len(rest) else None


def _dequantized_from(value: ir.Value | None) -> ir.DataType | None:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
        return None
    return producer.inputs[0].dtype


#: What may stand between a stored weight and its layer (passes/weight_writer.py has the forms).
_UNPACKING = ("DequantizeLinear", "Cast", "Mul", "QuantizeLinear")


def _stored_type(weight: ir.Value | None) -> ir.DataType | None:
    """Return the type in which the weight has the fewest bits on its way to the layer; None for a plain float."""
    found, value = None, weight
    while value is not None:
        if value.dtype is not None and value.dtype not in (ir.DataType.FLOAT, ir.DataType.UNDEFINED):
            found = value.dtype
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _UNPACKING else None
    return found


def _precision(node: ir.Node, activation: ir.DataType | None) -> str:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    stored = _stored_type(weight)
    if activation is not None and stored is not None:
        return f"{activation.name.lower()} x {stored.name.lower()}"
    if stored is not None and stored.itemsize < 2:
        return f"weights {stored.name.lower()}"
    return "float32" if stored is None else stored.name.lower()


def _output_scale(node: ir.Node) -> tuple[float | None, Range | None]:
    """Return scale and represented range of the QuantizeLinear that takes the output, if one does."""
    value = node.outputs[0]
    for _ in range(2):  # the node itself, then the activation that alone follows it
        uses = tuple(value.uses())
        quantize = next((u.node for u in uses if u.node.op_type == "QuantizeLinear"), None)
        if quantize is not None:
            return _scale_of(quantize)
        if len(uses) != 1 or uses[0].node.op_type not in ("Relu", "Clip"):
            break
        value = uses[0].node.outputs[0]
    return None, None


def _scale_of(quantize: ir.Node) -> tuple[float | None, Range | None]:
    scale, zero = quantize.inputs[1], quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if (
        scale is None
        or scale.const_value is None
        or zero is None
        or zero.const_value is None
        or zero.const_value.size != 1
    ):
        return None, None
    s, z, dtype = float(scale.const_value.numpy()), int(zero.const_value.numpy()), zero.const_value.dtype.name.lower()
    if dtype not in LIMITS and dtype not in FLOAT8:
        return s, None
    params = QParams(s, z, dtype)
    return s, Range(params.low, params.high)


def axes_of(node: ir.Node) -> tuple[int, int]:
    """Return along which axes a linear layer's weight has its inputs and its outputs."""
    if node.op_type == "MatMul":
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        rank = len(weight.const_value.shape)
        return rank - 2, rank - 1
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return (1, 0) if turned or node.op_type == "Conv" else (0, 1)  # ConvTranspose: outputs of one group
