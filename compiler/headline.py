"""The report's first sentence: what you got."""

from __future__ import annotations

from .types import Attempt, DeviceProfile, Fidelity, Measurement

_NAMES = {"fp32": "FP32", "int8": "INT8"}
_METRICS = {"top1": "top-1", "agreement": "top-1 agreement with the original", "boxes": "F1 of the boxes"}


def compose(device: DeviceProfile, result: Attempt, original: Measurement) -> str:
    """Return one line on speed, quality and size."""
    parts = [f"{_NAMES.get(result.precision, result.precision)} for {device.title}", _speed(result.measurement, original)]
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
