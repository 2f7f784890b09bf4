"""Second-order elimination against least squares computed directly, and the allocation against exhaustive search."""

import itertools

import numpy as np
import pytest
from edgec.passes import forgiving
from edgec.passes import pruning as P

RIDGE = 1e-3


def data(seed=0, rows=300, out=3, channels=5, width=2, staying=1):
    """Correlated inputs, an output, and which channel each input belongs to, in no order."""
    rng = np.random.default_rng(seed)
    size = channels * width + staying
    x = rng.normal(size=(rows, size)) @ rng.normal(size=(size, size))
    y = x @ rng.normal(size=(size, out)) + 0.5 * rng.normal(size=(rows, out))
    owners = rng.permutation(np.concatenate([np.repeat(np.arange(channels), width), np.full(staying, -1)]))
    return x, y, owners


def reader(x, y, owners, **options):
    return P.Reader(x.T @ x, y.T @ x, owners, **options)


def error_without(x, y, owners, cut, weight=None, ridge=RIDGE):
    """The least of |Y - XV'|^2 + r|V - W|^2 with V = 0 at the channels of `cut`, by lstsq over rows appended."""
    weight = np.zeros((y.shape[1], x.shape[1])) if weight is None else weight
    root = np.sqrt(ridge * np.trace(x.T @ x) / x.shape[1])
    rows, wanted = np.vstack([x, root * np.eye(x.shape[1])]), np.vstack([y, root * weight.T])
    kept = ~np.isin(owners, list(cut))
    found = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
    return ((wanted - rows[:, kept] @ found) ** 2).sum()


@pytest.mark.parametrize("pending", [1, 4, 256])
@pytest.mark.parametrize("out", [2, 40])
@pytest.mark.parametrize("given", [False, True])
def test_each_error_is_that_of_least_squares(monkeypatch, pending, out, given):
    """Whether B and V are brought up to date at each cut, now and then, or never; few outputs or many."""
    monkeypatch.setattr(P, "_PENDING", pending)
    x, y, owners = data(1, out=out)
    weight = np.random.default_rng(2).normal(size=(out, x.shape[1])) if given else None
    found = P.eliminate([reader(x, y, owners, weight=weight)], 5, ridge=RIDGE)
    assert sorted(found.order) == list(range(5)) and found.errors.dtype == np.float64
    expected = [error_without(x, y, owners, found.order[:k], weight) for k in range(6)]
    np.testing.assert_allclose(found.errors, np.array(expected) - expected[0], rtol=1e-7, atol=1e-7)


def test_each_cut_is_the_cheapest_of_all():
    x, y, owners = data(3, channels=6)
    order = P.eliminate([reader(x, y, owners)], 6, ridge=RIDGE).order
    for k in range(6):
        tried = {c: error_without(x, y, owners, {*order[:k], c}) for c in order[k:]}
        assert min(tried, key=tried.get) == order[k]


def test_several_readers_and_what_is_lost_besides():
    """Readers of different widths, one without some channels; a weighted sum of their errors, and a price each."""
    x1, y1, owners1 = data(4, width=3)
    x2, y2, owners2 = data(5, width=1, staying=0)
    x2, owners2 = x2[:, owners2 > 1], owners2[owners2 > 1]
    lost = np.array([0.0, 3.0, 1.0, 0.0, 2.0])
    readers = [reader(x1, y1, owners1), reader(x2, y2, owners2, importance=0.2)]
    found = P.eliminate(readers, 5, lost=lost, ridge=RIDGE)

    def expected(cut):
        return (
            error_without(x1, y1, owners1, cut)
            + 0.2 * error_without(x2, y2, owners2, cut)
            + lost[list(cut)].sum(initial=0.0)
        )

    totals = np.array([expected(found.order[:k]) for k in range(6)])
    np.testing.assert_allclose(found.errors, totals - totals[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_errors_never_fall(seed):
    x, y, owners = data(seed, rows=40, channels=12, width=4)
    errors = P.eliminate([reader(x, y, owners)], 12).errors
    assert errors[0] == 0 and (np.diff(errors) >= 0).all() and errors[-1] > 0


def test_fewer_cuts_are_the_first_of_all_cuts():
    x, y, owners = data(6)
    every, two = (P.eliminate([reader(x, y, owners)], 5, cuts=cuts) for cuts in (None, 2))
    np.testing.assert_array_equal(two.order, every.order[:2])
    np.testing.assert_array_equal(two.errors, every.errors[:3])
    np.testing.assert_array_equal(every.kept(5, 2), sorted(every.order[2:]))
    np.testing.assert_array_equal(every.kept(5, 0), range(5))


@pytest.mark.parametrize("kind", ["zeros", "few rows", "twins", "dead channel"])
def test_degenerate_inputs(kind):
    x, y, owners = data(7, rows=4 if kind == "few rows" else 300, channels=4)
    if kind == "zeros":
        x[:] = 0
    if kind == "twins":
        x[:, owners == 1] = x[:, owners == 0]
    if kind == "dead channel":
        x[:, owners == 2] = 0
    found = P.eliminate([reader(x, y, owners)], 4, ridge=1e-8)
    assert np.isfinite(found.errors).all() and (np.diff(found.errors) >= 0).all()
    if kind == "twins":
        assert found.order[0] in (0, 1) and found.errors[1] < 1e-4 * found.errors[2]
    if kind == "dead channel":
        assert found.order[0] == 2 and found.errors[1] == 0
    if kind == "zeros":
        np.testing.assert_array_equal(found.errors, 0)
    refitted = P.refit(x.T @ x, y.T @ x, np.arange(5), 1e-8)
    assert np.isfinite(refitted).all()


def test_a_refit_is_ridge_regression_of_what_is_kept():
    x, y, owners = data(8)
    weight = np.random.default_rng(1).normal(size=(3, x.shape[1]))
    kept = np.flatnonzero(owners != 2)
    gram, cross = x.T @ x, y.T @ x
    root = np.sqrt(RIDGE * np.trace(gram) / len(gram))
    rows = np.vstack([x[:, kept], root * np.eye(len(kept))])
    wanted = np.vstack([y, root * weight[:, kept].T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(P.refit(gram, cross, kept, RIDGE, weight), expected, rtol=1e-8)
    np.testing.assert_allclose(P.refit(gram, cross, kept, 1e12, weight), weight[:, kept], rtol=1e-8)


def test_keeping_all_of_a_layer_that_errs_nowhere_changes_nothing():
    x, _, _ = data(9)
    weight = np.random.default_rng(1).normal(size=(3, x.shape[1]))
    gram = x.T @ x
    np.testing.assert_allclose(P.refit(gram, weight @ gram, np.arange(len(gram)), 0.5, weight), weight, rtol=1e-12)


def test_squared_error_is_that_of_the_rows():
    x, y, _ = data(10)
    weight = np.random.default_rng(1).normal(size=(3, x.shape[1]))
    found = P.squared_error(x.T @ x, y.T @ x, weight, (y**2).sum())
    assert found == pytest.approx(((y - x @ weight.T) ** 2).sum(), rel=1e-10)


def test_the_ridge_is_the_one_that_serves_other_images():
    """Few rows and much noise ask for a strong pull to a good weight, many rows for a weak one to a bad weight."""
    rng = np.random.default_rng(0)
    truth, kept = rng.normal(size=(2, 20)), np.arange(20)

    def sums(rows, noise):
        x = rng.normal(size=(rows, 20))
        y = x @ truth.T + noise * rng.normal(size=(rows, 2))
        return x.T @ x, y.T @ x

    assert P.choose_ridge(sums(25, 5.0), sums(500, 5.0), kept, truth) == max(P.RIDGES)
    assert P.choose_ridge(sums(5000, 0.1), sums(500, 0.1), kept, -truth) == min(P.RIDGES)


def test_refitting_to_forgiven_targets_never_raises_the_error_behind_the_relu():
    x, y, _ = data(11, rows=80)
    y -= y.mean()
    kept, weight, gram = np.arange(x.shape[1] - 4), np.zeros((3, x.shape[1])), x.T @ x
    level = np.random.default_rng(2).normal(size=y.shape) * y.std()
    errors, bounds = [], []
    for rounds in range(6):
        rows = forgiving.Rows(x, y - level, level, biased=False)
        found = forgiving.refit_forgiving(rows, gram, kept, 0.0, weight, rounds)
        made = x[:, kept] @ found.T + level
        bounds.append(((forgiving.forgiven(y, made) - made) ** 2).sum())
        errors.append(((np.maximum(y, 0) - np.maximum(made, 0)) ** 2).sum())
        assert errors[-1] <= bounds[-1] * (1 + 1e-12)
    assert (np.diff(bounds) <= 1e-9 * bounds[0]).all() and bounds[-1] < 0.98 * bounds[0]
    plain = P.refit(gram, (y - level).T @ x, kept, 0.0, weight)
    np.testing.assert_allclose(forgiving.refit_forgiving(rows, gram, kept, 0.0, weight, 0), plain, rtol=1e-10)


def test_forgiving_with_a_bias_is_forgiving_with_a_column_of_ones():
    x, y, _ = data(12, rows=80)
    weight, size = np.zeros((3, x.shape[1])), x.shape[1]
    centred, level = x - x.mean(axis=0), np.zeros_like(y)
    rows = forgiving.Rows(x, y, level)
    found = forgiving.refit_forgiving(rows, centred.T @ centred, np.arange(size), 0.0, weight)
    ones = np.hstack([x, np.ones((len(x), 1))])
    rows = forgiving.Rows(ones, y, level, biased=False)
    both = forgiving.refit_forgiving(rows, ones.T @ ones, np.arange(size + 1), 0.0, np.zeros((3, size + 1)))
    np.testing.assert_allclose(found, both[:, :-1], rtol=1e-5, atol=1e-6)  # the least ridge pulls at the ones as well


# ------------------------------------------------------------------------------------------- allocation


def test_a_curve_goes_through_what_was_measured():
    errors = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
    curve = P.measured_curve(errors, [2, 4], [0.2, 4.0])
    np.testing.assert_allclose(curve, [0.0, 0.1, 0.2, 4 * (0.1 + 0.4 * 2 / 6), 4.0])
    np.testing.assert_array_equal(P.measured_curve(np.zeros(3), [1, 2], [0.0, 0.0]), np.zeros(3))
    assert (np.diff(P.measured_curve(errors, [1, 4], [2.0, 0.1])) >= 0).all()


def test_the_allocation_is_near_the_best_of_all():
    rng = np.random.default_rng(0)
    prices = (3.0, 2.0, 1.0)

    def cost(cuts):
        return sum(p * (6 - k) for p, k in zip(prices, cuts, strict=True))

    for _ in range(10):
        curves = [np.concatenate([[0.0], np.sort(rng.exponential(size=6)).cumsum()]) for _ in prices]
        cuts = P.allocate(curves, cost, 18.0)
        feasible = [k for k in itertools.product(range(6), repeat=3) if cost(k) <= 18.0]
        best = min(sum(c[k] for c, k in zip(curves, one, strict=True)) for one in feasible)
        assert cost(cuts) <= 18.0
        # Greedy goes over the budget by less than one cut, which is what it may pay too much.
        assert sum(c[k] for c, k in zip(curves, cuts, strict=True)) <= best + max(np.diff(c).max() for c in curves)


def test_cuts_come_in_steps_and_leave_what_must_stay():
    curves = [np.arange(17.0), np.arange(9.0)]
    cuts = P.allocate(curves, lambda k: 24.0 - sum(k), 0.0, steps=[4, 2], least=[4, 3])
    assert cuts == [12, 4]


def test_a_cut_that_saves_nothing_is_not_made():
    """Cost in steps of 8 channels: only whole steps are cut; a group that never saves anything stays whole."""
    curves = [np.arange(17.0) ** 2, np.zeros(17)]
    assert P.allocate(curves, lambda k: -(-(16 - k[0]) // 8), 1.0) == [8, 0]
    assert P.allocate(curves, lambda k: 5.0, 1.0) == [0, 0]
