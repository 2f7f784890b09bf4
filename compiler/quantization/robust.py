"""`compile --robust`: calibrate in several ways, and keep another than the clean one only if the evidence supports it.

Each way (conditions.py) goes through all of search.py. The quantized models then see the held-out images, which no
search has seen, under each of QRID's conditions k: the same images for all ways, each decoded once. Of way w,

    e_wk,i = 10 log10( sum (y - z)^2 / sum y^2 )     error of image i's worst output beside FP32's, in dB (per_image.py)
    E_wk   = mean over i of e_wk,i                   W_w = max over k of E_wk, the worst condition

decides: the figure of the task (top-1, agreement, boxes) changes on too few images to tell such models apart. With
clean calibration c, way w is admitted if

    W_w - W_c              is LEAST_DB below 0 at least, and shown to be (robustness.py), all ways tested together
    E_w,clean - E_c,clean  has an interval that ends below TOLERANCE_DB
    points of the task     are not shown to be lost to c, on clean images or under w's worst condition

and of those admitted the one with the least W_w is kept; clean calibration is, where none is.

What this shows is that one quantized model is better than another, which is all that is to be chosen here. It does not
show that a way of calibrating is better: another seed gives other models, which differ as consistently from these. That
question takes several seeds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ...backends.ort import Session
from ...calib import degrade
from ...calib.folder import together
from .. import fidelity, job, robustness
from .. import model as model_io
from ..per_image import PerImage, interval, resampled
from ..types import Difference, Progress, QuantScheme, RobustChoice, RobustWay
from .conditions import CLEAN
from .search import Found, search

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..fidelity import Comparison
    from ..job import Job
    from ..proof import Prover

#: What is said of a way that is not shown to be better.
NO_BENEFIT = "no benefit shown"
#: The ways, as `--degrade` takes them; clean calibration is the first, and what the others are compared with.
WAYS = (CLEAN, "mixed", "minimax")
#: What clean images may lose. Under minimax a range may cost a tensor on clean images 0.4 dB (calib/minimax.py).
TOLERANCE_DB = 0.5
#: A gain below this is none worth having: a fiftieth of the error.
LEAST_DB = 0.1
#: On fewer images nothing is shown; more add nothing but time.
LEAST_IMAGES, MOST_IMAGES = 16, 1000
#: Images that run at a time.
_BATCH = 8


@dataclass(frozen=True, eq=False)
class Kept:
    """The way that was kept: what its search came to, the job that calibrates so, and why."""

    found: Found
    this: Job
    choice: RobustChoice


def search_robustly(this: Job, model: ir.Model, scheme: QuantScheme, prover: Prover) -> Kept:
    """Run search for each way, compare what they came to, and keep one. There must be images."""
    assert this.images is not None
    ways: dict[str, Job] = {}
    found: dict[str, Found] = {}
    longest = 0.0
    for number, way in enumerate(WAYS, 1):
        left = this.seconds_left
        if found and left is not None and left < longest:
            continue
        start = time.monotonic()
        ways[way] = job.calibrated(this, way)
        named = replace(ways[way], progress=_named(this.progress, f"{number}/{len(WAYS)} {way}"))
        found[way] = search(named, model, scheme, prover)
        longest = max(longest, time.monotonic() - start)
    choice = _choice(this, found)
    return Kept(found[choice.kept], ways[choice.kept], choice)


def _named(progress: Progress, way: str) -> Progress:
    return lambda what, done, total: progress(f"{way}: {what}", done, total)


def _choice(this: Job, found: Mapping[str, Found]) -> RobustChoice:
    assert this.judged is not None
    count, late = min(len(this.judged), MOST_IMAGES), tuple(way for way in WAYS if way not in found)
    if len(found) == 1:
        return _uncompared("the time budget left no time for another", late)
    if count < LEAST_IMAGES:
        return _uncompared(f"{count} held-out images are too few to show anything", late)
    seen = _compare(this, {way: one.quantizer.build().model for way, one in found.items()}, count)
    if not seen.candidates[CLEAN][CLEAN].energies:
        return _uncompared("the model has no float output to compare", late)
    return replace(choose(seen, this.options.seed), not_tried=late)


def _uncompared(why: str, late: tuple[str, ...]) -> RobustChoice:
    return RobustChoice(CLEAN, f"clean calibration was kept: {why}", TOLERANCE_DB, not_tried=late)


def _compare(this: Job, models: Mapping[str, ir.Model], count: int) -> Comparison:
    """Run all models over the held-out images under every condition."""
    assert this.judged is not None
    images = this.judged.subset(i * len(this.judged) // count for i in range(count))
    scheme = job.quant_scheme(this)
    fused = scheme is None or not scheme.simulated
    with TemporaryDirectory() as folder:
        sources = {way: model_io.session_source(model, Path(folder)) for way, model in models.items()}
        return fidelity.compare_together(
            Session(this.path, threads=this.threads, optimise=False),
            {way: Session(source, threads=this.threads, fuse_quantized=fused) for way, source in sources.items()},
            together(degrade.under(images, degrade.QRID, this.options.seed), _BATCH),
            images=count,
            metric=this.metric,
            labelled=this.options.eval is not None,
            progress=this.progress,
        )


# --------------------------------------------------------------------------------------------- choosing


def choose(seen: Comparison, seed: int) -> RobustChoice:
    """Return which of the ways is kept, by the algebra above; the first candidate is clean calibration."""
    names = list(next(iter(seen.candidates.values())))
    ways = [_way(seen, name, names[0], seed) for name in names]
    worst_errors = {way.calibration: way.worst_error for way in ways if way.worst_error is not None}
    together = robustness.hold_together(worst_errors)
    objections = {way.calibration: _objection(way, together) for way in ways[1:]}
    admitted = [way for way in ways[1:] if objections[way.calibration] is None]
    best = max(admitted, key=_worst_db, default=ways[0])
    judged = [
        replace(way, kept=way is best, verdict=_verdict(way, best, objections.get(way.calibration))) for way in ways
    ]
    return RobustChoice(best.calibration, _why(judged), TOLERANCE_DB, tuple(judged))


def _way(seen: Comparison, name: str, base: str, seed: int) -> RobustWay:
    """Return a way beside the FP32 original and beside the way `base`; not yet judged."""
    ours, theirs = ({k: by_way[way] for k, by_way in seen.candidates.items()} for way in (name, base))
    errors, base_errors = ({k: _error_alone(one) for k, one in each.items()} for each in (ours, theirs))
    sqnr = {k: -float(one.error_db.mean()) for k, one in errors.items()}
    bare = RobustWay(name, False, "", min(sqnr, key=lambda k: sqnr[k]), sqnr, robustness.judge(seen, name, seed=seed))
    if name == base:
        return bare
    scored = {k: one for k, one in ours.items() if one.metric != "energy"}
    return replace(
        bare,
        errors={k: robustness.paired(one, base_errors[k], seed=seed) for k, one in errors.items()},
        losses={k: robustness.paired(one, theirs[k], seed=seed) for k, one in scored.items()},
        worst_error=_worst(list(errors.values()), list(base_errors.values()), seed),
    )


def _error_alone(one: PerImage) -> PerImage:
    """Return it as judged by the error of its outputs in dB, whatever else its task is judged by."""
    return PerImage("energy", one.energies)


def _worst(ours: Sequence[PerImage], theirs: Sequence[PerImage], seed: int) -> Difference:
    """Return W_w - W_c: each side's worst condition is looked for anew in each of the bootstrap's draws."""
    columns = np.stack([[one.error_db for one in side] for side in (ours, theirs)]).transpose(2, 0, 1)  # (n, 2, K)

    def figure(sums: np.ndarray) -> np.ndarray:
        """Map sums (..., 2, K) to the difference (...)."""
        worst = sums.max(axis=-1) / len(columns)
        difference: np.ndarray = worst[..., 0] - worst[..., 1]
        return difference

    draws = figure(resampled(columns, seed))
    low, high = interval(draws)
    differing = int((columns[:, 0] != columns[:, 1]).any(axis=-1).sum())
    return Difference(
        value=float(figure(columns.sum(axis=0))),
        low=low,
        high=high,
        unit="dB",
        error=float(draws.std(ddof=1)),
        images=len(columns),
        differing=differing,
        verdict=robustness.verdict(low, high, differing),
    )


def _worst_db(way: RobustWay) -> float:
    return way.sqnr_db[way.worst]


def _objection(way: RobustWay, together: Sequence[str]) -> str | None:
    """Return what speaks against a way; None where nothing does."""
    worst, clean = way.worst_error, way.errors[CLEAN]
    assert worst is not None
    if worst.verdict == "worse":
        return "worse under its worst condition"
    if worst.verdict == robustness.NOT_SHOWN or way.calibration not in together:
        return NO_BENEFIT
    if worst.value > -LEAST_DB:
        return f"better by less than {LEAST_DB:g} dB under its worst condition"
    if clean.high > TOLERANCE_DB:
        return f"clean images may err by {clean.high:.2f} dB more, beyond {TOLERANCE_DB:g}"
    for condition in (CLEAN, way.worst):
        loss = way.losses.get(condition)
        if loss is not None and loss.verdict == "worse":
            return f"loses {loss.value:.2f} points under {condition}"
    return None


def _verdict(way: RobustWay, best: RobustWay, objection: str | None) -> str:
    if way is best:
        return (
            "better under its worst condition, clean images not hurt" if way.errors else "nothing is shown to be better"
        )
    return objection or f"{best.calibration} is better under its worst condition"


def _why(ways: Sequence[RobustWay]) -> str:
    """Return the sentence for the reader."""
    base, kept = ways[0], next(way for way in ways if way.kept)
    if kept is not base:
        return (
            f"{kept.calibration} calibration was kept: under its worst condition ({kept.worst}) its outputs are "
            f"{_worst_db(kept):.1f} dB from FP32's, those of clean calibration under its own ({base.worst}) "
            f"{_worst_db(base):.1f} dB; on clean images its error changes by {kept.errors[CLEAN].value:+.2f} dB"
        )
    names = " or ".join(way.calibration for way in ways[1:])
    if all(way.verdict == NO_BENEFIT for way in ways[1:]):
        return f"clean calibration was kept: no benefit of {names} was shown"
    return "clean calibration was kept; " + "; ".join(f"{way.calibration}: {way.verdict}" for way in ways[1:])
