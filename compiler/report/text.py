"""Numbers as people read them, and the headline; shared by the terminal and the HTML view. ASCII throughout.

Points are percentage points. Intervals are 95 % intervals. A figure that is None is `MISSING`, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ..types import LABELLED, Fidelity, Measurement, OutputFidelity, Pruning, Report

MISSING = "-"

#: What a fidelity figure is called; all are in percent of something.
METRICS: Mapping[str, str] = {
    "top1": "top-1",
    "agreement": "top-1 agreement",
    "boxes": "box agreement (F1)",
    "boxes-labelled": "box F1",
    "metric": "your metric",
    "energy": "signal kept",
}

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4", "w4a8")
_UNITS = ((1e4, 1.0, "B"), (1e7, 1e3, "kB"), (1e10, 1e6, "MB"))
_SI = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def clean(text: str) -> str:
    """Return one printable line: names from a model must neither steer the terminal nor break the page."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def significant(value: float, digits: int = 3) -> str:
    """Return `value` in fixed notation with so many significant digits (0.340, 12.3, 4100)."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(value))))) if value else digits - 1


def column_decimals(values: Iterable[float | None], digits: int = 3) -> int:
    """Return how many decimals give the smallest of the values `digits` significant digits, at most 6."""
    sizes = [abs(v) for v in values if v is not None and math.isfinite(v) and v]
    return _decimals(min(sizes), digits) if sizes else 0


def fixed(value: float | None, decimals: int) -> str:
    """Return `value` with so many decimals."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def signed(value: float | None, decimals: int) -> str:
    """Return a difference with its sign: +1.2, -0.3."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value, decimals) + 0.0:+.{decimals}f}"


def ms(value: float | None) -> str:
    """Return milliseconds with three significant digits and the unit."""
    return "not measured" if value is None else f"{significant(value)} ms"


def seconds(value: float) -> str:
    """Return a duration: 0.02 s, 12.3 s, 3 min 20 s."""
    if value < 99.95:
        return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"
    return f"{round(value) // 60} min {round(value) % 60} s"


def size(count: int) -> str:
    """Return a file size in decimal units: 512 B, 311 kB, 1074 kB, 12.3 MB."""
    return _in_unit(count, _unit(count))


def _unit(count: int) -> tuple[float, str]:
    return next(((unit, name) for limit, unit, name in _UNITS if count < limit), (1e9, "GB"))


def _in_unit(count: int, unit: tuple[float, str]) -> str:
    number = f"{count / unit[0]:.0f}" if unit[0] < 1e6 else significant(count / unit[0])
    return f"{number} {unit[1]}"


def si(count: int | None) -> str:
    """Return a large count with three digits and an SI prefix: 442 k, 2.36 M."""
    if count is None:
        return MISSING
    return next((f"{significant(count / f)} {name}" for f, name in _SI if count >= f), str(count))


def percent(value: float | None) -> str:
    """Return a figure in percent with at most two decimals: 98.2 %, 81.35 %."""
    return MISSING if value is None or not math.isfinite(value) else f"{_short(value)} %"


def points(value: float | None) -> str:
    """Return percentage points with at most two decimals: 1.8 points."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{_short(value)} point{'' if value == 1 else 's'}"


def _short(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")  # + 0.0 makes -0.0 a plain zero


def ratio(value: float | None) -> str:
    """Return a speed ratio: 1.85x."""
    return MISSING if value is None else f"{value:.2f}x"


def interval(low: float | None, high: float | None, decimals: int) -> str:
    """Return both ends of an interval, or nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"{fixed(low, decimals)} {'to' if low < 0 else '-'} {fixed(high, decimals)}"


def count(number: int, noun: str) -> str:
    """Return a count with its noun: 1 image, 1,200 images, 2 passes."""
    plural = "es" if noun.endswith(("s", "x")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def precision(name: str) -> str:
    """Return a precision as it is written in prose: INT8, FP32; other names are left as they are."""
    return name.upper() if name.lower() in _PRECISIONS else clean(name)


def sqnr(output: OutputFidelity) -> str:
    """Return an output's SQNR in dB; no error at all has none to state."""
    if output.sqnr_db is None:
        return "no error" if output.cosine is not None else MISSING
    return fixed(output.sqnr_db, 1)


def why(missing: Measurement | Fidelity) -> str:
    """Return the reason why a figure is missing."""
    return clean(missing.reason or "no reason was recorded")


def decibels(value: float | None) -> str:
    """Return decibels with one decimal and the unit."""
    return "not judged" if value is None else f"{fixed(value, 1)} dB"


# --------------------------------------------------------------------------------------------- the headline


def headline(report: Report) -> str:
    """Return in one sentence what the user got: speed, quality, size."""
    device = "this machine" if report.device.is_local else report.device.title
    if report.device.is_local and report.device.kind in ("cpu", "gpu"):
        device = f"this {report.device.kind.upper()}"
    clauses = [_speed(report), quality(report.fidelity), _pruned(report), _factorized(report), f"file {sizes(report)}"]
    made = f"{'pruned ' if is_pruned(report) else ''}{'low-rank ' if is_factorized(report) else ''}"
    what = f"{made}{precision(report.precision)} for {clean(device)}"
    return f"{what[0].upper()}{what[1:]}: {', '.join(c for c in clauses if c)}"


def sizes(report: Report) -> str:
    """Return the file's size before and after, both in the unit of the larger one."""
    before, after = report.size_before_bytes, report.size_after_bytes
    unit = _unit(max(before, after))
    return f"{_in_unit(before, unit)} -> {_in_unit(after, unit)}"


def baseline_name(report: Report) -> str:
    """Return what the result is compared with: FP32, or FP16 where that is the device's baseline."""
    return precision(report.baseline.name) if report.baseline.name.lower() in _PRECISIONS else "FP32"


def is_baseline(report: Report) -> bool:
    """Tell whether the result is the baseline itself, measured once: nothing lossy was kept."""
    result, base = report.result, report.baseline
    return result.speedup is None and result.median_ms == base.median_ms and result.reason == base.reason


def speedup(report: Report) -> float | None:
    """Return how much faster the result is than the baseline, measured; None where either is missing."""
    result, base = report.result, report.baseline
    if result.speedup is not None or result.median_ms is None or base.median_ms is None:
        return result.speedup
    return base.median_ms / result.median_ms


def _speed(report: Report) -> str:
    result, base, gain = report.result, report.baseline, speedup(report)
    if result.median_ms is None:
        return f"latency not measured ({why(result)})"
    if is_baseline(report):
        return f"{ms(result.median_ms)} a call (original: {ms(report.original.median_ms)})"
    if gain is None:
        return f"{ms(result.median_ms)} a call ({baseline_name(report)} not measured: {why(base)})"
    low, high = result.speedup_low, result.speedup_high
    if low is not None and high is not None and gain < 1:
        low, high = 1 / high, 1 / low
    between = "" if low is None or high is None else f", 95 % interval {low:.2f}-{high:.2f}"
    detail = f"({ms(result.median_ms)} against {ms(base.median_ms)}{between})"
    return f"{comparison(gain, result.speedup_low, result.speedup_high)} {baseline_name(report)} {detail}"


def comparison(gain: float, low: float | None, high: float | None) -> str:
    """Return "1.85x faster than", "1.30x slower than", or "as fast as" where the interval holds 1."""
    if (low or gain) <= 1 <= (high or gain) or f"{gain:.2f}" == "1.00":
        return "as fast as"
    return f"{gain:.2f}x faster than" if gain > 1 else f"{1 / gain:.2f}x slower than"


def quality(fidelity: Fidelity | None) -> str:
    """Return the fidelity figure as a clause; empty where no images were there to judge on."""
    if fidelity is None:
        return ""
    if fidelity.value is None:
        return f"quality not judged ({why(fidelity)})"
    if fidelity.metric in LABELLED:
        return f"{METRICS[fidelity.metric]} {percent(fidelity.value)} (original {percent(fidelity.reference)})"
    if fidelity.metric == "energy":
        return f"error energy {percent(fidelity.drop)} of the signal's"
    return f"{METRICS.get(fidelity.metric, clean(fidelity.metric))} {percent(fidelity.value)}"


# --------------------------------------------------------------------------------------------- what was cut


def is_pruned(report: Report) -> bool:
    """Tell whether what is handed over has channels cut: the cut network itself, or what was made of it."""
    p, chosen = report.pruning, next((a for a in report.attempts if a.chosen), None)
    if p is None or not p.kept or chosen is None:
        return False
    return chosen.precision != "fp32" or chosen.name.startswith(p.candidate or "")


def is_factorized(report: Report) -> bool:
    """Tell whether what is handed over has chains in place of layers."""
    found, chosen = report.low_rank, next((a for a in report.attempts if a.chosen), None)
    if found is None or not found.kept or chosen is None:
        return False
    return chosen.precision != "fp32" or chosen.name == found.candidate


def cut_sizes(p: Pruning) -> dict[str, tuple[int, int]]:
    """Return MACs and parameters before and after the cut, by these names; not what is unknown, or is none."""
    macs = [(x.macs, x.macs_left) for x in p.layers]
    pairs = {
        "MACs": (_total(before for before, _ in macs), _total(after for _, after in macs)),
        "parameters": (p.parameters_before, p.parameters_after),
    }
    return {name: (before, after) for name, (before, after) in pairs.items() if before and after is not None}


def _total(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def cut(before: int, after: int) -> str:
    """Return how much is gone, in percent without the sign; what is cut is not rounded to 0 nor to 100."""
    gone = 100 * (1 - after / before)
    return f"{gone:.1f}" if 0 < gone < 1 or 99 < gone < 100 else f"{gone:.0f}"


def _factorized(report: Report) -> str:
    """Return as a clause how many parameters chains save; empty where what is handed over has none."""
    found = report.low_rank
    if found is None or not is_factorized(report) or not found.parameters_before or not found.parameters_after:
        return ""
    return f"{cut(found.parameters_before, found.parameters_after)} % fewer parameters"


def _pruned(report: Report) -> str:
    """Return as a clause how much of the network was cut; empty where what is handed over is whole."""
    p = report.pruning
    if p is None or not is_pruned(report):
        return ""
    sizes = (f"{cut(before, after)} % of the {name} cut" for name, (before, after) in cut_sizes(p).items())
    return next(sizes, "channels cut")
