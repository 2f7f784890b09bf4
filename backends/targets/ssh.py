"""A device over SSH as the target: ssh://[USER@]HOST[:PORT].

The user's own OpenSSH client makes the connection: its configuration, keys, agent, known_hosts and jump hosts hold, and
host keys are checked as it is told to. EDGEC_SSH is another command than `ssh` ("ssh -F my.config"), as git's
GIT_SSH_COMMAND is.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from ...compiler.errors import UnavailableError, UserError
from ...compiler.types import Progress, silent
from .link import FIRST, Link
from .on_device import DeviceTarget

_LIKE = "write it like ssh://user@192.168.1.20 or ssh://my-jetson:2222"
_HOST, _USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]*"), re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\\@+-]*")
#: A socket's path may have 104 bytes (macOS), and ssh makes a name of 40 and appends one of 17 while it opens it.
_LONGEST_FOLDER = 104 - 40 - 18

#: What ssh or the device says, what that means, and what to do: the first that fits.
_SAID: tuple[tuple[str, str, str], ...] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "the host key is not the one that known_hosts has for it: another machine, or somebody in between",
        "if the device was installed anew, forget the old key: ssh-keygen -R HOST, then connect once by hand",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "its host key is not known here yet",
        "connect once by hand, compare the fingerprint and accept it: ssh {destination}",
    ),
    (
        r"Permission denied|Too many authentication failures|No supported authentication methods",
        "it refuses the login: no key or password of yours is accepted there",
        "try: ssh {destination}; ssh-copy-id {destination} puts your key there",
    ),
    (r"Could not resolve hostname|Name or service not known", "this host name is not known", "check the name"),
    (r"Connection refused", "nothing listens on its SSH port", "start sshd on the device, or check the port"),
    (
        r"No route to host|Network is unreachable|Connection timed out|Operation timed out",
        "it cannot be reached",
        "check that the device is on, in this network, and its address",
    ),
    (
        r"kex_exchange_identification|Connection reset by|Connection closed by",
        "its sshd hangs up before the login",
        "try again in a moment; look at sshd's log there, and at hosts.deny and MaxStartups",
    ),
    (
        r"python3: (command )?not found|command not found: python3|python3: No such file|Unknown command.*python3",
        "there is no python3 on the device",
        "install it there: sudo apt install python3",
    ),
    (r"edgec: (python3 is .* needed)", "{said}", "install a later python3 on the device"),
    (
        r"edgec: .*No space left|Disk quota exceeded|No usable temporary directory",
        "the device's disk is full",
        "make room there",
    ),
    (r"edgec: (.*)", "{said}", "see that the device's temporary folder can be written"),
    (r"Bad configuration option|command-line line 0", "ssh does not know its options", "install OpenSSH 7.6 or later"),
    (r"ssh: No such file|ssh: The system cannot find", "there is no ssh here", "install OpenSSH's client"),
)


class SshTarget(DeviceTarget):
    """A device behind the user's own ssh."""

    @classmethod
    def of(cls, url: str, progress: Progress = silent) -> SshTarget:
        """Return the target of a URL. UserError where it is not understood; nothing is connected yet."""
        host, user, port = parsed(url)
        return cls(url, functools.partial(_connected, url, host, user, port), progress)


def parsed(url: str) -> tuple[str, str | None, int | None]:
    """Return host, user and port of ssh://[USER@]HOST[:PORT]. UserError for anything else."""
    try:
        parts = urlsplit(url)
        host, user, port = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise UserError(f"not understood: {error}", where=f"--target {url}", fix=_LIKE) from error
    problem = None
    if not url.startswith("ssh://") or not host or not _HOST.fullmatch(host):
        problem = "the host is missing, or is no host's name"
    elif user is not None and not _USER.fullmatch(user):
        problem = f"{user!r} is no user's name"
    elif parts.password is not None:
        problem = "a password does not belong into it; ssh asks for it, or use a key"
    elif parts.path.strip("/") or parts.query or parts.fragment:
        problem = "there is more in it than user, host and port"
    if problem is not None or host is None:
        raise UserError(str(problem), where=f"--target {url}", fix=_LIKE)
    name = parts.netloc.rpartition("@")[2]  # urlsplit has it in small letters; ssh_config's names tell them apart
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name, user, port


def command(host: str, user: str | None, port: int | None, *, shared: bool = True) -> list[str]:
    """Return the command line that runs the program on the device. `shared`: over a connection that others may use."""
    line = [*shlex.split(os.environ.get("EDGEC_SSH") or "ssh"), "-T", "-x"]
    options = {
        "ConnectTimeout": "15",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "6",
        "Compression": "no",  # models do not get smaller by it, and a board's CPU is slow
        "LogLevel": "ERROR",
        "RemoteCommand": "none",  # a configuration may have one for the host, and ssh takes only one
        "ClearAllForwardings": "yes",
        **_sharing(shared),
    }
    if not sys.stdin.isatty():
        options["BatchMode"] = "yes"  # nobody is there to be asked
    for name, value in options.items():
        line += ["-o", f"{name}={value}"]
    line += ["-p", str(port)] if port is not None else []
    line += ["-l", user] if user is not None else []
    return [*line, "--", host, f"exec python3 -c '{FIRST}'"]


def _sharing(shared: bool) -> dict[str, str]:
    """Return the options by which compile, bench and doctor share one connection for a minute."""
    folder = _socket_folder() if shared else None
    if folder is None:
        return {"ControlMaster": "no", "ControlPath": "none"}
    return {"ControlMaster": "auto", "ControlPersist": "60", "ControlPath": f"{folder}/%C"}


def _socket_folder() -> Path | None:
    """Return a folder of this user's alone that is short enough for a socket; None where there is none."""
    if sys.platform == "win32":
        return None
    folder = Path(tempfile.gettempdir()) / f"edgec-ssh-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    mine = found.st_uid == os.getuid() and not folder.is_symlink() and found.st_mode & 0o077 == 0
    return folder if mine and len(str(folder)) <= _LONGEST_FOLDER else None


def _connected(
    url: str, host: str, user: str | None, port: int | None, token: str, again: bool, timing: dict[str, float]
) -> Link:
    """Connect; `again` after a connection that broke, whose shared socket may be dead."""
    explain = functools.partial(_explained, url, host if user is None else f"{user}@{host}")
    return Link.open(command(host, user, port, shared=not again), token, explain=explain, timing=timing)


def _explained(url: str, destination: str, code: int | None, said: str) -> UnavailableError:
    """Return what ssh's exit code and words mean."""
    for pattern, what, fix in _SAID:
        found = re.search(pattern, said)
        if found:
            words = found.group(1) if found.groups() and found.group(1) else ""
            return UnavailableError(what.format(said=words), where=url, fix=fix.format(destination=destination))
    last = " ".join(said.split())[-300:]
    if code == 127:
        return UnavailableError("there is no python3 on the device", where=url, fix="sudo apt install python3")
    if code is None:
        return UnavailableError(f"no answer from the device {last}".strip(), where=url, fix=f"try: ssh {destination}")
    what = f"ssh ended with code {code}" + (f": {last}" if last else "")
    return UnavailableError(what, where=url, fix=f"try: ssh {destination}")
