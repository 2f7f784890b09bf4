"""One sweep over the images: minima, maxima and histograms of a model's tensors, whatever method chooses ranges later.

The work is done inside ONNX Runtime (augment.py); here some thousand numbers an image are folded into statistics
whose size does not depend on the number of images. Images are decoded beside inference, and several runs go on side
by side, each on a thread of its own: sharing the many small operators of one run among threads takes longer.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ..backends.ort import Session
from ..compiler import model as model_io
from ..compiler.errors import DataError
from ..compiler.types import Progress, TensorStatistics, silent
from .augment import FLOATS, STATISTICS, Augmented, augment, sources
from .folder import Batch, Folder, cores
from .histogram import Histogram

#: Elements sampled of each tensor and image: at least the first; where there are few images so many that the second
#: is reached over all of them, but no more than the third.
SAMPLES, SAMPLES_IN_ALL, MOST_SAMPLES = 1 << 8, 1 << 16, 1 << 14
#: Samples are kept until there are so many bytes of them, and are then counted all at once.
_BUFFER_BYTES = 1 << 23
#: So many bytes of images are run together, at most so many images.
_BATCH_BYTES, _MOST_IMAGES = 1 << 20, 16
#: Runs go on side by side as long as the largest tensors of all of them stay below this, and no more of them.
_BESIDE_BYTES, _MOST_BESIDE = 1 << 25, 16


def collect(
    model: ir.Model,
    tensors: tuple[str, ...],
    folder: Folder,
    *,
    histogram: bool,
    seed: int = 0,
    batch: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, TensorStatistics]:
    """Run `model` once over `folder` and return the statistics of `tensors`, by name; `model` is not changed.

    Tensors that are not float, have no elements, are constants, or lie in subgraphs are left out; KeyError for a
    name that is nowhere in the model. The minimum of a tensor that cannot be negative (a ReLU's output, …) is given
    as 0. With `histogram`, which elements are sampled depends on `seed` and `batch` (images a run; None chooses by
    their size), not on `threads` (None or 0: one for each core). DataError where a tensor holds NaN or infinity, or
    no image can be read.
    """
    held = sources(model, tensors)
    if not held:
        return {}
    gathered = {name: _Gathered() for name in held.values()}
    samples = _samples(len(folder)) if histogram else 0
    number, done, shapes, sweep = 0, 0, None, None
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(TemporaryDirectory()))
        for step in folder.batches(batch or _images_a_run(folder), pad=True):
            if sweep is None or _shapes(step) != shapes:
                if sweep is not None:
                    sweep.close()
                shapes = _shapes(step)
                augmented = augment(model, tuple(gathered), shapes, step.rows, samples)
                sweep = _Sweep(model, augmented, gathered, samples, temporary, threads or cores())
                stack.enter_context(sweep.pool)
            sweep.submit(step, np.random.default_rng((seed, number)))
            number += 1
            done += step.count
            progress("calibrating", done, len(folder))
        if sweep is not None:
            sweep.close()
    return {name: gathered[root].statistics(done) for name, root in held.items() if gathered[root].seen}


def _images_a_run(folder: Folder) -> int:
    """Return as many images as fit into _BATCH_BYTES, so that small models are not all overhead; evenly shared out."""
    pixels = [math.prod(d for d in spec.shape[1:] if d) for spec in folder.specs]
    if folder.pre is not None and folder.pre.size is not None:
        pixels = [3 * math.prod(folder.pre.size)]
    most = max(1, min(_MOST_IMAGES, _BATCH_BYTES // max(1, 4 * sum(pixels))))
    runs = -(-len(folder) // most)
    return -(-len(folder) // max(1, runs)) or 1


def _samples(images: int) -> int:
    return min(max(SAMPLES, -(-SAMPLES_IN_ALL // max(images, 1))), MOST_SAMPLES)


def _shapes(step: Batch) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in step.feed.items()}


@dataclass(eq=False)
class _Gathered:
    """What is known of one tensor so far."""

    low: float = math.inf
    high: float = -math.inf
    elements: int = 0
    histogram: Histogram = field(default_factory=Histogram)

    @property
    def seen(self) -> bool:
        return self.low <= self.high

    def widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, elements: int, samples: np.ndarray, extremes: np.ndarray) -> None:
        self.elements += elements
        self.histogram.cover(self.low, self.high)
        self.histogram.add(samples, extremes)

    def statistics(self, images: int) -> TensorStatistics:
        h = self.histogram
        if not h.counts.any():
            return TensorStatistics(self.low, self.high, images)
        return TensorStatistics(self.low, self.high, images, h.estimate(self.elements), h.low, h.high)


class _Sweep:
    """Runs one augmented model on a few threads and folds what it tells into `gathered`, in the order of the batches.

    All of it is there after `close`.
    """

    def __init__(
        self,
        model: ir.Model,
        augmented: Augmented,
        gathered: Mapping[str, _Gathered],
        samples: int,
        folder: Path,
        threads: int,
    ) -> None:
        self._model, self._augmented = model, augmented
        self._gathered, self._samples = gathered, samples
        self._inputs = [value.name or "" for value in model.graph.inputs if value.name in gathered]
        self._least = np.full(augmented.extremes, np.inf, np.float32)
        self._most = -self._least
        self._buffer: list[np.ndarray] = []
        self._beside = max(1, min(threads, _MOST_BESIDE, _BESIDE_BYTES // max(1, augmented.largest)))
        self.pool = ThreadPoolExecutor(self._beside, thread_name_prefix="edgec-run")
        self._running: deque[tuple[Batch, np.random.Generator, Future[dict[str, np.ndarray]]]] = deque()
        self._session: Session | None = None
        if not augmented.empty:
            source = model_io.session_source(augmented.model, folder)
            self._session = Session(source, threads=max(1, threads // self._beside))

    def submit(self, step: Batch, rng: np.random.Generator) -> None:
        """Run one batch in the background. DataError where a tensor of this or an earlier one is not finite."""
        draws = {name: _draw(rng, *of) for name, of in self._augmented.draws.items()}
        self._running.append((step, rng, self.pool.submit(self._run, {**step.feed, **draws})))
        while len(self._running) > self._beside:  # one waits, so that no thread does while results are taken
            self._take(*self._running.popleft())

    def close(self) -> None:
        """Wait for all runs, and hand on everything."""
        while self._running:
            self._take(*self._running.popleft())
        self.pool.shutdown()
        self._settle()

    def _run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {} if self._session is None else self._session.run(feed)

    def _take(self, step: Batch, rng: np.random.Generator, future: Future[dict[str, np.ndarray]]) -> None:
        outputs = future.result()
        if STATISTICS in outputs:
            self._take_matrix(outputs[STATISTICS], step)
        for name in self._augmented.whole:
            self._take_whole(name, outputs[name], step, rng)
        for name in self._inputs:
            self._take_whole(name, step.feed[name], step, rng)

    def _take_matrix(self, matrix: np.ndarray, step: Batch) -> None:
        """Fold in a run's statistics (rows, columns); a padded batch repeats rows, which changes no extreme."""
        if not np.isfinite(matrix).all():
            self._explain(step)
        extremes = self._augmented.extremes
        np.minimum(self._least, matrix[:, :extremes].min(axis=0), out=self._least)
        np.maximum(self._most, matrix[:, :extremes].max(axis=0), out=self._most)
        if self._samples:
            self._buffer.append(matrix[: step.count])
            if sum(array.nbytes for array in self._buffer) >= _BUFFER_BYTES:
                self._settle()

    def _settle(self) -> None:
        """Hand on the extremes so far, and count the samples kept so far."""
        for t in self._augmented.tensors:
            low = min(self._least[t.lows].min(initial=np.inf), 0.0 if t.bounded else np.inf)
            self._gathered[t.name].widen(float(low), float(self._most[t.highs].max()))
        if self._buffer:
            rows = np.concatenate(self._buffer)
            self._buffer.clear()
            for t in self._augmented.tensors:
                self._gathered[t.name].count(t.each * len(rows), rows[:, t.samples], rows[:, t.extremes])

    def _take_whole(self, name: str, array: np.ndarray, step: Batch, rng: np.random.Generator) -> None:
        """Fold in a tensor that is here with all its elements."""
        if array.dtype.kind != "f" or not array.size:
            return
        if array.ndim and len(array) == step.rows:
            array = array[: step.count]
        low, high = float(array.min()), float(array.max())
        if not math.isfinite(low) or not math.isfinite(high):  # NumPy, unlike ONNX Runtime, passes NaN on
            self._explain(step)
            raise _not_finite(name, array, step)
        tensor = self._gathered[name]
        tensor.widen(low, high)
        if self._samples:
            wanted = self._samples * step.count
            values = array.ravel()
            picked = values if values.size <= wanted else values[_draw(rng, values.size, wanted)]
            extremes = np.array([low, high] if values.size > 1 else [low], np.float32)
            tensor.count(values.size, picked.astype(np.float32, copy=False), extremes)

    def _explain(self, step: Batch) -> None:
        """Raise a DataError that names the first tensor which is not finite; none is where only a mean overflowed."""
        found = first_not_finite(self._model, step)
        if found is not None:
            raise found


def first_not_finite(model: ir.Model, step: Batch) -> DataError | None:
    """Return what to raise about the model's first tensor, in graph order, that holds NaN or infinity; None if none."""
    for name, array in _everything(model, step):
        if not np.isfinite(array).all():
            return _not_finite(name, array, step)
    return None


def _not_finite(name: str, array: np.ndarray, step: Batch) -> DataError:
    kind = "NaN" if np.isnan(array).any() else "infinite values"
    where = step.names[0] if step.count == 1 else f"{step.names[0]} to {step.names[-1]}"
    fix = "look at these images, at their preprocessing, and at the model itself, which computes the same unquantized"
    return DataError(f"tensor {name!r} holds {kind}", where=where, fix=fix)


def _draw(rng: np.random.Generator, places: int, wanted: int) -> np.ndarray:
    """Return `wanted` places out of 0 .. `places` - 1, in order: one at random in each of as many equal stretches."""
    return ((np.arange(wanted) + rng.random(wanted)) * (places / wanted)).astype(np.int64)


def _everything(model: ir.Model, step: Batch) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the float inputs and all float tensors of the main graph for one batch, in graph order."""
    yield from ((name, array) for name, array in step.feed.items() if array.dtype.kind == "f")
    twin = model_io.copy(model)
    ShapeInferencePass(check_type=False, strict_mode=False)(twin)  # fills in the types
    nodes = [node for node in twin.graph if node.op_type != "Constant"]
    found = [value for node in nodes for value in node.outputs if value.name and value.dtype in FLOATS]
    twin.graph.outputs.clear()
    twin.graph.outputs.extend(found)
    with TemporaryDirectory() as temporary:
        outputs = Session(model_io.session_source(twin, Path(temporary))).run(step.feed)
    yield from ((value.name or "", outputs[value.name or ""]) for value in found)
