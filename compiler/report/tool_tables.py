"""The tables of bench, inspect, devices and doctor, as data; see tables.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from . import text
from .tables import Table, columns, timings

if TYPE_CHECKING:
    from ..types import DeviceProfile, Fact, Measurement


class Finding(Protocol):
    """What `doctor` found out about one part of the machine."""

    @property
    def name(self) -> str:
        """What was looked at."""

    @property
    def status(self) -> str:
        """How it is, in a word."""

    @property
    def detail(self) -> str:
        """What was found."""

    @property
    def fix(self) -> str | None:
        """What to do about it."""


class OperatorTime(Protocol):
    """The time that one kind of operator takes in one call."""

    @property
    def op(self) -> str:
        """The operator's type."""

    @property
    def calls(self) -> int:
        """How many nodes of it run in one call."""

    @property
    def ms(self) -> float:
        """Their time together, in milliseconds for one call."""


def measurements(found: Sequence[Measurement]) -> Table:
    """What `bench` measured; the last one is what the others are compared with."""
    last = found[-1].median_ms if found else None
    table = timings(
        "Latency of one call",
        [(m.name, _against(m, last)) for m in found[:-1]] + [(m.name, m) for m in found[-1:]],
    )
    against = (f"speed-up is against {text.clean(found[-1].name)}",) if len(found) > 1 and last else ()
    return replace(table, notes=(*table.notes, *against))


def operators(found: Iterable[OperatorTime]) -> Table:
    """Where the time of a call goes, the slowest kind of operator first."""
    ranked = sorted(found, key=lambda t: -t.ms)
    total = sum(t.ms for t in ranked)
    places = text.column_decimals([total])
    rows = (
        (
            text.clean(t.op),
            str(t.calls),
            text.fixed(t.ms, places),
            text.fixed(100 * t.ms / total, 1) if total else "",
        )
        for t in ranked
    )
    titles = columns("operator", "#nodes", "#ms", "#share %")
    return Table(
        "Time of one call by operator",
        titles,
        tuple(rows),
        ("taken with the profiler on, which costs time itself",),
    )


def _against(m: Measurement, last: float | None) -> Measurement:
    """Fill in the plain ratio of the medians where the target gave no paired one."""
    if m.speedup is not None or m.median_ms is None or last is None:
        return m
    return replace(m, speedup=last / m.median_ms)


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
    ("integer_layers", "layers on integers", str),
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
    titles = columns("name", "device", "kind", "#memory GiB", "backends")
    rows = (
        (
            text.clean(p.name),
            text.clean(p.title),
            p.kind,
            text.MISSING if p.memory_gib is None else f"{p.memory_gib.value:g}",
            text.clean(", ".join(p.backends)),
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
        f"{text.clean(profile.title)} ({text.clean(profile.name)})",
        columns("", "#value", "unit", "source"),
        tuple(rows),
        notes,
    )


def _source(fact: Fact) -> str:
    source = text.clean(fact.source) if fact.source else ""
    return f"unverified{f': {source}' if source else ''}" if fact.unverified or not source else source


def findings(found: Iterable[Finding]) -> Table:
    """What `doctor` looked at, with how to mend what is amiss."""
    rows = ((text.clean(f.name), text.clean(f.status), _remedy(f)) for f in found)
    return Table("", columns("", "status", "found"), tuple(rows))


def _remedy(finding: Finding) -> str:
    return text.clean(finding.detail) + (f"\nfix: {text.clean(finding.fix)}" if finding.fix else "")
