"""What a node's latency depends on: its family, and how much it reads and writes of what a cut makes smaller.

Two nodes of one family differ in their channels alone: they have the same operator, kernel, strides and positions, and
hand their result to the same kinds of readers (a Conv that a Concat reads has its output brought to another layout).
`inputs` and `outputs` are channels for layers with a weight, elements per position for everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes.shapes import infer_shapes
from ..layers import LINEAR

#: What a runtime computes in the kernel before it: readers behind it are the ones that count.
ACTIVATIONS = frozenset(("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"))
_PLACED = ("kernel_shape", "strides", "dilations", "pads", "auto_pad", "ceil_mode", "axis", "perm", "mode")


@dataclass(frozen=True)
class Port:
    """A tensor that a node reads or writes, and how much of it there is: channels, or elements per position."""

    tensor: str
    amount: float


@dataclass(frozen=True)
class Shape:
    """A node of a network: its family, and what it reads and writes. Constants are part of the family."""

    node: str
    family: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def amounts(self, left: Mapping[str, float]) -> tuple[float, float]:
        """Return how much is read and written where the part `left` of a tensor is (1 if not named)."""
        return _amount(self.inputs, left), _amount(self.outputs, left)


def _amount(ports: Sequence[Port], left: Mapping[str, float]) -> float:
    return sum(port.amount * left.get(port.tensor, 1.0) for port in ports)


def name_of(node: ir.Node) -> str:
    """Return the name that everything here knows a node by."""
    return node.name or node.outputs[0].name or node.op_type


def on_input(model: ir.Model, feed: Mapping[str, np.ndarray]) -> ir.Model:
    """Return a twin of the model with the shapes that its tensors have on this input, as far as they are known."""
    twin = model.clone()
    for value in twin.graph.inputs:
        if value.name and value.name in feed:
            value.shape = ir.Shape(feed[value.name].shape)
    twin.graph.outputs.clear()  # their declared shapes would stay as they are
    infer_shapes(twin)
    return twin


def shapes(model: ir.Model, feed: Mapping[str, np.ndarray], axes: Mapping[str, int] | None = None) -> tuple[Shape, ...]:
    """Return the shape of each node of the main graph that computes on `feed`, in the graph's order.

    `axes`: along which axis a tensor may be cut, by its name; that of channels if not named. Nodes whose lengths
    remain unknown (they depend on more than the inputs' shapes) are left out. The model stays.
    """
    found = (_shape(node, axes or {}) for node in on_input(model, feed).graph)
    return tuple(shape for shape in found if shape is not None)


def _shape(node: ir.Node, axes: Mapping[str, int]) -> Shape | None:
    reads = [value for value in node.inputs if value is not None and value.const_value is None]
    writes = [value for value in node.outputs if value.name]
    dims = {value: _dims(value) for value in (*reads, *writes)}
    if not reads or not writes or any(lengths is None for lengths in dims.values()):
        return None
    known = {value: lengths for value, lengths in dims.items() if lengths is not None}
    if node.op_type in LINEAR and len(reads) == 1:
        facts, axis = _of_layer(node, known[reads[0]], known[writes[0]])
        amounts = {value: float(lengths[axis]) for value, lengths in known.items()}
        placed = [key for key in _PLACED if key != "kernel_shape"]  # a layer's family has it already
    else:
        places = _positions(known[writes[0]], axes.get(writes[0].name or ""))
        facts = {"of": len(reads), "at": places}
        amounts = {value: math.prod(lengths) / max(math.prod(places), 1) for value, lengths in known.items()}
        placed = list(_PLACED)
    facts |= {key: _text(node.attributes[key]) for key in placed if key in node.attributes}
    if reads[0].dtype == ir.DataType.FLOAT16:
        facts["type"] = "float16"
    facts["read by"] = "+".join(sorted(_readers(writes[0]))) or "output"
    family = " ".join([node.op_type, *(f"{key}={value}" for key, value in facts.items())])
    ports = [tuple(Port(v.name or "", amounts[v]) for v in values) for values in (reads, writes)]
    return Shape(name_of(node), family, *ports)


def _of_layer(node: ir.Node, read: Sequence[int], written: Sequence[int]) -> tuple[dict[str, object], int]:
    """Return what is fixed of a layer, and the axis of its channels."""
    if node.op_type in ("Gemm", "MatMul"):
        return {"rows": math.prod(written[:-1])}, -1
    weight, groups = node.inputs[1], node.attributes.get_int("group", 1) or 1
    assert weight is not None and weight.shape is not None
    each = 0 if groups == 1 else read[1] // groups  # channels of a group stay where whole groups are cut
    return {"k": tuple(weight.shape.numpy()[2:]), "each": each, "from": tuple(read[2:]), "at": tuple(written[2:])}, 1


def _positions(written: Sequence[int], axis: int | None) -> tuple[int, ...]:
    """Return the lengths that no cut changes: all but the batch and the axis of channels."""
    if axis is None:
        axis = 1 if len(written) > 3 else len(written) - 1
    return tuple(length for i, length in enumerate(written) if i not in (0, axis % max(len(written), 1)))


def _readers(value: ir.Value) -> set[str]:
    found = set[str]()
    for reader, _ in value.uses():
        deeper = reader.op_type in ACTIVATIONS and len(reader.outputs) == 1
        found |= _readers(reader.outputs[0]) if deeper else {reader.op_type}
    return found


def _dims(value: ir.Value) -> tuple[int, ...] | None:
    if value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        return None
    return tuple(value.shape.numpy())


def _text(attribute: ir.Attr) -> str:
    value = attribute.value
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
