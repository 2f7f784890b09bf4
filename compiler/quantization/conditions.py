"""What is calibrated on: the images as they are, a mixture of degraded ones, or several conditions at once.

    --degrade       ranges from                           steps, biases, weights and their judge see
    clean           the images as they are                the same
    mixed, NAMES    a mixture: each image under one       the same mixture
                    condition, drawn by its name
    minimax         all images under each of QRID's       the mixture `mixed`
                    conditions: by each tensor's worst
                    (calib/minimax.py), or by a method on
                    all of them, whichever is closer

Images that are held out, or judged by, are none of this file's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...calib import cache, degrade, minimax
from ...calib.sources import Images
from ..errors import DataError, UserError
from ..types import Progress, QuantScheme, Range, TensorStatistics
from .quantizer import activation_bits, choose_ranges

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...calib.folder import Folder

#: What `--degrade` says where nothing is degraded.
CLEAN = "clean"
#: The mixture that goes with minimax.
_MIXTURE = "mixed"
#: The method of ranges that takes several conditions.
MINIMAX = "minimax"


def check(text: str, method: str) -> degrade.Plan:
    """Return the plan of `--degrade`. UserError where it is not understood, or another method than minimax is named."""
    plan = degrade.parse(text)
    if plan.kind == "minimax" and method != "auto":
        what = "minimax is a way to choose ranges, and so is --method"
        raise UserError(what, where=f"--degrade {text} --method {method}", fix="leave one of them out")
    return plan


def check_images(folder: Folder, where: str) -> None:
    """Raise DataError for a folder of arrays."""
    if not isinstance(folder.source, Images):
        what = f"{folder.path} holds arrays, and only images can be degraded"
        raise DataError(what, where=where, fix="leave it out, or give images")


def calibrated_on(clean: Folder, text: str, seed: int) -> tuple[Folder, Mapping[str, Folder]]:
    """Return the images to calibrate on by `--degrade`, and the conditions to choose ranges for, if there are several.

    UserError where the text is not understood, DataError for arrays, which cannot be degraded.
    """
    plan = degrade.parse(text)
    if plan.conditions == (CLEAN,):
        return clean, {}
    check_images(clean, f"--degrade {text}")
    if plan.kind == "minimax":
        mixture = clean.transformed(*degrade.transform(_MIXTURE, seed))
        return mixture, degrade.under(clean, plan.conditions, seed)
    return clean.transformed(*degrade.transform(text, seed)), {}


@dataclass(frozen=True, eq=False)
class Swept:
    """Statistics by tensor, of one folder or of all conditions together; of each condition where there are several."""

    statistics: Mapping[str, TensorStatistics]
    conditions: Mapping[str, Mapping[str, TensorStatistics]]
    cached: bool
    key: str

    def ranges(self, method: str, scheme: QuantScheme) -> dict[str, Range]:
        """Return each tensor's range by the method, for the scheme's activations."""
        if method != MINIMAX:
            return choose_ranges(self.statistics, method, scheme)
        return {
            tensor: minimax.choose(
                {condition: found[tensor] for condition, found in self.conditions.items()},
                bits=activation_bits(scheme),
                symmetric=scheme.symmetric,
            )
            for tensor in self.statistics
        }


def sweep(
    model: ir.Model,
    tensors: tuple[str, ...],
    images: Folder,
    conditions: Mapping[str, Folder],
    *,
    histogram: bool,
    seed: int,
    threads: int,
    progress: Progress,
) -> Swept:
    """Return the statistics of `images`, or of the `conditions` where there are any, from one sweep or the cache."""
    found = cache.collect_cached_together(
        model, tensors, conditions or {"": images}, histogram=histogram, seed=seed, threads=threads, progress=progress
    )
    if not conditions:
        one = found[""]
        return Swept(one.statistics, {}, one.cached, one.key)
    each = {condition: one.statistics for condition, one in found.items()}
    pooled = {tensor: minimax.pooled({c: s[tensor] for c, s in each.items()}) for tensor in tensors}
    return Swept(pooled, each, all(one.cached for one in found.values()), cache.joint_key(found))
