"""What `inspect`, `eval` and `bench` print: which view of which object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import files
from .errors import DataError
from .report import serial, terminal
from .types import Fidelity, Inspection, Measurement, Report, Robustness

if TYPE_CHECKING:
    from rich.console import Console

    from ..backends.ort import OperatorTime


def inspect(
    found: Report | Inspection,
    other: Report | Inspection | None,
    console: Console,
    *,
    layers: bool,
    why: bool,
    html: Path | None,
    as_json: bool,
    names: Sequence[str] = (),
) -> None:
    """Show a report or an inspection, one or two of a kind, in the form that was asked for."""
    shown = [found] if other is None else [found, other]
    if html is not None:
        _write_html(found, html)
    if as_json:
        documents = [serial.to_json(each) for each in shown]
        console.file.write(json.dumps(documents[0] if other is None else documents, indent=1, allow_nan=False) + "\n")
        return
    if other is not None:
        terminal.render_comparison(
            [{**serial.summary(each), "name": n} for each, n in zip(shown, names, strict=True)], console
        )
        return
    if layers:
        terminal.render_layers(found, console)
    if why:
        terminal.render_why(_report(found, "--why"), console)
    if layers or why:
        return
    if isinstance(found, Report):
        terminal.render(found, console)
    else:
        terminal.render_inspection(found, console)


def quality(found: Fidelity | Robustness, console: Console) -> None:
    """Show how well a model does the original's job, as images are or under each condition."""
    if isinstance(found, Robustness):
        terminal.render_robustness(found, console)
    else:
        terminal.render_fidelity(found, console)


def bench(
    measured: Sequence[Measurement],
    console: Console,
    *,
    times: Sequence[OperatorTime] | None,
    as_json: bool,
) -> None:
    """Show measurements, and the time of each operator where it was asked for."""
    if as_json:
        document = {
            "measurements": [serial.to_json(m) for m in measured],
            "operators": [serial.to_json(t) for t in times or ()],
        }
        console.file.write(json.dumps(document, indent=1, allow_nan=False) + "\n")
        return
    terminal.render_measurements(list(measured), console)
    if times is not None:
        terminal.render_operators(times, console)


def _write_html(found: Report | Inspection, path: Path) -> None:
    from .report import html

    files.write_atomic(path, html.render(_report(found, "--html")))


def _report(found: Report | Inspection, option: str) -> Report:
    if isinstance(found, Inspection):
        raise DataError("an ONNX file has no report", where=option, fix="give a bundle or its report.json")
    return found
