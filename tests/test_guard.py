"""The guard: what the user names is obeyed; auto never takes what is slower or worse."""

from dataclasses import replace

import pytest
from edgec.compiler.guard import choose
from edgec.compiler.types import Attempt, Budget, Fidelity, Measurement


def attempt(name, precision, ms=1.0, speedup=None, drop=0.0, size=1000):
    low, high = (None, None) if speedup is None else (speedup - 0.05, speedup + 0.05)
    measurement = Measurement(name, "local", ms, speedup=speedup, speedup_low=low, speedup_high=high)
    fidelity = Fidelity("top1", 100, 90.0, 90.0 - drop, drop, drop - 0.1, drop + 0.1)
    return Attempt(name, precision, measurement, fidelity, size, False, "")


def chosen(attempts, budget=None, named=None):
    found = choose(attempts, budget or Budget(), named=named)
    (winner,) = [a for a in found if a.chosen]
    assert all(a.verdict for a in found)
    return winner.name


FP32 = attempt("fp32", "fp32")


def test_auto_takes_the_fastest_inside_the_budget():
    attempts = [FP32, attempt("int8", "int8", 0.5, 2.0), attempt("int8, 1 in float", "int8", 0.6, 1.6)]
    assert chosen(attempts) == "int8"


def test_auto_never_takes_what_is_slower():
    assert chosen([FP32, attempt("int8", "int8", 1.2, 0.8)]) == "fp32"


def test_auto_wants_the_whole_interval_above_one():
    assert chosen([FP32, attempt("int8", "int8", 0.97, 1.06)]) == "fp32"  # 1.01 to 1.11: not shown


def test_auto_steps_back_when_quality_falls():
    attempts = [FP32, attempt("int8", "int8", 0.5, 2.0, drop=3.0), attempt("int8, 2 in float", "int8", 0.7, 1.4, 0.5)]
    assert chosen(attempts) == "int8, 2 in float"


def test_a_wider_budget_takes_it_again():
    attempts = [FP32, attempt("int8", "int8", 0.5, 2.0, drop=3.0)]
    assert chosen(attempts, Budget(5.0)) == "int8"


def test_what_is_named_is_obeyed_even_if_worse():
    found = choose([FP32, attempt("int8", "int8", 1.2, 0.8, drop=3.0)], Budget(), named="int8")
    assert found[1].chosen
    assert "loses 3.00 points" in found[1].verdict


def test_named_prefers_the_variant_inside_the_budget():
    attempts = [FP32, attempt("int8", "int8", 0.5, 2.0, drop=3.0), attempt("int8, 1 in float", "int8", 0.6, 1.5, 0.2)]
    assert chosen(attempts, named="int8") == "int8, 1 in float"


@pytest.mark.parametrize("budget", [Budget(max_latency_ms=0.8), Budget(max_size_bytes=500)])
def test_latency_and_size_budgets(budget):
    small = attempt("int8", "int8", 0.5, 2.0, size=400)
    assert chosen([FP32, small], budget) == "int8"


def test_unmeasured_takes_the_integers_inside_the_budget():
    none = Measurement("x", "none", None, reason="not here")
    good = Fidelity("top1", 100, 90.0, 89.9, 0.1, 0.0, 0.2)
    attempts = [Attempt(n, n, none, good, 10, False, "") for n in ("fp32", "int8")]
    assert chosen(attempts) == "int8"


def test_auto_never_takes_what_was_not_judged():
    attempts = [replace(FP32, fidelity=None), replace(attempt("int8", "int8", 0.5, 2.0), fidelity=None)]
    assert chosen(attempts) == "fp32"
    assert chosen(attempts, named="int8") == "int8"  # asked for: obeyed


def test_nan_is_outside_every_budget():
    assert chosen([FP32, attempt("int8", "int8", 0.5, 2.0, drop=float("nan"))]) == "fp32"


def test_unmeasured_and_outside_the_budget_falls_back():
    none = Measurement("int8", "none", None, reason="not here")
    bad = Fidelity("top1", 100, 90.0, 80.0, 10.0, 9.0, 11.0)
    attempts = [Attempt("fp32", "fp32", none, None, 10, False, ""), Attempt("int8", "int8", none, bad, 5, False, "")]
    assert chosen(attempts) == "fp32"


def test_what_was_not_measured_is_not_taken_over_what_was():
    left_out = Attempt("int8, 1 in float", "int8", Measurement("x", "none", None, reason="-"), None, 10, False, "")
    assert chosen([FP32, attempt("int8", "int8", 0.5, 2.0, drop=3.0), left_out]) == "fp32"
