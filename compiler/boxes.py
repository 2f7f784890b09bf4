"""Boxes beside the true ones: which of them find one, F1 and average precision. A box is x1, y1, x2, y2, score, class.

A true box has in place of the score whether it counts (1), or is a region where finding is neither right nor wrong (0).
Matching is COCO's (Lin et al., "Microsoft COCO", ECCV 2014; the procedure of its published evaluation), for each IoU t
of 0.5, 0.55, … 0.95 by itself: on an image the boxes choose in the order of their scores, each the best true box of its
class that is left, if the IoU is at least t. One that finds none, and at least t of whose own area lies in a region of
its class that does not count, does not count itself.

    F1  = 2 tp / (boxes + true boxes)           at IoU 0.5, over all images and classes, of those that count
    p_k = tp_k / k,  r_k = tp_k / true boxes    the first k boxes of a class by score, over all images
    AP  = mean over r = 0, 0.01, … 1 of max { p_k : r_k >= r }, 0 where no r_k reaches r;  mean over classes and IoUs

An image gives AP at most its 100 best boxes of a class, and classes without a true box do not enter into the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: The IoUs from which on a box is found.
IOUS = np.linspace(0.5, 0.95, 10)
#: The recalls at which precision is read.
_RECALLS = np.linspace(0, 1, 101)
#: How many boxes of a class an image gives AP.
_MOST = 100


@dataclass(frozen=True, eq=False)
class Matched:
    """A model's boxes beside the true ones, an image's in the order of their scores.

    `scores`, `classes`: (n,) float64. `outcome`: (n, T) int8 for the T of IOUS: 1 finds a true box, 0 finds none, -1
    does not count. `truth`: (m,) float64, the classes of the true boxes that count.
    """

    scores: np.ndarray
    classes: np.ndarray
    outcome: np.ndarray
    truth: np.ndarray

    @property
    def f1(self) -> tuple[float, float]:
        """Numerator and denominator of F1 at IoU 0.5."""
        at = self.outcome[:, 0]
        return 2.0 * np.count_nonzero(at == 1), float(np.count_nonzero(at >= 0) + len(self.truth))

    def best(self) -> Matched:
        """Return what an image gives AP."""
        if len(self.classes) <= _MOST:
            return self
        kept = np.sort([i for label in np.unique(self.classes) for i in np.flatnonzero(self.classes == label)[:_MOST]])
        return Matched(self.scores[kept], self.classes[kept], self.outcome[kept], self.truth)


@dataclass(frozen=True, eq=False)
class Ranked:
    """The boxes of an original and of a model on all images, for AP; `original` is None where its boxes are the truth.

    `truth` says what the true boxes are: YOLO or COCO labels, or the original's.
    """

    truth: str
    original: Matched | None
    model: Matched


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the (n, m) intersection over union of the boxes `a` (n, 4+) and `b` (m, 4+)."""
    inter = _intersection(a, b)
    return _share(inter, _area(a)[:, None] + _area(b)[None, :] - inter)


def match(ours: np.ndarray, truth: np.ndarray) -> Matched:
    """Return which of our boxes (n, 6) find a true one (m, 6), on one image."""
    ours = ours[np.argsort(-ours[:, 4], kind="stable")]
    counts = truth[:, 4] > 0
    wanted, regions = truth[counts], truth[~counts]
    overlap = np.where(_same_class(ours, wanted), iou(ours, wanted), 0.0)
    inside = _share(_intersection(ours, regions), _area(ours)[:, None])
    covered = np.where(_same_class(ours, regions), inside, 0.0).max(1, initial=0.0)
    outcome = np.where(covered[:, None] >= IOUS, -1, 0).astype(np.int8)
    free, each = np.ones((len(IOUS), len(wanted)), dtype=bool), np.arange(len(IOUS))
    for i in np.flatnonzero(overlap.max(1, initial=0.0) >= IOUS[0]):
        left = np.where(free, overlap[i], 0.0)
        best = left.argmax(1)
        found = left[each, best] >= IOUS
        free[each[found], best[found]] = False
        outcome[i, found] = 1
    return Matched(ours[:, 4], ours[:, 5], outcome, wanted[:, 5])


def joined(found: Iterable[Matched]) -> Matched:
    """Return the boxes of several images in one."""
    parts = list(found)
    names = ("scores", "classes", "outcome", "truth")
    return Matched(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def average_precision(found: Matched) -> np.ndarray | None:
    """Return AP from 0 to 1 at each of IOUS, (T,) float64; None where there is no true box."""
    labels, counts = np.unique(found.truth, return_counts=True)
    order = np.argsort(-found.scores, kind="stable")
    classes, outcome = found.classes[order], found.outcome[order]
    each = [_precision(outcome[classes == label], count) for label, count in zip(labels, counts, strict=True)]
    return np.mean(each, axis=0) if each else None


def _precision(outcome: np.ndarray, count: int) -> np.ndarray:
    """Return AP (T,) of a class with `count` true boxes, from its boxes' outcome in the order of their scores."""
    right, seen = np.cumsum(outcome == 1, axis=0), np.cumsum(outcome >= 0, axis=0)
    precision = np.maximum.accumulate((right / np.maximum(seen, 1))[::-1], axis=0)[::-1]
    precision = np.vstack([precision, np.zeros(outcome.shape[1])])
    reached = [np.searchsorted(recall, _RECALLS) for recall in (right / count).T]
    return np.array([column[at].mean() for column, at in zip(precision.T, reached, strict=True)])


def suppress(boxes: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Return the boxes left by class-wise non-maximum suppression, highest score first."""
    boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    kept: list[int] = []
    overlap = np.where(_same_class(boxes, boxes), iou(boxes, boxes), 0.0)
    for i in range(len(boxes)):
        if not any(overlap[i, k] > threshold for k in kept):
            kept.append(i)
    return boxes[kept]


def _same_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    same: np.ndarray = a[:, None, 5] == b[None, :, 5]
    return same


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:4], b[None, :, 2:4])
    inter: np.ndarray = np.clip(bottom_right - top_left, 0, None).prod(2)
    return inter


def _area(a: np.ndarray) -> np.ndarray:
    area: np.ndarray = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    return area


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b; 0 where b is not above 0."""
    b = np.broadcast_to(b, a.shape)
    result: np.ndarray = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return result
