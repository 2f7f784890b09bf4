"""What the graph tells of a tensor without looking at its elements.

moved       a tensor that an operator only rearranged has the extremes and the distribution of its source
joined      a Concat's extremes are those of its inputs together
nonnegative a ReLU's output, and what is pooled, joined, split or added up from such tensors, is never below 0
covered     where the windows of a MaxPool cover its input, both have the same maximum
"""

from __future__ import annotations

import math

import onnx_ir as ir

#: Operators that only move elements of their first input, each exactly once.
_MOVES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "DepthToSpace", "SpaceToDepth")
_NONNEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax")
#: Operators whose output is not negative if their data input is not.
_KEEPS_SIGN = (*_MOVES, "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Split", "Slice", "Gather")
#: The same, if no input is negative.
_JOINS_SIGN = ("Concat", "Add", "Mul")


def values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the inputs and all node outputs of the main graph by name, in graph order."""
    every = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return {value.name: value for value in every if value.name}


def source(value: ir.Value) -> ir.Value:
    """Return the tensor whose elements `value` holds, each exactly once: itself, or what was rearranged into it."""
    while (node := value.producer()) is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def nonnegative(graph: ir.Graph) -> set[ir.Value]:
    """Return the tensors that are never below 0, as far as the operators tell."""
    found: set[ir.Value | None] = set()
    for node in graph:
        alone = node.op_type in _NONNEGATIVE or (node.op_type == "Clip" and _clips_at(node) >= 0)
        keeps = node.op_type in _KEEPS_SIGN and node.inputs[0] in found
        joins = node.op_type in _JOINS_SIGN and all(value in found for value in node.inputs)
        if alone or keeps or joins:
            found.update(node.outputs)
    return {value for value in found if value is not None}


def _clips_at(node: ir.Node) -> float:
    """Return the lower end of a Clip; minus infinity where it is not known."""
    least = node.inputs[1] if len(node.inputs) > 1 else None
    if least is None:
        return node.attributes.get_float("min", -math.inf)
    return float(least.const_value.numpy()) if least.const_value is not None else -math.inf


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Return the shape if all of it is known."""
    return tuple(value.shape.numpy()) if value.shape is not None and value.shape.is_static() else None


def covering_pool(value: ir.Value) -> ir.Value | None:
    """Return the output of a MaxPool over `value` whose windows leave no element out, if there is one."""
    for node, index in value.uses():
        if node.op_type == "MaxPool" and index == 0 and node.graph is value.graph and _covers(node):
            return node.outputs[0]
    return None


def _covers(node: ir.Node) -> bool:
    assert node.inputs[0] is not None
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    kernel = list(node.attributes.get_ints("kernel_shape", []))
    count = len(kernel)
    if before is None or after is None or not count or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    strides = node.attributes.get_ints("strides", [1] * count)
    pads = node.attributes.get_ints("pads", [0] * 2 * count)
    if any(d != 1 for d in node.attributes.get_ints("dilations", [1] * count)):
        return False
    sizes = zip(before[2:], after[2:], kernel, strides, pads[:count], strict=True)
    return all(stride <= k and (out - 1) * stride + k - pad >= size for size, out, k, stride, pad in sizes)
