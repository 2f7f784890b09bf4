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

from . import (
    device_tables,
    facts,
    layer_tables,
    low_rank_tables,
    pruning_tables,
    robust_tables,
    robustness_table,
    tables,
    text,
    tool_tables,
)
from .grid import Table

if TYPE_CHECKING:
    from rich.console import Console

    from ...backends.ort import OperatorTime
    from ..findings import Finding
    from ..types import DeviceProfile, Fidelity, Inspection, Measurement, Report, Robustness

#: How many nodes of each rule are named without --why.
NAMED = 2
#: How many layers of a cut network are listed.
CUT = 24
#: Widths in characters: what counts as a name and is kept whole, the least for a sentence, a label's column.
NAME, SENTENCE, LABEL = 28, 16, 13


def render(report: Report, console: Console) -> None:
    """Print the whole report: what you got, what it is based on, what to do next."""
    console.print(Text(text.clean(report.headline) or text.headline(report), "bold"))
    _pairs([("warning", line) for line in report.warnings], console, "yellow")
    shown = [
        tables.latency(report),
        device_tables.of_report(report),
        tables.quality(report.fidelity, report.budget),
        tables.outputs(report.fidelity),
        tables.attempts(report.attempts if len(report.attempts) > 1 else ()),
        *pruning_tables.tables(report, CUT),
        *low_rank_tables.tables(report, CUT),
        tables.predictions(report.attempts),
        tables.steps(report.steps),
        *robust_tables.tables(report.robust),
        layer_tables.sources(report),
        tables.passes(report.passes),
        tables.refusals(report, NAMED),
    ]
    for table in shown:
        if table.rows or table.notes:
            console.print()
            _table(table, console)
    console.print()
    _pairs((*facts.layers(report), *facts.of_report(report)), console)
    if report.advice:
        console.print()
    _pairs([("advice", line) for line in report.advice], console, "cyan")


def render_layers(found: Report | Inspection, console: Console) -> None:
    """Print one row a layer: precision, scale, clipping, its SQNRs, its share of the error, MACs."""
    _table(layer_tables.layers(found.layers), console)


def render_why(report: Report, console: Console) -> None:
    """Print every node that was left as it was, by rule, with the reason."""
    _table(tables.refusals(report), console)


def render_measurements(found: Sequence[Measurement], console: Console) -> None:
    """Print what bench measured; speed-ups are against the last one."""
    _table(tool_tables.measurements(found), console)
    more = device_tables.on_device([(m.name, m) for m in found])
    if more.rows or more.notes:
        console.print()
        _table(more, console)


def render_operators(found: Sequence[OperatorTime], console: Console) -> None:
    """Print where the time of a call goes, operator by operator."""
    console.print()
    _table(tool_tables.operators(found), console)


def render_fidelity(fidelity: Fidelity, console: Console) -> None:
    """Print how well a model does the original's job."""
    _table(tables.quality(fidelity), console)
    if fidelity.outputs:
        console.print()
        _table(tables.outputs(fidelity), console)


def render_robustness(found: Robustness, console: Console) -> None:
    """Print how well a model does the original's job under each condition, and the original its own."""
    headline = robustness_table.headline(found)
    if headline:
        console.print(Text(headline, "bold"))
        console.print()
    _table(robustness_table.robustness(found), console)
    precision = robustness_table.precision(found)
    if precision.rows:
        console.print()
        _table(precision, console)


def render_inspection(found: Inspection, console: Console) -> None:
    """Print an ONNX file at a glance."""
    console.print(Text(text.clean(found.path), "bold"))
    _pairs(facts.of_inspection(found), console)
    console.print()
    _table(layer_tables.layers(found.layers), console)


def render_comparison(summaries: Sequence[Mapping[str, object]], console: Console) -> None:
    """Print `serial.summary` of several reports or files side by side."""
    _table(tool_tables.comparison(summaries), console)


def render_devices(profiles: Iterable[DeviceProfile], console: Console) -> None:
    """Print one row a device."""
    _table(tool_tables.devices(profiles), console)


def render_device(profile: DeviceProfile, console: Console) -> None:
    """Print a device, each number with its source."""
    console.print(Text(f"{text.clean(profile.title)} ({text.clean(profile.name)})", "bold"))
    _pairs(facts.of_device(profile), console)
    console.print()
    _table(tool_tables.device(profile), console)


def render_findings(found: Iterable[Finding], console: Console, title: str = "This machine") -> None:
    """Print what doctor found, and how to mend what is amiss."""
    _table(tool_tables.findings(found, title), console)


# --------------------------------------------------------------------------------------------- setting


def _table(table: Table, console: Console) -> None:
    """Print a table with its title above and its notes beneath, two columns indented."""
    console.print(Text(table.title, "bold"))
    if table.rows:
        console.print(Padding(_grid(table, console.width - 2), (0, 0, 0, 2), expand=False))
    for note in table.notes:
        console.print(Padding(Text(note, "dim"), (0, 0, 0, 2), expand=False))


def _grid(table: Table, width: int) -> Grid:
    """Lay out the rows: numbers and names whole, sentences wrapped, the gaps narrower where it is tight."""
    cells = zip(*([c.title for c in table.columns], *table.rows), strict=True)
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in cells]
    whole = [c.number or w <= NAME for c, w in zip(table.columns, widths, strict=True)]
    least = sum(w if keep else SENTENCE for w, keep in zip(widths, whole, strict=True))
    gap = 2 if least + 2 * (len(widths) - 1) <= width else 1
    fits = least + gap * (len(widths) - 1) <= width
    grid = Grid(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    for column, keep in zip(table.columns, whole, strict=True):
        no_wrap = column.number or (keep and fits)
        grid.add_column(
            Text(column.title), justify="right" if column.number else "left", no_wrap=no_wrap, overflow="fold"
        )
    for i, row in enumerate(table.rows):
        grid.add_row(*(Text(cell, "bold" if i == table.strong else "") for cell in row))
    return grid


def _pairs(pairs: Iterable[tuple[str, str]], console: Console, style: str = "dim") -> None:
    """Print labels and their texts, each wrapped beneath itself."""
    rows = list(pairs)
    grid = Grid(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(width=max([LABEL, *(len(label) for label, _ in rows)]), no_wrap=True)
    grid.add_column(overflow="fold")
    for label, line in rows:
        grid.add_row(Text(label, style), Text(text.clean(line)))
    if rows:
        console.print(grid)
