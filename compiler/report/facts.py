"""What is no table: labelled lines on a report, an ONNX file, a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import text
from .layer_tables import floats, in_integers

if TYPE_CHECKING:
    from ..types import DeviceProfile, Inspection, Report

Facts = tuple[tuple[str, str], ...]


def _lines(pairs: Mapping[str, str]) -> Facts:
    return tuple((label, text.clean(line)) for label, line in pairs.items() if line)


def layers(report: Report) -> Facts:
    """How much of the model runs on integers, where not all of it does."""
    return _lines({"layers": in_integers(report.layers) if floats(report) else ""})


def of_report(report: Report) -> Facts:
    """Labelled lines: how it was calibrated, for which device, with what."""
    pairs = {
        "calibration": _calibration(report),
        "preprocessing": _preprocessing(report),
        "device": f"{report.device.title} ({report.device.name})",
        "backend": report.backend + ("" if report.target == "none" else f", measured on {report.target}"),
        "machine": "" if report.machine == report.device.title else report.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "compiled": f"in {text.seconds(report.seconds)}, seed {report.seed}",
    }
    return _lines(pairs)


def _calibration(report: Report, named: int = 3) -> str:
    c = report.calibration
    if c is None:
        return ""
    speed = "" if c.images_per_second is None else f", {c.images_per_second:,.0f} images/s"
    how = ", from the cache" if c.cached else speed
    line = f"{text.count(c.images, 'image')}, {c.held_out:,} held out, {c.method}{how}{_degraded(c.degrade)}"
    if not c.skipped:
        return line
    names = "; ".join(f"{r.node} ({r.why})" for r in c.skipped[:named])
    rest = f"; and {len(c.skipped) - named:,} more" if len(c.skipped) > named else ""
    return f"{line}; {text.count(len(c.skipped), 'file')} skipped: {names}{rest}"


def _degraded(degrade: str) -> str:
    """Say what the images were changed by; nothing for clean ones."""
    kind, _, fraction = degrade.partition(":")
    if kind == "clean":
        return ""
    if kind == "minimax":
        return "; ranges for all of QRID's conditions (minimax), biases, weights and steps on their mixture"
    if kind == "mixed":
        return f"; {100 * float(fraction):.3g} % of the images degraded (mixed)"
    return f"; each image under {'one of ' if ',' in kind else ''}{kind.replace(',', ', ')}"


def _preprocessing(report: Report) -> str:
    p = report.preprocess
    if p is None:
        return ""
    mean, std = " ".join(f"{v:g}" for v in p.mean), " ".join(f"{v:g}" for v in p.std)
    at = f"{p.size[0]}x{p.size[1]} " if p.size else ""
    scaled = f"pixel / {1 / p.scale:g}" if p.scale and round(1 / p.scale, 6).is_integer() else f"pixel x {p.scale:g}"
    return f"{at}{p.resize}, {p.color}, {p.layout}, ({scaled} - mean {mean}) / std {std}"


def of_inspection(found: Inspection) -> Facts:
    """Labelled lines: an ONNX file at a glance."""
    pairs = {
        "size": text.size(found.size_bytes),
        "format": f"IR version {found.ir_version}, opset {found.opset}",
        "inputs": "; ".join(f"{i.name} {i.dtype} [{_shape(i.shape)}]" for i in found.inputs),
        "outputs": ", ".join(found.outputs),
        "parameters": text.si(found.parameters),
        "MACs": "unknown: a shape is not known" if found.macs is None else f"{text.si(found.macs)} an image",
        "operators": ", ".join(f"{count} {op}" for op, count in found.operators.items()),
    }
    return _lines(pairs)


def _shape(shape: Sequence[int | None]) -> str:
    return ", ".join("?" if d is None else str(d) for d in shape)


def of_device(profile: DeviceProfile) -> Facts:
    """Labelled lines: what of a device is no number."""
    pairs = {
        "vendor": profile.vendor,
        "kind": profile.kind,
        "architecture": profile.arch,
        "features": ", ".join(profile.features),
        "compute capability": "" if profile.sm is None else f"{profile.sm:g}",
        "cores": "" if profile.cores is None else str(profile.cores),
        "data types": ", ".join(profile.dtypes),
        "backends": ", ".join(profile.backends),
        "toolchain": ", ".join(f"{name} {version}" for name, version in profile.toolchain.items()),
        "channel multiple": str(profile.channel_multiple),
        "DLA cores": str(profile.dla or ""),
        "power modes": ", ".join(profile.power_modes),
        "default target": profile.default_target or "",
    }
    return _lines(pairs)
