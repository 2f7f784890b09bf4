"""Small ONNX files as TensorRT wants them: float32 with float32 scales for weak typing, float16 types for strong."""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = {"fp32": 13, "fp16": 13, "int8": 13, "fp8": 19, "int4": 21}
STORED = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn, "int4": ml_dtypes.int4}


class Graph:
    """Collects nodes; `half`: float16 between casts at the ends, with float16 scales."""

    def __init__(self, precision, half, opset):
        self.precision, self.half, self.opset = precision, half, opset
        self.nodes, self.constants = [], []
        self.dtype = np.float16 if half else np.float32

    def constant(self, name, array):
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"n_{output}", **attributes))
        return output

    def pair(self, value, scales=None, **attributes):
        """Put a Q/DQ pair behind a value; scales per channel where they are given."""
        stored = STORED[self.precision]
        scales = np.asarray(0.1 if scales is None else scales, self.dtype)
        scale = self.constant(f"{value}_scale", scales)
        zero = self.constant(f"{value}_zero", np.zeros(scales.shape, stored))
        q = self.node("QuantizeLinear", [value, scale, zero], f"{value}_q", **attributes)
        return self.node("DequantizeLinear", [q, scale, zero], f"{value}_dq", **attributes)

    def weight(self, name, array):
        if self.precision not in STORED:
            return self.constant(name, array.astype(self.dtype))
        channels = np.full(array.shape[0], 0.05)
        if self.precision == "int8":
            return self.pair(self.constant(name, array.astype(self.dtype)), channels, axis=0)
        stored = STORED[self.precision]
        scale = self.constant(f"{name}_scale", channels.astype(self.dtype))
        zero = self.constant(f"{name}_zero", np.zeros(channels.shape, stored))
        kept = self.constant(name, np.clip(array * 3, -7, 7).astype(stored))
        return self.node("DequantizeLinear", [kept, scale, zero], f"{name}_dq", axis=0)

    def activation(self, value):
        return self.pair(value) if self.precision in ("int8", "fp8") else value

    def model(self, x, y):
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def model(precision="fp32", half=False, batch="N"):
    """Return Conv-Relu-Conv, or for int4 MatMul-Relu-MatMul; input x, output y, float32 at both ends."""
    rng = np.random.default_rng(0)
    flat = precision == "int4"
    opset = max(OPSETS[precision], 19 if half else 13)
    made = Graph(precision, half, opset)
    shape = [batch, 16] if flat else [batch, 3, 8, 8]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 16] if flat else [batch, 4, 8, 8])
    value = made.node("Cast", ["x"], "x_half", to=TensorProto.FLOAT16) if half else "x"
    last = "y_half" if half else "y"
    if flat:
        value = made.node("MatMul", [value, made.weight("w1", rng.normal(size=(16, 16)))], "c1")
        value = made.node("Relu", [value], "r1")
        made.node("MatMul", [value, made.weight("w2", rng.normal(size=(16, 16)))], last)
    else:
        value = made.node(
            "Conv", [made.activation(value), made.weight("w1", rng.normal(size=(8, 3, 3, 3)))], "c1", pads=[1] * 4
        )
        value = made.activation(made.node("Relu", [value], "r1"))
        made.node("Conv", [value, made.weight("w2", rng.normal(size=(4, 8, 3, 3)))], last, pads=[1] * 4)
    if half:
        made.node("Cast", [last], "y", to=TensorProto.FLOAT)
    return made.model(x, y)


def files(folder, precision, batch="N"):
    """Write both files of a precision; return (weak, strong) as paths, strong None for fp32."""
    weak = folder / f"{precision}-{batch}.onnx"
    onnx.save(model(precision, False, batch), weak)
    if precision == "fp32":
        return str(weak), None
    strong = folder / f"{precision}-{batch}-float16.onnx"
    onnx.save(model(precision, True, batch), strong)
    return str(weak), str(strong)
