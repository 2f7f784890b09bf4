"""Engines built by trtexec, against one that is none for each version: flags, files, faults."""

import os
import sys
import time

import fake_trtexec
import onnx
import pytest
from edgec.backends.agent import tensorrt_rules, trtexec, trtexec_run
from edgec.backends.agent.faults import Fault
from trtexec_bench import PLAIN, QUANTIZED, WEAK, Bench, each_version, image


@pytest.fixture
def bench(tmp_path):
    return lambda version=(10, 3, 0), **how: Bench(tmp_path, version, **how)


# --------------------------------------------------------------------------------------- what it is


@each_version
def test_version_and_gpu_are_told(bench, version):
    some = bench(version, sm=7.2, memory=3956)
    assert trtexec.version(some.binary) == version
    assert trtexec_run.device(some.binary) == (version, (7, 2), "Orin", 3956)


def test_it_is_found_on_the_path_and_where_nvidia_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(trtexec_run, "PLACES", (str(tmp_path / "src" / "trtexec"),))
    assert trtexec.find() is None
    there = fake_trtexec.make(tmp_path / "src", (8, 2, 1))
    assert trtexec.find() == there
    first = fake_trtexec.make(tmp_path / "path", (8, 2, 1))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert trtexec.find() == first


def test_no_gpu_is_a_fault_and_so_is_no_program(bench, tmp_path):
    with pytest.raises(Fault, match="looking for the GPU"):
        bench(no_gpu=True).build()
    with pytest.raises(Fault, match="cannot be started"):
        trtexec.version(str(tmp_path / "missing"))
    with pytest.raises(Fault, match="telling its version"):
        trtexec.version(sys.executable)


# ----------------------------------------------------------------------------------------- building

PRECISIONS = {
    "fp32": ([], PLAIN),
    "fp16": (["--fp16"], PLAIN),
    "int8": (["--fp16", "--int8"], QUANTIZED),
}


@each_version
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("moving", [False, True], ids=["static", "dynamic"])
def test_each_version_builds_by_its_own_flags(bench, version, precision, moving):
    some, (flags, body) = bench(version), PRECISIONS[precision]
    size = "N" if moving else "1"
    shapes = {"x": ([1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]), "other": ([1], [1], [1])}
    built = some.build(precision, body, f"float[{size}, 3, 8, 8] x", f"float[{size}, 3, 8, 8] y", shapes=shapes)
    given = some.built_with()
    weak = version in WEAK
    assert sorted(set(given) & {"--fp16", "--int8", "--fp8", "--int4", "--best"}) == (flags if weak else [])
    assert ("--stronglyTyped" in given) == (version == (10, 13, 3))
    assert os.path.basename(given["--onnx"]) == ("weak" if weak or precision == "fp32" else "strong") + ".onnx"
    assert ("--skipInference" in given) == (version >= (8, 6)) and ("--buildOnly" in given) == (version < (8, 6))
    assert given["--profilingVerbosity"] == "detailed" and "--calib" not in given
    said = {flag: given.get(flag) for flag in ("--minShapes", "--optShapes", "--maxShapes")}
    wanted = ("x:1x3x8x8", "x:2x3x8x8", "x:4x3x8x8") if moving else (None, None, None)
    assert tuple(said.values()) == wanted
    assert built.version == tensorrt_rules.named(version) and built.typing == ("weak" if weak else "strong")
    assert built.engine == some.engine and built.size == os.path.getsize(some.engine) and built.seconds == 12.5
    assert sorted("--" + flag.lower() for flag in built.flags) == (flags if weak else [])
    assert not [line for line in built.warnings if "Dynamic dimensions" in line]
    assert "[TRT] a warning of the builder" in built.warnings
    assert [stage for stage, _, _ in some.told] == [
        "looking for the GPU",
        "parsing the ONNX file",
        "timing kernels",
        "engine built",
    ]
    assert sorted(os.listdir(os.path.dirname(some.engine))) == ["m.engine", "m.engine.io.json"], "nothing else is left"


def test_strong_typing_can_be_asked_for_where_it_exists(bench):
    some = bench((10, 3, 0))
    assert some.build("fp16", typing="strong").source.endswith("strong.onnx")
    assert "--stronglyTyped" in some.built_with() and "--fp16" not in some.built_with()


def test_strong_typing_before_9_is_a_fault(bench):
    with pytest.raises(Fault, match="no strong typing"):
        bench((8, 6, 2)).build("fp16", typing="strong")


@pytest.mark.parametrize("version, sm", [((8, 2, 1), 5.3), ((8, 2, 1), 6.2)])
def test_int8_is_refused_where_the_gpu_has_none(bench, version, sm):
    some = bench(version, sm=sm)
    with pytest.raises(Fault, match="INT8 needs compute capability 7.2") as caught:
        some.build("int8", QUANTIZED)
    assert "fp16" in caught.value.fix and not some.calls("--onnx")


def test_fp8_is_refused_below_8_9_and_built_from_there(bench, tmp_path):
    with pytest.raises(Fault, match="FP8 needs compute capability 8.9"):
        bench((10, 3, 0), sm=8.7).build("fp8", QUANTIZED)
    other = Bench(tmp_path / "ada", (10, 3, 0), sm=8.9)
    other.build("fp8", QUANTIZED)
    assert {"--fp8", "--fp16"} <= set(other.built_with()) and "--int8" not in other.built_with()


def test_int8_without_qdq_leaves_the_flag_out_and_says_so(bench):
    some = bench((8, 6, 2))
    built = some.build("int8", PLAIN)
    assert "--int8" not in some.built_with() and built.flags == ["FP16"]
    assert any("no Q/DQ" in line for line in built.warnings)


def test_qdq_that_was_not_asked_for_is_a_fault(bench):
    with pytest.raises(Fault, match="is quantized, and fp16 was asked for"):
        bench((8, 6, 2)).build("fp16", QUANTIZED)


def test_an_open_input_without_shapes_is_a_fault(bench):
    with pytest.raises(Fault, match="input x has an open dimension"):
        bench().build(x="float[N, 3] x", y="float[N, 3] y")


@pytest.mark.parametrize("name", ["a,b", "it's"])
def test_names_that_trtexec_would_cut_are_faults(bench, name):
    some = bench()
    request = some.request(x="float[N, 3] x", y="float[N, 3] y", shapes={name: ([1, 3], [1, 3], [1, 3])})
    model = onnx.load(request.weak)
    model.graph.input[0].name = model.graph.node[0].input[0] = name
    onnx.save(model, request.weak)
    with pytest.raises(Fault, match="comma or a quote"):
        trtexec.build(request, lambda *_: None, some.binary)


def test_names_with_colons_are_told(bench):
    some = bench()
    request = some.request(x="float[N, 3] x", y="float[N, 3] y", shapes={"serve:0": ([1, 3], [1, 3], [2, 3])})
    model = onnx.load(request.weak)
    model.graph.input[0].name = model.graph.node[0].input[0] = "serve:0"
    onnx.save(model, request.weak)
    trtexec.build(request, lambda *_: None, some.binary)
    assert some.built_with()["--maxShapes"] == "serve:0:2x3"
    one = some.open({"serve:0": [2, 3]})
    one.feed({"serve:0": image((2, 3))})
    one.call()


# ----------------------------------------------------------------------------------- memory, effort


@each_version
def test_workspace_is_told_in_mib_by_the_versions_own_flag(bench, version):
    some = bench(version)
    some.build(workspace=(3 << 30) // 2)
    given = some.built_with()
    if version < (8, 4):
        assert given["--workspace"] == "1536" and "--memPoolSize" not in given
    else:
        assert given["--memPoolSize"] == "workspace:1536" and "--workspace" not in given


@pytest.mark.parametrize(
    "version, shared, wanted",
    [
        ((8, 2, 1), None, "--workspace=989"),  # 16 MiB would be its own
        ((10, 3, 0), None, None),  # all of a card's memory, its own
        ((10, 3, 0), 3000, "--memPoolSize=workspace:989"),  # a quarter of a board's
        ((10, 3, 0), 900, "--memPoolSize=workspace:450"),  # half of what is free
        ((8, 2, 1), 20, "--workspace=64"),
    ],
)
def test_workspace_that_is_not_told_follows_the_memory(bench, monkeypatch, version, shared, wanted):
    monkeypatch.setattr(trtexec, "_shared_memory", lambda: shared)
    some = bench(version, memory=3956)
    some.build()
    (arguments,) = some.calls("--onnx")
    assert [one for one in arguments if one.startswith(("--workspace", "--memPoolSize"))] == (
        [wanted] if wanted else []
    )


def test_free_memory_is_read_on_a_jetson_only(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4000000 kB\nMemAvailable:  2097152 kB\n")
    assert trtexec._shared_memory(str(tmp_path)) is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R32 (release), REVISION: 7.4\n")
    assert trtexec._shared_memory(str(tmp_path)) == 2048


def test_effort_is_told_from_8_6_on(bench, tmp_path):
    some = bench((8, 6, 2))
    some.build(level=5)
    assert some.built_with()["--builderOptimizationLevel"] == "5"
    older = Bench(tmp_path / "older", (8, 5, 2))
    assert any("no optimisation levels" in line for line in older.build(level=5).warnings)


# ------------------------------------------------------------------------------------- timing cache


@each_version
def test_a_timing_cache_is_read_and_kept(bench, version, tmp_path):
    some, cache = bench(version), tmp_path / "timing.cache"
    first = some.build(timing_cache=str(cache))
    assert cache.read_text().count("one more build") == 1 and not [w for w in first.warnings if "cache" in w]
    some.build(timing_cache=str(cache))
    assert cache.read_text().count("one more build") == 2, "the second build knew the first one's times"
    assert not (tmp_path / "timing.cache.part").exists()


@each_version
def test_a_timing_cache_of_another_version_is_begun_anew(bench, version, tmp_path):
    some, cache = bench(version), tmp_path / "timing.cache"
    cache.write_bytes(b"\x00\xffnot one of ours")
    built = some.build(timing_cache=str(cache))
    assert cache.read_text() == f"timings of {'.'.join(map(str, version))}\none more build\n"
    assert any("begun anew" in line for line in built.warnings) and len(some.calls("--onnx")) == 2


def test_a_failure_that_is_not_the_old_caches_is_not_tried_again(bench, tmp_path):
    some = bench(no_kernel="/timing cache/Conv")
    with pytest.raises(Fault):
        some.build(timing_cache=str(tmp_path / "timing.cache"))
    assert len(some.calls("--onnx")) == 1 and not (tmp_path / "timing.cache").exists()


def test_an_engine_that_is_there_is_replaced_whole(bench):
    some = bench()
    some.build()
    with open(some.engine) as old:
        some.build(workspace=64 << 20, x="float[1, 2] x", y="float[1, 2] y")
        assert "[1, 3, 8, 8]" in old.read(), "whoever reads the old one goes on reading it"
    with open(some.engine) as new:
        assert "[1, 3, 8, 8]" not in new.read()


def test_a_failed_build_leaves_the_cache_as_it_was(bench, tmp_path):
    some, cache = bench(no_kernel="/Relu_0"), tmp_path / "timing.cache"
    cache.write_text("timings of 10.3.0\n")
    with pytest.raises(Fault):
        some.build(timing_cache=str(cache))
    assert cache.read_text() == "timings of 10.3.0\n" and len(some.calls("--onnx")) == 1


# ----------------------------------------------------------------------------------------- failures


@each_version
def test_a_node_that_cannot_be_read_is_named(bench, version):
    some = bench(version, parse="/Sigmoid_1")
    with pytest.raises(Fault) as caught:
        some.build()
    assert caught.value.nodes == ["/Sigmoid_1"]
    assert "/Sigmoid_1 (Sigmoid)" in caught.value.what and "told to stop here" in caught.value.what
    assert os.listdir(os.path.dirname(some.engine)) == [], "no half engine, no folder"


@each_version
@pytest.mark.parametrize(
    "layer, nodes",
    [
        ("/Relu_0 + /Sigmoid_1", ["/Relu_0", "/Sigmoid_1"]),
        ("{ForeignNode[/Relu_0.../Neg_2]}", ["/Relu_0", "/Sigmoid_1", "/Neg_2"]),
    ],
)
def test_layers_without_a_kernel_are_traced(bench, version, layer, nodes):
    with pytest.raises(Fault) as caught:
        bench(version, no_kernel=layer).build()
    assert caught.value.nodes == nodes and "implementation" in caught.value.what and caught.value.fix


def test_a_build_that_is_killed_says_so(bench):
    with pytest.raises(Fault, match="signal 9") as caught:
        bench(signal=9).build()
    assert "memory" in caught.value.fix


def test_whoever_stops_listening_ends_the_build(bench):
    some = bench()

    def tell(stage, *_):
        if stage == "timing kernels":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trtexec.build(some.request(), tell, some.binary)
    assert os.listdir(os.path.dirname(some.engine)) == []


def test_a_run_that_is_not_waited_for_is_killed(tmp_path):
    binary = tmp_path / "trtexec"
    binary.write_text(f"#!{sys.executable}\nimport os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    binary.chmod(0o755)
    heard = []

    def stop(line):
        heard.append(int(line))
        raise Fault("enough")

    start = time.monotonic()
    with pytest.raises(Fault, match="enough"):
        trtexec_run.run([str(binary)], str(tmp_path), stop)
    assert time.monotonic() - start < 30, "it is not waited for"
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)


# ---------------------------------------------------------------------------------------------- DLA


def test_dla_in_fp16(bench):
    some = bench((8, 5, 2), dla=2)
    some.build("fp16", dla_core=1)
    given = some.built_with()
    assert given["--useDLACore"] == "1" and {"--allowGPUFallback", "--fp16"} <= set(given)
    assert not {"--int8", "--calib"} & set(given)
    one = some.open()
    one.sample()
    (times,) = some.calls("--exportTimes")
    assert "--useDLACore=1" in times and "--useCudaGraph" not in times


@pytest.mark.parametrize("version", [(8, 2, 1), (10, 3, 0)])
def test_dla_in_int8_takes_scales_instead_of_qdq(bench, version):
    some = bench(version, dla=1, sm=7.2)
    built = some.build("int8", dla_core=0, ranges={"x": 0.25, "y:0": 1e-3})
    assert "--calib" in some.built_with() and built.flags == ["INT8", "FP16"]


def test_scales_are_written_as_bits(tmp_path):
    trtexec._scales({"x": 1.0, "a: b": 0.0078740157}, (8, 5, 2), str(tmp_path))
    text = (tmp_path / "scales.cache").read_text()
    assert text == "TRT-8502-EntropyCalibration2\nx: 3f800000\na: b: 3c010204\n"


@pytest.mark.parametrize(
    "version, more, words",
    [
        ((10, 13, 3), dict(precision="fp16"), "builds no engines for the DLA"),
        ((11, 1, 0), dict(precision="fp16"), "builds no engines for the DLA"),
        ((10, 3, 0), dict(precision="fp16", typing="strong"), "builds no engines for the DLA"),
        ((10, 3, 0), dict(precision="fp32"), "FP16 or INT8"),
        ((10, 3, 0), dict(precision="int8"), "needs a range for each tensor"),
        ((10, 3, 0), dict(precision="int8", body=QUANTIZED, ranges={"x": 1.0}), "takes no Q/DQ"),
        (
            (10, 3, 0),
            dict(
                precision="fp16",
                x="float[N, 3] x",
                y="float[N, 3] y",
                shapes={"x": ([1, 3], [1, 3], [2, 3])},
            ),
            "static shapes",
        ),
        ((10, 3, 0), dict(precision="fp16", dla_core=2), "not available"),
    ],
)
def test_what_a_dla_cannot_do_is_said(bench, version, more, words):
    with pytest.raises(Fault, match=words):
        bench(version, dla=2).build(**{**dict(dla_core=0), **more})
