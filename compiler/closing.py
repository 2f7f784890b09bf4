"""What is tried once a measurement shows that a budget is missed: predictions err, and bisection closes the rest.

missed                              tried
--max-drop, by every candidate      the frontier down to its far end, however much stays in float there: the fastest
                                    point that holds, by bisection on the measured drop (more in float, less drop)
--max-latency, by the closest       smaller and larger limits to the program, by bisection on the measured latency
--max-size                          nothing here: files' sizes are known before anything is measured (mixing.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import guard, trials
from .candidates import Candidate, Lossy, compared, points
from .errors import BudgetError
from .mixed_precision import mixed, mixing, program
from .mixed_precision.mixing import Mix
from .mixed_precision.tradeoff import Point
from .mixed_precision.weighing import mixtures
from .types import Attempt, Fidelity, Measurement

if TYPE_CHECKING:
    from .job import Job

#: Points of the frontier that stepping back bisects, and steps of the bisection on latency.
_POINTS, _ROUNDS = 16, 4


@dataclass(frozen=True, eq=False)
class State:
    """All candidates so far, the float baseline first, with what was measured and judged of them.

    `base` is the name of the float candidate that the others were made from: another one where channels were cut.
    """

    candidates: tuple[Candidate, ...]
    measured: Mapping[str, Measurement]
    judged: Mapping[str, Fidelity]
    base: str = "fp32"

    def attempt(self, one: Candidate) -> Attempt:
        """Return one candidate's row of the report."""
        return trials.attempt(one, self.measured, self.judged, self.base)


def close(this: Job, found: Lossy, state: State, work: Path) -> State:
    """Return the state with more candidates where a budget is missed that these can hold; all measured together."""
    if found.quantizer is None:
        return state
    if _all_lose(this, state):
        more, judged = _step_back(this, found, state, work)
    elif found.mix is not None and _late(this, state):
        more, judged = _speed_up(this, found, found.mix, state, work)
    else:
        return state
    if not more:
        return state
    judged = {**state.judged, **judged}
    candidates = (*state.candidates, *compared(found.judge, more))
    least = min((c.name for c in more), key=lambda name: _drop(judged.get(name)))  # the best attempt, if none holds
    worth = [c for c in candidates if c in state.candidates or c.name == least or not _loses(this, judged.get(c.name))]
    return State(candidates, trials.measure(this, worth), judged, state.base)


# ------------------------------------------------------------------------------------------ quality


def _all_lose(this: Job, state: State) -> bool:
    """Step back only where it can help: the budget is missed, and matters, and integers are faster to begin with."""
    named = this.options.precision != "auto"
    if named and not this.options.budget.drop_stated:
        return False
    integers = [c for c in state.candidates if c.quantizer is not None]
    attempts = [state.attempt(c) for c in integers]
    if not attempts or not all(a.fidelity is not None and _loses(this, a.fidelity) for a in attempts):
        return False
    return named or any(guard.shown_faster(a) or a.measurement.median_ms is None for a in attempts)


def _loses(this: Job, found: Fidelity | None) -> bool:
    return _drop(found) > this.options.budget.max_drop


def _drop(found: Fidelity | None) -> float:
    return 0.0 if found is None or found.drop is None else found.drop


def _step_back(this: Job, found: Lossy, state: State, work: Path) -> tuple[list[Candidate], dict[str, Fidelity]]:
    """Return what the bisection built and judged on the way to the fastest point that holds the quality budget."""
    assert found.quantizer is not None
    mix = found.mix or mixing.weighed(this, found.quantizer, found.judge)
    if mix is None:
        return [], {}
    built: list[Candidate] = []
    judged: dict[str, Fidelity] = {}

    def holds(point: Point) -> bool:
        (one,) = points(this, mix, [point], work, [c.name for c in (*state.candidates, *built)])
        built.append(one)
        judged.update(trials.judge(this, [one]))
        return not _loses(this, judged[one.name])

    first(_far(this, mix), holds, lambda: this.seconds_left == 0)
    return built, judged


def _far(this: Job, mix: Mix) -> tuple[Point, ...]:
    """Return the frontier from the fastest to the closest; left to `auto`, what is faster than the float model."""
    limits = dict(mix.limits)
    if this.options.precision == "auto" and mix.tradeoff.timed:
        limits["ms"] = min(limits.get("ms", float("inf")), mix.tradeoff.float_ms / guard.MARGIN)
    try:
        found = mix.tradeoff.frontier(
            limits, least_integer=0.0, reach=None, points=_POINTS, deadline=this.deadline, progress=this.progress
        )
    except BudgetError:
        return ()
    return mixtures(mix.tradeoff, found)


def first(ordered: Sequence[Point], holds: Callable[[Point], bool], stop: Callable[[], bool]) -> Point | None:
    """Return the first point that holds, where all behind one that holds do, too; None where none does.

    Bisection: at most log2 of their number + 1 are tried. It ends early when `stop` says so.
    """
    low, high = 0, len(ordered)
    while low < high and not stop():
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ordered[middle]) else (middle + 1, high)
    return ordered[high] if high < len(ordered) else None


# ------------------------------------------------------------------------------------------ latency


def _late(this: Job, state: State) -> bool:
    """Say whether the closest mixture, predicted to hold the stated latency, is measured to miss it."""
    limit = this.options.budget.max_latency_ms
    told = [c for c in state.candidates if c.predicted is not None and c.predicted.speedup is not None]
    if limit is None or not told:
        return False
    closest = max(told, key=lambda c: c.predicted.db if c.predicted is not None else 0.0)
    ms = state.measured[closest.name].median_ms
    return ms is not None and ms > limit


def _speed_up(
    this: Job, found: Lossy, mix: Mix, state: State, work: Path
) -> tuple[list[Candidate], dict[str, Fidelity]]:
    """Return what the bisection built on the way to the least predicted error within the measured latency."""
    limit, float_ms = this.options.budget.max_latency_ms, state.measured[state.base].median_ms
    assert limit is not None and float_ms is not None
    built: list[Candidate] = []

    def measured(one: mixed.Assignment) -> float:
        names = [c.name for c in (*state.candidates, *built)]
        (candidate,) = points(this, mix, [mix.tradeoff.point(one)], work, names)
        built.append(candidate)
        speedup = trials.measure(this, [state.candidates[0], candidate], seconds=trials.BRIEF)[candidate.name].speedup
        return float_ms / (speedup or 1.0)  # paired with the baseline: steadier than milliseconds

    limits = {name: most for name, most in mix.limits.items() if name != "ms"}
    start = mix.tradeoff.ms_for(limit, float_ms)
    program.refine(
        mix.tradeoff.problem, "error", "ms", limit, measured, start=0.95 * start,
        limits=mix.tradeoff.bounds(limits), rounds=_ROUNDS, deadline=this.deadline,
    )  # fmt: skip
    return built, trials.judge(this, built)
