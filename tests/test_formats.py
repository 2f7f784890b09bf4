"""Every number format that Quantize writes, against an independent dense computation in float64."""

from collections import Counter
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgec.backends import ort as ort_backend
from edgec.backends import tensorrt
from edgec.backends.ort import Session
from edgec.compiler import devices, layers
from edgec.compiler import model as model_io
from edgec.compiler.types import QuantScheme, Range, StoredWeight
from edgec.passes.quant_params import needed_opset
from edgec.passes.quantize import Quantize
from edgec.passes.weight_writer import WeightFormat, dequantize, round_to_nearest, weight_format
from test_quantize import optimised_ops, ranges_of, run

VNNI = ort_backend.OnnxRuntime().schemes(devices.load_profiles()["x86-avx512-vnni"])
INT8, INT4, W4A8 = VNNI["int8"], VNNI["int4"], VNNI["w4a8"]
#: Values rounded by Q/DQ in front of layers, arithmetic in float32: whatever the format, numpy can follow.
PLAIN = QuantScheme("plain", "int8", True, bias="float32", placement="inputs", simulated=True)
FP8 = replace(PLAIN, activation="float8e4m3fn", weight="float8e4m3fn", weight_max=448)
E5M2 = replace(PLAIN, activation="float8e5m2", weight="float8e5m2", weight_max=57344)
FORMATS = {
    "int8 x int8": PLAIN,
    "int8 x int8, per tensor": replace(PLAIN, per_channel=False),
    "int8 x int8, weights stored as floats": replace(PLAIN, stored_weights="float"),
    "uint8 x int8": replace(PLAIN, activation="uint8", symmetric=False),
    "int8, asymmetric": replace(PLAIN, symmetric=False),
    "int8 x uint8": replace(PLAIN, weight="uint8"),
    "int8 x uint8, stored as floats": replace(PLAIN, weight="uint8", stored_weights="float"),
    "uint16 x int8": replace(PLAIN, activation="uint16", symmetric=False),
    "int16 x int8": replace(PLAIN, activation="int16"),
    "int8 x int4": replace(PLAIN, weight="int4", weight_max=7),
    "int8 x int4, per tensor": replace(PLAIN, weight="int4", weight_max=7, per_channel=False),
    "int8 x int4, cast": replace(PLAIN, weight="int4", weight_max=7, cast_weights=True),
    "int8 x int4, blocks": replace(PLAIN, weight="int4", weight_max=7, block=4),
    "int4 weights": replace(PLAIN, activation=None, weight="int4", weight_max=7),
    "int4 weights, cast": INT4,
    "int4 weights, cast, per tensor": replace(INT4, per_channel=False),
    "int4 weights, blocks": replace(PLAIN, activation=None, weight="int4", weight_max=7, block=4),
    "int4 weights, cast, blocks": replace(INT4, block=16),
    "int8 weights, cast": replace(INT4, weight="int8", weight_max=127),
    "uint8 weights, cast": replace(INT4, weight="uint8", weight_max=127),
    "e4m3": FP8,
    "e4m3, weights stored as floats": replace(FP8, stored_weights="float"),
    "e4m3 weights": replace(FP8, activation=None),
    "e5m2": E5M2,
}
STEPS = {"uint8": 255, "int8": 255, "uint16": 65535, "int16": 65535}
SMALL_FLOATS = {"float8e4m3fn": (ml_dtypes.float8_e4m3fn, 448), "float8e5m2": (ml_dtypes.float8_e5m2, 57344)}


# ------------------------------------------------------------------------------------------ the independent computation


def rounded(x: np.ndarray, scale: np.ndarray | float, dtype: str, limit: float) -> np.ndarray:
    """Quantize symmetrically and back, in float64."""
    q = np.clip(x / scale, -limit, limit)
    return (q.astype(SMALL_FLOATS[dtype][0]).astype(np.float64) if dtype in SMALL_FLOATS else np.rint(q)) * scale


def rounded_activation(x: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    if scheme.activation is None:
        return x
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    if scheme.activation in SMALL_FLOATS:
        limit = SMALL_FLOATS[scheme.activation][1]
        return rounded(x, max(-low, high) / limit, scheme.activation, limit)
    steps = STEPS[scheme.activation]
    if scheme.symmetric:
        return rounded(x, max(-low, high) / (steps // 2), scheme.activation, steps // 2)
    scale = np.float64(np.float32((high - low) / steps))
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, steps) - zero) * scale


def rounded_weight(w: np.ndarray, scheme: QuantScheme, out: int | None, inputs: int | None) -> np.ndarray:
    """Round each output channel, or each block of its inputs, by its own largest magnitude."""
    if out is None or not scheme.per_channel:
        return rounded(w, np.abs(w).max() / scheme.weight_max, scheme.weight, scheme.weight_max)
    result = np.empty_like(w)
    for channel in range(w.shape[out]):
        at = [slice(None)] * w.ndim
        at[out] = channel
        row = w[tuple(at)]
        blocks = scheme.block and inputs is not None and w.shape[inputs] % scheme.block == 0
        parts = [
            rounded(p, (np.abs(p).max() or 1.0) / scheme.weight_max, scheme.weight, scheme.weight_max)
            for p in (np.split(row, len(row) // scheme.block) if blocks else [row])
        ]
        result[tuple(at)] = np.concatenate(parts)
    return result


def convolution(x: np.ndarray, w: np.ndarray, groups: int) -> np.ndarray:
    """Sum by the definition: 3 x 3 kernels, padding 1, stride 1."""
    outputs, inputs = w.shape[:2]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(x), outputs, *x.shape[2:]))
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        for i in range(inputs):
            for r in range(3):
                for c in range(3):
                    part = padded[:, first + i, r : r + x.shape[2], c : c + x.shape[3]]
                    y[:, o] += w[o, i, r, c] * part
    return y


def transposed(x: np.ndarray, w: np.ndarray, groups: int) -> np.ndarray:
    """The adjoint of a convolution, 2 x 2 kernels, stride 2: every input pixel paints one square."""
    inputs, outputs = w.shape[:2]
    n, _, height, width = x.shape
    y = np.zeros((n, outputs * groups, 2 * height, 2 * width))
    for i in range(inputs):
        group = i // (inputs // groups)
        for o in range(outputs):
            for r in range(2):
                for c in range(2):
                    y[:, group * outputs + o, r::2, c::2] += w[i, o, r, c] * x[:, i]
    return y


#: name -> (text, x's shape, w's shape, output axis, input axis for blocks, the computation)
OPS = {
    "conv": ("Conv <pads = [1,1,1,1]>", (2, 8, 5, 5), (6, 8, 3, 3), 0, None, lambda x, w: convolution(x, w, 1)),
    "grouped": (
        "Conv <pads = [1,1,1,1], group = 2>", (2, 8, 5, 5), (6, 4, 3, 3), 0, None, lambda x, w: convolution(x, w, 2),
    ),
    "depthwise": (
        "Conv <pads = [1,1,1,1], group = 8>", (2, 8, 5, 5), (8, 1, 3, 3), 0, None, lambda x, w: convolution(x, w, 8),
    ),
    "gemm": ("Gemm", (3, 16), (16, 5), 1, 0, lambda x, w: x @ w),
    "gemm, transposed": ("Gemm <transB = 1>", (3, 16), (5, 16), 0, 1, lambda x, w: x @ w.T),
    "gemm, block does not divide": ("Gemm", (3, 18), (18, 5), 1, 0, lambda x, w: x @ w),
    "matmul": ("MatMul", (3, 2, 16), (16, 5), 1, 0, lambda x, w: x @ w),
    "transpose": ("ConvTranspose <strides = [2,2]>", (2, 4, 3, 3), (4, 6, 2, 2), 1, None,
                  lambda x, w: transposed(x, w, 1)),
    "transpose, grouped": ("ConvTranspose <strides = [2,2], group = 2>", (2, 4, 3, 3), (4, 6, 2, 2), None, None,
                           lambda x, w: transposed(x, w, 2)),
}  # fmt: skip


def one_layer(op: str, w: np.ndarray, b: np.ndarray | None = None, *, opset: int = 21, text: str = "") -> ir.Model:
    shape = ", ".join(["N", *map(str, OPS[op][1][1:])])
    free = ", ".join("NPQR"[: len(OPS[op][1])])
    body = text or f"y = {OPS[op][0]} (x, w{'' if b is None else ', b'})"
    constants = {"w": w} if b is None else {"w": w, "b": b}
    return parsed(f"g (float[{shape}] x) => (float[{free}] y) {{ {body} }}", constants, opset)


def parsed(text: str, constants: dict[str, np.ndarray], opset: int) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    for i, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{i}"
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def quantize(model: ir.Model, scheme: QuantScheme, x: np.ndarray, supports=ort_backend.SIMULATED, **options):
    """Quantize in place with exact ranges; the result is valid and has the IR version that its types need."""
    found = {} if scheme.activation is None else ranges_of(model, supports, {"x": x})
    result = Quantize(found, supports, scheme, **options)(model)
    onnx.checker.check_model(onnx.load_from_string(model_io.serialize(model)), full_check=True)
    return result


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", FORMATS)
def test_numbers_equal_a_dense_computation(name, op):
    _, x_shape, w_shape, out, inputs, compute = OPS[op]
    scheme, x, w = FORMATS[name], normal(*x_shape), normal(*w_shape, seed=1)
    model = one_layer(op, w)
    result = quantize(model, scheme, x)
    assert (result.rewrites, result.refusals) == (1, ())
    exact_x, exact_w = x.astype(np.float64), w.astype(np.float64)
    expected = compute(rounded_activation(exact_x, scheme), rounded_weight(exact_w, scheme, out, inputs))
    exact = compute(exact_x, exact_w)
    got = run(model, {"x": x})[0]
    # float32 sums, and float32 quotients that may take one of a thousand numbers of 16 bits to the next step
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(exact).max()
    assert np.abs(got - exact).max() > 1e-4 * np.abs(exact).max()  # so it is not the float model
    assert np.abs(
        Session(model_io.serialize(model), threads=1, fuse_quantized=False).run({"x": x})["y"] - got
    ).max() <= (1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["int8 x int8", "int8 x int4", "int8 x int4, cast", "e4m3", "int4 weights, cast"])
@pytest.mark.parametrize(
    "w",
    [
        np.zeros((6, 8, 3, 3)),
        np.full((6, 8, 3, 3), -0.25),
        np.arange(6).reshape(6, 1, 1, 1) * np.ones((6, 8, 3, 3)),  # constant channels, the first one dead
        -np.abs(normal(6, 8, 3, 3)),
        np.where(np.arange(6).reshape(6, 1, 1, 1) == 2, 1e-30, normal(6, 8, 3, 3)),
    ],
    ids=["zeros", "one negative number", "constant and dead channels", "all negative", "a channel next to nothing"],
)
def test_degenerate_weights(name, w):
    scheme, x = replace(FORMATS[name], bias="int32"), normal(2, 8, 5, 5)
    bias = np.linspace(-1, 1, 6).astype(np.float32)
    model = one_layer("conv", w.astype(np.float32), bias)
    quantize(model, scheme, x)
    exact = convolution(x.astype(np.float64), w, 1) + bias[:, None, None]
    got = run(model, {"x": x})[0]
    assert np.isfinite(got).all()
    # the worst of these formats has 3 bits: half a step of 1/7 a weight, on 72 of them, none of which helps another
    assert np.abs(got - exact).max() <= 0.1 * np.abs(w).max() * 72 + 0.01


def test_constant_channels_are_exact():
    w = (np.arange(1, 7).reshape(6, 1, 1, 1) * np.ones((6, 8, 3, 3))).astype(np.float32)
    for dtype, limit in (("int8", 127), ("int4", 7), ("float8e4m3fn", 448)):
        stored = round_to_nearest(w, WeightFormat(dtype, limit, 0))
        np.testing.assert_allclose(dequantize(stored), w, rtol=1e-6)  # 6 / 7 is no float32


def test_ties_are_rounded_to_even():
    w = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 7.0]], np.float32)
    assert round_to_nearest(w, WeightFormat("int4", 7, 0)).integers.tolist() == [[0, 2, 2, 0, -2, 7]]
    blocks = round_to_nearest(w, WeightFormat("int4", 7, 1, 3))
    np.testing.assert_allclose(blocks.scales, [[2.5 / 7, 1.0]], rtol=1e-6)
    assert blocks.integers.tolist() == [[1, 4, 7, 0, -2, 7]]


@pytest.mark.parametrize("seed", range(5))
def test_more_bits_never_err_more(seed):
    w = normal(8, 16, 3, 3, seed=seed).astype(np.float64)
    errors = [
        float(((dequantize(round_to_nearest(w, WeightFormat("int8", 2 ** (bits - 1) - 1, 0))) - w) ** 2).sum())
        for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    finer = [round_to_nearest(w.reshape(8, 144), WeightFormat("int4", 7, 1, block)) for block in (144, 72, 36, 12)]
    errors = [float(((dequantize(stored) - w.reshape(8, 144)) ** 2).sum()) for stored in finer]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_more_bits_of_activations_never_err_more(seed):
    """A float of 8 bits has fewer steps than an integer where a normal distribution is, E5M2 the fewest."""
    x, w = normal(2, 8, 5, 5, seed=seed), normal(6, 8, 3, 3, seed=seed + 10)
    exact = convolution(x.astype(np.float64), w.astype(np.float64), 1)
    for row in (("e5m2", "e4m3", "int8 x int8", "int16 x int8"), ("uint8 x int8", "uint16 x int8")):
        errors = []
        for name in row:
            model = one_layer("conv", w)
            quantize(model, FORMATS[name], x)
            errors.append(float(((run(model, {"x": x})[0] - exact) ** 2).sum()))
        assert errors == sorted(errors, reverse=True), row


# ------------------------------------------------------------------------------------------ what is written


def stored_types(model: ir.Model) -> Counter:
    return Counter(v.const_value.dtype.name for v in model.graph.initializers.values() if v.const_value.size > 8)


@pytest.mark.parametrize(
    ("name", "types", "opset", "ir_version"),
    [
        ("int8 x int8", {"INT8": 1}, 13, 7),
        ("int8 x int8, weights stored as floats", {"FLOAT": 1}, 13, 7),
        ("int8 x uint8", {"UINT8": 1}, 13, 7),
        ("int8 weights, cast", {"INT8": 1}, 13, 7),
        ("e4m3", {"FLOAT8E4M3FN": 1}, 19, 9),
        ("e5m2", {"FLOAT8E5M2": 1}, 19, 9),
        ("e4m3, weights stored as floats", {"FLOAT": 1}, 19, 9),
        ("int8 x int4", {"INT4": 1}, 21, 10),
        ("int4 weights, cast", {"INT4": 1}, 21, 10),
        ("int16 x int8", {"INT8": 1}, 21, 10),
        ("int4 weights, blocks", {"INT4": 1}, 21, 10),
    ],
)
def test_the_lowest_opset_and_ir_version_suffice(name, types, opset, ir_version):
    scheme, x = FORMATS[name], normal(2, 8, 5, 5)
    assert needed_opset(scheme) == opset
    model = one_layer("conv", normal(6, 8, 3, 3), opset=opset)
    assert quantize(model, scheme, x).modified
    assert stored_types(model) == types
    assert onnx.load_from_string(model_io.serialize(model)).ir_version == ir_version
    old = one_layer("conv", normal(6, 8, 3, 3), opset=opset - 1)
    result = Quantize({"x": Range(-4, 4)}, ort_backend.SIMULATED, scheme)(old)
    assert not result.modified
    assert [r.why for r in result.refusals] == [f"its opset {opset - 1} has no {scheme.name}: that needs {opset}"]


def test_types_of_single_layers_count_for_the_opset():
    assert needed_opset(INT8) == 13
    assert needed_opset(INT8, ["int8", "int4"]) == 21
    assert needed_opset(replace(INT8, block=32)) == 21


def test_four_bits_take_half_a_byte():
    models = {}
    for name in ("int8 x int8", "int8 x int4", "int4 weights, cast"):
        models[name] = one_layer("conv", normal(64, 64, 3, 3).astype(np.float32), text="y = Conv (x, w)", opset=21)
        models[name].graph.inputs[0].shape = ir.Shape([1, 64, 5, 5])
        quantize(models[name], FORMATS[name], normal(1, 64, 5, 5))
    sizes = {name: len(model_io.serialize(model)) for name, model in models.items()}
    weights = 64 * 64 * 9
    assert weights <= sizes["int8 x int8"] <= weights + 2000
    assert weights / 2 <= sizes["int8 x int4"] <= weights / 2 + 2000
    assert weights / 2 <= sizes["int4 weights, cast"] <= weights / 2 + 2000


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("int8 x int8", "int8 x int8"),
        ("int8 x int8, weights stored as floats", "int8 x int8"),
        ("int8 x int4, cast", "int8 x int4"),
        ("int8 x int4, blocks", "int8 x int4"),
        ("int4 weights, cast", "weights int4"),
        ("int4 weights, blocks", "weights int4"),
        ("e4m3", "float8e4m3fn x float8e4m3fn"),
        ("e4m3 weights", "weights float8e4m3fn"),
        ("uint16 x int8", "uint16 x int8"),
    ],
)
def test_layers_are_described_by_what_is_stored(name, precision):
    model = one_layer("gemm", normal(16, 5))
    assert [layer.precision for layer in layers.describe(model)] == ["float32"]
    quantize(model, FORMATS[name], normal(3, 16))
    assert [layer.precision for layer in layers.describe(model)] == [precision]


def test_the_range_of_an_fp8_output_is_described():
    model = one_layer("conv", normal(8, 8, 3, 3), text="a = Conv <pads = [1,1,1,1]> (x, w)\n y = Conv (a, w)")
    quantize(model, FP8, normal(2, 8, 5, 5))
    first = layers.describe(model)[0]
    assert first.output_range.max == pytest.approx(448 * first.scale)
    assert first.output_range.min == -first.output_range.max


def test_a_weight_of_two_readers_is_stored_once():
    text = "a = Conv <pads = [1,1,1,1]> (x, w)\n y = Conv <pads = [1,1,1,1]> (a, w)"
    for name in ("int8 x int8", "int8 x int4, cast", "int4 weights, cast", "e4m3"):
        model = one_layer("conv", normal(8, 8, 3, 3), text=text)
        quantize(model, FORMATS[name], normal(2, 8, 5, 5))
        assert sum(stored_types(model).values()) == 1, name


def test_a_weight_that_something_else_reads_too_stays_in_float_for_that():
    text = "a = Conv <pads = [1,1,1,1]> (x, w)\n s = ReduceSum <keepdims = 0> (w)\n y = Mul (a, s)"
    w, x = normal(8, 8, 3, 3), normal(2, 8, 5, 5)
    model = one_layer("conv", w, text=text)
    quantize(model, INT4, x)
    assert stored_types(model) == {"FLOAT": 1, "INT4": 1}


def test_subgraphs_are_left_alone():
    text = """
    a = Conv <pads = [1,1,1,1]> (x, w)
    y = If (c) <then_branch = t () => (float[N,8,5,5] b) { b = Conv <pads = [1,1,1,1]> (a, w) },
                else_branch = e () => (float[N,8,5,5] d) { d = Relu (a) }>"""
    for name in ("int8 x int8", "int4 weights, cast"):
        model = parsed(
            f"g (float[N, 8, 5, 5] x, bool c) => (float[N, 8, 5, 5] y) {{ {text} }}", {"w": normal(8, 8, 3, 3)}, 21
        )
        found = {"x": Range(-4, 4), "a": Range(-40, 40)}
        result = Quantize(found, ort_backend.SIMULATED, FORMATS[name])(model)
        assert result.rewrites == 1
        inside = next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph()
        assert [n.op_type for n in inside] == ["Conv"]
        assert inside[0].inputs[1].const_value.dtype == ir.DataType.FLOAT
        feed = {"x": normal(2, 8, 5, 5), "c": np.array(True)}
        assert np.isfinite(run(model, feed)[0]).all()


# ------------------------------------------------------------------------------------------ types and integers by layer

TWO = "a = Conv <pads = [1,1,1,1]> (x, w, b)\n y = Conv <pads = [1,1,1,1]> (a, v, b)"


def two_layers() -> ir.Model:
    constants = {"w": normal(8, 8, 3, 3), "v": normal(8, 8, 3, 3, seed=1), "b": normal(8)}
    return parsed(f"g (float[N, 8, 5, 5] x) => (float[N, 8, 5, 5] y) {{ {TWO} }}", constants, 21)


def test_single_layers_may_have_weights_of_another_type():
    x = normal(2, 8, 5, 5)
    for scheme, override, largest in ((W4A8, "int8", 127), (INT8, "int4", 7), (INT4, "int8", 127)):
        model = two_layers()
        quantize(model, scheme, x, ort_backend.SUPPORTS, weight_types={"Conv_1": override})
        types = {layer.node: layer.precision.split()[-1] for layer in layers.describe(model)}
        assert types == {"Conv_0": scheme.weight, "Conv_1": override}
        stored = model.graph.initializers["v_quantized"].const_value.numpy()
        assert np.abs(stored.astype(int)).max() == largest


def test_eight_bits_beside_four_do_not_saturate_where_the_kernel_would():
    model, x = two_layers(), normal(2, 8, 5, 5)
    w4a8 = ort_backend.OnnxRuntime().schemes(devices.load_profiles()["x86-avx2"])["w4a8"]
    quantize(model, w4a8, x, ort_backend.SUPPORTS, weight_types={"Conv_1": "int8"})
    assert np.abs(model.graph.initializers["v_quantized"].const_value.numpy()).max() == 63


@pytest.mark.parametrize(
    "scheme", [W4A8, INT4, INT8, tensorrt.INT8, replace(PLAIN, weight="uint8")], ids=lambda s: s.name
)
def test_weights_that_were_chosen_are_stored_as_they_are(scheme):
    model, x = two_layers(), normal(2, 8, 5, 5)
    dtype = scheme.weight
    limit = 7 if dtype == "int4" else 127
    chosen = np.random.default_rng(3).integers(-limit, limit + 1, (8, 8, 3, 3)).astype(np.int8)
    given = StoredWeight(chosen, np.linspace(0.01, 0.1, 8).astype(np.float32), 0, dtype)
    supports = ort_backend.SIMULATED if scheme.placement == "inputs" else ort_backend.SUPPORTS
    quantize(model, scheme, x, supports, weights={"Conv_1": given})
    (conv,) = [n for n in model.graph if n.name == "Conv_1"]
    proto = ir.to_proto(model)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(conv.inputs[1].name, onnx.TensorProto.FLOAT, None))
    seen = run(proto, {"x": x}, [conv.inputs[1].name])[0]
    np.testing.assert_allclose(seen, dequantize(given), rtol=1e-6)  # one product in float32
    if scheme.stored_weights == "integer":
        zero = 128 if dtype == "uint8" else 0
        stored = model.graph.initializers["v_quantized"].const_value.numpy().astype(int)
        np.testing.assert_array_equal(stored - zero, chosen)
        assert model.graph.initializers["v_scale"].const_value.numpy().reshape(-1).tolist() == given.scales.tolist()


def test_blocks_that_were_chosen_are_stored_as_they_are():
    for op, shape, axis in (("gemm", (16, 5), 0), ("gemm, transposed", (5, 16), 1), ("matmul", (16, 5), 0)):
        w = normal(*shape)
        model, given = one_layer(op, w), round_to_nearest(w, WeightFormat("int4", 7, axis, 4))
        quantize(model, INT4, normal(3, 16), weights={model.graph[0].name: given})
        x = normal(*OPS[op][1])
        exact = OPS[op][5](x.astype(np.float64), dequantize(given).astype(np.float64))
        assert np.abs(run(model, {"x": x})[0] - exact).max() <= 1e-5 * np.abs(exact).max()


def test_a_chosen_weight_makes_room_for_a_bias_that_would_not_fit():
    w, x = np.full((6, 8, 3, 3), 1e-9, np.float32), normal(2, 8, 5, 5)
    w[1:] = normal(5, 8, 3, 3)
    bias = np.full(6, 50.0, np.float32)
    scales = np.abs(w).max(axis=(1, 2, 3)) / 127
    integers = np.rint(w / scales[:, None, None, None]).astype(np.int8)
    model = one_layer("conv", w, bias)
    quantize(model, replace(PLAIN, bias="int32"), x, weights={"Conv_0": StoredWeight(integers, scales, 0)})
    exact = convolution(x.astype(np.float64), w.astype(np.float64), 1) + 50
    got = run(model, {"x": x})[0]
    assert np.abs(got[:, 0] - 50).max() < 1e-3  # the weights of channel 0 are nothing next to it
    assert np.abs(got - exact).max() < 0.3
    stored = model.graph.initializers["w_quantized"].const_value.numpy()
    np.testing.assert_array_equal(stored[1:], integers[1:])


def test_a_bias_correction_reaches_weights_only_layers():
    model, x = one_layer("conv", normal(6, 8, 3, 3)), normal(2, 8, 5, 5)
    quantize(model, INT4, x)
    shifted = one_layer("conv", normal(6, 8, 3, 3))
    quantize(shifted, INT4, x, bias_shift={"Conv_0": np.arange(6.0)})
    difference = run(shifted, {"x": x})[0] - run(model, {"x": x})[0]
    np.testing.assert_allclose(difference, np.broadcast_to(np.arange(6.0)[:, None, None], (2, 6, 5, 5)), atol=1e-5)


def test_the_format_of_a_weight():
    (conv,), (gemm,) = one_layer("conv", normal(6, 8, 3, 3)).graph, one_layer("gemm", normal(16, 5)).graph
    assert weight_format(conv, (6, 8, 3, 3), INT4) == WeightFormat("int4", 7, 0)
    assert weight_format(conv, (6, 8, 3, 3), replace(INT4, block=8)) == WeightFormat("int4", 7, 0)
    assert weight_format(gemm, (16, 5), replace(INT4, block=8)) == WeightFormat("int4", 7, 0, 8)
    assert weight_format(gemm, (16, 5), replace(INT4, block=32)) == WeightFormat("int4", 7, 1)
    assert weight_format(gemm, (16, 5), INT4, "int8") == WeightFormat("int8", 127, 1)
    assert weight_format(gemm, (16, 5), FP8) == WeightFormat("float8e4m3fn", 448, 1)


# ------------------------------------------------------------------------------------------ in ONNX Runtime


def test_four_bit_weights_run_in_the_eight_bit_kernels(tmp_path):
    model, x = two_layers(), normal(2, 8, 5, 5)
    quantize(model, W4A8, x, ort_backend.SUPPORTS)
    ops = optimised_ops(model, tmp_path)
    assert (ops["QLinearConv"], ops["Conv"], ops["Cast"]) == (2, 0, 0)


def test_weights_only_costs_nothing_at_run_time(tmp_path):
    model = two_layers()
    quantize(model, INT4, normal(2, 8, 5, 5), ort_backend.SUPPORTS)
    ops = optimised_ops(model, tmp_path)
    assert set(ops) <= {"Conv", "ReorderInput", "ReorderOutput"}


@pytest.mark.parametrize("op", ["gemm", "gemm, transposed", "matmul"])
def test_blocks_become_the_kernel_for_blocks(op, tmp_path):
    w = normal(*OPS[op][2])
    model = one_layer(op, w, None if op == "matmul" else normal(5))
    quantize(model, replace(INT4, block=16), normal(*OPS[op][1]))
    assert set(optimised_ops(model, tmp_path)) == {"MatMulNBits"}


@pytest.mark.parametrize("scheme", [FP8, E5M2, FORMATS["int16 x int8"]], ids=["e4m3", "e5m2", "int16"])
def test_simulated_formats_keep_their_relu(scheme):
    """ONNX Runtime drops a Relu in front of an FP8 QuantizeLinear, even with its Q/DQ fusions off."""
    text = "a = Conv <pads = [1,1,1,1]> (x, w)\n r = Relu (a)\n y = Conv <pads = [1,1,1,1]> (r, w)"
    model, x = one_layer("conv", normal(8, 8, 3, 3), text=text), normal(2, 8, 5, 5)
    quantize(model, scheme, x)
    reference = run(model, {"x": x})[0]
    got = Session(model_io.serialize(model), threads=1, fuse_quantized=False).run({"x": x})["y"]
    # another order of the sums may take single numbers to the next step; a lost Relu changes everything
    assert ((got - reference) ** 2).sum() <= 1e-4 * (reference**2).sum()


# ------------------------------------------------------------------------------------------ tensorrt


def test_tensorrt_fp8_is_explicit_symmetric_and_packed():
    shapes = {"w": (24, 24, 3, 3), "v": (24, 24, 3, 3), "b": (24,)}
    text = f"g (float[N, 24, 5, 5] x) => (float[N, 24, 5, 5] y) {{ {TWO} }}"
    model = parsed(text, {name: normal(*shape) for name, shape in shapes.items()}, 19)
    quantize(model, tensorrt.FP8, normal(2, 24, 5, 5), tensorrt.SUPPORTS)
    kinds = Counter(n.op_type for n in model.graph)
    assert kinds == {"QuantizeLinear": 2, "DequantizeLinear": 4, "Conv": 2}
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2].const_value
            assert zero.dtype == ir.DataType.FLOAT8E4M3FN
            assert not zero.numpy().astype(np.float32).any()
        elif node.op_type == "Conv":
            assert node.inputs[2].const_value.dtype == ir.DataType.FLOAT


def test_tensorrt_int4_is_for_matrices_in_blocks_only():
    text = "a = Conv <pads = [1,1,1,1]> (x, w)\n f = Flatten (a)\n y = Gemm <transB = 1> (f, v)"
    constants = {"w": normal(16, 16, 3, 3), "v": normal(32, 512)}
    model = parsed(f"g (float[N, 16, 4, 8] x) => (float[N, 32] y) {{ {text} }}", constants, 21)
    result = quantize(model, tensorrt.INT4, normal(2, 16, 4, 8), tensorrt.SUPPORTS)
    assert [(r.node, r.rule, r.why) for r in result.refusals] == [
        ("Conv_0", "weight-type", "no kernel of Conv takes int4 weights")
    ]
    (dequantize_node,) = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    assert dequantize_node.attributes.get_int("block_size") == 128
    assert [v.const_value.dtype.name for v in dequantize_node.inputs] == ["INT4", "FLOAT", "INT4"]
    assert tuple(dequantize_node.inputs[1].const_value.shape) == (32, 4)
    (gemm,) = [n for n in model.graph if n.op_type == "Gemm"]
    assert gemm.attributes.get_int("transB") == 1
