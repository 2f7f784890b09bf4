"""What `compile --robust` compared, as tables: each way of calibrating by condition, and beside the clean one."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import LABELLED, Difference, RobustChoice, RobustWay
from . import text
from .grid import Table, columns


def tables(choice: RobustChoice | None) -> tuple[Table, ...]:
    """Return the ways, what each gives under each condition, and the differences; without a comparison only why."""
    if choice is None:
        return ()
    late = ", ".join(choice.not_tried)
    notes = (choice.why, *([f"not tried, for the time budget: {late}"] if late else []))
    if not choice.ways:
        return (Table("Robustness", (), (), notes),)
    return ways(choice, notes), figures(choice), *(differences(way) for way in choice.ways[1:])


def ways(choice: RobustChoice, notes: Sequence[str]) -> Table:
    """One row a way of calibrating: its worst condition, and the verdict."""
    images = next(iter(choice.ways)).under.images
    titles = columns("", "calibrated", "worst condition", "#SQNR dB", "#error dB", "#95 % interval", "verdict")
    rows = [
        (
            "*" if way.kept else "",
            text.clean(way.calibration),
            text.clean(way.worst),
            text.fixed(way.sqnr_db[way.worst], 1),
            *_difference(way.worst_error),
            text.clean(way.verdict),
        )
        for way in choice.ways
    ]
    strong = next((i for i, way in enumerate(choice.ways) if way.kept), None)
    more = (
        "* is what was kept; SQNR: mean over the images, outputs beside FP32's under the same condition",
        "error: of the worst condition, beside clean calibration's under its own; below zero it is closer to FP32",
    )
    title = f"Robustness: ways of calibrating on {text.count(images, 'held-out image')} under each condition"
    return Table(title, titles, tuple(rows), (*notes, *more), strong)


def figures(choice: RobustChoice) -> Table:
    """One row a condition: what FP32 and each way give."""
    first = choice.ways[0].under
    scored = first.metric != "energy"
    name = text.METRICS.get(first.metric, text.clean(first.metric))
    named = [way.calibration for way in choice.ways]
    heads = ["", *(["#FP32 %", *(f"#{way} %" for way in named)] if scored else []), *(f"#{way} dB" for way in named)]
    rows = []
    for condition, under in first.conditions.items():
        scores = [text.fixed(under.original.value, 2), *(_score(way, condition) for way in choice.ways)]
        decibels = [text.fixed(way.sqnr_db[condition], 1) for way in choice.ways]
        rows.append((text.clean(condition), *(scores if scored else []), *decibels))
    what = "" if not scored else f"%: {name}; FP32's own beside the labels" if first.metric in LABELLED else ""
    if scored and not what:
        what = f"%: {name}, FP32's own beside itself on clean images, the others' beside FP32 under the condition"
    notes = (*filter(None, [what]), "everything quantized, before mixed precision; dB: SQNR as above")
    return Table("FP32, and quantized as calibrated", columns(*heads), tuple(rows), notes)


def differences(way: RobustWay) -> Table:
    """One row a condition: how much more a way errs, and loses, than clean calibration."""
    heads = ["", "#error dB", "#95 % interval", "verdict"]
    heads += ["#points", "#95 % interval"] if way.losses else []
    rows = []
    for condition, error in way.errors.items():
        points = _difference(way.losses[condition]) if way.losses else ()
        rows.append((text.clean(condition), *_difference(error), error.verdict, *points))
    what = "error, points lost: below zero" if way.losses else "error: below zero"
    notes = (f"{what} it is better; paired on the same images, each interval by itself", *_points(way))
    return Table(f"{text.clean(way.calibration)} beside clean calibration", columns(*heads), tuple(rows), notes)


def _points(way: RobustWay) -> tuple[str, ...]:
    """Say in one line what the points show."""
    if not way.losses:
        return ()
    shown = [f"{loss.verdict} under {c}" for c, loss in way.losses.items() if loss.verdict in ("better", "worse")]
    return (f"in points: {text.clean(', '.join(shown)) or 'no difference shown under any condition'}",)


def _score(way: RobustWay, condition: str) -> str:
    found = way.under.conditions[condition].fidelity
    return text.MISSING if found is None else text.fixed(found.value, 2)


def _difference(found: Difference | None) -> tuple[str, str]:
    return ("", "") if found is None else (text.signed(found.value, 2), text.interval(found.low, found.high, 2))
