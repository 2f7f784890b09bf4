"""The images that a network is ranked and repaired by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from .feeds import MEMORY, calibration_feeds
from .probe import is_large

if TYPE_CHECKING:
    from ...calib.folder import Folder

#: Bytes of tensors that a walk may hold here: a detector's 60 photographs instead of 44 are worth 0.2 dB. Large
#: networks (probe.py) have the usual: there each image takes seconds.
SMALL_MEMORY = 1_000_000_000
#: One image in so many is held out: to choose a ridge by, or to say what a truncation loses.
HELD_OUT = 5


def repair_feeds(model: ir.Model, images: Folder, *, threads: int = 0) -> list[Mapping[str, np.ndarray]]:
    """Return as many images as a walk can hold, in batches."""
    return calibration_feeds(model, images, memory=MEMORY if is_large(model) else SMALL_MEMORY, threads=threads)


def split(
    model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], seed: int
) -> tuple[list[Mapping[str, np.ndarray]], list[bool]]:
    """Return the images in other batches, and which of these are held out: a fifth of each batch.

    Where every batch is one image, or the model takes no other batch, a fifth of the batches.
    """
    rng = np.random.default_rng(seed)
    counts = [len(next(iter(feed.values()))) for feed in feeds]
    declared = [v.shape[0] for v in model.graph.inputs if v.name in feeds[0] and v.shape is not None and len(v.shape)]
    if max(counts) == 1 or any(isinstance(batch, int) for batch in declared):
        chosen = set(rng.permutation(len(feeds))[: len(feeds) // HELD_OUT].tolist())
        return list(feeds), [i in chosen for i in range(len(feeds))]
    pieces: list[Mapping[str, np.ndarray]] = []
    flags = []
    for feed, count in zip(feeds, counts, strict=True):
        order = rng.permutation(count)
        for rows, apart in ((order[count // HELD_OUT :], False), (order[: count // HELD_OUT], True)):
            if len(rows):
                pieces.append({name: array[np.sort(rows)] for name, array in feed.items()})
                flags.append(apart)
    return pieces, flags
