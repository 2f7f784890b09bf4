"""The latency of layers by shape, from kernels timed in real networks; and what a network of such layers takes.

Algebra. A node of family f that reads i and writes o (shapes.py) takes t_f(i, o), and one call of the network

    T = c + sum over nodes of t(i, o)

The profiler slows what it watches: a kernel that it times at t takes a t - b, and a call costs c besides. a, b, c >= 0
are such that the sums fit the whole networks' latencies, measured without the profiler (least relative squares); b is
in the order of what short kernels take: networks whose time is in two kernels would leave it open. What is left
unexplained of a network is shared out among its nodes.

Between the shapes that were timed, t_f is least squares with coefficients >= 0 over

    1, I, O, I O, i [i not a multiple of m], o [o not a multiple of m]        I, O: i, o rounded up to a multiple of m

since kernels work on blocks of m channels: what is cut inside a block saves nothing, and channels that fill no block
may bring about another layout. m is the one of BLOCKS with which all families fit best. The fit is then led through
the nearest shapes that were timed: t = fit * (timed / fit at the nearest), the ratio interpolated by distance.

Timed shapes are kept (memory.py) under the machine, its runtime, the threads and the precision, and not under the
network: layers of one shape are timed once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import lsq_linear, nnls

from ..memory import Memory

#: Channels that kernels may work on at a time.
BLOCKS = (1, 4, 8, 16, 32, 64)
#: The family of what a call costs besides its nodes.
CALL = "call"
#: Milliseconds below which a kernel's time is noise: the profiler counts whole microseconds.
_NOISE_MS = 2e-3
_NEAREST = 2
#: How far from 1 the profiler's scale may be: on a small ViT 1.12 foretold speed-ups 12 % too large, 0.95 3 to 6 %.
_NEAR = 0.05
#: Kernels up to this quantile are short; what the profiler costs of one is at most so many times as much.
_SHORT, _COSTLY = 0.1, 4.0
#: What a network took and what the profiler says of its nodes, beside another one's, may differ by this factor.
_STEADY = 1.25
#: Under which the misfit and the profiler's (a, b) are kept.
_TIMING = "timing"


@dataclass(frozen=True)
class Timed:
    """One network that was timed: by node, (family, read, written, milliseconds, kernels); and the whole's latency."""

    nodes: Sequence[tuple[str, float, float, float, int]]
    whole_ms: float


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Milliseconds by family and (read, written).

    `misfit`: the largest relative error on networks that were timed; `profiler`: the (a, b) above.
    """

    known: Mapping[str, Mapping[tuple[float, float], float]]
    misfit: float = 0.0
    profiler: tuple[float, float] = (1.0, 0.0)

    @property
    def call_ms(self) -> float:
        """What a call costs besides its nodes."""
        return dict(self.known.get(CALL, {})).get((0.0, 0.0), 0.0)

    def ms(self, family: str, inputs: float, outputs: float) -> float | None:
        """Return the milliseconds of a node; None for a family of which nothing was timed."""
        points = self.known.get(family)
        if not points:
            return None
        if inputs <= 0 or outputs <= 0:
            return 0.0
        exact = points.get((inputs, outputs))
        if exact is not None:
            return exact
        at, times = np.array(list(points)), np.array(list(points.values()))
        weights = self._weights[family]
        fitted = float((_features(np.array([[inputs, outputs]]), self.block) @ weights)[0])
        ratios = (times + _NOISE_MS) / (_features(at, self.block) @ weights + _NOISE_MS)
        distance = np.abs(np.log(at / [inputs, outputs])).sum(axis=1)
        near = np.argsort(distance, kind="stable")[:_NEAREST]
        closeness = 1 / (distance[near] + 1e-6)
        ratio = float((ratios[near] * closeness).sum() / closeness.sum())
        return max(fitted * ratio, 0.0)

    def knows(self, family: str, inputs: float, outputs: float) -> bool:
        """Say whether this very shape was timed."""
        return (inputs, outputs) in self.known.get(family, {})

    def learned(self, whole: Timed, whole_ms: float, other: Timed) -> LatencyTable:
        """Return the table with another network's shapes, timed beside one that is known to take `whole_ms`.

        The machine may be slower or faster than it was. What both networks have keeps its time, so the whole network
        takes what it took; the other shapes share what the other network took beyond that.
        """
        drift = whole_ms / whole.whole_ms
        usual, scale = (self._scale(one, drift) for one in (whole, other))
        if not 1 / _STEADY <= scale / usual <= _STEADY:
            return self  # somebody else used the machine while one of them was timed
        both = {node[:3] for node in whole.nodes}
        kept = sum(self.ms(*node[:3]) or 0.0 for node in other.nodes if node[:3] in both)
        own = [
            (node, ms) for node, ms in zip(other.nodes, self._undistorted(other), strict=True) if node[:3] not in both
        ]
        left = max(other.whole_ms * drift - self.call_ms - kept, 0.0) / max(sum(ms for _, ms in own), 1e-9)
        found: dict[str, dict[tuple[float, float], list[float]]] = defaultdict(lambda: defaultdict(list))
        for (family, inputs, outputs, *_), ms in own:
            found[family][inputs, outputs].append(left * ms)
        known = {**self.known}
        for family, points in found.items():
            known[family] = {**known.get(family, {}), **{at: float(np.median(t)) for at, t in points.items()}}
        return replace(self, known=known)

    def _scale(self, network: Timed, drift: float) -> float:
        """Return what a network took over what the profiler says of its nodes."""
        return max(network.whole_ms * drift - self.call_ms, 0.0) / max(sum(self._undistorted(network)), 1e-9)

    def _undistorted(self, network: Timed) -> list[float]:
        a, b = self.profiler
        return [max(a * ms - b * kernels, 0.0) for *_, ms, kernels in network.nodes]

    @cached_property
    def block(self) -> int:
        """How many channels the kernels here work on at a time: what explains the families best."""
        errors = {block: sum(_fit(points, block)[1] for points in self._varied()) for block in BLOCKS}
        return min(errors, key=lambda block: (errors[block], block))

    def _varied(self) -> list[Mapping[tuple[float, float], float]]:
        return [points for points in self.known.values() if len(points) > 2]

    @cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        return {family: _fit(points, self.block)[0] for family, points in self.known.items() if family != CALL}


def _features(at: np.ndarray, block: int) -> np.ndarray:
    """Return what t is linear in, (points, 6), for points (n, 2) of read and written."""
    up = np.ceil(at / block) * block
    odd = np.where(at % block > 0, at, 0.0)
    return np.stack([np.ones(len(at)), up[:, 0], up[:, 1], up[:, 0] * up[:, 1], odd[:, 0], odd[:, 1]], axis=1)


def _fit(points: Mapping[tuple[float, float], float], block: int) -> tuple[np.ndarray, float]:
    """Return the coefficients of the features, and the sum of the relative squared errors that they leave."""
    rows, times = _features(np.array(list(points)), block), np.array(list(points.values()))
    scale = np.maximum(rows.max(axis=0), 1e-12)
    each = 1 / (times + _NOISE_MS)
    found, rest = nnls(rows / scale * each[:, None], times * each)
    return found / scale, float(rest) ** 2


# ------------------------------------------------------------------------------------------- from measurements


def from_timed(networks: Sequence[Timed]) -> LatencyTable:
    """Return the table of networks that were timed side by side: the median where a shape was timed several times."""
    a, b, call = _overhead(networks)
    found: dict[str, dict[tuple[float, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    found[CALL][0.0, 0.0].append(call)
    for network in networks:
        times = [max(a * ms - b * kernels, 0.0) for *_, ms, kernels in network.nodes]
        share = max(network.whole_ms - call, 0.0) / max(sum(times), 1e-9)  # what a and b leave unexplained of it
        for (family, inputs, outputs, *_), ms in zip(network.nodes, times, strict=True):
            found[family][inputs, outputs].append(share * ms)
    known = {f: {at: float(np.median(times)) for at, times in points.items()} for f, points in found.items()}
    sums = [call + sum(known[f][i, o] for f, i, o, _, _ in network.nodes) for network in networks]
    misfits = [abs(total / network.whole_ms - 1) for total, network in zip(sums, networks, strict=True)]
    return LatencyTable(known, max(misfits, default=0.0), (a, b))


def _overhead(networks: Sequence[Timed]) -> tuple[float, float, float]:
    """Return (a, b, c): a kernel timed at t takes a t - b, and a call c besides.

    a is near 1, since it and b are hard to tell apart; b is in the order of what short kernels take; a call costs no
    more than the fastest network.
    """
    whole = np.array([network.whole_ms for network in networks])
    sums = [(sum(ms for *_, ms, _ in n.nodes), sum(kernels for *_, kernels in n.nodes)) for n in networks]
    rows = np.concatenate([np.array(sums, dtype=np.float64) * [1, -1], np.ones((len(networks), 1))], axis=1)
    each = [ms / kernels for n in networks for *_, ms, kernels in n.nodes if kernels]
    most = (1 + _NEAR, _COSTLY * float(np.quantile(each, _SHORT)) if each else 0.0, float(whole.min()))
    found = lsq_linear(rows / whole[:, None], np.ones(len(networks)), ((1 - _NEAR, 0.0, 0.0), np.maximum(most, 1e-12)))
    a, b, c = map(float, found.x)
    return a, b, c


# ------------------------------------------------------------------------------------------- kept


def recall(memory: Memory, wanted: Mapping[str, Sequence[tuple[float, float]]]) -> LatencyTable | None:
    """Return the table of these families' shapes; None unless all of them are known."""
    known: dict[str, dict[tuple[float, float], float]] = {}
    for family, points in {CALL: [(0.0, 0.0)], **wanted}.items():
        kept = memory.get(family)
        if kept is None:
            return None
        known[family] = {(float(i), float(o)): ms for i, o, ms in kept}
        if any(point not in known[family] for point in points):
            return None
    misfit, *profiler = memory.get(_TIMING) or (0.0, 1.0, 0.0)
    return LatencyTable(known, misfit, (profiler[0], profiler[1]))


def remember(memory: Memory, table: LatencyTable) -> LatencyTable:
    """Keep a table's shapes beside those of the same families that are known already; return all of them."""
    merged = {}
    for family, points in table.known.items():
        kept = {(float(i), float(o)): ms for i, o, ms in memory.get(family) or ()}
        merged[family] = {**kept, **points}
        memory.put(family, [[*at, ms] for at, ms in merged[family].items()])
    memory.put(_TIMING, [table.misfit, *table.profiler])
    return replace(table, known=merged)
