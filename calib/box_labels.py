"""Boxes of objects that lie with a folder's images, found by themselves: YOLO's text files, or COCO's JSON.

YOLO: `NAME.txt` beside the image, or in `labels/` where the image's path has `images/`; a line `class cx cy w h` for
each object, centre and size in fractions of the image. An image without a file has no objects if another one has one.

COCO (Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014): `annotations.json` or
`_annotations.coco.json` in the folder, or `instances_*.json` there, beside the folder, or in `annotations/`; `bbox` is
x, y, w, h in pixels. The classes are the category ids in ascending order, from 0. Images are found by `file_name`, or
by its last part where that is unique. Crowds do not count: to find one is neither right nor wrong. YOLO's files come
first where both are there.

Boxes become fractions of the model's input (geometry.py) and are clipped to it. What a crop leaves less than a quarter
of does not count either; what has no area, or nothing left, is no object.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..compiler.errors import DataError
from ..compiler.types import Preprocess
from . import geometry

#: The share of an object's area that must be left for it to count.
LEAST_LEFT = 0.25
#: How far a fraction in a text file may lie outside 0..1: labelling tools round.
_SLACK = 0.01
_COCO_NAMES = ("annotations.json", "_annotations.coco.json")
_YOLO_FIX = "a line is 'class cx cy w h', the last four in fractions of the image"
_COCO_FIX = "give COCO's form: images, annotations with bbox [x, y, width, height], categories"


@dataclass(frozen=True, eq=False)
class BoxLabels:
    """What is to be found on a folder's images.

    `kind` is YOLO or COCO. `boxes`: an image's name in the folder -> (m, 6) float64, x1, y1, x2, y2, counts (1, or 0
    for what is not counted), class; in fractions of the model's input, whose size is `size` (height, width).
    """

    kind: str
    size: tuple[int, int]
    boxes: Mapping[str, np.ndarray]


def find(folder: Path, files: Sequence[str], pre: Preprocess) -> BoxLabels | None:
    """Return the objects on the images `files` of `folder`, as `pre` makes them inputs; None where nothing says so.

    DataError, with file and line, where a label file is broken, does not have all images, or no box at all.
    """
    found = _yolo(folder, files)
    kind = "COCO" if found is None else "YOLO"
    found = _coco(folder, files) if found is None else found
    if found is None:
        return None
    assert pre.size is not None
    boxes = {file: _placed(found[file], _size(folder / file, pre), pre) for file in files}
    if not any(len(rows) for rows in boxes.values()):
        raise DataError(
            f"the box labels ({kind}) of its images hold no box", where=str(folder), fix="label images with objects"
        )
    return BoxLabels(kind, pre.size, boxes)


def _size(file: Path, pre: Preprocess) -> tuple[int, int]:
    """Return the image's (width, height); it is not looked up where it does not matter."""
    if pre.resize == "stretch":
        return 1, 1
    with Image.open(file) as image:
        return image.size


def _placed(rows: np.ndarray, size: tuple[int, int], pre: Preprocess) -> np.ndarray:
    """Map rows from fractions of an image of `size` (width, height) to fractions of the input, clipped to it."""
    assert pre.size is not None
    left, top, right, bottom = geometry.window(pre.resize, size, pre.size[::-1])
    corner, extent = np.array([left, top] * 2), np.array([right - left, bottom - top] * 2)
    moved = (rows[:, :4] * (size * 2) - corner) / extent
    clipped = moved.clip(0, 1)
    before, after = ((xy[:, 2] - xy[:, 0]) * (xy[:, 3] - xy[:, 1]) for xy in (moved, clipped))
    counts = rows[:, 4] * (after >= LEAST_LEFT * before)
    placed: np.ndarray = np.column_stack([clipped, counts, rows[:, 5]])[after > 0]
    return placed


def _rows(found: Iterable[Sequence[float]]) -> np.ndarray:
    return np.array(list(found), dtype=np.float64).reshape(-1, 6)


# --------------------------------------------------------------------------------------------- YOLO


def _yolo(folder: Path, files: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Return each image's rows in fractions of the image; None where no image has a file."""
    texts = {file: _text_of(folder.absolute() / file) for file in files}
    if not any(texts.values()):
        return None
    return {file: _rows(() if path is None else _lines(path)) for file, path in texts.items()}


def _text_of(image: Path) -> Path | None:
    """Return the image's text file: beside it, or in `labels/` for the last `images/` of its path."""
    candidates = [image.with_suffix(".txt")]
    parts = image.parts[:-1]
    if "images" in parts:
        at = len(parts) - 1 - parts[::-1].index("images")
        candidates.append(Path(*parts[:at], "labels", *image.parts[at + 1 :]).with_suffix(".txt"))
    return next((path for path in candidates if path.is_file()), None)


def _lines(path: Path) -> list[tuple[float, ...]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as text: {error}", where=str(path), fix=_YOLO_FIX) from error
    return [_line(line.split(), f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _line(words: Sequence[str], where: str) -> tuple[float, ...]:
    """Return x1, y1, x2, y2, 1, class. DataError where the line is something else."""
    if len(words) != 5:
        raise DataError(f"has {len(words)} values", where=where, fix=_YOLO_FIX)
    try:
        label, (x, y, w, h) = int(words[0]), map(float, words[1:])
    except ValueError:
        raise DataError(f"is no box: {' '.join(words)[:80]!r}", where=where, fix=_YOLO_FIX) from None
    if label < 0 or not all(-_SLACK <= v <= 1 + _SLACK for v in (x, y, w, h)):
        what = f"is no class and four fractions: {' '.join(words)[:80]!r}"
        raise DataError(what, where=where, fix=_YOLO_FIX)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2, 1.0, label


# --------------------------------------------------------------------------------------------- COCO


def _coco(folder: Path, files: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Return each image's rows in fractions of the image; None without a file, or if one beside has other images."""
    path = _coco_file(folder.absolute())
    if path is None:
        return None
    document = _document(path)
    ids = [_whole(c, "id", path, f"categories[{i}]") for i, c in enumerate(document["categories"])]
    classes = {id_: i for i, id_ in enumerate(sorted(set(ids)))}
    images = _matched(document["images"], files, path)
    if not images and folder.absolute() not in path.parents:
        return None
    missing = [file for file in files if file not in images]
    if missing:
        what = f"{len(missing)} of the {len(files)} images are not in its 'images', such as {missing[0]}"
        raise DataError(what, where=str(path), fix="list every image, also those without objects, or move it away")
    by_id = defaultdict(list)
    for i, entry in enumerate(document["annotations"]):
        by_id[_whole(entry, "image_id", path, f"annotations[{i}]")].append((i, entry))
    found = {}
    for file, (index, image) in images.items():
        entries = by_id[_whole(image, "id", path, f"images[{index}]")]
        size = _pixels(image, folder / file, path, f"images[{index}]") if entries else (1.0, 1.0)
        found[file] = _rows(_box(entry, size, classes, path, f"annotations[{i}]") for i, entry in entries)
    return found


def _coco_file(folder: Path) -> Path | None:
    for name in _COCO_NAMES:
        if (folder / name).is_file():
            return folder / name
    for place in (folder, folder / "annotations", folder.parent, folder.parent / "annotations"):
        found = sorted(place.glob("instances_*.json"))
        named = place / f"instances_{folder.name}.json"
        if len(found) > 1 and named not in found:
            what = f"which of these holds the boxes of {folder.name}: {', '.join(path.name for path in found)}"
            raise DataError(what, where=str(place), fix=f"put it into the folder as {_COCO_NAMES[0]}")
        if found:
            return named if named in found else found[0]
    return None


def _document(path: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"is not valid JSON: {error.msg}", where=f"{path}, line {error.lineno}", fix=_COCO_FIX
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as text: {error}", where=str(path), fix=_COCO_FIX) from error
    for key in ("images", "annotations", "categories"):
        entries = document.get(key) if isinstance(document, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"has no list of objects {key!r}", where=str(path), fix=_COCO_FIX)
    return {key: document[key] for key in ("images", "annotations", "categories")}


def _matched(
    images: Sequence[dict[str, Any]], files: Sequence[str], path: Path
) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return file -> (index, entry) for the files that are listed: by the whole name, or a last part that is unique."""
    whole, last = {}, {}
    for i, image in enumerate(images):
        name = image.get("file_name")
        if not isinstance(name, str):
            raise DataError("has no 'file_name'", where=f"{path}, images[{i}]", fix=_COCO_FIX)
        whole[name] = last[_last(name)] = i, image
    known, given = Counter(map(_last, whole)), Counter(map(_last, files))
    unique = {name: entry for name, entry in last.items() if known[name] == 1 == given[name]}
    found = {file: whole.get(file) or unique.get(_last(file)) for file in files}
    return {file: entry for file, entry in found.items() if entry is not None}


def _last(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _whole(entry: Mapping[str, Any], key: str, path: Path, what: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int):
        raise DataError(f"{key!r} is {value!r}, not a whole number", where=f"{path}, {what}", fix=_COCO_FIX)
    return value


def _pixels(image: Mapping[str, Any], file: Path, path: Path, what: str) -> tuple[float, float]:
    """Return the (width, height) that the boxes are in pixels of: as stated, or the image's own."""
    if "width" not in image or "height" not in image:
        with Image.open(file) as own:
            return own.size
    width, height = (_whole(image, key, path, what) for key in ("width", "height"))
    if width <= 0 or height <= 0:
        raise DataError(f"its size is {width} x {height}", where=f"{path}, {what}", fix=_COCO_FIX)
    return width, height


def _box(
    entry: Mapping[str, Any], size: tuple[float, float], classes: Mapping[int, int], path: Path, what: str
) -> tuple[float, ...]:
    """Return x1, y1, x2, y2 in fractions of the image, counts, class. DataError where the entry is no box."""
    box: Any = entry.get("bbox")
    where = f"{path}, {what}"
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    if not numbers or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise DataError(f"'bbox' is {box!r}", where=where, fix=_COCO_FIX)
    label = _whole(entry, "category_id", path, what)
    if label not in classes:
        raise DataError(f"'category_id' is {label}, which is no category", where=where, fix=_COCO_FIX)
    (x, y, w, h), (width, height) = box, size
    counts = 0.0 if entry.get("iscrowd") else 1.0
    return x / width, y / height, (x + w) / width, (y + h) / height, counts, classes[label]
