"""The session on the device: files come in, jobs run, and a connection that breaks is waited for.

    <temporary folder>/edgec-XXXX/        removed at the end, however it ends
        agent.pyz                         this program
        token                             the word of whoever it belongs to
        owner.lock                        locked by the process that serves it
        files/<key>/<name>                what was sent; <name>.part until its hash is right
        jobs/<id>/                        job.json, events.jsonl, worker.lock, what the job writes

A job is a process of its own: a runtime that crashes takes nothing else with it. It writes what happens to a file, and
that file is what is sent: so a new connection, which brings the token, takes the folder over and goes on behind the
event that arrived last. Without "bye" the folder is kept for `grace` seconds, then jobs are killed and all is removed.

Nothing that is written blocks: a link that stalls must not keep a new connection from taking over.
"""

import errno
import os
import re
import select
import shutil
import signal
import sys
import time
from typing import Any, Dict, List, Optional

from . import folders, frames, lock
from .faults import Fault
from .folders import digest, locked
from .jobs import Job

#: Seconds without a word after which a connection counts as broken, and for which a broken one is waited for.
SILENCE, GRACE = 60.0, 120.0
#: Bytes that a disk keeps free.
_SPARE = 32 << 20
_NAME = re.compile(r"[^./\\\0][^/\\\0]*")
_TICK = 0.05


class Session:
    """What one connection does with its folder; see the module."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lock = locked(os.path.join(folder, "owner.lock"))
        self.reader, self.out = frames.Reader(), bytearray()
        self.heard = time.monotonic()
        self.lost_at: Optional[float] = None
        self.grace, self.silence = GRACE, SILENCE
        self.jobs: Dict[str, Job] = {}
        self.followed: Optional[Job] = None
        self.over = self.handed_over = self.ended = False

    def run(self) -> None:
        """Serve until "bye", until another session takes over, or until nobody came back."""
        os.set_blocking(1, False)
        while not self.over:
            self._watch()
            self._exchange()
            self._forward()
            now = time.monotonic()
            if self.lost_at is None and now - self.heard > self.silence:
                self.lost_at = now
            if self.lost_at is not None and now - self.lost_at > self.grace:
                return

    def end(self) -> None:
        """Kill what runs and remove the folder, unless somebody else has it now."""
        if self.handed_over:
            return
        for job in self._all_jobs():
            job.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(self) -> None:
        if os.path.exists(os.path.join(self.folder, "takeover")) or not os.path.isdir(self.folder):
            self.over = self.handed_over = True

    def _exchange(self) -> None:
        """Read what came and write what is due; at most for a moment."""
        if self.ended:
            time.sleep(_TICK)
            return
        ready, free, _ = select.select([0], [1] if self.out else [], [], _TICK)
        try:
            if free:
                del self.out[: os.write(1, self.out[: frames.PART])]
            if ready:
                some = os.read(0, frames.PART)
                if not some:
                    raise OSError(errno.EPIPE, "the connection ended")
                self.reader.add(some)
                self._take()
                self.heard, self.lost_at = time.monotonic(), None  # it was silent only, if it was
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            self.ended, self.lost_at = True, time.monotonic()

    def _take(self) -> None:
        message, body = self.reader.message()
        while message and not self.over:
            try:
                answer = getattr(self, "do_" + str(message.get("do")))(message, body)
            except Fault as fault:
                answer = dict(fault.message(), **{"is": "fault"})
            except OSError as error:
                answer = dict(_worded(error, self.folder).message(), **{"is": "fault"})
            except (ValueError, KeyError, TypeError) as error:  # a name that its file system cannot have, for one
                answer = {"is": "fault", "what": "%s: %s" % (type(error).__name__, error)}
            if answer is not None:
                self._say(*answer) if isinstance(answer, tuple) else self._say(answer)
            message, body = self.reader.message()

    def _say(self, message: Dict[str, Any], body: bytes = b"") -> None:
        self.out += frames.pack(message, body)

    def _forward(self) -> None:
        job = self.followed
        while job is not None and not self.ended:
            ended = not job.alive()  # asked first: what it wrote last must not be missed
            event = job.next()
            if event is None and not ended:
                return
            event = event or job.obituary()
            self._say({"is": "event", "n": job.events, "event": event})
            if event["event"] in ("done", "fault", "bug", "crash"):
                self.followed = job = None

    def _all_jobs(self) -> List[Job]:
        folder = os.path.join(self.folder, "jobs")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return [self._job(name) for name in names]

    def _job(self, name: str) -> Job:
        _checked(name)
        return self.jobs.setdefault(name, Job(os.path.join(self.folder, "jobs", name)))

    def _path(self, message: Dict[str, Any]) -> str:
        return os.path.join(self.folder, "files", _checked(message["key"]), *map(_checked, message["name"].split("/")))

    # ------------------------------------------------------------------------------------- what is asked

    def do_hello(self, message: Dict[str, Any], body: bytes) -> Dict[str, Any]:
        """Say who is there, and take over the folder of this token where there is one."""
        self.grace, self.silence = float(message.get("grace", GRACE)), float(message.get("silence", SILENCE))
        before = folders.of_token(message["token"], self.folder)
        if before is not None:
            self._take_over(before)
        else:
            with open(os.path.join(self.folder, "token"), "w") as file:
                file.write(message["token"])
        self.out += b"\n"  # behind a banner that did not end its line
        self._say({"is": "hello", "token": message["token"], "resumed": before is not None, "python": sys.version})
        folders.sweep()
        return {"is": "ready"}

    def _take_over(self, other: str) -> None:
        with open(os.path.join(other, "takeover"), "w"):
            pass
        end = time.monotonic() + 10
        mine = locked(os.path.join(other, "owner.lock"))
        while mine is None and time.monotonic() < end:
            time.sleep(_TICK)
            mine = locked(os.path.join(other, "owner.lock"))
        if mine is None:
            raise Fault("the session of before does not let go", fix="try again in a minute")
        os.remove(os.path.join(other, "takeover"))
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder, self.lock = other, mine
        sys.argv[0] = os.path.join(other, os.path.basename(sys.argv[0]))

    def do_beat(self, message: Dict[str, Any], body: bytes) -> None:
        """Hear that the other end is alive."""

    def do_have(self, message: Dict[str, Any], body: bytes) -> Dict[str, Any]:
        """Say how much of a file is here. Fault where the disk has no room for the rest."""
        path = self._path(message)
        if os.path.exists(path):
            return {"is": "have", "stored": True, "offset": message["bytes"]}
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = path + ".part"
        offset = os.path.getsize(part) if os.path.exists(part) else 0
        free = shutil.disk_usage(self.folder).free - _SPARE
        if free < message["bytes"] - offset:
            raise Fault(_FULL.format(self.folder, max(free, 0) / 1e6, (message["bytes"] - offset) / 1e6), _ROOM)
        return {"is": "have", "stored": False, "offset": offset}

    def do_put(self, message: Dict[str, Any], body: bytes) -> Dict[str, Any]:
        """Take the next part of a file, and say how much of it is here now."""
        with open(self._path(message) + ".part", "ab") as file:
            if file.tell() != message["offset"]:
                raise Fault("a part of %s is missing" % message["name"], fix="try again")
            file.write(body)
            return {"is": "got", "offset": message["offset"] + len(body)}

    def do_seal(self, message: Dict[str, Any], body: bytes) -> Dict[str, Any]:
        """Make a file whole: it gets its name where its content is what was meant, else it is removed."""
        path = self._path(message)
        if digest(path + ".part") == message["sha256"]:
            os.rename(path + ".part", path)
            return {"is": "stored"}
        os.remove(path + ".part")
        return {"is": "damaged"}

    def do_start(self, message: Dict[str, Any], body: bytes) -> Dict[str, Any]:
        """Start a job, unless it was started before."""
        spec = dict(message["spec"], session=self.folder, lock=lock.path())
        self._job(message["job"]).start(spec)
        return {"is": "started"}

    def do_follow(self, message: Dict[str, Any], body: bytes) -> None:
        """Send a job's events from the n-th on, until its last."""
        self.followed = self._job(message["job"])
        self.followed.rewind(message["from"])

    def do_drop(self, message: Dict[str, Any], body: bytes) -> Dict[str, Any]:
        """Kill a job and remove its folder."""
        job = self._job(message["job"])
        job.kill()
        shutil.rmtree(job.folder, ignore_errors=True)
        self.jobs.pop(message["job"], None)
        self.followed = None if self.followed is job else self.followed
        return {"is": "dropped"}

    def do_stat(self, message: Dict[str, Any], body: bytes) -> Dict[str, Any]:
        """Say how large a file of a job is, and its hash."""
        path = self._result(message)
        return {"is": "file", "bytes": os.path.getsize(path), "sha256": digest(path)}

    def do_get(self, message: Dict[str, Any], body: bytes) -> Any:
        """Send a part of a file of a job."""
        with open(self._result(message), "rb") as file:
            file.seek(message["offset"])
            return {"is": "part", "offset": message["offset"]}, file.read(frames.PART)

    def _result(self, message: Dict[str, Any]) -> str:
        return os.path.join(self.folder, "jobs", _checked(message["job"]), *map(_checked, message["name"].split("/")))

    def do_bye(self, message: Dict[str, Any], body: bytes) -> None:
        """End; the folder is gone when the answer comes."""
        self.end()
        self.over = self.handed_over = True
        os.set_blocking(1, True)
        frames.write(1, {"is": "bye"})


_FULL = "the device's disk is full: {0} has {1:.0f} MB to spare, and {2:.0f} MB are needed"
_ROOM = "make room on the device, or set TMPDIR there to a folder with more"


def _worded(error: OSError, folder: str) -> Fault:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Fault("the device's disk is full: %s took no more" % folder, _ROOM)
    return Fault("%s: %s" % (error.filename or folder, error.strerror or error))


def _checked(name: str) -> str:
    """Return a file's or folder's name as it is. Fault for one that could lead elsewhere."""
    if not _NAME.fullmatch(name) or name.endswith(".part"):
        raise Fault("%r is no name that files may have here" % name)
    return name


def serve(folder: str) -> int:
    """Serve one connection. The exit code is 0 however it ends: the other end knows why."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal's end is not the session's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    session = Session(folder)
    try:
        session.run()
    finally:
        session.end()
    return 0
