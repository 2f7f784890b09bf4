"""One run at a time on a board: who measures holds a lock, and whoever comes second waits and hears for whom.

The file is in the temporary folder, for all users of the device; its content says who holds it. The lock is the
kernel's: it ends with the process, whatever happens to that.
"""

import fcntl
import json
import os
import stat
import tempfile
import time
from typing import IO, Any, Dict, Optional

from .faults import Fault
from .opened import Tell

FILE = "edgec-device.lock"
#: Seconds that another run is waited for.
LONGEST = 3600.0


class BoardLock:
    """The lock of this device, to be used with `with`."""

    def __init__(self, file: str, who: str, tell: Tell, longest: float = LONGEST) -> None:
        self.path, self.who, self.tell, self.longest = file, who, tell, longest
        self.file: Optional[IO[str]] = None

    def __enter__(self) -> "BoardLock":
        start = time.monotonic()
        while not self._try():
            waited = time.monotonic() - start
            said = holder(self.path)
            self.tell("waiting for the run of %s" % (said.get("who") or "somebody else"), int(waited), None)
            if waited > self.longest:
                raise Fault("the device is in use by %s since %s" % (said.get("who"), said.get("since")))
            time.sleep(0.2)
        return self

    def _try(self) -> bool:
        file = _opened(self.path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        file.seek(0)
        file.truncate()
        json.dump({"who": self.who, "since": time.strftime("%H:%M:%S"), "pid": os.getpid()}, file)
        file.flush()
        self.file = file
        return True

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.seek(0)
            self.file.truncate()
            self.file.close()
            self.file = None


def path() -> str:
    """Return where the lock is."""
    return os.path.join(tempfile.gettempdir(), FILE)


def _opened(file: str) -> IO[str]:
    """Open the lock file, whoever made it. Fault where something else has its name."""
    # without O_CREAT first: kernels refuse it for another user's file in a sticky folder (fs.protected_regular)
    flags = os.O_RDWR | os.O_NOFOLLOW
    try:
        try:
            number = os.open(file, flags)
        except FileNotFoundError:
            number = os.open(file, flags | os.O_CREAT, 0o666)
            os.fchmod(number, 0o666)
    except OSError as error:
        raise Fault("%s: %s" % (file, error.strerror), fix="remove it on the device") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise Fault("%s is no plain file" % file, fix="remove it on the device")
    return os.fdopen(number, "r+")


def holder(file: str) -> Dict[str, Any]:
    """Return who holds the lock, {} where nobody does or it cannot be read."""
    try:
        with open(file) as said:
            found = json.load(said)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
