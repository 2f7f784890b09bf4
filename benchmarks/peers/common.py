"""What every peer's script shares: the arguments, the clock, one image at a time. Needs nothing but numpy.

    python run_TOOL.py MODEL CALIB_NPY OUT CONFIG

CALIB_NPY holds the decoded images, float32 (N, C, H, W). Writes the quantized model to OUT and, beside it, seconds.json
with the wall seconds of the tool's own call (reading the images, loading and saving included, Python's imports not).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

#: Quantizes the model with the images (N, C, H, W) and writes the result: `quantize(model, images, out)`.
Quantize = Callable[[Path, np.ndarray, Path], None]


def main(configs: Mapping[str, Quantize]) -> None:
    """Run the configuration named on the command line and leave its seconds beside the result.

    Without arguments nothing is run: the imports have been tried.
    """
    if len(sys.argv) == 1:
        return
    model, images, out = (Path(a).absolute() for a in sys.argv[1:4])
    quantize = configs[sys.argv[4]]
    start = time.perf_counter()
    quantize(model, np.load(images, mmap_mode="r"), out)
    seconds = time.perf_counter() - start
    (out.parent / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def input_name(model: Path) -> str:
    """Return the name of the model's one input."""
    import onnx

    return str(onnx.load(model, load_external_data=False).graph.input[0].name)


class Reader:
    """A calibration data reader as ONNX Runtime's quantizer and its relatives want it: one image at a time."""

    def __init__(self, model: Path, images: np.ndarray) -> None:
        self.name, self.images = input_name(model), images
        self.rewind()

    def rewind(self) -> None:
        """Start again with the first image."""
        self._left: Iterator[np.ndarray] = iter(self.images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next feed, None behind the last one."""
        image = next(self._left, None)
        return None if image is None else {self.name: np.array(image[None])}
