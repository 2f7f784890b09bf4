"""A job as the session sees it: a folder, a process of its own, and a file of events that is read on."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, Dict, Optional

from .folders import locked

_TICK = 0.05


class Job:
    """One job: its folder, its process, and how far its events were read."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.events, self.offset = 0, 0

    def start(self, spec: Dict[str, Any]) -> None:
        """Start it in a session of its own, unless it was started before."""
        try:
            os.makedirs(self.folder)
        except FileExistsError:
            return
        with open(os.path.join(self.folder, "job.json"), "w") as file:
            json.dump(spec, file)
        with open(os.path.join(self.folder, "worker.out"), "wb") as said:
            command = [sys.executable, sys.argv[0], "work", self.folder]
            own = dict(os.environ, TMPDIR=self.folder)  # what runtimes leave in there goes with the folder
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, start_new_session=True, env=own, **streams)
        with open(os.path.join(self.folder, "pid"), "w") as file:
            file.write(str(self.process.pid))

    def rewind(self, events: int) -> None:
        """Go on behind so many events."""
        self.events, self.offset = 0, 0
        for _ in range(events):
            if not self._line():
                break

    def next(self) -> Optional[Dict[str, Any]]:
        """Return the next event, if there is one."""
        line = self._line()
        return json.loads(line) if line else None

    def _line(self) -> str:
        try:
            with open(os.path.join(self.folder, "events.jsonl"), "rb") as file:
                file.seek(self.offset)
                line = file.readline()
        except OSError:
            return ""
        if not line.endswith(b"\n"):
            return ""
        self.offset += len(line)
        self.events += 1
        return line.decode("utf-8")

    def alive(self) -> bool:
        """Say whether its process still runs, also one that another session started."""
        if self.process is not None:
            return self.process.poll() is None
        free = locked(os.path.join(self.folder, "worker.lock"))
        if free is None:
            return True
        free.close()
        return False

    def kill(self) -> None:
        """End it and all that it started, and wait until it is gone."""
        try:
            with open(os.path.join(self.folder, "pid")) as file:
                pid = int(file.read())
        except (OSError, ValueError):
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if not self.alive():
                return
            try:
                os.killpg(pid, sign)
            except OSError:
                return
            end = time.monotonic() + 2
            while self.alive() and time.monotonic() < end:
                time.sleep(_TICK)

    def obituary(self) -> Dict[str, Any]:
        """Return the event that stands for the end of a process that gave none."""
        code = None if self.process is None else self.process.returncode
        try:
            with open(os.path.join(self.folder, "worker.out"), "rb") as file:
                said = file.read()[-4000:].decode("utf-8", "replace").strip().splitlines()[-6:]
        except OSError:
            said = []
        how = "it ended without a word"
        if code is not None and code < 0:
            how = "it was ended by signal %d (%s)" % (-code, signal.Signals(-code).name)
            if -code == signal.SIGKILL:
                how += ", as a device that runs out of memory does"
        elif code is not None:
            how = "it ended with exit code %d" % code
        return {"event": "crash", "what": how, "said": said}
