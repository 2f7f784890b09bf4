"""The report on a terminal: the headline, then aligned tables. Plain text where the console has no colours.

Nothing here decides or computes: tables.py says what is shown, this file where. Names from models are never
read as rich's markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from . import facts, tables, text, tool_tables

if TYPE_CHECKING:
    from rich.console import Console

    from ..inspection import Inspection
    from ..types import DeviceProfile, Fidelity, Measurement, Report

#: How many nodes of each rule are named without --why.
NAMED = 2


def render(report: Report, console: Console) -> None:
    """Print the whole report: what you got, what it is based on, what to do next."""
    console.print(Text(text.clean(report.headline) or text.headline(report), "bold"), soft_wrap=False)
    _table(tables.latency(report), console)
    _table(tables.quality(report.fidelity, report.budget), console)
    _table(tables.outputs(report.fidelity), console, optional=True)
    if len(report.attempts) > 1:
        _table(tables.attempts(report.attempts), console)
    _table(tables.passes(report.passes), console, optional=True)
    _table(tables.refusals(report, NAMED), console, optional=True)
    console.print()
    _pairs((*facts.layers(report), *facts.of_report(report)), console)
    if report.warnings or report.advice:
        console.print()
    for line in report.warnings:
        _pair("warning", line, console, "yellow")
    for line in report.advice:
        _pair("advice", line, console, "cyan")


def render_layers(found: Report | Inspection, console: Console) -> None:
    """Print one row a layer: precision, range, scale, its own error, MACs."""
    _table(tables.layers(found.layers), console)


def render_why(report: Report, console: Console) -> None:
    """Print every node that was left as it was, by rule, with the reason."""
    _table(tables.refusals(report), console)


def render_measurements(found: Sequence[Measurement], console: Console) -> None:
    """Print what bench measured; speed-ups are against the last one."""
    _table(tool_tables.measurements(found), console)


def render_operators(found: Iterable[tool_tables.OperatorTime], console: Console) -> None:
    """Print where the time of a call goes, operator by operator."""
    _table(tool_tables.operators(found), console)


def render_fidelity(fidelity: Fidelity, console: Console) -> None:
    """Print how well a model does the original's job."""
    _table(tables.quality(fidelity), console)
    _table(tables.outputs(fidelity), console, optional=True)


def render_inspection(found: Inspection, console: Console) -> None:
    """Print an ONNX file at a glance."""
    console.print(Text(text.clean(found.path), "bold"))
    _pairs(facts.of_inspection(found), console)
    _table(tables.layers(found.layers), console)


def render_comparison(summaries: Sequence[Mapping[str, object]], console: Console) -> None:
    """Print `serial.summary` of several reports or files side by side."""
    _table(tool_tables.comparison(summaries), console)


def render_devices(profiles: Iterable[DeviceProfile], console: Console) -> None:
    """Print one row a device."""
    _table(tool_tables.devices(profiles), console)


def render_device(profile: DeviceProfile, console: Console) -> None:
    """Print a device, each number with its source."""
    table = tool_tables.device(profile)
    console.print(Text(table.title, "bold"))
    _pairs(facts.of_device(profile), console)
    _body(table, console)


def render_findings(found: Iterable[tool_tables.Finding], console: Console) -> None:
    """Print what doctor found, and how to mend what is amiss."""
    _body(tool_tables.findings(found), console)


# --------------------------------------------------------------------------------------------- setting


def _table(table: tables.Table, console: Console, *, optional: bool = False) -> None:
    """Print a titled table; an empty one is left out where it is `optional`."""
    if optional and not table.rows:
        return
    console.print()
    console.print(Text(table.title, "bold"))
    _body(table, console)


def _body(table: tables.Table, console: Console) -> None:
    if table.rows:
        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in table.columns:
            justify = "right" if column.number else "left"
            grid.add_column(Text(column.title), justify=justify, no_wrap=column.number, overflow="fold")  # type: ignore[arg-type]
        for i, row in enumerate(table.rows):
            grid.add_row(*(Text(cell, "bold" if i == table.strong else "") for cell in row))
        console.print(Padding(grid, (0, 0, 0, 2), expand=False))
    for note in table.notes:
        console.print(Padding(Text(note, "dim"), (0, 0, 0, 2), expand=False))


def _pairs(pairs: Iterable[tuple[str, str]], console: Console) -> None:
    for label, line in pairs:
        _pair(label, line, console, "dim")


def _pair(label: str, line: str, console: Console, style: str) -> None:
    """Print a label and its text, wrapped beneath itself."""
    grid = Grid(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(width=max(13, len(label)), no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label, style), Text(text.clean(line)))
    console.print(grid)
