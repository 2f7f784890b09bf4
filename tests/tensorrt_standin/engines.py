"""Engines of the stand-in: what they are tied to, their tensors, and calls that write zeros."""

import base64
import ctypes
import json
import os
import weakref

import onnx
from onnx import TensorProto

from .libcudart import ALIGNMENT, Refused
from .reading import name_of
from .tables import Bound, check

_MAGIC = b"STANDIN-ENGINE"
_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT32": 4, "INT64": 8, "UINT8": 1, "BOOL": 1, "FP8": 1}
#: A weight of more elements is left out of an engine: only shapes are computed from it.
_SMALL = 64


def serialized(trt, network, config):
    """Return an engine: what it is tied to, and the graph without its weights, from which shapes are computed."""
    reader = network._reader
    profile = config._profiles[0] if config._profiles else None
    bounds = {} if profile is None else {**profile._shapes, **profile._values}
    said = {
        "of": trt.standin.device(),
        "flags": config._flags,
        "strong": network._strong,
        "stored": sorted(reader.stored),
        "half": any(t.data_type == TensorProto.FLOAT16 for t in reader.graph.initializer),
        "inputs": [_said(one) for one in network._inputs],
        "outputs": [_said(one) for one in network._outputs],
        "bounds": bounds,
        "layers": _fused(reader.graph),
        "detailed": getattr(config.profiling_verbosity, "name", "") == "DETAILED",
        "graph": base64.b64encode(_light(reader.model).SerializeToString()).decode(),
    }
    return _MAGIC + json.dumps(said).encode()


def _said(one):
    return {"name": one.name, "dtype": one._dtype, "shape": one.shape, "host": one.is_shape_tensor}


def _light(model):
    light = onnx.ModelProto()
    light.CopyFrom(model)
    kept = [t for t in light.graph.initializer if _count(t.dims) <= _SMALL or t.data_type == TensorProto.INT64]
    left = [t for t in light.graph.initializer if t not in kept]
    light.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in left)
    del light.graph.initializer[:]
    light.graph.initializer.extend(kept)
    return light


def _fused(graph):
    """Return the layers of an engine as lists of node names: Relu and Add run with what is before them."""
    groups, of = [], {}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant"):
            continue
        before = next((of[name] for name in node.input if name in of), None)
        if node.op_type in ("Relu", "Add") and before is not None:
            before.append(name_of(node))
        else:
            before = [name_of(node)]
            groups.append(before)
        of.update(dict.fromkeys(node.output, before))
    return groups


def _count(shape):
    total = 1
    for size in shape:
        total *= size
    return total


class Runtime(Bound):
    engine_host_code_allowed, DLA_core = False, 0

    def __init__(self, logger):
        self._trt = type(self)._module
        self._trt.standin.check_logger(logger)
        self._engines = weakref.WeakSet()

    def deserialize_cuda_engine(self, serialized_engine):
        check(serialized_engine, (bytes, bytearray, memoryview), "deserialize_cuda_engine")
        content, standin = bytes(serialized_engine), self._trt.standin
        if not content.startswith(_MAGIC):
            standin.log("ERROR", "1: Error Code 1: Serialization (Magic tag does not match)")
            return None
        said = json.loads(content[len(_MAGIC) :])
        here = standin.device()
        if said["of"]["tensorrt"] != here["tensorrt"]:
            standin.log("ERROR", "1: Error Code 1: Serialization (Version tag does not match.)")
            return None
        if said["of"]["sm"] != here["sm"]:
            standin.log("ERROR", "6: The engine plan file is generated on an incompatible device")
            return None
        engine = self._trt.ICudaEngine(self._trt, said)
        self._engines.add(engine)
        return engine

    def __del__(self):
        if self._engines:
            self._trt.standin.violations.append("the runtime went before its engine")


class ICudaEngine(Bound):
    device_memory_size = device_memory_size_v2 = 1 << 20

    def __init__(self, trt, said):
        self._trt, self._said, self._contexts = trt, said, weakref.WeakSet()
        self._tensors = {one["name"]: one for one in (*said["inputs"], *said["outputs"])}
        self._inputs = {one["name"] for one in said["inputs"]}

    num_io_tensors = num_bindings = property(lambda self: len(self._tensors))
    num_layers = property(lambda self: len(self._said["layers"]))
    num_optimization_profiles = 1

    def get_tensor_name(self, index):
        check(index, int, "get_tensor_name")
        return list(self._tensors)[index]

    get_binding_name = get_tensor_name

    def _of(self, name):
        check(name, str, "get_tensor")
        return self._tensors[name]

    def get_tensor_mode(self, name):
        self._of(name)
        return self._trt.TensorIOMode.INPUT if name in self._inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return getattr(self._trt.DataType, self._of(name)["dtype"])

    def get_tensor_shape(self, name):
        return tuple(self._of(name)["shape"])

    def get_tensor_location(self, name):
        return self._trt.TensorLocation.HOST if self._of(name)["host"] else self._trt.TensorLocation.DEVICE

    def get_tensor_format(self, name):
        self._of(name)
        return self._trt.TensorFormat.LINEAR

    def is_shape_inference_io(self, name):
        return self._of(name)["host"]

    def get_tensor_profile_shape(self, name, profile_index):
        check(profile_index, int, "get_tensor_profile_shape")
        shape = tuple(self._of(name)["shape"])
        return [tuple(bound) for bound in self._said["bounds"].get(name, (shape, shape, shape))]

    def create_execution_context(self):
        made = self._trt.IExecutionContext(self._trt, self._said, self._tensors, self._inputs)
        self._contexts.add(made)
        return made

    def create_engine_inspector(self):
        return self._trt.EngineInspector(self._trt, self._said)

    def __del__(self):
        if self._contexts:
            self._trt.standin.violations.append("the engine went before its context")


class EngineInspector(Bound):
    execution_context = None

    def __init__(self, trt, said):
        self._trt, self._said = trt, said

    def get_engine_information(self, format):
        check(format, self._trt.LayerInformationFormat, "get_engine_information")
        version, said = self._trt.standin.version, self._said
        names = [" + ".join(group) for group in said["layers"]]
        if not said["detailed"]:
            return json.dumps({"Layers": names, "Bindings": list(said["inputs"])})
        layers = []
        for name, group in zip(names, said["layers"], strict=True):
            layer = {"Name": name, "LayerType": "CaskConvolution", "Inputs": [], "Outputs": []}
            if version >= (8, 6):
                layer["Metadata"] = "\x1e".join(f"[ONNX Layer: {one}]" for one in group)
            layers.append(layer)
        io = [one["name"] for one in (*said["inputs"], *said["outputs"])]
        rest = {"Bindings": io} if version < (11, 0) else {"I/O Tensors": [{"Name": one} for one in io]}
        # the real one does not escape the bytes between names
        return json.dumps({"Layers": layers, **rest}).replace("\\u001e", "\x1e")


class IExecutionContext(Bound):
    enqueue_emits_profile, profiler, all_shape_inputs_specified = True, None, True

    def __init__(self, trt, said, tensors, inputs):
        self._trt, self._said, self._tensors, self._inputs = trt, said, tensors, inputs
        self._shapes = {n: tuple(t["shape"]) for n, t in tensors.items() if n in inputs}
        self._addresses, self._warm, self._known = {}, False, None

    def _known_tensor(self, name, what):
        check(name, str, what)
        if name not in self._tensors:
            self._trt.standin.log("ERROR", f"{what}: there is no tensor {name}")
            return False
        return True

    def set_input_shape(self, name, shape):
        check(shape, (tuple, list), "set_input_shape")
        if not self._known_tensor(name, "set_input_shape") or name not in self._inputs:
            return False
        low, _, high = self._said["bounds"].get(name, [self._tensors[name]["shape"]] * 3)
        if len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            self._trt.standin.log("ERROR", f"set_input_shape: {shape} does not satisfy the profile of {name}")
            return False
        self._shapes[name], self._known, self._warm = tuple(shape), None, False
        return True

    def set_tensor_address(self, name, memory):
        check(memory, int, "set_tensor_address")
        if not self._known_tensor(name, "set_tensor_address"):
            return False
        if not self._tensors[name]["host"] and memory % ALIGNMENT:
            self._trt.standin.log("ERROR", f"set_tensor_address: {memory} is not aligned")
            return False
        self._addresses[name], self._warm = memory, False
        return True

    def get_tensor_shape(self, name):
        check(name, str, "get_tensor_shape")
        if name in self._inputs:
            return self._shapes[name]
        return self._outputs()[name]

    def infer_shapes(self):
        self._known = None  # the values of shape inputs may be others
        host = [n for n in self._inputs if self._tensors[n]["host"] and n not in self._addresses]
        return host + [n for n, shape in self._shapes.items() if -1 in shape]

    def _outputs(self):
        if self._known is None:
            self._known = self._computed()
        return self._known

    def _computed(self):
        """Compute the outputs' shapes from those of the inputs; -1 for what depends on data."""
        model = onnx.ModelProto.FromString(base64.b64decode(self._said["graph"]))
        for value in model.graph.input:
            if value.name in self._shapes:
                dims = value.type.tensor_type.shape.dim
                for dim, size in zip(dims, self._shapes[value.name], strict=True):
                    dim.Clear()
                    if size >= 0:
                        dim.dim_value = size
                if self._tensors[value.name]["host"] and value.name in self._addresses:
                    model.graph.initializer.append(self._values(value))
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        found = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
        told = {one["name"]: one["shape"] for one in self._said["outputs"]}
        shapes = {}
        for value in found:
            if not value.type.tensor_type.HasField("shape"):
                shapes[value.name] = tuple(-1 for _ in told[value.name])
            else:
                dims = value.type.tensor_type.shape.dim
                shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        return shapes

    def _values(self, value):
        kind = value.type.tensor_type.elem_type
        said = self._tensors[value.name]
        given = ctypes.string_at(self._addresses[value.name], _size(said["dtype"], self._shapes[value.name]))
        width = _BYTES[said["dtype"]]
        wide = [int.from_bytes(given[n : n + width], "little", signed=True) for n in range(0, len(given), width)]
        return onnx.helper.make_tensor(value.name, kind, self._shapes[value.name], wide)

    # ---------------------------------------------------------------------------------------- running

    def execute_async_v3(self, stream_handle):
        check(stream_handle, int, "execute_async_v3")
        standin = self._trt.standin
        if standin.options.crash == "run":
            os._exit(139)
        why = self._not_ready(stream_handle)
        if why:
            standin.log("ERROR", f"execute_async_v3: {why}")
            return False
        stream = standin.libcudart.streams[stream_handle]
        if stream.capturing and not self._warm:
            # the first call loads kernels and allocates: that spoils a capture
            stream.spoilt = True
            return False
        self._warm = True
        shapes = dict(self._shapes), self._outputs()
        addresses = dict(self._addresses)
        standin.libcudart.give(stream_handle, lambda: self._work(standin, addresses, *shapes))
        if self.profiler is not None and self.enqueue_emits_profile:
            standin.check_base(self.profiler, self._trt.IProfiler)
            standin.libcudart._run(stream)
            for group in self._said["layers"]:
                self.profiler.report_layer_time(" + ".join(group), 0.1 * len(group))
        return True

    def _not_ready(self, stream):
        cuda = self._trt.standin.libcudart
        if not stream:
            return "the default stream"
        if stream not in cuda.streams:
            return f"{stream} is no stream"
        for name, shape in self._shapes.items():
            if -1 in shape:
                return f"the shape of {name} is not set"
        outputs = self._outputs()
        for name, said in self._tensors.items():
            shape = self._shapes.get(name, outputs.get(name))
            if -1 in shape:
                return f"{name} needs an output allocator"
            address = self._addresses.get(name)
            if not address:
                return f"the address of {name} is not set"
            table = cuda.host if said["host"] else cuda.device
            if not cuda.holds(address, _size(said["dtype"], shape), table):
                return f"the memory of {name} is freed, too small or on the wrong side"
        return None

    def _work(self, standin, addresses, inputs, outputs):
        cuda = standin.libcudart
        standin.seen = {}
        for name, shape in inputs.items():
            size = _size(self._tensors[name]["dtype"], shape)
            if not cuda.holds(addresses[name], size, cuda.host if self._tensors[name]["host"] else cuda.device):
                raise Refused(700, f"the memory of {name} was freed")
            standin.seen[name] = ctypes.string_at(addresses[name], size)
        for name, shape in outputs.items():
            size = _size(self._tensors[name]["dtype"], shape)
            if not cuda.holds(addresses[name], size):
                raise Refused(700, f"the memory of {name} was freed")
            ctypes.memset(addresses[name], 0, size)
        cuda.now += standin.milliseconds(self._said)
        standin.runs += 1


def _size(dtype, shape):
    return _BYTES[dtype] * _count(shape)
