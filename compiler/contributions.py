"""What each source of rounding adds to the error at the network's outputs: alone, and on top of those before it.

With y the outputs of the float model and y_S those with the sources S at work (switchboard.py), over all images and
elements, per output,

    E(S) = sum (y_S - y)^2 / sum y^2            -10 log10 E = SQNR in dB

Additive model (independent noise; e.g. Zhou et al. 2018, "Adaptive Quantization for Deep Neural Network"): the error
of an assignment is the sum of what its sources add, E(S) = sum of e_s. What a source adds depends on which others are
there: ranking by isolated error is not enough (Schaefer et al. 2023, "Mixed Precision Post Training Quantization of
Neural Networks with Sensitivity Guided Search"). Measured here are both ends, each source alone, a_s = E({s}), and
the running sum in graph order, E({1..l}). The sum A of a_s is right within 1 dB where errors stay small, and too large
where they do not (by 1.6 dB at an SQNR of 16 dB): clipping and ReLU bound what can go wrong. One number g, fitted on
random subsets, takes that out, and leaves the order of sums as it is:

    E(S) = A / (1 + g A),   A = sum of a_s over S        A = E / (1 - g E)

Measuring instead what E loses when one source is taken out of the full set does not help: cross terms drown it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar

from .types import Progress, silent

if TYPE_CHECKING:
    from .fidelity import Batch
    from .switchboard import Source, Switchboard
    from .units import Wiring


@dataclass(frozen=True, eq=False)
class Contributions:
    """The error that each source adds, relative to the outputs' energy and averaged over the outputs.

    `alone` (sources,): each with nothing else rounded. `saturation` is g above, and `misfit_db` by how much the
    predictions are off at most on the random subsets that it was fitted on.
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

    def predict(self, units: Iterable[str]) -> float:
        """Return the predicted error with these units, and no others, on integers."""
        chosen = set(units)
        on = np.array([not chosen.isdisjoint(source.units) for source in self.sources], dtype=bool)
        return self.expected(float(self.alone[on].sum()))

    def expected(self, added: float) -> float:
        """Return the error to expect where the sources' own add up to `added`."""
        return added / (1 + self.saturation * added)

    def allowance(self, error: float) -> float:
        """Return to how much the sources' own errors may add up so that `error` is to be expected (math.inf: any)."""
        room = 1 - self.saturation * error
        return error / room if room > 0 else math.inf

    def by_unit(self) -> dict[str, float]:
        """Return each unit's own error alone: its weights' and, where it hands on a rounded tensor, that rounding."""
        found: dict[str, float] = {}
        for source, error in zip(self.sources, self.alone, strict=True):
            found[source.units[0]] = found.get(source.units[0], 0.0) + float(error)
        return found


def measure(
    board: Switchboard,
    wiring: Wiring,
    batches: Iterable[Batch],
    *,
    images: int,
    subsets: int = 12,
    cumulative: bool = True,
    seed: int = 0,
    deadline: float | None = None,
    progress: Progress = silent,
) -> Contributions:
    """Measure every source alone, units cumulatively, and random subsets of the units, on the same batches.

    A batch is finished for all before the next one starts: after the first one, `deadline` (on time.monotonic's
    clock) ends the measurement between any two runs, and what the finished batches showed is returned.
    """
    names = [unit.name for unit in wiring.units]
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.05, 0.95, subsets)
    picked = [wiring.realised({n for n in names if rng.random() < share}) for share in shares]
    prefixes = [wiring.realised(set(names[: i + 1])) for i in range(len(names))] if cumulative else []
    runs = [[i] for i in range(len(board.sources))] + [board.indices(units) for units in [names, *picked, *prefixes]]
    errors = _errors(board, batches, runs, images, deadline, progress)
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
    batches: Iterable[Batch],
    runs: Sequence[Sequence[int]],
    images: int,
    deadline: float | None,
    progress: Progress,
) -> _Errors:
    """Return the relative error of each run (a set of active sources), averaged over the outputs."""
    error, signal = np.zeros(()), np.zeros(())  # of (runs, outputs) and (outputs,) after the first batch
    done = 0
    for batch in batches:
        exact = board.run(batch.feed, ())
        found = np.zeros((len(runs), len(exact)), dtype=np.float64)
        for i, active in enumerate(runs):
            if done and deadline is not None and time.monotonic() > deadline:
                return _Errors((error / signal).mean(1), done)
            found[i] = [_energy(y - z) for y, z in zip(exact, board.run(batch.feed, active), strict=True)]
            progress("judging every rounding", done * len(runs) + batch.count * (i + 1), images * len(runs))
        error, done = error + found, done + batch.count
        signal = signal + np.maximum([_energy(y) for y in exact], 1e-300)
    return _Errors((error / signal).mean(1), done)


def _energy(y: np.ndarray) -> float:
    flat = y.reshape(-1).astype(np.float64)
    return float(flat @ flat)


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
