"""What lies in a calibration folder: images, or arrays for models that do not eat images; found, checked and read.

An item is one sample: an image file, an array file, or one row of an array file. Its `read` gives a feed of one:
{input name: array of shape (1, …)}, the whole feed for models whose inputs share no batch dimension.
"""

from __future__ import annotations

import functools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image

from ..compiler.errors import DataError
from ..compiler.types import InputSpec, Preprocess, Refusal
from .preprocess import apply

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
ARRAYS = (".npy", ".npz")

#: What reading a damaged file raises; Pillow's decoders do not agree on one class.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)

#: What one sample feeds a model: input name -> array.
Feed = Mapping[str, np.ndarray]
#: Changes an image before it is preprocessed; gets the image and the item's name.
Transform = Callable[[Image.Image, str], Image.Image]


@dataclass(frozen=True)
class Item:
    """One sample: `file` relative to the folder, and which row of it (None: all of it)."""

    file: str
    row: int | None = None

    @property
    def name(self) -> str:
        """The relative path, with `#row` behind it where the file holds several samples."""
        return self.file if self.row is None else f"{self.file}#{self.row}"


class Source(Protocol):
    """How the items of one folder are read."""

    def read(self, item: Item) -> tuple[Feed, ...]:
        """Return one item's feeds, one for each way of preparing it. Raises one of UNREADABLE for a damaged file."""


def walk(folder: Path) -> list[str]:
    """Return the relative posix paths of all files below `folder`, sorted; links are followed, each folder once.

    Names that start with a dot are left out.
    """
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        seen.add(real)
        found += [Path(here, name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def readable(files: Sequence[str], check: Callable[[str], list[Item]], rule: str) -> tuple[list[Item], list[Refusal]]:
    """Return the items of the files that `check` can read the head of, and a refusal for each that it cannot."""
    items, refusals = [], []
    for file in files:
        try:
            items += check(file)
        except UNREADABLE as error:
            refusals.append(refusal(file, rule, error))
    return items, refusals


def refusal(name: str, rule: str, error: BaseException) -> Refusal:
    """Say in one line why an item was skipped."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Refusal(name, rule, text[:200])


# --------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Images:
    """Image files, changed by each of `transforms` (None: not at all), prepared by `pre` for the one input `spec`."""

    folder: Path
    pre: Preprocess
    spec: InputSpec
    transforms: tuple[Transform | None, ...] = (None,)
    rule = "unreadable-image"

    def check(self, file: str) -> list[Item]:
        """Read no more than the file's head."""
        with Image.open(self.folder / file):
            return [Item(file)]

    def read(self, item: Item) -> tuple[Feed, ...]:
        """Decode one image; transform and preprocess it in each way."""
        with Image.open(self.folder / item.file) as image:
            image.load()
            changed = (image if change is None else change(image, item.name) for change in self.transforms)
            return tuple({self.spec.name: apply(each, self.pre, self.spec)} for each in changed)


# --------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Arrays:
    """`.npz` files with arrays named as the inputs, or `.npy` files for a model with one input.

    An array has the input's shape, with as many rows in the first dimension as there are samples, or that shape
    without the first dimension. `whole`: the inputs have no batch dimension in common, a file is a feed.
    """

    folder: Path
    specs: tuple[InputSpec, ...]
    rule = "unreadable-array"

    @functools.cached_property
    def whole(self) -> bool:
        """Whether a file is one feed as it is."""
        return any(not s.shape for s in self.specs) or len({s.shape[0] for s in self.specs}) > 1

    def check(self, file: str) -> list[Item]:
        """Return the items of a file by its headers. DataError where names, shapes or types do not fit."""
        heads = dict(self._heads(file))
        where = str(self.folder / file)
        rows = set()
        for spec in self.specs:
            if spec.name not in heads:
                what = f"has no array named {spec.name!r}, only {', '.join(sorted(heads)) or 'none'}"
                raise DataError(what, where=where, fix="write it with numpy.savez(file, **{input name: array})")
            rows.add(_rows(spec, *heads[spec.name], where, self.whole))
        if len(rows) > 1:
            what = f"its arrays have different numbers of rows: {sorted(rows)}"
            raise DataError(what, where=where, fix="give every input the same number of samples")
        count = rows.pop()
        return [Item(file)] if self.whole or count == 1 else [Item(file, row) for row in range(count)]

    def read(self, item: Item) -> tuple[Feed, ...]:
        """Return one row of each array, in the inputs' dtypes."""
        arrays = self._load(item.file)
        row = slice(item.row or 0, (item.row or 0) + 1)
        feed = {}
        for spec in self.specs:
            array = arrays[spec.name]
            if not self.whole:
                array = array[row] if array.ndim == len(spec.shape) else array[None]
            feed[spec.name] = np.array(array, dtype=spec.dtype, order="C")
        return (feed,)

    @functools.cached_property
    def _load(self) -> Callable[[str], dict[str, np.ndarray]]:
        """Reading that remembers the last two files, for files with many rows."""

        @functools.lru_cache(maxsize=2)
        def load(file: str) -> dict[str, np.ndarray]:
            path = self.folder / file
            if file.lower().endswith(".npy"):
                return {self.specs[0].name: np.load(path, mmap_mode="r", allow_pickle=False)}
            with np.load(path, allow_pickle=False) as archive:
                return {spec.name: archive[spec.name] for spec in self.specs}

        return load

    def _heads(self, file: str) -> Iterator[tuple[str, tuple[tuple[int, ...], np.dtype]]]:
        """Yield (name, (shape, dtype)) of each array, without reading the data."""
        path = self.folder / file
        if file.lower().endswith(".npy"):
            if len(self.specs) > 1:
                fix = "write .npz files with one array for each: " + ", ".join(s.name for s in self.specs)
                raise DataError(f"is one array, and the model has {len(self.specs)} inputs", where=str(path), fix=fix)
            with path.open("rb") as stream:
                yield self.specs[0].name, _head(stream)
            return
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    yield member.removesuffix(".npy"), _head(stream)


def _head(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _rows(spec: InputSpec, shape: tuple[int, ...], dtype: np.dtype, where: str, whole: bool) -> int:
    """Return how many samples an array holds. DataError where it does not fit the input."""
    if not np.can_cast(dtype, spec.dtype, "same_kind"):
        what = f"array {spec.name!r} is {dtype}, and the input takes {spec.dtype}"
        raise DataError(what, where=where, fix=f"convert it with astype({spec.dtype!r})")
    wanted = spec.shape if whole else spec.shape[1:]
    if _fits(shape, wanted):
        return 1
    if not whole and shape and _fits(shape[1:], wanted):
        return shape[0]
    text = ", ".join("any" if d is None else str(d) for d in spec.shape)
    what = f"array {spec.name!r} has shape {shape}, and the input ({text})"
    raise DataError(what, where=where, fix="give it that shape; the first dimension counts the samples")


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, d) for d, w in zip(shape, wanted, strict=True))
