"""The float16 cast: what is cast and where Casts stand, its numbers against numpy, and what measuring finds unsafe."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgec.backends import tensorrt
from edgec.backends.ort import Session
from edgec.compiler import model as model_io
from edgec.compiler.quantization.float16_safety import find_unsafe, float_tensors, simulated
from edgec.compiler.types import Range, TensorStatistics
from edgec.passes import float16
from edgec.passes.cast_fp16 import CastFloat16, mark_float32
from edgec.passes.placement import observed_tensors
from edgec.passes.placement_lint import lint
from edgec.passes.quantize import Quantize
from onnx.reference import ReferenceEvaluator
from test_placement import RESIDUAL, parse

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
RNG = np.random.default_rng(3)


@dataclass
class Batch:
    feed: dict
    count: int
    labels: None = None


def cast(model: ir.Model, **keep: str):
    result = CastFloat16(keep)(model)
    onnx.checker.check_model(model_io.serialize(model), full_check=True)
    no_pairs(model)
    return result


def no_pairs(model: ir.Model) -> None:
    for node in model.graph:
        source = node.inputs[0].producer() if node.op_type == "Cast" else None
        assert source is None or source.op_type != "Cast", f"{source.name} -> {node.name}"


def run(model: ir.Model, **feed):
    return Session(model_io.serialize(model), threads=1, optimise=False).run(feed)


def exactly(model: ir.Model, **feed):
    """Run in numpy, which rounds every float16 result; ONNX Runtime's CPU operators do so only behind a chain."""
    evaluator = ReferenceEvaluator(onnx.load_from_string(model_io.serialize(model)))
    with np.errstate(all="ignore"):
        return dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))


def normal(*shape, scale=1.0):
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def types(model: ir.Model) -> dict[str, str]:
    """Return node name -> the type of its first output."""
    return {n.name: n.outputs[0].dtype.name for n in model.graph if n.op_type != "Cast"}


def counts(model: ir.Model) -> Counter:
    return Counter(n.op_type for n in model.graph)


TWO_LAYERS = """g (float[N,16] x) => (float[N,8] y) <float[16,32] w1, float[32] b1, float[32,8] w2> {
    h = Gemm (x, w1, b1)
    r = Relu (h)
    y = MatMul (r, w2)
}"""


def test_numbers_are_those_of_float16():
    """Each result is rounded once; inside a node the sums are ONNX Runtime's float32."""
    model = parse(TWO_LAYERS)
    parts = {k: v.const_value.numpy() for k, v in model.graph.initializers.items()}
    result = cast(model)
    assert (result.modified, result.rewrites, result.refusals) == (True, 3, ())
    x = normal(4, 16)

    def half(a):
        return a.astype(np.float16).astype(np.float32)

    h = half(half(x) @ half(parts["w1"]) + half(parts["b1"]))
    expected = half(np.maximum(h, 0) @ half(parts["w2"]))
    got = run(model, x=x)["y"]
    assert got.dtype == np.float32
    # a sum next to the middle between two float16 may round the other way: one step, 2^-10
    np.testing.assert_allclose(got, expected, atol=2**-10 * np.abs(expected).max())


def test_casts_stand_at_the_borders_and_constants_are_cast_here():
    model = parse(TWO_LAYERS)
    cast(model)
    assert counts(model)["Cast"] == 2
    assert {v.dtype for v in model.graph.initializers.values()} == {HALF}
    assert set(model.graph.initializers) == {"w1", "b1", "w2"}
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT, FLOAT]
    assert model.graph.outputs[0].name == "y"


def test_a_second_run_changes_nothing():
    model = parse(TWO_LAYERS)
    assert cast(model, Relu_1="because").modified
    before = ir.to_proto(model).SerializeToString()
    assert not cast(model, Relu_1="because").modified
    assert ir.to_proto(model).SerializeToString() == before


def test_a_kept_node_stands_between_two_casts():
    model = parse(TWO_LAYERS)
    result = cast(model, Relu_1="because")
    assert [(r.node, r.rule, r.why) for r in result.refusals] == [("Relu_1", "kept-float32", "because")]
    assert types(model) == {"Gemm_0": "FLOAT16", "Relu_1": "FLOAT", "MatMul_2": "FLOAT16"}
    assert counts(model)["Cast"] == 4


def test_a_mark_in_the_model_keeps_a_node_too():
    model = parse(TWO_LAYERS)
    mark_float32(model, {"Gemm_0": "measured"})
    again = ir.from_proto(onnx.load_from_string(model_io.serialize(model)))
    assert {r.node: r.why for r in cast(again).refusals} == {"Gemm_0": "measured"}


def test_a_constant_that_both_sides_read_is_kept_twice():
    text = """g (float[N,16] x) => (float[N,16] y) <float[16] c, float[16,16] w> {
        a = Add (x, c)
        m = MatMul (a, w)
        y = Mul (m, c) }"""
    model = parse(text)
    cast(model, Mul_2="because")
    assert {v.name: v.dtype for v in model.graph.initializers.values()} == {"c": FLOAT, "c_float16": HALF, "w": HALF}


def test_nothing_is_cast_where_no_layer_would_gain():
    model = parse("g (float[N,4] x) => (float[N,4] y) { a = Relu (x)\n y = Exp (a) }")
    assert not cast(model).modified


def test_several_outputs_one_of_them_read_inside():
    text = "g (float[N,16] x) => (float[N,16] a, float[N,16] b) <float[16,16] w> { a = MatMul (x, w)\n b = Relu (a) }"
    model = parse(text)
    cast(model)
    relu = next(n for n in model.graph if n.op_type == "Relu")
    assert relu.inputs[0].dtype == HALF and counts(model)["Cast"] == 3
    x = normal(2, 16)
    out = run(model, x=x)
    np.testing.assert_array_equal(out["b"], np.maximum(out["a"], 0))


def test_a_model_partly_in_float16_gets_no_pairs():
    text = """g (float[N,16] x) => (float[N,16] y) <float[16,16] w1, float16[16,16] w2, float[16,16] w3> {
        a = MatMul (x, w1)
        h = Cast <to = 10> (a)
        b = MatMul (h, w2)
        f = Cast <to = 1> (b)
        y = MatMul (f, w3) }"""
    model, exact = parse(text), parse(text)
    cast(model)
    assert counts(model) == {"MatMul": 3, "Cast": 2}
    x = normal(2, 16)
    want = run(exact, x=x)["y"]
    np.testing.assert_allclose(run(model, x=x)["y"], want, atol=2**-8 * np.abs(want).max())  # three layers' roundings


def test_subgraphs_read_float32():
    text = """g (float[2,16] x, bool c) => (float[2,16] y) <float[16,16] w, float[16,16] v> {
        a = MatMul (x, w)
        t = If (c) <then_branch = yes () => (float[2,16] p) { p = Relu (a) },
                    else_branch = no () => (float[2,16] q) { q = Neg (a) }>
        y = MatMul (t, v) }"""
    model = parse(text)
    result = cast(model)
    assert [r.rule for r in result.refusals] == ["subgraph"]
    x = normal(2, 16)
    for flag in (True, False):
        want = run(parse(text), x=x, c=np.array(flag))["y"]
        # two layers of 16 terms each
        np.testing.assert_allclose(run(model, x=x, c=np.array(flag))["y"], want, atol=2**-9 * np.abs(want).max())


# ------------------------------------------------------------------------------------------ what stays by itself

STAYS = {
    "no-float16": ("r = Range (s, t, s)\nv = Add (m, r)", 17),
    "float32-by-nature": ("r = RandomNormalLike (m)\nv = Add (m, r)", 17),
    "shape-arithmetic": (
        "d = Shape <start = 1, end = 2> (m)\nf = Cast <to = 1> (d)\nh = Mul (f, s)\nv = Mul (m, h)",
        17,
    ),
    "foreign-operator": ("v = com.microsoft.Gelu (m)", 17),
    "constant": ("v = Add (m, big)", 17),
}


@pytest.mark.parametrize("rule", STAYS)
def test_what_stays_in_float32(rule):
    body, opset = STAYS[rule]
    text = f"""<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g (float[N,4] x) => (float[N,4] y)
    <float[4,4] w, float s = {{1.0}}, float t = {{5.0}}, float[1] big = {{-1e9}}> {{
        m = MatMul (x, w)
        {body}
        y = MatMul (v, w) }}"""
    model = parse(text)
    result = cast(model)
    assert result.modified
    rules = {r.rule for r in result.refusals}
    assert rule in rules and rules <= {rule, "unknown-type"}  # ONNX knows nothing of what a foreign operator gives
    run(model, x=normal(2, 4))


def test_resize_keeps_its_scales():
    text = """g (float[N,4,4,4] x) => (float[N,4,8,8] y) <float[4,4,1,1] w, float[4] scales = {1, 1, 2, 2}> {
        c = Conv (x, w)
        y = Resize <mode = "linear"> (c, , scales) }"""
    model = parse(text)
    cast(model)
    resize = next(n for n in model.graph if n.op_type == "Resize")
    assert (resize.inputs[0].dtype, resize.inputs[2].dtype, resize.outputs[0].dtype) == (HALF, FLOAT, HALF)


def test_a_clip_without_an_end_is_cast():
    """Bounds at the end of float32 become those of float16: nothing between them changes."""
    text = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float low = {0}, float high = {3.4e38}> {
        c = MatMul (x, w)
        y = Clip (c, low, high) }"""
    model = parse(text)
    assert cast(model).refusals == ()
    assert model.graph.initializers["high"].const_value.numpy() == 65504


@pytest.mark.parametrize(("value", "fits"), [(1.0, True), (1e-5, True), (1e-6, False), (1e-12, False), (7e4, False)])
def test_constants_at_the_ends_of_float16(value, fits):
    """1e-5 is 168 of the smallest steps, 1e-6 only 17."""
    text = "g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float eps> { m = MatMul (x, w)\n y = Add (m, eps) }"
    proto = ir.to_proto(parse(text))
    (eps,) = [t for t in proto.graph.initializer if t.name == "eps"]
    eps.CopyFrom(onnx.numpy_helper.from_array(np.array(value, np.float32), "eps"))
    model = ir.from_proto(proto)
    assert [r.rule for r in cast(model).refusals] == ([] if fits else ["constant"])


def test_rounding_a_scale_never_gives_zero():
    scales = np.array([0.0, 1e-12, 1e-3], np.float32)
    assert (float16.rounded_scale(scales) > 0).all()
    assert float16.rounded_scale(scales)[2] == np.float16(1e-3)


# ------------------------------------------------------------------------------------------ with Q/DQ


def test_quantized_models_are_float16_between_their_pairs():
    """From opset 19 on Q and DQ work in float16: no Cast but at the ends, and TensorRT finds nothing wrong."""
    model = parse(RESIDUAL, opset=19)
    found = {name: Range(-1.0, 1.0) for name in observed_tensors(model, tensorrt.SUPPORTS)}
    Quantize(found, tensorrt.SUPPORTS, tensorrt.INT8)(model)
    feed = normal(2, 16, 6, 6)
    before = run(model, x=feed)["y"]
    assert cast(model).refusals == ()
    assert counts(model)["Cast"] == 2 and lint(model) == ()
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].dtype == HALF
    after = run(model, x=feed)["y"]
    # numbers next to the middle between two integers fall to the other side: few, but a whole step of 8 bits each
    assert 10 * np.log10((before**2).sum() / ((before - after) ** 2).sum()) > 30


def test_before_opset_19_pairs_stay_in_float32():
    model = parse(RESIDUAL, opset=13)
    found = {name: Range(-1.0, 1.0) for name in observed_tensors(model, tensorrt.SUPPORTS)}
    Quantize(found, tensorrt.SUPPORTS, tensorrt.INT8)(model)
    assert {r.rule for r in cast(model).refusals} == {"no-float16"}
    run(model, x=normal(1, 16, 6, 6))


# ------------------------------------------------------------------------------------------ measuring


def measured(model: ir.Model, feeds: list[dict], errors: bool = True) -> dict[str, str]:
    proto = ir.to_proto(model)
    names = float_tensors(model)
    inputs = {v.name for v in proto.graph.input}
    del proto.graph.output[:]
    for name in names:
        if name not in inputs:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    seen: dict[str, list] = {}
    for feed in feeds:
        out = Session(proto.SerializeToString(), optimise=False).run(feed) | feed
        for name in names:
            seen.setdefault(name, []).extend((float(out[name].min()), float(out[name].max())))
    statistics = {name: TensorStatistics(min(v), max(v), len(feeds)) for name, v in seen.items()}
    return find_unsafe(model, statistics, [Batch(f, 1) for f in feeds] if errors else (), images=len(feeds))


def test_a_well_behaved_model_is_safe():
    assert measured(parse(TWO_LAYERS), [{"x": normal(4, 16)}]) == {}


def test_overflow_is_found_and_kept_apart():
    text = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float big = {3000}, float small = {0.001}> {
        a = MatMul (x, w)
        b = Mul (a, big)
        c = Mul (b, small)
        y = MatMul (c, w) }"""
    model, feed = parse(text), {"x": np.full((2, 4), 30, np.float32)}
    unsafe = measured(model, [feed], errors=False)
    assert set(unsafe) == {"Mul_1", "Mul_2"} and "65504" in unsafe["Mul_1"]
    want = run(model, **feed)["y"]
    broken = parse(text)
    cast(broken)
    assert not np.isfinite(exactly(broken, **feed)["y"]).all()
    cast(model, **unsafe)
    np.testing.assert_allclose(exactly(model, **feed)["y"], want, rtol=0.01)


LAYER_NORM = """g (float[N,16] x) => (float[N,16] y) <float[16,16] w, float[16] one, float[16] zero, float[16,16] v> {
    h = MatMul (x, w)
    n = LayerNormalization <axis = -1> (h, one, zero)
    y = MatMul (n, v)
}"""
WRITTEN_OUT = """g (float[N,16] x) => (float[N,16] y)
<float[16,16] w, float two = {2}, float eps = {0.001}, float[16,16] v> {
    h = MatMul (x, w)
    m = ReduceMean <axes = [-1]> (h)
    d = Sub (h, m)
    sq = Pow (d, two)
    variance = ReduceMean <axes = [-1]> (sq)
    e = Add (variance, eps)
    s = Sqrt (e)
    n = Div (d, s)
    y = MatMul (n, v)
}"""


def test_layer_normalisation_of_large_numbers_stays():
    """Its numbers are far below 65504, their squares are not."""
    for scale, expected in ((1.0, set()), (300.0, {"LayerNormalization_1"})):
        unsafe = measured(parse(LAYER_NORM, opset=17), [{"x": normal(4, 16, scale=scale)}], errors=False)
        assert set(unsafe) == expected


def test_layer_normalisation_written_out_stays_where_it_squares():
    unsafe = measured(parse(WRITTEN_OUT), [{"x": normal(4, 16, scale=300.0)}], errors=False)
    assert {"Pow_3", "ReduceMean_4"} <= set(unsafe) and not {"MatMul_0", "MatMul_8", "Sub_2"} & set(unsafe)


def test_a_long_mean_stays():
    text = """g (float[1,1,128,128] x) => (float[1,1,1,1] y) <float[1,1,1,1] w> {
        c = Conv (x, w)
        y = GlobalAveragePool (c) }"""
    feed = {"x": np.full((1, 1, 128, 128), 10, np.float32)}  # 16384 times 10 is too much, 10 is not
    model = parse(text)
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((1, 1, 1, 1), np.float32), name="w")
    assert set(measured(model, [feed], errors=False)) == {"GlobalAveragePool_1"}


def test_a_difference_of_near_numbers_is_found_by_its_error():
    """1000 + d has steps of 0.5 in float16: d is lost, unless what makes both sides stays in float32 as well."""
    text = """g (float[N,16] x) => (float[N,16] y)
    <float[16,16] w, float[16,16] v, float thousand = {1000}, float[16,16] u> {
        a = MatMul (x, w)
        big = Add (a, thousand)
        b = MatMul (x, v)
        other = Add (b, thousand)
        d = Sub (big, other)
        y = MatMul (d, u) }"""
    model, feeds = parse(text), [{"x": normal(4, 16, scale=0.01)}]
    unsafe = measured(model, feeds)
    assert set(unsafe) == {"Sub_4", "Add_1", "Add_3"} and "dB" in unsafe["Sub_4"] and "Sub_4 needs" in unsafe["Add_1"]
    want = run(model, **feeds[0])["y"]

    def error(keep):
        half = parse(text)
        cast(half, **keep)
        return np.abs(exactly(half, **feeds[0])["y"] - want).max() / np.abs(want).max()

    assert error({}) > 0.2 and error(unsafe) < 0.005


def test_numbers_too_small_are_found_by_their_error():
    text = """g (float[N,16] x) => (float[N,16] y) <float[16,16] w, float tiny = {0.0005}> {
        a = MatMul (x, w)
        b = Mul (a, tiny)
        c = Mul (b, tiny)
        e = Div (c, tiny)
        y = MatMul (e, w) }"""
    unsafe = measured(parse(text), [{"x": normal(4, 16, scale=0.1)}])
    assert "Mul_2" in unsafe and "MatMul_0" not in unsafe


# ------------------------------------------------------------------------------------------ simulating


def test_the_simulation_rounds_where_a_device_would():
    """Against numpy's float16, which sums in float16 too: within a few steps of it; and it overflows as that does."""
    model, half = parse(TWO_LAYERS), parse(TWO_LAYERS)
    cast(half)
    x = normal(4, 16)
    want, got = exactly(half, x=x)["y"], run(simulated(model), x=x)["y"]
    np.testing.assert_allclose(got, want, atol=2**-8 * np.abs(want).max())
    assert not np.array_equal(got, run(model, x=x)["y"])
    np.testing.assert_array_equal(got, got.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("optimise", [False, True])
def test_the_simulation_overflows(optimise):
    text = """g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float big = {3000}, float small = {0.001}> {
        a = MatMul (x, w)
        b = Mul (a, big)
        c = Mul (b, small)
        y = MatMul (c, w) }"""
    feed = {"x": np.full((2, 4), 30, np.float32)}
    for keep, finite in (({}, False), ({"Mul_1": "large", "Mul_2": "large"}, True)):
        model = simulated(parse(text), keep)
        onnx.checker.check_model(model_io.serialize(model), full_check=True)
        got = Session(model_io.serialize(model), optimise=optimise).run(feed)["y"]
        assert np.isfinite(got).all() == finite
