"""A folder of calibration images: opened and checked once, split, hashed, and handed out in batches.

Sub-folders count as classes where there are at least two and no image lies outside them: sorted names are classes
0..n-1, or the numbers themselves if all names are integers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..compiler.errors import DataError
from ..compiler.types import InputSpec, Preprocess, Refusal
from . import box_labels
from .batches import Batch, Read, cores, decoded, grouped, stacked, workers_of
from .box_labels import BoxLabels
from .sources import ARRAYS, IMAGES, UNREADABLE, Arrays, Images, Item, Transform, readable, refusal, walk

__all__ = ["Batch", "Folder", "cores", "open_folder", "together"]


@dataclass(frozen=True, eq=False)
class Folder:
    """The readable items of a folder, in the order of their paths, and how they are read.

    `notes` are sentences for the report. `box_labels` are there where `with_box_labels` found any. Parts made by
    `subset` and `split` share what is known of the files.
    """

    path: Path
    items: tuple[Item, ...]
    source: Images | Arrays
    specs: tuple[InputSpec, ...]
    pre: Preprocess | None = None
    notes: tuple[str, ...] = ()
    transform_name: str = ""
    box_labels: BoxLabels | None = None
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
        return self._labels(self._known)

    def with_box_labels(self) -> Folder:
        """Return the folder with the objects that label files say are on its images; itself where there are none.

        DataError where a label file is broken (box_labels.py).
        """
        if not isinstance(self.source, Images):
            return self
        files = [item.file for item in self._known]
        return dataclasses.replace(self, box_labels=box_labels.find(self.path, files, self.source.pre))

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
        source = dataclasses.replace(self.source, transforms=(transform,))
        return dataclasses.replace(self, source=source, transform_name=name)

    def manifest(self) -> str:
        """Return the SHA-256, in hex, of the items' names and contents: another image, another manifest."""
        return self._manifest

    @functools.cached_property
    def _manifest(self) -> str:
        missing = sorted({item.file for item in self.items} - self._digests.keys())
        with ThreadPoolExecutor(workers_of(None)) as pool:
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
        return (step[""] for step in together({"": self}, size, workers=workers, pad=pad))

    def _read(self, source: Images | Arrays, chunk: Sequence[Item]) -> list[Read]:
        found = []
        for item in chunk:
            try:
                found.append((item, source.read(item)))
            except UNREADABLE as error:
                self.mark_skipped([refusal(item.name, source.rule, error)])
        return found

    def _batches(self, group: Sequence[Read], rows: int) -> list[Batch]:
        """Stack samples: a batch for each way in which they were prepared, of at least `rows` rows."""
        items, samples = zip(*group, strict=True)
        names, labels, count = tuple(item.name for item in items), self._labels(items), len(items)
        feeds = [stacked(each, rows) for each in zip(*samples, strict=True)]
        return [Batch(feed, labels, names, count, max(count, rows), self.box_labels) for feed in feeds]

    @property
    def _known(self) -> tuple[Item, ...]:
        """The items without those found damaged meanwhile."""
        return tuple(item for item in self.items if item.name not in self._skipped)

    def _labels(self, items: Sequence[Item]) -> np.ndarray | None:
        if self._classes is None:
            return None
        return np.array([self._classes[item.file.partition("/")[0]] for item in items], dtype=np.int64)

    def _with(self, items: Sequence[Item]) -> Folder:
        return dataclasses.replace(self, items=tuple(items))

    def _nothing_readable(self) -> DataError:
        named = "; ".join(f"{r.node}: {r.why}" for r in self.skipped[:3])
        fix = "give files that an image viewer opens, or .npy and .npz files that numpy wrote"
        return DataError(f"none of its {len(self._skipped)} files can be read ({named})", where=str(self.path), fix=fix)


def together(
    folders: Mapping[str, Folder], size: int = 1, *, workers: int | None = None, pad: bool = False
) -> Iterator[dict[str, Batch]]:
    """Yield batches of the same samples of several folders, by the folders' names: each file is decoded once.

    The folders are one folder, `transformed` in different ways; ValueError where they are not. Otherwise this is
    Folder.batches: an item that cannot be read is left out of all of them, and no more samples wait for the
    consumer, beside those handed out, than of one folder.
    """
    first, *others = folders.values()
    if any(f.items != first.items or f._skipped is not first._skipped for f in others):
        raise ValueError("only transformed copies of one folder can be read together")
    if isinstance(first.source, Arrays) and first.source.whole:
        size, pad = 1, False
    elif first.fixed_batch is not None:
        size, pad = first.fixed_batch, True
    source = first.source
    if isinstance(source, Images):
        ways = [way for f in folders.values() if isinstance(f.source, Images) for way in f.source.transforms]
        source = dataclasses.replace(source, transforms=tuple(ways))
    read = functools.partial(first._read, source)
    reads = decoded(read, first.items, max(1, size // len(folders)), workers_of(workers))
    empty = True
    for group in grouped(reads, size):
        empty = False
        batches = first._batches(group, size if pad else 0)
        group.clear()  # what was stacked does not wait for the consumer a second time
        yield dict(zip(folders, batches, strict=True))
    if empty:
        raise first._nothing_readable()


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
