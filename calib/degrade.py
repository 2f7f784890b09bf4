"""Which degradation an image gets, how strong, and how it is applied to any image that Pillow opens.

What an image becomes depends on the condition, the seed and the image's name, through a hash that is the same in every
process and on every machine: never on the order, the number of images, or the other conditions. `mixed` draws a
condition for each image; the image is then the very same as under that condition alone.

Degradations work on 8-bit colour, in the image as it was decoded, before it is resized. Other modes become what
calib/preprocess.py would make of them: 16-bit grey its high byte, palettes and CMYK RGB. Alpha is passed on untouched.
An image to which nothing is done is handed back as it is.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ..compiler.errors import UserError
from .degradations import CONDITIONS, QRID, Degradation
from .sources import Transform

__all__ = ["CONDITIONS", "QRID", "VERSION", "Degradation", "Plan", "condition_of", "parameter_of", "parse", "transform"]

#: Raised whenever the pixels change for a condition, seed and name: caches are keyed with it.
VERSION = 1
#: What part of the images `mixed` degrades where no fraction is given: each of QRID's conditions gets as many.
MIXED = 1 - 1 / len(QRID)

_GROUPS = {"all": tuple(CONDITIONS), "qrid": QRID}


# --------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Plan:
    """What `--degrade` asks for.

    kind "conditions": each of `conditions` by itself. "mixed": each image gets one of them, the part `fraction` of
    the images one that is not clean. "minimax": statistics of each of them, ranges for the worst.
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
    found = [known for name in names for known in _conditions(name, where)]
    return Plan("conditions", tuple(dict.fromkeys(found)))


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


def condition_of(seed: int, name: str, fraction: float = MIXED) -> str:
    """Return the condition that the image of this name gets in a mixture.

    Raising the fraction degrades more images; those that were degraded before keep their condition.
    """
    if _uniform(_hash("mixed", seed, name)) >= fraction:
        return "clean"
    worse = [condition for condition in QRID if condition != "clean"]
    return worse[int(_uniform(_hash("which", seed, name)) * len(worse))]


# --------------------------------------------------------------------------------------------- applying


def transform(condition: str, seed: int) -> tuple[Transform, str]:
    """Return what `Folder.transformed` takes, for one condition, `mixed` or `mixed:FRACTION`.

    The name holds all that the pixels depend on, beside the images, their names and Pillow, on which decoding depends
    too; it is empty for clean, where nothing changes. The transform may be called from several threads, and more than
    once for the same image. Raises UserError for an unknown name, ValueError where there is no one condition.
    """
    plan = parse(condition)
    key = f"degrade {VERSION} {plan.text} seed {seed}"
    if plan.kind == "mixed" and plan.fraction is not None:
        return functools.partial(_mixed, plan.fraction, seed), key
    if len(plan.conditions) > 1:
        raise ValueError(f"{condition!r} is {len(plan.conditions)} conditions, and an image gets one")
    (only,) = plan.conditions
    return functools.partial(_degraded, only, seed), key if only != "clean" else ""


def _mixed(fraction: float, seed: int, image: Image.Image, name: str) -> Image.Image:
    return _degraded(condition_of(seed, name, fraction), seed, image, name)


def _degraded(condition: str, seed: int, image: Image.Image, name: str) -> Image.Image:
    degradation, parameter = CONDITIONS[condition], parameter_of(condition, seed, name)
    if parameter == degradation.neutral:
        return image
    rng = np.random.default_rng(int.from_bytes(_hash("pixels", condition, seed, name), "big"))
    return degrade(image, degradation, parameter, rng)


def degrade(image: Image.Image, degradation: Degradation, parameter: float, rng: np.random.Generator) -> Image.Image:
    """Return a degraded copy in mode L, LA, RGB or RGBA, with the alpha of `image`."""
    known = _eight_bit(image)
    pixels = np.asarray(known)
    if pixels.ndim == 2:
        return Image.fromarray(degradation.function(pixels[:, :, None], parameter, rng)[:, :, 0])
    if known.mode == "RGB":
        return Image.fromarray(degradation.function(pixels, parameter, rng))
    colour = degradation.function(np.ascontiguousarray(pixels[:, :, :-1]), parameter, rng)
    return Image.fromarray(np.concatenate([colour, pixels[:, :, -1:]], axis=2))


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
