"""What was seen of a model image by image, beside its original, and the figures that are made of it.

Algebra, per output y of the original and z of the model, sums over elements in float64:

    SQNR = 10 log10( sum y^2 / sum (y - z)^2 )  [dB]        cosine = sum y z / sqrt(sum y^2 sum z^2)

What is lost is, for each metric, a ratio of sums over the images i, or the difference of two, in points:
lost = 100 (sum a_i / sum b_i - sum c_i / sum d_i), without c and d where they are not named, with

    top1       a = correct(y) - correct(z)       b = 1                labelled images, classifier-shaped output
    agreement  a = [argmax y != argmax z]        b = 1                no labels, classifier-shaped output
    boxes      a = boxes without a partner       b = all boxes        a decoder was given: 100 (1 - F1 at IoU 0.5)
    boxes-labelled  a = 2 tp(y), c = 2 tp(z)     b, d = boxes + true boxes    a decoder and box labels: F1(y) - F1(z)
    metric     a = 1 - score                     b = 1                the user's own function of two outputs
    energy     a = sum (y - z)^2                 b = sum y^2          anything else, the worst output (1 point is 20 dB)

so that everything which is resampled is a sum of columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .boxes import Ranked, average_precision
from .types import BoxFidelity, Fidelity, OutputFidelity

#: How often the images are drawn anew for an interval.
DRAWS = 1000
#: The error energies, relative to the signal's, that are told apart: what lies below, float32 kernels that sum in
#: another order differ by; above the other end nothing is left of the signal.
_LEAST, _MOST = 1e-10, 1e10


@dataclass(frozen=True, eq=False)
class PerImage:
    """One model beside another on the same images: arrays with a row an image (n of them), in the images' order.

    `energies`: output -> (n, 4) float64, sums of y^2, (y - z)^2, y z, z^2; a row a batch where the output has no batch
    axis. `answers`: output -> (n,) bool, whether both give the same class. `right`: (n, 4) float64, the original's
    top-1 and top-5 hits, then the model's. `scores`: (n, 2) float64, numerator and denominator of F1 or of the user's
    score; (n, 4) beside box labels, the original's two, then the model's. `boxes`: all boxes that were compared. What
    does not apply is empty or None.
    """

    metric: str
    energies: Mapping[str, np.ndarray] = field(default_factory=dict)
    answers: Mapping[str, np.ndarray] = field(default_factory=dict)
    right: np.ndarray | None = None
    scores: np.ndarray | None = None
    boxes: Ranked | None = None

    @property
    def lost(self) -> np.ndarray | None:
        """The columns (a, b) or (a, b, c, d) of the algebra above, (n, 2) or (n, 4) float64.

        None where there is nothing to compare.
        """
        if self.metric == "boxes-labelled":
            return self.scores
        if self.scores is not None:
            return np.stack([self.scores[:, 1] - self.scores[:, 0], self.scores[:, 1]], axis=1)
        if self.right is not None:
            return _over_one(self.right[:, 0] - self.right[:, 2])
        if self.answers:
            return _over_one(1.0 - next(iter(self.answers.values())))
        return self._worst_energies()

    @property
    def error_db(self) -> np.ndarray:
        """(n,) float64: the error energy of each image's worst output over the signal's, in dB (minus its SQNR).

        From -100 to 100. ValueError where no float output was compared.
        """
        rows = max(len(sums) for sums in self.energies.values())
        whole = [sums for sums in self.energies.values() if len(sums) == rows]
        shares = np.max([_share(sums[:, 1], sums[:, 0]) for sums in whole], axis=0)
        found: np.ndarray = 10 * np.log10(np.clip(np.nan_to_num(shares, nan=_MOST), _LEAST, _MOST))
        return found

    def fidelity(self, seed: int) -> Fidelity:
        """Return the figures, with a 95 % interval of what is lost by resampling the images (paired bootstrap)."""
        outputs = tuple(self._output(name, sums) for name, sums in self.energies.items())
        lost = self.lost
        if lost is None:
            why = "the model has no float output to compare"
            return Fidelity("energy", 0, None, None, None, None, None, reason=why)
        drop = 100 * float(ratio(lost.sum(0)))
        low, high = interval(100 * ratio(resampled(lost, seed)))
        if self.metric == "top1" and self.right is not None:
            before, before5, after, after5 = (float(mean) for mean in 100 * self.right.mean(0))
            return Fidelity(
                "top1", len(lost), before, after, drop, low, high, outputs, top5=after5, reference_top5=before5
            )
        before = 100.0 if lost.shape[1] == 2 else 100 * float(ratio(lost.sum(0)[:2]))
        boxes = None if self.boxes is None else _precision(self.boxes)
        return Fidelity(self.metric, len(lost), before, before - drop, drop, low, high, outputs, boxes=boxes)

    def _output(self, name: str, sums: np.ndarray) -> OutputFidelity:
        signal, error, dot, other = sums.sum(0)
        sqnr = float(10 * np.log10(signal / error)) if error > 0 and signal > 0 else None
        cosine = float(dot / np.sqrt(signal * other)) if signal > 0 and other > 0 else None
        agree = self.answers.get(name)
        return OutputFidelity(name, sqnr, cosine, None if agree is None else 100 * float(agree.mean()))

    def _worst_energies(self) -> np.ndarray | None:
        columns = [sums[:, 1::-1] for sums in self.energies.values()]
        return max(columns, key=lambda c: float(_share(*c.sum(0))), default=None)


def _precision(found: Ranked) -> BoxFidelity:
    after = _percent(average_precision(found.model))
    before = (100.0, 100.0) if found.original is None else _percent(average_precision(found.original))
    return BoxFidelity(found.truth, len(found.model.truth), *after, *before)


def _percent(found: np.ndarray | None) -> tuple[float | None, float | None]:
    """Return AP at IoU 0.5 and the mean over all IoUs, in percent."""
    return (None, None) if found is None else (100 * float(found[0]), 100 * float(found.mean()))


def _over_one(a: np.ndarray) -> np.ndarray:
    return np.stack([a.astype(np.float64), np.ones(len(a))], axis=1)


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b; 0 where both are 0."""
    share: np.ndarray = a / np.maximum(b, 1e-300)
    return share


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return a / b of the last axis's two sums, or a / b - c / d of its four, (…, 2 or 4) -> (…); 0 / 0 is 0."""
    first = _share(sums[..., 0], sums[..., 1])
    return first if sums.shape[-1] == 2 else first - _share(sums[..., 2], sums[..., 3])


def resampled(columns: np.ndarray, seed: int, draws: int = DRAWS) -> np.ndarray:
    """Return (draws, …): the sums of the columns (n, …) over n rows drawn with replacement (Efron, 1979).

    The rows that are drawn depend on n and the seed alone: what is compared is always seen on the same images.
    """
    rng, count = np.random.default_rng(seed), len(columns)
    return np.stack([columns[rng.integers(0, count, count)].sum(0) for _ in range(draws)])


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % points of a figure's draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
