"""Operator -> what it does to the variables of channels that are cut (see cut_analysis.py for the algebra).

A rule gets the work and the node, reads the variables of those inputs that it takes care of (all others are pinned),
ties what must be equal, and returns the variables of the outputs. It raises Stays where the node cannot be understood,
which pins whatever the node reads and writes. What is not in the table is pinned, too: in doubt leave it out.

Convolutions in groups (Xie et al. 2017, ResNeXt; Zhang et al. 2018, ShuffleNet) must keep groups of one size. Where
there are at least as many groups as channels in one, whole groups are cut, inputs and outputs together: the depthwise
convolution is the extreme. Otherwise the same positions are cut in all groups. Attention is cut by heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from .channel_layout import Dim
from .channel_moves import MOVES, axis_of, ints, pad, padded, reshape
from .channel_rules import others, resize, vector
from .constants import constant
from .weights import Stays

if TYPE_CHECKING:
    from .cut_analysis import Cutting

# ------------------------------------------------------------------------------------------- element by element


def _elementwise(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Compute each element from those at its place: ties all inputs, and cuts constants among them."""
    rank = len(work.dims(node.outputs[0]))
    data = [value for value in node.inputs if value is not None and constant(value) is None]
    out = joined(work, [(padded(work.read(v), rank), _padded_dims(work.dims(v), rank)) for v in data], rank)
    for index, value in enumerate(node.inputs):
        if constant(value) is not None:
            work.follow(node, index, out)
    return [out] * len(node.outputs)


def _padded_dims(dims: tuple[Dim, ...], rank: int) -> tuple[Dim, ...]:
    return (1,) * (rank - len(dims)) + dims


def joined(work: Cutting, operands: Sequence[tuple[np.ndarray, tuple[Dim, ...]]], rank: int) -> np.ndarray:
    """Tie variables of operands of one rank that broadcast with each other, given with their dimensions.

    An operand of length 1 wherever another one's variables differ is needed whatever is cut: it is pinned.
    """
    active = [axis for axis in range(rank) if any(ids.shape[axis] > 1 for ids, _ in operands)]
    main = [ids for ids, dims in operands if not active or any(dims[axis] != 1 for axis in active)]
    for ids, dims in operands:
        if active and all(dims[axis] == 1 for axis in active):
            work.pin(ids)
    return work.tie(*main) if main else np.zeros([1] * rank, np.int64)


def _first(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Compute each element from that of the first input at its place; the others are single numbers, or pinned."""
    ids = work.read(node.inputs[0])
    return [ids] * len(node.outputs)


# ------------------------------------------------------------------------------------------- over several elements


def apart(work: Cutting, ids: np.ndarray, axes: Collection[int], what: str) -> np.ndarray:
    """Make `ids` independent of axes along which elements are combined. Raises Stays if nothing is left to differ."""
    active = [axis for axis in range(ids.ndim) if ids.shape[axis] > 1]
    combined = [axis for axis in active if axis in {a % ids.ndim for a in axes}]
    if combined and combined == active:
        raise Stays(f"it {what} channels")
    return work.tie_along(ids, combined)


def _pool(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Pool over all axes from the third on. The indices of a MaxPool count channels, too."""
    if len(node.outputs) > 1 and node.outputs[1].name:
        raise Stays("its second output counts elements over all channels")
    ids = work.read(node.inputs[0])
    return [apart(work, ids, range(2, ids.ndim), "pools over")]


def _reduce(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    axes = ints(node, 1, "axes") or ()
    if not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
        return [ids]
    reduced = [axis % ids.ndim for axis in axes] or list(range(ids.ndim))
    return [_without(node, apart(work, ids, reduced, "is taken over"), reduced)]


def _arg_reduce(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    axis = axis_of(node, 0, ids.ndim)
    return [_without(node, apart(work, ids, [axis], "compares"), [axis])]


def _without(node: ir.Node, ids: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return ids if node.attributes.get_int("keepdims", 1) else ids.squeeze(tuple(axes))


def _softmax(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Normalise over one axis; before opset 13 over all from there on."""
    ids = work.read(node.inputs[0])
    old = work.graph.opset_imports.get("", 1) < 13
    axis = axis_of(node, 1 if old else -1, ids.ndim)
    return [apart(work, ids, range(axis, ids.ndim) if old else [axis], "normalises over")]


def _along_axis(default: int) -> CutRule:
    """Combine elements along an axis, which all outputs still have."""

    def rule(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
        ids = work.read(node.inputs[0])
        ids = apart(work, ids, [axis_of(node, default, ids.ndim)], "sorts or sums up")
        return [ids] * len(node.outputs)

    return rule


def _layer_norm(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Normalise over all axes from one on, then scale and shift."""
    if len(node.outputs) > 1 and any(value.name for value in node.outputs[1:]):
        raise Stays("its statistics are read")
    ids = work.read(node.inputs[0])
    ids = apart(work, ids, range(axis_of(node, -1, ids.ndim), ids.ndim), "normalises over")
    for index in range(1, len(node.inputs)):
        work.follow(node, index, ids)
    return [ids]


def _instance_norm(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    ids = work.read(node.inputs[0])
    ids = apart(work, ids, range(2, ids.ndim), "normalises over")
    return [_per_channel(work, node, ids)]


def _batch_norm(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Scale and shift each channel."""
    if node.attributes.get_int("training_mode", 0) or any(value.name for value in node.outputs[1:]):
        raise Stays("it is in training mode")
    return [_per_channel(work, node, work.read(node.inputs[0]))]


def _per_channel(work: Cutting, node: ir.Node, ids: np.ndarray) -> np.ndarray:
    """Let all inputs from the second on, a number per channel each, be cut with the channels."""
    ids = work.tie_along(ids, others(ids, 1))
    channels = ids.reshape(-1)
    for index in range(1, len(node.inputs)):
        work.follow(node, index, channels)
    return ids


def _group_norm(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Normalise groups of channels: a group is kept or cut as a whole, so that its statistics stay."""
    ids = work.read(node.inputs[0])
    dims, count = work.dims(node.inputs[0]), node.attributes.get_int("num_groups", 1)
    channels = dims[1]
    if not isinstance(channels, int) or count is None or channels % count:
        raise Stays("its number of channels is unknown")
    if ids.any() and count == 1:
        raise Stays("it normalises over channels")
    ids = apart(work, ids, range(2, ids.ndim), "normalises over")
    table = np.broadcast_to(ids.reshape(-1), channels).reshape(count, -1)
    of_groups = np.broadcast_to(work.tie_along(table, [1]).reshape(-1), count)
    out = np.repeat(of_groups, channels // count)
    for index in (1, 2):
        tensor = constant(node.inputs[index])
        work.follow(node, index, out if tensor is not None and tensor.size == channels else of_groups)
    work.regroup(node, "num_groups", of_groups)
    return [out.reshape(1, -1, *[1] * (len(dims) - 2))]


# ------------------------------------------------------------------------------------------- layers


def _with_bias(work: Cutting, node: ir.Node, outs: np.ndarray) -> np.ndarray:
    """Tie the outputs, 1-D, to what the bias, input 2, has along its last axis."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return outs
    if constant(bias) is not None:
        work.follow(node, 2, outs)
        return outs
    ids = work.read(bias)
    tied = work.tie(outs, work.tie_along(ids, others(ids, -1)).reshape(-1))
    return np.broadcast_to(tied, outs.shape)


def _weight(node: ir.Node) -> tuple[int, ...]:
    """Return the shape of the weight, input 1. Raises Stays if it is computed."""
    tensor = constant(node.inputs[1])
    if tensor is None:
        raise Stays("its weight is computed at run time")
    return tuple(tensor.shape.numpy())


def _conv(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    """Conv and ConvTranspose: weights of (out, in/group, …) and (in, out/group, …)."""
    shape, rank = _weight(node), len(work.dims(node.inputs[0]))
    group, transposed = node.attributes.get_int("group", 1) or 1, node.op_type == "ConvTranspose"
    ins_each = shape[0] // group if transposed else shape[1]
    outs_each = shape[1] if transposed else shape[0] // group
    ins = vector(work, node.inputs[0], 1, ins_each * group)
    whole = group > 1 and group >= max(ins_each, outs_each)
    outs = (_by_groups if whole else _by_positions)(work, node, ins.reshape(group, ins_each), outs_each)
    return [outs.reshape(1, -1, *[1] * (rank - 2))]


def _by_groups(work: Cutting, node: ir.Node, ins: np.ndarray, outs_each: int) -> np.ndarray:
    """Hand on the variables, (group, in/group): each group has one, as has all that it makes."""
    groups = work.tie_along(ins, [1]).reshape(-1)
    groups = np.broadcast_to(groups, ins.shape[0])
    outs = _with_bias(work, node, np.repeat(groups, outs_each))
    rows = np.repeat(groups, ins.shape[1]) if node.op_type == "ConvTranspose" else outs
    work.follow_weight(node, _column(node, rows, 0))
    work.regroup(node, "group", groups)
    work.add_layer(node, np.repeat(groups, ins.shape[1]), outs)
    return outs


def _by_positions(work: Cutting, node: ir.Node, ins: np.ndarray, outs_each: int) -> np.ndarray:
    """Consume the variables, (group, in/group), and make new ones: they are the same in all groups."""
    group, ins_each = ins.shape
    each = np.broadcast_to(work.tie_along(ins, [0]).reshape(-1), ins_each)
    new = work.fresh([outs_each])
    all_ins, outs = np.tile(each, group), _with_bias(work, node, np.tile(new, group))
    if node.op_type == "ConvTranspose":
        work.follow_weight(node, _column(node, all_ins, 0), _column(node, new, 1))
    else:
        work.follow_weight(node, _column(node, outs, 0), _column(node, each, 1))
    work.consume(node, 0, 1, all_ins)
    work.add_layer(node, all_ins, outs, fresh=True)
    return outs


def _column(node: ir.Node, ids: np.ndarray, axis: int) -> np.ndarray:
    """Return 1-D variables in the rank of the node's weight, along `axis`."""
    return ids.reshape([-1 if i == axis else 1 for i in range(len(_weight(node)))])


def _gemm(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    if node.attributes.get_int("transA", 0):
        raise Stays("transA is set")
    shape, along = _weight(node), 1 if node.attributes.get_int("transB", 0) else 0
    ins = vector(work, node.inputs[0], 1, shape[along])
    return [_linear(work, node, 1, along, ins)]


def _linear(work: Cutting, node: ir.Node, axis: int, along: int, ins: np.ndarray) -> np.ndarray:
    """Consume input 0 along its last axis with a weight of rank 2, and make new variables, (1, out)."""
    outs = _with_bias(work, node, work.fresh([_weight(node)[1 - along]]))
    work.follow_weight(node, _column(node, ins, along), _column(node, outs, 1 - along))
    work.consume(node, 0, axis, ins)
    work.add_layer(node, ins, outs, fresh=True)
    return outs.reshape(1, -1)


def _matmul(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    rank = len(work.dims(node.inputs[0]))
    if constant(node.inputs[1]) is None:
        return [_contraction(work, node)]
    shape = _weight(node)
    if len(shape) != 2 or rank < 2:
        raise Stays(f"it multiplies rank {rank} by a weight of rank {len(shape)}")
    return [padded(_linear(work, node, -1, 0, vector(work, node.inputs[0], -1, shape[0])), rank)]


def _contraction(work: Cutting, node: ir.Node) -> np.ndarray:
    """Multiply two tensors' matrices. Where variables differ between matrices, those are cut as wholes (heads).

    Otherwise rows of the first input, or columns of the second, go on, and what is summed up over can be cut.
    """
    rank, dims = len(work.dims(node.outputs[0])), [work.dims(value) for value in node.inputs]
    if constant(node.inputs[0]) is not None or node.inputs[0] is node.inputs[1] or min(map(len, dims)) < 2:
        raise Stays("it is no product of two tensors' matrices")
    a, b = (padded(work.read(value), rank) for value in node.inputs)
    if a[..., :1, :1].size == 1 and b[..., :1, :1].size == 1:
        return _product(work, node, a, b)
    wholes = [work.tie_along(ids, [rank - 2, rank - 1]) for ids in (a, b)]
    lengths = [(*_padded_dims(dim, rank)[:-2], 1, 1) for dim in dims]
    return joined(work, list(zip(wholes, lengths, strict=True)), rank)


def _product(work: Cutting, node: ir.Node, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    rows, columns = a[..., :, :1], b[..., :1, :]
    if rows.size > 1 and columns.size > 1:
        raise Stays("both its rows and its columns are channels")
    if a.size > rows.size and rows.size > 1 or b.size > columns.size and columns.size > 1:
        raise Stays("it sums up over channels of which it keeps others")
    if a.size > rows.size or b.size > columns.size:
        summed = np.broadcast_to(work.tie(a.reshape(-1), b.reshape(-1)), max(a.size, b.size))
        work.consume(node, 0, -1, summed)
        work.add_layer(node, summed, np.zeros(1, np.int64))
    kept = [ids for ids in (rows, columns) if ids.size > 1]
    return kept[0] if kept else np.zeros([1] * a.ndim, np.int64)


# ------------------------------------------------------------------------------------------- shapes


def _shape(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
    return work.sizes.shape(work, node)


def _to_target(rule: CutRule) -> CutRule:
    """Apply a rule to a node whose target shape may be computed."""

    def filled(work: Cutting, node: ir.Node) -> Sequence[np.ndarray]:
        work.sizes.fill(work, node)
        return rule(work, node)

    return filled


#: A rule returns the variables of the node's outputs, absent ones being pinned, and raises Stays where it has none.
CutRule = Callable[["Cutting", ir.Node], Sequence[np.ndarray]]

_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu"
    " HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid"
    " Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_NARY = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min"
    " Mod Mul Or Pow PRelu Sub Sum Where Xor"
)
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

CUT_RULES: dict[str, CutRule] = {
    **dict.fromkeys(_UNARY.split(), _first),
    **dict.fromkeys(_NARY.split(), _elementwise),
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS.split()},
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg_reduce),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"), _pool),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("TopK", "LpNormalization"), _along_axis(-1)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_norm),
    "InstanceNormalization": _instance_norm,
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    **MOVES,
    "Pad": pad,
    "Reshape": _to_target(reshape),
    "Expand": _to_target(MOVES["Expand"]),
    "Resize": _to_target(resize),
    "Upsample": resize,
    "Shape": _shape,
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    "Gemm": _gemm,
    "MatMul": _matmul,
}
