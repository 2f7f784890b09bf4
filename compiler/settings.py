"""What `auto` tries beside float32, and when each is worth a try: one table.

A setting is tried where the backend has it for the device, and its own objection says nothing. What is not tried has a
line in the report (`not_tried`). Not in the table, because no device of today's gains by them what auto looks for:
weights of 4 bits beside floats (no faster than float32 on CPUs; TensorRT packs them for large language models), and FP8
(further from float32 than INT8 behind smoothing on every network tried: docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job

_NO_CALIBRATION = (
    "without calibration images only exact passes ran; --calib FOLDER with a few hundred images allows fewer bits"
)


@dataclass(frozen=True)
class Setting:
    """A precision, and what speaks against trying it: the job, and the bytes of what has been built (None: nothing)."""

    precision: str
    objection: Callable[[Job, Sequence[int]], str | None]


def _calibrated(job: Job, sizes: Sequence[int]) -> str | None:
    return _NO_CALIBRATION if job.images is None and job.options.ranges is None else None


def _judged(job: Job, sizes: Sequence[int]) -> str | None:
    return "FP16 was not tried: without images its quality cannot be judged" if job.judged is None else None


def _too_large(job: Job, sizes: Sequence[int]) -> str | None:
    """4-bit weights run as fast as 8-bit ones and err more: only a size that the latter miss makes them worth it."""
    most = job.options.budget.max_size_bytes
    if job.images is None or "mixed-precision" in job.options.without:
        return "W4A8 was not tried: it needs calibration images and the step mixed-precision"
    if most is None:
        return "W4A8 was not tried: it is no faster than INT8 here, only smaller, and no --max-size is stated"
    return "W4A8 was not tried: INT8 fits --max-size" if any(size <= most for size in sizes) else None


#: In the order in which they are tried.
SETTINGS: tuple[Setting, ...] = (
    Setting("int8", _calibrated),  # and its mixtures with floats
    Setting("w4a8", _too_large),  # and its mixtures with int8 and floats
    Setting("fp16", _judged),  # where the device computes in it: an x86 CPU converts to float32 and back
)


def objection(job: Job, precision: str, sizes: Sequence[int] = ()) -> str | None:
    """Return why `auto` does not try this precision, having built files of these sizes; None where it does.

    Always a sentence where something else was named.
    """
    if job.options.precision != "auto":
        return f"{job.options.precision} was asked for"
    found = job.backend.schemes(job.profile)[precision]
    if isinstance(found, str):
        return f"{precision.upper()} was not tried: {found}"
    setting = next(s for s in SETTINGS if s.precision == precision)
    return setting.objection(job, sizes)


def not_tried(job: Job, tried: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Return a line for each setting that `auto` did not try, with the reason; nothing where a precision was named."""
    if job.options.precision != "auto":
        return []
    reasons = [objection(job, s.precision, sizes) for s in SETTINGS if s.precision not in tried]
    lines = [why for why in reasons if why is not None]
    return lines[:1] if lines[:1] == [_NO_CALIBRATION] else lines
