"""The sentences of a report: warnings and advice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .types import Attempt

if TYPE_CHECKING:
    from .job import Job

_NO_CALIBRATION = (
    "without calibration images only exact passes ran; --calib FOLDER with a few hundred images allows INT8"
)


def warnings(job: Job) -> tuple[str, ...]:
    """Return what the reader must know before trusting the figures."""
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
    return tuple(found)


def advice(job: Job, attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return what the reader can do next."""
    advice = []
    attempt = next(a for a in attempts if a.chosen)
    if attempt.precision == "fp32" and len(attempts) > 1:
        advice.append(f"INT8 was tried and not taken: {attempts[1].verdict}")
    scheme = job.backend.schemes(job.profile)["int8"]
    if isinstance(scheme, str):
        advice.append(scheme)
    elif job.images is None and job.options.ranges is None and job.options.precision == "auto":
        advice.append(_NO_CALIBRATION)
    m = attempt.measurement
    if attempt.precision != "fp32" and m.speedup is not None and m.speedup < 1:
        advice.append(
            f"{attempt.precision} was asked for; FP32 is {1 / m.speedup:.2f}x faster here (--precision auto takes it)"
        )
    if job.target is None:
        advice.append(f"on the device: edgec bench BUNDLE measures it there ({job.not_measured})")
    return tuple(advice)
