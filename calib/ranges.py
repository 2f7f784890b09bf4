"""From the statistics of a tensor to the range that quantization shall represent, and ranges as a file.

A range [l, h] holds 0 and never goes beyond the observed extremes. It is represented in steps of

    s = (h - l) / (2^b - 1)        symmetric:  s = max(-l, h) / (2^(b-1) - 1)

on the grid of the multiples of s, so 0 is always exact. What lies outside is clipped. The methods:

minmax      l = min(x, 0), h = max(x, 0): nothing is clipped.
percentile  a share 1 - p of the samples is clipped, half of it at each end, all of it at the one end where the
            other is 0; symmetric: of |x|. Between bin edges the counts are taken as uniform.
mse         minimises E(l, h) = sum_k c_k / w * integral over bin k of (x - q(x))^2, with q(x) the nearest point of the
            grid inside [l, h]. Over one cell of the grid the integral is s^3/12, so with r = x - s round(x / s)

                G(x) = s^3/12 round(x / s) + r^3/3                  inside,
                G(x) = G(e) + (x - e)^3/3                           beyond the end e

            is its antiderivative: rounding and clipping in one expression, exact for counts uniform in each bin.
            l and h are searched in turn, on a logarithmic grid first and between its best neighbours then.
entropy     minimises KL(P || Q). P is the histogram inside a candidate range, with all that is clipped added to its
            end bins; Q is the histogram inside, without that, merged into 2^b levels and spread again evenly over
            those bins of each level that are not empty. Mass of P where Q has none counts against a small constant.
            This is TensorRT's calibrator (S. Migacz, 8-bit Inference with TensorRT, GTC 2017), which looks at |x|;
            here each end is searched with the other one fixed. The bin that holds 0 takes the larger of its
            neighbours' counts, since zeros, of which a ReLU makes many, cost nothing at any scale. Counts c of
            variance phi c (phi shows in the difference of neighbours) add phi (bins - levels) / (2 sum c) to the
            divergence by chance alone, more to wider candidates; that is subtracted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..compiler.errors import DataError
from ..compiler.files import write_atomic
from ..compiler.types import Range, TensorStatistics

#: Share of the samples that `percentile` keeps, in percent.
PERCENTILE = 99.999
#: Bins that are looked at: neighbours are merged until there are no more.
_BINS = 2048
#: mse: the narrowest end that is tried, relative to the extreme; tries on the logarithmic grid, and between neighbours.
_NARROWEST, _COARSE, _FINE = 1 / 64, 17, 9
#: entropy: ends that are tried; what stands for an empty bin of Q, relative to all of its mass.
_ENDS, _EMPTY = 64, 1e-9


def choose(
    stats: TensorStatistics, method: str, *, bits: int = 8, symmetric: bool = False, percentile: float = PERCENTILE
) -> Range:
    """Return the range for `bits`-bit integers by a method of METHODS; `symmetric` means without a zero point.

    All methods but minmax need a histogram. KeyError for an unknown method, ValueError for a missing histogram.
    """
    search = METHODS[method]
    low, high = min(stats.min, 0.0), max(stats.max, 0.0)
    if search is None:
        return Range(low, high)
    if stats.histogram is None:
        raise ValueError(f"{method} needs a histogram")
    filled = np.flatnonzero(stats.histogram)
    if not len(filled) or stats.high <= stats.low:
        return Range(low, high)
    inside = slice(filled[0], filled[-1] + 1)
    edges = np.linspace(stats.low, stats.high, len(stats.histogram) + 1)[inside.start : inside.stop + 1]
    counts, edges = _coarser(stats.histogram[inside].astype(np.float64), edges)
    least, most = search(_Search(counts, edges, low, high, bits, symmetric, percentile))
    return Range(float(min(max(least, low), 0.0)), float(max(min(most, high), 0.0)))


def _coarser(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge bins, the same number everywhere, until there are no more than _BINS."""
    times = -(-len(counts) // _BINS)
    padded = np.pad(counts, (0, -len(counts) % times))
    starts = edges[0] + (edges[1] - edges[0]) * times * np.arange(len(padded) // times + 1)
    return padded.reshape(-1, times).sum(axis=1), starts


@dataclass(frozen=True)
class _Search:
    """What a method works on: counts in bins between edges, and the extremes [low, high], which hold 0."""

    counts: np.ndarray
    edges: np.ndarray
    low: float
    high: float
    bits: int
    symmetric: bool
    percentile: float

    @property
    def width(self) -> float:
        """The width of a bin."""
        return float(self.edges[1] - self.edges[0])

    def magnitudes(self) -> _Search:
        """Return the histogram of |x|, each bin counted at its centre."""
        centres = np.abs(self.edges[:-1] + self.width / 2)
        counts = np.bincount((centres / self.width).astype(np.intp), weights=self.counts)
        edges = np.arange(len(counts) + 1) * self.width
        return dataclasses.replace(self, counts=counts, edges=edges, low=0.0, high=max(-self.low, self.high))


# --------------------------------------------------------------------------------------------- percentile


def _percentile(s: _Search) -> tuple[float, float]:
    if s.symmetric:
        end = _percentile(dataclasses.replace(s.magnitudes(), symmetric=False))[1]
        return -end, end
    cut = 1 - s.percentile / 100
    both = s.low < 0 < s.high
    below = np.concatenate([[0.0], np.cumsum(s.counts)]) / s.counts.sum()
    shares = [cut / 2, 1 - cut / 2] if both else [cut, 1 - cut]
    least, most = np.interp(shares, below, s.edges)
    return least, most


# --------------------------------------------------------------------------------------------- mse


def _mse(s: _Search) -> tuple[float, float]:
    """Search the factors by which the extremes shrink: one for both ends, then one for each, then more finely."""
    step = _NARROWEST ** (-1 / (_COARSE - 1))
    a = b = _best(s, coarse := np.geomspace(_NARROWEST, 1, _COARSE), coarse)[0]
    if s.symmetric or s.low == 0 or s.high == 0:
        a = b = _best(s, fine := np.linspace(a / step, min(a * step, 1), _FINE), fine)[0]
        return _ends(s, a, b)
    _, b = _best(s, np.full(_COARSE, a), coarse)
    a, _ = _best(s, coarse, np.full(_COARSE, b))
    for spread in (step, step**0.5):
        _, b = _best(s, np.full(_FINE, a), np.linspace(b / spread, min(b * spread, 1), _FINE))
        a, _ = _best(s, np.linspace(a / spread, min(a * spread, 1), _FINE), np.full(_FINE, b))
    return _ends(s, a, b)


def _best(s: _Search, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the pair of factors with the least error; of equal ones the widest, which stands last."""
    error = expected_error(s.counts, s.edges, *_ends(s, a, b), s.bits, s.symmetric)
    at = len(a) - 1 - int(np.argmin(error[::-1]))
    return float(a[at]), float(b[at])


def _ends(s: _Search, a: Any, b: Any) -> tuple[Any, Any]:
    """Return the ends for factors of the low and the high extreme (of the larger one: symmetric)."""
    if not s.symmetric:
        return a * s.low, b * s.high
    end = a * max(-s.low, s.high)
    return np.maximum(-end, s.low), np.minimum(end, s.high)


def expected_error(
    counts: np.ndarray, edges: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool
) -> np.ndarray:
    """Return E(l, h) of this file's head, for n ranges: `low`, `high` (n,) -> (n,); not divided by the counts' sum."""
    top = 2 ** (bits - 1) - 1
    scale = np.maximum(-low, high) / top if symmetric else (high - low) / (2**bits - 1)
    scale = np.maximum(scale, np.finfo(np.float64).tiny)[:, None]
    first = np.full_like(scale, -top - 1) if symmetric else np.rint(low[:, None] / scale)
    last = first + 2**bits - 1
    inside = np.clip(edges, first * scale, last * scale)
    nearest = np.rint(inside / scale)
    r, beyond = inside - nearest * scale, edges - inside
    g = scale**3 / 12 * nearest + (r * r * r + beyond * beyond * beyond) / 3  # ** would call pow on each element
    error: np.ndarray = np.diff(g, axis=1) @ (counts / (edges[1] - edges[0]))
    return error


# --------------------------------------------------------------------------------------------- entropy


def _entropy(s: _Search) -> tuple[float, float]:
    if s.symmetric:
        end = _entropy(dataclasses.replace(s.magnitudes(), symmetric=False, bits=s.bits - 1))[1]
        return -end, end
    counts, edges = without_zeros(s.counts, s.edges), s.edges
    levels, total = 2**s.bits, len(counts)
    noise = _noise(counts)
    first, last = 0, total
    if s.high > 0:
        least = max(int(np.searchsorted(edges, 0, side="right")), first + levels)
        ends = _tries(least, total)
        last = ends[_argmin_last([_divergence(counts, first, end, levels, noise) for end in ends])]
    if s.low < 0:
        most = min(int(np.searchsorted(edges, 0, side="left")), last - levels)
        starts = [total - end for end in _tries(total - most, total)]
        first = starts[_argmin_last([_divergence(counts, start, last, levels, noise) for start in starts])]
    return edges[first], edges[last]


def _tries(least: int, most: int) -> list[int]:
    """Return up to _ENDS ends from `least` to `most`, the widest last."""
    return sorted({most, *np.linspace(least, most, _ENDS).astype(int)} if least < most else {most})


def _argmin_last(figures: list[float]) -> int:
    return len(figures) - 1 - int(np.argmin(figures[::-1]))


def without_zeros(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the counts with the bin of 0 cut down to the larger of its neighbours."""
    at = int(np.clip(np.searchsorted(edges, 0, side="right") - 1, 0, len(counts) - 1))
    neighbours = counts[[i for i in (at - 1, at + 1) if 0 <= i < len(counts)]]
    cut = counts.copy()
    cut[at] = min(cut[at], neighbours.max(initial=0.0)) if len(neighbours) else cut[at]
    return cut


def _noise(counts: np.ndarray) -> float:
    """Return the variance of a count relative to its mean, from how much neighbours differ."""
    pairs = counts[: len(counts) // 2 * 2].reshape(-1, 2)
    return float(((pairs[:, 0] - pairs[:, 1]) ** 2).sum() / max(pairs.sum(), 1.0))


def _divergence(counts: np.ndarray, first: int, last: int, levels: int, noise: float) -> float:
    """Return KL(P || Q) for the candidate [first, last) of bins, without the part that is chance."""
    inside = counts[first:last]
    filled = inside > 0
    if len(inside) < levels or not filled.any():
        return 0.0 if filled.any() else math.inf
    p = inside.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    starts = -(-np.arange(levels) * len(inside) // levels)
    number = np.add.reduceat(filled.astype(np.float64), starts)
    level = np.add.reduceat(inside, starts) / np.maximum(number, 1)
    q = np.repeat(level, np.diff(starts, append=len(inside))) * filled
    p, q = p / p.sum(), np.maximum(q / q.sum(), _EMPTY)
    some = p > 0
    chance = noise * (filled.sum() - np.count_nonzero(number)) / (2 * inside.sum())
    return float((p[some] * np.log(p[some] / q[some])).sum() - chance)


#: Name -> search over a histogram; None needs the extremes only.
METHODS: Mapping[str, Callable[[_Search], tuple[float, float]] | None] = {
    "minmax": None,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}


# --------------------------------------------------------------------------------------------- as a file


def to_json(ranges: Mapping[str, Range], path: Path, meta: Mapping[str, object] | None = None) -> None:
    """Write a ranges file: {"ranges": {tensor: {"min", "max"}}, …} with the entries of `meta` beside. OutputError."""
    table = {name: {"min": r.min, "max": r.max} for name, r in ranges.items()}
    write_atomic(path, json.dumps({**(meta or {}), "ranges": table}, indent=1, allow_nan=False) + "\n")


def from_json(path: Path) -> dict[str, Range]:
    """Read a ranges file. DataError, naming the tensor, for what is no range."""
    where = str(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where, fix="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError("is not text", where=where, fix=_FIX) from error
    except json.JSONDecodeError as error:
        raise DataError(f"is not valid JSON: {error.msg}", where=f"{where}, line {error.lineno}", fix=_FIX) from error
    table = document.get("ranges") if isinstance(document, dict) else None
    if not isinstance(table, dict):
        raise DataError('has no "ranges" object', where=where, fix=_FIX)
    return {name: _range(name, entry, where) for name, entry in table.items()}


def _range(name: str, entry: object, where: str) -> Range:
    ends = [entry.get(key) for key in ("min", "max")] if isinstance(entry, dict) else []
    numbers = [float(end) for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(numbers) != 2:
        raise DataError(f"tensor {name!r} has no numbers min and max", where=where, fix=_FIX)
    if not all(map(math.isfinite, numbers)) or numbers[0] > numbers[1]:
        what = f"tensor {name!r} has the range {numbers[0]} to {numbers[1]}"
        raise DataError(what, where=where, fix="both ends must be finite, and min not above max")
    return Range(*numbers)


_FIX = 'write it with edgec calibrate; it looks like {"ranges": {"tensor": {"min": -1.0, "max": 2.5}}}'
