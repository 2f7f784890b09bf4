"""Networks and the ONNX parser of the stand-in."""

import os

import onnx
from onnx import TensorProto

from .reading import NotRead, Reader, name_of
from .tables import OPSET, Bound, check

_KINDS = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "CONVOLUTION",
    "Gemm": "MATRIX_MULTIPLY",
    "MatMul": "MATRIX_MULTIPLY",
    "Relu": "ACTIVATION",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
}
_TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}


class ITensor(Bound):
    dynamic_range = None

    def __init__(self, trt, name, shape, dtype, is_shape_tensor=False):
        self._trt, self._shape, self._dtype, self._is_shape = trt, tuple(shape), dtype, is_shape_tensor
        object.__setattr__(self, "name", name)

    @property
    def shape(self):
        return self._shape

    @property
    def dtype(self):
        return getattr(self._trt.DataType, self._dtype)

    @property
    def is_shape_tensor(self):
        return self._is_shape

    def set_dynamic_range(self, min, max):
        check(min, (int, float), "set_dynamic_range")
        if not min < 0 < max or min != -max:
            return False
        self.dynamic_range = (min, max)
        return True


class ILayer(Bound):
    def __init__(self, trt, node, outputs):
        self._trt, self._node, self._outputs = trt, node, outputs

    @property
    def name(self):
        return name_of(self._node)

    @property
    def metadata(self):
        return f"[ONNX Layer: {name_of(self._node)}]"

    @property
    def type(self):
        return getattr(self._trt.LayerType, _KINDS.get(self._node.op_type, "ELEMENTWISE"))

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_output(self, index):
        check(index, int, "get_output")
        return self._outputs[index]


class INetworkDefinition(Bound):
    """Filled by a parser; `_reader` has the model."""

    has_implicit_batch_dimension = False

    def __init__(self, trt, explicit, strong):
        self._trt, self._explicit, self._strong, self._reader = trt, explicit, strong, None
        self._inputs, self._outputs, self._layers = [], [], []

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index):
        check(index, int, "get_input")
        return self._inputs[index]

    def get_output(self, index):
        check(index, int, "get_output")
        return self._outputs[index]

    def get_layer(self, index):
        check(index, int, "get_layer")
        return self._layers[index]

    def _fill(self, reader):
        self._reader = reader
        constants = {t.name for t in reader.graph.initializer}
        made = {}

        def tensor(value, is_shape=False):
            kind = _TYPES[value.type.tensor_type.elem_type]
            if kind == "INT64" and self._trt.standin.version < (9, 0):
                kind = "INT32"
            dims = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
            return self._trt.ITensor(self._trt, value.name, dims, kind, is_shape)

        for value in reader.graph.input:
            if value.name not in constants:
                self._inputs.append(tensor(value, reader.is_shape(value.name)))
        self._outputs += [tensor(value) for value in reader.graph.output]
        made.update({t.name: t for t in (*self._inputs, *self._outputs)})
        for node in reader.graph.node:
            outputs = [made.setdefault(n, self._trt.ITensor(self._trt, n, (), "FLOAT")) for n in node.output if n]
            self._layers.append(self._trt.ILayer(self._trt, node, outputs))


class ParserError(Bound):
    def __init__(self, node, index, why):
        self._node, self._index, self._why = node, index, why

    def code(self):
        return 8

    def desc(self):
        return self._why

    def file(self):
        return "importers.cpp"

    def line(self):
        return 1

    def func(self):
        return "importNode"

    def node(self):
        return self._index

    def node_name(self):
        return "" if self._node is None else name_of(self._node)

    def node_operator(self):
        return "" if self._node is None else self._node.op_type

    def local_function_stack(self):
        return []


class OnnxParser(Bound):
    flags = 0

    def __init__(self, network, logger):
        trt = self._trt = type(self)._module
        check(network, trt.INetworkDefinition, "OnnxParser")
        trt.standin.check_logger(logger)
        self._network, self._logger, self._errors = network, logger, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index):
        check(index, int, "get_error")
        return self._errors[index]

    def clear_errors(self):
        self._errors.clear()

    def set_flag(self, flag):
        check(flag, self._trt.OnnxParserFlag, "set_flag")

    clear_flag = get_flag = set_flag

    def supports_model(self, model, path=None):
        raise NotImplementedError("not in the stand-in")

    def parse(self, model, path=None):
        """Read a model from memory; weights beside it only where its path is told."""
        check(model, (bytes, bytearray, memoryview), "parse")
        raise NotImplementedError("not in the stand-in")

    def parse_from_file(self, model):
        check(model, str, "parse_from_file")
        if not os.path.isfile(model):
            return self._stop(None, -1, f"Could not open file {model}")
        trt, network = self._trt, self._network
        if trt.standin.version < (10, 0) and not network._explicit:
            return self._stop(None, -1, "This version of the ONNX parser only supports networks with an explicit batch")
        newest = OPSET[trt.standin.version[:2]]
        reader = None
        try:
            reader = Reader(model, trt.standin.version, network._strong, newest)
            self._asked_to_fail(reader)
            reader.check()
        except NotRead as error:
            node = reader.graph.node[error.node] if reader is not None and error.node >= 0 else None
            return self._stop(node, error.node, error.why)
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            return self._stop(None, -1, str(error))
        for line in reader.warnings:
            trt.standin.log("WARNING", line)
        network._fill(reader)
        return True

    def _asked_to_fail(self, reader):
        wanted = self._trt.standin.options.parse_fails
        for index, node in enumerate(reader.graph.node):
            if wanted and name_of(node) == wanted:
                raise NotRead(index, "Assertion failed: this node was to fail")

    def _stop(self, node, index, why):
        self._errors.append(self._trt.ParserError(node, index, why))
        say = self._trt.standin.log
        if node is None:
            say("ERROR", f"ModelImporter.cpp:1: {why}")
        elif self._trt.standin.version < (9, 0):
            # these have no node_name(): the node's text in the log is all there is
            at = f'{index} [{node.op_type} -> "{node.output[0]}"]'
            say("ERROR", f"ModelImporter.cpp:1: While parsing node number {at}:")
            say("ERROR", "ModelImporter.cpp:2: --- Begin node ---")
            say("ERROR", f"ModelImporter.cpp:3: {node}")
            say("ERROR", "ModelImporter.cpp:4: --- End node ---")
            say("ERROR", f"ModelImporter.cpp:5: ERROR: {why}")
        else:
            say("ERROR", f"In node {index} with name: {name_of(node)} and operator: {node.op_type}: {why}")
        return False
