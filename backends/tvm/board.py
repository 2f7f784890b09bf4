"""Boards behind TVM's RPC, borrowed and given back.

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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...compiler.errors import UnavailableError
from ..targets.tracker import Lent, hang_up, knock

if TYPE_CHECKING:
    from ..targets.rpc import RpcTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often a board may be lost in one compile.
_LOSSES = 3
#: Seconds that a call may take within its session, whose end is waited for a little longer; a session's beginning.
_CALL, _GRACE, _BEGIN = 120.0, 5.0, 20.0
#: Seconds that a library may take on its way, and to be linked.
_SEND = 600.0


class Lost(Exception):
    """A session is gone."""


class Session:
    """A board, borrowed for a while."""

    def __init__(self, lent: Lent, seconds: int) -> None:
        """Connect to the board's server. Lost where it cannot be reached."""
        self._ends = time.monotonic() + seconds + _GRACE
        self._lent, self._uploads = lent, 0
        try:
            knock(lent)
            from tvm import rpc

            connect = functools.partial(rpc.connect, lent.host, lent.port, lent.word, session_timeout=seconds)
            self.remote: Any = _within(_BEGIN, connect)
        except (OSError, RuntimeError) as error:
            raise Lost(_unreachable(lent, error)) from error

    def call(self, work: Callable[[], T], seconds: float = _CALL) -> T:
        """Return what a call of the board returns. Lost where the session is gone, else the error that it raised."""
        try:
            return _within(max(min(self._ends - time.monotonic(), seconds), 0.0), work)
        except TimeoutError as error:
            hang_up(self._lent)
            raise Lost("it does not answer") from error
        except KeyboardInterrupt:
            hang_up(self._lent)
            raise
        except Exception as error:  # TVM raises what it likes
            if self.alive():
                raise
            logger.info("a session ended: %s", first_line(error))
            late = "SessionTimeout" in str(error)
            raise Lost("it took longer than a session may" if late else "its server hung up") from error

    def alive(self) -> bool:
        """Say whether the board answers."""
        left = min(self._ends - time.monotonic(), _BEGIN)
        try:
            _within(max(left, 0.0), lambda: self.remote.get_function("runtime.NumThreads")())
        except TimeoutError:
            hang_up(self._lent)
            return False
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

        return self.call(loaded, _SEND)

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
                f"a board was lost, or out of reach, {self._losses} times; the last time: {error}",
                where=self.url,
                fix="see what its server printed and start it again; what was measured so far is kept",
            ) from error


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
    where = f"its server at {lent.host}:{lent.port} cannot be reached from here ({first_line(error)})"
    if lent.host in ("127.0.0.1", "localhost", "::1"):
        return f"{where}; on another machine, start it with --custom-addr ADDRESS"
    return where


def first_line(error: Exception) -> str:
    """Return what an error says first, without the line in front of what a board raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "from RPC call" not in line]
    return lines[0] if lines else type(error).__name__
