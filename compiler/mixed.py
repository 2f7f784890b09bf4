"""Which unit runs in which precision: an integer program over measured latencies and predicted errors.

A choice x gives every unit one precision. Everything that a choice costs is a term: amounts (milliseconds, bytes,
error energy, …) that are due as soon as one of its cases holds, a case being a conjunction of "unit u has one of the
precisions P". A unit's own latency is a term with one case of one literal; a conversion between units has a case for
each pair of differing precisions, the rounding of a tensor one for each unit that causes it. With binary x[u,k], and
one z[t] >= 0 for each term,

    sum over k of x[u,k] = 1                              every unit u
    z[t] >= sum over the case's literals - (their number - 1)          every case of t
    sum over t of amount[t,m] z[t] <= limit[m]            every limited measure m
    minimise  sum over t of amount[t,m] z[t]              for one measure m

Amounts are never negative, so z needs no integrality: it is 1 where a case holds and 0 where none does. HiGHS solves it
(scipy.optimize.milp). The same form serves any number of precisions: it is the multiple-choice knapsack of e.g.
Hubara et al. 2021 ("Accurate Post Training Quantization with Small Calibration Sets"), plus boundaries.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from .contributions import Contributions
from .costs import Costs
from .errors import BudgetError
from .types import Progress, silent
from .units import Link, Wiring

logger = logging.getLogger(__name__)

#: "This unit has one of these precisions."
Literal = tuple[str, frozenset[str]]

FLOAT, INTEGER = "float", "int8"


@dataclass(frozen=True)
class Term:
    """Amounts, none negative, by measure; due once if at least one of the cases (conjunctions) holds.

    Without cases they are always due.
    """

    amounts: Mapping[str, float]
    cases: tuple[tuple[Literal, ...], ...] = ()


@dataclass(frozen=True)
class Need:
    """`unit` may have one of `precisions` only where at least one of the literals holds."""

    unit: str
    precisions: frozenset[str]
    any_of: tuple[Literal, ...]


@dataclass(frozen=True)
class Problem:
    """The precisions that each unit may have, the terms that a choice among them costs, and what it must heed."""

    choices: Mapping[str, tuple[str, ...]]
    terms: tuple[Term, ...]
    needs: tuple[Need, ...] = ()

    def amounts(self, choice: Mapping[str, str]) -> dict[str, float]:
        """Return what a choice (unit -> precision) costs, by measure."""
        found = {measure: 0.0 for term in self.terms for measure in term.amounts}
        for term in self.terms:
            if not term.cases or any(all(choice[u] in ks for u, ks in case) for case in term.cases):
                for measure, amount in term.amounts.items():
                    found[measure] += amount
        return found

    def allows(self, choice: Mapping[str, str]) -> bool:
        """Say whether a choice heeds the needs."""
        return all(
            choice[need.unit] not in need.precisions or any(choice[u] in ks for u, ks in need.any_of)
            for need in self.needs
        )


@dataclass(frozen=True)
class Assignment:
    """A precision for every unit, and what it is predicted to cost, by measure."""

    precision: Mapping[str, str]
    predicted: Mapping[str, float] = field(default_factory=dict)

    def having(self, precision: str) -> frozenset[str]:
        """Return the units with this precision."""
        return frozenset(unit for unit, chosen in self.precision.items() if chosen == precision)


def mixed_problem(
    wiring: Wiring,
    costs: Costs,
    contributions: Contributions,
    extra: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Problem:
    """Return the choice between float and integers for every unit. Measures: `ms`, `error`, and those of `extra`.

    `error` is what the sources' own errors add up to; Contributions has what to expect of such a sum, and the reverse.
    `extra` maps a measure to unit -> (amount in float, amount on integers): bytes, or MACs left in float.
    """
    on, off = frozenset({INTEGER}), frozenset({FLOAT})
    handed_on = {link.tensor for link in wiring.links if link.producer}
    fixed = Term({"ms": sum(ms for home, ms in costs.float_ms.items() if home not in handed_on)})
    terms = [term for link in wiring.links for term in _link_terms(link, costs, on, off)]
    for source, energy in zip(contributions.sources, contributions.alone, strict=True):
        terms.append(Term({"error": float(energy)}, tuple(((unit, on),) for unit in source.units)))
    for measure, table in (extra or {}).items():
        for unit, (in_float, on_integers) in table.items():
            terms.append(Term({measure: in_float}, (((unit, off),),)))
            terms.append(Term({measure: on_integers}, (((unit, on),),)))
    needs = [
        Need(u.name, on, tuple((n, on) for n in some)) for u in wiring.units for some in (u.needs, u.feeds) if some
    ]
    due = [term for term in terms if term.cases and any(term.amounts.values())]
    return Problem({unit.name: (FLOAT, INTEGER) for unit in wiring.units}, (fixed, *due), tuple(needs))


def _link_terms(link: Link, costs: Costs, on: frozenset[str], off: frozenset[str]) -> list[Term]:
    """Return what a link costs in time: itself, and the steps from float to integers and back."""
    tensor, producer = link.tensor, link.producer
    readers = [r for r in link.readers if r is not None]
    if producer is None:
        return [Term({"ms": costs.enter_ms[tensor]}, tuple(((r, on),) for r in readers))]
    back: list[tuple[Literal, ...]] = [((producer, on), (r, off)) for r in readers]
    if None in link.readers:
        back = [((producer, on),)]
    return [
        Term({"ms": costs.float_ms[tensor]}, (((producer, off),),)),
        Term({"ms": costs.integer_ms[tensor]}, (((producer, on),),)),
        Term({"ms": costs.enter_ms[tensor]}, tuple(((producer, off), (r, on)) for r in readers)),
        Term({"ms": costs.leave_ms[tensor]}, tuple(back)),
    ]


# ---------------------------------------------------------------------------------------------- solving


def solve(
    problem: Problem, minimise: str, limits: Mapping[str, float] | None = None, *, seconds: float | None = None
) -> Assignment:
    """Return the assignment with the least `minimise` (a measure) within the limits (measure -> largest amount).

    BudgetError where none is within the limits, saying how far each could be brought down. After `seconds` the best
    found so far is returned (TimeoutError where there is none yet).
    """
    program = _Program(problem)
    choice = program.solve(minimise, limits or {}, seconds)
    if choice is None:
        raise BudgetError(_infeasible(program, limits or {}), where="mixed precision", fix="relax the budget")
    return Assignment(choice, problem.amounts(choice))


def frontier(
    problem: Problem,
    minimise: str = "error",
    bounded: str = "ms",
    *,
    points: int = 9,
    limits: Mapping[str, float] | None = None,
    deadline: float | None = None,
    progress: Progress = silent,
) -> list[Assignment]:
    """Return assignments from the least `bounded` to the least `minimise`, none better than another in both.

    The budgets lie evenly between the two ends; `limits` hold for all. `deadline` (on time.monotonic's clock) ends the
    search with what was found: at least the two ends.
    """
    limits = dict(limits or {})
    cheapest = solve(problem, bounded, limits)
    best = solve(problem, minimise, limits)
    best = solve(problem, bounded, limits | {minimise: best.predicted[minimise] * (1 + 1e-9)})
    low, high = cheapest.predicted[bounded], best.predicted[bounded]
    found = [best]
    for i, budget in enumerate(np.linspace(high, low, points)[1:]):
        last = i == points - 2
        if not last and deadline is not None and time.monotonic() > deadline:
            continue
        left = None if deadline is None else max(deadline - time.monotonic(), 1.0)
        found.append(solve(problem, minimise, limits | {bounded: float(budget) * (1 + 1e-9)}, seconds=left))
        progress("searching precisions", i + 2, points)
    return _undominated(found, minimise, bounded)


def _undominated(found: Iterable[Assignment], minimise: str, bounded: str) -> list[Assignment]:
    ordered = sorted(found, key=lambda a: (a.predicted[bounded], a.predicted[minimise]))
    kept: list[Assignment] = []
    for one in ordered:
        if not kept or one.predicted[minimise] < kept[-1].predicted[minimise]:
            kept.append(one)
    return kept


def refine(
    problem: Problem,
    minimise: str,
    bounded: str,
    limit: float,
    measured: Callable[[Assignment], float],
    *,
    limits: Mapping[str, float] | None = None,
    rounds: int = 6,
    tolerance: float = 0.02,
    deadline: float | None = None,
) -> tuple[Assignment | None, list[tuple[Assignment, float]]]:
    """Return the assignment with the least predicted `minimise` whose *measured* `bounded` is within `limit`.

    Predictions err, so the budget given to the solver is found by bisection, each step verified by `measured` (the
    caller builds the model and measures it). Ends when the measured value comes within `tolerance` under the limit,
    after `rounds`, or at `deadline`. The second result is all that was measured; the first is None if nothing held.
    """
    low, high, budget = 0.0, math.inf, limit
    tried: dict[tuple[tuple[str, str], ...], tuple[Assignment, float]] = {}
    for _ in range(rounds):
        value = _measured(problem, minimise, {**(limits or {}), bounded: budget}, measured, tried)
        low, high = (budget, high) if value is None or value <= limit else (low, budget)
        if value is not None and limit * (1 - tolerance) <= value <= limit:
            break
        if deadline is not None and time.monotonic() > deadline:
            break
        budget = (low + high) / 2 if high < math.inf else low * (limit / value if value else 2.0)
    held = [(one, value) for one, value in tried.values() if value <= limit]
    best = min(held, key=lambda pair: pair[0].predicted[minimise])[0] if held else None
    return best, list(tried.values())


def _measured(
    problem: Problem,
    minimise: str,
    limits: Mapping[str, float],
    measured: Callable[[Assignment], float],
    tried: dict[tuple[tuple[str, str], ...], tuple[Assignment, float]],
) -> float | None:
    """Solve, measure what was not measured before, and return that; None where nothing is within the limits."""
    try:
        one = solve(problem, minimise, limits)
    except BudgetError:
        return None
    key = tuple(sorted(one.precision.items()))
    if key not in tried:
        tried[key] = one, measured(one)
    return tried[key][1]


def _infeasible(program: _Program, limits: Mapping[str, float]) -> str:
    said = []
    for measure, limit in limits.items():
        choice = program.solve(measure, {}, None)
        least = math.inf if choice is None else program.problem.amounts(choice).get(measure, 0.0)
        said.append(f"{measure} at most {limit:.4g} (by itself it can be {least:.4g})")
    return f"no choice of precisions has {' and '.join(said)}"


class _Program:
    """The matrices of one problem; columns are x[u,k], then z[t]."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.columns = {pair: i for i, pair in enumerate((u, k) for u, ks in problem.choices.items() for k in ks)}
        self.count = len(self.columns) + len(problem.terms)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        for unit, precisions in problem.choices.items():
            self.rows.append(({self.columns[unit, k]: 1.0 for k in precisions}, 1.0, 1.0))
        for t, term in enumerate(problem.terms):
            z = len(self.columns) + t
            for case in term.cases or ((),):
                row = {z: -1.0}
                for literal in case:
                    self._add(row, literal, 1.0)
                self.rows.append((row, -math.inf, len(case) - 1.0))
        for need in problem.needs:
            row = {}
            self._add(row, (need.unit, need.precisions), 1.0)
            for literal in need.any_of:
                self._add(row, literal, -1.0)
            self.rows.append((row, -math.inf, 0.0))

    def _add(self, row: dict[int, float], literal: Literal, sign: float) -> None:
        unit, precisions = literal
        for k in self.problem.choices[unit]:
            if k in precisions:
                column = self.columns[unit, k]
                row[column] = row.get(column, 0.0) + sign

    def solve(self, minimise: str, limits: Mapping[str, float], seconds: float | None) -> dict[str, str] | None:
        """Return unit -> precision, or None where no choice is within the limits."""
        rows = list(self.rows)
        for measure, limit in limits.items():
            amounts = self._amounts(measure)
            scale = max(amounts.max(initial=0.0), 1e-300)
            rows.append(({int(i): amounts[i] / scale for i in np.flatnonzero(amounts)}, -math.inf, limit / scale))
        objective = self._amounts(minimise)
        options: dict[str, float] = {"mip_rel_gap": 1e-6}
        if seconds is not None:
            options["time_limit"] = seconds
        integral = np.arange(self.count) < len(self.columns)
        result = milp(
            objective / max(objective.max(initial=0.0), 1e-300),
            constraints=_constraint(rows, self.count),
            integrality=integral.astype(np.uint8),
            bounds=Bounds(0.0, 1.0),
            options=options,
        )
        if result.x is None:
            if result.status == 1:
                raise TimeoutError(f"no choice of precisions was found in {seconds:g} s")
            return None
        chosen = {}
        for unit, precisions in self.problem.choices.items():
            shares = {precision: result.x[self.columns[unit, precision]] for precision in precisions}
            chosen[unit] = max(precisions, key=shares.__getitem__)
        return chosen

    def _amounts(self, measure: str) -> np.ndarray:
        terms = [term.amounts.get(measure, 0.0) for term in self.problem.terms]
        return np.concatenate([np.zeros(len(self.columns)), np.array(terms, dtype=np.float64)])


def _constraint(rows: Sequence[tuple[dict[int, float], float, float]], count: int) -> LinearConstraint:
    entries = [(r, c, v) for r, (row, _, _) in enumerate(rows) for c, v in row.items()]
    r, c, v = (np.array(part) for part in zip(*entries, strict=True))
    return LinearConstraint(
        csr_array((v, (r, c)), shape=(len(rows), count)), [row[1] for row in rows], [row[2] for row in rows]
    )
