"""Why a rounding hurts: what the tensor or the weight looks like, held against a table of known causes.

Facts, from the statistics of calibration and the extremes of channels on a few images. With x the elements of a
tensor, [l, h] what its integers represent, s their step, m_c = max |x| over channel c:

    clipped       share of x outside [l - s/2, h + s/2]
    clip error    sum over those of (distance to [l, h])^2, over the whole rounding error sum (x - x')^2
    explosion     max |x| / the 99.9 percentile of |x|
    unused        1 - ([min x, max x] cut to [l, h]) / (h - l)
    outlier       max over c of m_c / median over c of m_c
    pair          the largest sum of two 8-bit products, 2 * 255 * (the largest weight): 16 bits hold 32767

A cause is named where its fact passes a limit; the first of the table that does is the one. The limits are ours: a
factor of 8 is three bits lost, one of 4 two bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..types import QuantScheme, Range, StepRecord, TensorStatistics

if TYPE_CHECKING:
    from ...calib.channels import ChannelExtremes

Side = Literal["tensor", "weights"]
#: What of a layer is rounded.
What = Literal["input", "output", "weights"]

#: How the cause begins where there is none but the rounding itself.
ALONE = "plain rounding"

#: The largest sum that 16 bits hold.
INT16 = 32767
#: The percentile that stands for the bulk of a tensor, in percent.
BULK = 99.9
#: Weights of so many levels or fewer on either side of 0 have few bits.
_FEW_LEVELS = 15


@dataclass(frozen=True)
class Facts:
    """What is known of a rounded tensor, or of a weight; None where it is not. Percentages are 0 to 100."""

    clipped_percent: float | None = None
    clip_error_percent: float | None = None
    largest: float | None = None
    bulk: float | None = None
    explosion: float | None = None
    unused_percent: float | None = None
    channel: int | None = None
    channel_largest: float | None = None
    channel_median: float | None = None
    outlier: float | None = None
    levels: int | None = None
    pair: float | None = None


@dataclass(frozen=True)
class Context:
    """What was tried on the way, so that the advice fits: by the search's steps and the person's options."""

    scheme: QuantScheme
    method: str = ""
    steps: Mapping[str, StepRecord] = field(default_factory=dict)
    without: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------ facts


def of_tensor(
    span: Range, step: float | None, statistics: TensorStatistics | None, extremes: ChannelExtremes | None
) -> Facts:
    """Return the facts of a tensor that is represented over `span` in even steps (None: in uneven ones)."""
    found = {**_of_channels(None if extremes is None else extremes.magnitude)}
    if statistics is not None:
        found |= _of_extremes(span if step else None, statistics)
        if statistics.histogram is not None and statistics.histogram.any() and statistics.high > statistics.low:
            found |= _of_histogram(span, step, statistics)
    return Facts(**found)  # type: ignore[arg-type]  # the keys are its fields


def of_weight(weight: np.ndarray, axis: int | None, levels: int | None) -> Facts:
    """Return the facts of a weight with `levels` integers on either side of 0 (None: it is stored in 8-bit floats).

    Along `axis` lie channels that share a scale; None where none do.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    found = {} if axis is None else _of_channels(np.abs(weight).max(axis=others, initial=0.0))
    return Facts(**{**found, "levels": levels})  # type: ignore[arg-type]  # the keys are its fields


def _of_channels(magnitude: np.ndarray | None) -> dict[str, float | int | None]:
    if magnitude is None or len(magnitude) < 2:
        return {}
    alive = magnitude[magnitude > 0]
    if not len(alive):
        return {}
    at, median = int(np.argmax(magnitude)), float(np.median(alive))
    largest = float(magnitude[at])
    return {"channel": at, "channel_largest": largest, "channel_median": median, "outlier": largest / median}


def _of_extremes(span: Range | None, statistics: TensorStatistics) -> dict[str, float | int | None]:
    found: dict[str, float | int | None] = {"largest": max(-statistics.min, statistics.max)}
    if span is not None and span.max > span.min:
        low, high = max(statistics.min, span.min), min(statistics.max, span.max)
        used = max(high, 0.0) - min(low, 0.0)  # a range always holds 0
        found["unused_percent"] = 100 * (1 - used / (span.max - span.min))
    return found


def _of_histogram(span: Range, step: float | None, statistics: TensorStatistics) -> dict[str, float | int | None]:
    assert statistics.histogram is not None
    counts = statistics.histogram.astype(np.float64)
    edges = np.linspace(statistics.low, statistics.high, len(counts) + 1)
    centres = np.clip((edges[1:] + edges[:-1]) / 2, statistics.min, statistics.max)
    order = np.argsort(np.abs(centres))
    below = np.cumsum(counts[order])
    bulk = float(np.abs(centres[order[np.searchsorted(below, below[-1] * BULK / 100)]]))
    largest = max(-statistics.min, statistics.max)
    slack = (step or 0.0) / 2
    outside = (centres < span.min - slack) | (centres > span.max + slack)
    found: dict[str, float | int | None] = {
        "clipped_percent": 100 * float(counts[outside].sum() / counts.sum()),
        "bulk": bulk,
        "explosion": largest / bulk if bulk > 0 else None,
    }
    if step:
        rounded = np.clip(np.rint(centres / step) * step, span.min, span.max)
        error = counts * (centres - rounded) ** 2
        found["clip_error_percent"] = 100 * float(error[outside].sum() / max(error.sum(), 1e-300))
    return found


# ------------------------------------------------------------------------------------------ causes


_KEEP = "a smaller --max-drop keeps it in float"


def _balanced(c: Context) -> str:
    step = c.steps.get("equalize") or c.steps.get("smooth")
    left_out = [name for name in ("equalize", "smooth") if name in c.without]
    if step is None and left_out:
        return f"leave --without {left_out[0]} out"
    if step is None:
        return f"nothing next to it can take the factor up; {_KEEP}"
    how = f"{step.name}d already" if step.kept else f"{step.name} was tried and taken back"
    return f"{how}; {_KEEP}"


def _ranged(c: Context) -> str:
    if not c.method:
        return "calibrate here: --calib FOLDER in place of --ranges"
    if "ranges" in c.steps:
        return f"{c.method} came closest of the methods tried; more calibration images, or {_KEEP}"
    return f"--method auto compares {c.method} with the others; more calibration images"


def _covered(c: Context) -> str:
    if c.scheme.symmetric:
        return "this device takes no zero point: half of the integers are idle behind a ReLU"
    return _ranged(c)


def _widened(c: Context) -> str:
    if "rounding" in c.without:
        return "leave --without rounding out"
    done = "rounded for the least error at each layer's output already; " if "rounding" in c.steps else ""
    return f"{done}--precision int8 has more bits"


def _halved(c: Context) -> str:
    del c
    return "name the CPU that it runs on with --device: weights then have 7 bits, or its products 32"


@dataclass(frozen=True)
class _Cause:
    """A row of the table: of the tensor, the weight or either, the fact and its limit, the figures, what to do."""

    name: str
    side: Side | None
    fact: str
    limit: float
    says: str
    remedy: Callable[[Context], str]


_FAR = "{channel} reaches {channel_largest:.3g}, {outlier:.0f} times as far as the median one"

CAUSES: tuple[_Cause, ...] = (
    _Cause("saturation", None, "pair", INT16 + 1, "two products next to each other can add up to {pair:,.0f}, "
           "and 16 bits hold 32,767", _halved),
    _Cause("outlier channel", "tensor", "outlier", 8.0, "channel " + _FAR, _balanced),
    _Cause("outlier channel", "weights", "outlier", 8.0, "input channel " + _FAR, _balanced),
    _Cause("saturation", "tensor", "clipped_percent", 1.0, "{clipped_percent:.1f} % of the elements lie beyond the "
           "range, at the last integer", _ranged),
    _Cause("clipping", "tensor", "clip_error_percent", 50.0, "{clipped_percent:.2g} % of the elements lie beyond the "
           "range and make {clip_error_percent:.0f} % of the rounding error", _ranged),
    _Cause("range explosion", "tensor", "explosion", 4.0, "the largest element, {largest:.3g}, is {explosion:.1f} "
           "times the 99.9 percentile, {bulk:.3g}", _ranged),
    _Cause("dead range", "tensor", "unused_percent", 40.0, "{unused_percent:.0f} % of the integers "
           "never occur", _covered),
)  # fmt: skip


def likely(what: What, facts: Facts, context: Context) -> tuple[str, str | None]:
    """Return the likely cause, with its figures, and what was done about it or can be; None where nothing is amiss."""
    side: Side = "weights" if what == "weights" else "tensor"
    for cause in CAUSES:
        value = getattr(facts, cause.fact)
        if cause.side in (side, None) and value is not None and value >= cause.limit:
            return f"{cause.name} in its {what}: {cause.says.format(**vars(facts))}", cause.remedy(context)
    if side == "weights" and facts.levels is not None and facts.levels <= _FEW_LEVELS:
        return f"few bits: weights of {2 * facts.levels + 1} levels", _widened(context)
    return f"{ALONE} of its {what}", None
