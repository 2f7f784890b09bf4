"""Outlier channels move into the weights: same numbers in float, far fewer lost in eight bits."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler import model as model_io
from edgec.passes.normalise import Normalise
from edgec.passes.smooth import Smooth, choose_alpha, factors, predicted_error, smoothed_tensors
from equivalence import assert_equivalent, sample, session

RTOL = 2e-6  # x / s and s W are rounded once more each, in sums of at most 16 products
C = 16
OUTLIERS = (3, 11)

LAYER_NORM = "x0 = LayerNormalization <axis = -1, epsilon = 0.00001> (x, g, b)"
OLD_LAYER_NORM = """
    axes = Constant <value_ints = [-1]> ()
    two = Constant <value = float {2.0}> ()
    tiny = Constant <value = float {0.00001}> ()
    mean = ReduceMean <axes = [-1]> (x)
    centred = Sub (x, mean)
    square = Pow (centred, two)
    var0 = ReduceMean <axes = [-1]> (square)
    var1 = Add (var0, tiny)
    deviation = Sqrt (var1)
    unit = Div (centred, deviation)
    scaled = Mul (g, unit)
    x0 = Add (scaled, b)"""


def outliers(gain=30.0):
    """Gains and shifts with two channels far above the rest."""
    rng = np.random.default_rng(5)
    g, b = rng.uniform(0.5, 1.5, C), rng.normal(0, 0.2, C)
    g[list(OUTLIERS)] *= gain
    return {"g": g, "b": b}


def build(body, *, norm=LAYER_NORM, weights="float[16,8] w", out="float[N,5,8] y", more=None, opset=17):
    """Return a normalisation of x (N, 5, 16), called x0, and what reads it."""
    text = f"g (float[N,5,{C}] x) => ({out}) <float[{C}] g, float[{C}] b, {weights}> {{ {norm} {body} }}"
    model = zoo.model(text, {**outliers(), **(more or {})}, opset=opset)
    Normalise()(model)  # so that names and shapes are there
    return model


def maxima(model, seeds=(0, 1)):
    """Return max |x_j| per channel of the tensors that Smooth asks for, on the tests' random inputs."""
    twin = model_io.copy(model)
    values = {value.name: value for node in twin.graph for value in node.outputs}
    twin.graph.outputs.clear()
    twin.graph.outputs.extend(values[name] for name in smoothed_tensors(model))
    if not twin.graph.outputs:
        return {}
    opened, found = session(twin), {}
    for seed in seeds:
        for value, y in zip(opened.get_outputs(), opened.run(None, sample(opened, seed)), strict=True):
            a = np.abs(y).reshape(-1, y.shape[-1]).max(axis=0)
            found[value.name] = np.maximum(found.get(value.name, a), a)
    return found


def smooth(model, alpha=0.5):
    """Smooth a copy; check the numbers and return it with the result."""
    after = model_io.copy(model)
    result = Smooth(maxima(model), alpha)(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert_equivalent(model, after, rtol=RTOL)
    return after, result


def array(model, name):
    return model.graph.initializers[name].const_value.numpy()


# ------------------------------------------------------------------------------------------- where it fits

BODIES = {
    "matmul": ("y = MatMul (x0, w)", "float[16,8] w", "float[N,5,8] y"),
    "a bias behind it": ("m = MatMul (x0, w) y = Add (m, c)", "float[16,8] w, float[8] c", "float[N,5,8] y"),
    "q, k and v apart": (
        "q = MatMul (x0, w) k = MatMul (x0, w2) v = MatMul (x0, w3) a = Add (q, k) y = Add (a, v)",
        "float[16,8] w, float[16,8] w2, float[16,8] w3",
        "float[N,5,8] y",
    ),
    "gemm behind a reshape": (
        "s = Constant <value_ints = [-1, 16]> () r = Reshape (x0, s) y = Gemm <transB = 1> (r, w, c)",
        "float[8,16] w, float[8] c",
        "float[M,8] y",
    ),
    "gemm, not transposed": (
        "s = Constant <value_ints = [-1, 16]> () r = Reshape (x0, s) y = Gemm <alpha = 0.5> (r, w)",
        "float[16,8] w",
        "float[M,8] y",
    ),
    "transpose of the other axes": (
        "t = Transpose <perm = [1, 0, 2]> (x0) y = MatMul (t, w)",
        "float[16,8] w",
        "float[5,N,8] y",
    ),
    "the class token alone": (
        "i = Constant <value_int = 0> () t = Gather <axis = 1> (x0, i) y = MatMul (t, w)",
        "float[16,8] w",
        "float[N,8] y",
    ),
    "a slice of the tokens": (
        """from = Constant <value_ints = [1]> () to = Constant <value_ints = [3]> ()
        a = Constant <value_ints = [1]> () t = Slice (x0, from, to, a) y = MatMul (t, w)""",
        "float[16,8] w",
        "float[N,2,8] y",
    ),
    "a batch of weights": (
        "a = Constant <value_ints = [1]> () u = Unsqueeze (x0, a) y = MatMul (u, w)",
        "float[2,16,8] w",
        "float[N,2,5,8] y",
    ),
}


@pytest.mark.parametrize("norm", [LAYER_NORM, OLD_LAYER_NORM], ids=["LayerNormalization", "decomposed"])
@pytest.mark.parametrize("case", BODIES)
def test_the_same_numbers_and_level_channels(case, norm):
    body, weights, out = BODIES[case]
    model = build(body, norm=norm, weights=weights, out=out)
    after, result = smooth(model, alpha=1.0)
    assert result.modified and result.rewrites == 1 and not result.refusals
    for found in maxima(after).values():  # with alpha 1 all channels reach equally far
        np.testing.assert_allclose(found, found.mean(), rtol=1e-4)  # float32's rounding of gains and inputs
    assert np.ptp(np.log(maxima(model).popitem()[1])) > 2
    assert len(after.graph.initializers) == len(model.graph.initializers)


@pytest.mark.parametrize(
    "norm", ["x0 = RMSNormalization <axis = -1> (x, g)", "x0 = Mul (x, g)", "i = Mul (g, x) x0 = Identity (i)"]
)
def test_gains_without_a_shift(norm):
    text = f"g (float[N,5,16] x) => (float[N,5,8] y) <float[16] g, float[16,8] w> {{ {norm} y = MatMul (x0, w) }}"
    model = zoo.model(text, {"g": outliers()["g"]}, opset=23 if "RMS" in norm else 17)
    after, result = smooth(model)
    assert result.rewrites == 1


def test_a_shared_gain_is_copied():
    body = "x1 = LayerNormalization (x, g, b) m = MatMul (x0, w) m1 = MatMul (x1, w2) y = Add (m, m1)"
    model = build(body, weights="float[16,8] w, float[16,8] w2")
    after, result = smooth(model)
    assert result.rewrites == 2 and {"g", "g_smoothed"} <= set(after.graph.initializers)


def test_changed_tensors_are_renamed_so_that_old_ranges_do_not_fit_them():
    model = build("y = MatMul (x0, w)")
    after, _ = smooth(model)
    assert {value.name for node in after.graph for value in node.outputs} == {"x0_smoothed", "y"}


# ------------------------------------------------------------------------------------------- where it does not

REFUSED = {
    "a second reader": ("y0 = MatMul (x0, w) r = ReduceMax (x0) y = Add (y0, r)", "reads it too"),
    "a residual": ("m = MatMul (x0, w) z = Add (x0, x) s = ReduceMax (z) y = Add (m, s)", "reads it too"),
    "a shared weight": ("m = MatMul (x0, w) k = MatMul (x, w) y = Add (m, k)", "shared"),
    "no constant": ("v = Relu (w) t = ReduceMax (x) u = Mul (v, t) y = MatMul (x0, u)", "computed at run time"),
    "the last axis is moved": (
        """t = Transpose <perm = [0, 2, 1]> (x0) f = Flatten (t) s = ReduceMax (f)
        m = MatMul (x0, w) y = Add (m, s)""",
        "reads it too",
    ),
    "half of the channels": (
        """from = Constant <value_ints = [0]> () to = Constant <value_ints = [16]> ()
        a = Constant <value_ints = [2]> () h = Slice (x0, from, to, a) s = ReduceMax (h)
        m = MatMul (x0, w) y = Add (m, s)""",
        "reads it too",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    body, why = REFUSED[case]
    model = build(body)
    after, result = smooth(model)
    assert not result.modified and ir.to_proto(after) == ir.to_proto(model)
    (refusal,) = result.refusals
    assert refusal.rule == "smooth" and why in refusal.why and refusal.node


def test_refused_as_a_graph_output():
    model = build("y = MatMul (x0, w)", out="float[N,5,8] y, float[N,5,16] x0")
    assert "graph output" in smooth(model)[1].refusals[0].why


def test_refused_where_callers_may_replace_the_weight():
    text = """g (float[N,16] x, float[16,8] w) => (float[N,8] y) <float[16] g, float[16] b, float[16,8] w> {
        x0 = LayerNormalization (x, g, b)
        y = MatMul (x0, w) }"""
    model = zoo.model(text)
    rng = np.random.default_rng(0)
    tensor = ir.tensor(rng.normal(size=(16, 8)).astype(np.float32), name="w")
    model.graph.inputs[1].const_value = tensor
    model.graph.register_initializer(model.graph.inputs[1])
    result = Smooth({"x0": np.ones(16)})(model)
    assert not result.modified and "graph input" in result.refusals[0].why


@pytest.mark.parametrize("function", ["Gelu", "Softmax", "Sigmoid"])
def test_functions_through_which_no_scale_passes_are_named(function):
    model = build(f"h = {function} (x0) y = MatMul (h, w)", opset=20)
    _, result = smooth(model)
    assert not result.modified and function in result.refusals[0].why


@pytest.mark.parametrize("given", [{}, {"x0": np.ones(3)}, {"x0": np.full(16, np.nan)}], ids=["none", "few", "nan"])
def test_maxima_that_are_missing_or_do_not_fit(given):
    model = build("y = MatMul (x0, w)")
    result = Smooth(given)(model)
    assert not result.modified and "x0" in result.refusals[0].why


def test_subgraphs_and_plain_layers_are_left_alone():
    for name in zoo.ZOO:
        model = zoo.build(name)
        assert smoothed_tensors(model) == () and not Smooth()(model).modified


# ------------------------------------------------------------------------------------------- again


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, None])
@pytest.mark.parametrize("dead", [False, True])
def test_a_second_run_changes_nothing(alpha, dead):
    weights = np.random.default_rng(1).normal(size=(16, 8))
    weights[0] = 0
    more = {"w": weights, "g": outliers()["g"] * (np.arange(16) != 5), "b": np.zeros(16)} if dead else None
    model = build("y = MatMul (x0, w)", more=more)
    ranges = maxima(model)
    after, result = smooth(model, alpha)
    assert result.modified
    for given in (ranges, maxima(after)):  # the same ranges again, and those that the new model has
        again = Smooth(given, alpha)(after)
        assert not again.modified and not again.rewrites


# ------------------------------------------------------------------------------------------- the numbers


def test_factors_against_the_formula():
    a, w = np.array([8.0, 2.0]), np.array([[1.0, -2.0], [0.5, 0.25]])
    s = factors(a, [w], 0.5)
    np.testing.assert_allclose(s, [1.0, 1.0])  # sqrt(8 / 2) and sqrt(2 / 0.5) are equal: nothing to level
    s = factors(a, [w, 4 * w[::-1]], 0.5)  # the largest of both weights: 2 and 8
    np.testing.assert_allclose(s, np.array([2.0, 0.5]), rtol=1e-12)
    np.testing.assert_allclose(factors(a, [w], 1.0), [2.0, 0.5], rtol=1e-12)
    np.testing.assert_allclose(factors(a, [w], 0.0), [0.5, 2.0], rtol=1e-12)


def test_dead_channels():
    a, w = np.array([4.0, 0.0, 100.0, 1.0]), np.array([[1.0], [1.0], [0.0], [1.0]])
    s = factors(a, [w], 0.5)
    np.testing.assert_allclose(s, [2**0.5, 1.0, 100 / 8**0.5, 2**-0.5], rtol=1e-12)
    assert (a / s).max() == pytest.approx(8**0.5)  # the unread outlier no longer sets the range
    np.testing.assert_array_equal(factors(np.zeros(3), [np.ones((3, 2))], 0.5), np.ones(3))


def quantized_error(x, w, s, levels=255, weight_max=127):
    """Round x / s to 8 bits per tensor and s w to 8 bits per output, multiply, and return the mean error energy."""
    xs, ws = x / s, w * s[:, None]
    d = 2 * np.abs(xs).max() / levels
    steps = np.abs(ws).max(axis=0) / weight_max
    y = (np.rint(xs / d) * d) @ (np.rint(ws / steps) * steps)
    return ((y - x @ w) ** 2).sum() / len(x)


def example(seed=0):
    rng = np.random.default_rng(seed)
    gain = np.where(np.arange(64) % 32 == 5, 40.0, rng.uniform(0.5, 1.5, 64))
    x = rng.standard_normal((4000, 64)) * gain
    w = rng.standard_normal((64, 48)) / np.maximum(gain, 1)[:, None]
    return x, w, np.abs(x).max(axis=0), gain**2


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_prediction_is_close_to_what_rounding_does(alpha):
    x, w, largest, energy = example()
    s = factors(largest, [w], alpha)
    measured = quantized_error(x, w, s)
    # the model takes roundings as uniform and independent; a channel of a few steps is not: within 1 dB
    assert abs(10 * np.log10(predicted_error(largest, energy, [w], s) / measured)) < 1.0


def test_an_outlier_costs_many_decibels_and_smoothing_gets_them_back():
    x, w, largest, energy = example()

    def error(s):
        return predicted_error(largest, energy, [w], s)

    alpha = choose_alpha(largest, [w], error)
    before, after = quantized_error(x, w, np.ones(64)), quantized_error(x, w, factors(largest, [w], alpha))
    assert 10 * np.log10(before / after) > 10
    assert all(error(factors(largest, [w], alpha)) <= error(factors(largest, [w], other)) for other in (0.2, 0.5, 0.9))


def test_more_bits_predict_no_more_error():
    _, w, largest, energy = example()
    s = np.ones(64)
    errors = [predicted_error(largest, energy, [w], s, 2**b - 1, 2 ** (b + 1) - 1) for b in range(2, 10)]
    assert errors == sorted(errors, reverse=True)


def test_nothing_is_chosen_where_nothing_helps():
    rng = np.random.default_rng(0)
    w, largest = rng.choice([-1.0, 1.0], (16, 8)), np.full(16, 4.0)
    assert choose_alpha(largest, [w], lambda s: predicted_error(largest, np.ones(16), [w], s)) is None


def test_the_pass_chooses_and_says_what_it_predicts():
    after, result = smooth(build("y = MatMul (x0, w)"), alpha=None)
    assert result.rewrites == 1 and "dB less" in result.notes[0]
