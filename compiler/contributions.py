"""What each source of rounding adds to the error at the network's outputs: alone, and on top of those before it.

With y the outputs of the float model and y_S those with the sources S at work (switchboard.py), over all images and
elements, per output,

    E(S) = sum (y_S - y)^2 / sum y^2            -10 log10 E = SQNR in dB

Additive model (independent noise; e.g. Zhou et al. 2018, "Adaptive Quantization for Deep Neural Network"): the error
of an assignment is the sum of what its sources add, E(S) = sum of e_s. What a source adds depends on which others are
there: ranking by isolated error is not enough (Schaefer et al. 2023, "Mixed Precision Post Training Quantization of
Neural Networks with Sensitivity Guided Search"). Measured here are both ends, each source alone, a_s = E({s}), and
the running sum in graph order, E({1..l}). The sum of a_s is right within 1 dB where rounding errors stay small, and
too large by up to 2 dB in a network in which they do not (SQNR below 20 dB). A single factor, fitted on random
subsets, takes out most of that. Removing one source from the full set does not help: cross terms drown what it adds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .types import Progress, silent

if TYPE_CHECKING:
    from .fidelity import Batch
    from .switchboard import Source, Switchboard
    from .units import Wiring


@dataclass(frozen=True, eq=False)
class Contributions:
    """The error that each source adds, relative to the outputs' energy and averaged over the outputs.

    `alone` (sources,): each with nothing else rounded. `factor` turns their sums into measured errors: it was fitted
    on random subsets (see `measure`), `misfit_db` is how far the sums times the factor still were from those.
    `cumulative`: for each unit in graph order, the error with all units up to it on integers, measured. `full`: with
    all of them. `images`: how many were seen.
    """

    sources: tuple[Source, ...]
    alone: np.ndarray
    factor: float
    misfit_db: float
    full: float
    cumulative: Mapping[str, float]
    images: int

    @property
    def predicted(self) -> np.ndarray:
        """What each source adds to a sum, by the additive model."""
        return self.factor * self.alone

    def predict(self, units: Iterable[str]) -> float:
        """Return the predicted error with these units, and no others, on integers."""
        chosen = set(units)
        on = np.array([not chosen.isdisjoint(source.units) for source in self.sources], dtype=bool)
        return float(self.predicted[on].sum())

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
    shares = rng.uniform(0.2, 0.9, subsets)
    picked = [wiring.realised({n for n in names if rng.random() < share}) for share in shares]
    prefixes = [wiring.realised(set(names[: i + 1])) for i in range(len(names))] if cumulative else []
    runs = [[i] for i in range(len(board.sources))] + [board.indices(units) for units in [names, *picked, *prefixes]]
    errors = _errors(board, batches, runs, images, deadline, progress)
    alone = errors.values[: len(board.sources)]
    full, rest = errors.values[len(board.sources)], errors.values[len(board.sources) + 1 :]
    factor, misfit = _fit(alone, runs[len(board.sources) + 1 :][:subsets], rest[:subsets])
    return Contributions(
        board.sources, alone, factor, misfit, float(full),
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
    error: np.ndarray | float = 0.0
    signal: np.ndarray | float = 0.0
    done = 0
    for batch in batches:
        exact = board.run(batch.feed, ())
        found = np.zeros((len(runs), len(exact)), dtype=np.float64)
        for i, active in enumerate(runs):
            if done and deadline is not None and time.monotonic() > deadline:
                return _Errors((error / signal).mean(1), done)  # type: ignore[union-attr]  # arrays after one batch
            found[i] = [_energy(y - z) for y, z in zip(exact, board.run(batch.feed, active), strict=True)]
            progress("judging every rounding", done * len(runs) + batch.count * (i + 1), images * len(runs))
        error, done = error + found, done + batch.count
        signal = signal + np.maximum([_energy(y) for y in exact], 1e-300)
    return _Errors((error / signal).mean(1), done)  # type: ignore[union-attr]


def _energy(y: np.ndarray) -> float:
    flat = y.reshape(-1).astype(np.float64)
    return float(flat @ flat)


def _fit(alone: np.ndarray, subsets: Sequence[Sequence[int]], measured: np.ndarray) -> tuple[float, float]:
    """Return the factor with the least squared error in dB over the subsets, and the largest error in dB left.

    One number is all that is fitted: errors that add up over many layers saturate (clipping, ReLU), alike everywhere.
    """
    sums = np.array([alone[list(active)].sum() for active in subsets])
    seen = (sums > 0) & (measured > 0)
    if not seen.any():
        return 1.0, 0.0
    decibels = 10 * np.log10(measured[seen] / sums[seen])
    return float(10 ** (decibels.mean() / 10)), float(np.abs(decibels - decibels.mean()).max())
