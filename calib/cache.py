"""Statistics of a calibration, kept between compiles under a key made of contents, never of file names.

The key covers the model, the images' contents, what they are changed by (the condition or mixture, its seed and its
version), the preprocessing, the tensors, what was collected, the seed, and the versions of edgec and ONNX Runtime.
Each condition has a key of its own, so one that is already known is not swept again, whatever it is asked for with;
clean images have the same key as without any degradation. A file that is damaged, or cannot be written, costs a sweep
and nothing else.
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
from .observe import collect_together
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
    return collect_cached_together(
        model,
        tensors,
        {"": folder},
        histogram=histogram,
        seed=seed,
        threads=threads,
        progress=progress,
        fingerprint=fingerprint,
    )[""]


def collect_cached_together(
    model: ir.Model,
    tensors: tuple[str, ...],
    folders: Mapping[str, Folder],
    *,
    histogram: bool,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
    fingerprint: str | None = None,
) -> dict[str, Collected]:
    """Return what `collect_cached` gives for each of the folders, by its name; one sweep for all that is missing.

    The folders are one folder under several conditions (`degrade.under`).
    """
    prints = fingerprint or model_io.fingerprint(model)
    keys = {name: key_of(prints, tensors, f, histogram=histogram, seed=seed) for name, f in folders.items()}
    found = {}
    for name, key in keys.items():
        stored = _load(_path(key))
        if stored is not None:
            found[name] = Collected(stored[0], True, key)
            folders[name].mark_skipped(stored[1])
    missing = {name: folder for name, folder in folders.items() if name not in found}
    if missing:
        swept = collect_together(
            model, tensors, missing, histogram=histogram, seed=seed, threads=threads, progress=progress
        )
        for name, statistics in swept.items():
            _store(_path(keys[name]), statistics, folders[name].skipped)
            found[name] = Collected(statistics, False, keys[name])
    return {name: found[name] for name in folders}


def joint_key(collected: Mapping[str, Collected]) -> str:
    """Return one key, 64 hex digits, for the statistics of several conditions; their order does not matter."""
    parts = sorted((name, each.key) for name, each in collected.items())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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


def _path(key: str) -> Path:
    return directory() / f"{key}.npz"


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
