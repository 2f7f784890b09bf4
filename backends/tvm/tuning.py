"""Schedules for a network's functions, found by trying: MetaSchedule's spaces, our own loop, in this process.

A task is a fused function and how often the network calls it. Each round draws some schedules at random from the space
of one task, builds and times them, and goes to the task where most time may be lost: calls times the best time, less
with every round that found nothing. What was found is kept in a database under the target and the versions, keyed by
the function itself but for its constants, so that a second compile, or the same layer of another model, starts there.

MetaSchedule's own builder starts a process a candidate, seconds each; here one takes a tenth of a second. What a
candidate cannot compile or run is skipped. Ctrl-C ends the tuning and keeps what was found.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from ...compiler.types import Progress, silent
from .module import Imported

logger = logging.getLogger(__name__)

#: Schedules that are drawn, built and timed in a round; in a task's first one, so that each has its turn soon.
_ROUND, _FIRST = 12, 4
#: What a round without a gain takes off a task's turn.
_PATIENCE = 0.8


@dataclass
class Task:
    """One fused function: how often it is called, its best time in seconds, rounds so far, and its turn's weight."""

    name: str
    function: Any
    calls: int
    best: float = float("inf")
    rounds: int = 0
    hope: float = 1.0

    @property
    def turn(self) -> float:
        """What may be lost here, in seconds; tasks that were never tried come first."""
        return float("inf") if not self.rounds else self.calls * self.best * self.hope


@dataclass
class Tuned:
    """What tuning came to: the records (a MetaSchedule database), the tasks, and how many schedules were timed."""

    records: Any
    tasks: list[Task] = field(default_factory=list)
    trials: int = 0
    failed: int = 0
    interrupted: bool = False


def records_of(target: Any, folder: Path | None = None) -> Any:
    """Return the database of this target and these versions, on disk."""
    import tvm
    from tvm.s_tir import meta_schedule as ms

    key = hashlib.sha256(f"{target.export()} {tvm.__version__}".encode()).hexdigest()[:16]
    place = (folder or Path(platformdirs.user_cache_dir("edgec")) / "tvm") / key
    place.mkdir(parents=True, exist_ok=True)
    return ms.database.JSONDatabase(work_dir=str(place), module_equality="ignore-tensor")


def tune(
    network: Imported, seconds: float, *, seed: int = 0, progress: Progress = silent, folder: Path | None = None
) -> Tuned:
    """Look for schedules for so many seconds; with 0, only records of before are used."""
    from tvm.s_tir import meta_schedule as ms

    found = Tuned(records_of(network.target, folder))
    for one in ms.relax_integration.extract_tasks(network.module, network.target, module_equality="ignore-tensor"):
        task = Task(one.task_name, one.dispatched[0], int(one.weight))
        known = found.records.query_tuning_record(task.function, network.target, task.name)
        if known is not None:
            task.best, task.rounds = float(np.median([float(s) for s in known.run_secs])), 1
        found.tasks.append(task)
    start = time.monotonic()
    try:
        while found.tasks and time.monotonic() - start < seconds:
            task = max(found.tasks, key=lambda t: t.turn)
            _round(network.target, task, found, start + seconds, seed + found.trials + found.failed)
            total = 1e3 * sum(t.calls * t.best for t in found.tasks if t.best < float("inf"))
            progress(f"tuning, {total:.3g} ms so far", int(time.monotonic() - start), int(seconds))
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def _round(target: Any, task: Task, found: Tuned, deadline: float, seed: int) -> None:
    from tvm.s_tir import meta_schedule as ms

    context = ms.TuneContext(
        mod=task.function, target=target, space_generator="post-order-apply", search_strategy="replay-trace",
        task_name=task.name, num_threads=1, rand_state=seed + 1,
    )  # fmt: skip
    scratch = ms.database.MemoryDatabase()
    count = _ROUND if task.rounds else _FIRST
    context.pre_tuning(count, count, database=scratch, cost_model=ms.CostModel.create("random"))
    workload, before = found.records.commit_workload(task.function), task.best
    for candidate in context.generate_measure_candidates() or []:
        if time.monotonic() > deadline:
            break
        seconds = _timed(candidate, target)
        if seconds is None:
            found.failed += 1
            continue
        found.trials += 1
        if seconds < task.best:
            task.best = seconds
            record = ms.database.TuningRecord(candidate.sch.trace, workload, [seconds], target, candidate.args_info)
            found.records.commit_tuning_record(record)
    task.rounds += 1
    task.hope = 1.0 if task.best < 0.98 * before else task.hope * _PATIENCE


def _timed(candidate: Any, target: Any) -> float | None:
    """Return the seconds of a schedule; None where it cannot be built or run."""
    import tvm

    try:
        module = tvm.compile(candidate.sch.mod, target=target)
        given = [_filled(p) for p in candidate.sch.mod["main"].params]
        timer = module.mod.time_evaluator("main", tvm.cpu(), number=1, repeat=3, min_repeat_ms=1)
        return float(timer(*given).median)
    except Exception as error:  # TVM raises what it likes
        logger.debug("a schedule failed: %s", str(error).splitlines()[:1])
        return None


def _filled(parameter: Any) -> Any:
    """Return random numbers of a parameter's shape and type: zeros may take another time."""
    import tvm

    kind = parameter.ty if hasattr(parameter, "ty") else parameter
    shape, dtype = [int(i) for i in kind.shape], str(kind.dtype)
    return tvm.runtime.tensor(np.random.default_rng(0).random(shape).astype(dtype))
