"""The guard: what the user names is obeyed; auto never takes what is slower or worse."""

from dataclasses import replace

import pytest
from edgec.compiler.guard import AS_PLAIN, choose
from edgec.compiler.types import Attempt, Budget, Fidelity, Measurement, OutputFidelity


def attempt(name, precision, ms=1.0, speedup=None, drop=0.0, size=1000, db=()):
    low, high = (None, None) if speedup is None else (speedup - 0.05, speedup + 0.05)
    measurement = Measurement(name, "local", ms, speedup=speedup, speedup_low=low, speedup_high=high)
    fidelity = Fidelity("top1", 100, 90.0, 90.0 - drop, drop, drop - 0.1, drop + 0.1)
    fidelity = replace(fidelity, outputs=tuple(OutputFidelity(f"y{i}", value, None) for i, value in enumerate(db)))
    return Attempt(name, precision, measurement, fidelity, size, False, "")


def chosen(attempts, budget=None, named=None):
    found = choose(attempts, budget or Budget(), named=named)
    (winner,) = [a for a in found if a.chosen]
    assert all(a.verdict for a in found)
    return winner.name


FP32 = attempt("fp32", "fp32")


def quiet(one, p5_ms):
    return replace(one, measurement=replace(one.measurement, p5_ms=p5_ms))


@pytest.mark.parametrize("named", ["int8", None])
def test_as_fast_counts_only_if_it_is_so_when_nobody_disturbs(named):
    """Both mixtures are as fast as plain INT8 on the busy machine; undisturbed, one is 10 % slower."""
    fp32, plain = quiet(FP32, 0.8), quiet(attempt("int8", "int8", 0.5, 2.0, db=[30.0]), 0.40)
    near = quiet(attempt("int8, 2 in float", "int8", 0.5, 2.0, db=[32.0]), 0.40)
    far = quiet(attempt("int8, 9 in float", "int8", 0.5, 2.0, db=[36.0]), 0.44)
    found = choose([fp32, plain, near, far], Budget(), named=named)
    assert [a.chosen for a in found] == [False, False, True, False]
    assert found[3].verdict == "closer to the original, but not as fast"
    assert found[1].verdict == "as fast as the chosen one, but no closer to the original"
    unknown = replace(near, measurement=replace(near.measurement, p5_ms=None))
    assert chosen([fp32, plain, unknown, far], named=named) == "int8, 9 in float", "the medians are all there is"


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


# ------------------------------------------------------------------------------------------ the closest of equals


def int8(name, speedup, *db, drop=0.0):
    return attempt(name, "int8", 1 / speedup, speedup, drop, db=db)


def test_named_takes_the_closest_of_those_as_fast_as_the_plain_one():
    attempts = [FP32, int8("plain", 2.0, 30.0), int8("mixed", 1.975, 35.0), int8("slow", 1.965, 40.0)]
    assert AS_PLAIN == 0.985  # 1.97 is as fast as 2.0
    assert chosen(attempts, named="int8") == "mixed"
    assert chosen(attempts[:2] + attempts[3:], named="int8") == "plain"
    faster = [*attempts, int8("faster", 3.0, 32.0)]
    assert chosen(faster, named="int8") == "mixed"  # what was asked for is that fast: the rest goes to quality


def test_named_is_not_slower_than_float_where_that_can_be():
    attempts = [FP32, int8("plain", 1.02, 30.0), int8("mixed", 0.995, 40.0)]  # as fast as the plain one
    assert chosen(attempts, named="int8") == "plain"
    slow = [FP32, int8("plain", 0.8, 30.0), int8("mixed", 0.9, 28.0), int8("fast", 1.01, 20.0)]
    assert chosen(slow, named="int8") == "fast"
    assert chosen(slow[:3], named="int8") == "mixed"  # none is: the fastest of what was asked for


def test_a_plain_one_outside_the_budget_still_says_what_is_fast():
    attempts = [FP32, int8("plain", 2.0, 30.0, drop=3.0), int8("a", 1.5, 33.0), int8("b", 1.45, 36.0)]
    assert chosen(attempts, named="int8") == "a"  # 1.45 is not as fast as 1.5, the fastest that is inside
    attempts.append(int8("c", 1.485, 36.0))
    assert chosen(attempts, named="int8") == "c"


def test_the_worst_output_counts():
    attempts = [FP32, int8("plain", 2.0, 30.0, 31.0), int8("mixed", 2.0, 60.0, 29.0)]
    assert chosen(attempts, named="int8") == chosen(attempts) == "plain"
    exact = int8("exact", 2.0, None, 32.0)  # None: nothing differs
    assert chosen([*attempts, exact], named="int8") == chosen([*attempts, exact]) == "exact"


def test_ties_go_to_the_faster_and_then_to_the_first():
    attempts = [FP32, int8("plain", 2.0, 30.0), int8("faster", 2.01, 30.0), int8("again", 2.01, 30.0)]
    assert chosen(attempts, named="int8") == chosen(attempts) == "faster"
    unjudged = [replace(a, fidelity=None) for a in attempts]
    assert chosen(unjudged, named="int8") == "faster"


def test_auto_takes_the_closest_of_the_fastest():
    attempts = [FP32, int8("plain", 2.0, 30.0), int8("mixed", 1.95, 35.0), int8("slow", 1.9, 40.0)]
    assert chosen(attempts) == "mixed"
    assert chosen([*attempts, int8("faster", 2.5, 20.0)]) == "faster"  # fastest first


def test_other_precisions_are_not_what_was_asked_for():
    attempts = [FP32, attempt("fp16", "fp16", 0.2, 5.0, db=(80.0,)), int8("plain", 2.0, 30.0)]
    assert chosen(attempts, named="int8") == "plain"
    assert chosen(attempts, named="fp32") == "fp32"


def test_where_not_all_is_measured_the_first_inside_is_taken():
    unknown = replace(int8("mixed", 2.0, 40.0), measurement=Measurement("mixed", "none", None, reason="not here"))
    assert chosen([FP32, int8("plain", 2.0, 30.0), unknown], named="int8") == "plain"
    assert chosen([FP32, int8("plain", 2.0, 30.0, drop=3.0), unknown], named="int8") == "mixed"


def verdicts(attempts, named=None):
    return [a.verdict for a in choose(attempts, Budget(), named=named)]


def test_verdicts_say_what_decided():
    attempts = [FP32, int8("plain", 2.0, 30.0), int8("mixed", 1.95, 35.0), int8("slow", 1.2, 40.0)]
    closer, slower = (
        "as fast as the chosen one, but no closer to the original",
        "inside the budget, but slower than the chosen one",
    )
    best = "the closest to the original of the fastest inside the budget"
    assert verdicts(attempts) == ["the baseline", closer, best, slower]
    assert verdicts(attempts[:2]) == ["the baseline", "the fastest inside the budget"]
    attempts[2] = int8("mixed", 1.98, 35.0)
    assert verdicts(attempts, "int8") == ["the baseline", closer, "asked for", slower]
    none = [FP32, int8("plain", 1.01, 30.0)]
    assert verdicts(none) == ["nothing else is faster inside the budget", "not shown to be faster than FP32"]
    assert verdicts(none, "int8") == ["the baseline", "asked for"]
    assert verdicts([FP32, int8("plain", 2.0, 30.0, drop=3.0)], "int8")[1].startswith(
        "asked for, but loses 3.00 points"
    )


def test_where_nothing_could_be_made_of_what_was_asked_for_that_is_said():
    (only,) = choose([FP32], Budget(), named="int8")
    assert only.chosen and only.verdict == "only exact passes ran"
    assert choose([FP32], Budget(), named="fp32")[0].verdict == "asked for"


# ------------------------------------------------------------------------------------------ stated budgets


def test_a_stated_latency_is_fast_enough_and_the_rest_goes_to_quality():
    attempts = [FP32, int8("plain", 2.0, 30.0), int8("mixed", 1.6, 35.0), int8("slow", 1.2, 40.0)]
    limit = Budget(max_latency_ms=0.7)  # slow takes 0.83
    assert chosen(attempts, limit) == chosen(attempts, limit, named="int8") == "mixed"
    found = choose(attempts, limit, named=None)
    assert found[2].verdict == "the closest to the original inside the budget"
    assert chosen(attempts) == "plain", "where none is stated the fastest"
    assert chosen([FP32, int8("plain", 1.01, 30.0)], Budget(max_latency_ms=2.0)) == "fp32", "never slower than FP32"


def test_a_size_that_float_misses_is_held_even_if_that_is_slower():
    small = [int8("a", 0.9, 30.0), int8("b", 0.89, 33.0), int8("c", 0.7, 40.0)]
    attempts = [attempt("fp32", "fp32", size=4000), *small]
    assert chosen(attempts, Budget(max_size_bytes=2000)) == "b"


def test_unmeasured_takes_the_closest_of_those_with_most_work_on_integers():
    none = Measurement("x", "none", None, reason="not here")

    def one(name, precision, share, db, drop=0.0):
        made = attempt(name, precision, drop=drop, db=(db,))
        return replace(made, measurement=none, integer_macs=share)

    attempts = [one("fp32", "fp32", None, 100.0), one("w4a8", "w4a8", 1.0, 20.0), one("two wide", "w4a8", 1.0, 22.0)]
    assert chosen(attempts, named="w4a8") == "two wide"
    points = [one("half", "int8", 0.5, 50.0), one("most", "int8", 0.9, 40.0), one("plain", "int8", 1.0, 30.0, drop=3.0)]
    for named in (None, "int8"):
        assert chosen([attempts[0], *points], named=named) == "most"
    assert chosen([attempts[0], *points, one("fp16", "fp16", None, 80.0)]) == "most", "the first setting that holds"


def test_a_stated_size_holds_although_the_default_drop_does_not():
    large = replace(int8("large", 2.0, 30.0, drop=3.0), size_bytes=900)
    small = [replace(int8(n, s, db, drop=5.0), size_bytes=400) for n, s, db in (("a", 1.5, 20.0), ("b", 1.1, 25.0))]
    attempts = [FP32, large, *small]
    assert chosen(attempts, Budget(max_size_bytes=500), named="int8") == "b", "the closest that holds what was stated"
    assert chosen(attempts, named="int8") == "large"


def test_where_nothing_holds_a_stated_drop_the_least_is_the_best_attempt():
    attempts = [
        FP32,
        int8("plain", 2.0, 30.0, drop=8.0),
        int8("a", 1.9, 28.0, drop=3.0),
        int8("b", 1.2, 29.0, drop=5.0),
    ]
    assert chosen(attempts, Budget(1.0, drop_stated=True), named="int8") == "a"
    assert chosen(attempts, Budget(1.0), named="int8") == "plain", "not stated: it is what was asked for"
