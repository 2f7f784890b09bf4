"""What a node must be like to run on integers: the conditions that a row of a support table names in `needs`.

A condition looks at the node, its constants and its neighbours, and returns the reason why it does not hold, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from ..compiler.types import QuantScheme, Range

#: A Concat whose inputs' ranges differ by more is not given one scale where its result leaves the network: 8 costs the
#: smallest of them three of eight bits.
MOST_DIFFERENT = 8.0
#: Operators that neither mix numbers nor end a path from Q·K^T to Softmax.
_ON_THE_WAY = ("Add", "Sub", "Mul", "Div", "Where", "Clip", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
#: The least channels, and rows and columns, of TensorRT's integer kernels: below, NVIDIA's Model-Optimizer leaves
#: layers in float.
_TENSORRT_CHANNELS, _TENSORRT_MULTIPLE, _TENSORRT_SEQUENCE, _TENSORRT_FP8_AREA = 16, 8, 512, 32


@dataclass(frozen=True)
class Facts:
    """What is known besides the node: the model's opset, the ranges of its tensors, and the scheme."""

    opset: int
    ranges: Mapping[str, Range]
    scheme: QuantScheme


Condition = Callable[[ir.Node, Facts], str | None]


# ------------------------------------------------------------------------------------------ weights and attributes


def _weight_shape(node: ir.Node) -> list[int] | None:
    """Return the shape of a constant weight; None where it is none."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or weight.const_value is None or weight.is_graph_input():
        return None
    return list(weight.const_value.shape.numpy())


def _constant_weight(node: ir.Node, facts: Facts) -> str | None:
    if _weight_shape(node) is None:
        return "its weight is not a constant"
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    if weight.const_value.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.const_value.dtype}, not float32"
    return None


def _constant_bias(node: ir.Node, facts: Facts) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    if bias.const_value is None or bias.is_graph_input():
        return "its bias is not a constant"
    return None


def _plain_gemm(node: ir.Node, facts: Facts) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "transA is set"
    if node.attributes.get_float("alpha", 1.0) != 1.0:
        return "alpha is not 1"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    shape = _weight_shape(node)
    assert shape is not None
    channels = shape[0 if node.attributes.get_int("transB", 0) else 1]
    if bias is not None and (bias.const_value is None or bias.const_value.size != channels):
        return "its bias is not one number per output"
    return None


def _weight_of_rank_2(node: ir.Node, facts: Facts) -> str | None:
    shape = _weight_shape(node)
    rank = None if shape is None else len(shape)
    return None if rank == 2 else f"its weight has rank {rank}, not 2"


def _max_pool_on_integers(node: ir.Node, facts: Facts) -> str | None:
    if facts.opset < 12:
        return "MaxPool takes integers from opset 12 on"
    return "its indices are used" if len(node.outputs) > 1 else None


def _pad_with_zero(node: ir.Node, facts: Facts) -> str | None:
    if facts.opset < 13:
        return "Pad takes integers from opset 13 on"
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is not None and (value.const_value is None or value.const_value.numpy().any()):
        return "it pads with something other than 0"
    return None


def _nearest_resize(node: ir.Node, facts: Facts) -> str | None:
    mode = node.attributes.get_string("mode", "nearest")
    return None if mode == "nearest" else f"mode {mode} computes new values"


# ------------------------------------------------------------------------------------------ neighbours


def _outside_gelu(node: ir.Node, facts: Facts) -> str | None:
    """Object to the product x (1 + erf(x / √2)), or with tanh, that an exporter wrote out: GELU stays float."""
    for value in node.inputs:
        if _comes_from_erf(value):
            return "it is part of a GELU written out in single operators"
    return None


def _comes_from_erf(value: ir.Value | None) -> bool:
    """Say whether the value is Erf or Tanh plus a constant, times constants perhaps."""
    added = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("Erf", "Tanh"):
            return added
        if node.op_type not in ("Add", "Mul", "Div"):
            return False
        added |= node.op_type == "Add"
        computed = [v for v in node.inputs if v is not None and v.const_value is None]
        value = computed[0] if len(computed) == 1 else None
    return False


def _no_softmax_behind(node: ir.Node, facts: Facts) -> str | None:
    """Object to what only serves a Softmax, such as the scaling and the mask between Q·K^T and it."""
    return "what goes into a Softmax stays float" if _only_softmax(node.outputs[0]) else None


def _only_softmax(value: ir.Value) -> bool:
    readers = [use.node for use in value.uses()]
    if not readers or value.is_graph_output():
        return False
    return all(
        n.op_type in ("Softmax", "LogSoftmax") or (n.op_type in _ON_THE_WAY and _only_softmax(n.outputs[0]))
        for n in readers
    )


def _two_activations(node: ir.Node, facts: Facts) -> str | None:
    return "one of its inputs is a constant" if any(_is_constant(v) for v in node.inputs) else None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def different_ranges(concat: ir.Node, linear: Callable[[ir.Node], bool], ranges: Mapping[str, Range]) -> str | None:
    """Say by how much the ranges of a Concat's inputs differ, if that matters; None where one scale will do.

    It matters where the result leaves the network with no linear layer behind it: a detection head that joins box
    numbers and probabilities. In the middle of a network the next layer's weights level such differences.
    """
    found = (ranges.get(v.name or "") for v in concat.inputs if v is not None)
    sizes = [max(-r.min, r.max) for r in found if r is not None]
    sizes = [size for size in sizes if size > 0]
    if len(sizes) < 2 or max(sizes) <= MOST_DIFFERENT * min(sizes) or not _leaves(concat.outputs[0], linear):
        return None
    factor = max(sizes) / min(sizes)
    return f"the ranges of its inputs differ by a factor of {factor:.0f}: one 8-bit scale would wipe out the smallest"


def _leaves(value: ir.Value, linear: Callable[[ir.Node], bool]) -> bool:
    """Say whether a graph output is reached from here without a linear layer in between."""
    seen: set[ir.Node] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if value.is_graph_output():
            return True
        readers = {use.node for use in value.uses()} - seen
        seen |= readers
        todo += [out for n in readers if not linear(n) for out in n.outputs]
    return False


# ------------------------------------------------------------------------------------------ TensorRT's exclusions


def _enough_channels(node: ir.Node, facts: Facts) -> str | None:
    """Object to convolutions for which TensorRT has no good kernel of 8 bits (Model-Optimizer's exclusions)."""
    shape = _weight_shape(node)
    assert shape is not None
    outputs, inputs, *kernel = shape
    least, multiple = _TENSORRT_CHANNELS, _TENSORRT_MULTIPLE
    if facts.scheme.weight.startswith("float8"):
        good = min(inputs, outputs) > least and math.prod(kernel) <= _TENSORRT_FP8_AREA
        return None if good else f"{inputs} x {outputs} channels with kernel {kernel} have no FP8 kernel in TensorRT"
    if min(inputs, outputs) >= least:
        return None
    if node.attributes.get_int("group", 1) > 1:
        good = outputs % multiple == 0 and min(kernel, default=0) >= 3
    else:
        first = node.inputs[0] is not None and node.inputs[0].is_graph_input()
        good = (first or max(inputs, outputs) >= least) and len(set(kernel)) == 1
        good &= outputs % multiple == 0 or inputs % multiple == 0
    return None if good else f"{inputs} x {outputs} channels with kernel {kernel} fill no integer kernel of TensorRT"


def _a_matrix(node: ir.Node, facts: Facts) -> str | None:
    """Object to products with a vector, and to those with few columns (Model-Optimizer's exclusions).

    With weights only in few bits, vectors are what gains most: less is read. TensorRT packs two INT4 numbers into a
    byte along the last axis, which must be even for that.
    """
    shape, source = _weight_shape(node), node.inputs[0]
    assert shape is not None and source is not None
    if facts.scheme.activation is None:
        odd = facts.scheme.weight == "int4" and shape[-1] % 2
        return f"the last axis of its weight, {shape[-1]}, is odd, and INT4 comes in pairs" if odd else None
    inner, columns = reversed(shape) if node.attributes.get_int("transB", 0) else shape
    rows = source.shape[-2] if source.shape is not None and len(source.shape) > 1 else None
    if rows == 1 or columns == 1:
        return "it multiplies a vector, which is bound by memory"
    if min(inner, columns) < _TENSORRT_CHANNELS:
        return f"a weight of {inner} x {columns} fills no integer kernel of TensorRT"
    return None


def _short_sequence(node: ir.Node, facts: Facts) -> str | None:
    sizes = [d for v in node.inputs if v is not None and v.shape is not None for d in v.shape[-2:]]
    longest = max((d if isinstance(d, int) else math.inf for d in sizes), default=math.inf)
    if longest > _TENSORRT_SEQUENCE:
        return f"its sequence is longer than {_TENSORRT_SEQUENCE}, or of unknown length"
    return None


def _no_mask(node: ir.Node, facts: Facts) -> str | None:
    """Object to attention whose scores have a computed mask added."""
    value: ir.Value | None = node.outputs[0]
    while value is not None and len(value.uses()) == 1:
        follower = next(iter(value.uses())).node
        if follower.op_type == "Add" and not any(_is_constant(v) for v in follower.inputs):
            return "a computed mask is added to its result"
        value = follower.outputs[0] if follower.op_type in _ON_THE_WAY else None
    return None


NEEDS: Mapping[str, Condition] = {
    "constant-weight": _constant_weight,
    "constant-bias": _constant_bias,
    "plain-gemm": _plain_gemm,
    "rank-2-weight": _weight_of_rank_2,
    "max-pool-on-integers": _max_pool_on_integers,
    "pad-with-zero": _pad_with_zero,
    "nearest-resize": _nearest_resize,
    "outside-gelu": _outside_gelu,
    "no-softmax-behind": _no_softmax_behind,
    "two-activations": _two_activations,
    "enough-channels": _enough_channels,
    "a-matrix": _a_matrix,
    "short-sequence": _short_sequence,
    "no-mask": _no_mask,
}
