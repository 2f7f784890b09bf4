"""What an ONNX file must be for a TensorRT version to read it: the documented rules, applied to the file itself."""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
#: Operators whose inputs have one type in a strongly typed network.
AGREEING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Concat", "Max", "Min", "Pow")
REFUSED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
#: Inputs whose values are shapes: operator -> positions.
SHAPES = {"Reshape": (1,), "Expand": (1,), "Tile": (1,), "Slice": (1, 2, 4), "Resize": (3,), "ConstantOfShape": (0,)}


class NotRead(Exception):
    """A node that the parser stops at, and why. node -1: the file as a whole."""

    def __init__(self, node, why):
        super().__init__(why)
        self.node, self.why = node, why


def name_of(node):
    """The name that layers and messages give a node: one without a name gets one from its output."""
    return node.name or f"node_of_{node.output[0]}"


class Reader:
    """A model on its way into a network of one version."""

    def __init__(self, path, version, strong, newest_opset):
        self.version, self.strong = version, strong
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model)
        self.graph = self.model.graph
        self.opset = next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        if self.opset > newest_opset:
            raise NotRead(-1, f"opset {self.opset} is newer than the parser reads, {newest_opset}")
        self.constants = {t.name: t for t in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        self.values = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
        self.makers = {out: node for node in self.graph.node for out in node.output}
        self.warnings = []
        #: int8, float8, int4: what the Q/DQ nodes store
        self.stored = set()

    def type_of(self, name):
        if name in self.constants:
            return self.constants[name].data_type
        return self.values[name].elem_type if name in self.values else TensorProto.UNDEFINED

    def check(self):
        """Raise NotRead at the first node that breaks a rule."""
        initializers = {t.name for t in self.graph.initializer}
        for value in self.graph.input:
            if value.name not in initializers and value.type.tensor_type.elem_type == TensorProto.DOUBLE:
                raise NotRead(-1, f"the input {value.name} is of type DOUBLE")
        for index, node in enumerate(self.graph.node):
            why = self._refuses(node)
            if why:
                raise NotRead(index, why)

    def _refuses(self, node):
        if node.op_type in REFUSED:
            return f"No importer registered for op: {node.op_type}"
        if node.op_type == "QuantizeLinear":
            return self._zero_point(node) or self._scale(node) or self._quantized(node)
        if node.op_type == "DequantizeLinear":
            return self._zero_point(node) or self._scale(node) or self._dequantized(node)
        return self._types(node) if self.strong else None

    # ---------------------------------------------------------------------------------------- Q/DQ

    def _zero_point(self, node):
        old = self.version < (10, 0)
        if len(node.input) < 3 or not node.input[2]:
            if old:
                return "Assertion failed: inputs.size() == 3, a zero point is needed"
            self.warnings.append(f"{name_of(node)}: no zero point, INT8 is assumed")
            self.stored.add("int8")
            return None
        zero = self.constants.get(node.input[2])
        if zero is None:
            return "the zero point is not constant"
        kind = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8", TensorProto.INT4: "int4"}.get(zero.data_type)
        if zero.data_type == TensorProto.UINT8 and not old:
            self.warnings.append(f"{name_of(node)}: UINT8 zero point, taken as INT8")
            kind = "int8"
        if kind is None or (old and kind != "int8"):
            return f"zero points of type {TensorProto.DataType.Name(zero.data_type)} are not read"
        if np.any(numpy_helper.to_array(zero).astype(np.float32)):
            return "Non-zero zero point is not supported"
        scale = self.constants.get(node.input[1])
        if scale is not None and tuple(zero.dims) != tuple(scale.dims):
            return "the zero point and the scale have different sizes"
        self.stored.add(kind)
        return None

    def _scale(self, node):
        scale = self.constants.get(node.input[1])
        if scale is None:
            return "the scale is not constant"
        if self.version < (10, 0) and scale.data_type != TensorProto.FLOAT:
            return "the scale is read as float32, and it is of another type"
        values = numpy_helper.to_array(scale).astype(np.float32)
        if not (values > 0).all():
            return "Scale coefficients must all be positive"
        return self._layout(node, values)

    def _layout(self, node, values):
        if values.size == 1:
            return None
        shape = self._shape(node.input[0])
        if not self._is_weight(node.input[0]):
            return "scales per channel are for weights only"
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if values.ndim == 1:
            return None if shape[axis] == values.size else f"{values.size} scales for an axis of {shape[axis]}"
        blocked = [a for a, b in zip(values.shape, shape, strict=False) if a != b]
        if values.ndim != len(shape) or len(blocked) != 1 or self.opset < 21:
            return "the scales' shape fits neither an axis nor blocks"
        return None

    def _shape(self, name):
        if name in self.constants:
            return list(self.constants[name].dims)
        known = self.values.get(name)
        if known is not None and known.HasField("shape"):
            return [d.dim_value if d.HasField("dim_value") else -1 for d in known.shape.dim]
        maker = self.makers.get(name)
        return self._shape(maker.input[0]) if maker is not None else []

    def _is_weight(self, name):
        maker = self.makers.get(name)
        through = maker is not None and maker.op_type == "QuantizeLinear"
        return name in self.constants or (through and maker.input[0] in self.constants)

    def _quantized(self, node):
        if self.strong and self.type_of(node.input[0]) != self.type_of(node.input[1]):
            loose = self.version >= (11, 0) and self.type_of(node.input[1]) == TensorProto.FLOAT
            if not loose:
                return "the scale's type is not that of the input"
        return None

    def _dequantized(self, node):
        kind = self.type_of(node.input[0])
        if kind == TensorProto.INT32:
            return "INT32 is no input of DequantizeLinear"
        if self.version < (10, 0) and node.input[0] in self.constants:
            return "only activation types allowed as input to this layer"
        if node.input[0] in self.constants and kind == TensorProto.INT4 and self.constants[node.input[0]].dims[-1] % 2:
            return "INT4 needs an even last dimension"
        return None

    # ---------------------------------------------------------------------------------------- types

    def _types(self, node):
        if node.op_type not in AGREEING:
            return None
        kinds = {self.type_of(name) for name in node.input if name} - {TensorProto.UNDEFINED}
        if len(kinds) > 1:
            names = sorted(TensorProto.DataType.Name(kind) for kind in kinds)
            return f"the inputs of {node.op_type} are of different types: {', '.join(names)}"
        return None

    # ---------------------------------------------------------------------------------------- the network

    def is_shape(self, name):
        """Say whether a graph input is used as a shape: it lies on the host then."""
        return any(
            name in [node.input[n] for n in SHAPES.get(node.op_type, ()) if n < len(node.input)]
            for node in self.graph.node
        )

    def behind_dq(self, node):
        """Say whether a node reads a DequantizeLinear."""
        return any(self.makers[name].op_type == "DequantizeLinear" for name in node.input if name in self.makers)
