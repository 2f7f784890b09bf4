"""How facts of a device are read: files under a root, programs that may be missing, hang or refuse.

Nothing here raises but Unread, which says in words why something could not be read. All paths go through `root`, so
that a folder can stand for a device.
"""

import glob
import os
import re
import shutil
import signal
import subprocess
from typing import Dict, List, Optional, Sequence

#: Seconds that a program has to answer in; `nvidia-smi` takes some where no driver is kept loaded.
PATIENCE = 15.0


class Unread(Exception):
    """Something could not be read; its text is the reason."""


def under(root: str, path: str) -> str:
    """Return where an absolute path lies under a root."""
    return os.path.join(root, path.lstrip("/"))


def text(root: str, path: str) -> str:
    """Return a small file's text, without the zeros of device trees, stripped. Unread where it cannot be read."""
    try:
        with open(under(root, path), "rb") as file:
            return file.read().decode("utf-8", "replace").strip("\0 \n\t")
    except OSError as error:
        raise Unread("%s: %s" % (path, error.strerror or error)) from error


def maybe(root: str, path: str) -> Optional[str]:
    """Return a small file's text, None where it cannot be read or is empty."""
    try:
        return text(root, path) or None
    except Unread:
        return None


def number(root: str, path: str) -> Optional[int]:
    """Return the number that a file begins with, None where it cannot be read; L4T 32 writes some with their unit."""
    found = re.match(r"-?\d+", maybe(root, path) or "")
    return int(found.group()) if found else None


def paths(root: str, pattern: str) -> List[str]:
    """Return the absolute paths (as seen from the root) that match a pattern, in the order of their numbers."""
    prefix = root.rstrip("/")
    found = glob.glob(under(glob.escape(root), pattern))
    return sorted((path[len(prefix) :] for path in found), key=_numbers)


def _numbers(path: str) -> List[object]:
    return [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def said(command: Sequence[str], patience: float = PATIENCE) -> str:
    """Return what a program prints. Unread where it is missing, fails or takes longer than `patience` seconds."""
    name = os.path.basename(command[0])
    program = shutil.which(command[0])
    if program is None:
        raise Unread("%s is not on the PATH" % name)
    # the words of programs are matched below: they shall be English ones
    environment = dict(os.environ, LC_ALL="C")
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            [program] + list(command[1:]),
            stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, cwd="/", env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise Unread("%s cannot be started: %s" % (name, error.strerror or error)) from error
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        # what it started holds the pipes, too
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Unread("%s did not answer in %g s" % (name, patience)) from None
    output, errors = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
    if process.returncode != 0:
        raise Unread("%s: %s" % (name, _reason(output + "\n" + errors, process.returncode)))
    return output


def _reason(told: str, code: int) -> str:
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    if code < 0:
        return "ended by signal %d" % -code
    return lines[-1][:200] if lines else "exit code %d" % code


def table(command: str, fields: Sequence[str], patience: float = PATIENCE) -> List[Dict[str, Optional[str]]]:
    """Return what `nvidia-smi` answers to a query, one dictionary a line; None for fields that it does not know.

    `command` is the query's name: gpu or compute-apps. Unread where nvidia-smi is missing or refuses a field.
    """
    asked = "--query-%s=%s" % (command, ",".join(fields))
    lines = said(["nvidia-smi", asked, "--format=csv,noheader,nounits"], patience).splitlines()
    found = []
    for line in lines:
        cells = [cell.strip() for cell in line.split(", ")]
        if len(cells) == len(fields):
            found.append({name: _known(cell) for name, cell in zip(fields, cells)})
    return found


def _known(cell: str) -> Optional[str]:
    # "[N/A]", "[Not Supported]", "N/A", "[Unknown Error]": whatever stands in brackets is no value
    return None if not cell or cell.startswith("[") or cell == "N/A" else cell


def numeric(cell: Optional[str]) -> Optional[float]:
    """Return a cell of such a table as a number, None where it is none."""
    try:
        return float(cell) if cell is not None else None
    except ValueError:
        return None
