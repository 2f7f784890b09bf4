"""What a Q/DQ artifact for TensorRT must be like, as a check of the file: types, scales, zero points, opsets.

`violations` looks at an ONNX file with onnx alone, so that it shares nothing with what wrote the file. The rules about
where pairs stand are in qdq_placement_rules.py. Source: NVIDIA's explicit-quantization guide, the headers and parsers
of TensorRT 8.5 to 11.1, and Model-Optimizer's quantizer.

Weakly typed networks (below 10.12) get float32 files, whose types the builder's flags choose; strongly typed ones keep
the types of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from qdq_graph import LAYERS, Graph, Node
from qdq_placement_rules import PLACEMENT

STRONG_FROM = (10, 12)
#: The highest opset that the parser of a version takes: (version, opset), the first that is not above counts.
CEILINGS = (((10, 2), 21), ((10, 0), 20), ((8, 4), 17), ((0, 0), 13))
#: The lowest opset of a strongly typed file in which a scale may be float16, and DQ then gives float16.
FLOAT16_OPSET = 19
_ZERO_TYPES = {"int8": (T.INT8,), "fp8": (T.FLOAT8E4M3FN,), "int4": (T.INT4,)}
_TYPE_OPSETS = {T.FLOAT8E4M3FN: 19, T.INT4: 21}
_OTHER_FLOATS = (T.FLOAT16, T.BFLOAT16, T.DOUBLE)
_INTEGER_OPERATORS = (
    "QLinearConv", "QLinearMatMul", "QLinearAdd", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear",
)  # fmt: skip
#: Below this, rounding to float16's smallest step (2^-24) may take a scale more than 1 % off.
_UNDERFLOW = 2.0**-25 / 0.01
#: The key of a node's metadata that says that the layer was left in float32 on purpose.
_KEPT_FLOAT32 = "edgec.float32"


@dataclass(frozen=True)
class Case:
    """A file, the TensorRT that shall read it, and the precision that was asked for."""

    graph: Graph
    version: tuple[int, int]
    precision: str
    original: onnx.ModelProto | None = None

    @property
    def strong(self) -> bool:
        return self.version >= STRONG_FROM


def violations(path: Path, version: tuple[int, int], precision: str, original: Path | None = None) -> list[str]:
    """Return what is wrong with an artifact, as "rule: node: why", in the order of `RULES`.

    `version` is TensorRT's major and minor, `precision` one of fp32, fp16, int8, fp8, int4; with `original`, the file
    that was compiled, the signature is compared too.
    """
    case = Case(Graph(path), version, precision, None if original is None else onnx.load(original))
    return [f"{rule}: {why}" for rule, check in RULES.items() for why in check(case)]


# ------------------------------------------------------------------------------------------ the file as a whole


def _valid(case: Case) -> Iterator[str]:
    try:
        onnx.checker.check_model(case.graph.proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield str(error).strip().splitlines()[0]


def _precision(case: Case) -> Iterator[str]:
    if case.precision in ("fp8", "int4") and case.version < (10, 0):
        yield f"TensorRT {case.version[0]}.{case.version[1]} reads no {case.precision} from ONNX"


def _opset(case: Case) -> Iterator[str]:
    opset, graph = case.graph.opset, case.graph
    highest = next(ceiling for version, ceiling in CEILINGS if case.version >= version)
    if opset > highest:
        yield f"opset {opset}, of which TensorRT {case.version[0]}.{case.version[1]} reads {highest} at most"
    lowest = FLOAT16_OPSET if case.strong and case.precision != "fp32" else 0
    for node in graph.pairs():
        lowest = max(lowest, 13 if "axis" in node.attributes else 10, 21 if "block_size" in node.attributes else 0)
        lowest = max(lowest, _TYPE_OPSETS.get(graph.type(node.input(2)) or 0, 0))
    if opset < lowest:
        yield f"opset {opset}, of {lowest} at least for what is in it"


def _integer_operators(case: Case) -> Iterator[str]:
    for node in case.graph.nodes:
        if node.op in _INTEGER_OPERATORS:
            yield f"{node.name}: {node.op} is not read by TensorRT"


def _float32_only(case: Case) -> Iterator[str]:
    if case.strong:
        return
    graph = case.graph
    names = [*graph.constants, *graph.inputs, *graph.outputs, *(name for node in graph.nodes for name in node.outputs)]
    for name in dict.fromkeys(names):
        if graph.type(name) in _OTHER_FLOATS:
            yield f"{name}: it is {_named(graph.type(name))}, in a file whose types the builder chooses"


def _signature(case: Case) -> Iterator[str]:
    if case.original is None:
        return
    for what in ("input", "output"):
        theirs, ours = (_ends(proto, what) for proto in (case.original, case.graph.proto))
        if theirs != ours:
            yield f"the {what}s are {ours}, not {theirs}"


def _ends(proto: onnx.ModelProto, what: str) -> list[tuple[str, bytes]]:
    initializers = {t.name for t in proto.graph.initializer}
    infos = [info for info in getattr(proto.graph, what) if info.name not in initializers]
    return [(info.name, info.type.SerializeToString(deterministic=True)) for info in infos]


def _mixed_types(case: Case) -> Iterator[str]:
    """In a strongly typed network the inputs of an operator agree in type wherever its schema gives them one."""
    if not case.strong:
        return
    for node in case.graph.nodes:
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op, case.graph.opset, ""):
            continue
        formal = onnx.defs.get_schema(node.op, case.graph.opset, "").inputs
        found: dict[str, set[int]] = {}
        for i, name in enumerate(node.inputs):
            kind, variable = case.graph.type(name), formal[min(i, len(formal) - 1)]
            if kind is not None and variable.is_homogeneous:
                found.setdefault(variable.type_str, set()).add(kind)
        for kinds in found.values():
            if len(kinds) > 1:
                yield f"{node.name}: its inputs are {' and '.join(sorted(map(_named, kinds)))}"


def _float32_layer(case: Case) -> Iterator[str]:
    """What stays in float32 runs in float32 in a strongly typed network, so it must be meant."""
    if not case.strong or case.precision == "fp32":
        return
    for node in case.graph.nodes:
        kept = any(p.key == _KEPT_FLOAT32 for p in node.proto.metadata_props)
        if node.op in LAYERS and case.graph.type(node.outputs[0]) == T.FLOAT and not kept:
            yield f"{node.name}: it computes in float32"


# ------------------------------------------------------------------------------------------ zero points


def _three_inputs(case: Case) -> Iterator[str]:
    for node in case.graph.pairs():
        if not all(node.input(i) for i in range(3)):
            yield f"{node.name}: it has no zero point of its own"


def _zero_type(case: Case) -> Iterator[str]:
    allowed = _ZERO_TYPES.get(case.precision, _ZERO_TYPES["int8"])
    for node in case.graph.pairs():
        kind = case.graph.type(node.input(2))
        if kind is not None and kind not in allowed:
            yield f"{node.name}: its zero point is {_named(kind)}, not {_named(allowed[0])}"


def _zero_value(case: Case) -> Iterator[str]:
    for node in case.graph.pairs():
        zero = case.graph.constants.get(node.input(2))
        if node.input(2) and zero is None:
            yield f"{node.name}: its zero point is no constant"
        elif zero is not None and zero.astype(np.float32).any():
            yield f"{node.name}: its zero point is not 0"


def _zero_size(case: Case) -> Iterator[str]:
    for node in case.graph.pairs():
        zero, scale = case.graph.constants.get(node.input(2)), case.graph.scale(node)
        if zero is not None and scale is not None and zero.size != scale.size:
            yield f"{node.name}: {zero.size} zero points for {scale.size} scales"


# ------------------------------------------------------------------------------------------ scales


def _scale_constant(case: Case) -> Iterator[str]:
    for node in case.graph.pairs():
        if case.graph.scale(node) is None:
            yield f"{node.name}: its scale {node.input(1)} is no constant"


def _scale_positive(case: Case) -> Iterator[str]:
    for node, scale in _scales(case):
        if not (np.isfinite(scale) & (scale > 0)).all():
            yield f"{node.name}: a scale is not positive and finite"


def _scale_type(case: Case) -> Iterator[str]:
    """Below 10.12 the parser reads scales as float32; strongly typed networks want the type of what is quantized."""
    for node, _ in _scales(case):
        kind = case.graph.type(node.input(1))
        wanted = T.FLOAT if not case.strong else case.graph.type(node.input(0 if node.op == "QuantizeLinear" else 1))
        maker = case.graph.quantizer(node) if node.op == "DequantizeLinear" else None
        if case.strong and maker is not None:
            wanted = case.graph.type(maker.input(1))
        if wanted is not None and kind != wanted:
            yield f"{node.name}: its scale is {_named(kind)}, not {_named(wanted)}"


def _scale_underflow(case: Case) -> Iterator[str]:
    """A float16 scale that is 0, or next to nothing although what it scales is not."""
    for node, scale in _scales(case):
        if scale.dtype == np.float16 and ((scale < _UNDERFLOW) & ~_dead(case.graph, node, scale)).any():
            yield f"{node.name}: a scale of {scale.min():.3g} is lost among float16's smallest steps"


def _dead(graph: Graph, node: Node, scale: np.ndarray) -> np.ndarray:
    """Say which scales belong to weights that are all 0 in the file, and are not 0 themselves."""
    maker = graph.quantizer(node) if node.op == "DequantizeLinear" else node
    weight = graph.constants.get((maker or node).input(0))
    if weight is None or scale.ndim > 1:
        return np.zeros(scale.shape, bool)
    values = np.abs(weight.astype(np.float32))
    if scale.size == 1:
        return np.full(scale.shape, not values.any()) & (scale > 0)
    return (np.moveaxis(values, node.attributes.get("axis", 1), 0).reshape(scale.size, -1).max(axis=1) == 0) & (
        scale > 0
    )


def _scale_shape(case: Case) -> Iterator[str]:
    """One scale, one for each index of an axis, or blocks along the last axis or the one before it."""
    for node, scale in _scales(case):
        shape, block = case.graph.shape(node.input(0)), node.attributes.get("block_size", 0)
        axis = node.attributes.get("axis", 1)
        if scale.size == 1 and not block:
            continue
        if shape is None:
            yield f"{node.name}: {scale.size} scales for a tensor of unknown shape"
        elif block:
            axis %= len(shape)
            wanted = [math.ceil((d or 0) / block) if i == axis else d for i, d in enumerate(shape)]
            if axis < len(shape) - 2 or list(scale.shape) != wanted or (shape[axis] or 0) % block:
                yield f"{node.name}: scales of shape {list(scale.shape)} for blocks of {block} along {axis} of {shape}"
        elif scale.ndim != 1 or scale.size != shape[axis % len(shape)]:
            yield f"{node.name}: scales of shape {list(scale.shape)} along axis {axis} of {shape}"


def _activation_scales(case: Case) -> Iterator[str]:
    for node, scale in _scales(case):
        if scale.size > 1 and not case.graph.is_weight(node):
            yield f"{node.name}: an activation has {scale.size} scales"


def _weight_axis(case: Case) -> Iterator[str]:
    """Scales lie along the output channels, by operator."""
    graph = case.graph
    for layer in graph.nodes:
        dq = graph.dequantizer(layer, 1) if layer.op in LAYERS else None
        shape = None if dq is None else graph.shape(dq.input(0))
        scale = graph.scale(dq)
        if dq is None or shape is None or scale is None or scale.size == 1 or "block_size" in dq.attributes:
            continue
        wanted = _channel_axis(layer, len(shape))
        for node in filter(None, (dq, graph.quantizer(dq))):
            axis = node.attributes.get("axis", 1) % len(shape)
            if axis != wanted:
                yield f"{node.name}: the scales of {layer.name}'s weight lie along axis {axis}, not {wanted}"


def _channel_axis(layer: Node, rank: int) -> int | None:
    if layer.op == "ConvTranspose":
        return 1 if layer.attributes.get("group", 1) == 1 else None
    if layer.op == "Gemm":
        return 0 if layer.attributes.get("transB", 0) else 1
    return 0 if layer.op == "Conv" else rank - 1


# ------------------------------------------------------------------------------------------ stored integers


def _integer_initializer(case: Case) -> Iterator[str]:
    if case.version >= (10, 0):
        return
    for node in case.graph.pairs():
        if node.op == "DequantizeLinear" and node.input(0) in case.graph.constants:
            yield f"{node.name}: it reads an initializer of integers, which TensorRT 8 refuses"


def _quantized_bias(case: Case) -> Iterator[str]:
    for node in case.graph.nodes:
        if node.op in LAYERS and case.graph.dequantizer(node, 2) is not None:
            yield f"{node.name}: its bias comes out of DequantizeLinear"


def _dequantized_type(case: Case) -> Iterator[str]:
    for node in case.graph.pairs():
        kind = case.graph.type(node.input(0))
        if node.op == "DequantizeLinear" and kind not in (None, T.INT8, T.FLOAT8E4M3FN, T.INT4):
            yield f"{node.name}: it dequantizes {_named(kind)}"


def _int4(case: Case) -> Iterator[str]:
    """INT4 is for the weights of Gemm and MatMul: an initializer behind DequantizeLinear, its last axis even."""
    graph = case.graph
    for node in graph.pairs():
        if graph.type(node.input(2)) != T.INT4:
            continue
        array = graph.constants.get(node.input(0))
        if node.op == "QuantizeLinear" or array is None:
            yield f"{node.name}: INT4 is for initializers only"
        elif array.ndim == 0 or array.shape[-1] % 2:
            yield f"{node.name}: the last axis of an INT4 tensor of shape {list(array.shape)} is not even"
        for reader, index in graph.readers.get(node.outputs[0], ()):
            if reader.op not in ("Gemm", "MatMul") or index != 1:
                yield f"{node.name}: {reader.name} has no kernel for INT4"


def _fp8(case: Case) -> Iterator[str]:
    """FP8 is for Conv, Gemm, MatMul and residual Adds; convolutions of more than 16 channels, kernels up to 32."""
    graph = case.graph
    for node in graph.nodes:
        found = [graph.dequantizer(node, i) for i in range(len(node.inputs))]
        if not any(dq is not None and graph.type(dq.input(2)) == T.FLOAT8E4M3FN for dq in found):
            continue
        shape = [d or 0 for d in graph.shape(node.input(1)) or ()] if node.op == "Conv" else []
        if node.op not in ("Conv", "Gemm", "MatMul", "Add") + _TRANSPARENT:
            yield f"{node.name}: {node.op} has no kernel for FP8"
        elif shape and (min(shape[:2]) <= 16 or math.prod(shape[2:]) > 32):
            yield f"{node.name}: a convolution of {shape} has no kernel for FP8"


_TRANSPARENT = ("Reshape", "Transpose", "Flatten", "Concat", "QuantizeLinear", "Split", "Slice", "Squeeze", "Unsqueeze",
                "Gather", "Cast", "Identity", "MaxPool", "Pad")  # fmt: skip


def _scales(case: Case) -> Iterator[tuple[Node, np.ndarray]]:
    for node in case.graph.pairs():
        scale = case.graph.scale(node)
        if scale is not None:
            yield node, scale


def _named(kind: int | None) -> str:
    return "unknown" if kind is None else T.DataType.Name(kind)


Rule = Callable[[Case], Iterator[str]]
RULES: Mapping[str, Rule] = {
    "valid": _valid,
    "precision": _precision,
    "opset": _opset,
    "integer-operator": _integer_operators,
    "float32-only": _float32_only,
    "signature": _signature,
    "mixed-types": _mixed_types,
    "float32-layer": _float32_layer,
    "three-inputs": _three_inputs,
    "zero-type": _zero_type,
    "zero-value": _zero_value,
    "zero-size": _zero_size,
    "scale-constant": _scale_constant,
    "scale-positive": _scale_positive,
    "scale-type": _scale_type,
    "scale-underflow": _scale_underflow,
    "scale-shape": _scale_shape,
    "activation-scales": _activation_scales,
    "weight-axis": _weight_axis,
    "integer-initializer": _integer_initializer,
    "quantized-bias": _quantized_bias,
    "dequantized-type": _dequantized_type,
    "int4": _int4,
    "fp8": _fp8,
    **{name: (lambda case, check=check: check(case.graph)) for name, check in PLACEMENT.items()},
}
