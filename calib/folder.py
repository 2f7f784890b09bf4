"""A folder of calibration images: opened and checked once, split, hashed, and handed out in batches.

Sub-folders count as classes where there are at least two and no image lies outside them: sorted names are classes
0..n-1, or the numbers themselves if all names are integers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..compiler.errors import DataError
from ..compiler.types import InputSpec, Preprocess, Refusal
from .sources import ARRAYS, IMAGES, UNREADABLE, Arrays, Images, Item, Transform, readable, refusal, walk

#: More threads than this decode no faster than a model can run on the same machine.
_MOST_WORKERS = 8

_Read = tuple[Item, Mapping[str, np.ndarray]]


@dataclass(eq=False)
class Batch:
    """`count` samples: `feed` maps input names to arrays whose first dimension is the batch, of `rows` rows.

    Where the model's batch is fixed, or padding was asked for, there may be more rows than `count`: the last sample
    repeated. `labels` (int64, `count`) is None for folders without classes; `names` are the items' names.
    """

    feed: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    names: tuple[str, ...]
    count: int
    rows: int


@dataclass(frozen=True, eq=False)
class Folder:
    """The readable items of a folder, in the order of their paths, and how they are read.

    `notes` are sentences for the report. Parts made by `subset` and `split` share what is known of the files.
    """

    path: Path
    items: tuple[Item, ...]
    source: Images | Arrays
    specs: tuple[InputSpec, ...]
    pre: Preprocess | None = None
    notes: tuple[str, ...] = ()
    transform_name: str = ""
    _classes: Mapping[str, int] | None = None
    _skipped: dict[str, Refusal] = field(default_factory=dict, repr=False)
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def skipped(self) -> tuple[Refusal, ...]:
        """The files that could not be read, with the reason; grows when decoding finds another one."""
        return tuple(self._skipped.values())

    def mark_skipped(self, refusals: Iterable[Refusal]) -> None:
        """Record items that are known to be damaged, so that they need not be read to find out."""
        self._skipped.update({refusal.node: refusal for refusal in refusals})

    @property
    def fixed_batch(self) -> int | None:
        """The batch that the model insists on; None where any will do."""
        if isinstance(self.source, Arrays) and self.source.whole:
            return 1
        return self.specs[0].shape[0]

    def labels(self) -> np.ndarray | None:
        """Return the class of each item (int64), or None where the sub-folders are no classes."""
        if self._classes is None:
            return None
        return np.array([self._label(item) for item in self._known], dtype=np.int64)

    def subset(self, indices: Iterable[int]) -> Folder:
        """Return the folder with only the items of these indices, in that order."""
        known = self._known
        return self._with([known[i] for i in indices])

    def split(self, seed: int, fraction: float = 0.2, at_least: int = 32) -> tuple[Folder, Folder]:
        """Return (calibration, held-out), drawn with `seed`, class by class where there are classes.

        Held out are `fraction` of the items, or `at_least` if that is more, but never more than half. A single item
        is on both sides, and a note says so.
        """
        count = len(self)
        if count == 1:
            note = "there is one image: it is calibrated on and judged by, so the judgement flatters"
            both = dataclasses.replace(self, notes=(*self.notes, note))
            return both, both
        held = min(max(round(count * fraction), at_least), count // 2)
        chosen = _draw(self.labels(), count, held, np.random.default_rng(seed))
        notes = self.notes
        if held < at_least:
            notes = (*notes, f"the folder is small: {count - held} images to calibrate on, {held} to judge by")
        calibration = self.subset(np.flatnonzero(~chosen))
        return dataclasses.replace(calibration, notes=notes), self.subset(np.flatnonzero(chosen))

    def transformed(self, transform: Transform, name: str) -> Folder:
        """Return the folder with `transform` applied to each image before it is preprocessed.

        `name` stands for it in the manifest. DataError for a folder of arrays.
        """
        if not isinstance(self.source, Images):
            raise DataError("holds arrays, and only images can be changed", where=str(self.path), fix="give images")
        source = dataclasses.replace(self.source, transform=transform)
        return dataclasses.replace(self, source=source, transform_name=name)

    def manifest(self) -> str:
        """Return the SHA-256, in hex, of the items' names and contents: another image, another manifest."""
        return self._manifest

    @functools.cached_property
    def _manifest(self) -> str:
        missing = sorted({item.file for item in self.items} - self._digests.keys())
        with ThreadPoolExecutor(_workers(None)) as pool:
            self._digests.update(zip(missing, pool.map(self._digest, missing), strict=True))
        whole = hashlib.sha256(f"edgec 1\0{self.transform_name}\0".encode())
        for item in sorted(self.items, key=lambda item: item.name):
            whole.update(f"{item.name}\0{self._digests[item.file]}\0".encode(errors="surrogateescape"))
        return whole.hexdigest()

    def _digest(self, file: str) -> str:
        try:
            with (self.path / file).open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return f"unreadable: {error.errno}"

    def batches(self, size: int = 1, *, workers: int | None = None, pad: bool = False) -> Iterator[Batch]:
        """Yield the samples `size` at a time, in order; a fixed batch of the model takes the place of `size`.

        A pool of threads decodes ahead of the consumer, a bounded number of samples. The last batch is shorter, or
        padded where the batch is fixed or `pad` is set. Damaged items are left out and recorded in `skipped`.
        DataError if none can be read.
        """
        if isinstance(self.source, Arrays) and self.source.whole:
            size, pad = 1, False
        elif self.fixed_batch is not None:
            size, pad = self.fixed_batch, True
        group: list[_Read] = []
        empty = True
        for read in self._decoded(size, _workers(workers)):
            empty = False
            if group and _shapes(group[0]) != _shapes(read):
                yield self._batch(group, size if pad else 0)
                group = []
            group.append(read)
            if len(group) == size:
                yield self._batch(group, size)
                group = []
        if group:
            yield self._batch(group, size if pad else 0)
        if empty:
            raise self._nothing_readable()

    def _decoded(self, size: int, workers: int) -> Iterator[_Read]:
        """Yield what could be read, in order; at most `workers` + 2 chunks of `size` are held."""
        chunks = iter([self.items[i : i + size] for i in range(0, len(self.items), size)])
        pending: deque[Future[list[_Read]]] = deque()
        with ThreadPoolExecutor(workers, thread_name_prefix="edgec-decode") as pool:
            try:
                for chunk in itertools.islice(chunks, workers + 1):
                    pending.append(pool.submit(self._read, chunk))
                while pending:
                    ready = pending.popleft().result()
                    pending.extend(pool.submit(self._read, chunk) for chunk in itertools.islice(chunks, 1))
                    yield from ready
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, chunk: Sequence[Item]) -> list[_Read]:
        found = []
        for item in chunk:
            try:
                found.append((item, self.source.read(item)))
            except UNREADABLE as error:
                self.mark_skipped([refusal(item.name, self.source.rule, error)])
        return found

    def _batch(self, group: list[_Read], rows: int) -> Batch:
        items, feeds = zip(*group, strict=True)
        stacked = feeds + feeds[-1:] * (rows - len(feeds))
        feed = {name: _stack([f[name] for f in stacked]) for name in feeds[0]}
        labels = None if self._classes is None else np.array([self._label(item) for item in items], dtype=np.int64)
        return Batch(feed, labels, tuple(item.name for item in items), len(items), len(stacked))

    @property
    def _known(self) -> tuple[Item, ...]:
        """The items without those found damaged meanwhile."""
        return tuple(item for item in self.items if item.name not in self._skipped)

    def _label(self, item: Item) -> int:
        assert self._classes is not None
        return self._classes[item.file.partition("/")[0]]

    def _with(self, items: Sequence[Item]) -> Folder:
        return dataclasses.replace(self, items=tuple(items))

    def _nothing_readable(self) -> DataError:
        named = "; ".join(f"{r.node}: {r.why}" for r in self.skipped[:3])
        fix = "give files that an image viewer opens, or .npy and .npz files that numpy wrote"
        return DataError(f"none of its {len(self._skipped)} files can be read ({named})", where=str(self.path), fix=fix)


# --------------------------------------------------------------------------------------------- opening


def open_folder(folder: Path, pre: Preprocess | None, specs: tuple[InputSpec, ...]) -> Folder:
    """Find and check what lies in `folder`, at any depth: images, or arrays for the inputs `specs`.

    Images need `pre`, which says how they become the one input. Only the heads of the files are read. DataError where
    the folder is missing, empty, or holds nothing that can be read or that fits.
    """
    where = str(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise DataError(what, where=where, fix="name the folder that holds the images")
    files = walk(folder)
    images = [file for file in files if file.lower().endswith(IMAGES)]
    arrays = [file for file in files if file.lower().endswith(ARRAYS)]
    notes: tuple[str, ...] = ()
    source: Images | Arrays
    if arrays and (not images or pre is None):
        source, chosen, rest = Arrays(folder, specs), arrays, images
    elif images:
        source, chosen, rest = Images(folder, _fitting(pre, specs, where), specs[0]), images, arrays
    else:
        kinds = sorted({Path(file).suffix.lower() or "no extension" for file in files})
        what = f"holds no images, only files with {', '.join(kinds[:5])}" if kinds else "is empty"
        raise DataError(what, where=where, fix=f"put images ({' '.join(IMAGES)}) or .npy, .npz files there")
    if rest:
        notes = (f"{len(rest)} files in {folder} were ignored, such as {rest[0]}",)
    items, refusals = readable(chosen, source.check, source.rule)
    opened = Folder(folder, tuple(items), source, specs, pre, notes, _classes=_classes(chosen))
    opened.mark_skipped(refusals)
    if not items:
        raise opened._nothing_readable()
    return opened


def _fitting(pre: Preprocess | None, specs: tuple[InputSpec, ...], where: str) -> Preprocess:
    """Return `pre`. DataError where images cannot be what the model takes."""
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs) or "none"
        fix = "give .npz files with one array for each input"
        raise DataError(f"holds images, and the model has {len(specs)} inputs: {names}", where=where, fix=fix)
    if pre is None or pre.size is None:
        shape = "x".join("?" if d is None else str(d) for d in specs[0].shape)
        takes = f"the model's input {specs[0].name!r} ({specs[0].dtype}, {shape})"
        what = f"holds images, and {takes} does not say how they fit"
        fix = "state it: --preprocess FILE with size: [height, width]; or give .npy files with arrays of that shape"
        raise DataError(what, where=where, fix=fix)
    return pre


def _classes(files: Sequence[str]) -> dict[str, int] | None:
    """Return folder name -> class, from all files of the right kind, readable or not; None without classes."""
    names = sorted({file.partition("/")[0] for file in files})
    if len(names) < 2 or any("/" not in file for file in files):
        return None
    numbers = all(name.isascii() and name.isdigit() for name in names)
    return {name: int(name) if numbers else i for i, name in enumerate(names)}


# --------------------------------------------------------------------------------------------- helpers


def _draw(labels: np.ndarray | None, count: int, held: int, rng: np.random.Generator) -> np.ndarray:
    """Return a boolean array with `held` of `count` true: from each class its share, by largest remainder."""
    classes = [np.arange(count)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    sizes = np.array([len(members) for members in classes])
    share = sizes * held / count
    take = share.astype(int)
    order = np.lexsort((rng.random(len(sizes)), -(share - take)))  # ties are broken at random
    take[order[: held - take.sum()]] += 1
    chosen = np.zeros(count, dtype=bool)
    for members, n in zip(classes, take, strict=True):
        chosen[rng.permutation(members)[:n]] = True
    return chosen


def _shapes(read: _Read) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in read[1].items()}


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(asked: int | None) -> int:
    return asked or min(cores(), _MOST_WORKERS)
