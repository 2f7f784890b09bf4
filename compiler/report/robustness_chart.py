"""Models under several conditions as a chart: a row a condition, a lane in it for each series, whiskers for intervals.

Drawn as those of charts.py. A lane of its own keeps marks apart that lie at the same value, which is the usual case.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..types import LABELLED, Robustness
from . import axes, text

_LANE, _GAP, _FOOT, _LETTER = 13, 9, 22, 7
#: SVG around the origin: what is compared with, the models in their order, and the last one of several.
_REFERENCE = '<line class="whisker" x1="0" y1="-6" x2="0" y2="6"/>'
_MARKS = (
    '<circle class="dot" r="4"/>',
    '<rect class="dot" x="-3.5" y="-3.5" width="7" height="7"/>',
    '<path class="dot" d="M0 -5 L5 4 L-5 4 Z"/>',
)
_ACCENT = '<circle class="dot strong" r="4"/>'


@dataclass(frozen=True)
class Series:
    """A figure for each condition, in their order, and its interval; None where there is none.

    `reference`: what the other series are compared with.
    """

    name: str
    values: Sequence[float | None]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    reference: bool = False

    def spread(self) -> list[float]:
        """All that has to fit into the chart."""
        return [v for v in (*self.values, *self.lows, *self.highs) if v is not None]


def dots(title: str, conditions: Sequence[str], series: Sequence[Series], unit: str) -> str:
    """Return the series as marks along a common scale, whose figures are in `unit`; the last series is pointed out.

    Up to four beside the reference. A line marks 0 where it lies within.
    """
    spread = [v for each in series for v in each.spread()] or [0.0]
    ticks = axes.ticks(min(spread), max(spread))
    x, row = axes.Scale(ticks, 100.0), _LANE * len(series) + _GAP
    height = row * len(conditions)
    drawn = "".join(axes.line("grid", axes.pc(x.at(v)), 0, axes.pc(x.at(v)), height) for v in ticks)
    if ticks[0] < 0 < ticks[-1]:
        drawn += axes.line("limit", axes.pc(x.at(0)), 0, axes.pc(x.at(0)), height)
    drawn += "".join(axes.line("grid", "0", row * i, "100%", row * i) for i in range(1, len(conditions)))
    for v in ticks[1:-1]:
        number = axes.number(v, ticks)
        drawn += f'<text class="tick" x="{axes.pc(x.at(v))}" y="{height + 17}" text-anchor="middle">{number}</text>'
    marks = _marks(series)
    for lane, (each, mark) in enumerate(zip(series, marks, strict=True)):
        for i, condition in enumerate(conditions):
            drawn += _lane(each, i, condition, unit, mark, x, row * i + _GAP / 2 + _LANE * (lane + 0.5))
    plot = axes.svg(title, height + _FOOT, drawn)
    return f'<div>{_legend(series, marks)}<div class="plot">{_names(conditions, row, height + _FOOT)}{plot}</div></div>'


def _lane(each: Series, i: int, condition: str, unit: str, mark: str, x: axes.Scale, y: float) -> str:
    value = each.values[i]
    if value is None:
        return ""
    low, high = (ends[i] if ends else None for ends in (each.lows, each.highs))
    about = f"{each.name}, {condition}: {value:.2f} {unit}"
    whisker = ""
    if low is not None and high is not None:
        about += f" ({text.interval(low, high, 2)})"
        whisker = axes.line("whisker", axes.pc(x.at(low)), y, axes.pc(x.at(high)), y)
    told = f"<title>{escape(about)}</title>"
    return f'{whisker}<svg x="{axes.pc(x.at(value))}" y="{y:.1f}" style="overflow: visible">{told}{mark}</svg>'


def _marks(series: Sequence[Series]) -> list[str]:
    """Return each series' mark: the same for a model with and without a reference beside it."""
    models = itertools.chain(_MARKS, itertools.repeat(_ACCENT))
    marks = [_REFERENCE if each.reference else next(models) for each in series]
    several = sum(not each.reference for each in series) > 1
    return [*marks[:-1], _ACCENT] if several and not series[-1].reference else marks


def _legend(series: Sequence[Series], marks: Sequence[str]) -> str:
    items = "".join(
        f'<span style="white-space: nowrap; margin-right: 1.2em"><svg aria-hidden="true" width="14" height="12" '
        f'style="display: inline-block; vertical-align: -1px"><g transform="translate(7 6)">'
        f"{mark}</g></svg> {escape(each.name)}</span> "
        for each, mark in zip(series, marks, strict=True)
    )
    return f'<p class="note">{items}</p>'


def _names(conditions: Sequence[str], row: int, height: int) -> str:
    width = 14 + _LETTER * max((len(name) for name in conditions), default=0)
    names = "".join(
        f'<text class="tick" x="0" y="{row * (i + 0.5) + 4:.1f}">{escape(name)}</text>'
        for i, name in enumerate(conditions)
    )
    return f'<svg aria-hidden="true" width="{width}" height="{height}">{names}</svg>'


# --------------------------------------------------------------------------------------------- of what eval found


def figures(found: Mapping[str, Robustness]) -> str:
    """Return the figure of each of the models, by name, under each condition; with labels the original's as well.

    All were seen on the same images under the same conditions.
    """
    first = next(iter(found.values()))
    name = text.METRICS.get(first.metric, first.metric)
    series = [
        Series(model, [c.fidelity.value if c.fidelity else None for c in r.conditions.values()])
        for model, r in found.items()
    ]
    if first.metric in LABELLED:
        series.insert(0, Series("original", [c.original.value for c in first.conditions.values()], reference=True))
    return dots(f"{name} under each condition, %", list(first.conditions), series, "%")


def differences(found: Mapping[str, Robustness]) -> str:
    """Return what each of the models loses under each condition, with 95 % intervals: above 0 is worse."""
    first = next(iter(found.values()))
    names = [name for name, c in first.conditions.items() if c.difference is not None]
    unit = next((d.unit for c in first.conditions.values() if (d := c.difference) is not None), "points")
    series = []
    for model, each in found.items():
        rows = [each.conditions[name].difference for name in names]
        values, lows, highs = (
            [None if d is None else getattr(d, end) for d in rows] for end in ("value", "low", "high")
        )
        series.append(Series(model, values, lows, highs))
    return dots(f"lost under each condition, {unit}, 95 % intervals", names, series, unit)
