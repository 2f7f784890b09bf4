"""What a device told beside its latencies: copies, throughput, energy, engines, and what disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..types import Measurement, OnDevice, Report
from . import text
from .grid import Table, columns

#: Heading, the figure, and its digits; a column without any figure is left out.
_FIGURES: tuple[tuple[str, Callable[[OnDevice], float | None]], ...] = (
    ("#with copies, ms", lambda d: d.with_copies_ms),
    ("#calls/s", lambda d: d.throughput),
    ("#mJ a call", lambda d: None if d.joules is None else 1e3 * d.joules),
    ("#W", lambda d: d.watts),
)


def on_device(rows: Sequence[tuple[str, Measurement]]) -> Table:
    """One row for each measurement that a device told more of; no rows where none did."""
    told = [(name, m.on_device) for name, m in rows if m.on_device is not None]
    figures = [(title, get) for title, get in _FIGURES if any(get(d) is not None for _, d in told)]
    titles = columns("", *(title for title, _ in figures))
    cells = tuple((text.clean(name), *(_figure(get(d)) for _, get in figures)) for name, d in told)
    return Table("Beside the latency", titles, cells if figures else (), _notes(told))


def _figure(value: float | None) -> str:
    return text.MISSING if value is None else text.significant(value)


def of_report(report: Report) -> Table:
    """That table for all attempts of a report, or where there is none for its result."""
    rows = [(a.name, a.measurement) for a in report.attempts] or [("result", report.result)]
    return on_device(rows)


def _notes(told: Sequence[tuple[str, OnDevice]]) -> tuple[str, ...]:
    engines = [f"{text.clean(name)}: {d.engine}" for name, d in told if d.engine]
    builds = [f"{text.clean(name)}: built anew, its median is {_spread(d)}" for name, d in told if d.builds_ms]
    rails = sorted({d.rail for _, d in told if d.rail})
    powers = [f"energy and power are those of the sensor {rail}" for rail in rails]
    return (*engines, *builds, *powers, *dict.fromkeys(note for _, d in told for note in d.notes))


def _spread(told: OnDevice) -> str:
    return ", ".join(text.ms(ms) for ms in told.builds_ms)
