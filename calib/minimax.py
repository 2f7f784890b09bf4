"""One range for a tensor that looks different under each condition: the worst condition's error is made least.

Under condition k a tensor has the distribution p_k, and a range [l, h] in steps of s (ranges.py) costs, per element,

    E_k(l, h) = D_k(s) - s^2/12 P_k(x outside [l, h]) + C_k(l) + C_k(h)

    D_k(s)    = integral of p_k(x) (x - s round(x / s))^2                 rounding on the endless grid of multiples of s
    C_k(e)    = integral over x beyond e of p_k(x) (x - e)^2              clipping

which is the E of ranges.py, taken apart: 0 is always on the grid, so rounding depends on s alone, and clipping on one
end alone. Two things are approximate: what is clipped is taken to be rounded with s^2/12, and the outermost points of
the grid to be l and h, while they are up to s/2 from them. So a few tables along s and along the ends give the error
of every pair of ends under every condition, and the whole plane is searched, not a path through it: the largest of
several errors has kinks, at which a search along the axes stops.

An error is judged relative to the signal's energy under its condition, which is 1 / SQNR of the tensor there:

    r_k(l, h) = E_k(l, h) / S_k,        S_k = integral of p_k(x) x^2

    minimise    max_k r_k(l, h)    or    sum_k w_k r_k(l, h) / sum_k w_k
    subject to  E_clean(l, h) <= (1 + tolerance) min over [l, h] of E_clean

The other candidate was the regret, E_k relative to the least that E_k could be. It listens most to the condition with
the narrowest range, blur, where errors are small anyhow, and all others pay. On ResNet-20 and ResNet-32, over five
seeds, with a tolerance of 0.1, the worst condition's SQNR at the output rose by 0.37 and 0.83 dB with the regret, but
clean images lost 0.36 and 0.33 dB and slightly compressed ones 0.46 and 0.34 dB; with the signal's energy it rose by
0.24 and 0.63 dB, and clean images lost 0.03 and 0.10 dB.

r_k has no unit: the range scales with the tensor. With one condition, or equal ones, it is that of least squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..compiler.types import Range, TensorStatistics
from . import ranges

#: How much more squared error, relative to the least there is, clean images may have: 0.1 is 0.4 dB.
TOLERANCE = 0.1
#: Bins over the extremes of all conditions together.
_BINS = 2048
#: The narrowest end that is tried, relative to the extreme; ends on the logarithmic grid, and around the best of those.
_NARROWEST, _COARSE, _FINE = 1 / 64, 33, 17
#: Steps at which rounding is computed, evenly on the logarithm.
_STEPS = 21
#: S_k counts as no less than this part of the largest of them: a condition under which a tensor is all but still is no
#: reason to spoil the range for the others.
_LEAST = 1e-2
#: Clean images' least error counts as no less than this part of their signal's energy, which is 60 dB: with 16 bits, a
#: few percent of next to nothing are no reason to clip the others.
_ENOUGH = 1e-6
#: Where the worst condition is as bad whatever the range, the mean decides: it counts this much.
_MEAN = 1e-3
#: Figures that differ by less, relatively, are the same; the wider range is taken.
_SAME = 1e-9


def choose(
    statistics: Mapping[str, TensorStatistics],
    method: str = "minimax",
    *,
    bits: int = 8,
    symmetric: bool = False,
    tolerance: float = TOLERANCE,
    weights: Mapping[str, float] | None = None,
) -> Range:
    """Return the range of a tensor from its statistics under each condition: by `minimax`, or a method of ranges.py.

    ranges.py's methods see the conditions as one mixture of equal parts. Raises what `minimax` and ranges.choose do.
    """
    if method == "minimax":
        return minimax(statistics, bits, symmetric, tolerance=tolerance, weights=weights)
    return ranges.choose(pooled(statistics), method, bits=bits, symmetric=symmetric)


def minimax(
    statistics: Mapping[str, TensorStatistics],
    bits: int,
    symmetric: bool,
    *,
    tolerance: float = TOLERANCE,
    weights: Mapping[str, float] | None = None,
) -> Range:
    """Return the range for `bits`-bit integers whose error, relative to the signal, is least where it is worst.

    `weights` (condition -> at least 0; 0 where it is not named) asks for the least mean instead. Where "clean" is
    among the conditions, its error is at most 1 + `tolerance` times its least, whatever the weights. A condition
    that lacks the tensor, or under which all of it is 0, has no say. Where it is 0 under all of them, so is its
    range. ValueError without conditions, without a histogram, or where no weight is above 0.
    """
    low, high = _extremes(statistics)
    statistics = {name: stats for name, stats in statistics.items() if stats.min < 0 or stats.max > 0}
    if high - low < np.finfo(np.float64).tiny:
        return Range(low, high)
    share = None if weights is None else np.array([weights.get(name, 0.0) for name in statistics])
    if share is not None and (share.min() < 0 or share.sum() == 0):
        raise ValueError("weights are at least 0, and one is above")
    errors = _Errors.of(statistics, low, high, bits, symmetric)
    clean = list(statistics).index("clean") if "clean" in statistics else None

    def judged(tried: _Tried) -> int:
        figures = _objective(tried.errors, errors.signal, share)
        if clean is not None:
            least = max(tried.errors[clean].min(), _ENOUGH * errors.signal[clean])
            figures = np.where(tried.errors[clean] <= (1 + tolerance) * least, figures, np.inf)
        return _widest(tried, figures)

    tried = errors.near(low, high, np.geomspace(_NARROWEST, 1, _COARSE))
    around = [judged(tried)] if clean is None else [judged(tried), _widest(tried, tried.errors[clean])]
    step = _NARROWEST ** (-1 / (_COARSE - 1))
    closer = np.geomspace(1 / step, step, _FINE)
    tried = _joined([tried, *(errors.near(tried.low[i], tried.high[i], closer) for i in around)])
    best = judged(tried)
    return Range(float(np.clip(tried.low[best], low, 0)), float(np.clip(tried.high[best], 0, high)))


def pooled(statistics: Mapping[str, TensorStatistics]) -> TensorStatistics:
    """Return the statistics of a mixture of the conditions in equal parts; without histograms if one has none."""
    low, high = _extremes(statistics)
    every = statistics.values()
    least, most, images = min(s.min for s in every), max(s.max for s in every), sum(s.images for s in every)
    if any(s.histogram is None for s in every):
        return TensorStatistics(least, most, images)
    if high == low:
        return TensorStatistics(least, most, images, np.array([_MIXTURE]), low, high)
    edges = np.linspace(low, high, 2 * _BINS + 1)
    counts = _MIXTURE * np.mean([_shares(s, edges, zeros=True) for s in every], axis=0)
    return TensorStatistics(least, most, images, np.rint(counts).astype(np.int64), low, high)


#: Counts in the histogram of a mixture.
_MIXTURE = 2**40


def _extremes(statistics: Mapping[str, TensorStatistics]) -> tuple[float, float]:
    """Return the interval that holds 0 and all elements under all conditions."""
    if not statistics:
        raise ValueError("there is no condition with statistics of the tensor")
    return min(0.0, *(s.min for s in statistics.values())), max(0.0, *(s.max for s in statistics.values()))


def _shares(stats: TensorStatistics, edges: np.ndarray, *, zeros: bool) -> np.ndarray:
    """Return which share of the elements lies between edges that hold them all, each bin of the histogram spread.

    Without `zeros`, what the bin of 0 holds beyond its neighbours is left out: these elements are 0, which costs
    nothing at any step. Spread over the bin they would cost, and more where a condition's bins are wide.
    """
    if stats.histogram is None:
        raise ValueError("minimax needs a histogram")
    total = np.ones(1)
    below = (edges > 0).astype(np.float64)  # all elements are 0
    if stats.high > stats.low:
        counts = stats.histogram.astype(np.float64)
        if not zeros:
            counts = ranges.without_zeros(counts, np.linspace(stats.low, stats.high, len(counts) + 1))
        total = np.concatenate([[0.0], np.cumsum(counts)]) / stats.histogram.sum()
        below = _table(edges, total, stats.low, stats.high)
    below[0], below[-1] = 0, total[-1]  # a bin may reach beyond the extremes; its elements do not
    return np.diff(below)


# --------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True, eq=False)
class _Tried:
    """n ranges: `low`, `high` (n,), and the error of each under each of K conditions, `errors` (K, n)."""

    low: np.ndarray
    high: np.ndarray
    errors: np.ndarray


def _joined(several: list[_Tried]) -> _Tried:
    low, high = (np.concatenate([getattr(t, end) for t in several]) for end in ("low", "high"))
    return _Tried(low, high, np.concatenate([t.errors for t in several], axis=1))


def _objective(errors: np.ndarray, signal: np.ndarray, share: np.ndarray | None) -> np.ndarray:
    """Return what is to be minimised: errors (K, n), signal and shares (K,) -> (n,)."""
    relative = errors / np.maximum(signal, _LEAST * signal.max())[:, None]
    if share is not None:
        mean: np.ndarray = share @ relative / share.sum()
        return mean
    worst: np.ndarray = relative.max(axis=0) + _MEAN * relative.mean(axis=0)
    return worst


def _widest(tried: _Tried, figures: np.ndarray) -> int:
    """Return the place of the least figure, of equal ones that of the widest range."""
    same = np.flatnonzero(figures <= figures.min() * (1 + _SAME))
    return int(same[np.argmax((tried.high - tried.low)[same])])


# --------------------------------------------------------------------------------------------- errors


@dataclass(frozen=True, eq=False)
class _Errors:
    """E_k of this file's head, for K conditions and ranges within [low, high], from tables.

    `below` (3, K, B + 1): the integrals of 1, x, x^2 up to each edge of B bins. `rounding` (K, steps): D_k(s) / s^2,
    for s from 2^octaves[0] to 2^octaves[1].
    """

    low: float
    high: float
    bits: int
    symmetric: bool
    below: np.ndarray
    octaves: tuple[float, float]
    rounding: np.ndarray

    @classmethod
    def of(
        cls, statistics: Mapping[str, TensorStatistics], low: float, high: float, bits: int, symmetric: bool
    ) -> _Errors:
        """Make the tables from the conditions' histograms."""
        edges = np.linspace(low, high, _BINS + 1)
        shares = np.array([_shares(stats, edges, zeros=False) for stats in statistics.values()])
        widest = np.log2((max(-low, high) * 2 if symmetric else high - low) / (2**bits - 2))
        octaves = (widest + np.log2(_NARROWEST) - 0.5, widest)
        steps = np.exp2(np.linspace(*octaves, _STEPS))
        return cls(low, high, bits, symmetric, _moments(shares, edges), octaves, _rounding(shares, edges, steps))

    @property
    def signal(self) -> np.ndarray:
        """The mean square of the elements under each condition, (K,)."""
        found: np.ndarray = self.below[2, :, -1]
        return found

    def near(self, low: float, high: float, factors: np.ndarray) -> _Tried:
        """Try ranges whose ends are those given times the factors, each with each, as far as elements go."""
        if self.symmetric:
            end = np.minimum(factors * max(-low, high), max(-self.low, self.high))
            return self._tried(-end[:, None], end[:, None])
        lows, highs = np.maximum(factors * low, self.low), np.minimum(factors * high, self.high)
        if low == 0 or high == 0:
            return self._tried(lows[:, None], highs[:, None])
        return self._tried(lows[:, None], highs[None])

    def _tried(self, low: np.ndarray, high: np.ndarray) -> _Tried:
        """Return the errors of ranges: `low` (n, 1), `high` (1, m) or (n, 1)."""
        step = (high - low) / (2 * (2 ** (self.bits - 1) - 1) if self.symmetric else 2**self.bits - 1)
        at = low - step if self.symmetric else low
        under, under_error = _clipped(at, _table(at, self.below, self.low, self.high))
        over, over_error = _clipped(high, self.below[:, :, -1:, None] - _table(high, self.below, self.low, self.high))
        rounding = _table(np.log2(step), self.rounding, *self.octaves) - (under + over) / 12
        errors = np.maximum(rounding, 0) * step**2 + (under_error + over_error)
        lows, highs = np.broadcast_arrays(low, high)
        return _Tried(lows.ravel(), highs.ravel(), errors.reshape(len(errors), -1))


def _table(at: np.ndarray, rows: np.ndarray, first: float, last: float) -> np.ndarray:
    """Interpolate rows (…, places) of values at even places from first to last: (any shape) -> (…, that shape)."""
    cells = rows.shape[-1] - 1
    place = np.clip((at - first) * (cells / (last - first)), 0, cells)
    before = np.minimum(place.astype(np.intp), cells - 1)
    start = rows[..., before]
    found: np.ndarray = start + (place - before) * (rows[..., before + 1] - start)
    return found


def _clipped(end: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of what lies beyond an end, and C_k(end), from its moments (3, K, …)."""
    error = moments[2] - 2 * end * moments[1] + end**2 * moments[0]
    return moments[0], np.maximum(error, 0)  # below 0 by cancellation only


def _moments(shares: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the integrals of 1, x and x^2 up to each edge: (K, B) -> (3, K, B + 1)."""
    centres, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    below = np.zeros((3, len(shares), len(edges)))
    for power, of in enumerate((np.ones_like(centres), centres, centres**2 + width**2 / 12)):
        np.cumsum(shares * of, axis=1, out=below[power, :, 1:])
    return below


def _rounding(shares: np.ndarray, edges: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return D_k(s) / s^2 for each step: `shares` (K, B) -> (K, steps)."""
    places = edges / steps[:, None]
    nearest = np.rint(places)
    places -= nearest
    integral = places * places
    integral *= places
    integral *= 4
    integral += nearest  # 12 G(x) / s^3 of ranges.py
    found: np.ndarray = shares @ np.diff(integral, axis=1).T * (steps / (12 * (edges[1] - edges[0])))
    return found
