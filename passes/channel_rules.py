"""Operator -> what it does to channel variables (see channel_groups.py for what they are and for the algebra).

A rule gets the work and the node, reads the variables of those inputs that it takes care of (all others are pinned),
ties what must be equal, and returns the variables of the outputs. It raises Stays where the node cannot be understood,
which pins whatever the node reads and writes. What is not in the table is pinned, too: in doubt leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from .channel_moves import MOVES, axis_of, ints, padded
from .constants import constant, small_array
from .weights import ALONG_OUTPUTS, Stays, along_axis, along_inputs, changeable, float64

if TYPE_CHECKING:
    from .channel_analysis import Analysis
    from .channel_groups import Scaling

#: Constants of Mul up to this many elements may get variables of their own for their output.
_SMALL = 1 << 16
#: Limits from here on are none: the largest float32 is the default of old opsets.
_ENDLESS = 3.4e38

# ------------------------------------------------------------------------------------------- element by element


def _same(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """Hand on the variables of the first input."""
    return [work.read(node.inputs[0])]


def _blind(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """Look at no value of the input, so that anything may happen to it."""
    work.read(node.inputs[0])
    return []


def _clip(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """Clip at 0 or at infinity only, or where the limit is said to be never reached."""
    if node.outputs[0].name in work.unreached:
        work.unclipped.append(node)
    elif any(limit and abs(limit) < _ENDLESS for limit in _limits(node)):
        raise Stays(f"it clips at other limits than 0: {list(_limits(node))}")
    return [work.read(node.inputs[0])]


def _limits(node: ir.Node) -> Iterator[float]:
    for index, name in ((1, "min"), (2, "max")):
        value = node.inputs[index] if index < len(node.inputs) else None
        array = small_array(value)
        if value is not None and array is None:
            raise Stays(f"its {name} is computed at run time")
        yield float(array.item()) if array is not None else node.attributes.get_float(name, math.inf)


def _tied(first: int) -> Rule:
    """Make all inputs from `first` on equal: sums, maxima. Constants among them follow, unless they are 0."""

    def rule(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
        rank = len(work.dims(node.outputs[0]))
        data = [i for i, value in enumerate(node.inputs) if i >= first and constant(value) is None]
        out = work.tie(*(padded(work.read(node.inputs[i]), rank) for i in data or [first]))
        for i, value in enumerate(node.inputs):
            tensor = constant(value) if i >= first else None
            if tensor is not None and data and out.any() and float64(tensor).any():
                work.rescale(node, i, up=out)
        return [out]

    return rule


def _product(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """Multiply, or divide by the second input: the gate, or constant, is pinned; the other one's variables go on."""
    rank = len(work.dims(node.outputs[0]))
    main, gate = _main_and_gate(work, node)
    ids = padded(work.read(node.inputs[main]), rank)
    if constant(node.inputs[gate]) is not None and main != gate:
        return [_scaled(work, node, gate, ids)]
    return [ids]  # the gate was not read, so it will be pinned


def _main_and_gate(work: Scaling, node: ir.Node) -> tuple[int, int]:
    if node.op_type == "Div" or constant(node.inputs[1]) is not None:
        return 0, 1
    if constant(node.inputs[0]) is not None:
        return 1, 0
    sizes = [math.prod(d for d in work.dims(v) if isinstance(d, int)) for v in node.inputs]
    return (1, 0) if sizes[0] < sizes[1] else (0, 1)


def _scaled(work: Scaling, node: ir.Node, index: int, ids: np.ndarray) -> np.ndarray:
    """Return new variables if the constant has a number for each of the old ones, else the old ones."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    shape = value.const_value.shape.numpy()
    sizes = (1,) * (ids.ndim - len(shape)) + tuple(shape)
    if value.const_value.size > _SMALL or any(a not in (1, b) for a, b in zip(ids.shape, sizes, strict=True)):
        return ids
    new = work.fresh(sizes)
    try:
        work.rescale(node, index, *((ids, new) if node.op_type == "Div" else (new, ids)))
    except Stays:
        return ids
    return new


# ------------------------------------------------------------------------------------------- over several elements


def _pool(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """Pool over all axes from the third on."""
    ids = work.read(node.inputs[0])
    return [work.tie_along(ids, range(2, ids.ndim))]


def _reduce(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """Reduce over axes, by something that grows as its input does."""
    ids = work.read(node.inputs[0])
    axes = ints(node, 1, "axes") or ()
    if not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
        return [ids]
    reduced = [axis % ids.ndim for axis in axes] or list(range(ids.ndim))
    ids = work.tie_along(ids, reduced)
    return [ids if node.attributes.get_int("keepdims", 1) else ids.squeeze(tuple(reduced))]


def resize(work: Analysis, node: ir.Node) -> Sequence[np.ndarray]:
    """Interpolate: linear in its input, along those axes that are not left alone."""
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_andresize":
        raise Stays("it fills in a constant")
    ids = work.read(node.inputs[0])
    before, after = work.dims(node.inputs[0]), work.dims(node.outputs[0])
    axes = [axis % ids.ndim for axis in node.attributes.get_ints("axes", range(ids.ndim)) or ()]
    scales = _scales(node)
    scales = np.ones(len(axes)) if scales is None else scales
    if len(scales) != len(axes):
        raise Stays(f"it has {len(scales)} scales for {len(axes)} axes")
    moved = [a for a, scale in zip(axes, scales, strict=True) if scale != 1 or before[a] != after[a] or not before[a]]
    return [work.tie_along(ids, moved)]


def _scales(node: ir.Node) -> np.ndarray | None:
    """Return the factors of a Resize or Upsample, None where it has sizes instead. Raises Stays."""
    if "scales" in node.attributes:
        return np.array(node.attributes.get_floats("scales"))
    value = node.inputs[min(2, len(node.inputs) - 1)]
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    array = small_array(value)
    if sizes is not None and (value is None or array is not None and not array.size):
        if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise Stays("it keeps an aspect ratio, so its scales are unknown")
        return None
    if array is None:
        raise Stays("its scales are computed at run time")
    return array


# ------------------------------------------------------------------------------------------- layers


def others(ids: np.ndarray, axis: int) -> list[int]:
    """Return all axes but one."""
    return [i for i in range(ids.ndim) if i != axis % ids.ndim]


def vector(work: Analysis, value: ir.Value | None, axis: int, length: int) -> np.ndarray:
    """Return an input's variables along `axis`, made independent of all other axes, as `length` numbers."""
    ids = work.read(value)
    ids = work.tie_along(ids, others(ids, axis)).reshape(-1)
    if ids.size not in (1, length):
        raise Stays(f"its input has {ids.size} channels and its weight {length}")
    return np.broadcast_to(ids, length)


def _outputs(work: Scaling, node: ir.Node, count: int) -> np.ndarray:
    """Return new variables for the outputs of a layer; pinned ones if its bias (input 2) may not be changed."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    try:
        if bias is not None:
            changeable(bias)
    except Stays as why:
        work.refuse(node, f"its outputs keep their scale: {why}")
        return np.zeros(count, np.int64)  # a bias that is computed was not read, so it is pinned, too
    return work.fresh([count])


def _channel_last(ids: np.ndarray, rank: int) -> np.ndarray:
    return ids.reshape((1,) * (rank - 1) + (-1,))


def _layer(work: Scaling, node: ir.Node, ins: np.ndarray, outs: np.ndarray, up: np.ndarray, down: np.ndarray) -> None:
    work.rescale(node, 1, up, down)
    if outs.any() and len(node.inputs) > 2 and node.inputs[2] is not None:
        work.rescale(node, 2, outs)
    work.add_layer(node, ins, outs)


def _conv(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    weight, rank = changeable(node.inputs[1]), len(work.dims(node.inputs[0]))
    outputs, inputs = weight.shape.numpy()[:2]
    ins = vector(work, node.inputs[0], 1, inputs * node.attributes.get_int("group", 1))
    outs = _outputs(work, node, outputs)
    _layer(work, node, ins, outs, along_axis(weight, 0, outs), along_inputs(node, weight, ins))
    return [outs.reshape(1, -1, *[1] * (rank - 2))]


def _conv_transpose(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    weight, rank = changeable(node.inputs[1]), len(work.dims(node.inputs[0]))
    inputs, outputs = weight.shape.numpy()[:2]
    ins = vector(work, node.inputs[0], 1, inputs)
    outs = _outputs(work, node, outputs * node.attributes.get_int("group", 1))
    _layer(work, node, ins, outs, ALONG_OUTPUTS["ConvTranspose"](node, weight, outs), along_axis(weight, 0, ins))
    return [outs.reshape(1, -1, *[1] * (rank - 2))]


def _gemm(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    if node.attributes.get_int("transA", 0):
        raise Stays("transA is set")
    weight, along = changeable(node.inputs[1]), 1 if node.attributes.get_int("transB", 0) else 0
    inputs, outputs = weight.shape.numpy()[along], weight.shape.numpy()[1 - along]
    ins = vector(work, node.inputs[0], 1, inputs)
    outs = _outputs(work, node, outputs)
    _layer(work, node, ins, outs, along_axis(weight, 1 - along, outs), along_axis(weight, along, ins))
    return [outs.reshape(1, -1)]


def _matmul(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    if constant(node.inputs[1]) is None:
        return _attention(work, node)
    weight, rank = changeable(node.inputs[1]), len(work.dims(node.inputs[0]))
    if len(weight.shape) != 2 or rank < 2:
        raise Stays(f"it multiplies rank {rank} by a weight of rank {len(weight.shape)}")
    inputs, outputs = weight.shape.numpy()
    ins, outs = vector(work, node.inputs[0], -1, inputs), work.fresh([outputs])
    _layer(work, node, ins, outs, along_axis(weight, 1, outs), along_axis(weight, 0, ins))
    return [_channel_last(outs, rank)]


def _attention(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """Weigh the rows of the second input by the first one, which is pinned: the columns keep their variables."""
    rank = len(work.dims(node.outputs[0]))
    ids = work.read(node.inputs[1])
    if ids.ndim < 2 or len(work.dims(node.inputs[0])) < 2 or node.inputs[0] is node.inputs[1]:
        raise Stays("it is no product of two matrices")
    return [padded(work.tie_along(ids, [ids.ndim - 2]), rank)]


def _batch_norm(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
    """gamma (x - mean) / sqrt(var + epsilon) + beta: gamma takes both factors, mean the input's, beta the output's."""
    extra = [value for value in node.outputs[1:] if value.name]
    if node.attributes.get_int("training_mode", 0) or extra:
        raise Stays("it is in training mode")
    shape, rank = changeable(node.inputs[1]).shape.numpy(), len(work.dims(node.inputs[0]))
    if constant(node.inputs[4]) is None or len(shape) != 1:
        raise Stays("its parameters are computed at run time, or are no number per channel")
    channels = shape[0]
    ins, outs = vector(work, node.inputs[0], 1, channels), work.fresh([channels])
    work.rescale(node, 1, outs, ins)
    work.rescale(node, 2, outs)
    work.rescale(node, 3, ins)
    return [outs.reshape(1, -1, *[1] * (rank - 2))]


def _normalisation(axis: int) -> Rule:
    """Normalise the input, which is pinned, then scale and shift along `axis`, where new variables begin."""

    def rule(work: Scaling, node: ir.Node) -> Sequence[np.ndarray]:
        dims = work.dims(node.outputs[0])
        channels = dims[axis]
        shape = tuple(changeable(node.inputs[1]).shape.numpy())
        if shape != (channels,) or axis_of(node, axis, len(dims)) != axis % len(dims):
            raise Stays("it scales by something else than a number per channel")
        outs = work.fresh(shape)
        work.rescale(node, 1, outs)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            work.rescale(node, 2, outs)
        return [outs.reshape([-1 if i == axis % len(dims) else 1 for i in range(len(dims))])]

    return rule


#: A rule returns the variables of the node's outputs, absent ones being pinned, and raises Stays where it has none.
Rule = Callable[["Scaling", ir.Node], Sequence[np.ndarray]]

LAYERS: dict[str, Rule] = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}

RULES: dict[str, Rule] = {
    **dict.fromkeys(("Identity", "Relu", "LeakyRelu", "PRelu", "Abs", "Neg", "Dropout"), _same),
    **dict.fromkeys(("Shape", "Size"), _blind),
    "Clip": _clip,
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean", "Max", "Min"), _tied(0)),
    "Where": _tied(1),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"), _pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduce),
    **dict.fromkeys(("Resize", "Upsample"), resize),
    **MOVES,
    **LAYERS,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _normalisation(1),
    "GroupNormalization": _normalisation(1),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalisation(-1)),
}
