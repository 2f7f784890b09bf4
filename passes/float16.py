"""What float16 can hold, and which operators take it.

float16 has 11 significant bits, numbers up to 65504, normal ones from 2^-14 on, and steps of 2^-24 below that. Rounding
to nearest leaves an error of at most 2^-11 of the number: about 75 dB below it. `sqnr_db` of a constant falls far below
only where its numbers drown in the smallest steps.

Which tensors of a node may be float16 is read from the type constraints of ONNX's own operator schemas. Some operators
stay in float32 although the standard has them in float16: FLOAT32_BY_NATURE says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from .constants import constant, values
from .shapes import infer_shapes

#: The largest number, and the smallest above 0.
MAX, SMALLEST = 65504.0, 2.0**-24
#: What is kept in float16 with less than this is better kept in float32. Rounding alone gives 70 dB and more; below 40
#: a result is as noisy as that of an 8-bit layer, which float16 is there to avoid.
LEAST_DB = 40.0

FLOAT32_BY_NATURE: Mapping[str, str] = {
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
        "random numbers are drawn in the type that an attribute states",
    ),
    **dict.fromkeys(("ConstantOfShape", "EyeLike", "CastLike"), "an attribute or another tensor gives its type"),
    **dict.fromkeys(("RoiAlign", "MaxRoiPool"), "pixel coordinates need more than 11 bits"),
    **dict.fromkeys(("CumSum", "DFT", "STFT", "Det"), "long sums lose their last terms in 11 bits"),
}
#: Inputs that stay in float32 while the rest of the node does not.
_FLOAT32_INPUTS: Mapping[str, tuple[int, ...]] = {"GridSample": (1,)}  # coordinates


@dataclass(frozen=True)
class Slots:
    """Which inputs and outputs of a node, now float32, may be float16."""

    inputs: frozenset[int]
    outputs: frozenset[int]


@dataclass(frozen=True)
class Stays:
    """Why a node stays in float32: the rule, and the reason in words."""

    rule: str
    why: str


def castable(model: ir.Model) -> tuple[dict[ir.Node, Slots], dict[ir.Node, Stays]]:
    """Return the nodes of the main graph that may run in float16, and those with float32 tensors that may not.

    Measured reasons are not among them (see compiler/quantization/float16_safety.py). The model is not changed.
    """
    types = value_types(model)
    opset = model.opset_imports.get("", 0)
    shapes = _from_shapes(model.graph)
    found: dict[ir.Node, Slots] = {}
    stays: dict[ir.Node, Stays] = {}
    for node in model.graph:
        if not _touches_float32(node, types) or _is_border(node, types) or node.op_type == "Constant":
            continue
        if node in shapes:
            stays[node] = Stays("shape-arithmetic", "it computes with sizes, which may need more than 11 bits")
            continue
        slots = _slots(node, types, opset)
        why = slots if isinstance(slots, Stays) else _unfit_constant(node, slots)
        if why is None and isinstance(slots, Slots):
            found[node] = slots
        elif why is not None:
            stays[node] = why
    return found, stays


def value_types(model: ir.Model) -> dict[ir.Value, ir.DataType | None]:
    """Return the element type of every tensor, inferred where the model does not say; None for all else."""
    twin = model.clone()
    infer_shapes(twin)
    pairs = zip(values(model), values(twin), strict=True)
    return {value: known.dtype if isinstance(known.type, ir.TensorType) else None for value, known in pairs}


# ------------------------------------------------------------------------------------------ operators


def _touches_float32(node: ir.Node, types: Mapping[ir.Value, ir.DataType | None]) -> bool:
    return any(types.get(v) == ir.DataType.FLOAT for v in (*node.inputs, *node.outputs) if v is not None)


def _is_border(node: ir.Node, types: Mapping[ir.Value, ir.DataType | None]) -> bool:
    """Say whether the node is a Cast between float32 and float16."""
    ends = {types.get(v) for v in (*node.inputs, *node.outputs) if v is not None}
    return node.op_type == "Cast" and ir.DataType.FLOAT16 in ends


def _slots(node: ir.Node, types: Mapping[ir.Value, ir.DataType | None], opset: int) -> Slots | Stays:
    if node.domain not in ("", "ai.onnx"):
        return Stays("foreign-operator", f"nothing is known of {node.domain}::{node.op_type}")
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return Stays("subgraph", "subgraphs stay in float32")
    if node.op_type in FLOAT32_BY_NATURE:
        return Stays("float32-by-nature", FLOAT32_BY_NATURE[node.op_type])
    if any(types.get(v) is None for v in (*node.inputs, *node.outputs) if v is not None and v.name):
        return Stays("unknown-type", "the type of one of its tensors is unknown, or no tensor")
    if node.op_type == "DequantizeLinear" and _is_int32(node.inputs[0], types):
        return Stays("float32-by-nature", "the scale of an int32 bias is too small for float16")
    if node.op_type == "DequantizeLinear" and "output_dtype" in node.attributes:
        return Stays("float32-by-nature", "an attribute states its type")
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    never = _FLOAT32_INPUTS.get(node.op_type, ())
    inputs = {i for i in _float32(node.inputs, schema.inputs, schema, types) if i not in never}
    outputs = set(_float32(node.outputs, schema.outputs, schema, types))
    if not inputs | outputs:
        return Stays("no-float16", f"{node.op_type} takes no float16 at opset {opset}")
    return Slots(frozenset(inputs), frozenset(outputs))


def _is_int32(value: ir.Value | None, types: Mapping[ir.Value, ir.DataType | None]) -> bool:
    return value is not None and types.get(value) == ir.DataType.INT32


def _float32(
    ends: Sequence[ir.Value | None],
    formal: Sequence[onnx.defs.OpSchema.FormalParameter],
    schema: onnx.defs.OpSchema,
    types: Mapping[ir.Value, ir.DataType | None],
) -> Iterator[int]:
    """Yield the positions that hold float32 where the schema admits float16 as well."""
    admitted = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    for i, value in enumerate(ends):
        parameter = formal[min(i, len(formal) - 1)]  # the last one may stand for many
        if value is not None and types.get(value) == ir.DataType.FLOAT and parameter.type_str in admitted:
            yield i


def _from_shapes(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that compute with nothing but sizes of tensors and constants."""
    known: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        computed = [v for v in inputs if constant(v) is None]
        if node.op_type in ("Shape", "Size") or (computed and all(v in known for v in computed)):
            known.update(node.outputs)
            found.add(node)
    return found


# ------------------------------------------------------------------------------------------ constants


def rounded(array: np.ndarray) -> np.ndarray:
    """Return the array in float16, to nearest; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float16)


def rounded_scale(scales: np.ndarray) -> np.ndarray:
    """Return scales of Q/DQ in float16, never 0: TensorRT refuses a scale that is not positive."""
    positive: np.ndarray = np.maximum(rounded(scales), np.float16(SMALLEST))
    return positive


def saturated(array: np.ndarray) -> np.ndarray:
    """Return the array in float16, what is too large becoming the largest number: for the bounds of a Clip."""
    return rounded(np.clip(array, -MAX, MAX))


def sqnr_db(array: np.ndarray) -> float:
    """Return the energy of the array over that of its error in float16, in dB; inf where nothing is lost."""
    exact = array.astype(np.float64)
    exact = exact[np.isfinite(exact)]
    error = float(((exact - rounded(exact).astype(np.float64)) ** 2).sum())
    return math.inf if error == 0 else 10 * math.log10(float((exact**2).sum()) / error)


def is_scale(node: ir.Node, index: int) -> bool:
    """Say whether this input of the node is the scale of a Q/DQ pair."""
    return index == 1 and node.op_type in ("QuantizeLinear", "DequantizeLinear")


def is_bound(node: ir.Node, index: int) -> bool:
    """Say whether this input of the node is a bound of Clip."""
    return index in (1, 2) and node.op_type == "Clip"


def _unfit_constant(node: ir.Node, slots: Slots) -> Stays | None:
    for i in slots.inputs:
        value = node.inputs[i]
        tensor = constant(value)
        if value is None or tensor is None or is_scale(node, i) or is_bound(node, i):
            continue
        why = _unfit(tensor.numpy())
        if why is not None:
            return Stays("constant", f"its constant {value.name} {why}")
    return None


def _unfit(array: np.ndarray) -> str | None:
    finite = np.abs(array[np.isfinite(array)])
    largest = float(finite.max(initial=0.0))
    if largest > MAX:
        return f"holds {largest:.3g}, beyond float16's {MAX:.0f}"
    db = sqnr_db(array)
    return None if db >= LEAST_DB else f"drowns in float16's smallest steps: {db:.0f} dB would be left"
