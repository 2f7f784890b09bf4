"""Times schedules where they will run: in this process, in a worker that may crash, or on a board over RPC."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import tvm

from ...compiler.errors import UnavailableError
from .board import Board, Lost, Session
from .exporting import exported
from .threads import use
from .worker import random

logger = logging.getLogger(__name__)

#: Seconds after which a board is given back, so that others have their turn, and those that one session may live: a
#: schedule that takes longer is ended with it.
_LEASE, _SESSION = 10.0, 60


#: Seconds after which a worker is taken to hang.
_PATIENCE = 30.0


class Fatal(Exception):
    """A function took down, or blocked, what it ran on."""


class Clock(Protocol):
    """Builds functions and times them on the target."""

    def seconds(self, body: Any, repeats: int = 5, *, safe: bool = True) -> float | None:
        """Return the seconds that one call of a PrimFunc takes; None where it cannot be built or run, else Fatal.

        `safe` says that its schedule is one of ours, and does not read or write beside its arrays.
        """


class Here:
    """Times on this machine, on so many threads: in this process what is safe, in a worker what is not. A context."""

    def __init__(self, target: Any, threads: int) -> None:
        """Take a TVM target of kind llvm for this machine."""
        self._target, self._worker = target, Worker(use(threads))

    def __enter__(self) -> Here:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker."""
        self._worker.end()

    def seconds(self, body: Any, repeats: int = 5, *, safe: bool = True) -> float | None:
        """Return the fastest of some repeats, of a millisecond each: what else runs here only adds time."""
        try:
            module = tvm.compile(body.with_attr("global_symbol", "main"), target=self._target)
            if not safe:
                return self._worker.seconds(module, kinds(body), repeats)
            given = [tvm.runtime.tensor(array) for array in filled(body)]
            timer = module.mod.time_evaluator("main", tvm.cpu(), number=1, repeat=repeats, min_repeat_ms=1)
            return float(min(timer(*given).results))
        except Fatal:
            raise
        except Exception as error:  # TVM raises what it likes
            logger.debug("a schedule failed: %s", str(error).splitlines()[:1])
            return None


class Worker:
    """A process of its own that runs what may crash (worker.py); begun when it is needed, and again after a crash."""

    def __init__(self, threads: int) -> None:
        """Begin nothing yet."""
        self._threads, self._process = threads, None  # type: int, subprocess.Popen[str] | None
        self._folder = TemporaryDirectory()

    def seconds(self, module: Any, given: Sequence[tuple[Sequence[int], str]], repeats: int) -> float | None:
        """Return the fastest of some repeats; None where the module says no. Fatal where the process ends, or hangs."""
        library = Path(self._folder.name) / "schedule.so"
        library.unlink(missing_ok=True)  # one that is loaded must not be written over
        module.export_library(str(library))
        process = self._process = self._process or self._begun()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"library": str(library), "given": given, "repeats": repeats}) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], _PATIENCE)
            answer = process.stdout.readline() if ready else ""
        except OSError:
            answer = ""
        if not answer:
            self._kill()
            raise Fatal("it took its process down" if process.returncode not in (None, -9) else "it does not end")
        found = json.loads(answer)
        if isinstance(found, str):
            logger.debug("a schedule failed in the worker: %s", found)
            return None
        return float(min(found))

    def end(self) -> None:
        """End the process."""
        self._kill()
        self._folder.cleanup()

    def _begun(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"{__package__}.worker", str(self._threads)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


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

    def seconds(self, body: Any, repeats: int = 5, *, safe: bool = True) -> float | None:
        """Return the fastest of some repeats, as Here does; sessions there are processes of their own anyhow.

        UnavailableError where no board is left to run on.

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


def kinds(body: Any) -> list[tuple[list[int], str]]:
    """Return shape and dtype of a function's parameters."""
    buffers = [p.ty if hasattr(p, "ty") else p for p in body.params]
    return [([int(i) for i in buffer.shape], str(buffer.dtype)) for buffer in buffers]


def filled(body: Any) -> list[np.ndarray]:
    """Return random numbers for a function's parameters."""
    return random(kinds(body))
