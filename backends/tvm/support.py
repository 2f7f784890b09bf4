"""Which ONNX operators TVM's importer takes, so that others are refused before anything is built.

The list is that of apache-tvm 0.27's convert map; a test holds it against the installed version. The importer looks at
names alone: some of its operators are those of com.microsoft. Of what it takes some it converts wrongly; those uses are
refused, too, as the ONNX operators' own test cases showed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...compiler.types import Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

RULE = "tvm"
_NAMES = """
    Abs Acos Acosh Add AffineGrid AllClassNMS And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
    BatchNormalization BiasGelu BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Compress
    Concat ConcatFromSequence Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu EmbedLayerNormalization Equal Erf Exp Expand
    EyeLike FastGelu Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity
    InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpPool MatMul
    MatMulInteger MatMulInteger16 Max MaxPool MaxRoiPool MaxUnpool Mean MeanVarianceNormalization Min Mish Mod Mul
    Neg NonMaxSuppression NonZero Not OneHot Optional OptionalGetElement OptionalHasElement Or PRelu Pad Pow
    QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RoiAlign Round Scatter
    ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
    SequenceLength Shape Shrink Sigmoid Sign Sin Sinh Size SkipLayerNormalization Slice Softmax Softplus Softsign
    SpaceToDepth Split SplitToSequence Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unique Unsqueeze Upsample Where Xor
"""
#: What TVM's importer has; what importer.py adds to it; `If`, which is in neither's table.
OPERATORS = frozenset(_NAMES.split())
ADDED = frozenset(("QLinearConv", "QLinearMatMul", "ConvInteger"))
_OTHER = frozenset(("If",))
#: Of com.microsoft alone, though ONNX has operators of some of these names.
_CONTRIBUTED = frozenset(
    ("Attention", "BiasGelu", "EmbedLayerNormalization", "FastGelu", "MatMulInteger16", "SkipLayerNormalization")
)
#: Attributes by operator, and the values with which it is converted rightly; left out counts as the first.
_ATTRIBUTES: dict[str, dict[str, tuple[object, ...]]] = {
    "BatchNormalization": {"training_mode": (0,)},
    "DequantizeLinear": {"block_size": (0,)},
    "QuantizeLinear": {"block_size": (0,)},
    "IsInf": {"detect_negative": (1,), "detect_positive": (1,)},
    "Resize": {
        "antialias": (0,),
        "axes": (None,),
        "coordinate_transformation_mode": ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric",
                                           "tf_crop_and_resize", "tf_half_pixel_for_nn"),
        "keep_aspect_ratio_policy": ("stretch",),
    },
    "RoiAlign": {"mode": ("avg",)},
    "SpaceToDepth": {"mode": ("DCR",)},
    "ConvTranspose": {"output_shape": (None,), "auto_pad": ("NOTSET", "VALID")},
}  # fmt: skip
#: Operators that give their first output alone.
_ONE_OUTPUT = frozenset(("BatchNormalization", "Dropout", "LayerNormalization", "MaxPool", "SkipLayerNormalization"))
#: Types that TVM's importer or this version's kernels have no arithmetic for.
_TYPES = frozenset(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT4E2M1", "INT4", "UINT4"))


def refusals(model: ir.Model) -> Iterator[Refusal]:
    """Yield the inputs whose size is not known, and the nodes that TVM cannot import, or imports wrongly."""
    for value in model.graph.inputs:
        if value.shape is None or any(not isinstance(size, int) for size in list(value.shape)[1:]):
            unknown = "its size is not known: TVM's modules are for one size, though for any batch"
            yield Refusal(value.name or "input", RULE, unknown)
    for node in model.graph.all_nodes():
        why = next((said for rule in _RULES if (said := rule(node)) is not None), None)
        if why is not None:
            yield Refusal(node.name or node.outputs[0].name or node.op_type, RULE, why)


def _unknown(node: ir.Node) -> str | None:
    if node.op_type not in OPERATORS | ADDED | _OTHER:
        return f"TVM's importer has no {node.op_type}"
    if node.op_type in _CONTRIBUTED and node.domain != "com.microsoft":
        return f"TVM's importer has com.microsoft's {node.op_type} alone"
    return None


def _misread(node: ir.Node) -> str | None:
    for name, known in _ATTRIBUTES.get(node.op_type, {}).items():
        attribute = node.attributes.get(name)
        value = known[0] if attribute is None else attribute.value
        if value not in known and not (isinstance(value, (list, tuple)) and not value):
            return f"TVM has no {node.op_type} with {name} {value}"
    return None


def _more_outputs(node: ir.Node) -> str | None:
    if node.op_type in _ONE_OUTPUT and any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return f"TVM's {node.op_type} gives its first output alone"
    return None


def _between_pixels(node: ir.Node) -> str | None:
    """TVM takes the sizes for the scales: they are the same where the scales give whole sizes."""
    if node.op_type != "Resize" or len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[0] is None:
        return None
    scales, shape = node.inputs[2].const_value, node.inputs[0].shape
    if scales is None or shape is None or scales.size != len(shape):
        return None
    sizes = [float(s) * d for s, d in zip(scales.numpy(), shape, strict=True) if isinstance(d, int)]
    return None if all(abs(s - round(s)) < 1e-4 for s in sizes) else "TVM resizes by scales that give whole sizes alone"


def _last_window(node: ir.Node) -> str | None:
    padded = node.op_type == "AveragePool" and any(node.attributes.get_ints("pads", ()))
    return "TVM's AveragePool counts padding in its last windows" if padded and _ceils(node) else None


def _ceils(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("ceil_mode", 0))


def _inner_axes(node: ir.Node) -> str | None:
    """TVM's layouts turn what is normalised over more than the last axis, and not its scale."""
    shape = node.inputs[0].shape if node.op_type == "LayerNormalization" and node.inputs[0] is not None else None
    axis = node.attributes.get_int("axis", -1)
    if node.op_type != "LayerNormalization" or axis == -1 or (shape is not None and axis == len(shape) - 1):
        return None
    return "TVM's LayerNormalization is right over the last axis alone"


def _scaled(node: ir.Node) -> str | None:
    scale = node.inputs[1] if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
    half = scale is not None and scale.dtype is not None and scale.dtype.name in ("FLOAT16", "BFLOAT16")
    return f"{node.op_type} with scales of 16 bits is not in this version" if half else None


def _modulo(node: ir.Node) -> str | None:
    first = node.inputs[0] if node.op_type == "Mod" else None
    floats = first is not None and first.dtype is not None and first.dtype.is_floating_point()
    return "TVM's Mod of floats is fmod" if floats and not node.attributes.get_int("fmod", 0) else None


def _narrow(node: ir.Node) -> str | None:
    kinds = [v.dtype.name for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is not None]
    found = next((kind for kind in kinds if kind in _TYPES), None)
    return None if found is None else f"TVM has no arithmetic for {found.lower()} here"


_RULES: tuple[Callable[..., str | None], ...] = (
    _unknown,
    _misread,
    _more_outputs,
    _between_pixels,
    _last_window,
    _inner_axes,
    _scaled,
    _modulo,
    _narrow,
)
