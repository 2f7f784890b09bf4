import numpy as np
import pytest
from edgec.backends.targets.timing import interleave, median_interval, summarise


def test_the_interval_covers_the_true_median_as_often_as_stated():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(500):
        _, low, high = median_interval(rng.lognormal(size=101))
        inside += low <= 1.0 <= high  # the median of a standard lognormal is 1
    assert 0.92 <= inside / 500 <= 0.99


def test_calls_run_in_turn():
    order = []
    interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, warm_up=0, min_rounds=5)
    rounds = ["".join(order[i : i + 4]) for i in range(6, len(order), 4)]  # three warm-ups of each come first
    assert len(rounds) == 5
    assert set(rounds) == {"aabb", "bbaa"}  # in either order, each once untimed and once timed


def test_a_call_against_itself_is_not_shown_to_be_faster():
    """The guard's margin: the same work three times, as original, baseline and candidate.

    A bias of the method shows in every attempt, a neighbour on the machine not in three of three.
    """
    from edgec.compiler.guard import MARGIN

    data = np.random.default_rng(0).normal(size=(120, 120))

    def work():
        return data @ data

    def largest_lower_bound():
        samples = interleave({"a": work, "b": work, "c": work}, seconds=1.0, warm_up=0.05)
        return max(median_interval(samples["b"] / samples[name])[1] for name in "ac")

    assert any(largest_lower_bound() < MARGIN for _ in range(3))


def test_speed_up_is_of_the_same_round():
    # the machine slows down tenfold half-way: a ratio of medians taken apart would not see exactly 2
    drift = np.array([1.0] * 50 + [10.0] * 50)
    found = summarise(
        {"base": 2 * drift, "fast": drift},
        "base",
        target="local",
        threads=1,
        batch=1,
        providers={"base": "", "fast": ""},
    )
    assert found["fast"].speedup == pytest.approx(2.0)
    assert (found["fast"].speedup_low, found["fast"].speedup_high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert found["base"].speedup is None


def test_percentiles_are_ordered():
    values = np.random.default_rng(1).gamma(2.0, size=500)
    m = summarise({"x": values}, "x", target="local", threads=1, batch=1, providers={"x": ""})["x"]
    assert m.low_ms < m.median_ms < m.high_ms < m.p90_ms < m.p99_ms
    assert m.runs == 500
