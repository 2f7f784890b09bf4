"""Decoder for FastestDet (dog-qiuqiu, BSD-3): `edgec compile … --metric examples/detectors/fastestdet.py:decode`.

Output (85, H, W) per image: objectness, 4 box numbers, 80 class probabilities. For the cell (i, j):

    score = objectness^0.6 * max class^0.4      x = (tanh(b0) + j) / W      y = (tanh(b1) + i) / H
    w = sigmoid(b2)                             h = sigmoid(b3)              (relative to the image)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from edgec.compiler.boxes import suppress

SCORE = 0.65
OVERLAP = 0.45


def decode(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return boxes (n, 6): x1, y1, x2, y2, score, class, after non-maximum suppression."""
    grid = next(iter(outputs.values()))
    objectness, box, classes = grid[0], grid[1:5], grid[5:]
    score = np.clip(objectness, 0, None) ** 0.6 * np.clip(classes.max(0), 0, None) ** 0.4
    rows, columns = np.nonzero(score > SCORE)
    tx, ty, tw, th = box[:, rows, columns].astype(np.float64)
    x, y = (np.tanh(tx) + columns) / grid.shape[2], (np.tanh(ty) + rows) / grid.shape[1]
    w, h = (1 / (1 + np.exp(-t)) for t in (tw, th))
    found = [
        x - w / 2,
        y - h / 2,
        x + w / 2,
        y + h / 2,
        score[rows, columns],
        classes.argmax(0)[rows, columns],
    ]
    return suppress(np.stack(found, axis=1), OVERLAP)
