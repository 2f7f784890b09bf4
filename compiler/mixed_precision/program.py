"""The integer program behind mixed precision: one choice, the frontier of choices, and the bisection on measurements.

With binary x[u,k] (unit u has precision k), and one z[t] >= 0 for each term of mixed.py,

    sum over k of x[u,k] = 1                              every unit u
    z[t] >= sum over the case's literals - (their number - 1)          every case of t
    x[u,k] <= sum over the need's literals                every need of u, k one of its precisions
    sum over t of amount[t,m] z[t] <= limit[m]            every limited measure m
    minimise  sum over t of amount[t,m] z[t]              for one measure m

Amounts are never negative, so z needs no integrality: it is 1 where a case holds and 0 where none does. HiGHS solves it
(scipy.optimize.milp). The same form serves any number of precisions: it is the multiple-choice knapsack of e.g.
Hubara et al. 2021 ("Accurate Post Training Quantization with Small Calibration Sets"), plus boundaries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..errors import BudgetError
from ..types import Progress, silent
from .mixed import Assignment, Literal, Problem


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
    start: float | None = None,
    limits: Mapping[str, float] | None = None,
    rounds: int = 6,
    tolerance: float = 0.02,
    deadline: float | None = None,
) -> tuple[Assignment | None, list[tuple[Assignment, float]]]:
    """Return the assignment with the least predicted `minimise` whose *measured* `bounded` is within `limit`.

    Predictions err, so the budget given to the solver is found by bisection, each step verified by `measured` (the
    caller builds the model and measures it); the first budget is `start`, the limit itself where that is None. Ends
    when the measured value comes within `tolerance` under the limit, when more budget changes nothing or less is not to
    be had, after `rounds`, or at `deadline`. The second result is all that was measured; the first is None if nothing
    held.
    """
    try:
        least = solve(problem, bounded, limits).predicted[bounded] * (1 + 1e-9)
    except BudgetError:
        return None, []
    low, high, budget = least, math.inf, max(limit if start is None else start, least)
    tried: dict[tuple[tuple[str, str], ...], tuple[Assignment, float]] = {}
    for _ in range(rounds):
        before = len(tried)
        value = _measured(problem, minimise, {**(limits or {}), bounded: budget}, measured, tried)
        low, high = (budget, high) if value <= limit else (low, budget)
        done = limit * (1 - tolerance) <= value <= limit or high <= least  # or nothing takes less
        stuck = high == math.inf and 0 < before == len(tried)  # what more could be had is had
        if done or stuck or (deadline is not None and time.monotonic() > deadline):
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
) -> float:
    """Solve, measure what was not measured before, and return that."""
    one = solve(problem, minimise, limits)
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
