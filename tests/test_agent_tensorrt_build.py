"""Building engines on the device, against the strict stand-ins of tests/tensorrt_standin: contracts, not numbers."""

import os

import onnx
import pytest
from edgec.backends.agent import tensorrt_build
from edgec.backends.agent.cudart import Cuda
from edgec.backends.agent.faults import Fault
from edgec.backends.agent.tensorrt_build import Request
from tensorrt_standin import VERSIONS, make
from tensorrt_standin.models import files, model

OLD, NEW = ("8.5.2", "8.6.2"), ("10.3.0", "10.13.3", "11.1.0")
SHAPES = {"x": ([1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8])}
FLAT = {"x": ([1, 16], [2, 16], [4, 16])}


def silent(stage, done, total):
    pass


def start(version, **options):
    trt = make(version, **options)
    return trt, Cuda(trt.standin.libcudart)


def request(folder, precision="fp32", batch="N", **more):
    weak, strong = files(folder, precision, batch)
    shapes = (FLAT if precision == "int4" else SHAPES) if batch == "N" else {}
    return Request(weak, strong, precision, str(folder / "m.engine"), shapes)._replace(**more)


def built(folder, version, precision="fp32", batch="N", tell=silent, options=None, **more):
    trt, cuda = start(version, **options or {})
    found = tensorrt_build.build(request(folder, precision, batch, **more), tell, trt, cuda)
    assert not trt.standin.violations
    return trt, found


FLAGS = {"fp32": [], "fp16": ["FP16"], "int8": ["INT8", "FP16"], "fp8": ["FP8", "FP16"], "int4": ["INT4", "FP16"]}
CASES = [(v, p) for v in VERSIONS for p in FLAGS if v in NEW or p not in ("fp8", "int4")]


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize(("version", "precision"), CASES)
def test_each_version_builds_each_precision(tmp_path, version, precision, batch):
    trt, found = built(tmp_path, version, precision, batch, options={"sm": 8.9})
    strong = version in ("10.13.3", "11.1.0")
    assert found.typing == ("strong" if strong else "weak")
    assert found.flags == ([] if strong else FLAGS[precision])
    assert trt.standin.config._flags == found.flags
    assert found.source.endswith("-float16.onnx") == (strong and precision != "fp32")
    assert found.size == os.path.getsize(found.engine) > 0
    assert found.version == version
    assert os.listdir(tmp_path).count("m.engine.part") == 0
    wanted = {"8.5.2": ["EXPLICIT_BATCH"], "8.6.2": ["EXPLICIT_BATCH"], "10.13.3": ["STRONGLY_TYPED"]}
    assert trt.standin.network_flags == wanted.get(version, [])
    assert len(trt.standin.config._profiles) == (1 if batch == "N" else 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_verbosity_is_detailed_and_the_workspace_bounded(tmp_path, version):
    trt, _ = built(tmp_path, version)
    assert trt.standin.config.profiling_verbosity.name == "DETAILED"
    assert 64 << 20 <= trt.standin.config._pools["WORKSPACE"] <= 2 << 30  # a quarter of 8 GB, shared with the CPU


def test_a_card_gives_most_of_its_memory_and_a_number_is_obeyed(tmp_path):
    trt, _ = built(tmp_path, "10.3.0", options={"integrated": False})
    assert trt.standin.config._pools["WORKSPACE"] == (8 << 30) * 9 // 10
    trt, _ = built(tmp_path, "10.3.0", workspace=123 << 20)
    assert trt.standin.config._pools["WORKSPACE"] == 123 << 20


@pytest.mark.parametrize("version", OLD)
@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_versions_before_10_have_neither_fp8_nor_int4(tmp_path, version, precision):
    with pytest.raises(Fault, match="TensorRT 8"):
        built(tmp_path, version, precision, options={"sm": 8.9})


@pytest.mark.parametrize(("sm", "precision"), [(8.7, "fp8"), (7.5, "int4"), (6.2, "int8"), (5.3, "int8")])
def test_devices_without_the_units_are_refused(tmp_path, sm, precision):
    with pytest.raises(Fault, match="compute capability") as caught:
        built(tmp_path, "10.3.0", precision, options={"sm": sm})
    assert "--precision" in caught.value.fix
    if precision == "int8":
        assert "fp16" in caught.value.fix


def test_optimisation_level_where_there_is_one(tmp_path):
    trt, found = built(tmp_path, "8.6.2", level=5)
    assert trt.standin.config.builder_optimization_level == 5 and not found.warnings
    _, found = built(tmp_path, "8.5.2", level=5)
    assert any("no optimisation levels" in line for line in found.warnings)


# ------------------------------------------------------------------------------------------------ typing, files


def test_typing_can_be_asked_for(tmp_path):
    trt, found = built(tmp_path, "10.3.0", "int8", typing="strong")
    assert (found.typing, found.flags, trt.standin.network_flags) == ("strong", [], ["STRONGLY_TYPED"])
    trt, found = built(tmp_path, "10.13.3", "int8", typing="weak")
    assert (found.typing, found.flags) == ("weak", ["INT8", "FP16"])
    assert any("deprecated" in line for line in found.warnings)
    with pytest.raises(Fault, match="no weak typing"):
        built(tmp_path, "11.1.0", "int8", typing="weak")
    with pytest.raises(Fault, match="no strong typing"):
        built(tmp_path, "8.6.2", "int8", typing="strong")


def test_the_other_file_serves_where_it_can(tmp_path):
    _, found = built(tmp_path, "10.13.3", "int8", strong=None)
    assert found.typing == "weak" and "no ONNX file in float16" in found.warnings[0]
    _, found = built(tmp_path, "10.3.0", "int8", weak=None)
    assert found.typing == "strong" and found.warnings
    _, found = built(tmp_path, "11.1.0", "int8", strong=None)
    assert found.typing == "strong" and "runs in float32" in found.warnings[0]
    for version, missing in (("8.6.2", {"weak": None}), ("11.1.0", {"strong": None})):
        with pytest.raises(Fault, match="missing"):
            built(tmp_path, version, "fp16", **missing)


def test_int8_is_not_asked_for_where_nothing_is_quantized(tmp_path):
    weak, _ = files(tmp_path, "fp32")
    _, found = built(tmp_path, "8.6.2", "int8", weak=weak)
    assert found.flags == ["FP16"] and "no Q/DQ" in found.warnings[0]


def test_a_quantized_file_for_another_precision_is_refused(tmp_path):
    weak, _ = files(tmp_path, "int8")
    with pytest.raises(Fault, match="quantized"):
        built(tmp_path, "8.6.2", "fp16", weak=weak)


# ------------------------------------------------------------------------------------------------ shapes


def test_open_dimensions_need_shapes(tmp_path):
    with pytest.raises(Fault, match="input x has an open dimension"):
        built(tmp_path, "10.3.0", shapes={})
    with pytest.raises(Fault, match=r"input x .* does not take the shapes"):
        built(tmp_path, "10.3.0", shapes={"x": ([4, 3, 8, 8], [2, 3, 8, 8], [1, 3, 8, 8])})


def test_shapes_of_static_inputs_are_ignored(tmp_path):
    trt, _ = built(tmp_path, "8.5.2", batch=2, shapes={"x": ([1, 3, 8, 8],) * 3, "other": ([1],) * 3})
    assert trt.standin.config._profiles == []


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("version", VERSIONS)
def test_the_parsers_node_is_named(tmp_path, version):
    with pytest.raises(Fault, match=r"cannot read node n_c1 \(Conv\): .*this node was to fail") as caught:
        built(tmp_path, version, options={"parse_fails": "n_c1"})
    assert caught.value.nodes == ["n_c1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_layer_without_kernel_is_named(tmp_path, version):
    last = "n_y_half" if version in ("10.13.3", "11.1.0") else "n_y"
    options = {"no_int8_for": [last], "sm": 8.7}
    with pytest.raises(Fault, match=r"built no engine: .*Could not find any implementation") as caught:
        built(tmp_path, version, "int8", options=options)
    assert caught.value.nodes == [last]  # of weight + weight_QuantizeLinear + node, only what is in the network
    assert "quantization" in caught.value.fix
    assert not (tmp_path / "m.engine").exists()
    built(tmp_path, version, "fp16", options=options)


def test_a_build_that_fails_without_a_word_about_layers(tmp_path):
    with pytest.raises(Fault, match="Assertion engine failed") as caught:
        built(tmp_path, "10.3.0", options={"no_kernel_for": ["n_c1"], "silent": True})
    assert caught.value.nodes == []


def test_a_missing_file_and_no_onnx_are_told(tmp_path):
    with pytest.raises(Fault, match="cannot read the ONNX file"):
        built(tmp_path, "8.6.2", weak=str(tmp_path / "none.onnx"))


def test_external_data_is_found(tmp_path):
    onnx.save_model(model("int8"), tmp_path / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    built(tmp_path, "8.6.2", "int8", weak=str(tmp_path / "e.onnx"))
    (tmp_path / "e.bin").unlink()
    with pytest.raises(Fault, match="e.bin"):
        built(tmp_path, "8.6.2", "int8", weak=str(tmp_path / "e.onnx"))


def test_a_full_disk_leaves_no_half_engine(tmp_path, monkeypatch):
    def full(a, b):
        raise OSError(28, "No space left on device", a)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        built(tmp_path, "10.3.0")
    assert not [name for name in os.listdir(tmp_path) if "engine" in name]


# ------------------------------------------------------------------------------------------------ progress


def test_progress_is_told_where_the_version_tells_it(tmp_path):
    heard = []
    built(tmp_path, "10.3.0", tell=lambda *what: heard.append(what), options={"steps": 3})
    assert [what for what in heard if what[0] == "tactic selection"] == [("tactic selection", n, 3) for n in (1, 2, 3)]
    heard.clear()
    built(tmp_path, "8.6.2", tell=lambda *what: heard.append(what))
    assert [what[0] for what in heard] == ["reading the ONNX file", "choosing kernels"]


def test_what_tell_raises_stops_the_build(tmp_path):
    def tell(stage, done, total):
        if stage == "tactic selection" and done == 2:
            raise KeyboardInterrupt

    trt, cuda = start("10.3.0", steps=50)
    with pytest.raises(KeyboardInterrupt):
        tensorrt_build.build(request(tmp_path), tell, trt, cuda)
    assert trt.standin.steps == 2 and not (tmp_path / "m.engine").exists()


# ------------------------------------------------------------------------------------------------ timing cache


@pytest.mark.parametrize("version", VERSIONS)
def test_the_timing_cache_is_kept(tmp_path, version):
    path = tmp_path / "timing.cache"
    for builds in (1, 2):
        _, found = built(tmp_path, version, timing_cache=str(path))
        assert not found.warnings and f'"builds": {builds}' in path.read_text()


@pytest.mark.parametrize(
    "content", [b"\0garbage", b'STANDIN-CACHE{"of": {"tensorrt": "8.5.2", "sm": 7.2}, "builds": 9}']
)
def test_a_cache_that_does_not_fit_is_begun_anew(tmp_path, content):
    path = tmp_path / "timing.cache"
    path.write_bytes(content)
    _, found = built(tmp_path, "10.3.0", timing_cache=str(path))
    assert "begun anew" in found.warnings[0] and '"builds": 1' in path.read_text()


def test_a_bad_cache_is_not_blamed_for_a_failed_build(tmp_path):
    path = tmp_path / "timing.cache"
    path.write_bytes(b"garbage")
    with pytest.raises(Fault, match="built no engine: Error Code 2"):
        built(tmp_path, "10.3.0", timing_cache=str(path), options={"no_kernel_for": ["n_c1"], "silent": True})


# ------------------------------------------------------------------------------------------------ DLA


def on_dla(folder, version="8.6.2", precision="fp16", batch=2, dla_cores=2, **more):
    weak, _ = files(folder, "fp32", batch)
    more.setdefault("dla_core", 1)
    return built(folder, version, precision, batch, weak=weak, options={"dla_cores": dla_cores}, **more)


def test_dla_in_fp16(tmp_path):
    trt, found = on_dla(tmp_path)
    assert found.flags == ["FP16", "GPU_FALLBACK"]
    assert (trt.standin.config.default_device_type.name, trt.standin.config.DLA_core) == ("DLA", 1)


def test_dla_in_int8_takes_ranges(tmp_path):
    ranges = {"x": 0.1, "c1": 0.2, "r1": 0.2, "y": 0.3}
    _, found = on_dla(tmp_path, precision="int8", ranges=ranges)
    assert found.flags == ["INT8", "FP16", "GPU_FALLBACK"] and not found.warnings
    del ranges["r1"]
    _, found = on_dla(tmp_path, precision="int8", ranges=ranges)
    assert "1 tensors have no range, r1" in found.warnings[0]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"version": "10.13.3"}, "builds no engines for the DLA"),
        ({"version": "11.1.0"}, "no weak typing"),
        ({"dla_cores": 0}, "0 DLA cores"),
        ({"dla_core": 2}, "core 2"),
        ({"precision": "fp32"}, "FP16 or INT8"),
        ({"precision": "int8"}, "range for each tensor"),
        ({"batch": "N"}, "static shapes"),
    ],
)
def test_dla_is_refused_with_a_reason(tmp_path, how, why):
    with pytest.raises(Fault, match=why):
        on_dla(tmp_path, **how)


def test_dla_takes_no_qdq(tmp_path):
    weak, _ = files(tmp_path, "int8", 2)
    options = {"dla_cores": 1}
    with pytest.raises(Fault, match="takes no Q/DQ"):
        built(tmp_path, "8.6.2", "int8", 2, weak=weak, dla_core=0, ranges={"x": 1.0}, options=options)
