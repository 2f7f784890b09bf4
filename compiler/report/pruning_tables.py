"""What `compile --prune` came to, as tables: sizes, quality before and after repair, each layer's channels."""

from __future__ import annotations

from ..types import Fidelity, Measurement, PrunedLayer, Pruning, Report
from . import race_tables, text
from .grid import Table, columns

_CRITERIA = {
    "obs": "the error that is left when the others make up for them (second-order elimination)",
    "l1": "the L1 norm of their weights",
    "l2": "the L2 norm of their weights",
    "bn": "BatchNormalization's scale",
    "energy": "the energy of their activations",
}


def tables(report: Report, limit: int | None = None) -> tuple[Table, ...]:
    """Return what was cut, what that cost, and its layers: all, or the `limit` that save most; nothing if not asked."""
    p = report.pruning
    if p is None:
        return ()
    title = f"Pruning, asked for: {text.clean(p.asked)}"
    if not p.kept:
        said = tuple(text.clean(note) for note in (p.why, *p.notes))
        return (Table(title, (), (), said), *(race_tables.tried("cut", "Cuts", p.tried)))
    sizes = Table(title, columns("", "#before", "#after", "#cut %"), _sizes(p), tuple(_notes(report, p)))
    return sizes, *(race_tables.tried("cut", "Cuts", p.tried)), repair(p), layers(p, limit)


def repair(p: Pruning) -> Table:
    """The cut network beside the original, before and after its weights were fitted."""
    judged = [
        (name, f)
        for name, f in (("cut, not repaired", p.unrepaired), ("cut and repaired", p.repaired))
        if f is not None
    ]
    if not judged:
        return Table("The cut network", (), (), ("not judged: there were no images to compare on",))
    first = judged[0][1]
    name = text.METRICS.get(first.metric, text.clean(first.metric))
    titles = columns("", f"#{name} %", "#lost, points", "#95 % interval", "#SQNR dB")
    rows = [(label, *_judged(f)) for label, f in judged]
    if first.reference is not None:
        rows.insert(0, ("original", text.fixed(first.reference, 2), "", "", ""))
    reasons = dict.fromkeys(text.why(f) for _, f in judged if f.value is None)
    title = f"Before and after repair, {text.count(first.images, 'held-out image')}"
    return Table(title, titles, tuple(rows), tuple(f"not judged: {why}" for why in reasons), strong=len(rows) - 1)


def layers(p: Pruning, limit: int | None = None) -> Table:
    """Each layer's channels and multiply-accumulates, in the graph's order."""
    found = [x for x in p.layers if _changed(x)]
    largest = sorted(found, key=_saved, reverse=True)[:limit]
    shown = p.layers if limit is None else [x for x in found if x in largest]
    rows = tuple(
        (
            text.clean(x.node),
            _pair(str(x.inputs), str(x.inputs_left)),
            _pair(str(x.outputs), str(x.outputs_left)),
            _pair(text.si(x.macs), text.si(x.macs_left)),
            text.MISSING if not x.macs or x.macs_left is None else text.cut(x.macs, x.macs_left),
        )
        for x in shown
    )
    hidden = {"that save less": len(found) - len(rows), "untouched": len(p.layers) - len(found)}
    told = ", ".join(f"{text.count(number, 'layer')} {what}" for what, number in hidden.items() if number > 0)
    notes = (f"not listed: {told} (report.html has them)",) if told and limit is not None else ()
    return Table("Channels", columns("layer", "#inputs", "#outputs", "#MACs", "#cut %"), rows, notes)


def _notes(report: Report, p: Pruning) -> list[str]:
    """Say why, by which criterion, how fast it came out, and whether it is what was handed over."""
    how = (
        f"{text.count(p.groups, 'group')} of channels, ranked by {_CRITERIA.get(p.criterion, text.clean(p.criterion))}"
    )
    notes = [text.clean(p.why), how, *map(text.clean, p.notes)]
    cut = next((a.measurement for a in report.attempts if a.name == p.candidate), None)
    if cut is not None:
        notes.append(f"{text.clean(p.candidate or '')}: {_latency(report, cut)}")
    if report.attempts and not text.is_pruned(report):
        notes.append("what you got is not the cut network: see the verdicts on the candidates")
    return notes


def _latency(report: Report, cut: Measurement) -> str:
    if cut.median_ms is None:
        return f"latency not measured, {text.why(cut)}"
    if cut.speedup is None:
        return f"{text.ms(cut.median_ms)} a call"
    between = text.interval(cut.speedup_low, cut.speedup_high, 2)
    ratio = f", speed-up {text.ratio(cut.speedup)}" + (f", 95 % interval {between}" if between else "")
    return f"{text.ms(cut.median_ms)} a call, {text.baseline_name(report)} {text.ms(report.baseline.median_ms)}{ratio}"


def _sizes(p: Pruning) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (name, text.si(before), text.si(after), text.cut(before, after))
        for name, (before, after) in text.cut_sizes(p).items()
    )


def _judged(f: Fidelity) -> tuple[str, ...]:
    decibels = [o.sqnr_db for o in f.outputs if o.sqnr_db is not None]
    lost = text.interval(f.drop_low, f.drop_high, 2)
    return text.fixed(f.value, 2), text.fixed(f.drop, 2), lost, text.fixed(min(decibels, default=None), 1)


def _changed(x: PrunedLayer) -> bool:
    return (x.inputs, x.outputs) != (x.inputs_left, x.outputs_left)


def _saved(x: PrunedLayer) -> int:
    return (x.macs or 0) - (x.macs_left or 0)


def _pair(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"
