"""Engines that trtexec runs, against one that is none for each version: inputs, outputs, times, profiles."""

import json
import os
import struct
import sys

import fake_trtexec
import fake_trtexec_run
import pytest
from edgec.backends.agent import engines, tensorrt_rules, trtexec, trtexec_engine
from edgec.backends.agent.faults import Fault
from edgec.backends.agent.tensors import Tensor
from trtexec_bench import QUANTIZED, Bench, each_version, image


@pytest.fixture
def bench(tmp_path):
    return lambda version=(10, 3, 0), **how: Bench(tmp_path, version, **how)


# --------------------------------------------------------------------------------- opening, running


@each_version
def test_an_engine_says_what_it_reads_and_gives(bench, version):
    some = bench(version)
    some.build(
        body="{ y = Identity(x) z = Identity(n) }",
        x="float[N, 3] x, int64[2] n",
        y="float[N, 3] y, int64[2] z",
        shapes={"x": ([1, 3], [1, 3], [4, 3])},
    )
    one = some.open({"x": [2, 3], "n": [2]})
    whole = "int32" if version < (9,) else "int64"
    assert one.inputs == [("x", "float32", [-1, 3]), ("n", whole, [2])]
    assert one.outputs == [("y", "float32", [-1, 3]), ("z", whole, [2])]
    assert one.provider == f"TensorRT {tensorrt_rules.named(version)} by trtexec" and one.in_blocks
    one.feed({"x": image((2, 3)), "n": Tensor("int64", [2], struct.pack("<qq", 5, -6))})
    one.call()
    read = one.read()
    assert read["y"] == Tensor("float32", [2, 3], bytes(24))
    assert read["z"] == Tensor(whole, [2], bytes(8 if version < (9,) else 16))
    (run,) = some.calls("--exportOutput")
    assert "--shapes=x:2x3" in run and "--loadInputs=x:input-0.bin,n:input-1.bin" in run
    one.close()
    assert sorted(os.listdir(os.path.dirname(some.engine))) == ["m.engine", "m.engine.io.json"]


def test_values_reach_trtexec_in_the_engines_type(bench):
    some = bench((8, 5, 2))
    some.build(body="{ y = Identity(n) }", x="int64[2] n", y="int64[2] y")
    one = some.open()
    one.feed({"n": Tensor("int64", [2], struct.pack("<qq", 5, -6))})
    with open(os.path.join(one._folder, "input-0.bin"), "rb") as file:
        assert file.read() == struct.pack("<ii", 5, -6)


def test_a_new_feed_is_read_anew(bench):
    some = bench()
    some.build(x="float[N, 3] x", y="float[N, 3] y", shapes={"x": ([1, 3], [1, 3], [4, 3])})
    one = some.open()
    one.feed({"x": image((2, 3))})
    assert one.read()["y"].shape == [2, 3]
    one.feed({"x": image((4, 3))})
    assert one.read()["y"].shape == [4, 3]
    assert len(some.calls("--exportOutput")) == 2
    one.read()
    assert len(some.calls("--exportOutput")) == 2, "reading again runs nothing"


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "input x was not given"),
        ({"x": image((1, 3, 8))}, "has shape"),
        ({"x": image((1, 3, 8, 9))}, "has shape"),
        ({"x": Tensor("float32", [1, 3, 8, 8], b"\0" * 4)}, "bytes"),
    ],
)
def test_a_feed_that_does_not_fit_is_a_fault(bench, given, words):
    some = bench()
    some.build()
    with pytest.raises(Fault, match=words):
        some.open().feed(given)


def test_a_shape_outside_of_the_profile_is_a_fault(bench):
    some = bench()
    some.build(x="float[N, 3] x", y="float[N, 3] y", shapes={"x": ([1, 3], [1, 3], [4, 3])})
    one = some.open()
    with pytest.raises(Fault, match="no shape is given"):
        one.sample()
    one.feed({"x": image((5, 3))})
    with pytest.raises(Fault, match="outside of its optimization profile"):
        one.call()


def test_an_engine_of_another_version_or_unknown_is_refused(bench, tmp_path):
    some = bench((8, 5, 2))
    some.build()
    newer = fake_trtexec.make(tmp_path / "newer", (8, 6, 2))
    with pytest.raises(Fault, match="built by TensorRT 8.5.2, and here it is 8.6.2"):
        trtexec.open_engine(some.engine, {}, newer, 1.0)
    os.remove(some.engine + ".io.json")
    with pytest.raises(Fault, match="not known"):
        some.open()


def test_what_is_beside_an_engine_comes_back_as_it_was(tmp_path):
    kept = trtexec_engine.Beside([("x", "int4", [-1])], [], ["a"], (8, 2, 1), 0)
    kept.write(str(tmp_path / "e"))
    assert trtexec_engine.beside(str(tmp_path / "e")) == kept
    (tmp_path / "e.io.json").write_text('{"inputs": 3}')
    with pytest.raises(Fault, match="not known"):
        trtexec_engine.beside(str(tmp_path / "e"))


# ---------------------------------------------------------------------------------------- measuring


@each_version
def test_a_block_is_kernels_only_in_a_captured_graph_whatever_the_defaults(bench, version):
    some = bench(version, ms=2.0)
    some.build()
    one = some.open()
    one.feed({"x": image()})
    calls = one.sample()
    assert len(calls) == fake_trtexec_run.CALLS and max(calls) < 2.2, "warm-up left out, captured graph, no copies"
    (run,) = some.calls("--exportTimes")
    old = {"--useCudaGraph", "--useSpinWait", "--noDataTransfers"}
    assert set(run) & (old | {"--separateProfileRun"}) == (set() if version >= (11,) else old)
    assert {"--warmUp=500", "--duration=2", "--iterations=10"} <= set(run)
    assert not set(run) & {"--includeDataTransfers", "--noCudaGraph"}


@each_version
def test_copies_and_throughput_are_measured_apart(bench, version):
    some = bench(version, ms=2.0)
    some.build()
    one = some.open()
    assert one.with_copies() == pytest.approx(2.0 * 1.02 + 0.25 + 0.125)
    assert one.throughput(0.25) == 625.0
    copies, rate = some.calls("--exportTimes")
    assert ("--includeDataTransfers" in copies) == (version >= (11,)) and "--noDataTransfers" not in copies
    assert "--duration=1" in rate, "8.2 takes whole seconds"


@pytest.mark.parametrize("version", [(8, 2, 1), (10, 3, 0)])
def test_an_engine_that_cannot_be_captured_says_so(bench, version):
    some = bench(version, no_capture=True)
    some.build()
    one = some.open()
    assert "captured" not in one.provider
    one.sample()
    assert one.provider.endswith("without a captured graph")


@each_version
def test_a_profile_is_joined_to_the_nodes(bench, version):
    some = bench(version)
    some.build()
    one = some.open()
    found = one.profile(30)
    assert [kernel.nodes for kernel in found] == [("/Relu_0", "/Sigmoid_1"), ("/Neg_2",)]
    more = 0.01 if version < (8, 4) else 0.0
    assert [kernel.ms for kernel in found] == pytest.approx([0.1 + more, 0.2 + more]), "8.2 has means, the rest medians"
    (run,) = some.calls("--exportProfile")
    assert "--iterations=30" in run and "--useCudaGraph" not in run
    assert ("--separateProfileRun" in run) == (version < (11,))
    assert ("--noCudaGraph" in run) == (version >= (11,))


def test_weights_in_a_layers_name_are_no_nodes(bench):
    some = bench((8, 5, 2))
    some.build("int8", QUANTIZED)
    found = some.open().profile(10)
    assert found[0].name == "s + z + /QuantizeLinear_0 + /DequantizeLinear_1"
    assert found[0].nodes == ("/QuantizeLinear_0", "/DequantizeLinear_1")


def test_nodes_come_from_names_where_the_layers_cannot_be_read(bench, monkeypatch):
    some = bench((8, 5, 2))
    some.build()
    one = some.open()
    monkeypatch.setattr(one, "_nodes", lambda: {})
    assert [kernel.nodes for kernel in one.profile(10)] == [("/Relu_0", "/Sigmoid_1"), ("/Neg_2",)]


def test_an_engine_that_is_damaged_does_not_run(bench):
    some = bench()
    some.build()
    with open(some.engine, "w") as file:
        file.write("no engine")
    with pytest.raises(Fault, match="failed at measuring: .*magicTag"):
        some.open().sample()


def test_engines_uses_it_where_there_is_no_module(bench, tmp_path, monkeypatch):
    some = bench((8, 2, 1))
    request = some.request("fp16")
    monkeypatch.setenv("PATH", os.path.dirname(some.binary))
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it raises ImportError
    model = {"name": "m", "files": {"weak": request.weak}, "options": {"precision": "fp16"}}
    job = {"engines": str(tmp_path / "kept"), "feed": {"x": {"shape": [1, 3, 8, 8]}}}
    one = engines.open_model(model, job, lambda *_: None)
    assert one.facts["built"]["with"] == "trtexec" and one.facts["built"]["flags"] == ["FP16"]
    one.feed({"x": image()})
    assert len(one.sample()) == fake_trtexec_run.CALLS
    again = engines.open_model(model, job, lambda *_: None)
    assert again.facts == json.loads(json.dumps(one.facts)) and len(some.calls("--onnx")) == 1, "it is built once"
