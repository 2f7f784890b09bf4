"""Schedules found by trying: each function's choices, timed on the target, as long as time is left or something may be
won.

The turn goes to the function where most time may be lost: calls times its best time, less with every round that found
nothing. A round tries what was best for similar functions, then the space's first guesses, then the best's neighbours:
choices that differ from it in the fewest numbers. A choice replaces the best only if it wins a second time, side by
side. What is found is kept at once (records.py), so Ctrl-C, or the end of the time, costs what was not tried and
nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...compiler.types import Progress, silent
from .clock import Clock, Fatal
from .network import Function, Network, with_schedule
from .records import Record, Records
from .spaces import SEED, Choice

logger = logging.getLogger(__name__)

#: Choices that are timed in a round; in a function's first one so many guesses.
_ROUND = 6
#: What a round without a gain takes off a function's turn, and when a turn is no longer worth it: a share of the whole.
_PATIENCE, _WORTH = 0.5, 0.005
#: Rounds after which a function of an earlier compile is taken as it is.
_ENOUGH = 2
#: A choice is better if it takes less than this share of the best.
_BETTER = 0.985


@dataclass
class Task:
    """One function under way: its best record, what was tried of it, and the weight of its turn."""

    function: Function
    best: Record | None = None
    tried: set[tuple[tuple[str, int], ...]] = field(default_factory=set)
    rounds: int = 0
    hope: float = 1.0
    known: bool = False

    @property
    def seconds(self) -> float:
        """What the function takes of the network's time, as far as it is known."""
        return 0.0 if self.best is None else self.function.calls * self.best.seconds


@dataclass
class Tuned:
    """What tuning came to: a choice for each function by name, its seconds, and how many schedules were timed."""

    tasks: list[Task]
    trials: int = 0
    failed: int = 0
    interrupted: bool = False

    @property
    def choices(self) -> dict[str, Choice]:
        """The best choice that is known of each function; where all that were tried failed, one that was not."""
        found = {t.function.name: t.best.choice for t in self.tasks if t.best is not None}
        for task in self.tasks:
            space = task.function.space
            if task.best is None and task.tried and space is not None:
                untried = [choice for choice in space.choices() if _key(choice) not in task.tried]
                if untried:
                    found[task.function.name] = untried[0]
        return found


def tune(
    network: Network, records: Records, clock: Clock | None, seconds: float, *, progress: Progress = silent
) -> Tuned:
    """Look for schedules for at most so many seconds; with 0, or without a clock, only records of before are used."""
    tasks = []
    for function in network.functions:
        if function.space is not None:
            record = records.get(function)
            shunned = {_key(choice) for choice in records.shunned(function)}
            tasks.append(Task(function, record, shunned, known=record is not None and record.rounds >= _ENOUGH))
    found = Tuned(tasks)
    if clock is None:
        return found
    start = time.monotonic()
    try:
        while time.monotonic() - start < seconds:
            task = _next(tasks)
            if task is None:
                break
            _round(task, found, records, clock, start + seconds)
            progress(f"tuning: {_so_far(tasks)}", int(time.monotonic() - start), int(seconds))
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _so_far(tasks: list[Task]) -> str:
    """Return the time of a call so far, the sum over the functions; how many are begun, while not all are."""
    begun = sum(t.best is not None or t.rounds > 0 for t in tasks)
    if begun < len(tasks):
        return f"{begun} of {len(tasks)} begun"
    return f"{1e3 * sum(t.seconds for t in tasks):.3g} ms so far"


def _next(tasks: list[Task]) -> Task | None:
    """Return the function whose turn it is: those that were never tried first; None where nothing is worth a try."""
    fresh = [t for t in tasks if t.best is None and not t.rounds]
    if fresh:
        return max(fresh, key=lambda t: t.function.calls)
    whole = sum(t.seconds for t in tasks)
    worth = [t for t in tasks if not t.known and t.best is not None and t.seconds * t.hope > _WORTH * whole]
    return max(worth, key=lambda t: t.seconds * t.hope, default=None)


def _round(task: Task, found: Tuned, records: Records, clock: Clock, deadline: float) -> None:
    before = task.best
    for choice in _candidates(task, records):
        if time.monotonic() > deadline and task.best is not None:
            break
        task.tried.add(_key(choice))
        seconds = _seconds(task, choice, records, clock)
        if seconds is None:
            found.failed += 1
            continue
        found.trials += 1
        better = task.best is None or seconds < _BETTER * task.best.seconds
        if better and (task.best is None or _again(task, choice, seconds, records, clock)):
            task.best = Record(choice, seconds)
    task.rounds += 1
    gained = task.best is not None and (before is None or task.best.choice != before.choice)
    task.hope = 1.0 if gained else task.hope * _PATIENCE
    if task.best is not None:
        records.put(task.function, replace(task.best, rounds=task.rounds))


def _seconds(task: Task, choice: Choice, records: Records, clock: Clock) -> float | None:
    """Return what a choice takes; None where it fails. What takes its machine down is not tried again, ever."""
    body = with_schedule(task.function, choice)
    try:
        return None if body is None else clock.seconds(body, safe=SEED not in choice)
    except Fatal as error:
        logger.info("%s, %s: %s", task.function.name, dict(choice), error)
        records.shun(task.function, choice)
        return None


def _again(task: Task, choice: Choice, seconds: float, records: Records, clock: Clock) -> bool:
    """Say whether a choice wins beside the best once more."""
    assert task.best is not None
    best = _seconds(task, task.best.choice, records, clock)
    again = _seconds(task, choice, records, clock)
    if best is None or again is None:
        return False
    task.best = Record(task.best.choice, min(best, task.best.seconds))
    return min(again, seconds) < task.best.seconds


def _candidates(task: Task, records: Records) -> Iterator[Choice]:
    """Yield the next choices to try, at most a round of them."""
    space = task.function.space
    assert space is not None
    choices = space.choices()
    known = {_key(c): c for c in choices}
    if not task.rounds:
        ahead = [known[_key(c)] for c in records.alike(task.function)[:2] if _key(c) in known]
        ordered = [*ahead, *choices]
    elif task.best is not None:
        best = task.best.choice
        ordered = sorted(choices, key=lambda c: sum(c[name] != best.get(name) for name in c))
    else:
        ordered = choices
    fresh = list({_key(c): c for c in ordered if _key(c) not in task.tried}.values())
    yield from fresh[:_ROUND]


def _key(choice: Choice) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(choice.items()))
