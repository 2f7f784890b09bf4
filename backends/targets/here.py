"""This machine as a device: the same program as on a board, in a process of its own, without SSH.

For runtimes that edgec does not load into its own process: one that crashes takes nothing else with it.
"""

from __future__ import annotations

import os
import sys

from ...compiler.errors import UnavailableError
from ...compiler.types import Progress, silent
from .link import FIRST, Link
from .on_device import DeviceTarget


class HereTarget(DeviceTarget):
    """This machine's own python3, the one that runs edgec, behind a pipe."""

    is_here = True

    def __init__(self, progress: Progress = silent) -> None:
        """Take this machine; nothing is started yet."""
        super().__init__("local", _started, progress)


def _started(token: str, again: bool, timing: dict[str, float]) -> Link:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return Link.open([sys.executable, "-c", FIRST], token, explain=_explained, environment=environment, timing=timing)


def _explained(code: int | None, said: str) -> UnavailableError:
    last = " ".join(said.split())[-300:]
    return UnavailableError(f"the process that measures did not start: {last or code}", where="--target local")
