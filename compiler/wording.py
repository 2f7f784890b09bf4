"""The sentences of a report: the headline, the warnings, the advice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .types import Attempt, DeviceProfile, Fidelity, Measurement

if TYPE_CHECKING:
    from .job import Job

_NAMES = {"fp32": "FP32", "int8": "INT8"}
_NO_CALIBRATION = (
    "without calibration images only exact passes ran; --calib FOLDER with a few hundred images allows INT8"
)
_METRICS = {"top1": "top-1", "agreement": "top-1 agreement with the original", "boxes": "F1 of the boxes"}


def headline(device: DeviceProfile, result: Attempt, original: Measurement) -> str:
    """Return one line on speed, quality and size."""
    parts = [
        f"{_NAMES.get(result.precision, result.precision)} for {device.title}",
        _speed(result.measurement, original),
    ]
    if result.fidelity is not None:
        parts.append(_quality(result.fidelity))
    return ": ".join([parts[0], ", ".join(p for p in parts[1:] if p)])


def _speed(m: Measurement, original: Measurement) -> str:
    if m.median_ms is None:
        return "latency not measured"
    if m.speedup is not None:
        word = "faster" if m.speedup >= 1 else "the speed, slower"
        return f"{m.speedup:.2f}x {word} than FP32 ({m.median_ms:.3g} ms)"
    if original.median_ms is not None:
        return f"{m.median_ms:.3g} ms, {original.median_ms / m.median_ms:.2f}x the speed of the file as given"
    return f"{m.median_ms:.3g} ms"


def _quality(f: Fidelity) -> str:
    if f.value is None:
        return "quality not judged"
    if f.metric == "top1" and f.reference is not None:
        return f"top-1 {f.value:.2f} % (original {f.reference:.2f} %)"
    if f.metric == "energy":
        return f"output error {f.drop:.3g} % of the signal"
    return f"{_METRICS.get(f.metric, f.metric)} {f.value:.2f} %"


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
    if job.judged is None:
        found.append("quality was not judged: no images")
    return tuple(found)


def advice(job: Job, attempt: Attempt) -> tuple[str, ...]:
    """Return what the reader can do next."""
    advice = []
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
