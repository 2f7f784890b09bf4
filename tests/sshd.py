"""A real sshd on loopback, with keys, configuration and temporary folder of its own, behind a line that can break.

`ssh -F <its client's configuration>` reaches it as the host `device`; python3 there is the one that runs the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None)
#: Why tests that need it are skipped; None where they run.
MISSING = None if SSHD and shutil.which("ssh-keygen") else "no sshd here: apt-get install openssh-server"


class Line:
    """A TCP line to a port, which tests cut, stall and slow down. `port` is its own end."""

    def __init__(self, to: int) -> None:
        self.to, self.bytes_per_second = to, float("inf")
        self.stalled, self.refused = threading.Event(), threading.Event()
        self.carried = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.refused.is_set():
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.to))
                self._sockets += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while some := a.recv(1 << 14):
                while self.stalled.is_set():
                    time.sleep(0.02)
                b.sendall(some)
                self.carried += len(some)
                time.sleep(len(some) / self.bytes_per_second)
        for one in (a, b):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Sshd:
    """The server, its line, its temporary folder, and the client's configuration."""

    def __init__(self, folder: Path, *, before: str = "", python: str = sys.executable) -> None:
        self.folder, self.tmp = folder, folder / "tmp"
        self.tmp.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        if python:
            script = self.bin / "python3"
            script.write_text(f'#!/bin/sh\nexec "{python}" "$@"\n')
            script.chmod(0o755)
        for name in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        shutil.copy(folder / "user.pub", folder / "authorized")
        self.port = _free_port()
        self.line = Line(self.port)
        path = f"{self.bin}:/usr/bin:/bin" if python else str(self.bin)
        force = folder / "force.sh"
        own = f'PATH="{path}" TMPDIR="{self.tmp}"\nexport PATH TMPDIR'
        force.write_text(f'{before}\n{own}\neval "$SSH_ORIGINAL_COMMAND"\n')
        self.config = folder / "sshd_config"
        self.config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\n"
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
            f"StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"MaxStartups 100\nMaxSessions 100\nForceCommand /bin/sh {force}\n"
        )
        self.known, self.client = folder / "known_hosts", folder / "ssh_config"
        self.trust()
        self.client.write_text(
            f"Host device\n  HostName 127.0.0.1\n  HostKeyAlias device\n  Port {self.line.port}\n"
            f"  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.known}\n  GlobalKnownHostsFile /dev/null\n"
        )
        self.process = self._start()

    @property
    def command(self) -> str:
        """What EDGEC_SSH shall be."""
        return f"ssh -F {self.client}"

    def trust(self) -> None:
        """Let known_hosts have the server's key."""
        kind, key, *_ = (self.folder / "host.pub").read_text().split()
        self.known.write_text(f"device {kind} {key}\n")

    def left(self) -> list[str]:
        """What is in the device's temporary folder, the lock file aside."""
        return sorted(p.name for p in self.tmp.iterdir() if p.suffix != ".lock")

    def gone(self, seconds: float = 10.0) -> bool:
        """Wait until nothing is left there."""
        end = time.monotonic() + seconds
        while self.left() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.left()

    def close(self) -> None:
        self.line.close()
        self.process.terminate()
        self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        if os.getuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # where it separates its privileges
        log = (self.folder / "sshd.log").open("wb")
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(self.config)], stderr=log)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return process
            time.sleep(0.05)
        raise RuntimeError((self.folder / "sshd.log").read_text())


@contextlib.contextmanager
def running(folder: Path, **how: str) -> Iterator[Sshd]:
    """Run one for a while."""
    server = Sshd(folder, **how)
    try:
        yield server
    finally:
        server.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
