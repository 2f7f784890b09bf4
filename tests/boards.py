"""Boards to test with: TVM's tracker and servers as processes of this machine, and a tracker that only plays one."""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

from edgec.backends import targets
from edgec.backends.targets.tracker import Tracker

_MAGIC, _SUMMARY, _REQUEST = 0x2F271, 6, 4
#: Each ends with its listening thread, prints its port first, and is told the first port to try.
_TRACKER = """
import sys
from tvm.rpc.tracker import PopenTrackerServerState as Tracker
first = int(sys.argv[1])
tracker = Tracker("127.0.0.1", first, first + 50, silent=True)
print(tracker.port, flush=True)
tracker.thread.join()
"""
_SERVER = """
import sys
from tvm.rpc.server import PopenRPCServerState as Server
first, tracker, key = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
server = Server("127.0.0.1", first, first + 50, key=key, tracker_addr=("127.0.0.1", tracker), silent=True)
print(server.port, flush=True)
server.thread.join()
"""


def free_port():
    """Return a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Farm:
    """A tracker with servers. To be used as a context: no process is left behind."""

    def __enter__(self):
        self._processes = []
        self.port = self._start(_TRACKER)[1]
        return self

    def __exit__(self, *_):
        for process in self._processes:
            end(process)

    def serve(self, key):
        """Start a server and return its process, once the tracker knows it."""
        process, port = self._start(_SERVER, str(self.port), key)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            there = Tracker("127.0.0.1", self.port).boards().get(key)
            if there is not None and there.free and any(one.endswith(f":{port}") for one in there.servers):
                return process
            time.sleep(0.02)
        raise TimeoutError(f"the server with the key {key} did not come up")

    def url(self, key):
        return f"rpc://127.0.0.1:{self.port}/{key}"

    def _start(self, source, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", source, str(free_port()), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        return process, int(process.stdout.readline())


@contextmanager
def held(url):
    """Keep a board from others, and yield the session; it may be closed before."""
    session = targets.of(url).board.borrowed(60)
    try:
        yield session
    finally:
        session.close()


def end(process):
    """Kill a process with its children, as when a board loses its power."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@contextmanager
def pretended(servers, lends=()):
    """Play a tracker with servers, {key: [port, …]}; it lends those of `lends`, and yields its port.

    `servers` and `lends` may change meanwhile.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve(connection):
        with connection:
            connection.recv(4)
            connection.sendall(struct.pack("<i", _MAGIC))
            waits = False
            while not stop.is_set():
                if waits and lends:
                    _say(connection, [0, lends[0]])
                    waits = False
                if not select.select([connection], [], [], 0.02)[0]:
                    continue
                head = connection.recv(4)
                if len(head) < 4:
                    return
                code = json.loads(connection.recv(struct.unpack("<i", head)[0]))[0]
                waits = code == _REQUEST
                if code == _SUMMARY:
                    info = [{"key": f"server:{k}", "addr": ["10.0.0.1", p]} for k, ps in servers.items() for p in ps]
                    queue = {k: {"free": len(ps) - 1, "pending": 2} for k, ps in servers.items()}
                    _say(connection, [0, {"queue_info": queue, "server_info": info}])

    def accept():
        while not stop.is_set():
            if select.select([listener], [], [], 0.02)[0]:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        listener.close()


def _say(connection, message):
    text = json.dumps(message).encode()
    connection.sendall(struct.pack("<i", len(text)) + text)
