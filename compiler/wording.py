"""The sentences of a report: warnings and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import job as jobs
from . import recipe, trials
from .report import text
from .settings import not_tried
from .types import Attempt, Measurement

if TYPE_CHECKING:
    from .job import Job


def warnings(job: Job, precision: str) -> tuple[str, ...]:
    """Return what the reader must know before trusting the figures of a result in that precision."""
    found = []
    if job.preprocess is not None and job.preprocess.assumed:
        found.append("preprocessing was not stated; assumed: " + ", ".join(job.preprocess.assumed))
    for images in (job.images, job.judged if job.options.eval else None):
        if images is not None and images.skipped:
            names = ", ".join(r.node for r in images.skipped[:3])
            found.append(f"{len(images.skipped)} unreadable files were skipped: {names}")
        found += list(images.notes) if images is not None else []
    if job.judged is not None and 100 / max(len(job.judged), 1) > job.options.budget.max_drop / 2:
        found.append(
            f"one of the {len(job.judged)} held-out images is {100 / len(job.judged):.1f} points: judge by more"
        )
    if job.judged is None and job.options.budget.max_latency_ms is not None and job.target is None:
        found.append("--max-latency was not checked: nothing is measured for this device here")
    if job.judged is None:
        found.append("quality was not judged: no images")
    return (*found, *(() if precision == "fp32" else _elsewhere(job)))


def _elsewhere(job: Job) -> tuple[str, ...]:
    """Return what was computed here otherwise than the device will."""
    scheme = jobs.quant_scheme(job)
    if scheme is None or job.judged is None:
        return ()
    if scheme.simulated:
        name = text.precision(job.options.precision)
        return (f"{name} was simulated: numbers are rounded as it rounds them, and computed with as FP32",)
    here = f"quality was judged on this machine, not on the {job.profile.title}"
    elsewhere = job.target is None or not job.target.is_here
    return (f"{here}: the device's kernels may round otherwise",) if elsewhere and not job.profile.is_local else ()


def _does(job: Job) -> str:
    return "measures" if job.backend.in_process else "builds the engines and measures them"


def advice(job: Job, attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return what the reader can do next."""
    advice = []
    attempt = next(a for a in attempts if a.chosen)
    tried = [a for a in attempts if a.precision != attempts[0].precision]
    if attempt.precision == attempts[0].precision and tried:
        advice.append(f"{text.precision(tried[0].name)} was tried and not taken: {tried[0].verdict}")
    advice += not_tried(job, [a.precision for a in attempts], [a.size_bytes for a in tried])
    m = attempt.measurement
    if attempt.precision != attempts[0].precision and m.speedup is not None and m.speedup < 1:
        asked, base = text.precision(attempt.precision), text.precision(attempts[0].precision)
        advice.append(f"{asked} was asked for; {base} is {1 / m.speedup:.2f}x faster here (--precision auto takes it)")
    if job.target is None:
        advice.append(f"copy the bundle to the device and run there: {recipe.COMMAND}; it {_does(job)}")
        advice.append("copy it back: edgec bench BUNDLE takes what was measured into the report")
    return tuple(advice)


def beside(measured: Mapping[str, Measurement], result: Measurement) -> tuple[str, ...]:
    """Return what ONNX Runtime's CUDA provider takes for the original, where it was measured beside TensorRT."""
    other = measured.get(trials.IN_CUDA)
    if other is None:
        return ()
    if other.median_ms is None or result.median_ms is None:
        return (f"ONNX Runtime's CUDA provider was not measured: {other.reason}",) if other.reason else ()
    ratio = text.ratio(other.median_ms / result.median_ms)
    took = f"the original in ONNX Runtime's CUDA provider takes {text.ms(other.median_ms)}"
    return (f"{took}, {ratio} the result's time",)
