"""The choice of precisions: the integer program against all choices, its frontier, its refusals, and the bisection."""

import itertools

import numpy as np
import pytest
from edgec.compiler.errors import BudgetError
from edgec.compiler.mixed_precision.contributions import Contributions
from edgec.compiler.mixed_precision.costs import Costs
from edgec.compiler.mixed_precision.mixed import FLOAT, INTEGER, NARROW, Need, Problem, Term, mixed_problem
from edgec.compiler.mixed_precision.program import frontier, refine, solve
from edgec.compiler.mixed_precision.switchboard import Source
from edgec.compiler.mixed_precision.units import Link, Unit, Wiring


def instance(seed: int, units: int = 5, precisions: tuple[str, ...] = ("float", "fp16", "int8")) -> Problem:
    """Random terms with up to three cases of up to two literals, a fixed one, and a need."""
    rng = np.random.default_rng(seed)
    names = [f"u{i}" for i in range(units)]

    def literal():
        some = rng.permutation(precisions)[: rng.integers(1, len(precisions))]
        return str(rng.choice(names)), frozenset(map(str, some))

    terms = [Term({"ms": 0.3, "error": 0.0})]
    for name in names:  # what costs less errs more
        for i, precision in enumerate(precisions):
            amounts = {"ms": rng.uniform(0.5, 1.5) / (i + 1), "error": rng.uniform(0.5, 1.5) * i}
            terms.append(Term(amounts, (((name, frozenset({precision})),),)))
    for _ in range(2 * units):
        cases = tuple(tuple(literal() for _ in range(rng.integers(1, 3))) for _ in range(rng.integers(1, 4)))
        terms.append(Term({"ms": rng.uniform(0, 0.5), "error": rng.uniform(0, 0.5)}, cases))
    need = Need("u2", frozenset({"int8"}), (("u0", frozenset({"int8"})), ("u1", frozenset({"int8", "fp16"}))))
    return Problem({name: precisions for name in names}, tuple(terms), (need,))


def everything(problem: Problem):
    for picked in itertools.product(*problem.choices.values()):
        choice = dict(zip(problem.choices, picked, strict=True))
        if problem.allows(choice):
            yield choice, problem.amounts(choice)


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_trying_all_choices_finds(seed):
    problem = instance(seed)
    every = [amounts for _, amounts in everything(problem)]
    assert len(every) < 3**5, "the need forbids something"
    times = sorted(a["ms"] for a in every)
    for limit in (times[0] * 1.0001, times[len(times) // 3], times[-1]):
        best = min(a["error"] for a in every if a["ms"] <= limit)
        found = solve(problem, "error", {"ms": limit})
        assert problem.allows(found.precision)
        assert found.predicted == problem.amounts(found.precision)
        assert found.predicted["ms"] <= limit * (1 + 1e-6)
        # HiGHS ends at a relative gap of 1e-6, and takes constraints as held within 1e-6
        assert found.predicted["error"] == pytest.approx(best, rel=1e-4)
    quality = sorted(a["error"] for a in every)[len(every) // 2]
    fastest = min(a["ms"] for a in every if a["error"] <= quality)
    assert solve(problem, "ms", {"error": quality}).predicted["ms"] == pytest.approx(fastest, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_frontier_is_monotone_and_none_of_it_is_beaten(seed):
    problem = instance(seed)
    found = frontier(problem, points=7)
    times, errors = ([a.predicted[m] for a in found] for m in ("ms", "error"))
    assert len(found) > 2
    assert times == sorted(times) and len(set(times)) == len(times)
    assert errors == sorted(errors, reverse=True)
    for one in found:
        better = [a for _, a in everything(problem) if a["ms"] < one.predicted["ms"] - 1e-4]
        assert all(a["error"] > one.predicted["error"] - 1e-4 for a in better)


def test_a_budget_that_cannot_be_met_says_how_low_it_can_get():
    problem = instance(0)
    least = min(a["ms"] for _, a in everything(problem))
    with pytest.raises(BudgetError, match=f"{least:.4g}") as raised:
        solve(problem, "error", {"ms": least * 0.9})
    assert raised.value.exit_code == 3
    with pytest.raises(BudgetError, match="ms at most .* and error at most"):
        solve(problem, "ms", {"ms": least, "error": 0.0})


def test_a_deadline_that_has_passed_leaves_the_two_ends():
    problem = instance(1)
    found = frontier(problem, points=50, deadline=0.0)
    ends = frontier(problem, points=2)
    assert [a.predicted for a in found] == [a.predicted for a in ends]


def test_bisection_holds_the_limit_although_the_prediction_is_wrong():
    """What is measured takes 20 % longer than predicted: the solver must be given a smaller budget than the limit."""
    problem = instance(2)
    every = [a for _, a in everything(problem)]
    limit = 1.3 * min(a["ms"] for a in every)
    best, tried = refine(problem, "error", "ms", limit, lambda one: 1.2 * one.predicted["ms"], rounds=12)
    assert best is not None
    assert 1.2 * best.predicted["ms"] <= limit
    assert tried[0][1] > limit, "the first one, taken at its word, breaks the limit"
    possible = min(a["error"] for a in every if 1.2 * a["ms"] <= limit * 0.97)
    assert best.predicted["error"] <= possible + 1e-4


def test_bisection_that_never_holds_says_so():
    problem = instance(2)
    best, tried = refine(problem, "error", "ms", 1.5, lambda one: 100.0, rounds=4)
    assert best is None
    assert all(value == 100.0 for _, value in tried)


def test_an_end_of_the_frontier_may_cost_nothing():
    """All in float adds no error: that term is due for the other precision only."""
    on, off = frozenset({"int8"}), frozenset({"float"})
    terms = [Term({"ms": 2.0}, ((("u", off),),)), Term({"ms": 1.0, "error": 0.1}, ((("u", on),),))]
    found = frontier(Problem({"u": ("float", "int8")}, tuple(terms)))
    assert [a.predicted for a in found] == [{"ms": 1.0, "error": 0.1}, {"ms": 2.0, "error": 0.0}]


BOTH = (FLOAT, INTEGER)
WIRING = Wiring(
    (
        Unit("a", "linear", ("a",)),
        Unit("b", "linear", ("b",)),
        Unit("s", "combine", ("s",), needs=("a", "b"), feeds=("c",)),
        Unit("c", "linear", ("c",)),
    ),
    (
        Link("x", None, ("a",), ("a",), 10),
        Link("ta", "a", ("b", "s"), ("a", "b", "s"), 10),
        Link("tb", "b", ("s",), ("b", "s"), 10),
        Link("ts", "s", ("c",), ("s", "c"), 10),
        Link("tc", "c", (None,), ("c",), 10),
    ),
    {},
)


@pytest.mark.parametrize("seed", range(3))
def test_the_programs_amounts_are_those_of_the_two_models(seed):
    """Latency as costs.py predicts it, error as contributions.py does, for every choice that can be built."""
    rng = np.random.default_rng(seed)
    tensors = [link.tensor for link in WIRING.links]
    costs = Costs(*({t: float(rng.uniform(0, 1)) for t in [*tensors, "softmax"]} for _ in range(4)))
    sources = [Source("tensor", link.tensor, link.rounded_by) for link in WIRING.links]
    sources += [Source("weight", name, (name,)) for name in "abc"]
    contributions = Contributions(tuple(sources), rng.uniform(0, 1, len(sources)), 0.8, 0.0, 1.0, {}, 8)
    problem = mixed_problem(
        WIRING, costs, contributions, {"bytes": {name: {FLOAT: 4.0, INTEGER: 1.0} for name in "abc"}}
    )
    allowed = 0
    for picked in itertools.product((FLOAT, INTEGER), repeat=4):
        choice = dict(zip("absc", picked, strict=True))
        on = {name for name, precision in choice.items() if precision == INTEGER}
        assert problem.allows(choice) == (WIRING.realised(on) == on)
        if problem.allows(choice):
            allowed += 1
            amounts = problem.amounts(choice)
            assert amounts["ms"] == pytest.approx(costs.predict(WIRING, on), rel=1e-12)
            assert contributions.expected(amounts["error"]) == pytest.approx(contributions.predict(on))
            assert amounts["bytes"] == 12 - 3 * len(on & set("abc"))
    assert allowed == 8 + 3, "the Add joins only where its reader and an input are on integers"


@pytest.mark.parametrize("seed", range(4))
def test_three_precisions_against_all_choices(seed):
    """Layers may have weights of 4 bits: the least error within a size and a latency is what trying all finds."""
    rng = np.random.default_rng(seed)
    tensors = [*(link.tensor for link in WIRING.links), "softmax"]
    costs = Costs(*({t: float(rng.uniform(0, 1)) for t in tensors} for _ in range(4)))
    sources = [Source("tensor", link.tensor, link.rounded_by) for link in WIRING.links]
    sources += [Source("weight", name, (name,)) for name in "abc"]
    contributions = Contributions(tuple(sources), rng.uniform(0, 1, len(sources)), 0.0, 0.0, 1.0, {}, 8)
    narrow = {name: float(rng.uniform(1, 3)) for name in "abc"}
    numbers = {name: float(rng.integers(10, 100)) for name in "abc"}
    size = {name: {FLOAT: 4 * n, INTEGER: n, NARROW: n / 2} for name, n in numbers.items()}
    problem = mixed_problem(WIRING, costs, contributions, {"bytes": size}, narrow=narrow)
    assert problem.choices == {"a": (*BOTH, NARROW), "b": (*BOTH, NARROW), "s": BOTH, "c": (*BOTH, NARROW)}
    alone = dict(zip(((s.kind, s.name) for s in sources), contributions.alone, strict=True))
    every = list(everything(problem))
    for choice, amounts in every:
        on = {name for name, precision in choice.items() if precision != FLOAT}
        assert amounts["ms"] == pytest.approx(costs.predict(WIRING, on)), "4 bits take the time of 8"
        rounded = sum(alone["tensor", link.tensor] for link in WIRING.links if not on.isdisjoint(link.rounded_by))
        weights = sum(narrow[u] if choice[u] == NARROW else alone["weight", u] for u in on & set("abc"))
        assert amounts.get("error", 0.0) == pytest.approx(rounded + weights)
        assert amounts["bytes"] == pytest.approx(sum(size[u][choice[u]] for u in "abc"))
    small = np.quantile([a["bytes"] for _, a in every], 0.3)
    fast = np.median([a["ms"] for _, a in every if a["bytes"] <= small])
    limits = {"bytes": small * (1 + 1e-6), "ms": fast * (1 + 1e-6)}
    within = [a["error"] for _, a in every if all(a[m] <= limit for m, limit in limits.items())]
    found = solve(problem, "error", limits)
    assert found.predicted["error"] == pytest.approx(min(within), rel=1e-4)  # HiGHS's gap
    assert NARROW in found.precision.values(), "so small a file needs them"


def test_without_floats_every_unit_runs_on_integers():
    nothing = {link.tensor: 0.0 for link in WIRING.links}
    contributions = Contributions((), np.zeros(0), 0.0, 0.0, 0.0, {}, 1)
    wide = {"wide": {name: {INTEGER: 1.0} for name in "abc"}}
    problem = mixed_problem(
        WIRING, Costs(nothing, nothing, nothing, nothing), contributions, wide,
        narrow={"a": 3.0, "b": 1.0, "c": 2.0}, floats=False,
    )  # fmt: skip
    assert problem.choices == {**dict.fromkeys("abc", (INTEGER, NARROW)), "s": (INTEGER,)}
    found = solve(problem, "error", {"wide": 2})
    assert found.precision == {"a": INTEGER, "b": NARROW, "c": INTEGER, "s": INTEGER}, "the two that lose most"


def test_bisection_does_not_go_the_wrong_way_where_nothing_is_predicted_to_hold():
    """The limit is half of what the fastest choice takes: that one is measured, and nothing slower."""
    problem = instance(2)
    least = min(a["ms"] for _, a in everything(problem))
    best, tried = refine(problem, "error", "ms", least / 2, lambda one: one.predicted["ms"])
    assert best is None
    assert [value for _, value in tried] == [pytest.approx(least, rel=1e-4)]
    pleased, _ = refine(problem, "error", "ms", least / 2, lambda one: one.predicted["ms"] / 3)
    assert pleased is not None, "the prediction may err the other way"


def test_bisection_starts_where_it_is_told_and_ends_when_there_is_no_more_to_have():
    problem = instance(3)
    seen = []

    def measured(one):
        seen.append(one.predicted["ms"])
        return one.predicted["ms"]

    most = max(a["ms"] for _, a in everything(problem))
    refine(problem, "error", "ms", 1.5 * most, measured, start=0.5 * most, rounds=12)
    assert seen[0] <= 0.5 * most * (1 + 1e-6)
    best = min(a["error"] for _, a in everything(problem))
    assert problem.amounts(solve(problem, "error").precision)["error"] == pytest.approx(best, rel=1e-4)
    assert len(seen) < 12
