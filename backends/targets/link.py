"""A connection to the program on the device: a process (ssh, or python3 itself) whose stdin and stdout are talked to.

What is run there is one constant line: python3 reads the next line and runs it; that reads the program, puts it into a
new temporary folder and becomes it. Nothing of what a user gives is ever part of a shell's line.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...compiler.errors import UnavailableError
from ..agent import frames
from . import packing

#: Seconds between two signs of life.
BEAT = 5.0
#: Seconds in which the program has to answer once it is sent, beside what its transfer takes.
_ANSWER = 60.0
#: Reads one line, byte by byte so that nothing behind it is taken, and runs it. No quote, $ or ! for any shell to see.
FIRST = "import os;exec(bytes(iter(lambda:os.read(0,1)[0],10)))"
_SECOND = """
import os, shutil, sys, tempfile
if sys.version_info < (3, 6):
    sys.stderr.write("edgec: python3 is " + sys.version.split()[0] + ", and 3.6 or later is needed\\n")
    sys.exit(97)
def some(n):
    got = b""
    while len(got) < n:
        part = os.read(0, min(n - len(got), 65536))
        if not part:
            sys.exit(96)
        got += part
    return got
program = some(int(some(12)))
try:
    folder = tempfile.mkdtemp(prefix="edgec-")
    path = os.path.join(folder, "agent.pyz")
    try:
        with open(path, "wb") as file:
            file.write(program)
    except BaseException:
        shutil.rmtree(folder, True)
        raise
except OSError as error:
    sys.stderr.write("edgec: " + str(error) + "\\n")
    sys.exit(98)
os.environ.setdefault("LC_ALL", "C.UTF-8")  # files may have any name, and Python 3.6 goes by the locale
os.execv(sys.executable, [sys.executable, path, "serve", folder])
"""


class LinkLost(Exception):
    """The connection broke; what was asked can be asked again over a new one."""


@dataclass
class Link:
    """One connection, which is open. `said` is what the process wrote to stderr."""

    process: subprocess.Popen[bytes]
    explain: Callable[[int | None, str], UnavailableError]
    said: list[str] = field(default_factory=list)
    resumed: bool = False
    _inbox: queue.Queue[tuple[dict[str, Any], bytes] | None] = field(default_factory=queue.Queue)
    #: Whole frames on their way out. A thread of its own writes them: Ctrl-C must not leave half of one.
    _outbox: queue.Queue[bytes] = field(default_factory=lambda: queue.Queue(2))
    _broken: threading.Event = field(default_factory=threading.Event)
    _closed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def open(
        cls,
        command: Sequence[str],
        token: str,
        *,
        explain: Callable[[int | None, str], UnavailableError],
        environment: dict[str, str] | None = None,
        timing: dict[str, float] | None = None,
        answer: float = _ANSWER,
    ) -> Link:
        """Start the process, send the program and wait until it says who it is. UnavailableError where it does not."""
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                bufsize=0,
                preexec_fn=_ignore_interrupts if sys.platform != "win32" else None,
            )
        except OSError as error:
            raise explain(None, f"{command[0]}: {error.strerror}") from error
        link = cls(process, explain)
        threading.Thread(target=link._listen, args=(token,), daemon=True).start()
        threading.Thread(target=link._speak, daemon=True).start()
        overhearing = threading.Thread(target=link._overhear, daemon=True)
        overhearing.start()
        try:
            program = packing.packed()
            link._write(repr(_SECOND).join(("exec(", ")\n")).encode() + f"{len(program):012d}".encode() + program)
            link.send({"do": "hello", "token": token, **(timing or {})})
            hello = link.receive(answer)
            link.receive(answer)  # "ready": the folder is taken over
        except (LinkLost, TimeoutError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            overhearing.join(1)  # a shared connection keeps its stderr open
            code = process.poll()
            link.kill()
            raise explain(code, "".join(link.said)) from error
        except BaseException:
            link.kill()
            raise
        link.resumed = bool(hello[0]["resumed"])
        threading.Thread(target=link._beat, daemon=True).start()
        return link

    def send(self, message: dict[str, Any], body: bytes = b"") -> None:
        """Send a message. LinkLost where the other end is gone."""
        self._write(frames.pack(message, body))

    def receive(self, timeout: float | None = None) -> tuple[dict[str, Any], bytes]:
        """Return the next message. LinkLost where the connection ended, TimeoutError where none came in time."""
        try:
            found = self._inbox.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError("no answer") from None
        if found is None:
            self._inbox.put(None)
            raise LinkLost
        return found

    def close(self) -> None:
        """Say good-bye, and wait until what was made on the device is removed, as long as that takes."""
        with contextlib.suppress(LinkLost, TimeoutError):
            self.send({"do": "bye"})
            end = time.monotonic() + 10
            while self.receive(max(end - time.monotonic(), 0.1))[0].get("is") != "bye":
                pass
        self.kill()

    def kill(self) -> None:
        """End the process and let go of its pipes."""
        self._closed.set()
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _write(self, some: bytes) -> None:
        """Hand a whole frame to the writer. LinkLost where the connection is gone."""
        while not self._broken.is_set():
            try:
                return self._outbox.put(some, timeout=0.2)
            except queue.Full:
                continue
        raise LinkLost

    def _speak(self) -> None:
        assert self.process.stdin is not None
        try:
            while not self._closed.is_set():
                try:
                    view = memoryview(self._outbox.get(timeout=0.5))
                except queue.Empty:
                    continue
                while view:
                    view = view[self.process.stdin.write(view) or 0 :]
        except (OSError, ValueError):
            self._broken.set()

    def _listen(self, token: str) -> None:
        """Hand on the messages behind the first one, which has the token in it; what stands before it is no message."""
        assert self.process.stdout is not None
        reader, known = frames.Reader(), False
        try:
            while some := self.process.stdout.read(1 << 16):
                reader.add(some)
                while not known and (line := reader.line()):
                    known = _is_hello(line, token)
                    if known:
                        self._inbox.put((json.loads(line), b""))
                while known and (found := reader.message())[0]:
                    self._inbox.put(found)
        except (OSError, ValueError):
            pass
        self._inbox.put(None)

    def _overhear(self) -> None:
        assert self.process.stderr is not None
        with contextlib.suppress(OSError, ValueError):
            while some := self.process.stderr.read(4096):
                self.said.append(some.decode("utf-8", "replace"))
                del self.said[:-50]

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            try:
                self.send({"do": "beat"})
            except LinkLost:
                return


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is ours to handle: the good-bye has to get out


def _is_hello(line: bytes, token: str) -> bool:
    if not re.match(rb"\s*\{", line) or token.encode() not in line:
        return False
    try:
        return bool(json.loads(line).get("is") == "hello")
    except ValueError:
        return False
