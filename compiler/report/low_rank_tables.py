"""What `compile --low-rank` came to, as tables: sizes, quality, and each layer beside its chain, with both times."""

from __future__ import annotations

from ..types import LowRank, LowRankLayer, Report
from . import race_tables, text
from .grid import Table, columns

#: What the forms are called, and what they are (passes/factorize.py).
_FORMS = {
    "svd": ("SVD", "the layer itself to the rank, then 1x1"),
    "channels": ("channels", "1x1 to the rank, then the kernel"),
    "spatial": ("spatial", "K x 1 to the rank, then 1 x K"),
    "tucker": ("Tucker-2", "1x1, the kernel, 1x1; ranks of outputs x inputs"),
    "cp": ("CP", "1x1, depthwise K x 1 and 1 x K, 1x1"),
}


def tables(report: Report, limit: int | None = None) -> tuple[Table, ...]:
    """Return what became of the layers: all, or the `limit` that save most; nothing if not asked."""
    found = report.low_rank
    if found is None:
        return ()
    title = f"Low rank, asked for: {text.clean(found.asked)}"
    said = [text.clean(note) for note in (found.why, *found.notes)]
    raced = race_tables.tried("choice of ranks", "Choices of ranks", found.tried)
    if not found.kept:
        return Table(title, (), (), tuple(said)), *raced, *([layers(found, limit)] if _timed(found) else [])
    said += _measured(report, found)
    sizes = Table(title, columns("", "#before", "#after", "#saved %"), _sizes(found), tuple(said))
    return sizes, *raced, layers(found, limit)


def layers(found: LowRank, limit: int | None = None) -> Table:
    """Each layer beside its chain, in the graph's order; of one that stayed, the time of a chain that it could be."""
    largest = sorted(found.layers, key=lambda x: x.parameters_left - x.parameters)[:limit]
    shown = [x for x in found.layers if x in largest]
    timed = _timed(found)
    titles = ["layer", "became", "#rank", "#parameters", "#MACs cut %"]
    titles += ["#predicted ms", "#chain ms"] if timed else []
    rows = tuple(_row(x, timed) for x in shown)
    notes = (
        [f"not listed: {text.count(len(found.layers) - len(shown), 'layer')}"] if len(shown) < len(found.layers) else []
    )
    used = dict.fromkeys(x.form for x in shown)
    notes += [f"{name}: {told}" for form, (name, told) in _FORMS.items() if form in used]
    if timed:
        notes.append(
            "predicted by the table of timed shapes; of a layer that stayed, the closest chain that is faster, or the "
            "fastest where none is"
        )
    return Table("Layers and their chains", columns(*titles), rows, tuple(notes))


def _row(x: LowRankLayer, timed: bool) -> tuple[str, ...]:
    changed = x.form is not None
    cells = (
        text.clean(x.node),
        _FORMS[x.form][0] if x.form in _FORMS else "stays",
        " x ".join(map(str, x.ranks)) if changed else "",
        f"{text.si(x.parameters)} -> {text.si(x.parameters_left)}" if changed else text.si(x.parameters),
        text.cut(x.macs, x.macs_left) if changed and x.macs and x.macs_left is not None else "",
    )  # fmt: skip
    times = (text.MISSING if ms is None else f"{ms:.3g}" for ms in (x.predicted_ms, x.predicted_ms_chain))
    return (*cells, *times) if timed else cells


def _timed(found: LowRank) -> bool:
    return any(x.predicted_ms is not None for x in found.layers)


def _sizes(found: LowRank) -> tuple[tuple[str, ...], ...]:
    pairs = {
        "parameters": (found.parameters_before, found.parameters_after),
        "MACs": (found.macs_before, found.macs_after),
    }
    return tuple(
        (name, text.si(before), text.si(after), text.cut(before, after))
        for name, (before, after) in pairs.items()
        if before and after is not None
    )


def _measured(report: Report, found: LowRank) -> list[str]:
    notes = []
    tried = next((a.measurement for a in report.attempts if a.name == found.candidate), None)
    if tried is not None and tried.median_ms is not None and tried.speedup is not None:
        between = text.interval(tried.speedup_low, tried.speedup_high, 2)
        notes.append(f"measured in floats: {text.ms(tried.median_ms)} a call, speed-up {text.ratio(tried.speedup)}, "
                     f"95 % interval {between}")  # fmt: skip
    if found.predicted_speedup is not None:
        notes.append(f"foretold of its layers, as it will be delivered: {text.ratio(found.predicted_speedup)}")
    f = found.fitted
    if f is not None and f.drop is not None:
        name = text.METRICS.get(f.metric, text.clean(f.metric))
        notes.append(f"in floats it loses {text.fixed(f.drop, 2)} points of {name} on {text.count(f.images, 'image')}")
    return notes
