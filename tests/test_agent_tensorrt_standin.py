"""The stand-ins are strict: what a version does not have, or refuses, fails. Else the other tests prove nothing."""

import ctypes

import ml_dtypes
import numpy as np
import onnx
import pytest
from edgec.backends.agent.cudart import Cuda
from onnx import helper, numpy_helper
from tensorrt_standin import VERSIONS, make
from tensorrt_standin.models import model

NEW = ("10.3.0", "10.13.3", "11.1.0")


class Log:
    """A logger of one version, as a user writes it."""

    def __new__(cls, trt, call_base=True):
        class Logger(trt.ILogger):
            def __init__(self):
                self.lines = []
                if call_base:
                    trt.ILogger.__init__(self)

            def log(self, severity, msg):
                self.lines.append(f"{severity.name}: {msg}")

        return Logger()


def network_of(trt, file, *flags):
    """Parse a file; return the builder, the network, the parser, and whether it was read."""
    log = Log(trt)
    builder = trt.Builder(log)
    bits = 0
    for name in flags:
        bits |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    network = builder.create_network(bits)
    parser = trt.OnnxParser(network, log)
    return builder, network, parser, parser.parse_from_file(str(file)), log


def flags_for(version):
    return ("EXPLICIT_BATCH",) if version[0] == "8" else ()


def saved(folder, proto):
    onnx.save(proto, folder / "m.onnx")
    return folder / "m.onnx"


def edited(proto, name, array):
    """Exchange an initializer."""
    index = next(n for n, t in enumerate(proto.graph.initializer) if t.name == name)
    proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, name))
    return proto


def refusal(folder, version, proto, *flags):
    """Return why a version does not read a file, "" where it does."""
    trt = make(version)
    _, _, parser, read, _ = network_of(trt, saved(folder, proto), *flags_for(version), *flags)
    assert read == (parser.num_errors == 0)
    return "" if read else parser.get_error(0).desc()


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("version", "path"),
    [
        ("11.1.0", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("8.6.2", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
        ("11.1.0", "BuilderFlag.FP16"),
        ("11.1.0", "BuilderFlag.INT8"),
        ("11.1.0", "BuilderFlag.OBEY_PRECISION_CONSTRAINTS"),
        ("8.5.2", "BuilderFlag.FP8"),
        ("8.6.2", "BuilderFlag.INT4"),
        ("10.3.0", "BuilderFlag.STRICT_TYPES"),
        ("8.6.2", "BuilderFlag.ENABLE_TACTIC_HEURISTIC"),
        ("8.5.2", "IProgressMonitor"),
        ("8.6.2", "IProgressMonitor"),
        ("11.1.0", "IInt8EntropyCalibrator2"),
        ("8.5.2", "MemoryPoolType.TACTIC_DRAM"),
        ("10.3.0", "TilingOptimizationLevel"),
        ("8.5.2", "HardwareCompatibilityLevel"),
        ("8.6.2", "DataType.INT64"),
        ("10.3.0", "ProfilingVerbosity.VERBOSE"),
        ("10.3.0", "ICudaEngine.num_bindings"),
        ("10.3.0", "IExecutionContext.execute_async_v2"),
        ("10.3.0", "IExecutionContext.set_binding_shape"),
        ("10.3.0", "Builder.build_engine"),
        ("10.3.0", "IBuilderConfig.max_workspace_size"),
        ("11.1.0", "ITensor.set_dynamic_range"),
        ("11.1.0", "Builder.platform_has_fast_fp16"),
        ("11.1.0", "ICudaEngine.device_memory_size"),
        ("11.1.0", "OnnxParser.supports_model"),
        ("8.6.2", "ParserError.node_name"),
        ("8.5.2", "ILayer.metadata"),
        ("10.3.0", "no_such_name"),
    ],
)
def test_names_that_a_version_does_not_have(version, path):
    found = make(version)
    *first, last = path.split(".")
    for name in first:
        found = getattr(found, name)
    assert not hasattr(found, last)


@pytest.mark.parametrize("version", VERSIONS)
def test_names_that_all_have(version):
    trt = make(version)
    for path in ("BuilderFlag.TF32", "BuilderFlag.GPU_FALLBACK", "MemoryPoolType.WORKSPACE", "TensorLocation.HOST"):
        kind, name = path.split(".")
        assert int(getattr(getattr(trt, kind), name)) >= 0
    for name in ("set_input_shape", "set_tensor_address", "execute_async_v3", "infer_shapes"):
        assert hasattr(trt.IExecutionContext, name)


def test_flags_have_other_bits_in_11():
    old, new = make("10.13.3").NetworkDefinitionCreationFlag, make("11.1.0").NetworkDefinitionCreationFlag
    assert (int(old.EXPLICIT_BATCH), int(old.STRONGLY_TYPED)) == (0, 1)
    assert (int(new.STRONGLY_TYPED), int(new.PREFER_JIT_PYTHON_PLUGINS)) == (0, 1)
    with pytest.raises(TypeError):
        _ = 1 << old.STRONGLY_TYPED


def test_settings_that_a_version_does_not_have():
    trt = make("8.5.2")
    config = trt.Builder(Log(trt)).create_builder_config()
    with pytest.raises(AttributeError):
        config.builder_optimization_level = 3
    with pytest.raises(AttributeError):
        config.progress_monitor = None
    with pytest.raises(TypeError):
        config.set_flag(0)
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)
    with pytest.raises(TypeError):
        trt.Builder(Log(trt)).create_network(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    with pytest.raises(RuntimeError):
        trt.Builder(Log(trt)).create_network(1 << 7)


def test_a_logger_must_call_its_base():
    trt = make("10.3.0")
    with pytest.raises(TypeError):
        trt.Builder(Log(trt, call_base=False))
    trt.Builder(Log(trt))
    trt.Runtime(Log(trt))
    assert trt.standin.violations


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("version", VERSIONS)
def test_the_float32_file_is_read_by_all_and_the_float16_one_from_10_on(tmp_path, version):
    strong = ("STRONGLY_TYPED",) if version in NEW[:2] else ()
    if version != "11.1.0":
        assert refusal(tmp_path, version, model("int8")) == ""
    said = refusal(tmp_path, version, model("int8", half=True), *strong)
    assert said == "" if version in NEW else "newer than the parser reads" in said


def test_8_reads_float32_scales_only(tmp_path):
    half = model("int8", half=True)
    half.opset_import[0].version = 17
    for version in ("8.5.2", "8.6.2"):
        trt = make(version)
        _, _, parser, read, _ = network_of(trt, saved(tmp_path, half), "EXPLICIT_BATCH")
        assert not read and "float32" in parser.get_error(0).desc()


def test_8_wants_three_inputs(tmp_path):
    proto = model("int8")
    q = next(n for n in proto.graph.node if n.op_type == "QuantizeLinear")
    del q.input[2]
    # an ONNX Q without a zero point gives UINT8, so the DQ behind it must be without as well
    d = next(n for n in proto.graph.node if n.input[0] == q.output[0])
    del d.input[2]
    assert "inputs.size() == 3" in refusal(tmp_path, "8.6.2", proto)
    assert refusal(tmp_path, "10.3.0", proto) == ""


@pytest.mark.parametrize(
    ("array", "old", "new"),
    [
        (np.uint8(0), "UINT8", ""),
        (np.int8(3), "Non-zero zero point", "Non-zero zero point"),
        (np.zeros(2, np.int8), "different sizes", "different sizes"),
        (np.zeros((), ml_dtypes.float8_e4m3fn), "FLOAT8E4M3FN", ""),
    ],
)
def test_zero_points(tmp_path, array, old, new):
    proto = edited(model("int8"), "x_zero", np.asarray(array))
    assert old in refusal(tmp_path, "8.6.2", proto)
    proto.opset_import[0].version = 19
    said = refusal(tmp_path, "10.3.0", proto)
    assert new in said if new else said == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_scales(tmp_path, version):
    proto = model("int8", half=version == "11.1.0")
    dtype = np.float16 if version == "11.1.0" else np.float32
    first = "x_half_scale" if version == "11.1.0" else "x_scale"
    assert "positive" in refusal(tmp_path, version, edited(proto, first, np.asarray(0, dtype)))
    proto = model("int8", half=version == "11.1.0")
    edited(proto, first, np.full(3, 0.1, dtype))
    edited(proto, first.replace("scale", "zero"), np.zeros(3, np.int8))
    assert "weights only" in refusal(tmp_path, version, proto)


@pytest.mark.parametrize("version", ["8.5.2", "8.6.2"])
def test_8_takes_no_int8_initializer(tmp_path, version):
    proto = model("int8")
    q = next(n for n in proto.graph.node if n.input[0] == "w1")
    d = next(n for n in proto.graph.node if n.input[0] == q.output[0])
    edited(proto, "w1", np.ones((8, 3, 3, 3), np.int8))
    d.input[0] = "w1"
    proto.graph.node.remove(q)
    assert "activation types" in refusal(tmp_path, version, proto)
    assert refusal(tmp_path, "10.3.0", proto) == ""


@pytest.mark.parametrize("version", ["8.6.2", "10.3.0"])
def test_an_int32_bias_is_refused(tmp_path, version):
    proto = model("int8")
    conv = next(n for n in proto.graph.node if n.op_type == "Conv")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int32), "b"))
    proto.graph.initializer.append(numpy_helper.from_array(np.full(8, 0.1, np.float32), "b_scale"))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int32), "b_zero"))
    at = list(proto.graph.node).index(conv)
    proto.graph.node.insert(at, helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bias"], axis=0))
    next(n for n in proto.graph.node if n.op_type == "Conv").input.append("bias")
    assert "INT32" in refusal(tmp_path, version, proto)


def test_strong_typing_wants_types_that_agree(tmp_path):
    assert refusal(tmp_path, "10.13.3", model("int8", half=True), "STRONGLY_TYPED") == ""
    # a float32 scale gives a float32 DQ, which meets a float16 weight
    proto = edited(model("int8", half=True), "x_half_scale", np.asarray(0.1, np.float32))
    for version, flags in (("10.13.3", ("STRONGLY_TYPED",)), ("11.1.0", ())):
        assert refusal(tmp_path, version, proto, *flags)
    weights = edited(model("fp16", half=True), "w1", np.ones((8, 3, 3, 3), np.float32))
    assert "different types" in refusal(tmp_path, "11.1.0", weights)


def test_operators_of_quantized_graphs_are_refused(tmp_path):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]>
        g (uint8[2, 2] a, uint8[2, 2] b) => (int32[2, 2] y) { y = MatMulInteger (a, b) }"""
    )
    assert "MatMulInteger" in refusal(tmp_path, "10.3.0", proto)


def test_8_wants_an_explicit_batch(tmp_path):
    trt = make("8.6.2")
    _, _, parser, read, _ = network_of(trt, saved(tmp_path, model()))
    assert not read and "explicit batch" in parser.get_error(0).desc()


# ------------------------------------------------------------------------------------------------ building


def build(trt, file, flags, network_flags, shapes=True, **more):
    builder, network, parser, read, log = network_of(trt, file, *network_flags)
    assert read, parser.get_error(0).desc()
    config = builder.create_builder_config()
    for name in flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if shapes:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
        config.add_optimization_profile(profile)
    for name, value in more.items():
        setattr(config, name, value)
    plan = builder.build_serialized_network(network, config)
    return plan, [line for line in log.lines if line.startswith("ERROR")]


@pytest.mark.parametrize(
    ("version", "precision", "half", "flags", "network_flags", "why"),
    [
        ("8.6.2", "int8", False, ["FP16"], ["EXPLICIT_BATCH"], "INT8 is not set"),
        ("8.6.2", "fp32", False, ["INT8"], ["EXPLICIT_BATCH"], "Calibrator"),
        ("10.3.0", "int8", True, ["INT8", "FP16"], ["STRONGLY_TYPED"], "illegal in a strongly typed"),
        ("10.13.3", "fp16", True, ["FP16"], ["STRONGLY_TYPED"], "illegal in a strongly typed"),
        ("10.3.0", "fp8", False, ["INT8", "FP16"], [], "FP8 is not set"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, version, precision, half, flags, network_flags, why):
    plan, said = build(make(version, sm=8.9), saved(tmp_path, model(precision, half)), flags, network_flags)
    assert plan is None and why in said[0]


def test_a_dynamic_network_needs_a_profile(tmp_path):
    plan, said = build(make("10.3.0"), saved(tmp_path, model()), [], [], shapes=False)
    assert plan is None and "optimization profile" in said[0]


def test_a_monitor_that_says_no_stops_the_build(tmp_path):
    trt = make("10.3.0")

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name, parent_phase, num_steps):
            pass

        def step_complete(self, phase_name, step):
            return False

        def phase_finish(self, phase_name):
            pass

    plan, said = build(trt, saved(tmp_path, model()), [], [], progress_monitor=Monitor())
    assert plan is None and "cancelled" in said[0]


# ------------------------------------------------------------------------------------------------ running


class Opened:
    """An engine with its context in a stream, without addresses yet."""

    def __init__(self, folder, version="10.3.0"):
        self.trt = make(version)
        self.cuda = Cuda(self.trt.standin.libcudart)
        plan, _ = build(self.trt, saved(folder, model()), [], flags_for(version))
        self.log = self.trt.standin._loggers[0]
        self.runtime = self.trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(bytes(plan))
        self.context = self.engine.create_execution_context()
        self.stream = self.cuda.stream()

    def ready(self):
        assert self.context.set_input_shape("x", (1, 3, 8, 8))
        self.x, self.y = self.cuda.malloc(4 * 3 * 64), self.cuda.malloc(4 * 4 * 64)
        assert self.context.set_tensor_address("x", self.x) and self.context.set_tensor_address("y", self.y)
        return self

    def runs(self, stream=None):
        return self.context.execute_async_v3(self.stream if stream is None else stream)


def test_an_engine_runs_only_when_all_is_there(tmp_path):
    one = Opened(tmp_path)
    assert not one.runs() and "shape of x" in one.log.lines[-1]
    one.context.set_input_shape("x", (1, 3, 8, 8))
    assert not one.runs() and "address" in one.log.lines[-1]
    assert not one.context.set_tensor_address("x", 12345)
    assert not one.context.set_tensor_address("z", 256)
    one.ready()
    assert one.runs()
    assert not one.runs(0) and "default stream" in one.log.lines[-1]
    assert not one.runs(77)
    one.context.set_input_shape("x", (2, 3, 8, 8))
    assert not one.runs() and "too small" in one.log.lines[-1]
    assert not one.context.set_input_shape("x", (9, 3, 8, 8))
    with pytest.raises(TypeError):
        one.context.execute_async_v3(None)


def test_memory_that_was_freed_is_found(tmp_path):
    one = Opened(tmp_path).ready()
    one.cuda.free(one.y)
    assert not one.runs()


def test_a_first_call_spoils_a_capture(tmp_path):
    one = Opened(tmp_path).ready()
    assert one.cuda.capture(one.stream, one.runs) is None
    assert one.runs()
    graph = one.cuda.capture(one.stream, one.runs)
    assert graph
    one.cuda.free(one.x)
    with pytest.raises(Exception, match="illegal memory access"):
        one.cuda.launch(graph, one.stream)
        one.cuda.synchronize(one.stream)


def test_outputs_are_zeros_once_the_stream_was_waited_for(tmp_path):
    one = Opened(tmp_path).ready()
    one.runs()
    assert ctypes.string_at(one.y, 4) == b"\xcd" * 4
    one.cuda.synchronize(one.stream)
    assert ctypes.string_at(one.y, 4 * 4 * 64) == bytes(4 * 4 * 64)


@pytest.mark.parametrize("order", ["context engine runtime", "engine context runtime", "runtime context engine"])
def test_the_order_of_letting_go(tmp_path, order):
    one = Opened(tmp_path)
    for name in order.split():
        delattr(one, name)
    assert bool(one.trt.standin.violations) == (order != "context engine runtime")


def test_what_a_parser_and_a_builder_hand_out_is_of_the_version(tmp_path):
    trt = make("8.5.2")
    saved(tmp_path, model())
    _, network, _, _, _ = network_of(trt, tmp_path / "m.onnx", "EXPLICIT_BATCH")
    assert not hasattr(network.get_layer(0), "metadata")
    assert isinstance(network.get_input(0), trt.ITensor)
    _, _, parser, _, _ = network_of(trt, tmp_path / "none.onnx", "EXPLICIT_BATCH")
    assert not hasattr(parser.get_error(0), "node_name")
    trt = make("11.1.0")
    _, network, _, _, _ = network_of(trt, tmp_path / "m.onnx")
    assert not hasattr(network.get_input(0), "set_dynamic_range")
