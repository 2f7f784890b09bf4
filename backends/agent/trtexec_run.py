"""trtexec as a process: where it is, which version, and one run of it.

It prints information on stdout and errors on stderr; both are read as one, in their order. Its working folder is one
of ours, so that the names of files in its arguments are plain: it splits lists at commas and names at colons.
"""

import os
import shutil
import subprocess
import tempfile
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

from . import trtexec_faults, trtexec_output
from .faults import Fault

#: Where a Jetson, and NVIDIA's packages for desktops, keep it; it is not on the PATH there.
PLACES = ("/usr/src/tensorrt/bin/trtexec",)


class Ran(NamedTuple):
    """How a run ended: its exit code (negative for a signal), all that it printed, and what that says."""

    code: int
    text: str
    said: trtexec_output.Console

    @property
    def failed(self) -> bool:
        """Whether it failed: by its exit code, or by its own word."""
        return self.code != 0 or self.said.verdict == "FAILED"


class Device(NamedTuple):
    """What trtexec says of itself and of the GPU: memory in MiB, None where it is not told."""

    version: Tuple[int, ...]
    capability: Tuple[int, int]
    name: str
    memory: Optional[int]


def find() -> Optional[str]:
    """Return the path of trtexec: the one on the PATH, or where NVIDIA puts it; None where there is none."""
    found = shutil.which("trtexec")
    if found:
        return os.path.abspath(found)
    return next((path for path in PLACES if os.access(path, os.X_OK)), None)


def version(binary: str) -> Tuple[int, ...]:
    """Return trtexec's version, (8, 2, 1), from the first line of its help. Fault where it does not tell."""
    ran = run([binary, "--help"], tempfile.gettempdir())
    if not ran.said.version:
        raise trtexec_faults.run_fault(ran.said, ran.code, "telling its version")
    return ran.said.version


def device(binary: str) -> Device:
    """Return version and GPU. Fault where trtexec finds no GPU.

    It tells the GPU before it opens anything, so an engine that is not there is asked for: that is the quickest run.
    """
    with tempfile.TemporaryDirectory(prefix="trtexec-") as folder:
        ran = run([binary, "--loadEngine=none.engine"], folder)
    if not ran.said.version or ran.said.capability is None:
        raise trtexec_faults.run_fault(ran.said, ran.code, "looking for the GPU")
    size = ran.said.device.get("Device Global Memory", "").split(" ")[0]
    return Device(
        version=ran.said.version,
        capability=ran.said.capability,
        name=ran.said.device.get("Selected Device", "unknown"),
        memory=int(size) if size.isdigit() else None,
    )


def run(command: Sequence[str], folder: str, heard: Optional[Callable[[str], None]] = None) -> Ran:
    """Run trtexec in a folder to its end; `heard` is given each line as it comes. Fault where it cannot be started.

    It ends with whoever waits for it: an exception here, one of `heard` as well, kills it.
    """
    lines: List[str] = []
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise Fault("%s cannot be started: %s" % (command[0], error.strerror or error)) from None
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if heard is not None:
                heard(line)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    text = "".join(lines)
    return Ran(code, text, trtexec_output.console(text))


def shape_spec(flag: str, shapes: Sequence[Tuple[str, Sequence[int]]]) -> str:
    """Return a flag with shapes by name: "--shapes=a:1x3x8x8,b:1x4". Fault for a name that it cannot carry."""
    return "%s=%s" % (flag, ",".join("%s:%s" % (plain(name), "x".join(map(str, shape))) for name, shape in shapes))


def plain(name: str) -> str:
    """Return a tensor's name. Fault where trtexec would split it: it knows no way to write such a name."""
    if "," in name or "'" in name:
        raise Fault("trtexec cannot be told of input %r: its name has a comma or a quote" % name, "rename the input")
    return name
