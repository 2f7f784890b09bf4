"""A session on a device over a connection that may break: files go over once, jobs run, results come back.

Every request can be made again, so one that a broken connection cuts off is: over a new connection with the same token
the device's side goes on where it was. Files are known by their content; one that is there is not sent again, and one
that is half there is sent from where it ended. None is used before its hash is right.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...compiler.errors import UnavailableError, UserError
from ...compiler.types import Progress, silent
from ..agent import frames
from .link import Link, LinkLost

#: Seconds for which a device keeps the session of a broken connection, and for which a new one is tried.
GRACE, PATIENCE = 120.0, 100.0
#: Seconds without a sign of life after which the device takes the connection for broken.
SILENCE = 60.0
#: Parts of a file that are sent, or asked for, ahead of what has arrived: 4 MB, what a fast and far link holds.
_AHEAD = 16
#: Seconds in which the device has to answer what it can answer at once, on the slowest of links.
_ANSWER = 120.0

Connect = Callable[[str, bool, dict[str, float]], Link]
T = TypeVar("T")


class Forgotten(UnavailableError):
    """The device kept nothing of the session: all that is needed has to be sent anew."""


class Refused(Exception):
    """The device said that something cannot be done: what, how to fix it, and the ONNX nodes to blame."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__(said["what"])
        self.what, self.fix = str(said["what"]), said.get("fix")
        self.nodes = tuple(said.get("nodes") or ())


@dataclass
class Device:
    """A session, which is opened when it is first needed. `connect` makes a connection: token, again, timing."""

    url: str
    connect: Connect
    progress: Progress = silent
    patience: float = PATIENCE
    grace: float = GRACE
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    _link: Link | None = None
    _stored: set[tuple[str, str]] = field(default_factory=set)

    def run(self, spec: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
        """Run a job and return its result; the files that its result names are fetched into `folder`.

        Refused where the device says that it cannot, UnavailableError where it cannot be reached (any more).
        """
        job = secrets.token_hex(8)
        heard = [0]

        def asked(link: Link) -> dict[str, Any]:
            _ask(link, {"do": "start", "job": job, "spec": dict(spec)})
            link.send({"do": "follow", "job": job, "from": heard[0]})
            return self._followed(link, heard)

        try:
            result = self._tried(asked, heard)
            for name in result.get("files", ()) if folder is not None else ():
                if Path(name).name != name or name in (".", ".."):
                    raise UnavailableError(f"the device names a file {name!r}", where=self.url, fix="is it the device?")
                self._tried(functools.partial(self._fetch, job=job, name=name, to=folder / name))
        finally:
            with contextlib.suppress(LinkLost, TimeoutError, Refused):
                if self._link is not None:
                    _ask(self._link, {"do": "drop", "job": job})
        return result

    def send(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Send files that belong together, by the names that they shall have side by side; return their paths there."""
        hashes = {name: _digest(path) for name, path in files.items()}
        key = hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()[:20]
        for name, path in files.items():
            if (key, name) not in self._stored:
                self._tried(functools.partial(self._put, key=key, name=name, path=path, sha256=hashes[name]))
                self._stored.add((key, name))
        return {name: f"files/{key}/{name}" for name in files}

    def close(self) -> None:
        """End the session: what was made on the device is removed."""
        atexit.unregister(self.close)
        if self._link is not None:
            self._link.close()
            self._link = None

    # ------------------------------------------------------------------------------------- connections

    def _tried(self, asked: Callable[[Link], T], heard: list[int] | None = None) -> T:
        """Ask, over a new connection where the old one broke; what the device forgot is asked anew by the caller."""
        silences = 0
        while True:
            try:
                return asked(self._connected(heard))
            except (LinkLost, TimeoutError) as error:
                silences += isinstance(error, TimeoutError)
                if silences > 2:
                    what = "the device does not answer what it is asked, three times"
                    raise UnavailableError(what, where=self.url, fix="run the command again") from error
                if self._link is not None:
                    self._link.kill()
                    self._lost(self._link)

    def _connected(self, heard: list[int] | None) -> Link:
        if self._link is None or self._link.process.poll() is not None:
            again = self._link is not None
            self._link = self._reached() if again else self._opened(False)
            if not self._link.resumed:
                self._stored.clear()
                if heard is not None:
                    heard[0] = 0
                if again:
                    raise Forgotten(
                        "the connection broke, and the device kept nothing of what was done",
                        where=self.url,
                        fix="was it started anew? run the command again",
                    )
        return self._link

    def _lost(self, link: Link) -> None:
        self.progress("the connection broke; connecting anew", 0, None)

    def _reached(self) -> Link:
        """Connect again, as long as the device keeps the session. UnavailableError where that fails."""
        end, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return self._opened(True)
            except UnavailableError as error:
                left = end - time.monotonic()
                if left <= 0:
                    what = f"the connection broke and did not come back in {self.patience:g} s ({error.what})"
                    raise UnavailableError(what, where=self.url, fix="run the command again") from error
                self.progress("the connection broke; connecting anew", int(self.patience - left), int(self.patience))
                time.sleep(min(pause, left))
                pause = min(pause * 2, 8.0)

    def _opened(self, again: bool) -> Link:
        if not again:
            atexit.register(self.close)  # however this process ends, as long as it can say good-bye
        return self.connect(self.token, again, {"grace": self.grace, "silence": SILENCE})

    # ------------------------------------------------------------------------------------- what is asked

    def _followed(self, link: Link, heard: list[int]) -> dict[str, Any]:
        while True:
            message, _ = link.receive()
            if message.get("is") == "fault":
                raise Refused(message)
            if message.get("is") != "event":
                continue
            heard[0], event = int(message["n"]), message["event"]
            if event["event"] == "progress":
                self.progress(event["stage"], int(event["done"]), event["total"])
            elif event["event"] == "done":
                return dict(event["result"])
            elif event["event"] == "fault":
                raise Refused(event)
            elif event["event"] == "crash":
                said = "; ".join(event.get("said", [])[-3:])
                raise Refused({"what": f"the program on the device broke down: {event['what']}. {said}".strip()})
            elif event["event"] == "bug":
                raise RuntimeError(f"in the program on the device:\n{event['what']}")

    def _put(self, link: Link, key: str, name: str, path: Path, sha256: str) -> None:
        about = {"key": key, "name": name}
        size = path.stat().st_size
        for _ in range(3):
            there = _ask(link, {"do": "have", **about, "bytes": size})
            if there["stored"]:
                return
            self._put_parts(link, about, path, int(there["offset"]))
            if _ask(link, {"do": "seal", **about, "sha256": sha256}, None)["is"] == "stored":
                return
        what = f"{name} arrives damaged on the device, three times"
        raise UnavailableError(what, where=self.url, fix="look at the device's disk and memory")

    def _put_parts(self, link: Link, about: dict[str, str], path: Path, offset: int) -> None:
        """Send a file from an offset on; so many parts ahead of what has arrived that the link is never idle.

        Refused where the device cannot take it, with all answers heard.
        """
        size, ahead, refused = path.stat().st_size, 0, None
        with path.open("rb") as file:
            file.seek(offset)
            while (part := b"" if refused else file.read(frames.PART)) or ahead:
                if part:
                    link.send({"do": "put", **about, "offset": offset}, part)
                    offset, ahead = offset + len(part), ahead + 1
                if ahead >= _AHEAD or not part:
                    answer, _ = link.receive(_ANSWER)
                    ahead -= 1
                    refused = refused or (Refused(answer) if answer.get("is") == "fault" else None)
                    arrived = int(answer.get("offset", 0)) // 1024
                    self.progress(f"sending {about['name']} (kB)", arrived, max(size // 1024, 1))
        if refused is not None:
            raise refused

    def _fetch(self, link: Link, job: str, name: str, to: Path) -> None:
        """Fetch a file of a job; what came before a broken connection is kept, and its hash decides."""
        said = _ask(link, {"do": "stat", "job": job, "name": name})
        part = to.with_name(f"{to.name}.part")
        asked = at = part.stat().st_size if part.exists() else 0
        with part.open("ab") as file:
            while at < said["bytes"]:
                while asked < said["bytes"] and asked - at < _AHEAD * frames.PART:
                    link.send({"do": "get", "job": job, "name": name, "offset": asked})
                    asked += frames.PART
                message, body = link.receive(_ANSWER)
                if message.get("is") == "fault":
                    raise Refused(message)
                file.write(body)
                at += len(body)
                self.progress(f"fetching {name} (kB)", at // 1024, max(said["bytes"] // 1024, 1))
        if _digest(part) != said["sha256"]:
            part.unlink()
            raise UnavailableError(f"{name} came damaged from the device", where=self.url, fix="run the command again")
        part.replace(to)


def _ask(link: Link, message: dict[str, Any], timeout: float | None = _ANSWER) -> dict[str, Any]:
    """Send a request and return its answer. Refused where it cannot be granted. Events that come between are old."""
    link.send(message)
    while True:
        answer, _ = link.receive(timeout)
        if answer.get("is") == "fault":
            raise Refused(answer)
        if answer.get("is") != "event":
            return answer


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unavailable(refused: Refused, url: str) -> UserError:
    """Return what the device refused as the error that a person reads."""
    return UnavailableError(refused.what, where=url, fix=refused.fix)
