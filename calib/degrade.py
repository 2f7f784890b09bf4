"""Which degradation an image gets, how strong, and how it is applied to any image that Pillow opens.

What an image becomes depends on the condition, the seed and the image's name, through a hash that is the same in every
process and on every machine: never on the order, the number of images, or the other conditions. A mixture draws a
condition for each image, the one with the largest hash (Thaler and Ravishankar, 1998); the image is then the very same
as under that condition alone, and one condition more changes only the images that get it.

Degradations work on 8-bit colour, in the image as it was decoded, before it is resized. Other modes become what
calib/preprocess.py would make of them: 16-bit grey its high byte, palettes and CMYK RGB. Alpha is passed on untouched.
An image to which nothing is done is handed back as it is.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from ..compiler.errors import UserError
from .degradations import CONDITIONS, QRID, Degradation
from .sources import Transform

if TYPE_CHECKING:
    from .folder import Folder

__all__ = [
    "CONDITIONS",
    "QRID",
    "VERSION",
    "Degradation",
    "Plan",
    "condition_of",
    "parameter_of",
    "parse",
    "transform",
    "under",
]

#: Raised whenever the pixels change for a condition, seed and name: caches are keyed with it.
VERSION = 2
#: What part of the images `mixed` degrades where no fraction is given: each of QRID's conditions gets as many.
MIXED = 1 - 1 / len(QRID)

_GROUPS = {"all": tuple(CONDITIONS), "qrid": QRID}


# --------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Plan:
    """What `--degrade` asks for; the conditions are in the order of the table, whatever the user's was.

    kind "conditions": each of `conditions` by itself; where there can be but one version of each image, one of them
    for each. "mixed": one of `conditions` for each image, not clean for the part `fraction` of them. "minimax":
    statistics of each of them, ranges for the worst.
    """

    kind: Literal["conditions", "mixed", "minimax"]
    conditions: tuple[str, ...]
    fraction: float | None = None

    @property
    def text(self) -> str:
        """What `parse` makes this plan of."""
        if self.kind == "mixed":
            return f"mixed:{self.fraction!r}"
        return ",".join(self.conditions) if self.kind == "conditions" else self.kind


def parse(text: str) -> Plan:
    """Return the plan for names with commas between them, `all`, `qrid`, `mixed`, `mixed:FRACTION` or `minimax`.

    Raises UserError for anything else, with the nearest names.
    """
    where = f"--degrade {text}"
    kind, colon, fraction = text.strip().partition(":")
    if kind == "mixed":
        return Plan("mixed", QRID, _fraction(fraction, where) if colon else MIXED)
    if text.strip() == "minimax":
        return Plan("minimax", QRID)
    names = [name.strip() for name in text.split(",")]
    found = {known for name in names for known in _conditions(name, where)}
    return Plan("conditions", tuple(name for name in CONDITIONS if name in found))


def _fraction(text: str, where: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:  # also where it is no number
        fix = "give the part of the images that is degraded, such as mixed:0.5"
        raise UserError(f"{text!r} is no fraction from 0 to 1", where=where, fix=fix)
    return abs(fraction)


def _conditions(name: str, where: str) -> tuple[str, ...]:
    if name in CONDITIONS:
        return (name,)
    if name in _GROUPS:
        return _GROUPS[name]
    if name == "minimax" or name.partition(":")[0] == "mixed":
        raise UserError(f"{name} is already a choice of conditions", where=where, fix=f"give {name} alone")
    names = (*CONDITIONS, *_GROUPS, "mixed", "mixed:FRACTION", "minimax")
    near = difflib.get_close_matches(name.lower(), names, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    what = f"unknown degradation {name!r}" if name else "a name is missing"
    raise UserError(what, where=where, fix=f"{hint}known: {', '.join(names)}")


# --------------------------------------------------------------------------------------------- drawing


def _hash(*parts: object) -> bytes:
    """Return 16 bytes that depend on nothing but the parts, each ended by a NUL, which no file name contains."""
    text = "".join(f"{part}\0" for part in parts)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def _uniform(digest: bytes) -> float:
    """Return a number in [0, 1) made of the first 53 bits."""
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def parameter_of(condition: str, seed: int, name: str) -> float:
    """Return the parameter that the image of this name gets, in the unit of the condition's Degradation."""
    return CONDITIONS[condition].parameter(_uniform(_hash("parameter", condition, seed, name)))


def condition_of(plan: Plan, seed: int, name: str) -> str:
    """Return the condition that the image of this name gets, each of the plan's with the same chance.

    Raising the fraction of `mixed` degrades more images; those that were degraded before keep their condition.
    """
    among = plan.conditions
    if plan.fraction is not None:
        if _uniform(_hash("mixed", seed, name)) >= plan.fraction:
            return "clean"
        among = tuple(condition for condition in among if condition != "clean")
    return max(among, key=lambda condition: _hash("which", condition, seed, name))


# --------------------------------------------------------------------------------------------- applying


def transform(text: str, seed: int) -> tuple[Transform, str]:
    """Return what `Folder.transformed` takes, for names of conditions, `mixed` or `mixed:FRACTION`.

    An image gets one of the conditions, by `condition_of`. The name holds all that the pixels depend on, beside the
    images, their names and Pillow, on which decoding depends too; it is empty for clean, where nothing changes. The
    transform may be called from several threads, and more than once for the same image. Raises UserError for an
    unknown name, ValueError for `minimax`, which is no way to change an image.
    """
    plan = parse(text)
    if plan.kind == "minimax":
        raise ValueError("minimax looks at an image under several conditions")
    key = f"degrade {VERSION} {plan.text} seed {seed}"
    return functools.partial(_changed, plan, seed), key if plan.conditions != ("clean",) else ""


def under(folder: Folder, conditions: Iterable[str], seed: int) -> dict[str, Folder]:
    """Return the folder under each condition, by name, for `folder.together` and `cache.collect_together`.

    `conditions` are what `transform` takes; under clean it is the folder itself. DataError for a folder of arrays,
    unless clean is all that is asked for.
    """
    changes = {condition: transform(condition, seed) for condition in conditions}
    return {c: folder.transformed(change, key) if key else folder for c, (change, key) in changes.items()}


def _changed(plan: Plan, seed: int, image: Image.Image, name: str) -> Image.Image:
    return _degraded(condition_of(plan, seed, name), seed, image, name)


def _degraded(condition: str, seed: int, image: Image.Image, name: str) -> Image.Image:
    degradation, parameter = CONDITIONS[condition], parameter_of(condition, seed, name)
    if parameter == degradation.neutral:
        return image
    rng = Random(int.from_bytes(_hash("pixels", condition, seed, name), "big"))
    return degrade(image, degradation, parameter, rng)


def degrade(image: Image.Image, degradation: Degradation, parameter: float, rng: Random) -> Image.Image:
    """Return a degraded copy in mode L, LA, RGB or RGBA, with the alpha of `image`."""
    known = _eight_bit(image)
    if known.mode in ("L", "RGB"):
        return degradation.function(known, parameter, rng)
    out = degradation.function(known.convert(known.mode[:-1]), parameter, rng)
    out.putalpha(known.getchannel("A"))
    return out


#: Pillow's other modes that are not simply turned into RGB -> what they are turned into.
_TARGET = {"1": "L", "F": "L", "PA": "RGBA", "RGBa": "RGBA"}


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return the image in mode L, LA, RGB or RGBA."""
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(high_byte.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert(_TARGET.get(image.mode, "RGB"))
