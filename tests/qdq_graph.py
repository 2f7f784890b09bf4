"""An ONNX file as the rules of TensorRT's artifacts look at it: who makes and who reads a tensor, constants, types.

Needs onnx and numpy only, nothing of edgec: what checks the compiler must not share its mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PAIR = ("QuantizeLinear", "DequantizeLinear")
#: What TensorRT fuses into the layer in front of it.
FUSED = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh")
SCALING = ("Add", "Mul", "Sub", "Div")
#: Data movement: Q moves backward and DQ forward through it.
COPIES = (
    "Cast", "Concat", "DepthToSpace", "Dropout", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip


class Node:
    """One node: its operator, what it reads and makes by name, its attributes."""

    def __init__(self, proto: onnx.NodeProto, index: int) -> None:
        self.proto, self.op, self.domain = proto, proto.op_type, proto.domain
        self.name = proto.name or f"{proto.op_type}_{index}"
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}

    def input(self, index: int) -> str:
        """Return the name of an input; "" where it has none."""
        return self.inputs[index] if index < len(self.inputs) else ""


class Graph:
    """The main graph of a file."""

    def __init__(self, path: Path) -> None:
        self.proto = onnx.load(path)
        self.opset = max((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
        self.nodes = [Node(proto, i) for i, proto in enumerate(self.proto.graph.node)]
        self.inputs = {value.name for value in self.proto.graph.input}
        self.outputs = {value.name for value in self.proto.graph.output}
        self.producer = {name: node for node in self.nodes for name in node.outputs if name}
        self.readers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for i, name in enumerate(node.inputs):
                self.readers.setdefault(name, []).append((node, i))

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        """Initializers that no input overrides, and what Constant gives."""
        found = {t.name: onnx.numpy_helper.to_array(t) for t in self.proto.graph.initializer}
        for node in self.nodes:
            if node.op == "Constant" and "value" in node.attributes:
                found[node.outputs[0]] = onnx.numpy_helper.to_array(node.attributes["value"])
        return {name: array for name, array in found.items() if name not in self.inputs}

    @cached_property
    def _infos(self) -> dict[str, onnx.TypeProto.Tensor]:
        graph = onnx.shape_inference.infer_shapes(self.proto, data_prop=True).graph
        infos = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.input, *graph.output)
                 if info.type.HasField("tensor_type")}  # fmt: skip
        for tensor in graph.initializer:
            infos[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
        return infos

    def type(self, name: str) -> int | None:
        """Return the ONNX element type of a tensor, None where it is unknown."""
        info = self._infos.get(name)
        return info.elem_type if info is not None and info.elem_type else None

    def shape(self, name: str) -> list[int | None] | None:
        """Return the shape of a tensor, dimensions of no fixed size as None; None where the rank is unknown."""
        info = self._infos.get(name)
        if info is None or not info.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else None for d in info.shape.dim]

    # ------------------------------------------------------------------------------------------ pairs

    def pairs(self) -> Iterator[Node]:
        """Yield every QuantizeLinear and DequantizeLinear."""
        yield from (node for node in self.nodes if node.op in PAIR)

    def is_weight(self, node: Node) -> bool:
        """Say whether a Q or DQ works on a constant, if through the other one."""
        name = node.input(0)
        maker = self.producer.get(name)
        if node.op == "DequantizeLinear" and maker is not None and maker.op == "QuantizeLinear":
            name = maker.input(0)
        return name in self.constants

    def dequantizer(self, node: Node, index: int) -> Node | None:
        """Return the DequantizeLinear from which the node reads this input, if it does."""
        maker = self.producer.get(node.input(index))
        return maker if maker is not None and maker.op == "DequantizeLinear" else None

    def quantizer(self, dequantize: Node) -> Node | None:
        """Return the QuantizeLinear in front of a DequantizeLinear."""
        maker = self.producer.get(dequantize.input(0))
        return maker if maker is not None and maker.op == "QuantizeLinear" else None

    def scale(self, node: Node | None) -> np.ndarray | None:
        """Return the scales of a Q or DQ, None where they are computed."""
        return None if node is None else self.constants.get(node.input(1))

    def quantized(self, layer: Node) -> bool:
        """Say whether a layer reads an activation from DequantizeLinear."""
        found = [self.dequantizer(layer, i) for i in range(2)]
        return layer.op in LAYERS and any(dq is not None and not self.is_weight(dq) for dq in found)

    # ------------------------------------------------------------------------------------------ ways

    def computed(self, node: Node) -> list[str]:
        """Return the inputs that are no constants."""
        return [name for name in node.inputs if name and name not in self.constants]

    def gated(self, node: Node) -> str | None:
        """Return x where the node is the product of x and Sigmoid(x), or HardSigmoid(x): SiLU and HardSwish."""
        if node.op != "Mul":
            return None
        for gate, name in zip(node.inputs, reversed(node.inputs), strict=True):
            maker = self.producer.get(gate)
            if maker is not None and maker.op in ("Sigmoid", "HardSigmoid") and maker.input(0) == name:
                return name
        return None

    def layer_behind(self, name: str) -> Node | None:
        """Return the layer whose result this is, read once, through nothing but what fuses with the layer."""
        readers = 1
        while name in self.producer and name not in self.outputs and len(self.readers.get(name, ())) <= readers:
            node = self.producer[name]
            if node.op in LAYERS:
                return node
            inner, readers = self.gated(node), 2
            if inner is None:
                fuses = node.op in FUSED or (node.op in SCALING and len(self.computed(node)) == 1)
                if not fuses:
                    return None
                inner, readers = self.computed(node)[0], 1
            name = inner
        return None

    def ahead(self, name: str, through: tuple[str, ...]) -> Iterator[tuple[Node, int]]:
        """Yield all readers of a tensor, and those behind operators named in `through` and SiLUs."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            name = todo.pop()
            for node, index in self.readers.get(name, ()):
                yield node, index
                passes = node.op in through and (node.op not in SCALING or len(self.computed(node)) == 1)
                if (passes or self.gated(node) is not None) and node.outputs[0] not in seen:
                    seen.update(node.outputs)
                    todo += node.outputs

    def hands_out(self, name: str) -> bool:
        """Say whether a tensor is a graph output, if behind a Cast."""
        readers = self.readers.get(name, ())
        return name in self.outputs or any(n.op == "Cast" and n.outputs[0] in self.outputs for n, _ in readers)

    def becomes_integer(self, name: str) -> bool:
        """Say whether a tensor is quantized, if behind what fuses and data movement."""
        return any(node.op == "QuantizeLinear" for node, _ in self.ahead(name, (*FUSED, *COPIES)))
