"""Where an artifact runs and is timed: this machine, a device over SSH, or a board that a TVM tracker lends.

    local     LocalTarget   in this process           HereTarget   runtimes that want a process of their own
    ssh://    SshTarget     a DeviceTarget, as HereTarget is: backends/agent runs there, talked to over a pipe
    rpc://    RpcTarget     boards behind TVM's tracker
"""

from __future__ import annotations

from ...compiler.errors import UserError
from ...compiler.types import Progress, silent
from ..base import Target
from .here import HereTarget
from .local import LocalTarget
from .rpc import RpcTarget
from .ssh import SshTarget


def of(url: str, progress: Progress = silent, *, in_process: bool = True) -> Target:
    """Return the target of a URL; `progress` hears of waits for it.

    `in_process`: on this machine, artifacts run in this process. UserError where the URL is not understood.
    """
    if url == "local":
        return LocalTarget() if in_process else HereTarget(progress)
    if url.startswith("rpc:"):
        return RpcTarget.of(url, progress)
    if url.startswith("ssh:"):
        return SshTarget.of(url, progress)
    raise UserError(
        "no such kind of target",
        where=f"--target {url}",
        fix="use local, ssh://user@host, or rpc://HOST:PORT/KEY, or leave it out",
    )
