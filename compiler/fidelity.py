"""How close models are to the original on the same held-out images: the judge of every lossy pass.

All models see each image once, all of its conditions one after another; what is kept of it is a few numbers
(per_image.py, which has the algebra), whatever the size of the outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from .boxes import Matched, Ranked, joined, match
from .errors import DataError
from .per_image import PerImage
from .types import Fidelity, Progress, silent

if TYPE_CHECKING:
    from ..backends.base import Runner
    from ..calib.box_labels import BoxLabels

_T = TypeVar("_T")

#: The condition that the others are compared with.
CLEAN = "clean"

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
    names: tuple[str, ...]
    count: int
    rows: int
    box_labels: BoxLabels | None


@dataclass(frozen=True)
class Comparison:
    """What compare_together saw, image by image.

    `candidates`: condition -> candidate -> it beside the original, both under the condition. `original`: condition ->
    the original under the condition beside itself on clean images; empty where clean was not among the conditions.
    """

    candidates: Mapping[str, Mapping[str, PerImage]]
    original: Mapping[str, PerImage]


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

    `labelled` says that the batches' labels are the truth to judge by; without it they are ignored. Box labels are the
    truth for what a decoder gives wherever the batches have them.
    """
    steps = ({"": batch} for batch in batches)
    seen = compare_together(
        reference, candidates, steps, images=images, metric=metric, labelled=labelled, progress=progress
    )
    return {name: found.fidelity(seed) for name, found in seen.candidates[""].items()}


def compare_together(
    reference: Runner,
    candidates: Mapping[str, Runner],
    steps: Iterable[Mapping[str, Batch]],
    *,
    images: int,
    metric: Metric | None = None,
    labelled: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Run all models over the images under every condition in one pass; return what was seen image by image.

    A step is the same images under each condition, by name (calib.folder.together); all steps have the same
    conditions. Each model runs once for each condition of a step. Without candidates the original alone is looked at.
    What compare returns is `PerImage.fidelity(seed)` of what is returned here; robustness.py compares across
    candidates and conditions.
    """
    watch = _Watch(metric, labelled)
    seen: dict[str, dict[str, _Tally]] = {}
    original: dict[str, _Tally] = {}
    done = 0
    for step in steps:
        clean = watch.run(reference, step[CLEAN]) if CLEAN in step else None
        for condition, batch in step.items():
            expected = clean if clean is not None and condition == CLEAN else watch.run(reference, batch)
            tallies = seen.setdefault(condition, {name: _Tally() for name in candidates})
            for name, runner in candidates.items():
                watch.add(tallies[name], expected, watch.run(runner, batch), batch)
            if clean is not None:
                watch.add(original.setdefault(condition, _Tally()), clean, expected, batch, condition)
            done += batch.count
            progress("comparing with the original", done, images * len(step))
    return Comparison(
        {condition: {name: t.per_image() for name, t in tallies.items()} for condition, tallies in seen.items()},
        {condition: tally.per_image() for condition, tally in original.items()},
    )


# --------------------------------------------------------------------------------------------- watching


@dataclass(eq=False)
class _Ran:
    """What a model gave for one batch; the boxes are decoded once, however often they are compared."""

    outputs: dict[str, np.ndarray]
    batch: Batch
    metric: Metric | None

    @functools.cached_property
    def rows(self) -> list[dict[str, np.ndarray]]:
        """The outputs image by image."""
        return [
            {name: y[i] if y.ndim and len(y) == self.batch.count else y for name, y in self.outputs.items()}
            for i in range(self.batch.count)
        ]

    @functools.cached_property
    def boxes(self) -> list[np.ndarray]:
        """The boxes image by image, (n, 6) float64."""
        decode = self.metric.decode if self.metric else None
        assert decode is not None
        return [_theirs(_boxes, decode, row) for row in self.rows]

    @functools.cached_property
    def beside_labels(self) -> list[Matched]:
        """The boxes beside those of the labels, image by image."""
        labels = self.batch.box_labels
        assert labels is not None
        truth = (labels.boxes[name] for name in self.batch.names)
        return [match(_fractions(ours, labels.size), theirs) for ours, theirs in zip(self.boxes, truth, strict=True)]


@dataclass
class _Tally:
    """Per-image figures of one pair of models, batch after batch."""

    energies: dict[str, list[np.ndarray]] = field(default_factory=dict)
    answers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    right: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    boxes: list[Ranked] = field(default_factory=list)
    scored: str = ""

    def per_image(self) -> PerImage:
        kind = self.scored or ("top1" if self.right else "agreement" if self.answers else "energy")
        return PerImage(
            kind,
            {name: np.concatenate(rows) for name, rows in self.energies.items()},
            {name: np.concatenate(rows) for name, rows in self.answers.items()},
            np.concatenate(self.right).astype(np.float64) if self.right else None,
            np.concatenate(self.scores) if self.scores else None,
            _all_boxes(self.boxes),
        )


@dataclass(frozen=True)
class _Watch:
    """Runs models and notes what `metric` and the labels make of their outputs."""

    metric: Metric | None
    labelled: bool

    def run(self, runner: Runner, batch: Batch) -> _Ran:
        return _Ran(_real(runner.run(batch.feed), batch), batch, self.metric)

    def add(self, tally: _Tally, expected: _Ran, got: _Ran, batch: Batch, condition: str | None = None) -> None:
        """Note one batch. `condition` is what the two differ in where that is not the model."""
        _check_same(expected.outputs, got.outputs, condition)
        for name, y in expected.outputs.items():
            if isinstance(y, np.ndarray) and y.dtype.kind == "f" and y.size:
                tally.energies.setdefault(name, []).append(_energies(y, got.outputs[name], batch.count))
        primary = classes(expected.outputs)
        if primary is not None:
            y, z = (ran.outputs[primary].reshape(len(ran.outputs[primary]), -1) for ran in (expected, got))
            tally.answers.setdefault(primary, []).append(y.argmax(1) == z.argmax(1))
            if self.labelled and batch.labels is not None:
                _check_labels(batch.labels, y.shape[1])
                tally.right.append(np.stack([*_hits(y, batch.labels), *_hits(z, batch.labels)], axis=1))
        if self.metric is not None and self.metric.decode is not None:
            _add_boxes(tally, expected, got, batch.box_labels)
        elif self.metric is not None and self.metric.score is not None:
            tally.scored = "metric"
            tally.scores.append(np.array(_scores(self.metric.score, expected, got), dtype=np.float64))


def _real(outputs: Outputs, batch: Batch) -> dict[str, np.ndarray]:
    """Drop the rows that only pad a fixed batch; outputs without the batch axis are left as they are."""

    def rows(y: np.ndarray) -> np.ndarray:
        padded = isinstance(y, np.ndarray) and y.ndim > 0 and len(y) == batch.rows > batch.count
        return y[: batch.count] if padded else y

    return {name: rows(y) for name, y in outputs.items()}


def _check_same(expected: Outputs, got: Outputs, condition: str | None) -> None:
    """Raise DataError where `got` is not comparable with `expected`."""
    for name, y in expected.items():
        if name not in got or np.shape(got[name]) != np.shape(y):
            shape = np.shape(got[name]) if name in got else "missing"
            if condition is not None:
                what = f"output {name!r} is {shape} under {condition} and {np.shape(y)} on clean images"
                raise DataError(what, where="--degrade", fix="leave it out: the outputs' shapes depend on the image")
            raise DataError(
                f"output {name!r} is {shape} in one model and {np.shape(y)} in the other",
                where="--against",
                fix="compare a model with the one that it was made from",
            )


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


def _add_boxes(tally: _Tally, expected: _Ran, got: _Ran, labels: BoxLabels | None) -> None:
    """Note the boxes of one batch: both models' beside the labels, or the model's beside the original's."""
    if labels is not None:
        sides = [expected.beside_labels, got.beside_labels]
        tally.scored, truth = "boxes-labelled", labels.kind
    else:
        pairs = zip(got.boxes, expected.boxes, strict=True)
        sides = [[match(ours, _as_truth(theirs)) for ours, theirs in pairs]]
        tally.scored, truth = "boxes", "original"
    tally.scores.append(np.hstack([[found.f1 for found in side] for side in sides]))
    best = [joined(found.best() for found in side) for side in sides]
    tally.boxes.append(Ranked(truth, best[0] if labels is not None else None, best[-1]))


def _all_boxes(found: Sequence[Ranked]) -> Ranked | None:
    if not found:
        return None
    original = [each.original for each in found if each.original is not None]
    model = joined(each.model for each in found)
    return Ranked(found[0].truth, joined(original) if original else None, model)


def _as_truth(boxes: np.ndarray) -> np.ndarray:
    """Return boxes (n, 6) as those that shall be found: all of them count."""
    truth = boxes.copy()
    truth[:, 4] = 1.0
    return truth


def _fractions(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return boxes in fractions of the input of `size` (height, width); where a coordinate exceeds 2 it has pixels."""
    if not (boxes[:, :4] > 2).any():
        return boxes
    height, width = size
    return boxes / (width, height, width, height, 1, 1)


def _scores(score: Callable[[Outputs, Outputs], float], expected: _Ran, got: _Ran) -> list[tuple[float, float]]:
    """Return (score, 1) an image. DataError where the user's function fails or returns something else."""
    found = [_theirs(lambda *pair: float(score(*pair)), *rows) for rows in zip(got.rows, expected.rows, strict=True)]
    for value in found:
        if not 0.0 <= value <= 1.0:
            raise DataError(f"it returned {value}", where="--metric", fix="return a score from 0 to 1")
    return [(value, 1.0) for value in found]


def _boxes(decode: Callable[[Outputs], np.ndarray], row: Outputs) -> np.ndarray:
    return np.asarray(decode(row), dtype=np.float64).reshape(-1, 6)


def _theirs(call: Callable[..., _T], *args: object) -> _T:
    """Call the user's function. DataError where it fails."""
    try:
        return call(*args)
    except Exception as error:  # whatever a stranger's code raises is its own fault, and named as such
        raise DataError(f"{type(error).__name__}: {error}", where="--metric", fix="mend the function") from error
