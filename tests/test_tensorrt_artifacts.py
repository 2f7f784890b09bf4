"""What is handed to TensorRT obeys its rules: all zoos, all precisions, one device a generation."""

import numpy as np
import onnx_ir as ir
import pytest
import qdq_rules
import trt_artifacts as artifacts
import wide_zoo
import zoo
from edgec.compiler import devices
from edgec.compiler import model as model_io
from qdq_graph import Graph

#: One device a generation, with the TensorRT that its JetPack brings; None is a desktop, whose version is open.
DEVICES = {
    "jetson-agx-xavier-32gb": "8.5.2",
    "jetson-orin-nano-8gb": "10.3.0",
    "jetson-agx-thor": "10.13.3",
    "rtx-4090": None,
}
PRECISIONS = {
    "jetson-agx-xavier-32gb": ("fp16", "int8"),
    "jetson-orin-nano-8gb": ("fp16", "int8", "int4"),
    "jetson-agx-thor": ("fp16", "int8", "fp8", "int4"),
    "rtx-4090": ("fp16", "int8", "fp8", "int4"),
}
#: Which versions a file of an unknown version must suit: the float32 one, the float16 one.
OLDEST = {"fp16": (8, 5), "int8": (8, 5), "fp8": (10, 3), "int4": (10, 3)}
NEWEST = (11, 1)
#: What the compiler was given, not what it made of it: model -> rules that it breaks as it comes.
AS_GIVEN = {
    "zoo function-of-another-opset": {"opset"},  # it cannot be raised to 19, and stays in float32
    "zoo quantized": {"integer-initializer", "small-layer", "zero-type"},
    "zoo float-stem": {"dequantized-type", "integer-initializer", "small-layer", "zero-type", "zero-value"},
}


def test_the_devices_are_those_of_the_profiles():
    for name, version in DEVICES.items():
        profile = devices.find(name)
        assert profile.toolchain.get("tensorrt") == version
        schemes = artifacts.TensorRT().schemes(profile)
        assert {p for p in ("fp16", "int8", "fp8", "int4") if not isinstance(schemes[p], str)} == set(PRECISIONS[name])


def checked(model, folder, precision) -> tuple[int, list[str]]:
    """Compile a model for each device that has the precision; return the quantized nodes, and what is wrong."""
    known, found = {}, []
    for name, version in DEVICES.items():
        if precision not in PRECISIONS[name]:
            continue
        profile = devices.find(name)
        opset = min(model.opset_imports.get("", 0), artifacts.TensorRT().newest_opset(profile))
        if opset not in known:  # the generations share their schemes
            known[opset] = artifacts.make(model_io.copy(model), folder / str(opset), profile, precision)
        made = known[opset]
        for path in artifacts.lower(made, profile, precision, version):
            numbers = tuple(int(n) for n in version.split(".")[:2]) if version else OLDEST[precision]
            numbers = NEWEST if version is None and path != made.model else numbers
            wrong = qdq_rules.violations(path, numbers, precision, made.original)
            found += [f"{name}, {path.name}, {line}" for line in wrong]
    return made.nodes, found


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("name", artifacts.MODELS)
def test_no_rule_is_broken(name, precision, tmp_path):
    nodes, found = checked(artifacts.MODELS[name](), tmp_path / "m", precision)
    allowed = AS_GIVEN.get(name, set())
    assert [line for line in found if line.split(", ", 2)[2].partition(":")[0] not in allowed] == []
    if name.startswith("wide") and precision == "int8":
        assert nodes >= (0 if name == "wide mlp-one-row" else 3)


def test_schemes_are_shared_by_the_devices():
    """`checked` quantizes once for all devices."""
    for precision in ("int8", "fp8", "int4"):
        schemes = {
            artifacts.TensorRT().schemes(devices.find(d))[precision] for d in DEVICES if precision in PRECISIONS[d]
        }
        assert len(schemes) == 1


#: What is quantized, so that nothing passes for having no pairs: layers, and what has none but reads integers.
@pytest.mark.parametrize(
    ("name", "layers", "others"),
    [
        ("plain", 4, {}),
        ("resnet-a", 8, {"Add": 3, "GlobalAveragePool": 1}),
        ("resnet-b", 9, {"Add": 3, "GlobalAveragePool": 1}),
        ("resnet-10-classes", 7, {"Add": 2}),
        ("mobilenet-v2", 8, {"Add": 1, "GlobalAveragePool": 1}),
        ("yolo", 15, {"Add": 1, "Resize": 1}),
        ("unet", 8, {"Resize": 1}),
        ("mlp", 3, {}),
    ],
)
def test_what_is_quantized(name, layers, others, tmp_path):
    made = artifacts.make(wide_zoo.WIDE[name](), tmp_path / "m", devices.find("jetson-orin-nano-8gb"), "int8")
    graph = Graph(made.model)
    found = {}
    for node in graph.nodes:
        if node.op in ("Add", "GlobalAveragePool", "AveragePool", "Resize") and any(
            graph.dequantizer(node, i) for i in range(len(node.inputs))
        ):
            found[node.op] = found.get(node.op, 0) + 1
    assert (sum(map(graph.quantized, graph.nodes)), found) == (layers, others)


def test_dead_and_tiny_channels_keep_positive_scales(tmp_path):
    """A channel of zeros, and one that is nothing in float16, in front of a strongly typed network."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 16, 3, 3)).astype(np.float32)
    w[3], w[5], w[7] = 0, w[5] * 1e-10, w[7] * 1e-3
    text = "g (float[N,16,6,6] x) => (float[N,16,4,4] y) <float[16,16,3,3] w> { y = Conv (x, w) }"
    _, found = checked(zoo.model(text, {"w": w}), tmp_path / "m", "int8")
    assert found == []
    scales = [
        a
        for name, a in Graph(tmp_path / "m" / "17" / "model-float16.onnx").constants.items()
        if a.size == 16 and a.ndim == 1
    ]
    assert any(a.dtype == np.float16 and (a > 0).all() and a.min() < 1e-7 for a in scales)


def test_odd_int4_weights_stay_float(tmp_path):
    """TensorRT packs two INT4 numbers along the last axis: the columns, or the rows of a transposed Gemm."""
    text = """g (float[N,32] x) => (float[N,8] y) <float[32,7] w1, float[9,7] w2, float[9,8] w3> {
        a = MatMul (x, w1)
        b = Gemm <transB = 1> (a, w2)
        y = Gemm (b, w3) }"""
    nodes, found = checked(zoo.model(text), tmp_path / "m", "int4")
    assert (nodes, found) == (1, [])
    graph = Graph(next(tmp_path.rglob("model.onnx")))
    assert [node.input(0) for node in graph.pairs()] == ["w3_quantized"]


def test_external_weights_are_checked_too(tmp_path):
    made = artifacts.make(wide_zoo.WIDE["resnet-b"](), tmp_path / "m", devices.find("jetson-agx-thor"), "int8")
    model = model_io.load(made.model)
    (tmp_path / "external").mkdir()
    ir.save(model, tmp_path / "external" / "model.onnx", external_data="model.data")
    assert qdq_rules.violations(tmp_path / "external" / "model.onnx", (8, 5), "int8", made.original) == []
