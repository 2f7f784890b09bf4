"""Does a model lose more than its original where the camera is bad? Comparisons on the same images, and verdicts.

Algebra. Let a_ci, b_ci be an image's columns under condition c, of which per_image.py makes what is lost:

    lost_c      = 100 sum_i a_ci / sum_i b_ci      [points]    in dB: mean_i of image i's relative error energy
    difference  = lost_c                           with labels: the original's figure less the model's, both under c
                = lost_c - lost_clean              without: what the model answers unlike its original is never below
                                                   0, so what counts is whether it is more than on clean images

The 95 % interval is that of the paired bootstrap: whole images are drawn, with all that was seen of them under both
conditions and by both models (Efron, 1979). Worse is a difference whose whole interval lies above 0, better one below.
A bootstrap cannot tell chance from effect where hardly any image is informative; the exact sign test can, and rejects
at 5 % from six images on, all on one side (2 / 2^6 = 0.03, 2 / 2^5 = 0.06): with fewer that differ, none is shown.

Each interval stands by itself. Which verdicts hold if all conditions are tested at once is Holm's (1979) step-down
procedure on the two-sided normal p-value of difference / bootstrap standard error. Verdicts are not taken from it: it
would make losses harder to show, the more conditions are looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from .fidelity import CLEAN, Comparison
from .per_image import PerImage, interval, ratio, resampled
from .types import LABELLED, Difference, Robustness, UnderCondition, Verdict

#: How many images must differ before a difference is shown.
LEAST_DIFFERING = 6
NOT_SHOWN: Verdict = "no difference shown"


def verdict(low: float, high: float, differing: int) -> Verdict:
    """Return what an interval of a loss shows: worse where all of it is above 0, better where all is below.

    `differing` is the number of images on which the two that are compared are not alike.
    """
    if differing < LEAST_DIFFERING:
        return NOT_SHOWN
    return "worse" if low > 0 else "better" if high < 0 else NOT_SHOWN


def paired(a: PerImage, b: PerImage | None = None, *, seed: int = 0) -> Difference:
    """Return how much more `a` loses than `b` on the same images; without `b`, than the original itself.

    `a` and `b` may be two models under one condition, one model under two, or both. In points, or in dB of error for
    the metric energy, which needs a `b`. ValueError where they were not seen on the same images by the same metric.
    """
    sides = [a] if b is None else [a, b]
    if {side.metric for side in sides} != {a.metric}:
        raise ValueError("both sides need the same metric")
    if a.metric == "energy" and b is None:
        raise ValueError("an error in dB is compared with another one")
    scale, unit = (1.0, "dB") if a.metric == "energy" else (100.0, "points")
    columns = np.stack([_columns(side) for side in sides], axis=1)  # ValueError where the images are not the same

    def figure(sums: np.ndarray) -> np.ndarray:
        """Map sums (…, sides, 2 or 4) to the difference (…)."""
        lost = scale * ratio(sums)
        result: np.ndarray = lost[..., 0] - (lost[..., 1] if len(sides) == 2 else 0.0)
        return result

    draws = figure(resampled(columns, seed))
    low, high = interval(draws)
    differing = int(np.count_nonzero(figure(columns) if columns.shape[-1] == 2 else _unlike(columns)))
    return Difference(
        value=float(figure(columns.sum(0))),
        low=low,
        high=high,
        unit=unit,
        error=float(draws.std(ddof=1)),
        images=len(columns),
        differing=differing,
        verdict=verdict(low, high, differing),
    )


def _unlike(columns: np.ndarray) -> np.ndarray:
    """Return (n,) bool: the images on which the two sides' counts (n, sides, 4) differ.

    One side alone is an original and a model, (a, b) and (c, d). More false boxes change the F1 of all images, and not
    that of an image without objects.
    """
    halves = columns.reshape(len(columns), 2, -1)
    unlike: np.ndarray = (halves[:, 0] != halves[:, 1]).any(-1)
    return unlike


def _columns(seen: PerImage) -> np.ndarray:
    """Return the columns (n, 2 or 4) whose ratios of sums are compared."""
    if seen.metric == "energy":
        return np.stack([seen.error_db, np.ones(len(seen.error_db))], axis=1)
    lost = seen.lost
    assert lost is not None
    return lost


# --------------------------------------------------------------------------------------------- several conditions


def judge(seen: Comparison, candidate: str | None = None, *, seed: int = 0) -> Robustness:
    """Return what `seen` shows of a candidate under each condition; None: of the original alone.

    Clean must be among the conditions.
    """
    conditions: dict[str, UnderCondition] = {}
    for condition, original in seen.original.items():
        found = None if candidate is None else seen.candidates[condition][candidate]
        difference = None
        if found is not None and found.metric in LABELLED:
            difference = paired(found, seed=seed)
        elif found is not None and candidate is not None and condition != CLEAN and found.lost is not None:
            difference = paired(found, seen.candidates[CLEAN][candidate], seed=seed)
        fidelity = None if found is None else found.fidelity(seed)
        conditions[condition] = UnderCondition(fidelity, original.fidelity(seed), difference)
    clean = conditions[CLEAN].original
    shown = {name: c.difference for name, c in conditions.items() if c.difference is not None}
    together = hold_together(shown)
    notes = _notes(clean.metric, shown, together)
    return Robustness(clean.metric, clean.images, seed, conditions, together, notes)


def hold_together(found: Mapping[str, Difference], level: float = 0.05) -> tuple[str, ...]:
    """Return the names whose verdicts hold when all are tested at once, at `level` for any of them to be wrong."""
    order = sorted(found, key=lambda name: _p_value(found[name]))
    held: set[str] = set()
    for i, name in enumerate(order):
        if _p_value(found[name]) > level / (len(order) - i):
            break
        held.add(name)
    return tuple(name for name, d in found.items() if name in held and d.verdict != NOT_SHOWN)


def _p_value(d: Difference) -> float:
    if d.error <= 0:
        return 0.0 if d.value else 1.0
    return 2 * statistics.NormalDist().cdf(-abs(d.value) / d.error)


#: Metric -> what a condition's difference is.
_MEANING: Mapping[str, str] = {
    "top1": "lost: the original's top-1 less the result's under the same condition, in points",
    "agreement": "more lost: answers unlike the original's, less those on clean images, in points",
    "boxes-labelled": "lost: the original's F1 less the result's under the same condition, in points",
    "boxes": "more lost: boxes unlike the original's, less those on clean images, in points",
    "metric": "more lost: score against the original, below that on clean images, in points",
    "energy": "more lost: error against the original, less that on clean images, mean over the images, in dB",
}


def _notes(metric: str, shown: Mapping[str, Difference], together: Sequence[str]) -> tuple[str, ...]:
    """Say how the figures are to be read; nothing where there is nothing to compare."""
    if not shown:
        return ()
    notes = [
        _MEANING[metric],
        f"worse: the whole 95 % interval is above 0, and {LEAST_DIFFERING} images or more differ",
    ]
    unseen = [d for d in shown.values() if d.verdict == NOT_SHOWN]
    if not any(d.differing for d in shown.values()):
        return (*notes, "what is lost is the same on every image")
    if unseen:
        reach = max(max(abs(d.low), abs(d.high)) for d in unseen)
        notes.append(
            f"no difference shown is no proof that there is none: these intervals reach as far as {reach:.2f} "
            f"{unseen[0].unit}; more images narrow them"
        )
    if metric == "agreement":
        notes.append("an answer that the original is unsure of changes easily: more lost need not be less accurate")
    if len(shown) > 1:
        notes.append("each interval stands by itself: without any difference, one in 20 shows one all the same")
        notes += _at_once(shown, together)
    return tuple(notes)


def _at_once(shown: Mapping[str, Difference], together: Sequence[str]) -> list[str]:
    count = sum(d.verdict != NOT_SHOWN for d in shown.values())
    if not count:
        return []
    held = (
        "all of those shown hold" if len(together) == count else f"of those shown hold: {', '.join(together) or 'none'}"
    )
    return [f"with all {len(shown)} tested at once (Holm, 1979), {held}"]
