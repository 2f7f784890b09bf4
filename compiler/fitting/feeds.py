"""As many calibration images as a walk along the layers can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from .layerwise import peak_bytes

if TYPE_CHECKING:
    from ...calib.folder import Folder

#: Bytes of tensors that a walk may hold; fewer images where that is not enough, but at least so many.
MEMORY, LEAST_IMAGES = 600_000_000, 16
#: What a walk holds at a layer, over what one network alone would: both networks, and the target.
_COPIES = 3
#: Images that run at a time: enough to use the machine, few enough for ONNX Runtime's own memory.
_BATCH = 16


def calibration_feeds(
    model: ir.Model, images: Folder, *, memory: int = MEMORY, threads: int = 0
) -> list[Mapping[str, np.ndarray]]:
    """Return as many of the images, spread evenly over the folder, as a walk can hold in `memory` bytes; in batches."""
    first = next(images.subset([0]).batches(1))
    each = _COPIES * peak_bytes(model, first.feed, threads) / first.rows
    count = min(len(images), max(LEAST_IMAGES, int(memory / max(each, 1))))
    few = images.subset(i * len(images) // count for i in range(count))
    return [batch.feed for batch in few.batches(_BATCH)]
