"""A table as data: a heading for each column, cells of text, notes beneath."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A heading; numbers stand on the right and are never wrapped."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table; `strong` is the row to point out, `notes` are the sentences beneath."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    strong: int | None = None


def columns(*titles: str) -> tuple[Column, ...]:
    """Columns from their headings; a leading # marks numbers."""
    return tuple(Column(t.removeprefix("#"), t.startswith("#")) for t in titles)
