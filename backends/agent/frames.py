"""Messages over a pipe: one line of JSON each, and where it says `size`, so many bytes behind it.

What stands before the first message (a banner, what a .bashrc prints) is skipped by whoever reads: the first message
has a word in it that nobody else could have written.
"""

import json
import os
from typing import Any, Dict, Tuple

#: Bytes behind one message at most: more is sent in parts.
PART = 1 << 18
#: A line longer than this is no message.
_LONGEST = 1 << 26


def pack(message: Dict[str, Any], body: bytes = b"") -> bytes:
    """Return a message as bytes; `size` is set to that of what follows it."""
    told = dict(message, size=len(body)) if body else message
    return json.dumps(told).encode("ascii") + b"\n" + body


def write(file: int, message: Dict[str, Any], body: bytes = b"") -> None:
    """Write a message to a file descriptor, all of it. OSError where the other end is gone."""
    view = memoryview(pack(message, body))
    while view:
        view = view[os.write(file, view) :]


class Reader:
    """Takes bytes as they come, and gives the messages that are whole."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, some: bytes) -> None:
        """Take the next bytes."""
        self._bytes += some

    def line(self) -> bytes:
        """Return the next line without its end; empty where it is not whole yet. ValueError if it never ends."""
        end = self._bytes.find(b"\n")
        if end < 0:
            if len(self._bytes) > _LONGEST:
                raise ValueError("no message: a line without an end")
            return b""
        found = bytes(self._bytes[:end])
        del self._bytes[: end + 1]
        return found or b" "

    def message(self) -> Tuple[Dict[str, Any], bytes]:
        """Return the next message and what is behind it; ({}, b"") where it is not whole. ValueError if it is none."""
        end = self._bytes.find(b"\n")
        if end < 0:
            if len(self._bytes) > _LONGEST:
                raise ValueError("no message: a line without an end")
            return {}, b""
        message = json.loads(bytes(self._bytes[:end]).decode("utf-8"))
        if not isinstance(message, dict):
            raise ValueError("no message: not a JSON object")
        size = int(message.get("size", 0))
        if len(self._bytes) < end + 1 + size:
            return {}, b""
        body = bytes(self._bytes[end + 1 : end + 1 + size])
        del self._bytes[: end + 1 + size]
        return message, body
