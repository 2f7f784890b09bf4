"""The folders of sessions in the device's temporary folder: whose they are, and which of them nobody owns any more."""

import fcntl
import hashlib
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from typing import IO, List, Optional

PREFIX = "edgec-"
#: Seconds in which a session that is taken over has no owner, at most.
_TAKING = 60.0


def locked(path: str) -> Optional[IO[str]]:
    """Open a file and lock it; None where somebody else has it locked. The lock ends with the file, or the process."""
    file = open(path, "a+")  # noqa: SIM115  # it is the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def digest(path: str) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest()


def _folders() -> List[str]:
    """Return the folders of this user's sessions."""
    root = tempfile.gettempdir()
    paths = [os.path.join(root, name) for name in os.listdir(root) if name.startswith(PREFIX)]
    return [p for p in paths if os.path.isdir(p) and not os.path.islink(p) and os.stat(p).st_uid == os.getuid()]


def of_token(token: str, but: str) -> Optional[str]:
    """Return the folder of the session with this word, another than `but`; None where there is none."""
    for folder in _folders():
        try:
            with open(os.path.join(folder, "token")) as file:
                if file.read() == token and folder != but:
                    return folder
        except OSError:
            continue
    return None


def sweep() -> None:
    """Remove folders whose owners are dead: what a power cut, or a kill -9 of the whole session, left."""
    for folder in _folders():
        owner = os.path.join(folder, "owner.lock")
        if not os.path.exists(owner):
            continue
        taken = os.path.join(folder, "takeover")
        if os.path.exists(taken) and time.time() - os.path.getmtime(taken) < _TAKING:
            continue  # between two owners
        held = locked(owner)
        if held is None:
            continue
        for pid in _processes(folder):
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        held.close()


def _processes(folder: str) -> List[int]:
    """Return the processes of a session's jobs that still run: those that hold their job's lock."""
    found: List[int] = []
    jobs = os.path.join(folder, "jobs")
    for name in os.listdir(jobs) if os.path.isdir(jobs) else []:
        free = locked(os.path.join(jobs, name, "worker.lock"))
        if free is not None:
            free.close()
            continue
        with suppress(OSError, ValueError), open(os.path.join(jobs, name, "pid")) as file:
            found.append(int(file.read()))
    return found
