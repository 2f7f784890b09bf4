"""The tables of bench, inspect, devices and doctor, as data; see tables.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import text
from .grid import Table, columns
from .tables import timings

if TYPE_CHECKING:
    from ...backends.ort import OperatorTime
    from ..findings import Finding
    from ..types import DeviceProfile, Fact, Measurement


def measurements(found: Sequence[Measurement]) -> Table:
    """What `bench` measured; the last one is what the others are compared with."""
    last = found[-1].median_ms if found else None
    compared = [*(_with_speedup(m, last) for m in found[:-1]), *found[-1:]]
    table = timings("Latency of one call, ms", [(m.name, m) for m in compared])
    against = (f"speed-up is against {text.clean(found[-1].name)}",) if len(found) > 1 and last else ()
    return replace(table, notes=(*table.notes, *against))


def _with_speedup(m: Measurement, last: float | None) -> Measurement:
    """Fill in the plain ratio of the medians where no paired one was taken."""
    if m.speedup is not None or m.median_ms is None or last is None:
        return m
    return replace(m, speedup=last / m.median_ms)


def operators(found: Sequence[OperatorTime]) -> Table:
    """Where the time of a call goes, the slowest kind of operator first."""
    places = text.column_decimals(t.milliseconds for t in found)
    rows = (
        (text.clean(t.op), str(t.nodes), text.fixed(t.milliseconds, min(places, 4)), text.fixed(100 * t.share, 1))
        for t in found
    )
    titles = columns("operator", "#nodes", "#ms", "#share %")
    profiled = "taken with the profiler on, which costs time itself: compare the shares"
    return Table("Time of one call by operator", titles, tuple(rows), (profiled,))


# ------------------------------------------------------------------------------------------ inspect


#: Key of `serial.summary`, heading, and how its value is written.
_COMPARED: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("precision", "precision", text.precision),
    ("device", "device", text.clean),
    ("latency_ms", "median latency", text.ms),
    ("speedup", "speed-up over the baseline", text.ratio),
    ("quality_drop", "quality lost", text.points),
    ("size_bytes", "file size", text.size),
    ("opset", "opset", str),
    ("nodes", "nodes", "{:,}".format),
    ("parameters", "parameters", text.si),
    ("macs", "MACs an image", text.si),
    ("layers", "layers", str),
    ("integer_layers", "layers of few bits", str),
)


def comparison(summaries: Sequence[Mapping[str, object]]) -> Table:
    """Several reports or ONNX files side by side; what one of them does not say is left open."""
    known = [row for row in _COMPARED if any(s.get(row[0]) is not None for s in summaries)]
    rows = (
        (heading, *(text.MISSING if s.get(key) is None else write(s[key]) for s in summaries))
        for key, heading, write in known
    )
    titles = columns("", *("#" + text.clean(str(s["name"])) for s in summaries))
    return Table("Side by side", titles, tuple(rows))


# ------------------------------------------------------------------------------------------ devices, doctor


def devices(profiles: Iterable[DeviceProfile]) -> Table:
    """One row a device that edgec knows."""
    titles = columns("name", "device", "#memory", "backend")
    rows = (
        (
            text.clean(p.name),
            text.clean(p.title),
            text.MISSING if p.memory_gib is None else f"{p.memory_gib.value:g} GiB",
            text.clean(p.backends[0] if p.backends else text.MISSING),
        )
        for p in profiles
    )
    return Table("Devices", titles, tuple(rows))


def device(profile: DeviceProfile) -> Table:
    """The numbers of one device, each with its source."""
    numbers: Mapping[str, tuple[Fact | None, str]] = {
        "memory": (profile.memory_gib, "GiB"),
        "bandwidth": (profile.bandwidth_gb_s, "GB/s"),
        **{f"peak {dtype}": (fact, "GFLOP/s") for dtype, fact in profile.peak_gflops.items()},
    }
    rows = (
        (text.clean(name), f"{fact.value:,.10g}", unit, _source(fact))
        for name, (fact, unit) in numbers.items()
        if fact is not None
    )
    notes = (text.clean(profile.note),) if profile.note else ()
    return Table(
        "Numbers and their sources",
        columns("", "#value", "unit", "source"),
        tuple(rows),
        notes,
    )


def _source(fact: Fact) -> str:
    source = text.clean(fact.source) if fact.source else ""
    return f"unverified{f': {source}' if source else ''}" if fact.unverified or not source else source


def findings(found: Iterable[Finding], title: str = "This machine") -> Table:
    """What `doctor` looked at, with how to mend what is amiss."""
    rows = ((text.clean(f.name), text.clean(f.status), _remedy(f)) for f in found)
    return Table(title, columns("", "status", "found"), tuple(rows))


def _remedy(finding: Finding) -> str:
    return text.clean(finding.detail) + (f"\nfix: {text.clean(finding.fix)}" if finding.fix else "")
