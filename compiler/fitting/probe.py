"""The float model on a few images, and by how much its outputs differ once it is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from ...backends.ort import Session
from .. import layers
from .. import model as model_io
from .layerwise import is_layer

#: Images that errors are measured on; of a network whose image takes more MACs than LARGE, fewer.
_IMAGES, _LARGE_IMAGES = 128, 8
LARGE = 1_000_000_000


def is_large(model: ir.Model) -> bool:
    """Say whether one image takes so many MACs that few are measured."""
    return sum(layers.macs(node) or 0 for node in model.graph if is_layer(node)) > LARGE


class Probe:
    """The outputs of a model on some of the images; compares those of others with them."""

    def __init__(self, model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], threads: int) -> None:
        """Run `model` on a part of `feeds`, batches of inputs."""
        self._threads = threads
        self.feeds = spread(feeds, _LARGE_IMAGES if is_large(model) else _IMAGES)
        self._expected = self._run(model)

    def error(self, model: ir.Model) -> float:
        """Return the error energy of the worst output of `model` over its signal's."""
        found = self._run(model)
        sums = {
            name: [
                sum(float(np.square(d, dtype=np.float64).sum()) for d in each) for each in (y, _less(y, found[name]))
            ]
            for name, y in self._expected.items()
        }
        return max((error / signal for signal, error in sums.values() if signal > 0), default=0.0)

    def _run(self, model: ir.Model) -> dict[str, list[np.ndarray]]:
        with TemporaryDirectory() as folder:
            session = Session(model_io.session_source(model, Path(folder)), threads=self._threads)
            runs = [session.run(feed) for feed in self.feeds]
        return {name: [run[name] for run in runs] for name, y in runs[0].items() if y.dtype.kind == "f"}


def spread(feeds: Sequence[Mapping[str, np.ndarray]], count: int) -> list[Mapping[str, np.ndarray]]:
    """Return about so many rows of the batches, evenly: folders are sorted by class. Fixed batches stay whole."""
    total = sum(len(next(iter(feed.values()))) for feed in feeds)
    step = max(1, total // count)
    if any(len(v) < step for feed in feeds for v in feed.values()):
        return list(feeds[::step])
    return [{name: v[::step] for name, v in feed.items()} for feed in feeds]


def _less(y: Sequence[np.ndarray], z: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [a.astype(np.float64) - b for a, b in zip(y, z, strict=True)]
