"""Boards behind a TVM tracker as the target: rpc://HOST:PORT/KEY, KEY being what the boards' servers are started with.

Modules are built here and sent over; the tracker queues those who ask for a board. backends/tvm has the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ...compiler.errors import UserError
from ...compiler.types import Artifact, Measurement, Progress, silent
from .tracker import Tracker

if TYPE_CHECKING:
    import numpy as np

    from ..base import Backend, Runner
    from ..tvm.board import Board

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_NAMES = {"ort": "ONNX Runtime", "tensorrt": "TensorRT"}
_LIKE = "write it like rpc://192.168.1.20:9190/pi: the tracker's address and port, and the key of the boards' servers"


def parsed(url: str) -> tuple[Tracker, str | None]:
    """Return the tracker of rpc://HOST:PORT/KEY and the key, None where there is none. UserError for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"not understood: {error}", where=f"--target {url}", fix=_LIKE) from error
    key = parts.path.strip("/") or None
    problem = None
    if parts.scheme != "rpc" or not url.startswith("rpc://") or not host or port is None:
        problem = "host or port is missing" if url.startswith("rpc://") else "not an rpc:// URL"
    elif parts.username is not None or parts.query or parts.fragment:
        problem = "there is more in it than host, port and key"
    elif key is not None and not _KEY.fullmatch(key):
        problem = f"{key!r} is no key: letters, digits, and _ . + - between them"
    if problem is not None or host is None or port is None:
        raise UserError(str(problem), where=f"--target {url}", fix=_LIKE)
    return Tracker(host, port), key


class RpcTarget:
    """Runs and times TVM modules on whichever board of a key is free."""

    is_here = False

    def __init__(self, tracker: Tracker, key: str, progress: Progress = silent) -> None:
        """Take a tracker and a key; nothing is connected yet. `progress` is told how long a board is waited for."""
        self.tracker, self.key, self.progress = tracker, key, progress

    @classmethod
    def of(cls, url: str, progress: Progress = silent) -> RpcTarget:
        """Return the target of a URL. UserError where it is not understood, or has no key."""
        tracker, key = parsed(url)
        if key is None:
            raise UserError("the key of the boards is missing", where=f"--target {url}", fix=_LIKE)
        return cls(tracker, key, progress)

    @property
    def url(self) -> str:
        """The URL in full."""
        return f"rpc://{self.tracker}/{self.key}"

    @cached_property
    def board(self) -> Board:
        """The board, whichever it will be. ImportError without TVM."""
        from ..tvm.board import Board

        return Board(self)

    def check(self) -> None:
        """Raise UnavailableError where the tracker does not answer, or nobody serves the key."""
        self.tracker.refuse(self.key, self.tracker.boards())

    def refuses(self, backend: Backend) -> str | None:
        """Return why a backend's artifacts do not run there: TVM's alone do."""
        return None if backend.name == "tvm" else f"the board runs TVM's modules, and has no {_NAMES[backend.name]}"

    def open(self, backend: Backend, artifact: Artifact, threads: int) -> Runner:
        """Return a runner that borrows a board for each run. UserError for artifacts that do not run there."""
        from ..tvm.remote import Remote

        why = self.refuses(backend)
        if why is not None:
            raise UserError(why, where=f"--target {self.url}", fix="compile with --backend tvm")
        problem = backend.unavailable()
        if problem is not None:
            raise problem
        return Remote(artifact.folder / artifact.model, self.board, threads)

    def measure(
        self,
        runners: Mapping[str, Runner],
        feed: Mapping[str, np.ndarray],
        *,
        baseline: str,
        threads: int,
        seconds: float = 4.0,
        progress: Progress = silent,
    ) -> dict[str, Measurement]:
        """Time runners that were opened here on one board, interleaved, by its own clock.

        UnavailableError where no board is left to do it.
        """
        from ..tvm.remote import Remote, measured

        remote = {name: runner for name, runner in runners.items() if isinstance(runner, Remote)}
        return measured(
            self.board, remote, feed, baseline=baseline, threads=threads, seconds=seconds, progress=progress
        )

    def close(self) -> None:
        """Do nothing: a board is given back after each run."""
