"""Rounding by the layer's output: against dense computations, textbook forms and exhaustive search."""

import itertools

import numpy as np
import pytest
from edgec.passes import rounding as R


def data(seed=0, rows=64, groups=1, out=3, size=6):
    """Inputs with strong correlations, a weight, and an output that the weight nearly makes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, rows, size)) @ rng.normal(size=(groups, size, size)) + rng.normal(size=size)
    weight = rng.normal(size=(groups, out, size))
    y = x @ weight.swapaxes(1, 2) + 0.05 * rng.normal(size=(groups, rows, out))
    return x, y, weight


def made(x, y, weight, limit=7, **options):
    gram, cross = x.swapaxes(1, 2) @ x, y.swapaxes(1, 2) @ x
    return R.problem(weight, gram, cross, low=-limit, high=limit, **options)


def value(p, rounded):
    return rounded.integers * rounded.scales.astype(np.float64)[..., p.columns]


SEARCHES = [name for name in R.METHODS if name != "auto"]


def test_the_objective_is_the_outputs_error():
    x, y, weight = data(groups=2)
    p = made(x, y, weight, shrink=0.0, damping=0.0)

    def dense(v):
        return ((y - x @ v.swapaxes(1, 2)) ** 2).sum(1)

    one, other = (value(p, R.nearest(p, f * p.widest_scales())) for f in (1.0, 0.3))
    expected = dense(one) - dense(other)
    np.testing.assert_allclose(p.errors(one - p.target) - p.errors(other - p.target), expected, rtol=1e-9)
    fitted = np.linalg.lstsq(x[0], y[0], rcond=None)[0].T
    np.testing.assert_allclose(p.target[0], fitted, rtol=1e-6)


def test_the_target_is_ridge_regression_towards_the_weight():
    """The least of |Y - XT'|^2 + shrink m |T - W|^2, as least squares with rows appended."""
    x, y, weight = data()
    p = made(x, y, weight, shrink=0.3)
    root = np.sqrt(0.3 * np.trace(x[0].T @ x[0]) / 6)
    rows, wanted = np.vstack([x[0], root * np.eye(6)]), np.vstack([y[0], root * weight[0].T])
    np.testing.assert_allclose(p.target[0], np.linalg.lstsq(rows, wanted, rcond=None)[0].T, rtol=1e-6)
    np.testing.assert_allclose(made(x, y, weight, shrink=1e12).target, weight, rtol=1e-6)


def test_gptq_in_natural_order_is_the_textbook_recursion():
    """Frantar et al. 2022, algorithm 1: through the Cholesky factor of the inverse."""
    p = made(*data(1, size=9, out=4), limit=3)
    scales = p.widest_scales()
    factor = np.linalg.cholesky(np.linalg.inv(p.gram[0])).T
    left, integers = p.target[0].copy(), np.empty((4, 9))
    s = scales[0, :, 0].astype(np.float32).astype(np.float64)
    for j in range(9):
        integers[:, j] = np.clip(np.rint(left[:, j] / s), -3, 3)
        error = (left[:, j] - integers[:, j] * s) / factor[j, j]
        left[:, j:] -= np.outer(error, factor[j, j:])
    walked = R._walk(p.target, R._steps(p, scales.astype(np.float32)), p.triangular, None, -3, 3)
    np.testing.assert_array_equal(walked[0], integers)


def test_gpfq_is_the_greedy_path():
    """Zhang, Zhou, Saab 2022: the state u is carried along the rows of the images themselves."""
    x, y, weight = data(2, out=1)
    p = made(x, y, weight, shrink=0.0, damping=0.0)
    scale = float(np.float32(p.widest_scales()[0, 0, 0]))
    state, integers = np.zeros(64), []
    for t in range(6):
        column = x[0, :, t]
        state = state + p.target[0, 0, t] * column
        q = np.clip(np.rint(column @ state / (column @ column) / scale), -7, 7)
        state = state - q * scale * column
        integers.append(q)
    walked = R._walk(p.target, np.full((1, 1, 6), scale), np.triu(p.coupling), None, -7, 7)
    np.testing.assert_array_equal(walked[0, 0], integers)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("limit", [1, 3, 7, 127])
def test_no_method_is_worse_than_rounding_to_the_nearest(method, limit):
    for seed in range(5):
        p = made(*data(seed, groups=2, size=R._BLOCK + 3, rows=200), limit=limit)
        plain = R.searched(p, R.nearest)
        found = R.METHODS[method](p)
        assert (found.errors <= plain.errors * (1 + 1e-9)).all()  # 1e-9: sums in another order
        np.testing.assert_allclose(found.errors, p.errors(value(p, found) - p.target), rtol=1e-6)
        assert np.abs(found.integers).max() <= limit and found.integers.dtype == np.int8


@pytest.mark.parametrize("rounding", [R.gptq, R.gpfq, lambda p, s: R.gptq(p, s, "natural")])
def test_with_given_scales_too(rounding):
    for seed in range(20):
        p = made(*data(seed), limit=1)
        scales = p.widest_scales(p.weight)
        assert (rounding(p, scales).errors <= R.nearest(p, scales).errors).all()


def test_methods_gain_what_they_are_for():
    """On correlated inputs at 3 bits: descent errs least, over a few layers."""
    problems = [made(*data(seed, rows=500, size=48, out=8), limit=3) for seed in range(4)]
    sums = {name: sum(R.METHODS[name](p).objective for p in problems) for name in SEARCHES}
    assert sums["descent"] < min(sums["gptq"], sums["gpfq"])
    assert max(sums["gptq"], sums["gpfq"]) < 0.75 * sums["nearest-clipped"]


def test_descent_comes_close_to_the_exhaustive_minimum():
    """Four weights of three values: all 81 are tried, at the scale that descent ends with."""
    close, total = 0, 0
    for seed in range(40):
        p = made(*data(seed, out=2, size=4), limit=1)
        found = R.descent(p)
        for row in range(2):
            every = np.array(list(itertools.product((-1, 0, 1), repeat=4))) * float(found.scales[0, row, 0])
            difference = every - p.target[0, row]
            least = ((difference @ p.gram[0]) * difference).sum(1).min()
            assert found.errors[0, row] >= least * (1 - 1e-9)
            close, total = close + (found.errors[0, row] <= 1.02 * least), total + 1
    assert close >= 0.8 * total


def test_descent_ends_where_no_single_integer_can_be_bettered():
    p = made(*data(5, size=12, out=4), limit=3)
    found = R.coordinate_descent(p, R.nearest(p, p.widest_scales()), sweeps=100)
    for i in range(12):
        for step in (-1, 1):
            moved = found.integers.astype(np.float64)
            moved[..., i] += step
            allowed = np.abs(moved[..., i]) <= 3
            errors = p.errors(moved * found.scales.astype(np.float64) - p.target)
            assert (errors >= found.errors * (1 - 1e-9))[allowed].all()


def test_descent_never_rises_from_sweep_to_sweep():
    p = made(*data(6, size=40, rows=300, groups=3), limit=3)
    at = R.nearest(p, p.widest_scales())
    for _ in range(6):
        after = R.coordinate_descent(p, at, sweeps=1)
        assert (after.errors <= at.errors).all()
        at = after


def test_refitted_scales_are_the_least_squares_ones():
    x, y, weight = data(7, out=2)
    p = made(x, y, weight, shrink=0.0, damping=0.0)
    found = R.refitted(p, R.nearest(p, 0.8 * p.widest_scales()))
    for row in range(2):
        best = np.linalg.lstsq(x[0] @ found.integers[0, row, :, None].astype(float), y[0, :, row], rcond=None)[0]
        assert found.scales[0, row, 0] == pytest.approx(best[0], rel=1e-6)


@pytest.mark.parametrize("method", SEARCHES)
def test_more_bits_no_more_error(method):
    inputs = data(8, size=20, rows=200)
    errors = [R.METHODS[method](made(*inputs, limit=limit)).objective for limit in (1, 3, 7, 15, 127)]
    assert errors == sorted(errors, reverse=True)


def test_blocks_have_scales_of_their_own():
    x, y, weight = data(9, size=32, rows=300)
    weight[..., :16] *= 20
    y = x @ weight.swapaxes(1, 2)
    wide, blocked = made(x, y, weight), made(x, y, weight, columns=np.arange(32) // 16)
    one, two = R.descent(wide), R.descent(blocked)
    assert two.scales.shape == (1, 3, 2)
    assert two.objective < 0.5 * one.objective
    refit = R.refitted(blocked, R.nearest(blocked, blocked.widest_scales()))
    assert (refit.errors <= R.nearest(blocked, blocked.widest_scales()).errors).all()


def test_a_shared_scale_stays_shared():
    p = made(*data(10, groups=2, size=16, rows=200), shared=True)
    found = R.descent(p)
    assert len(np.unique(found.scales)) == 1
    assert found.objective <= R.searched(p, R.nearest).objective


# ------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("method", SEARCHES)
def test_inputs_that_are_never_seen_leave_weights_to_plain_rounding(method):
    """All inputs 0: H would be singular, and nothing is known but the weight."""
    _, _, weight = data(11)
    p = R.problem(weight, np.zeros((1, 6, 6)), np.zeros((1, 3, 6)), low=-7, high=7)
    plain = R.searched(p, R.nearest)
    found = R.METHODS[method](p)
    np.testing.assert_allclose(p.target, weight)
    assert (found.errors <= plain.errors).all() and np.isfinite(found.scales).all()


@pytest.mark.parametrize("method", SEARCHES)
def test_dead_and_doubled_inputs(method):
    x, y, weight = data(12)
    x[..., 2] = 0
    x[..., 4] = x[..., 3]
    p = made(x, x @ weight.swapaxes(1, 2), weight)
    found = R.METHODS[method](p)
    assert np.isfinite(found.errors).all()
    assert p.target[0, 0, 2] == pytest.approx(weight[0, 0, 2])  # what is never used is left alone


def test_few_rows_do_not_move_what_they_do_not_see():
    """Two rows for six weights: without a ridge the target would be arbitrary."""
    x, y, weight = data(13, rows=2)
    p = made(x, x @ weight.swapaxes(1, 2), weight)
    np.testing.assert_allclose(p.target, weight, atol=1e-9)


@pytest.mark.parametrize("method", SEARCHES)
def test_rows_of_zeros_and_of_negative_numbers(method):
    x, _, weight = data(14)
    weight[0, 0] = 0
    weight[0, 1] = -np.abs(weight[0, 1])
    p = made(x, x @ weight.swapaxes(1, 2), weight)
    found = R.METHODS[method](p)
    assert not found.integers[0, 0].any() and found.errors[0, 0] == 0
    assert (found.scales > 0).all()


def test_ties_go_to_the_even_integer():
    p = R.problem(np.array([[[0.5, 1.5, -2.5, 3.0]]]), np.eye(4)[None], np.zeros((1, 1, 4)), low=-3, high=3)
    np.testing.assert_array_equal(R.nearest(p, np.ones((1, 1, 1))).integers[0, 0], [0, 2, -2, 3])


def test_an_exact_grid_is_found():
    """A weight that is on the grid already is kept, whatever the inputs."""
    x, _, _ = data(15)
    weight = np.array([[[7.0, -3, 2, 0, 1, -5]]]) * 0.25
    p = made(x, x @ weight.swapaxes(1, 2), weight)
    for method in SEARCHES:
        np.testing.assert_allclose(value(p, R.METHODS[method](p)), weight, rtol=1e-6)
