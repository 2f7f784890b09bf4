"""TVM's RPC tracker, which lends boards: what is connected to it, and waiting for one.

The protocol is that of tvm.rpc.tracker: a magic number each way, then JSON behind its length in bytes (int32, little
endian). It is spoken here with the standard library alone: so a wait can be watched and broken off, `edgec doctor`
needs no TVM, and nothing is tried again for a minute as TVM's own client does.
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ...compiler.errors import UnavailableError
from ...compiler.types import Progress, silent

#: The tracker's and the servers' magic numbers, and the tracker's codes.
_MAGIC, SERVER_MAGIC = 0x2F271, 0xFF271
_SUCCESS, _REQUEST, _SUMMARY = 0, 4, 6
#: Seconds that a connection and each answer may take.
CONNECT = 5.0
#: Seconds after which a key that nobody serves any more is given up: a server that is started again needs some.
_GONE = 20.0
#: Seconds that are waited for a board at most.
_LONGEST = 3600.0
START = "python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190"


@dataclass(frozen=True)
class Boards:
    """The boards behind one key: addresses of their servers, how many are free, and how many compiles wait for one."""

    servers: tuple[str, ...]
    free: int
    waiting: int

    @property
    def busy(self) -> int:
        """How many are at work."""
        return max(len(self.servers) - self.free, 0)


@dataclass(frozen=True)
class Lent:
    """A board's server, and the word that it expects from whom it was lent to."""

    host: str
    port: int
    word: str

    def addresses(self) -> list[tuple[str, int]]:
        """Return the addresses that the host has. OSError where its name is not known."""
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return [(str(address[0]), int(address[1])) for *_, address in found]


@dataclass(frozen=True)
class Tracker:
    """A tracker by its address."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return host:port as URLs have it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def boards(self) -> dict[str, Boards]:
        """Return what is connected, by key. UnavailableError where no tracker answers."""
        with self._connected() as connection:
            _send(connection, [_SUMMARY])
            said = self._answer(connection)
        servers: dict[str, list[str]] = {}
        for one in said["server_info"]:
            host, port = one["addr"]
            servers.setdefault(one["key"].partition(":")[2], []).append(f"{host}:{port}")
        queues = {key: said["queue_info"].get(key, {}) for key in servers}
        return {
            key: Boards(tuple(sorted(servers[key])), queue.get("free", 0), queue.get("pending", 0))
            for key, queue in sorted(queues.items())
        }

    def borrow(self, key: str, progress: Progress = silent) -> Lent:
        """Wait until a board with this key is free, and return it.

        UnavailableError where nobody serves the key for a while, where none is free for an hour, and where the tracker
        is gone.
        """
        start = served = time.monotonic()
        with self._connected() as connection:
            _send(connection, [_REQUEST, key, "", 1])
            while not select.select([connection], [], [], 1.0)[0]:
                now = time.monotonic()
                progress("waiting for a board", int(now - start), None)
                served = now if key in self.boards() else served
                if now - served > _GONE:
                    self.refuse(key, self.boards())
                if now - start > _LONGEST:
                    why = f"no board became free in {round(_LONGEST / 60)} minutes"
                    raise UnavailableError(why, where=f"rpc://{self}/{key}", fix="connect more boards with this key")
            host, port, word = self._answer(connection)
        return Lent(str(host), int(port), str(word))

    def refuse(self, key: str, there: dict[str, Boards]) -> None:
        """Raise UnavailableError for a key that nobody serves, with the keys that are served."""
        if key in there:
            return
        keys = ", ".join(there)
        what = f"no board is connected with the key {key!r}, " + (f"but there are: {keys}" if keys else "nor any other")
        fix = f"on the board: python -m tvm.exec.rpc_server --tracker {self} --key {key}"
        raise UnavailableError(what, where=f"rpc://{self}/{key}", fix=f"use one of them, or {fix}" if keys else fix)

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        """Connect and shake hands. UnavailableError says what went wrong, also of what is done meanwhile."""
        try:
            with socket.create_connection((self.host, self.port), timeout=CONNECT) as connection:
                self._shake_hands(connection)
                yield connection
        except socket.gaierror as error:
            raise self._missing("this host name is not known", "check the name, or give its address") from error
        except TimeoutError as error:
            raise self._missing(f"no RPC tracker answers within {CONNECT:g} s", self._help()) from error
        except OSError as error:
            why = error.strerror or str(error)
            raise self._missing(f"no RPC tracker answers ({why})", self._help()) from error

    def _shake_hands(self, connection: socket.socket) -> None:
        try:
            connection.sendall(struct.pack("<i", _MAGIC))
            (magic,) = struct.unpack("<i", _receive(connection, 4))
        except ConnectionError as error:
            raise self._stranger() from error
        if magic != _MAGIC:
            raise self._stranger()

    def _answer(self, connection: socket.socket) -> Any:
        (size,) = struct.unpack("<i", _receive(connection, 4))
        try:
            code, value = json.loads(_receive(connection, size))
        except (ValueError, TypeError) as error:
            raise self._stranger() from error
        if code != _SUCCESS:
            raise self._missing(f"the RPC tracker refuses: {value}", "look at what it printed")
        return value

    def _missing(self, what: str, fix: str) -> UnavailableError:
        return UnavailableError(what, where=f"rpc://{self}", fix=fix)

    def _stranger(self) -> UnavailableError:
        fix = "give the tracker's address and port, not a server's; a tracker's port is 9190 unless told otherwise"
        return self._missing("what listens there is no RPC tracker", fix)

    def _help(self) -> str:
        return f"start one there: {START}; or check host, port and firewall"


def knock(lent: Lent) -> None:
    """See that a board's server can be reached from here, which TVM's client would try for minutes. OSError if not.

    The server is given a number that is not its magic: it hangs up, and goes on to listen.
    """
    with socket.create_connection((lent.host, lent.port), timeout=CONNECT) as connection:
        connection.sendall(struct.pack("<i", 0))
        connection.recv(1)


def hang_up(lent: Lent) -> None:
    """Break off what this process has to do with a board's server, also what waits for it in another thread.

    TVM does not give its sockets away, and what frees an object of a board's waits for the call that is under way.
    """
    for number in _open_files():
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as one:
                if one.getpeername()[:2] in lent.addresses():
                    one.shutdown(socket.SHUT_RDWR)


def _open_files() -> list[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    return []


def _send(connection: socket.socket, message: object) -> None:
    text = json.dumps(message).encode()
    connection.sendall(struct.pack("<i", len(text)) + text)


def _receive(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(min(size - len(found), 1 << 16))
        if not part:
            raise ConnectionResetError("it hung up")
        found += part
    return found
