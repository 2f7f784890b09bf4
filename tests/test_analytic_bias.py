"""Means and variances behind BatchNormalization, by hand and by Monte Carlo; and the bias correction made of them."""

import math
from dataclasses import replace

import edgec
import numpy as np
import pytest
from edgec.backends import ort as ort_backend
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.quantization.analytic_bias import corrected, shifts
from edgec.compiler.quantization.channel_moments import Moments, clipped, of_batch_norms, propagate
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.quantization.sensitivity import layer_errors
from edgec.compiler.types import QuantScheme
from test_quantize import build, ranges_of, run
from test_sensitivity import Batch
from zoo import NORM
from zoo import model as parse

#: Weights of so few bits that their error is far above the rounding of the activations, which has no mean to speak of.
W4 = replace(ort_backend.SCHEMES[0][1], weight_max=7)


def array(*numbers):
    return np.array(numbers, dtype=np.float64)


def origin(name="n"):
    return frozenset({name})


# ------------------------------------------------------------------------------------------ the normal distribution


def test_a_relu_of_a_standard_normal_by_hand():
    """Half of it is 0; E = phi(0), E of the square = 1/2."""
    mean, variance = clipped(array(0.0), array(1.0), 0.0, math.inf)
    assert mean == pytest.approx(1 / math.sqrt(2 * math.pi), rel=1e-12)
    assert variance == pytest.approx(0.5 - 1 / (2 * math.pi), rel=1e-12)


def test_no_bound_changes_nothing_and_a_constant_is_clipped():
    mean, variance = clipped(array(0.3, -2.0), array(4.0, 0.0), -math.inf, math.inf)
    np.testing.assert_allclose((mean, variance), ([0.3, -2.0], [4.0, 0.0]), rtol=0, atol=1e-12)
    mean, variance = clipped(array(-1.0, 3.0, 8.0), array(0.0, 0.0, 0.0), 0.0, 6.0)
    np.testing.assert_allclose((mean, variance), ([0.0, 3.0, 6.0], [0.0] * 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 0.5)])
def test_clipping_against_monte_carlo(bounds):
    rng = np.random.default_rng(0)
    mean, deviation = array(-3.0, -0.5, 0.0, 1.0, 5.0), array(1.0, 2.0, 0.1, 0.7, 3.0)
    sample = np.clip(rng.normal(mean, deviation, (400_000, 5)), *bounds)
    ours = clipped(mean, deviation**2, *bounds)
    np.testing.assert_allclose(ours[0], sample.mean(0), rtol=0, atol=5 * 3 / math.sqrt(400_000))  # 5 standard errors
    np.testing.assert_allclose(ours[1], sample.var(0), rtol=0.02, atol=1e-4)


# ------------------------------------------------------------------------------------------ through a graph

SECOND = NORM.format(2)
for word in ("scale", "bias", "mean", "var"):
    SECOND = SECOND.replace(word, f"{word}2")
BLOCK = f"""
g (float[N,2,4,4] x) => (float[N,4,1,1] y)
<{NORM.format(2)}, {SECOND},
 float six, float zero, int64[8] pads, int64[2] starts, int64[2] ends, int64[2] axes, int64[2] steps> {{
    n = BatchNormalization (x, scale, bias, mean, var)
    r = Clip (n, zero, six)
    m = BatchNormalization (x, scale2, bias2, mean2, var2)
    s = Add (m, r)
    t = Relu (s)
    half = Slice (t, starts, ends, axes, steps)
    p = Pad (half, pads)
    y = GlobalAveragePool (p)
}}
"""


def number(value):
    return np.array(value, np.float32)


@pytest.fixture
def block():
    given = {
        "scale": number([2.0, -1.0]), "bias": number([1.0, 0.0]), "var": number([3.0, 1e-5]),
        "scale2": number([1.0, 1.0]), "bias2": number([0.0, 1.0]), "var2": number([1.0, 1.0]),
        "six": number(6), "zero": number(0), "pads": np.array([0, 1, 0, 0, 0, 1, 0, 0]),
        "starts": np.array([0, 0]), "ends": np.array([4, 4]), "axes": np.array([2, 3]), "steps": np.array([2, 2]),
    }  # fmt: skip
    return parse(BLOCK, weights=given)


def test_a_batch_norm_gives_beta_and_gamma(block):
    found = of_batch_norms(block)["n"]
    np.testing.assert_allclose(found.mean, [1.0, 0.0])
    np.testing.assert_allclose(found.variance, [4.0 * 3 / (3 + 1e-5), 0.5], rtol=1e-6)  # epsilon is as large as var
    assert found.origins == {"n"}


def test_moments_through_a_residual_block(block):
    found = propagate(block, of_batch_norms(block))
    n, m, r, s, t = (found[name] for name in "nmrst")
    np.testing.assert_array_equal((r.mean, r.variance), clipped(n.mean, n.variance, 0.0, 6.0))
    np.testing.assert_array_equal((s.mean, s.variance), (m.mean + r.mean, m.variance + r.variance))
    np.testing.assert_array_equal((t.mean, t.variance), clipped(s.mean, s.variance, 0.0, math.inf))
    assert found["half"] is t  # every second position
    np.testing.assert_array_equal(found["p"].mean, [0.0, *t.mean, 0.0])
    np.testing.assert_array_equal(found["p"].variance, [0.0, *t.variance, 0.0])
    np.testing.assert_array_equal(found["y"].mean, found["p"].mean)
    assert found["y"].variance is None


def test_two_branches_of_one_norm_are_not_independent():
    text = f"""g (float[N,2,4,4] x) => (float[N,2,4,4] y) <{NORM.format(2)}> {{
        n = BatchNormalization (x, scale, bias, mean, var)
        r = Relu (n)
        s = Add (n, r)
        y = Relu (s) }}"""
    model = parse(text)
    found = propagate(model, of_batch_norms(model))
    np.testing.assert_array_equal(found["s"].mean, found["n"].mean + found["r"].mean)  # means add all the same
    assert found["s"].variance is None
    assert "y" not in found


def test_what_nothing_is_known_of_gets_no_claim():
    text = f"""g (float[N,2,4,4] x) => (float[N,2,4,4] y) <{NORM.format(2)}, float[2,2,1,1] w> {{
        n = BatchNormalization (x, scale, bias, mean, var)
        p = MaxPool <kernel_shape = [1, 1]> (n)
        c = Conv (n, w)
        y = Add (c, x) }}"""
    model = parse(text)
    assert set(propagate(model, of_batch_norms(model))) == {"n"}


def test_channels_put_together_and_taken_apart():
    text = """g (float[N,2,4,4] u, float[N,1,4,4] v) => (float[N,2,4,4] y)
    <int64[1] starts, int64[1] ends, int64[1] axes, int64[1] steps> {
        a = Identity (u)
        b = Identity (v)
        c = Concat <axis = 1> (a, b)
        y = Slice (c, starts, ends, axes, steps) }"""
    slots = {k: np.array([v]) for k, v in {"starts": -1, "ends": -9, "axes": 1, "steps": -2}.items()}
    known = {"a": Moments(array(1, 2), array(1, 4), origin("a")), "b": Moments(array(3), None, origin("b"))}
    found = propagate(parse(text, weights=slots), known)
    np.testing.assert_array_equal(found["c"].mean, [1, 2, 3])
    assert found["c"].variance is None and found["c"].origins == {"a", "b"}
    np.testing.assert_array_equal(found["y"].mean, [3, 1])


# ------------------------------------------------------------------------------------------ layers


def test_the_shift_of_a_layer_by_hand():
    """One input of mean 0.5 at each place, weights that lose 0.25 by rounding: 3 x 3 places, fewer at the border."""
    text = "g (float[N,1,3,3] x) => (float[N,1,3,3] y) { r = Relu (x)\n y = Conv <pads = [1,1,1,1]> (r, w) }"
    w = np.full((1, 1, 3, 3), 0.25, np.float32)
    w[0, 0, 1, 1] = 7.0  # the scale is 1, and 0.25 becomes 0
    model = build(text, w=w)
    ranges = ranges_of(model, ort_backend.SUPPORTS, {"x": np.ones((1, 1, 3, 3), np.float32)})
    quantizer = Quantizer(model, ort_backend.SUPPORTS, W4, ranges)
    found = shifts(model, quantizer.build().model, {"r": Moments(array(0.5), None, origin())})
    # corners of the kernel lie on the image at 4 of 9 positions, its edges at 6 of 9
    assert found["Conv_1"] == pytest.approx([0.5 * 0.25 * (4 * 4 / 9 + 4 * 6 / 9)], rel=1e-6)


@pytest.mark.parametrize("text, shape", [
    ("y = Conv <group = 2, strides = [2, 1], dilations = [1, 2], pads = [1, 2, 0, 2]> (r, w, b)", (6, 2, 3, 3)),
    ("y = Conv (r, w, b)", (6, 4, 1, 1)),
    ("f = Flatten (r)\n y = Gemm <transB = 1> (f, w, b)", (6, 400)),
    ("f = Flatten (r)\n y = Gemm (f, w, b)", (400, 6)),
    ("f = Flatten (r)\n m = MatMul (f, w)\n y = Add (m, b)", (400, 6)),
])  # fmt: skip
def test_the_shift_is_what_the_mean_image_loses(text, shape):
    """Against the two networks themselves, run on an image that is its channels' means everywhere."""
    rng = np.random.default_rng(1)
    model = build(f"g (float[N,4,10,10] x) => (float y) {{ r = Relu (x)\n {text} }}",
                  w=rng.normal(size=shape).astype(np.float32), b=rng.normal(size=6).astype(np.float32))  # fmt: skip
    mean = array(0.5, 1.0, 0.0, 2.0)
    image = np.broadcast_to(mean.reshape(1, 4, 1, 1), (1, 4, 10, 10)).astype(np.float32)
    scheme = QuantScheme("w4", None, True, weight_max=7, bias="float32")
    quantizer = Quantizer(model, ort_backend.SUPPORTS, scheme)
    known = {"r": Moments(mean, None, origin()), "f": Moments(np.repeat(mean, 100), None, origin())}
    found = shifts(model, quantizer.build().model, known)
    (exact,), (coarse,) = run(model, {"x": image}), run(quantizer.build().model, {"x": image})
    lost = (exact - coarse).astype(np.float64)
    expected = lost.mean(axis=tuple(i for i in range(lost.ndim) if i != 1))
    (ours,) = found.values()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(exact).max())  # float32 sums in the networks
    (fixed,) = run(replace(quantizer, bias_shift=found).build().model, {"x": image})
    after = (exact - fixed).astype(np.float64).mean(axis=tuple(i for i in range(lost.ndim) if i != 1))
    np.testing.assert_allclose(after, 0, atol=1e-5 * np.abs(exact).max())


NET = f"""
g (float[N,8,6,6] x) => (float[N,8,6,6] y)
<float[8,8,1,1] w1, {NORM.format(8)}, float[8,8,3,3] w2, float[8] b2> {{
    c = Conv (x, w1)
    n = BatchNormalization (c, scale, bias, mean, var)
    i = Identity (n)
    r = Relu (i)
    y = Conv <pads = [1,1,1,1]> (r, w2, b2)
}}
"""


@pytest.fixture(scope="module")
def net():
    """Images for which the BatchNormalization's statistics hold, and the model before and after folding."""
    images = np.random.default_rng(3).normal(size=(400, 8, 6, 6)).astype(np.float32)
    w1 = np.random.default_rng(4).normal(size=(8, 8, 1, 1)).astype(np.float32)
    found = np.einsum("oi,nihw->nohw", w1[:, :, 0, 0], images)
    original = parse(NET, weights={"w1": w1, "mean": found.mean((0, 2, 3)), "var": found.var((0, 2, 3))})
    passes = pipeline.exact_passes()
    folded, _ = pipeline.run(model_io.copy(original), passes, None)
    normalised, _ = pipeline.run(original, [p for p in passes if p.stage != "fold"], None)
    assert not any(n.op_type == "BatchNormalization" for n in folded.graph)
    ranges = ranges_of(folded, ort_backend.SUPPORTS, {"x": images})
    return Quantizer(folded, ort_backend.SUPPORTS, W4, ranges), normalised, [Batch({"x": images}, len(images))]


def test_it_agrees_with_the_measured_shift_where_the_statistics_hold(net):
    quantizer, normalised, batches = net
    found = corrected(quantizer, normalised).bias_shift
    measured = layer_errors(quantizer.model, quantizer.build().model, batches, images=400)
    (name,) = found  # of the first layer's input nothing is known
    expected = measured[name].shift
    # 14400 positions a channel, neighbours of 3 x 3 alike: the mean is known to about 1 % of the deviation
    np.testing.assert_allclose(found[name], expected, rtol=0, atol=0.05 * np.abs(expected).max())


def test_the_corrected_network_errs_less(net):
    quantizer, normalised, (batch,) = net
    (exact,) = run(quantizer.model, batch.feed)

    def error(one):
        (got,) = run(one.build().model, batch.feed)
        return float(((got - exact).astype(np.float64) ** 2).sum())

    assert error(corrected(quantizer, normalised)) < 0.95 * error(quantizer)


def test_a_network_without_batch_norm_is_left_as_it_is(net):
    quantizer, _, _ = net
    assert corrected(quantizer, quantizer.model).bias_shift == {}


# ------------------------------------------------------------------------------------------ a compile without images


@pytest.fixture(scope="module")
def ranges(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("ranges") / "ranges.json"
    edgec.calibrate(tiny / "model.onnx", tiny / "images", file)
    return file


def test_a_compile_without_images_corrects_biases_and_says_so(tiny, ranges, tmp_path):
    report = edgec.compile(tiny / "model.onnx", tmp_path / "out", ranges=ranges, precision="int8", threads=1)
    (step,) = report.steps
    assert (step.name, step.kept, step.sqnr_before_db, step.sqnr_after_db) == ("bias-correction", True, None, None)
    assert step.detail.startswith("2 layers")  # all but the first: its input is the image


def test_and_leaves_them_where_it_is_told_to(tiny, ranges, tmp_path):
    options = {"ranges": ranges, "precision": "int8", "threads": 1}
    report = edgec.compile(tiny / "model.onnx", tmp_path / "a", without="bias-correction", **options)
    assert report.steps == ()
    edgec.compile(tiny / "model.onnx", tmp_path / "b", **options)
    assert (tmp_path / "a" / "model.onnx").read_bytes() != (tmp_path / "b" / "model.onnx").read_bytes()
