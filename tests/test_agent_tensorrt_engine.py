"""Running and timing engines on the device, against the strict stand-ins: contracts, not numbers."""

import array
import struct
import sys
import types

import onnx
import pytest
from edgec.backends.agent import tensorrt_build, tensorrt_engine
from edgec.backends.agent.cudart import Cuda
from edgec.backends.agent.faults import Fault
from edgec.backends.agent.opened import Kernel
from edgec.backends.agent.tensors import Described, Tensor
from onnx import TensorProto, helper
from tensorrt_standin import VERSIONS, make
from tensorrt_standin.models import files

SHAPES = {"x": ([1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8])}


def silent(stage, done, total):
    pass


def floats(*shape):
    count = 1
    for size in shape:
        count *= size
    return Tensor("float32", list(shape), array.array("f", [n / 7 for n in range(count)]).tobytes())


class Bench:
    """A model built and opened in one version; `leave` checks that nothing stays behind and nothing went wrong."""

    def __init__(self, folder, version, precision="fp32", batch="N", shape=(2, 3, 8, 8), **options):
        self.folder, self.trt = folder, make(version, **options)
        self.cuda = Cuda(self.trt.standin.libcudart)
        weak, strong = files(folder, precision, batch)
        self.build(weak, strong, precision, SHAPES if batch == "N" else {})
        self.engine = self.open({"x": list(shape)})

    def build(self, weak, strong=None, precision="fp32", shapes=None):
        request = tensorrt_build.Request(weak, strong, precision, str(self.folder / "m.engine"), shapes or {})
        tensorrt_build.build(request, silent, self.trt, self.cuda)

    def open(self, shapes):
        return tensorrt_engine.open_engine(str(self.folder / "m.engine"), shapes, silent, self.trt, self.cuda)

    def leave(self, *allowed):
        self.engine.close()
        lib = self.trt.standin.libcudart
        assert self.trt.standin.violations == []
        assert [why for why in lib.why if not why.startswith(allowed or "-")] == []
        for table in (lib.device, lib.host, lib.streams, lib.events, lib.graphs, lib.executables):
            assert table == {}


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_runs(tmp_path, version, precision, batch):
    bench = Bench(tmp_path, version, precision, batch)
    one, given = bench.engine, floats(2, 3, 8, 8)
    assert one.provider == f"TensorRT {version}"
    assert one.inputs == [Described("x", "float32", [-1 if batch == "N" else 2, 3, 8, 8])]
    one.feed({"x": given})
    one.call()
    assert bench.trt.standin.seen == {"x": given.data}
    assert one.read() == {"y": Tensor("float32", [2, 4, 8, 8], bytes(2 * 4 * 64 * 4))}
    (ms,) = one.sample()
    assert ms == pytest.approx({"fp32": 1.0, "fp16": 0.6, "int8": 0.4}[precision])
    assert one.with_copies() == pytest.approx(ms)
    assert one.throughput(0.02) > 100
    assert "cudaGraphLaunch" in bench.trt.standin.libcudart.calls
    bench.leave()


def test_short_calls_are_timed_many_at_once(tmp_path):
    bench = Bench(tmp_path, "10.3.0", ms={"fp32": 0.011})
    bench.engine.feed({"x": floats(2, 3, 8, 8)})
    bench.engine.sample()
    before = bench.trt.standin.runs
    assert bench.engine.sample() == [pytest.approx(0.011)]
    assert bench.trt.standin.runs - before == 1 + 19  # one untimed, and 0.2 ms of them
    bench.leave()


def test_long_calls_are_timed_one_by_one(tmp_path):
    bench = Bench(tmp_path, "10.3.0")
    bench.engine.feed({"x": floats(2, 3, 8, 8)})
    bench.engine.sample()
    before = bench.trt.standin.runs
    bench.engine.sample()
    assert bench.trt.standin.runs - before == 2
    bench.leave()


@pytest.mark.parametrize("version", ["8.5.2", "11.1.0"])
def test_what_cannot_be_captured_is_enqueued(tmp_path, version):
    bench = Bench(tmp_path, version, capture_fails=True)
    bench.engine.feed({"x": floats(2, 3, 8, 8)})
    assert bench.engine.sample() == [pytest.approx(1.0)]
    assert bench.engine.with_copies() == pytest.approx(1.0)
    assert bench.trt.standin.libcudart.calls.count("cudaStreamBeginCapture") == 1
    assert "cudaGraphLaunch" not in bench.trt.standin.libcudart.calls
    bench.leave("cudaStreamEndCapture")


def test_new_shapes_are_captured_anew(tmp_path):
    bench = Bench(tmp_path, "10.3.0")
    lib = bench.trt.standin.libcudart
    for captured, batch in ((1, 2), (1, 2), (2, 4), (3, 1)):
        given = floats(batch, 3, 8, 8)
        bench.engine.feed({"x": given})
        bench.engine.call()
        assert bench.trt.standin.seen["x"] == given.data
        assert bench.engine.read()["y"].shape == [batch, 4, 8, 8]
        assert lib.calls.count("cudaStreamBeginCapture") == captured
    bench.leave()


def test_shapes_beyond_the_profile_are_refused(tmp_path):
    bench = Bench(tmp_path, "10.3.0")
    with pytest.raises(Fault, match=r"takes the input x as \[1, 3, 8, 8\] to \[4, 3, 8, 8\], not as \[5, 3, 8, 8\]"):
        bench.engine.feed({"x": floats(5, 3, 8, 8)})
    with pytest.raises(Fault, match="not given"):
        bench.engine.feed({})
    with pytest.raises(Fault, match="has 4 bytes"):
        bench.engine.feed({"x": Tensor("float32", [2, 3, 8, 8], b"1234")})
    bench.leave()
    bench = Bench(tmp_path, "10.3.0", batch=2)
    with pytest.raises(Fault, match=r"as \[2, 3, 8, 8\], not as \[1, 3, 8, 8\]"):
        bench.engine.feed({"x": floats(1, 3, 8, 8)})
    bench.leave()


def test_it_is_not_run_without_an_input(tmp_path):
    bench = Bench(tmp_path, "10.3.0")
    for act in (bench.engine.call, lambda: bench.engine.profile(1)):
        with pytest.raises(Fault, match="given no input"):
            act()
    bench.leave()


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_are_joined_to_nodes(tmp_path, version):
    bench = Bench(tmp_path, version)
    bench.engine.feed({"x": floats(2, 3, 8, 8)})
    kernels = bench.engine.profile(3)
    assert kernels == [
        Kernel("n_c1 + n_r1", ("n_c1", "n_r1"), pytest.approx(0.2)),
        Kernel("n_y", ("n_y",), pytest.approx(0.1)),
    ]
    assert bench.engine._context.profiler is None  # the one that is timed never has one
    bench.leave()


# ------------------------------------------------------------------------------------------------ types


def gathering(folder):
    """Write a model with INT64 in and out: y = table[i], j = i + 1."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (int64[3] i) => (float[3, 2] y, int64[3] j) {
      y = Gather (table, i)
      j = Add (i, one)
    }"""
    made = onnx.parser.parse_model(text)
    made.graph.initializer.append(helper.make_tensor("table", TensorProto.FLOAT, [4, 2], range(8)))
    made.graph.initializer.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
    onnx.save(made, folder / "i.onnx")
    return str(folder / "i.onnx")


@pytest.mark.parametrize(("version", "dtype"), [("8.6.2", "int32"), ("10.3.0", "int64")])
def test_the_engines_types_are_asked_for(tmp_path, version, dtype):
    bench = Bench(tmp_path, version)
    bench.leave()
    bench.build(gathering(tmp_path))
    one = bench.engine = bench.open({"i": [3]})
    assert one.inputs == [Described("i", dtype, [3])]
    one.feed({"i": Tensor("int64", [3], array.array("q", [1, -2, 3]).tobytes())})
    one.call()
    letter = {"int32": "i", "int64": "q"}[dtype]
    assert bench.trt.standin.seen["i"] == array.array(letter, [1, -2, 3]).tobytes()
    assert one.read()["j"].dtype == dtype
    if dtype == "int32":
        with pytest.raises(Fault, match="too large for int32"):
            one.feed({"i": Tensor("int64", [3], array.array("q", [1 << 40, 0, 0]).tobytes())})
    with pytest.raises(Fault, match="given as float32"):
        one.feed({"i": Tensor("float32", [3], bytes(12))})
    bench.leave()


def test_float32_becomes_float16_where_the_engine_takes_that(tmp_path):
    bench = Bench(tmp_path, "10.13.3")
    bench.leave()
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float16[2] x) => (float16[2] y) { y = Relu (x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "h.onnx")
    bench.build(str(tmp_path / "h.onnx"))
    one = bench.engine = bench.open({"x": [2]})
    one.feed({"x": Tensor("float32", [2], array.array("f", [1.5, -0.1]).tobytes())})
    one.call()
    assert bench.trt.standin.seen["x"] == struct.pack("<2e", 1.5, -0.1)
    with pytest.raises(Fault, match="too large for float16"):
        one.feed({"x": Tensor("float32", [2], array.array("f", [1e6, 0]).tobytes())})
    bench.leave()


def reshaping(folder):
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[2, 6] x, int64[2] shape) => (float[P, Q] y) { y = Reshape (x, shape) }"""
    onnx.save(onnx.parser.parse_model(text), folder / "s.onnx")
    return str(folder / "s.onnx")


@pytest.mark.parametrize("version", ["8.6.2", "10.3.0"])
def test_shape_tensors_lie_on_the_host_and_decide_shapes(tmp_path, version):
    bench = Bench(tmp_path, version)
    bench.leave()
    with pytest.raises(Fault, match="input shape"):
        bench.build(reshaping(tmp_path))
    bench.build(reshaping(tmp_path), shapes={"shape": ([1, 1], [3, 4], [12, 12])})
    one = bench.engine = bench.open({"x": [2, 6], "shape": [2]})
    for rows, columns in ((3, 4), (6, 2)):
        given = Tensor("int64", [2], array.array("q", [rows, columns]).tobytes())
        one.feed({"x": floats(2, 6), "shape": given})
        one.call()
        assert one.read()["y"].shape == [rows, columns]
    assert bench.trt.standin.libcudart.calls.count("cudaStreamBeginCapture") == 2
    bench.leave()


def test_outputs_that_depend_on_data_are_refused(tmp_path):
    bench = Bench(tmp_path, "10.3.0")
    bench.leave()
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[4] x) => (int64[1, K] y) { y = NonZero (x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "n.onnx")
    bench.build(str(tmp_path / "n.onnx"))
    with pytest.raises(Fault, match="depends on what is in the inputs"):
        bench.open({"x": [4]})
    bench.leave()


# ------------------------------------------------------------------------------------------------ other machines


@pytest.mark.parametrize(
    ("version", "options", "why"),
    [("8.6.2", {}, "Version tag"), ("10.3.0", {"sm": 8.9}, "incompatible device")],
)
def test_an_engine_of_another_machine_does_not_open(tmp_path, version, options, why):
    bench = Bench(tmp_path, "10.3.0")
    bench.leave()
    trt = make(version, **options)
    with pytest.raises(Fault, match=why) as caught:
        tensorrt_engine.open_engine(str(tmp_path / "m.engine"), {}, silent, trt, Cuda(trt.standin.libcudart))
    assert "build it again" in caught.value.fix
    assert trt.standin.libcudart.streams == {}


def test_a_damaged_engine_does_not_open(tmp_path):
    bench = Bench(tmp_path, "10.3.0")
    (tmp_path / "m.engine").write_bytes(b"half an eng")
    with pytest.raises(Fault, match="Magic tag"):
        bench.open({})
    bench.leave()


def test_a_device_without_memory_is_told(tmp_path):
    bench = Bench(tmp_path, "10.3.0")
    bench.trt.standin.libcudart.total = 100
    with pytest.raises(Fault, match="out of memory"):
        bench.engine.feed({"x": floats(4, 3, 8, 8)})
    bench.trt.standin.libcudart.total = 8 << 30
    bench.engine.feed({"x": floats(4, 3, 8, 8)})  # and it goes on
    bench.engine.call()
    bench.leave("cudaMalloc")


def test_int4_weights_and_fp8_run_too(tmp_path):
    for precision, shape in (("fp8", [2, 3, 8, 8]), ("int4", [2, 16])):
        bench = Bench(tmp_path, "10.13.3", precision, 2, shape, sm=8.9)
        bench.engine.feed({"x": floats(*shape)})
        bench.engine.call()
        bench.leave()


def test_the_dla_is_chosen_before_the_engine_is_read(tmp_path):
    bench = Bench(tmp_path, "8.6.2", dla_cores=2)
    bench.leave()
    path = str(tmp_path / "m.engine")
    bench.engine = tensorrt_engine.open_engine(path, {"x": [1, 3, 8, 8]}, silent, bench.trt, bench.cuda, dla_core=1)
    assert bench.engine._runtime.DLA_core == 1
    bench.leave()


@pytest.mark.parametrize("broken", [True, False])
def test_a_device_without_tensorrt_is_told_how_to_get_it(tmp_path, monkeypatch, broken):
    # None: import raises; an empty module: a wheel whose libraries are missing
    monkeypatch.setitem(sys.modules, "tensorrt", None if broken else types.ModuleType("tensorrt"))
    with pytest.raises(Fault, match="no TensorRT" if broken else "incomplete") as caught:
        tensorrt_engine.open_engine("m.engine", {}, silent)
    assert "install" in caught.value.fix
