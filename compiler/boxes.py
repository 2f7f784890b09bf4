"""Boxes: which of two sets are the same. A box is a row (x1, y1, x2, y2, score, class)."""

from __future__ import annotations

import numpy as np


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the (n, m) intersection over union of the boxes `a` (n, 4+) and `b` (m, 4+)."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:4], b[None, :, 2:4])
    inter = np.clip(bottom_right - top_left, 0, None).prod(2)
    area_a, area_b = ((c[:, 2] - c[:, 0]) * (c[:, 3] - c[:, 1]) for c in (a, b))
    union = area_a[:, None] + area_b[None, :] - inter
    result: np.ndarray = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return result


def match(ours: np.ndarray, theirs: np.ndarray, threshold: float = 0.5) -> int:
    """Return how many of our boxes find one of theirs: same class, IoU at or above `threshold`, each once.

    Greedy by our score, highest first, each taking the best of what is left (as COCO's evaluation does).
    """
    if not len(ours) or not len(theirs):
        return 0
    overlap = np.where(ours[:, None, 5] == theirs[None, :, 5], iou(ours, theirs), 0.0)
    hits = 0
    for i in np.argsort(-ours[:, 4], kind="stable"):
        best = int(overlap[i].argmax())
        if overlap[i, best] >= threshold:
            hits += 1
            overlap[:, best] = 0.0
    return hits


def suppress(boxes: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Return the boxes left by class-wise non-maximum suppression, highest score first."""
    boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    kept: list[int] = []
    overlap = np.where(boxes[:, None, 5] == boxes[None, :, 5], iou(boxes, boxes), 0.0)
    for i in range(len(boxes)):
        if not any(overlap[i, k] > threshold for k in kept):
            kept.append(i)
    return boxes[kept]
