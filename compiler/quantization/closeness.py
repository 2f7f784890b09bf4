"""How close a candidate is to the float model on a few calibration images: what decides each step of quantization.

    SQNR = 10 log10( sum y^2 / sum (y - y')^2 )      over all elements of an output and all images; the worst counts

The float model's outputs are computed once and kept, so judging a candidate costs one pass over the images. The
held-out images are never looked at here: fidelity.py judges on those what comes out in the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ...backends.ort import Session
from ...calib.observe import first_not_finite
from .. import model as model_io

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...calib.folder import Batch, Folder

#: Candidates are compared over so many input numbers, but at least so many images. Few images flatter methods that
#: clip: what they clip is rare.
_NUMBERS, _LEAST_IMAGES = 64 * 3 * 224 * 224, 64
#: Images a run.
_BATCH = 8


class Closeness:
    """The float model's outputs on a few images, and the distance of other models from them.

    DataError where the float model itself gives NaN: nothing can be close to that.
    """

    def __init__(self, model: ir.Model, images: Folder, threads: int) -> None:
        self._threads = threads
        self.images = few(images)  # when they have been read, those that could be
        self._batches = [(b.feed, b) for b in self.images.batches(_BATCH)]
        with TemporaryDirectory() as folder:
            session = Session(model_io.session_source(model, Path(folder)), threads=threads)
            self._expected = [_real(session.run(feed), batch) for feed, batch in self._batches]
        for (_, batch), outputs in zip(self._batches, self._expected, strict=True):
            if any(np.isnan(y).any() for y in outputs.values()):
                raise first_not_finite(model, batch) or AssertionError("only fused kernels give NaN")
        names = list(dict.fromkeys(name for outputs in self._expected for name in outputs))
        self._signal = {
            name: sum(float(_energies(y[name], 1)[0]) for y in self._expected if name in y) for name in names
        }

    def decibels(self, model: ir.Model, *, simulated: bool = False) -> float:
        """Return the SQNR in dB of the model's worst output; infinite where nothing differs, -infinite for NaN.

        `simulated`: the model's types are rounded and then computed with as floats, not fused into kernels.
        """
        errors = self._errors(model, simulated)
        return min((_ratio_db(self._signal[name], float(e.sum())) for name, e in errors.items()), default=math.inf)

    def parts(self, model: ir.Model, *, simulated: bool = False) -> np.ndarray:
        """Return each image's part of the model's error (float64, one number per image of `images`; they add up to 1).

        Errors are relative to their output's energy over all images. All parts are alike where nothing differs.
        """
        errors = self._errors(model, simulated)
        relative = [e / self._signal[name] for name, e in errors.items() if self._signal[name] > 0]
        total = np.sum(relative, axis=0) if relative else np.zeros(len(self.images))
        whole = float(total.sum())
        return total / whole if 0 < whole < math.inf else np.full(len(self.images), 1 / len(self.images))

    def _errors(self, model: ir.Model, simulated: bool) -> dict[str, np.ndarray]:
        """Return the energy of each image's error, by output."""
        found: dict[str, list[np.ndarray]] = {}
        with TemporaryDirectory() as folder:
            source = model_io.session_source(model, Path(folder))
            session = Session(source, threads=self._threads, fuse_quantized=not simulated)
            for (feed, batch), expected in zip(self._batches, self._expected, strict=True):
                got = _real(session.run(feed), batch)
                for name, y in expected.items():
                    found.setdefault(name, []).append(_energies(y.astype(np.float64) - got[name], batch.count))
        return {name: np.concatenate(energies) for name, energies in found.items()}


def few(images: Folder) -> Folder:
    """Return enough of the images to judge by, spread evenly over the folder."""
    size = sum(math.prod(d or 1 for d in spec.shape[1:]) for spec in images.specs)
    count = min(len(images), max(_LEAST_IMAGES, _NUMBERS // max(size, 1)))
    return images.subset(i * len(images) // count for i in range(count))


def _real(outputs: Mapping[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    """Drop outputs that are not float, and rows that only pad a fixed batch."""
    floats = {name: y for name, y in outputs.items() if y.dtype.kind == "f"}
    return {name: y[: batch.count] if y.ndim and len(y) == batch.rows else y for name, y in floats.items()}


def _energies(y: np.ndarray, count: int) -> np.ndarray:
    """Return the sum of squares of each of `count` images; of even parts of it where the first axis is not theirs."""
    rows = y.reshape(count, -1) if y.ndim and len(y) == count else y.reshape(1, -1)
    squares = np.square(rows, dtype=np.float64).sum(axis=1)
    return squares if len(squares) == count else np.full(count, float(squares.sum()) / count)


def _ratio_db(signal: float, error: float) -> float:
    if not math.isfinite(error):
        return -math.inf
    if error <= 0 or signal <= 0:
        return math.inf if error <= 0 else -math.inf
    return 10 * math.log10(signal / error)
