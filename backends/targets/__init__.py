"""Where an artifact runs and is timed: this machine, or a board that a TVM tracker lends."""

from __future__ import annotations

from ...compiler.errors import UnavailableError
from ...compiler.types import Progress, silent
from ..base import Target
from .local import LocalTarget
from .rpc import RpcTarget


def of(url: str, progress: Progress = silent) -> Target:
    """Return the target of a URL; `progress` hears of waits for it.

    UserError where it is not understood, UnavailableError where there is no such kind.
    """
    if url == "local":
        return LocalTarget()
    if url.startswith("rpc:"):
        return RpcTarget.of(url, progress)
    raise UnavailableError(
        f"target {url!r} is not in this version of edgec",
        where="--target",
        fix="use --target local or rpc://HOST:PORT/KEY, or leave it out",
    )
