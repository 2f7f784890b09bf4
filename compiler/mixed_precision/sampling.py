"""Which images each rounding is judged on: a few that stand for many.

Measuring every rounding alone runs the network once for each, so 2 to 32 images are all there is time for, while
errors differ between images, and some roundings err on one image more than on all others together: an image that
clips what no other does makes half of a rounding's error over 500. Drawn evenly it is missing, or counts for sixteen.
Everything at once, rounded, is one run an image, and shows which these are. With parts_i of that error from image i,
images are drawn in proportion to

    p_i = 0.7 parts_i + 0.3 / images          and stand for 1 / (drawn p_i) images each

so sums over them are right on average whatever is summed (Hansen and Hurwitz 1943, "On the Theory of Sampling from
Finite Populations"), and vary least where that goes with p_i. The second term bounds the weight of an image that has a
small part in the whole but not in a single rounding. Draws are systematic, along rising p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..layers import LINEAR, macs
from ..quantization.closeness import few

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...calib.folder import Folder
    from ..quantization.closeness import Closeness
    from ..quantization.quantizer import Quantizer

#: How much of the choice goes by the images' errors.
_TRUST = 0.7
#: Images that each rounding is judged on, within these limits: so many as keep the input numbers, and the
#: multiply-accumulates of running the network once for each rounding, below the other two.
_FEWEST, _MOST, _NUMBERS, _WORK = 2, 32, 6 * 3 * 352 * 352, 1e12


@dataclass(frozen=True, eq=False)
class Sample:
    """The images that each rounding is judged on, and how many others each of them stands for."""

    images: Folder
    weights: np.ndarray


def choose(quantizer: Quantizer, images: Folder, units: int, judge: Closeness | None) -> Sample:
    """Choose images by their errors where there is a judge to tell them, else evenly over the folder."""
    even = _images(images, quantizer.model, units)
    if judge is None:
        return Sample(even, np.ones(len(even)))
    parts = judge.parts(quantizer.build().model, simulated=quantizer.scheme.simulated)
    drawn, weights = sample(parts, min(len(even), len(parts)))
    return Sample(judge.images.subset(drawn.tolist()), weights)


def _images(images: Folder, model: ir.Model, units: int) -> Folder:
    some = few(images)
    size = sum(math.prod(d or 1 for d in spec.shape[1:]) for spec in images.specs)
    work = units * sum(macs(n) or 0 for n in model.graph if n.op_type in LINEAR)
    most = min(_MOST, _NUMBERS // max(size, 1), int(_WORK / max(work, 1)))
    count = min(len(some), max(_FEWEST, most))
    return some.subset(i * len(some) // count for i in range(count))


def sample(parts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose images that stand for all: return their indices, rising, and how many each one stands for (float64).

    `parts` of the error, everything rounded, come from each image; they add up to 1.
    """
    p = _TRUST * parts + (1 - _TRUST) / len(parts)
    order = np.argsort(p, kind="stable")
    places = np.searchsorted(np.cumsum(p[order]), (np.arange(count) + 0.5) / count)
    drawn, times = np.unique(order[np.minimum(places, len(p) - 1)], return_counts=True)
    return drawn, times / (count * p[drawn])
