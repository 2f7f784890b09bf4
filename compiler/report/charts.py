"""Charts as inline SVG, drawn by hand. Widths are percentages and heights pixels: nothing is scaled, so text keeps
its size on a telephone and on a wide screen. Colours are classes of style.py. Each chart names itself in <title>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from . import axes

_ROW = 46
_HEIGHT = 152
_FOOT = 22


@dataclass(frozen=True)
class Bar:
    """A bar: its label, its figure in words, its length, and the interval of that where there is one."""

    label: str
    figure: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = False


def bars(title: str, rows: Sequence[Bar], full: float | None = None) -> str:
    """Return horizontal bars from zero, with whiskers for the intervals; `full` ends the scale (None: the largest)."""
    full = full or max((max(r.value, r.high or 0.0) for r in rows), default=0.0) or 1.0
    drawn = "".join(_bar(row, i * _ROW, 100 / full) for i, row in enumerate(rows))
    return axes.svg(title, _ROW * len(rows), drawn)


def _bar(row: Bar, top: int, scale: float) -> str:
    strong = " strong" if row.strong else ""
    parts = [
        f'<text class="label{strong}" x="0" y="{top + 15}">{escape(row.label)}</text>',
        f'<text class="figure{strong}" x="100%" y="{top + 15}" text-anchor="end">{escape(row.figure)}</text>',
        f'<rect class="track" x="0" y="{top + 24}" width="100%" height="8"/>',
        f'<rect class="bar{strong}" x="0" y="{top + 24}" width="{axes.pc(row.value * scale)}" height="8"/>',
    ]
    if row.low is not None and row.high is not None:
        low, high, mid = axes.pc(row.low * scale), axes.pc(row.high * scale), top + 28
        parts.append(axes.line("whisker", low, mid, high, mid))
        parts += [axes.line("whisker", x, mid - 7, x, mid + 7) for x in (low, high)]
    return "".join(parts)


@dataclass(frozen=True)
class Point:
    """A candidate in the plane of latency and quality."""

    label: str
    about: str
    x: float
    y: float
    strong: bool = False


def scatter(title: str, points: Sequence[Point], *, right: float | None, limit: float | None) -> str:
    """Return points lost (downwards) against milliseconds.

    `right` is the baseline's latency and `limit` the budget in points, both dashed lines. A line joins three points
    or more than which no other is better in both. Points closer than a dot's width on a narrow screen share one label.
    """
    xs = [p.x for p in points] + ([] if right is None else [right])
    across = axes.ticks(min(xs), max(xs))
    down = axes.ticks(min(0.0, *(p.y for p in points)), max([p.y for p in points] + [limit or 0.0, 0.1]))
    x, y = axes.Scale(across, 100.0), axes.Scale(down, float(_HEIGHT))
    grid = "".join(axes.line("grid", "0", y.at(v), "100%", y.at(v)) for v in down)
    grid += "".join(_x_tick(x.at(v), v, across) for v in across[1:-1])
    if right is not None:
        grid += axes.line("limit", axes.pc(x.at(right)), 0, axes.pc(x.at(right)), _HEIGHT)
    if limit is not None:
        grid += axes.line("limit", "0", y.at(limit), "100%", y.at(limit))
    grid += _frontier(points, x, y)
    dots = "".join(_dot(p, x, y) for p in points)
    names = "".join(_name(group, x, y) for group in _close(points, x, y))
    return _framed(
        axes.svg(title, _HEIGHT + _FOOT, grid + dots + names), [(y.at(v), axes.number(v, down)) for v in down]
    )


def best(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other is better than in both, from left to right."""
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        if not found or p.y < found[-1].y:
            found.append(p)
    return found


def _frontier(points: Sequence[Point], x: axes.Scale, y: axes.Scale) -> str:
    held = best(points)
    if len(points) < 3:
        return ""
    pairs = zip(held, held[1:], strict=False)
    return "".join(
        axes.line("frontier", axes.pc(x.at(p.x)), y.at(p.y), axes.pc(x.at(q.x)), y.at(q.y)) for p, q in pairs
    )


def _x_tick(at: float, value: float, ticks: Sequence[float]) -> str:
    return axes.line("grid", axes.pc(at), 0, axes.pc(at), _HEIGHT) + _x_label(at, axes.number(value, ticks))


def _x_label(at: float, label: str) -> str:
    return f'<text class="tick" x="{axes.pc(at)}" y="{_HEIGHT + 17}" text-anchor="middle">{label}</text>'


def _dot(p: Point, x: axes.Scale, y: axes.Scale) -> str:
    strong = " strong" if p.strong else ""
    about = f"<title>{escape(p.about)}</title>"
    return f'<circle class="dot{strong}" cx="{axes.pc(x.at(p.x))}" cy="{y.at(p.y):.1f}" r="6">{about}</circle>'


def _name(group: Sequence[Point], x: axes.Scale, y: axes.Scale) -> str:
    last = max(group, key=lambda p: p.x)
    at = x.at(last.x)
    side, anchor = (-11, "end") if at > 85 else (11, "start")
    text = escape(", ".join(p.label for p in group))
    place = f'x="{axes.pc(at)}" y="{y.at(last.y) + 4:.1f}" dx="{side}" text-anchor="{anchor}"'
    return f'<text class="label{" strong" if any(p.strong for p in group) else ""}" {place}>{text}</text>'


def _close(points: Sequence[Point], x: axes.Scale, y: axes.Scale) -> list[list[Point]]:
    """Gather points that would share a place 300 pixels wide."""
    groups: list[list[Point]] = []
    for p in points:
        for group in groups:
            if any(abs(x.at(p.x) - x.at(q.x)) * 3 < 22 and abs(y.at(p.y) - y.at(q.y)) < 13 for q in group):
                group.append(p)
                break
        else:
            groups.append([p])
    return groups


@dataclass(frozen=True)
class Column:
    """A layer: what is said of it, its SQNR in dB or None, and whether it computes in float."""

    about: str
    value: float | None
    hollow: bool = False
    strong: bool = False


def columns(title: str, found: Sequence[Column]) -> str:
    """Return one column a layer in the order of execution: hatched where it is in float, a gap where not judged."""
    ticks = axes.ticks(0.0, max((c.value for c in found if c.value is not None), default=1.0))
    y = axes.Scale(tuple(reversed(ticks)), float(_HEIGHT))
    slot = min(100 / len(found), 6.0)
    drawn = "".join(axes.line("grid", "0", y.at(v), "100%", y.at(v)) for v in ticks)
    drawn += "".join(_column(c, i * slot, slot, y) for i, c in enumerate(found))
    ends = {0: "1", len(found) - 1: str(len(found))}
    drawn += "".join(_x_label((i + 0.5) * slot, label) for i, label in ends.items())
    hatch = (
        '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line class="hatch" x1="0" y1="0" x2="0" y2="6"/></pattern></defs>'
    )
    return _framed(axes.svg(title, _HEIGHT + _FOOT, hatch + drawn), [(y.at(v), axes.number(v, ticks)) for v in ticks])


def _column(c: Column, left: float, slot: float, y: axes.Scale) -> str:
    if c.value is None and not c.hollow:
        return ""
    top = 0.0 if c.hollow else y.at(max(0.0, c.value or 0.0))
    kind = "hollow" if c.hollow else "bar strong" if c.strong else "bar"
    box = f'x="{axes.pc(left + 0.18 * slot)}" width="{axes.pc(0.64 * slot)}" y="{top:.1f}" height="{_HEIGHT - top:.1f}"'
    return f'<rect class="{kind}" {box}><title>{escape(c.about)}</title></rect>'


def _framed(plot: str, ticks: Sequence[tuple[float, str]]) -> str:
    """Put a vertical axis of fixed width beside a plot that takes the rest."""
    width = 10 + 7 * max(len(name) for _, name in ticks)
    labels = "".join(
        f'<text class="tick" x="{width - 10}" y="{at + 4:.1f}" text-anchor="end">{name}</text>' for at, name in ticks
    )
    axis = f'<svg aria-hidden="true" width="{width}" height="{_HEIGHT + _FOOT}">{labels}</svg>'
    return f'<div class="plot">{axis}{plot}</div>'
