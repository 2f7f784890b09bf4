"""Files and folders that appear whole or not at all: written under a temporary name, then renamed.

What the operating system refuses (disk full, no permission, a file where a folder should be) is an
OutputError; after any exception, Ctrl-C included, nothing of the attempt is left. A temporary name starts
with a dot and ends in `.part`: only a killed process or a power cut can leave one behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError

#: What marks a folder as a bundle of ours, and so as one that `force` may replace.
MANIFEST = "manifest.json"

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this file system or limit allows",
}


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path`, replacing what is there, when the block ends well.

    Missing parent folders are made. Raises OutputError where the file cannot be written.
    """
    with _refusals_named(path), _parents_of(path):
        part = _temporary(path)
        try:
            with part.open("xb") as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, whole or not at all. Raises OutputError."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def staged_folder(out: Path, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside `out` that is renamed to `out` when the block ends without an exception.

    Missing parent folders are made, and removed again on failure. An `out` that exists is refused, unless
    `force` is set and it is an empty folder or a bundle: then it is put aside while the new one takes its
    place, and deleted after that. Raises OutputError.
    """
    out = Path(os.path.realpath(out))  # a link to a folder stays, and its target is replaced
    _check_free(out, force)
    with contextlib.ExitStack() as cleanup:
        with _refusals_named(out):
            cleanup.enter_context(_parents_of(out))
            stage = _temporary(out)
            cleanup.callback(shutil.rmtree, stage, ignore_errors=True)
            stage.mkdir()
        with _refusals_named(out, only=_FULL):
            yield stage
        _check_free(out, force)
        with _refusals_named(out):
            _publish(stage, out)


def _publish(stage: Path, out: Path) -> None:
    """Rename `stage` to `out`; what was there is put aside first, put back on failure, deleted on success."""
    if not out.exists():
        stage.rename(out)
        return
    aside = _temporary(out)
    try:
        out.rename(aside)
        stage.rename(out)
    except BaseException:  # Ctrl-C between the two renames must not lose the old bundle either
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _check_free(out: Path, force: bool) -> None:
    """Raise OutputError if `out` exists and may not be replaced."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError("is a file, not a folder", where=str(out), fix="name another folder")
    if not force:
        fix = "name another folder, or pass --force to replace this one"
        raise OutputError("exists already", where=str(out), fix=fix)
    with _refusals_named(out):
        if any(out.iterdir()) and not (out / MANIFEST).is_file():
            what = f"holds files but no {MANIFEST}, so it is not a bundle, and --force will not delete it"
            raise OutputError(what, where=str(out), fix="name another folder, or remove this one yourself")


@contextlib.contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the missing parent folders of `path`; on an exception remove those that were made."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # another process may have put something there meanwhile
            for folder in missing:
                folder.rmdir()
        raise


@contextlib.contextmanager
def _refusals_named(path: Path, only: dict[int, str] | None = None) -> Iterator[None]:
    """Turn an OSError (of the numbers in `only`, if given) into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        full = _FULL.get(error.errno or 0)
        what = full or f"cannot be written: {error.strerror or error}"
        fix = "free some space, or name another disk" if full else "name a place that you may write to"
        raise OutputError(what, where=str(path), fix=fix) from error


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that nothing has: same folder, so that a rename is enough."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.part")
