"""What TensorRT would refuse, or run slowly, in a graph with Q/DQ pairs: the opposite of placement, as a check.

Rules (TensorRT's explicit-quantization guide; what Model-Optimizer and its users found slow)

refused   zero-point          the zero point is missing, not of a signed or FP8 type, or not zero
          scale               the scale is computed, or not positive
          scale-type          float16 scale without float16 data, or the other way round (strongly typed networks)
          activation-scales   an activation has more than one scale
          integer-bias        a bias comes out of DequantizeLinear
slow      half-quantized      a layer reads its activation in integers and its weight in floats, or the other way round
          both-branches       both inputs of an Add are dequantized, so it is not fused with the layer in front of it
          split-kernel        a pair stands between a layer and the activation or normalisation that fuses with it
          lonely-activation   a pair stands around an activation or normalisation only
          requantized         QuantizeLinear reads DequantizeLinear of another scale
          concat-scales       the inputs of a Concat have different scales
          odd-channels        a depthwise layer of 8 bits whose channels are no multiple of 8
          nothing-behind      nothing behind DequantizeLinear works on integers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FUSED = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish")
_WORKS_ON_INTEGERS = (*_LAYERS, "Add", "Mul", "AveragePool", "GlobalAveragePool", "MaxPool", "Resize", "QuantizeLinear")
_COPIES = ("Concat", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Cast")
_SIGNED = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN)
_8_BITS = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)


def lint(model: ir.Model) -> tuple[Refusal, ...]:
    """Return what is wrong with the Q/DQ pairs of the main graph, in graph order."""
    return tuple(
        Refusal(node.name or node.op_type, rule, why)
        for node in model.graph
        for rule, check in _CHECKS.items()
        for why in check(node)
    )


# ------------------------------------------------------------------------------------------ looking


def _source(value: ir.Value | None, op: str) -> ir.Node | None:
    """Return the node that makes the value, if it is of that operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def _dequantizer(node: ir.Node, index: int) -> ir.Node | None:
    return _source(node.inputs[index], "DequantizeLinear") if len(node.inputs) > index else None


def _is_pair(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _array(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _scales(node: ir.Node | None) -> np.ndarray | None:
    return None if node is None else _array(node.inputs[1])


def _holds_constant(dequantize: ir.Node) -> bool:
    """Say whether DequantizeLinear gives a constant: stored integers, or a float constant behind QuantizeLinear."""
    value = dequantize.inputs[0]
    quantize = _source(value, "QuantizeLinear")
    inner = quantize.inputs[0] if quantize is not None else value
    return inner is not None and inner.const_value is not None


# ------------------------------------------------------------------------------------------ refused


def _zero_point(node: ir.Node) -> Iterator[str]:
    if not _is_pair(node):
        return
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None or zero.const_value is None:
        yield "its zero point is missing or computed; TensorRT 8 needs one, and ONNX's default is uint8"
    elif zero.const_value.dtype not in _SIGNED:
        yield f"its zero point is {zero.const_value.dtype}"
    elif zero.const_value.numpy().astype(np.float32).any():
        yield "its zero point is not 0"


def _scale(node: ir.Node) -> Iterator[str]:
    if _is_pair(node):
        scales = _scales(node)
        if scales is None:
            yield "its scale is computed"
        elif not (scales > 0).all():
            yield "a scale is not positive"


def _scale_type(node: ir.Node) -> Iterator[str]:
    if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[1] is not None:
        data, scale = node.inputs[0].dtype, node.inputs[1].dtype
        if None not in (data, scale) and data != scale:
            yield f"its scale is {scale}, its input {data}"


def _activation_scales(node: ir.Node) -> Iterator[str]:
    scales = _scales(node) if node.op_type == "DequantizeLinear" else None
    if scales is not None and scales.size > 1 and not _holds_constant(node):
        yield f"an activation has {scales.size} scales"


def _integer_bias(node: ir.Node) -> Iterator[str]:
    if node.op_type in _LAYERS and _dequantizer(node, 2) is not None:
        yield "its bias comes out of DequantizeLinear"


# ------------------------------------------------------------------------------------------ slow


def _half_quantized(node: ir.Node) -> Iterator[str]:
    if node.op_type not in _LAYERS:
        return
    data, weight = _dequantizer(node, 0), _dequantizer(node, 1)
    if data is not None and weight is None:
        yield "its activation is quantized, its weight is not"
    elif data is None and weight is not None and weight.inputs[0] is not None and weight.inputs[0].dtype in _8_BITS:
        yield "its weight is quantized, its activation is not"


def _both_branches(node: ir.Node) -> Iterator[str]:
    if node.op_type == "Add" and all(_dequantizer(node, i) is not None for i in range(2)):
        yield "both of its inputs are dequantized"


def _split_kernel(node: ir.Node) -> Iterator[str]:
    dequantize = _dequantizer(node, 0) if node.op_type in _FUSED else None
    quantize = _source(dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None
    source = quantize.inputs[0] if quantize is not None else None
    layer = source.producer() if source is not None else None
    if layer is not None and layer.op_type in _LAYERS:
        yield f"a pair stands between {layer.name or layer.op_type} and it"


def _lonely_activation(node: ir.Node) -> Iterator[str]:
    if node.op_type in _FUSED and _dequantizer(node, 0) is not None:
        readers = [use.node.op_type for use in node.outputs[0].uses()]
        if readers and all(op == "QuantizeLinear" for op in readers):
            yield "pairs stand around it alone"


def _requantized(node: ir.Node) -> Iterator[str]:
    if node.op_type != "QuantizeLinear":
        return
    ours, theirs = _scales(node), _scales(_dequantizer(node, 0))
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        yield "it quantizes again, with another scale"


def _concat_scales(node: ir.Node) -> Iterator[str]:
    if node.op_type != "Concat":
        return
    found = [_scales(_dequantizer(node, i)) for i in range(len(node.inputs))]
    found += [_scales(use.node) for v in (*node.inputs, *node.outputs) if v is not None for use in v.uses()
              if use.node.op_type == "QuantizeLinear" and use.idx == 0]  # fmt: skip
    different = {scales.tobytes() for scales in found if scales is not None}
    if len(different) > 1 and any(use.node.op_type == "QuantizeLinear" for use in node.outputs[0].uses()):
        yield "its inputs and its output have different scales"


def _odd_channels(node: ir.Node) -> Iterator[str]:
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if groups > 1 and _dequantizer(node, 0) is not None and weight is not None and weight.shape is not None:
        channels = weight.shape[0]
        if isinstance(channels, int) and channels % 8:
            yield f"its {channels} channels are no multiple of 8"


def _nothing_behind(node: ir.Node) -> Iterator[str]:
    if node.op_type == "DequantizeLinear" and not _used_by_integers(node.outputs[0]):
        yield "nothing behind it works on integers"


def _used_by_integers(value: ir.Value) -> bool:
    readers = [use.node for use in value.uses()]
    return any(n.op_type in _WORKS_ON_INTEGERS for n in readers) or any(
        _used_by_integers(out) for n in readers if n.op_type in _COPIES for out in n.outputs
    )


_CHECKS: dict[str, Callable[[ir.Node], Iterator[str]]] = {
    "zero-point": _zero_point,
    "scale": _scale,
    "scale-type": _scale_type,
    "activation-scales": _activation_scales,
    "integer-bias": _integer_bias,
    "half-quantized": _half_quantized,
    "both-branches": _both_branches,
    "split-kernel": _split_kernel,
    "lonely-activation": _lonely_activation,
    "requantized": _requantized,
    "concat-scales": _concat_scales,
    "odd-channels": _odd_channels,
    "nothing-behind": _nothing_behind,
}
