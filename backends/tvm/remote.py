"""Modules that run on boards, and their latencies by a board's own clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.errors import ModelError, UnavailableError
from ...compiler.types import Measurement, Progress
from ..targets import timing
from .board import Board, Lost, Session, first_line
from .runner import Facts, one_by_one

#: Seconds that a session lives: to run a module once, and to measure some.
_RUN, _MEASURE = 120, 1800


class Remote:
    """A Runner over a module on a board, which is borrowed for each run."""

    def __init__(self, library: Path, board: Board, threads: int) -> None:
        """Take a library with what is said beside it. ModelError where that is damaged."""
        try:
            self.facts = Facts.of(library)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError("what is said beside it is damaged", where=str(library), fix="compile again") from error
        self.inputs, self.outputs, self.provider = self.facts.inputs, self.facts.outputs, self.facts.provider
        self._library, self._board, self._threads = library, board, threads

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once, or once for each image. UnavailableError where no board does it."""

        def ran(session: Session) -> dict[str, np.ndarray]:
            session.use(self._threads)
            module = self.on(session)
            return one_by_one(self.facts, feed, module.run)

        return self._board.use(_RUN, ran)

    def on(self, session: Session) -> Module:
        """Load it in a session. UnavailableError where the board says that it cannot."""
        try:
            return Module(session, session.load(self._library), self.facts)
        except Lost:
            raise
        except Exception as error:  # TVM raises what it likes
            raise UnavailableError(
                f"the board cannot load {self._library.name}: {first_line(error)}",
                where=self._board.url,
                fix="name the board's own device by --device; to link a .tar, it needs gcc",
            ) from error


class Module:
    """A module that a session has loaded."""

    def __init__(self, session: Session, library: Any, facts: Facts) -> None:
        """Make a virtual machine of a remote library."""
        from tvm import relax

        self._session, self._outputs = session, facts.outputs
        self._device = session.remote.device(facts.device)
        devices = [self._device] if facts.device == "cpu" else [self._device, session.remote.cpu()]
        self._machine: Any = session.call(lambda: relax.VirtualMachine(library, devices))

    def run(self, given: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on inputs in their order."""

        def ran() -> list[np.ndarray]:
            self._feed(given)
            self._machine.invoke_stateful("main")
            found = self._machine.get_outputs("main")
            return [one.numpy() for one in ([found] if hasattr(found, "numpy") else found)]

        return dict(zip(self._outputs, self._session.call(ran), strict=True))

    def watch(self, given: list[np.ndarray]) -> Callable[[], float]:
        """Return a stop-watch of the board's (timing.in_turn) on these inputs."""

        def made() -> Any:
            self._feed(given)
            return self._machine.time_evaluator("invoke_stateful", self._device, number=1, repeat=1)

        timer = self._session.call(made)  # it runs once untimed before each time that it is called
        return lambda: float(1e3 * self._session.call(lambda: timer("main")).results[0])

    def _feed(self, given: list[np.ndarray]) -> None:
        import tvm

        self._machine.set_input("main", *(tvm.runtime.tensor(array, self._device) for array in given))


def measured(
    board: Board,
    runners: Mapping[str, Remote],
    feed: Mapping[str, np.ndarray],
    *,
    baseline: str,
    threads: int,
    seconds: float,
    progress: Progress,
) -> dict[str, Measurement]:
    """Time modules in turn in one session, so on one board; all of it anew where the board is lost."""

    def samples(session: Session) -> tuple[dict[str, np.ndarray], int]:
        count = session.use(threads)
        watches = {name: runner.on(session).watch(_given(runner, feed)) for name, runner in runners.items()}
        return timing.in_turn(watches, watches, seconds=seconds, progress=progress), count

    found, count = board.use(_MEASURE, samples)
    return timing.summarise(
        found,
        baseline,
        target=board.url,
        threads=count,
        batch=next((a.shape[0] for a in feed.values() if a.ndim), 1),
        providers={name: runner.provider for name, runner in runners.items()},
    )


def _given(runner: Remote, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [np.ascontiguousarray(feed[spec.name], dtype=spec.dtype) for spec in runner.inputs]
