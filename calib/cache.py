"""Statistics of a calibration, kept between compiles under a key made of contents, never of file names.

The key covers the model, the images' contents, the preprocessing, the tensors, what was collected, the seed, and the
versions of edgec and ONNX Runtime. A file that is damaged, or cannot be written, costs a sweep and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx_ir as ir
import platformdirs

from .._version import __version__
from ..compiler import model as model_io
from ..compiler.errors import OutputError
from ..compiler.files import atomic_file
from ..compiler.types import Progress, Refusal, TensorStatistics, silent
from .folder import Folder
from .observe import collect
from .sources import UNREADABLE

logger = logging.getLogger(__name__)

#: Changes when the meaning of a stored file does.
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Collected:
    """Statistics by tensor name, whether they came out of the cache, and their key."""

    statistics: Mapping[str, TensorStatistics]
    cached: bool
    key: str


def collect_cached(
    model: ir.Model,
    tensors: tuple[str, ...],
    folder: Folder,
    *,
    histogram: bool,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
    fingerprint: str | None = None,
) -> Collected:
    """Return observe.collect's result, from the cache where it is there, and put it there where it is not.

    `fingerprint` is model_io.fingerprint(model), for callers that know it already.
    """
    prints = fingerprint or model_io.fingerprint(model)
    key = key_of(prints, tensors, folder, histogram=histogram, seed=seed)
    path = directory() / f"{key}.npz"
    found = _load(path)
    if found is not None:
        folder.mark_skipped(found[1])
        return Collected(found[0], True, key)
    statistics = collect(model, tensors, folder, histogram=histogram, seed=seed, threads=threads, progress=progress)
    _store(path, statistics, folder.skipped)
    return Collected(statistics, False, key)


@dataclass(frozen=True)
class CalibrationData:
    """A StatisticsProvider over one folder of images: what passes get that need statistics of changed models."""

    folder: Folder
    histogram: bool = True
    seed: int = 0
    threads: int | None = None
    progress: Progress = silent

    def collect(self, model: ir.Model, tensors: tuple[str, ...]) -> dict[str, TensorStatistics]:
        """Return the statistics of the named tensors of `model`, cached by content."""
        found = collect_cached(
            model,
            tensors,
            self.folder,
            histogram=self.histogram,
            seed=self.seed,
            threads=self.threads,
            progress=self.progress,
        )
        return dict(found.statistics)


def directory() -> Path:
    """Return where statistics are kept: the user's cache folder (XDG_CACHE_HOME where it is set)."""
    return Path(platformdirs.user_cache_dir("edgec")) / "statistics"


def key_of(fingerprint: str, tensors: tuple[str, ...], folder: Folder, *, histogram: bool, seed: int) -> str:
    """Return the key, 64 hex digits, of these statistics."""
    pre = None
    if folder.pre is not None:
        pre = {k: v for k, v in dataclasses.asdict(folder.pre).items() if k != "assumed"}
    parts = {
        "format": _FORMAT,
        "model": fingerprint,
        "images": folder.manifest(),
        "preprocess": pre,
        "tensors": sorted(tensors),
        "histogram": histogram,
        "seed": seed,
        "edgec": __version__,
        "onnxruntime": metadata.version("onnxruntime"),
        "pillow": metadata.version("pillow"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _store(path: Path, statistics: Mapping[str, TensorStatistics], skipped: tuple[Refusal, ...]) -> None:
    values = list(statistics.values())
    bins = max((len(s.histogram) for s in values if s.histogram is not None), default=0)
    none = np.zeros(bins, np.int64)
    text = json.dumps({"tensors": list(statistics), "skipped": [dataclasses.astuple(r) for r in skipped]})
    ends = np.array([(s.min, s.max, s.low, s.high, s.images) for s in values], np.float64).reshape(-1, 5)
    counts = np.array([none if s.histogram is None else s.histogram for s in values], np.int64)
    try:
        with atomic_file(path) as file:
            text_bytes = np.frombuffer(text.encode(), np.uint8)
            np.savez_compressed(file, text=text_bytes, ends=ends, counts=counts.reshape(len(values), bins))
    except OutputError as error:
        logger.warning("the statistics are not kept for the next time: %s", error)


def _load(path: Path) -> tuple[dict[str, TensorStatistics], list[Refusal]] | None:
    """Return what is stored; None where there is nothing, or nothing that can be used."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            text, ends, counts = json.loads(stored["text"].tobytes()), stored["ends"], stored["counts"]
        rows = zip(text["tensors"], ends.tolist(), counts, strict=True)
        found = {n: TensorStatistics(e[0], e[1], int(e[4]), c if c.any() else None, e[2], e[3]) for n, e, c in rows}
        return found, [Refusal(*fields) for fields in text["skipped"]]
    except FileNotFoundError:
        return None
    except (*UNREADABLE, KeyError, TypeError) as error:
        logger.warning("%s is damaged and is made anew: %s", path, error)
        return None
