"""How close models are to the original on the same held-out images: the judge of every lossy pass.

Algebra, per output y of the original and y' of the candidate, sums over all elements and images in float64:

    SQNR    = 10 log10( sum y^2 / sum (y - y')^2 )  [dB]        cosine = sum y y' / sqrt(sum y^2 sum y'^2)

The figure that `--max-drop` bounds, in points, chosen by what is there:

    top1       100 (mean correct(y) - mean correct(y'))          labelled images, classifier-shaped output
    agreement  100 (1 - mean [argmax y = argmax y'])             no labels, classifier-shaped output
    boxes      100 (1 - F1 of the boxes at IoU 0.5)              a decoder was given
    metric     100 (1 - mean score)                              the user's own function of two outputs
    energy     100 sum (y - y')^2 / sum y^2, the worst output    anything else (1 point is 20 dB)

Its 95 % interval comes from resampling the images (paired bootstrap, 1000 draws, seeded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .boxes import match
from .errors import DataError
from .types import Fidelity, OutputFidelity, Progress, silent

if TYPE_CHECKING:
    from ..backends.base import Runner

_DRAWS = 1000

#: One image's outputs by name.
Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """The user's own judge: a decoder `outputs -> boxes (n, 6)`, or a score `(outputs, reference) -> 0..1`."""

    decode: Callable[[Outputs], np.ndarray] | None = None
    score: Callable[[Outputs, Outputs], float] | None = None


class Batch(Protocol):
    """What a folder of images hands out (calib/folder.py)."""

    feed: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    count: int
    rows: int


def compare(
    reference: Runner,
    candidates: Mapping[str, Runner],
    batches: Iterable[Batch],
    *,
    images: int,
    metric: Metric | None = None,
    labelled: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Fidelity]:
    """Run all models over the images once and return the fidelity of each candidate.

    `labelled` says that the batches' labels are the truth to judge by; without it they are ignored.
    """
    tallies = {name: _Tally(metric, labelled) for name in candidates}
    done = 0
    for batch in batches:
        expected = _real(reference.run(batch.feed), batch)
        for name, runner in candidates.items():
            tallies[name].add(expected, _same_outputs(expected, _real(runner.run(batch.feed), batch)), batch)
        done += batch.count
        progress("comparing with the original", done, images)
    return {name: tally.fidelity(seed) for name, tally in tallies.items()}


def _real(outputs: Outputs, batch: Batch) -> dict[str, np.ndarray]:
    """Drop the rows that only pad a fixed batch; outputs without the batch axis are left as they are."""

    def rows(y: np.ndarray) -> np.ndarray:
        padded = isinstance(y, np.ndarray) and y.ndim > 0 and len(y) == batch.rows > batch.count
        return y[: batch.count] if padded else y

    return {name: rows(y) for name, y in outputs.items()}


def _same_outputs(expected: Outputs, got: Outputs) -> Outputs:
    """Return `got`. DataError where it is not comparable with `expected`."""
    for name, y in expected.items():
        if name not in got or np.shape(got[name]) != np.shape(y):
            shape = np.shape(got[name]) if name in got else "missing"
            raise DataError(
                f"output {name!r} is {shape} in one model and {np.shape(y)} in the other",
                where="--against",
                fix="compare a model with the one that it was made from",
            )
    return got


def classes(outputs: Outputs) -> str | None:
    """Return the name of the first classifier-shaped output: (N, C) or (N, C, 1, …) with C of 2 or more."""
    for name, y in outputs.items():
        if (
            isinstance(y, np.ndarray)
            and y.dtype.kind == "f"
            and y.ndim >= 2
            and y.shape[1] >= 2
            and y[0].size == y.shape[1]
        ):
            return name
    return None


@dataclass
class _Tally:
    """Per-image sums of one candidate; a few numbers an image, whatever the outputs' size."""

    metric: Metric | None
    labelled: bool
    sums: dict[str, list[np.ndarray]] = field(default_factory=dict)
    agree: list[np.ndarray] = field(default_factory=list)
    right: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    agreements: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, expected: Outputs, got: Outputs, batch: Batch) -> None:
        for name, y in expected.items():
            if isinstance(y, np.ndarray) and y.dtype.kind == "f" and y.size:
                self.sums.setdefault(name, []).append(_energies(y, got[name], batch.count))
        primary = classes(expected)
        if primary is not None:
            y, z = (o[primary].reshape(len(o[primary]), -1) for o in (expected, got))
            self.agree.append(y.argmax(1) == z.argmax(1))
            self.agreements.setdefault(primary, []).append(self.agree[-1])
            if self.labelled and batch.labels is not None:
                _check_labels(batch.labels, y.shape[1])
                self.right.append(np.stack([*_hits(y, batch.labels), *_hits(z, batch.labels)], axis=1))
        if self.metric is not None:
            rows = [
                _judge_image(self.metric, _row(got, i, batch.count), _row(expected, i, batch.count))
                for i in range(batch.count)
            ]
            self.scores.append(np.array(rows, dtype=np.float64))

    def fidelity(self, seed: int) -> Fidelity:
        outputs = tuple(self._output(name, np.concatenate(rows)) for name, rows in self.sums.items())
        rng = np.random.default_rng(seed)
        if self.scores:
            return self._scored(np.concatenate(self.scores), outputs, rng)
        if self.right:
            return self._labelled(np.concatenate(self.right).astype(np.float64), outputs, rng)
        if self.agree:
            agree = np.concatenate(self.agree).astype(np.float64)
            low, high = _bootstrap(agree, rng, lambda draw: 100 * (1 - draw.mean(1)))
            value = 100 * float(agree.mean())
            return Fidelity("agreement", len(agree), 100.0, value, 100 - value, low, high, outputs)
        if not self.sums:
            return Fidelity(
                "energy", 0, None, None, None, None, None, reason="the model has no float output to compare"
            )
        return self._energy(outputs, rng)

    def _output(self, name: str, sums: np.ndarray) -> OutputFidelity:
        signal, error, dot, other = sums.sum(0)
        sqnr = 10 * np.log10(signal / error) if error > 0 and signal > 0 else None
        cosine = dot / np.sqrt(signal * other) if signal > 0 and other > 0 else None
        agree = self.agreements.get(name)
        agreement = None if agree is None else 100 * float(np.concatenate(agree).mean())
        return OutputFidelity(
            name, None if sqnr is None else float(sqnr), None if cosine is None else float(cosine), agreement
        )

    def _labelled(self, right: np.ndarray, outputs: tuple[OutputFidelity, ...], rng: np.random.Generator) -> Fidelity:
        before, before5, after, after5 = 100 * right.mean(0)
        low, high = _bootstrap(right[:, 0] - right[:, 2], rng, lambda draw: 100 * draw.mean(1))
        return Fidelity(
            "top1",
            len(right),
            float(before),
            float(after),
            float(before - after),
            low,
            high,
            outputs,
            top5=float(after5),
            reference_top5=float(before5),
        )

    def _scored(self, scores: np.ndarray, outputs: tuple[OutputFidelity, ...], rng: np.random.Generator) -> Fidelity:
        """`scores` is (n, 2): numerator and denominator an image, the figure being the ratio of their sums."""

        def figure(draw: np.ndarray) -> np.ndarray:
            total = draw[..., 1].sum(-1)
            ratio: np.ndarray = np.divide(draw[..., 0].sum(-1), total, out=np.ones_like(total), where=total > 0)
            return 100 * ratio

        value = float(figure(scores))
        low, high = _bootstrap(scores, rng, lambda draw: 100 - figure(draw))
        name = "boxes" if self.metric and self.metric.decode else "metric"
        return Fidelity(name, len(scores), 100.0, value, 100 - value, low, high, outputs)

    def _energy(self, outputs: tuple[OutputFidelity, ...], rng: np.random.Generator) -> Fidelity:
        rows = {name: np.concatenate(r)[:, :2] for name, r in self.sums.items()}
        share = {name: r[:, 1].sum() / max(r[:, 0].sum(), np.finfo(float).tiny) for name, r in rows.items()}
        worst = max(share, key=lambda name: share[name])
        low, high = _bootstrap(
            rows[worst], rng, lambda draw: 100 * draw[..., 1].sum(1) / np.maximum(draw[..., 0].sum(1), 1e-300)
        )
        drop = 100 * float(share[worst])
        return Fidelity("energy", len(rows[worst]), 100.0, 100 - drop, drop, low, high, outputs)


def _check_labels(labels: np.ndarray, classes: int) -> None:
    if labels.max(initial=0) >= classes:
        raise DataError(
            f"there are class folders up to {labels.max()}, but the model has {classes} classes",
            where="the labelled images",
            fix="give one sub-folder for each class, or a flat folder to compare without labels",
        )


def _energies(y: np.ndarray, z: np.ndarray, count: int) -> np.ndarray:
    """Return (count, 4) sums an image: y^2, (y - z)^2, y z, z^2. One row for all where there is no batch."""
    rows = count if y.ndim and len(y) == count else 1
    a, b = y.reshape(rows, -1).astype(np.float64), z.reshape(rows, -1).astype(np.float64)
    return np.stack([(a * a).sum(1), ((a - b) ** 2).sum(1), (a * b).sum(1), (b * b).sum(1)], axis=1)


def _hits(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return top-1 and top-5 hits, a boolean an image."""
    k = min(5, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return scores.argmax(1) == labels, (best == labels[:, None]).any(1)


def _row(outputs: Outputs, i: int, count: int) -> dict[str, np.ndarray]:
    return {name: y[i] if y.ndim and len(y) == count else y for name, y in outputs.items()}


def _judge_image(metric: Metric, got: Outputs, expected: Outputs) -> tuple[float, float]:
    """Return (numerator, denominator): 2 tp and 2 tp + fp + fn for boxes, (score, 1) for a score.

    DataError where the user's function fails or returns something else.
    """
    try:
        if metric.decode is not None:
            ours, theirs = (np.asarray(metric.decode(o), dtype=np.float64).reshape(-1, 6) for o in (got, expected))
            return 2.0 * match(ours, theirs), float(len(ours) + len(theirs))
        assert metric.score is not None
        score = float(metric.score(got, expected))
    except Exception as error:  # whatever a stranger's code raises is its own fault, and named as such
        raise DataError(f"{type(error).__name__}: {error}", where="--metric", fix="mend the function") from error
    if not 0.0 <= score <= 1.0:
        raise DataError(f"it returned {score}", where="--metric", fix="return a score from 0 to 1")
    return score, 1.0


def _bootstrap(
    rows: np.ndarray, rng: np.random.Generator, figure: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % points of `figure` over resampled rows; `figure` maps (draws, n, …) to (draws,)."""
    draws = np.concatenate([figure(rows[rng.integers(0, len(rows), (1, len(rows)))]) for _ in range(_DRAWS)])
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
