"""What charts are made of: scales with round ticks, lines, the frame. Widths are percentages, heights pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Scale:
    """Maps [first tick, last tick] to [0, size]."""

    ticks: Sequence[float]
    size: float

    def at(self, value: float) -> float:
        """Return where a value lies."""
        return self.size * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def ticks(low: float, high: float, wanted: int = 4) -> tuple[float, ...]:
    """Return evenly spaced round numbers, the first at or below `low`, the last at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(i * step for i in range(first, max(last, first + 1) + 1))


def number(value: float, ticks: Sequence[float]) -> str:
    """Return a value with as many decimals as the ticks need."""
    step = ticks[1] - ticks[0]
    decimals = next((d for d in range(6) if abs(step - round(step, d)) < 1e-9), 6)
    return f"{value + 0.0:.{decimals}f}"


def pc(value: float) -> str:
    """Return a coordinate in percent of the width."""
    return f"{value:.2f}%"


def line(kind: str, x1: str, y1: float, x2: str, y2: float) -> str:
    """Return a line of the class `kind`."""
    return f'<line class="{kind}" x1="{x1}" y1="{y1:.1f}" x2="{x2}" y2="{y2:.1f}"/>'


def svg(title: str, height: int, drawn: str) -> str:
    """Return a chart that takes the whole width and says what it is."""
    return f'<svg role="img" width="100%" height="{height}"><title>{escape(title)}</title>{drawn}</svg>'
