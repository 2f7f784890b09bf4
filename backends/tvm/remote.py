"""What runs on a board behind TVM's RPC: sessions on it, modules, and their latencies by its own clock.

A session is a process that the board's server starts for us, and nobody else has the board as long as it lives: so it
is held for one task and given back. The server ends it when its time is up, whatever it does then. A call that does not
come back is given up here, since a board may also vanish without hanging up.

    lost    the session broke, or its time was up: another is borrowed, a few times in all
    failed  the board said what is wrong: the session goes on
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...compiler.errors import ModelError, UnavailableError
from ...compiler.types import Measurement, Progress
from ..targets import timing
from ..targets.tracker import Lent, knock
from .runner import Facts, one_by_one

if TYPE_CHECKING:
    from ..targets.rpc import RpcTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often a board may be lost in one compile.
_LOSSES = 3
#: Seconds that a session lives: to run a module once, and to measure some.
_RUN, _MEASURE = 120, 1800
#: Seconds that a call is waited for after its session's end, and that a session may take to begin.
_GRACE, _BEGIN = 5.0, 20.0


class Lost(Exception):
    """A session is gone."""


class Session:
    """A board, borrowed for a while."""

    def __init__(self, lent: Lent, seconds: int) -> None:
        """Connect to the board's server. Lost where it cannot be reached."""
        from tvm import rpc

        self._ends = time.monotonic() + seconds + _GRACE
        self._uploads = 0
        try:
            knock(lent)
            connect = functools.partial(rpc.connect, lent.host, lent.port, lent.word, session_timeout=seconds)
            self.remote: Any = _within(_BEGIN, connect)
        except (OSError, RuntimeError) as error:
            raise Lost(_unreachable(lent, error)) from error

    def call(self, work: Callable[[], T]) -> T:
        """Return what a call of the board returns. Lost where the session is gone, else the error that it raised."""
        try:
            return _within(max(self._ends - time.monotonic(), 0.0), work)
        except TimeoutError as error:
            raise Lost("it does not answer") from error
        except Exception as error:  # TVM raises what it likes
            if self.alive():
                raise
            logger.info("a session ended: %s", _first_line(error))
            late = "SessionTimeout" in str(error)
            raise Lost("it took longer than a session may" if late else "its server hung up") from error

    def alive(self) -> bool:
        """Say whether the board answers."""
        left = min(self._ends - time.monotonic(), _BEGIN)
        try:
            _within(max(left, 0.0), lambda: self.remote.get_function("runtime.NumThreads")())
        except Exception:  # whatever it is, it does not
            return False
        return True

    def use(self, threads: int) -> int:
        """Let what runs here have so many threads (0: as many as the board takes by itself); return how many."""
        if threads:
            self.call(lambda: self.remote.get_function("runtime.config_threadpool")(1, threads))
        return int(self.call(lambda: self.remote.get_function("runtime.NumThreads")()))

    def triple(self) -> str:
        """Return what the board's LLVM calls its kind of machine; "" where its runtime has no LLVM."""
        try:
            return str(self.call(lambda: self.remote.get_function("target.llvm_get_system_triple")()))
        except Lost:
            raise
        except Exception:  # a runtime alone does not know it
            return ""

    def load(self, library: Path) -> Any:
        """Send a library and return it as a module of the board's; an archive of objects is linked there."""
        self._uploads += 1
        name = f"{self._uploads}-{library.name}"

        def loaded() -> Any:
            self.remote.upload(str(library), name)
            return self.remote.load_module(name)

        return self.call(loaded)

    def close(self) -> None:
        """Give the board back, whatever still refers to the session."""
        with suppress(Exception):
            _within(_GRACE, lambda: self.remote.get_function("CloseRPCConnection")())


class Board:
    """Whichever board of a target's key is free. It may be lost a few times (`lost`), and then no more is tried."""

    def __init__(self, target: RpcTarget) -> None:
        """Take a target; nothing is borrowed yet."""
        self.url = target.url
        self._target, self._losses = target, 0

    def borrowed(self, seconds: int) -> Session:
        """Wait for a free board. UnavailableError where there is none, or those that there are cannot be reached."""
        while True:
            lent = self._target.tracker.borrow(self._target.key, self._target.progress)
            try:
                return Session(lent, seconds)
            except Lost as error:
                self.lost(error)

    def begin(self, seconds: int, prepare: Callable[[Session], object]) -> Session:
        """Borrow a board and prepare it, another where it is lost meanwhile. Errors as of `use`."""
        while True:
            session = self.borrowed(seconds)
            try:
                prepare(session)
            except Lost as error:
                session.close()
                self.lost(error)
            except BaseException:
                session.close()
                raise
            else:
                return session

    def use(self, seconds: int, work: Callable[[Session], T]) -> T:
        """Return what is done in one session, done anew where it is lost. UnavailableError after some losses."""
        while True:
            session = self.borrowed(seconds)
            try:
                return work(session)
            except Lost as error:
                self.lost(error)
            finally:
                session.close()

    def lost(self, error: Lost) -> None:
        """Count a loss. UnavailableError where it is one too many."""
        self._losses += 1
        logger.info("%s: a board was lost: %s", self.url, error)
        if self._losses > _LOSSES:
            raise UnavailableError(
                f"the board was lost {self._losses} times while it was in use; the last time: {error}",
                where=self.url,
                fix="see what its server printed and start it again; what was measured so far is kept",
            ) from error


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
                f"the board cannot load {self._library.name}: {_first_line(error)}",
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


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Return what a call returns. TimeoutError after so many seconds: it is left alone then, in a thread of its own."""
    found: list[T] = []
    failed: list[BaseException] = []

    def go() -> None:
        try:
            found.append(work())
        except BaseException as error:  # raised again where it was called
            failed.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return found[0]


def _unreachable(lent: Lent, error: Exception) -> str:
    where = f"its server at {lent.host}:{lent.port} cannot be reached from here ({_first_line(error)})"
    if lent.host in ("127.0.0.1", "localhost", "::1"):
        return f"{where}; on another machine, start it with --custom-addr ADDRESS"
    return where


def _first_line(error: Exception) -> str:
    """Return what an error says first, without the line in front of what a board raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "from RPC call" not in line]
    return lines[0] if lines else type(error).__name__
