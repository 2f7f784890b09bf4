"""What each source of rounding adds to the error at the network's outputs: alone, and on top of those before it.

With y the outputs of the float model and y_S those with the sources S at work (switchboard.py), over all images and
elements, per output,

    E(S) = sum (y_S - y)^2 / sum y^2            -10 log10 E = SQNR in dB

Additive model (independent noise; e.g. Zhou et al. 2018, "Adaptive Quantization for Deep Neural Network"): the error
of an assignment is the sum of what its sources add, E(S) = sum of e_s. What a source adds depends on which others are
there: ranking by isolated error is not enough (Schaefer et al. 2023, "Mixed Precision Post Training Quantization of
Neural Networks with Sensitivity Guided Search"). Measured here are both ends, each source alone, a_s = E({s}), and
the running sum in graph order, E({1..l}). The sum A of a_s is right within 1 dB where errors stay small, and too large
where they do not: clipping and ReLU bound what can go wrong, and weights that were rounded to make up for what earlier
layers lost (rounder.py) err more alone than together (by 3 dB on FastestDet). One number g, fitted on random subsets,
takes that out, and leaves the order of sums as it is:

    E(S) = A / (1 + g A),   A = sum of a_s over S

But a_s comes from a few images (sampling.py), on which errors may be larger or smaller than on most (by 1 to 2 dB with
4 images).
Where some assignments A_1 < A_2 < … were built and measured on many images (`through`), what they show is taken over:

    E(S) = r(A) A / (1 + g A),   r(A_i) = measured over predicted, log r linear in log A between them, constant beyond

These are everything on integers, and everything but what errs most alone (`lighter`). So of the few images only how
the error is shared out is used.

Measuring instead what E loses when one source is taken out of the full set does not help: cross terms drown it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar

from ..types import Progress, silent

if TYPE_CHECKING:
    from ..fidelity import Batch
    from ..memory import Memory
    from .switchboard import Source, Switchboard
    from .units import Wiring


@dataclass(frozen=True, eq=False)
class Contributions:
    """The error that each source adds, relative to the outputs' energy and averaged over the outputs.

    `alone` (sources,): each with nothing else rounded. `saturation` is g above, and `misfit_db` by how much the
    predictions are off at most on the random subsets that it was fitted on, without what was `measured` later: points
    (sum of the sources' own errors, error) in rising order of the sums.
    `cumulative`: for each unit in graph order, the error with all units up to it on integers, measured. `full`: with
    all of them. `images`: how many were seen.
    """

    sources: tuple[Source, ...]
    alone: np.ndarray
    saturation: float
    misfit_db: float
    full: float
    cumulative: Mapping[str, float]
    images: int
    measured: tuple[tuple[float, float], ...] = ()

    def added(self, units: Iterable[str]) -> float:
        """Return to what the errors of all sources add up that work with these units, and no others, on integers."""
        chosen = set(units)
        on = np.array([source.works(chosen) for source in self.sources], dtype=bool)
        return float(self.alone[on].sum())

    def predict(self, units: Iterable[str]) -> float:
        """Return the predicted error with these units, and no others, on integers."""
        return self.expected(self.added(units))

    def expected(self, added: float) -> float:
        """Return the error to expect where the sources' own add up to `added`."""
        law = added / (1 + self.saturation * added)
        if not self.measured or added <= 0:
            return law
        sums, errors = np.array(self.measured).T
        ratios = np.log(errors * (1 + self.saturation * sums) / sums)
        return law * float(np.exp(np.interp(math.log(added), np.log(sums), ratios)))

    def lighter(self, wiring: Wiring, share: float) -> frozenset[str]:
        """Return the units left when those that err most leave one by one until `share` of the sum is left."""
        own = self.by_unit()
        units = sorted((unit.name for unit in wiring.units), key=lambda name: -own.get(name, 0.0))
        most = share * self.added(units)
        for count in range(len(units)):
            left = wiring.realised(set(units[count:]))
            if self.added(left) <= most:
                return frozenset(left)
        return frozenset()

    def through(self, measured: Iterable[tuple[float, float]]) -> Contributions:
        """Return the same with predictions that go through these points, too; those of no use are left out."""
        useful = {a: e for a, e in (*self.measured, *measured) if 0 < a < math.inf and 0 < e < math.inf}
        return replace(self, measured=tuple(sorted(useful.items())))

    def by_unit(self) -> dict[str, float]:
        """Return each unit's own error alone: its weights', and where it hands on a rounded tensor, that rounding."""
        found: dict[str, float] = {}
        for source, error in zip(self.sources, self.alone, strict=True):
            if source.unless is None:
                found[source.units[0]] = found.get(source.units[0], 0.0) + float(error)
        return found


def measure(
    board: Switchboard,
    wiring: Wiring,
    batches: Iterable[Batch],
    *,
    images: int,
    subsets: int = 6,
    cumulative: bool = True,
    seed: int = 0,
    deadline: float | None = None,
    progress: Progress = silent,
    memory: Memory | None = None,
    weights: np.ndarray | None = None,
) -> Contributions:
    """Measure every source alone, units cumulatively, and random subsets of the units, on the same batches.

    A batch is finished for all before the next one starts: after the first one, `deadline` (on time.monotonic's
    clock) ends the measurement between any two runs, and what the finished batches showed is returned. `memory`: what
    was measured of the same board and batches before, and where what is measured now is kept, run by run. `weights`:
    how many images each one stands for (sampling.py); all alike where None.
    """
    names = [unit.name for unit in wiring.units]
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.25, 0.95, subsets)
    picked = [wiring.realised({n for n in names if rng.random() < share}) for share in shares]
    prefixes = [wiring.realised(set(names[: i + 1])) for i in range(len(names))] if cumulative else []
    runs = [[i] for i in range(len(board.sources))] + [board.indices(units) for units in [names, *picked, *prefixes]]
    weighted = _weighted(batches, np.ones(images) if weights is None else weights)
    errors = _errors(board, weighted, runs, images, deadline, progress, memory)
    alone = errors.values[: len(board.sources)]
    full, rest = errors.values[len(board.sources)], errors.values[len(board.sources) + 1 :]
    saturation, misfit = _fit(alone, runs[len(board.sources) + 1 :][:subsets], rest[:subsets])
    return Contributions(
        board.sources, alone, saturation, misfit, float(full),
        dict(zip(names, rest[subsets:].tolist(), strict=False)), errors.images,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Errors:
    values: np.ndarray  # (runs,)
    images: int


def _errors(
    board: Switchboard,
    batches: Iterable[tuple[Batch, np.ndarray]],
    runs: Sequence[Sequence[int]],
    images: int,
    deadline: float | None,
    progress: Progress,
    memory: Memory | None,
) -> _Errors:
    """Return the relative error of each run (a set of active sources), averaged over the outputs."""
    error, signal = np.zeros(()), np.zeros(())  # of (runs, outputs) and (outputs,) after the first batch
    done = 0
    for batch, weights in batches:
        exact = board.run(batch.feed, ())
        found = np.zeros((len(runs), len(exact)), dtype=np.float64)
        for i, active in enumerate(runs):
            item = f"{done} {sorted(active)}"
            known = None if memory is None else memory.get(item)
            if known is None:
                if done and deadline is not None and time.monotonic() > deadline:
                    return _Errors((error / signal).mean(1), done)
                known = [_energy(y - z, weights) for y, z in zip(exact, board.run(batch.feed, active), strict=True)]
                if memory is not None:
                    memory.put(item, known)
            found[i] = known
            progress("judging every rounding", done * len(runs) + batch.count * (i + 1), images * len(runs))
        error, done = error + found, done + batch.count
        signal = signal + np.maximum([_energy(y, weights) for y in exact], 1e-300)
    return _Errors((error / signal).mean(1), done)


def _weighted(batches: Iterable[Batch], weights: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield each batch with the weights of its images; rows that only pad it have none."""
    done = 0
    for batch in batches:
        yield batch, weights[done : done + batch.count]
        done += batch.count


def _energy(y: np.ndarray, weights: np.ndarray) -> float:
    """Return the weighted sum of the images' energies; where the first axis is not theirs, by the mean weight."""
    if not y.ndim or len(y) < len(weights):
        return float(np.square(y, dtype=np.float64).sum() * weights.mean())
    rows = y[: len(weights)].reshape(len(weights), -1)
    return float(np.square(rows, dtype=np.float64).sum(axis=1) @ weights)


def _fit(alone: np.ndarray, subsets: Sequence[Sequence[int]], measured: np.ndarray) -> tuple[float, float]:
    """Return the saturation with the least squared error in dB over the subsets, and the largest error in dB left."""
    sums = np.array([alone[list(active)].sum() for active in subsets])
    seen = (sums > 0) & (measured > 0)
    if not seen.any():
        return 0.0, 0.0
    sums, measured = sums[seen], measured[seen]

    def misfits(g: float) -> np.ndarray:
        found: np.ndarray = 10 * np.log10(sums / (1 + g * sums) / measured)
        return found

    largest = 10 / float(sums.max())  # at this end even the largest sum is cut to a tenth
    g = float(minimize_scalar(lambda g: float((misfits(g) ** 2).sum()), bounds=(0.0, largest), method="bounded").x)
    return g, float(np.abs(misfits(g)).max())
