"""The images that a network is ranked and repaired by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..fitting.feeds import MEMORY, calibration_feeds
from .probe import is_large

if TYPE_CHECKING:
    from ...calib.folder import Folder

#: Bytes of tensors that a walk may hold here: a detector's 60 photographs instead of 44 are worth 0.2 dB. Large
#: networks (probe.py) have the usual: there each image takes seconds.
SMALL_MEMORY = 1_000_000_000


def repair_feeds(model: ir.Model, images: Folder, *, threads: int = 0) -> list[Mapping[str, np.ndarray]]:
    """Return as many images as a walk can hold, in batches."""
    return calibration_feeds(model, images, memory=MEMORY if is_large(model) else SMALL_MEMORY, threads=threads)
