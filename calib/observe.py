"""One sweep over the images: minima, maxima and histograms of a model's tensors, whatever method chooses ranges later.

The work is done inside ONNX Runtime (augment.py); some thousand numbers an image are folded into statistics (tally.py).
Images are decoded beside inference, and several runs go on side by side, each on a thread of its own: sharing the many
small operators of one run among threads takes longer. Under several conditions an image is decoded once and run once
for each; the elements sampled are the same ones, so that what differs between conditions is not where one looked.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from .folder import Batch, Folder, cores, together
from .tally import Gathered, Tally, draw

#: Elements sampled of each tensor and image: at least the first; where there are few images so many that the second
#: is reached over all of them, but no more than the third.
SAMPLES, SAMPLES_IN_ALL, MOST_SAMPLES = 1 << 8, 1 << 16, 1 << 14
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
    steps = ({"": step} for step in folder.batches(batch or _images_a_run(folder), pad=True))
    samples = _samples(len(folder)) if histogram else 0
    sweep = _Sweep(model, tensors, ("",), samples, seed, threads or cores())
    return sweep.run(steps, len(folder), progress)[""]


def collect_together(
    model: ir.Model,
    tensors: tuple[str, ...],
    folders: Mapping[str, Folder],
    *,
    histogram: bool,
    seed: int = 0,
    batch: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, dict[str, TensorStatistics]]:
    """Return what `collect` gives for each of the folders, by its name, after one sweep.

    The folders are one folder transformed in different ways (`folder.together`): each file is decoded once.
    """
    first = next(iter(folders.values()))
    steps = together(folders, batch or _images_a_run(first), pad=True)
    samples = _samples(len(first)) if histogram else 0
    sweep = _Sweep(model, tensors, tuple(folders), samples, seed, threads or cores())
    return sweep.run(steps, len(first), progress)


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


class _Sweep:
    """One sweep under some conditions: all batches run, and folded into what is known of each tensor."""

    def __init__(
        self,
        model: ir.Model,
        tensors: tuple[str, ...],
        conditions: tuple[str, ...],
        samples: int,
        seed: int,
        threads: int,
    ) -> None:
        self._model, self._samples, self._seed, self._threads = model, samples, seed, threads
        self._held = sources(model, tensors)
        self._gathered = {c: {name: Gathered() for name in self._held.values()} for c in conditions}

    def run(
        self, steps: Iterable[Mapping[str, Batch]], images: int, progress: Progress
    ) -> dict[str, dict[str, TensorStatistics]]:
        """Return condition -> tensor -> statistics. `steps`: condition -> batch, all of the same samples."""
        if not self._held:
            return {condition: {} for condition in self._gathered}
        done, shapes, runs = 0, None, None
        with contextlib.ExitStack() as stack:
            temporary = Path(stack.enter_context(TemporaryDirectory()))
            for number, batches in enumerate(steps):
                step = next(iter(batches.values()))
                if runs is None or _shapes(step) != shapes:
                    if runs is not None:
                        runs.close()
                    shapes = _shapes(step)
                    runs = self._runs(step, temporary)
                    stack.enter_context(runs.pool)
                for condition, batch in batches.items():
                    runs.submit(condition, batch, np.random.default_rng((self._seed, number)))
                done += step.count
                progress("calibrating", done, images)
            if runs is not None:
                runs.close()
        return {condition: self._statistics(gathered, done) for condition, gathered in self._gathered.items()}

    def _runs(self, step: Batch, temporary: Path) -> _Runs:
        """Return what runs batches of the shapes of this one."""
        wanted = next(iter(self._gathered.values()))
        augmented = augment(self._model, tuple(wanted), _shapes(step), step.rows, self._samples)
        tallies = {c: Tally(augmented, gathered, self._samples) for c, gathered in self._gathered.items()}
        inputs = [value.name or "" for value in self._model.graph.inputs if value.name in wanted]
        return _Runs(self._model, augmented, tallies, inputs, temporary, self._threads)

    def _statistics(self, gathered: Mapping[str, Gathered], images: int) -> dict[str, TensorStatistics]:
        held = self._held.items()
        return {name: gathered[root].statistics(images) for name, root in held if gathered[root].seen}


class _Runs:
    """Runs one augmented model on a few threads; what it tells goes to the tallies, in the order of the batches.

    All of it is there after `close`.
    """

    def __init__(
        self,
        model: ir.Model,
        augmented: Augmented,
        tallies: Mapping[str, Tally],
        inputs: list[str],
        folder: Path,
        threads: int,
    ) -> None:
        self._model, self._augmented, self._tallies, self._inputs = model, augmented, tallies, inputs
        self._beside = max(1, min(threads, _MOST_BESIDE, _BESIDE_BYTES // max(1, augmented.largest)))
        self.pool = ThreadPoolExecutor(self._beside, thread_name_prefix="edgec-run")
        self._running: deque[tuple[Tally, Batch, np.random.Generator, Future[dict[str, np.ndarray]]]] = deque()
        self._session: Session | None = None
        if not augmented.empty:
            source = model_io.session_source(augmented.model, folder)
            self._session = Session(source, threads=max(1, threads // self._beside))

    def submit(self, condition: str, step: Batch, rng: np.random.Generator) -> None:
        """Run one batch in the background. DataError where a tensor of this or an earlier one is not finite."""
        draws = {name: draw(rng, *of) for name, of in self._augmented.draws.items()}
        future = self.pool.submit(self._run, {**step.feed, **draws})
        self._running.append((self._tallies[condition], step, rng, future))
        while len(self._running) > self._beside:  # one waits, so that no thread does while results are taken
            self._take(*self._running.popleft())

    def close(self) -> None:
        """Wait for all runs, and hand on everything."""
        while self._running:
            self._take(*self._running.popleft())
        self.pool.shutdown()
        for tally in self._tallies.values():
            tally.settle()

    def _run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {} if self._session is None else self._session.run(feed)

    def _take(self, tally: Tally, step: Batch, rng: np.random.Generator, future: Future[dict[str, np.ndarray]]) -> None:
        outputs = future.result()
        if STATISTICS in outputs:
            if not np.isfinite(outputs[STATISTICS]).all():
                self._explain(step)
            tally.matrix(outputs[STATISTICS], step.count)
        for name in self._augmented.whole:
            self._take_whole(tally, name, outputs[name], step, rng)
        for name in self._inputs:
            self._take_whole(tally, name, step.feed[name], step, rng)

    def _take_whole(self, tally: Tally, name: str, array: np.ndarray, step: Batch, rng: np.random.Generator) -> None:
        if array.dtype.kind != "f" or not array.size:
            return
        if array.ndim and len(array) == step.rows:
            array = array[: step.count]
        if not tally.whole(name, array, step.count, rng):
            self._explain(step)
            raise _not_finite(name, array, step)

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
