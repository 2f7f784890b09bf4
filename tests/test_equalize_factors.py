"""The choices of factors, against the definition written out and against brute force."""

import numpy as np
import pytest
import zoo
from edgec.passes import equalize_factors as factors
from edgec.passes.channel_groups import PINNED, analyse
from edgec.passes.equalize import Equalize
from equivalence import assert_equivalent, sample, session

CHAIN = """
g (float[N,3,6,6] x) => (float[N,2,6,6] y) <float[4,3,1,1] w1, float[4,1,3,3] w2, float[4] b2, float[2,4,1,1] w3> {
    a = Conv (x, w1)
    b = Relu (a)
    c = Conv <group = 4, pads = [1,1,1,1]> (b, w2, b2)
    d = Relu (c)
    y = Conv (d, w3)
}"""
MIXED = """
g (float[N,4,4,4] x) => (float[N,3,8,8] y) <float[4,4,1,1] w1, float[4,2,3,3] w2, float[4,2,2,2] w3, float[3,4,1,1] w4,
  int64[5] split = {0,2,2,4,4}, int64[4] join = {0,4,4,4}> {
    a = Conv (x, w1)
    b = Relu (a)
    c = Conv <group = 2, pads = [1,1,1,1]> (b, w2)
    d = Add (c, b)
    e = Relu (d)
    r = Reshape (e, split)
    t = Transpose <perm = [0,2,1,3,4]> (r)
    s = Reshape (t, join)
    u = ConvTranspose <group = 2, strides = [2,2]> (s, w3)
    v = Relu (u)
    y = Conv (v, w4)
}"""
QUANTIZED = ("x", "b", "e", "v", "c")


def weight(model, name):
    return model.graph.initializers[name].const_value.numpy().astype(np.float64)


def statistics(model, names, found):
    """Ranges (2, C) and mean squares (C,) of tensors, on one random input; and the tensors."""
    import onnx_ir as ir

    tapped = model.clone()
    for name in names:
        value = next((v for n in tapped.graph for v in n.outputs if v.name == name), None)
        if value is not None:
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * 4)
            tapped.graph.outputs.append(value)
    opened = session(tapped)
    feed = sample(opened, 0)
    out = {**feed, **{v.name: a for v, a in zip(opened.get_outputs(), opened.run(None, feed), strict=True)}}
    flat = {name: np.moveaxis(out[name], 1, 0).reshape(out[name].shape[1], -1).astype(np.float64) for name in names}
    ranges = {name: np.stack([np.minimum(a.min(1), 0), np.maximum(a.max(1), 0)]) for name, a in flat.items()}
    return ranges, {name: (a * a).mean(1) for name, a in flat.items()}


# ------------------------------------------------------------------------------------------- from weights and ranges


def test_weight_ranges_are_equal_on_both_sides_afterwards():
    model = zoo.model(CHAIN, {"w1": np.geomspace(0.1, 4, 12).reshape(4, 3, 1, 1)})
    before = model.clone()
    Equalize(factors.weight_range_factors(analyse(model))).apply(model)
    w1, w2, w3 = (np.abs(weight(model, name)) for name in ("w1", "w2", "w3"))
    depthwise = w2.max(axis=(1, 2, 3))
    # the loop ends where a sweep moves no factor by more than 1e-4
    np.testing.assert_allclose(w1.max(axis=(1, 2, 3)), depthwise, rtol=2e-3)
    np.testing.assert_allclose(w3.max(axis=(0, 2, 3)), depthwise, rtol=2e-3)
    assert_equivalent(before, model, rtol=1e-4)


def test_two_layers_get_the_factors_of_the_paper():
    text = "g (float[N,3,4,4] x) => (float[N,2,4,4] y) <float[4,3,1,1] w1, float[2,4,1,1] w2> {"
    model = zoo.model(text + "a = Conv (x, w1)\nb = Relu (a)\ny = Conv (b, w2) }")
    found = analyse(model)
    r1 = np.abs(weight(model, "w1")).max(axis=(1, 2, 3))
    r2 = np.abs(weight(model, "w2")).max(axis=(0, 2, 3))
    s = np.sqrt(r1 * r2) / r2  # W1 / s and W2 s
    got = factors.weight_range_factors(found)[found.channels("b")[1]]
    np.testing.assert_allclose(got, 1 / s, rtol=2e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_activation_ranges_are_levelled_by_alpha(alpha):
    found = analyse(zoo.model(CHAIN))
    ranges = {"b": np.array([8.0, 4, 1, 0]), "d": np.array([[0.0, -2, 0, 0], [1, 1, 1, 1]])}
    got = factors.activation_range_factors(found, ranges, alpha)
    np.testing.assert_allclose(got[found.channels("b")[1]], [1, 2**alpha, 8**alpha, 1])
    np.testing.assert_allclose(got[found.channels("d")[1]], [2**alpha, 1, 2**alpha, 2**alpha])
    assert got[PINNED] == 1


def test_a_channel_in_two_tensors_counts_where_it_is_largest():
    found = analyse(zoo.model(MIXED))
    ranges = {"b": np.array([1.0, 1, 1, 2]), "e": np.array([8.0, 1, 1, 1])}
    got = factors.activation_range_factors(found, ranges, 1.0)
    np.testing.assert_allclose(got[found.channels("b")[1]], [1, 2, 2, 1])


def test_factors_stay_within_their_limit():
    found = analyse(zoo.model(CHAIN, {"w1": np.geomspace(1e-6, 1e6, 12).reshape(4, 3, 1, 1)}))
    for got in (
        factors.weight_range_factors(found, largest=3.0),
        factors.activation_range_factors(found, {"b": np.array([1e6, 1, 1e-6, 1])}, largest=3.0),
    ):
        assert got.min() >= 1 / 3 - 1e-12 and got.max() <= 3 + 1e-12 and got.max() > 2.9


# ------------------------------------------------------------------------------------------- from noise


def by_hand(model, found, f, ranges, energies, levels=255, weight_max=127):
    """The predicted noise of MIXED, written out loop by loop."""
    energies = {**energies, "x": np.full(4, energies["x"].mean())}  # one variable, the pinned one: the mean counts
    scale = {name: f[np.broadcast_to(found.channels(name)[1], energies[name].shape)] for name in QUANTIZED}

    def step(name):
        low, high = ranges[name]
        return ((high * scale[name]).max() + (-low * scale[name]).max()) / levels

    order = [0, 2, 1, 3]  # the shuffle between e and s
    layers = [  # name, input, its channels' order, rows (out, in, kernel) as dense as the layer sees them
        ("w1", "x", range(4), dense(weight(model, "w1"), 1), "a"),
        ("w2", "b", range(4), dense(weight(model, "w2"), 2), "c"),
        ("w3", "e", order, transposed(weight(model, "w3"), 2), "u"),
        ("w4", "v", range(4), dense(weight(model, "w4"), 1), "y"),
    ]
    total = 0.0
    for _, source, channels, rows, out in layers:
        channels = list(channels)
        s, e = scale[source][channels], energies[source][channels]
        output = energies[out].sum() if out in energies else ((rows**2).sum(2) @ e).sum()
        noise = ((rows**2).sum((0, 2)) * (step(source) / s) ** 2 / 12).sum()
        for row in rows:
            read = np.abs(row).max(1) > 0
            delta = (np.abs(row).max(1) / s).max() / weight_max
            noise += delta**2 / 12 * row.shape[1] * (s**2 * e)[read].sum()
        total += noise / output
    for name in ("b", "c"):  # the Add reads them, too
        total += ((step(name) / scale[name]) ** 2 / 12).sum() / energies[name].sum()
    return total


def dense(w, groups):
    out, inputs = w.shape[:2]
    rows = np.zeros((out, inputs * groups, int(np.prod(w.shape[2:]))))
    for o in range(out):
        g = o // (out // groups)
        rows[o, g * inputs : (g + 1) * inputs] = w[o].reshape(inputs, -1)
    return rows


def transposed(w, groups):
    inputs, out = w.shape[:2]
    rows = np.zeros((out * groups, inputs, int(np.prod(w.shape[2:]))))
    for i in range(inputs):
        g = i // (inputs // groups)
        rows[g * out : (g + 1) * out, i] = w[i].reshape(out, -1)
    return rows


@pytest.fixture(scope="module")
def mixed():
    model = zoo.model(MIXED, {"w1": np.geomspace(0.05, 4, 16).reshape(4, 4, 1, 1)})
    found = analyse(model)
    ranges, energies = statistics(model, QUANTIZED, found)
    return model, found, ranges, energies


def random(found, seed):
    f = 2.0 ** np.random.default_rng(seed).uniform(-2, 2, found.count)
    f[PINNED] = 1
    return f


@pytest.mark.parametrize("seed", range(4))
def test_the_predicted_noise_is_the_sum_written_out(mixed, seed):
    model, found, ranges, energies = mixed
    got = factors.NoiseModel.of(found, ranges, energies).noise(random(found, seed))
    np.testing.assert_allclose(got, by_hand(model, found, random(found, seed), ranges, energies), rtol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("p", [4, 32])
def test_the_gradient_is_that_of_the_sum(mixed, p, symmetric):
    _, found, ranges, energies = mixed
    model = factors.NoiseModel.of(found, ranges, energies, symmetric=symmetric, importance={"c": 3.0})
    logs = np.log(random(found, 7))
    value, gradient = model.soft(logs, p)
    h = 1e-6
    for i in range(found.count):
        up, down = logs.copy(), logs.copy()
        up[i] += h
        down[i] -= h
        slope = (model.soft(up, p)[0] - model.soft(down, p)[0]) / (2 * h)
        assert abs(slope - gradient[i]) <= 1e-6 * value + 1e-5 * abs(slope)


def test_a_norm_of_high_order_is_the_maximum(mixed):
    _, found, ranges, energies = mixed
    model, f = factors.NoiseModel.of(found, ranges, energies), random(found, 3)
    assert model.soft(np.log(f), 4)[0] > model.soft(np.log(f), 400)[0] >= model.noise(f)
    np.testing.assert_allclose(model.soft(np.log(f), 4000)[0], model.noise(f), rtol=1e-2)


def test_the_least_noise_is_less_than_without_and_than_that_of_any_start(mixed):
    model, found, ranges, energies = mixed
    noise = factors.NoiseModel.of(found, ranges, energies)
    starts = (factors.activation_range_factors(found, ranges), factors.weight_range_factors(found))
    best = factors.least_noise_factors(noise, starts)
    assert best[PINNED] == 1
    assert noise.noise(best) < 0.9 * noise.noise(np.ones(found.count))
    assert all(noise.noise(best) <= noise.noise(start) for start in starts)
    after = model.clone()
    Equalize(best).apply(after)
    assert_equivalent(model, after, rtol=1e-4)


def test_two_channels_against_a_fine_grid():
    text = "g (float[N,2,4,4] x) => (float[N,1,4,4] y) <float[2,2,1,1] w1, float[1,2,1,1] w2> {"
    weights = {"w2": np.array([0.3, 5.0]).reshape(1, 2, 1, 1)}
    found = analyse(zoo.model(text + "a = Conv (x, w1)\nb = Relu (a)\ny = Conv (b, w2) }", weights))
    ranges = {"b": np.array([[0.0, 0.0], [9.0, 1.0]])}
    model = factors.NoiseModel.of(found, ranges)
    best = factors.least_noise_factors(model)
    ratios = np.geomspace(1 / 60, 60, 2000)
    tried = [model.noise(np.array([1.0, 1.0, r])) for r in ratios]  # only the ratio matters
    assert model.noise(best) <= min(tried) * 1.01  # the last p-norm exceeds a maximum of two by up to 2^(1/128)


def test_dead_channels_and_layers_without_signal_are_left_alone():
    model = zoo.model(CHAIN, {"w3": np.zeros((2, 4, 1, 1))})
    found = analyse(model)
    ranges = {"x": np.ones(3), "b": np.zeros(4), "d": np.array([1.0, 0, 0, 2])}
    noise = factors.NoiseModel.of(found, ranges, {"b": np.zeros(4)})
    best = factors.least_noise_factors(noise, (factors.activation_range_factors(found, ranges, 1.0),))
    assert np.isfinite(best).all() and (best > 0).all() and np.isfinite(noise.noise(best))


def test_weights_in_float_add_no_noise(mixed):
    _, found, ranges, energies = mixed
    f = random(found, 1)
    both, activations = (factors.NoiseModel.of(found, ranges, energies, weight_max=m).noise(f) for m in (127, None))
    four_bits = factors.NoiseModel.of(found, ranges, energies, weight_max=7).noise(f)
    np.testing.assert_allclose((four_bits - activations) / (both - activations), (127 / 7) ** 2)
