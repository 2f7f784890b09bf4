"""Let integers start in NHWC where a float layer hands over to ONNX Runtime's integer kernels.

Those kernels are NHWC, float layers NCHW; ONNX Runtime puts a Transpose on either side of each integer Conv and then
cancels what it can. It cancels all of them where the first integer tensor is made by an integer Conv, but not where it
comes out of a float layer: an Add with one NHWC and one NCHW input stays NCHW, and so does the rest of that stage, with
two Transposes a block. This pass states the layout that is wanted. With x of shape (N, C, H, W), Q its rounding:

    q = Q(x)    becomes    q = T'( reshape_NHWC( Q( reshape_flat( T(x) ) ) ) )        T' T = 1

Transposes and Reshapes move elements only, so q keeps every value. The two Reshapes, which cost nothing, keep T and T'
from being cancelled against each other; T' then cancels downstream. Measured on ResNet-20 with its first layer in
float: 8 % less time than without (docs/benchmarks.md). Whether it gains on a model is for the caller to measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult, Stage

_TO_NHWC, _TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
#: What may stand between a layer and the rounding of its output.
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "MaxPool")
_KERNELS = ("Conv",)
#: Layers whose output ONNX Runtime computes in NCHW where they work on floats.
_LAYERS = (*_KERNELS, "ConvTranspose", "Add", "Mul", "Concat")


@dataclass(frozen=True)
class AnchorLayout(Pass):
    """Anchor NHWC behind every rank-4 tensor that a float layer computes and integer Convs read."""

    name: ClassVar[str] = "anchor-layout"
    stage: ClassVar[Stage] = "quantize"
    tolerance: ClassVar[float] = 1e-7  # elements are moved, nothing is computed

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite `model` in place."""
        found = list(_boundaries(model.graph))
        for node, shape in found:
            _anchor(model.graph, node, shape)
        if found:
            model.graph.sort()
        return PassResult(model, modified=bool(found), rewrites=len(found))


def _boundaries(graph: ir.Graph) -> Iterator[tuple[ir.Node, tuple[int, int, int]]]:
    """Yield each QuantizeLinear where floats end, with (C, H, W)."""
    for node in graph:
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None or not _has_one_scale(node):
            continue
        shape = _static_chw(node.inputs[0])
        if shape is not None and _from_float_layer(node.inputs[0]) and _read_by_kernel(node.outputs[0]):
            yield node, shape


def _has_one_scale(node: ir.Node) -> bool:
    """A scale for each channel follows an axis, which Reshape moves."""
    scale = node.inputs[1]
    return scale is not None and scale.shape is not None and len(scale.shape) == 0


def _static_chw(value: ir.Value) -> tuple[int, int, int] | None:
    if value.shape is None or len(value.shape) != 4:
        return None
    c, h, w = value.shape[1:]
    return (c, h, w) if isinstance(c, int) and isinstance(h, int) and isinstance(w, int) else None


def _from_float_layer(value: ir.Value) -> bool:
    """Say whether a layer that works on floats computes the value: neither a graph input nor an integer kernel's."""
    node = value.producer()
    while node is not None and node.op_type in _ACTIVATIONS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in _LAYERS:
        return False
    count = 1 if node.op_type in _KERNELS else len(node.inputs)
    before = [v.producer() for v in node.inputs[:count] if v is not None]
    return any(p is None or p.op_type != "DequantizeLinear" for p in before)


def _read_by_kernel(integers: ir.Value) -> bool:
    readers = [use.node for use in integers.uses()]
    return any(
        use.node.op_type in _KERNELS
        for reader in readers
        if reader.op_type == "DequantizeLinear"
        for use in reader.outputs[0].uses()
    )


def _anchor(graph: ir.Graph, quantize: ir.Node, chw: tuple[int, int, int]) -> None:
    source, integers = quantize.inputs[0], quantize.outputs[0]
    assert source is not None
    readers = tuple(integers.uses())
    c, h, w = chw

    def step(op: str, inputs: list[ir.Value], suffix: str, like: ir.Value, perm: list[int] | None = None) -> ir.Value:
        out = ir.Value(name=f"{integers.name}_{suffix}", type=like.type)
        attributes = None if perm is None else {"perm": perm}
        graph.append(ir.node(op, inputs, attributes, outputs=[out], name=f"{quantize.name}_{suffix}"))
        return out

    def sizes(suffix: str, *dims: int) -> ir.Value:
        value = ir.Value(name=f"{integers.name}_{suffix}_shape", const_value=ir.tensor(np.array(dims, np.int64)))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(dims)])
        graph.register_initializer(value)
        return value

    rows = step("Transpose", [source], "nhwc", source, _TO_NHWC)
    flat = step("Reshape", [rows, sizes("flat", 0, h * w, c)], "flat", source)
    quantize.replace_input_with(0, flat)
    shaped = step("Reshape", [integers, sizes("rows", 0, h, w, c)], "rows", integers)
    back = step("Transpose", [shaped], "nchw", integers, _TO_NCHW)
    back.shape, integers.shape = integers.shape, None
    for node, i in readers:
        node.replace_input_with(i, back)
