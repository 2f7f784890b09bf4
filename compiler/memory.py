"""What took long to measure, kept between compiles under keys made of contents: one SQLite file in the user's cache.

A context is all that a family of numbers depends on (`context`); an item says which of them. Every number is written
as soon as it is known, so a compile that is interrupted, or ends with its time budget, goes on from there when it is
run again. A file that is damaged, locked or cannot be written costs the measurement and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from .._version import __version__
from . import devices

if TYPE_CHECKING:
    from ..calib.folder import Folder

logger = logging.getLogger(__name__)

#: Changes when the meaning of what is stored does.
_FORMAT = 2
_TABLE = "CREATE TABLE IF NOT EXISTS measured (context TEXT, item TEXT, value TEXT, PRIMARY KEY (context, item))"


def path() -> Path:
    """Return where measurements are kept: the user's cache folder (XDG_CACHE_HOME where it is set)."""
    return Path(platformdirs.user_cache_dir("edgec")) / "measured.sqlite"


def context(kind: str, **parts: object) -> str:
    """Return the key, 64 hex digits, of numbers of a kind that depend on the parts, edgec and ONNX Runtime."""
    whole = {"format": _FORMAT, "kind": kind, "edgec": __version__, "onnxruntime": metadata.version("onnxruntime")}
    return hashlib.sha256(json.dumps(whole | parts, sort_keys=True).encode()).hexdigest()


def of_images(images: Folder) -> dict[str, object]:
    """Return what numbers depend on that come from these images."""
    pre = None if images.pre is None else {k: v for k, v in dataclasses.asdict(images.pre).items() if k != "assumed"}
    return {"images": images.manifest(), "preprocess": pre}


def of_machine(threads: int) -> dict[str, object]:
    """Return what latencies depend on beside the model: this very machine, its CPU, and the threads in use."""
    here = devices.local_profile()
    machine = [platform.node(), platform.platform(), here.title, *here.features]
    return {"machine": machine, "cores": os.cpu_count(), "threads": threads}


class Memory:
    """The numbers of one context, by item; values are what JSON can hold. `misses` counts what was unknown."""

    def __init__(self, key: str, file: Path | None = None) -> None:
        """Open `file` (the user's where None); what cannot be opened remembers nothing."""
        self._key, self._file, self.misses = key, file or path(), 0
        self._connection: sqlite3.Connection | None = None
        try:
            self._open()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _open(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = _connect(self._file)
        except sqlite3.OperationalError:  # locked, or no place to write: not damaged
            raise
        except sqlite3.DatabaseError as error:
            logger.warning("%s is damaged and is made anew: %s", self._file, error)
            self._file.unlink()
            self._connection = _connect(self._file)

    def get(self, item: str) -> Any:
        """Return what is known of the item; None where nothing is."""
        row = self._execute("SELECT value FROM measured WHERE context = ? AND item = ?", self._key, item)
        if row is None:
            self.misses += 1
            return None
        return json.loads(row[0])

    def put(self, item: str, value: object) -> None:
        """Keep the item's value; it is on disk when this returns."""
        self._execute("INSERT OR REPLACE INTO measured VALUES (?, ?, ?)", self._key, item, json.dumps(value))

    def close(self) -> None:
        """Let go of the file; nothing is known or kept any more."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _execute(self, statement: str, *values: str) -> tuple[str] | None:
        if self._connection is None:
            return None
        try:
            row: tuple[str] | None = self._connection.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return row

    def _give_up(self, error: Exception) -> None:
        logger.warning("measurements are not kept for the next time: %s", error)
        self.close()


def _connect(file: Path) -> sqlite3.Connection:
    """Return a connection that commits each statement by itself; a power cut may cost the file, a kill nothing."""
    connection = sqlite3.connect(file, timeout=5.0, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_TABLE)
    except BaseException:
        connection.close()
        raise
    return connection
