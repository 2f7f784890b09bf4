"""Ranges for several conditions: against brute force with the exact error of ranges.py, and what must hold always."""

import time

import numpy as np
import pytest
from edgec.calib import ranges
from edgec.calib.minimax import choose, minimax, pooled
from edgec.calib.ranges import expected_error, without_zeros
from edgec.compiler.types import Range, TensorStatistics
from hypothesis import given, settings
from hypothesis import strategies as st

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=50_000)
LAPLACE = RNG.laplace(size=50_000)
#: What a tensor may look like: as it is clean, noisier, blurred, dim, with other tails, under a veil.
SIGNED = {"clean": NORMAL, "wide": 1.7 * NORMAL, "narrow": 0.4 * NORMAL, "tails": LAPLACE, "shifted": 0.7 * NORMAL + 1}
POSITIVE = {name: np.maximum(values, 0) for name, values in SIGNED.items()}
DATA = {"signed": SIGNED, "positive": POSITIVE, "negative": {name: -values for name, values in POSITIVE.items()}}

#: How far the search may be from the best of a dense grid, in error: its own grid, the approximations that its head
#: names, and bins of another width.
CLOSE = 1.03


def statistics(values, spread=1.0, bins=4096):
    """Statistics of the values; their histogram reaches `spread` times as far as they do."""
    values = np.asarray(values, np.float32)
    low, high = spread * min(float(values.min()), 0.0), spread * max(float(values.max()), 0.0)
    counts = np.histogram(values, bins, (low, high))[0].astype(np.int64)
    return TensorStatistics(float(values.min()), float(values.max()), 1, counts, low, high)


def conditions(data):
    """Statistics of each condition, each on a grid of its own."""
    return {name: statistics(values, 1 + 0.17 * i) for i, (name, values) in enumerate(data.items())}


def errors(by, low, high, bits, symmetric):
    """The error under each condition of ranges `low`, `high` (n,): (K, n), by ranges.py's formula.

    The zeros of a ReLU cost nothing: they are taken out of the bin that they share with small numbers.
    """
    found = []
    for stats in by.values():
        edges = np.linspace(stats.low, stats.high, len(stats.histogram) + 1)
        counts = without_zeros(stats.histogram.astype(float), edges) / stats.histogram.sum()
        parts = [
            expected_error(counts, edges, low[i : i + 8], high[i : i + 8], bits, symmetric)
            for i in range(0, len(low), 8)
        ]
        found.append(np.concatenate(parts))
    return np.array(found)


def of_range(by, chosen, bits=8, symmetric=False):
    return errors(by, np.array([chosen.min]), np.array([chosen.max]), bits, symmetric)[:, 0]


def dense(by, symmetric, count=22):
    """Pairs of ends on a dense grid: `low`, `high`, each (n,)."""
    low, high = min(0.0, *(s.min for s in by.values())), max(0.0, *(s.max for s in by.values()))
    if symmetric or not low or not high:
        factors = np.geomspace(1 / 16, 1, 8 * count)
        reach = max(-low, high)
        ends = (-factors * reach, factors * reach) if symmetric else (factors * low, factors * high)
        return np.maximum(ends[0], low), np.minimum(ends[1], high)
    factors = np.geomspace(1 / 5, 1, count)
    a, b = np.meshgrid(factors * low, factors * high)
    return a.ravel(), b.ravel()


def brute_force(by, symmetric, bits):
    """All errors on the dense grid, (K, n), and the least one of clean, which may lie between its points."""
    every = errors(by, *dense(by, symmetric), bits, symmetric)
    alone = ranges.choose(by["clean"], "mse", bits=bits, symmetric=symmetric)
    return every, min(every[0].min(), of_range({"": by["clean"]}, alone, bits, symmetric)[0])


def signal(data):
    """The mean square of each condition's values: (K, 1)."""
    return np.array([[np.mean(values**2)] for values in data.values()])


# ------------------------------------------------------------------------------------- against brute force


@pytest.mark.parametrize("tolerance", [0.1, 0.5, 100.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_the_worst_is_as_good_as_by_brute_force(kind, symmetric, tolerance):
    by = conditions(DATA[kind])
    every, least = brute_force(by, symmetric, 8)
    allowed = every[0] <= (1 + tolerance) / CLOSE * least  # at its edge the others change steeply
    best = (every / signal(DATA[kind])).max(axis=0)[allowed].min()
    found = of_range(by, minimax(by, 8, symmetric, tolerance=tolerance), 8, symmetric)
    assert (found / signal(DATA[kind])[:, 0]).max() <= CLOSE * best
    assert found[0] <= CLOSE * (1 + tolerance) * least


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_the_mean_is_as_good_as_by_brute_force(kind, symmetric):
    by = conditions(DATA[kind])
    weights = {"clean": 1.0, "wide": 3.0, "tails": 0.5}
    share = np.array([weights.get(name, 0.0) for name in by]) / signal(DATA[kind])[:, 0]
    best = (share @ brute_force(by, symmetric, 8)[0]).min()
    found = of_range(by, minimax(by, 8, symmetric, tolerance=100.0, weights=weights), 8, symmetric)
    assert share @ found <= CLOSE * best


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_16_bits_do_not_clip_for_next_to_nothing(kind, symmetric):
    """Whatever the tolerance: at the extremes of all, each condition's error is some 80 dB below its signal."""
    by = conditions(DATA[kind])
    found = minimax(by, 16, symmetric, tolerance=0.0)
    assert (of_range(by, found, 16, symmetric) < 1e-6 * signal(DATA[kind])[:, 0]).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("values", [*SIGNED.values(), *POSITIVE.values(), np.r_[NORMAL, 60.0]])
def test_equal_conditions_have_the_range_of_least_squared_error(values, symmetric, bits):
    by = {"clean": statistics(values), "again": statistics(values), "more": statistics(values)}
    alone = ranges.choose(by["clean"], "mse", bits=bits, symmetric=symmetric)
    for tolerance in (0.0, 0.1, 1.0):
        found = minimax(by, bits, symmetric, tolerance=tolerance)
        # the errors are the same; where they are flat, the ends are not
        assert of_range(by, found, bits, symmetric)[0] <= CLOSE * of_range(by, alone, bits, symmetric)[0]
        assert (found.min, found.max) == pytest.approx((alone.min, alone.max), rel=0.1)
    assert minimax({"haze": by["clean"]}, bits, symmetric) == minimax(by, bits, symmetric)


# ------------------------------------------------------------------------------------- what must hold

NUMBERS = st.integers(0, 2**32 - 1)


def drawn(seed, count=4):
    """Conditions by chance: scale, offset and tails of each, and whether the tensor can be negative."""
    rng = np.random.default_rng(seed)
    by = {}
    for name in ("clean", *"abcdefg"[: count - 1]):
        values = rng.standard_t(rng.uniform(5, 30), 20_000) * rng.uniform(0.5, 2) + rng.uniform(-0.3, 0.3)
        by[name] = np.maximum(values, 0) if seed % 2 else values
    return {name: statistics(values, rng.uniform(1, 1.5)) for name, values in by.items()}


@settings(max_examples=25, deadline=None)
@given(NUMBERS, st.booleans())
def test_clean_is_never_more_than_the_tolerance_worse(seed, symmetric):
    by = drawn(seed)
    only = {"clean": by["clean"]}
    alone = minimax(only, 8, symmetric), ranges.choose(by["clean"], "mse", symmetric=symmetric)
    least = min(of_range(only, chosen, 8, symmetric)[0] for chosen in alone)
    for tolerance in (0.0, 0.1):
        found = minimax(by, 8, symmetric, tolerance=tolerance)
        # seldom more than 3 %: it matters where in its step a single outlier lies, and in which bin
        assert of_range(only, found, 8, symmetric)[0] <= 1.06 * (1 + tolerance) * least


@settings(max_examples=25, deadline=None)
@given(NUMBERS, st.booleans())
def test_more_tolerance_is_no_worse(seed, symmetric):
    by = drawn(seed)
    energy = np.array([mean_square(stats) for stats in by.values()])
    chosen = [minimax(by, 8, symmetric, tolerance=tolerance) for tolerance in (0, 0.05, 0.2, 1)]
    worst = [(of_range(by, one, 8, symmetric) / energy).max() for one in chosen]
    # a step of the fine grid, 1.7 %, changes the error of a condition that is clipped by up to 7 %
    assert all(b <= 1.1 * a for a, b in zip(worst, worst[1:], strict=False))


def mean_square(stats):
    edges = np.linspace(stats.low, stats.high, len(stats.histogram) + 1)
    return np.average(((edges[1:] + edges[:-1]) / 2) ** 2, weights=stats.histogram)


def scaled(stats, factor):
    ends = sorted((factor * stats.min, factor * stats.max)), sorted((factor * stats.low, factor * stats.high))
    counts = stats.histogram if factor > 0 else stats.histogram[::-1]
    return TensorStatistics(*ends[0], stats.images, counts, *ends[1])


@settings(max_examples=20, deadline=None)
@given(NUMBERS, st.booleans(), st.sampled_from([0.25, 3.0, 1e-20, 1e20]))
def test_the_range_scales_with_the_tensor(seed, symmetric, factor):
    by = drawn(seed)
    one, other = (minimax(stats, 8, symmetric) for stats in (by, {n: scaled(s, factor) for n, s in by.items()}))
    # rounding may choose another of two candidates that are as good: a fine step is 1.7 %
    assert (other.min, other.max) == pytest.approx((factor * one.min, factor * one.max), rel=0.04)


@settings(max_examples=20, deadline=None)
@given(NUMBERS)
def test_a_mirrored_tensor_has_the_mirrored_range(seed):
    by = drawn(seed)
    one, other = minimax(by, 8, False), minimax({n: scaled(s, -1.0) for n, s in by.items()}, 8, False)
    assert (-other.max, -other.min) == pytest.approx((one.min, one.max), rel=0.04)


@settings(max_examples=25, deadline=None)
@given(NUMBERS, st.booleans(), st.sampled_from([8, 16]), st.randoms(use_true_random=False))
def test_holds_zero_lies_within_and_does_not_depend_on_the_order(seed, symmetric, bits, random):
    by = drawn(seed)
    found = minimax(by, bits, symmetric)
    assert min(0.0, *(s.min for s in by.values())) <= found.min <= 0 <= found.max <= max(s.max for s in by.values())
    shuffled = list(by.items())
    random.shuffle(shuffled)
    assert minimax(dict(shuffled), bits, symmetric) == found


def test_clean_decides_alone_without_tolerance():
    by = conditions(SIGNED)
    chosen = minimax(by, 8, False, tolerance=0.0)
    alone = minimax({"clean": by["clean"]}, 8, False)
    assert (chosen.min, chosen.max) == pytest.approx((alone.min, alone.max), rel=0.05)
    free = minimax(by, 8, False, tolerance=100.0)
    assert free.max > 1.2 * chosen.max  # the wider conditions are heard
    assert minimax({n: s for n, s in by.items() if n != "clean"}, 8, False).max > 1.2 * chosen.max


def test_weights_pull():
    by = {"clean": statistics(NORMAL), "wide": statistics(4 * NORMAL)}
    ends = [minimax(by, 8, False, tolerance=9, weights={"clean": 1, "wide": w}).max for w in (0, 0.2, 1, 5)]
    assert ends == sorted(ends) and ends[0] < ends[-1]
    alone = minimax({"clean": by["clean"]}, 8, False).max
    assert ends[0] == pytest.approx(alone, rel=0.05)
    for weights in ({}, {"clean": 0.0}, {"clean": -1.0, "wide": 2.0}, {"haze": 1.0}):
        with pytest.raises(ValueError, match="weights"):
            minimax(by, 8, False, weights=weights)


# ------------------------------------------------------------------------------------- odd tensors


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_condition_under_which_all_is_zero_has_no_say(symmetric):
    by = conditions(POSITIVE)
    dark = TensorStatistics(0.0, 0.0, 1, np.array([9] + [0] * 4095), 0.0, 0.0)
    assert minimax({**by, "dark": dark}, 8, symmetric) == minimax(by, 8, symmetric)
    assert minimax({"clean": dark, "dark": dark}, 8, symmetric) == Range(0.0, 0.0)
    among = minimax({**by, "clean": dark}, 8, symmetric)
    free = {name: stats for name, stats in by.items() if name != "clean"}
    assert among == minimax(free, 8, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [3.0, -2.0, 1e-3])
def test_a_condition_under_which_all_is_the_same(value, symmetric):
    still = statistics(np.full(1000, value))
    chosen = minimax({"clean": still, "haze": still}, 8, symmetric)
    # a bin is 1/2048 of the range
    assert (chosen.min, chosen.max) == pytest.approx((min(value, 0), max(value, 0)), rel=2e-3)
    by = conditions(SIGNED)
    found = minimax({**by, "still": still}, 8, symmetric)
    assert of_range(by, found, 8, symmetric)[0] <= 1.15 * of_range(by, minimax(by, 8, symmetric), 8, symmetric)[0]


def test_no_statistics():
    with pytest.raises(ValueError, match="no condition"):
        minimax({}, 8, False)
    with pytest.raises(ValueError, match="histogram"):
        minimax({"clean": TensorStatistics(-1.0, 2.0, 5)}, 8, False)


# ------------------------------------------------------------------------------------- mixtures


def test_pooled_is_the_mixture():
    by = {"clean": statistics(NORMAL), "wide": statistics(3 * NORMAL, 1.3), "positive": statistics(POSITIVE["tails"])}
    both = pooled(by)
    values = np.concatenate([NORMAL, 3 * NORMAL, POSITIVE["tails"]])
    expected = statistics(values, bins=len(both.histogram))
    assert (both.min, both.max, both.images) == (np.float32(values.min()), np.float32(values.max()), 3)
    below = [np.cumsum(s.histogram) / s.histogram.sum() for s in (both, expected)]
    np.testing.assert_allclose(*below, atol=2e-3)  # bins of three grids, the zeros of one of them spread over a bin
    assert both.histogram.dtype == np.int64


def test_methods_see_the_mixture():
    by = conditions(SIGNED)
    assert choose(by, "minmax") == Range(min(s.min for s in by.values()), max(s.max for s in by.values()))
    assert choose(by, "mse", symmetric=True) == ranges.choose(pooled(by), "mse", symmetric=True)
    assert choose(by, bits=16) == minimax(by, 16, False)
    bare = {name: TensorStatistics(stats.min, stats.max, 1) for name, stats in by.items()}
    assert choose(bare, "minmax") == choose(by, "minmax")
    with pytest.raises(KeyError):
        choose(by, "guess")
    zero = TensorStatistics(0.0, 0.0, 1, np.array([9] + [0] * 4095), 0.0, 0.0)
    assert choose({"clean": zero, "haze": zero}, "mse") == Range(0.0, 0.0)


def test_fast_enough_for_hundreds_of_tensors():
    by = {str(i): statistics((1 + 0.1 * i) * NORMAL, 1.2) for i in range(8)}
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        minimax(by, 8, False)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.03  # 2 to 3 ms on an idle core
