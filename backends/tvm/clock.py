"""Times schedules where they will run: in this process, or on a board over RPC."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import tvm

from ...compiler.errors import UnavailableError
from .board import Board, Lost, Session
from .exporting import exported
from .threads import use

logger = logging.getLogger(__name__)

#: Seconds after which a board is given back, so that others have their turn, and those that one session may live: a
#: schedule that takes longer is ended with it.
_LEASE, _SESSION = 10.0, 60


class Fatal(Exception):
    """A function took down, or blocked, what it ran on."""


class Clock(Protocol):
    """Builds functions and times them on the target."""

    def seconds(self, body: Any, repeats: int = 5) -> float | None:
        """Return the seconds that one call of a PrimFunc takes; None where it cannot be built or run, else Fatal."""


class Here:
    """Times in this process, on as many threads as the target says."""

    def __init__(self, target: Any, threads: int) -> None:
        """Take a TVM target of kind llvm for this machine."""
        self._target = target
        use(threads)

    def seconds(self, body: Any, repeats: int = 5) -> float | None:
        """Return the fastest of some repeats, of a millisecond each: what else runs here only adds time."""
        try:
            module = tvm.compile(body.with_attr("global_symbol", "main"), target=self._target)
            given = [tvm.runtime.tensor(array) for array in filled(body)]
            timer = module.mod.time_evaluator("main", tvm.cpu(), number=1, repeat=repeats, min_repeat_ms=1)
            return float(min(timer(*given).results))
        except Exception as error:  # TVM raises what it likes
            logger.debug("a schedule failed: %s", str(error).splitlines()[:1])
            return None


class There:
    """Times on a board. To be used as a context, which gives the board back."""

    def __init__(self, target: Any, threads: int, board: Board) -> None:
        """Take a TVM target of kind llvm for the board's processor; nothing is borrowed yet."""
        self._target, self._threads, self._board = target, threads, board
        self._triple = str(target.attrs["mtriple"])
        self._folder = TemporaryDirectory()
        self._session: Session | None = None
        self._since = 0.0

    def __enter__(self) -> There:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the board back."""
        self._return()
        self._folder.cleanup()

    def seconds(self, body: Any, repeats: int = 5) -> float | None:
        """Return the fastest of some repeats, as Here does. UnavailableError where no board is left to run on.

        A function that the board is lost with is Fatal, unless the board is lost so often that it says so itself.
        """
        library = self._built(body)
        if library is None:
            return None
        session = self._borrowed()

        def timed() -> float:
            device = session.remote.cpu()
            given = [tvm.runtime.tensor(array, device) for array in filled(body)]
            timer = module.time_evaluator("main", device, number=1, repeat=repeats, min_repeat_ms=1)
            return float(min(timer(*given).results))

        try:
            module = session.load(library)
            return session.call(timed)
        except Lost as error:
            self._return()
            self._board.lost(error)
            raise Fatal(str(error)) from error
        except Exception as error:  # TVM raises what it likes
            logger.debug("a schedule failed on the board: %s", str(error).splitlines()[:1])
            return None

    def _built(self, body: Any) -> Path | None:
        try:
            module = tvm.compile(body.with_attr("global_symbol", "main"), target=self._target)
            return exported(module, Path(self._folder.name) / "schedule", self._triple)
        except Exception as error:  # TVM raises what it likes
            logger.debug("a schedule failed: %s", str(error).splitlines()[:1])
            return None

    def _borrowed(self) -> Session:
        """Return a session that lives: the last one, unless others shall have their turn."""
        if self._session is not None and (time.monotonic() - self._since > _LEASE or not self._session.alive()):
            self._return()
        if self._session is None:
            self._session = self._board.begin(_SESSION, self._started)
            self._since = time.monotonic()
        return self._session

    def _started(self, session: Session) -> None:
        """Set the threads of a new session. UnavailableError where its board is another kind of machine."""
        session.use(self._threads)
        triple = session.triple()
        mine, its = self._triple.partition("-")[0], triple.partition("-")[0]
        if its and its != mine:
            raise UnavailableError(
                f"the board has an {its} processor, and the device an {mine} one",
                where=self._board.url,
                fix="name the board's own device by --device, or another key",
            )

    def _return(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def filled(body: Any) -> list[np.ndarray]:
    """Return random numbers for a function's parameters: zeros may take another time."""
    rng = np.random.default_rng(0)
    found = []
    for parameter in body.params:
        buffer = parameter.ty if hasattr(parameter, "ty") else parameter
        shape, dtype = [int(i) for i in buffer.shape], str(buffer.dtype)
        numbers = rng.random(shape) if "float" in dtype else rng.integers(0, 2 if dtype == "bool" else 100, shape)
        found.append(numbers.astype(dtype))
    return found
