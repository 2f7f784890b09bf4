"""Concats of one scale: the integers are joined as they are; what that would cost too much is left apart."""

import numpy as np
import onnx_ir as ir
import pytest
from edgec.backends import ort
from edgec.compiler.types import Range
from edgec.passes import placement as placing
from edgec.passes.placement import place
from edgec.passes.placement_join import WIDEST
from edgec.passes.quantize import Quantize
from test_placement import ORT, parse, quantized
from test_quantize import VNNI, build, optimised_ops, ranges_of, run, sqnr

TWO = """g (float[N,8,6,6] x) => (float[N,8,6,6] y) <float[8,8,3,3] w1, float[8,8,1,1] w2, float[8,16,1,1] w3> {
    a = Conv <pads = [1,1,1,1]> (x, w1)
    b = Conv (x, w2)
    c = Concat <axis = 1> (a, b)
    y = Conv (c, w3)
}"""


def the(model: ir.Model, op: str) -> ir.Node:
    (node,) = [n for n in model.graph if n.op_type == op]
    return node


def scales(model: ir.Model) -> dict[str, tuple[float, int]]:
    """Return tensor -> (scale, zero point) of every QuantizeLinear."""
    found = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            scale, zero = (v.const_value.numpy().item() for v in node.inputs[1:])
            found[node.outputs[0].name.removesuffix("_quantized")] = scale, zero
    return found


def joined(text: str, ranges: dict[str, Range]) -> set[str]:
    model = parse(text)
    given = {name: Range(-1.0, 1.0) for name in placing.observed_tensors(model, ort.SUPPORTS)} | ranges
    return {node.outputs[0].name for node in place(model, given, *ORT, {}).joined}


def test_what_is_joined_is_integers_of_one_scale():
    model, result = quantized(TWO, ORT, ranges={"a": Range(-1.0, 2.0), "b": Range(-3.0, 1.0), "c": Range(-2.0, 2.0)})
    assert result.refusals == ()
    concat = the(model, "Concat")
    assert {v.producer().op_type for v in concat.inputs} == {"QuantizeLinear"}
    assert {v.dtype for v in (*concat.inputs, *concat.outputs)} == {ir.DataType.UINT8}
    (reader,) = concat.outputs[0].uses()
    assert reader.node.op_type == "DequantizeLinear"
    found = scales(model)
    assert set(found) == {"x", "a", "b", "y"}, "no rounding behind the Concat"
    assert found["a"] == found["b"] == (pytest.approx(5 / 255), 153)  # from -3 to 2
    assert tuple(v.const_value.numpy().item() for v in reader.node.inputs[1:]) == found["a"]
    assert found["x"][0] == pytest.approx(2 / 255)


@pytest.mark.parametrize(("wide", "is_joined"), [(WIDEST - 0.01, True), (WIDEST + 0.01, False)])
def test_ranges_that_differ_too_much_stay_apart(wide, is_joined):
    ranges = {"a": Range(-1.0, 1.0), "b": Range(-wide, wide), "c": Range(-wide, wide)}
    assert joined(TWO, ranges) == ({"c"} if is_joined else set())
    model, _ = quantized(TWO, ORT, ranges=ranges)
    found = scales(model)
    assert (found["a"] == found["b"]) == is_joined
    assert ("c" in found) == (not is_joined)


def test_the_narrowest_of_all_that_is_tied_counts():
    """d is 2.5 times as wide as b, and b as a: each pair could share a scale, but a would lose more than two bits."""
    text = TWO.replace("w3>", "w3, float[8,24,1,1] w4>").replace(
        "y = Conv (c, w3)", "d = Conv (c, w3)\n    e = Concat <axis = 1> (c, d)\n    y = Conv (e, w4)"
    )
    wide = {name: Range(-r, r) for name, r in (("a", 1.0), ("b", 2.5), ("c", 2.5), ("d", 6.25), ("e", 6.25))}
    assert joined(text, wide) == {"c"}
    assert joined(text, wide | {"d": Range(-3.9, 3.9), "e": Range(-3.9, 3.9)}) == {"c", "e"}


def test_one_sided_ranges_count_from_zero():
    """[9, 10] is [0, 10] on the grid: as wide as [-10, 0], and their union is twice as wide."""
    assert joined(TWO, {"a": Range(9.0, 10.0), "b": Range(-10.0, -9.0), "c": Range(-10.0, 10.0)}) == {"c"}
    assert joined(TWO, {"a": Range(0.0, 1.0), "b": Range(-5.0, -4.0), "c": Range(-5.0, 1.0)}) == set()


RELU = TWO.replace("b = Conv (x, w2)", "r = Conv (x, w2)\n    b = %s")
POSITIVE, SIGNED = Range(0.0, 1.0), Range(-1.0, 1.0)


@pytest.mark.parametrize(
    ("activation", "a", "b", "is_joined"),
    [
        ("Relu (r)", SIGNED, POSITIVE, False),  # the zero point would not stand for what the Relu cuts off
        ("Relu (r)", POSITIVE, POSITIVE, True),
        ("Relu (r)", Range(0.0, 3.0), POSITIVE, True),
        ("Relu (r)", SIGNED, SIGNED, True),  # it stands between the Conv and its rounding in any case
        ("Clip (r, zero, six)", POSITIVE, Range(0.0, 6.0), False),  # six times as wide
        ("Clip (r, zero, six)", Range(0.0, 5.0), Range(0.0, 6.0), True),
        ("Clip (r, zero, six)", Range(0.0, 7.0), Range(0.0, 6.0), False),
        ("Clip (r, zero, six)", Range(-1.0, 5.0), Range(0.0, 6.0), False),
        ("Clip (r, zero)", Range(0.0, 7.0), Range(0.0, 6.0), True),
    ],
)
def test_a_range_never_grows_beyond_where_an_activation_ends(activation, a, b, is_joined):
    text = RELU.replace("w3>", "w3, float zero = {0}, float six = {6}>") % activation
    whole = Range(min(a.min, b.min), max(a.max, b.max))
    assert joined(text, {"a": a, "b": b, "c": whole}) == ({"c"} if is_joined else set())


def weight(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("relus", ["", "a", "b", "ab"])
def test_no_layer_loses_its_integer_kernel(tmp_path, relus):
    text = """g (float[N,8,6,6] x) => (float[N,8,6,6] y) {
      a0 = Conv <pads = [1,1,1,1]> (x, w1)
      a = A (a0)
      b0 = Conv (x, w2)
      b = B (b0)
      c = Concat <axis = 1> (a, b)
      y = Conv (c, w3) }"""
    for name in "ab":
        act = f"{name} = {name.upper()} ({name}0)"
        text = text.replace(act, f"{name} = Relu ({name}0)") if name in relus else (
            text.replace(act, "").replace(f"{name}0", name)
        )  # fmt: skip
    model = build(text, w1=weight(8, 8, 3, 3), w2=weight(8, 8, 1, 1), w3=weight(8, 16, 1, 1))
    feed = {"x": np.random.default_rng(0).normal(size=(2, 8, 6, 6)).astype(np.float32)}
    Quantize(ranges_of(model, ort.SUPPORTS, feed), ort.SUPPORTS, VNNI)(model)
    ops = optimised_ops(model, tmp_path)
    assert (ops["QLinearConv"], ops["FusedConv"], ops["Conv"]) == (3, 0, 0)


#: Two units of a ShuffleNet: half of the channels passes by, the other half is computed; then they are shuffled.
SHUFFLE = """g (float[N,8,6,6] x) => (float[N,8,6,6] y) {
    a0 = Conv <pads = [1,1,1,1]> (x, w1)
    a = Relu (a0)
    p, q = Split <axis = 1> (a)
    r0 = Conv (q, w2)
    r = Relu (r0)
    c = Concat <axis = 1> (p, r)
    f = Reshape (c, apart)
    g = Transpose <perm = [0,2,1,3,4]> (f)
    h = Reshape (g, together)
    s = Slice (h, from, half, channels)
    t = Slice (h, half, all, channels)
    u0 = Conv <pads = [1,1,1,1]> (t, w3)
    u = Relu (u0)
    d = Concat <axis = 1> (s, u)
    y = Conv (d, w4)
}"""


def shuffle(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) / 2)).astype(np.float32)

    numbers = {
        "apart": [0, 2, 4, 6, 6],
        "together": [0, 8, 6, 6],
        "from": [0],
        "half": [4],
        "all": [8],
        "channels": [1],
    }
    return build(
        SHUFFLE,
        w1=draw(8, 8, 3, 3), w2=draw(4, 4, 1, 1), w3=draw(4, 4, 3, 3), w4=draw(8, 8, 1, 1),
        **{name: np.array(value, np.int64) for name, value in numbers.items()},
    )  # fmt: skip


@pytest.fixture
def feed():
    return {"x": np.random.default_rng(1).normal(size=(4, 8, 6, 6)).astype(np.float32)}


def test_a_chain_through_splits_and_slices_has_one_scale(feed, tmp_path):
    model = shuffle()
    Quantize(ranges_of(model, ort.SUPPORTS, feed), ort.SUPPORTS, VNNI)(model)
    found = scales(model)
    assert set(found) == {"x", "a", "r", "u", "y"}
    assert found["a"] == found["r"] == found["u"]
    ops = optimised_ops(model, tmp_path)
    assert ops["QLinearConv"] == 4
    assert ops["QLinearConcat"] == 0
    assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1)  # x and y


def test_what_passes_by_is_rounded_once(feed):
    """The half of `a` that goes through both Concats arrives as the very integers that it was rounded to."""
    model = shuffle()
    Quantize(ranges_of(model, ort.SUPPORTS, feed), ort.SUPPORTS, VNNI)(model)
    proto = ir.to_proto(model)
    names = ["a_quantized", "d_quantized"]
    proto.graph.output.extend(v for v in proto.graph.value_info if v.name in names)
    first, last = run(proto, feed, names)
    assert first.dtype == last.dtype == np.uint8
    # p is channels 0 to 3 of a; the shuffle puts p0, r0, p1, r1 first, and these are what passes by the second unit
    np.testing.assert_array_equal(last[:, 0], first[:, 0])
    np.testing.assert_array_equal(last[:, 2], first[:, 1])


@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_close_to_float_and_closer_than_with_a_scale_for_each(feed, monkeypatch, seed):
    exact = run(shuffle(seed), feed)[0]
    found = {}
    for name in ("shared", "apart"):
        model = shuffle(seed)
        if name == "apart":
            monkeypatch.setattr(placing, "share_scales", lambda placement: None)
        Quantize(ranges_of(model, ort.SUPPORTS, feed), ort.SUPPORTS, VNNI)(model)
        found[name] = sqnr(exact, run(model, feed)[0])
    assert found["shared"] > 33
    assert found["shared"] > found["apart"] - 1  # what is shared costs less than a bit, and is rounded less often


def test_float_tensors_are_rounded_in_front_of_the_concat():
    """x is a graph input, read by the Concat alone."""
    text = TWO.replace("x) =>", "x, float[N,8,6,6] z) =>").replace("b = Conv (x, w2)", "b0 = Conv (x, w2)").replace(
        "Concat <axis = 1> (a, b)", "Concat <axis = 1> (a, z)"
    )  # fmt: skip
    model, _ = quantized(text, ORT)
    concat = the(model, "Concat")
    assert [v.name for v in concat.inputs] == ["a_quantized", "z_quantized"]
    assert {v.dtype for v in concat.inputs} == {ir.DataType.UINT8}


def test_a_joined_tensor_that_is_a_graph_output_is_float_there(feed):
    text = TWO.replace("(float[N,8,6,6] y)", "(float[N,8,6,6] y, float[N,16,6,6] c)")
    model, _ = quantized(text, ORT, ranges=ranges_of(parse(text), ort.SUPPORTS, feed))
    assert the(model, "Concat").outputs[0].dtype == ir.DataType.UINT8
    for exact, got in zip(run(parse(text), feed), run(model, feed), strict=True):
        assert got.dtype == np.float32
        assert sqnr(exact, got) > 30


def test_a_tensor_that_is_joined_with_itself(feed):
    text = TWO.replace("Concat <axis = 1> (a, b)", "Concat <axis = 1> (a, a)").replace("    b = Conv (x, w2)\n", "")
    model, _ = quantized(text, ORT)
    assert [v.name for v in the(model, "Concat").inputs] == ["a_quantized"] * 2
    run(model, feed)


def test_a_relu_behind_the_concat_is_absorbed_into_a_rounding_instead():
    text = TWO.replace("c = Concat", "c0 = Concat").replace("    y = Conv", "    c = Relu (c0)\n    y = Conv")
    assert joined(text, {}) == set()
    model, _ = quantized(text, ORT)
    assert {v.producer().op_type for v in the(model, "Concat").inputs} == {"DequantizeLinear"}
