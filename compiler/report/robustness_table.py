"""A model under each condition as a table: the original's own loss, the model's figure, what it loses, the verdict."""

from __future__ import annotations

from ..types import LABELLED, BoxFidelity, Fidelity, Robustness, UnderCondition
from . import tables, text
from .grid import Table, columns


def robustness(found: Robustness) -> Table:
    """One row a condition; without a model beside it, what the original itself loses."""
    name, unit = text.METRICS.get(found.metric, text.clean(found.metric)), "%"
    if found.metric == "energy":
        name, unit = "SQNR of the worst output", "dB"
    under = f"{name[0].upper()}{name[1:]} under {text.count(len(found.conditions), 'condition')}"
    title = f"{under}, {unit}, on {text.count(found.images, 'image')} each"
    rows = found.conditions.items()
    for _, c in rows:
        if c.original.value is None:
            return Table(title, (), (), (f"not judged: {text.why(c.original)}",))
    labelled = found.metric in LABELLED
    judged = next(tables.judged_by(c.original) for _, c in rows) if labelled else ()
    if all(c.fidelity is None for _, c in rows):
        heads = columns("", f"#{name if labelled else 'beside clean'}", "#lost, points", "#95 % interval")
        return Table(title, heads, tuple((text.clean(n), *_own(c), _own_interval(c)) for n, c in rows), judged)
    own = ("#original", "#its\nloss") if labelled else ("#original",)
    heads = columns("", *own, "#result", "#lost" if labelled else "#more\nlost", "#95 % interval", "verdict")
    about = f"original: beside {f'the labels; its loss: beside its {name}' if labelled else 'itself'} on clean images"
    cells = tuple((text.clean(n), *_own(c)[: len(own)], *_result(c)) for n, c in rows)
    return Table(title, heads, cells, (*judged, about, *found.notes))


def precision(found: Robustness) -> Table:
    """One row a condition: average precision of the original and of the model; empty where no boxes are judged."""
    beside = {name: c.fidelity or c.original for name, c in found.conditions.items()}
    judged = {name: f.boxes for name, f in beside.items() if f.boxes is not None}
    if not judged:
        return Table("", (), ())
    labelled = found.metric in LABELLED
    alone = all(c.fidelity is None for c in found.conditions.values())
    sides = [*(["original"] if labelled and not alone else []), "original" if alone else "result"]
    heads = [f"#{side}\n{what}" for side in sides for what in ("IoU 0.5", "0.5-0.95")]
    rows = tuple((text.clean(name), *_ap(b)[-len(heads) :]) for name, b in judged.items())
    truth = "the labels" if labelled else "the original's boxes" + (" on clean images" if alone else "")
    return Table("Average precision under each condition, %", columns("", *heads), rows, (f"beside {truth}",))


def _ap(b: BoxFidelity) -> tuple[str, ...]:
    return tuple(text.fixed(value, 2) for value in (b.reference_ap50, b.reference_ap, b.ap50, b.ap))


def headline(found: Robustness) -> str:
    """Say in one sentence under which conditions a difference was shown; empty where nothing was compared."""
    shown = {name: c.difference.verdict for name, c in found.conditions.items() if c.difference is not None}
    if not shown:
        return ""
    beside = "than the original" if found.metric in LABELLED else "than on clean images"
    said = []
    for verdict in ("worse", "better"):
        names = [text.clean(name) for name, v in shown.items() if v == verdict]
        if names:
            said.append(f"{verdict} {beside} under {', '.join(names)}")
    rest = sum(v == "no difference shown" for v in shown.values())
    if rest:
        under = f"the other {rest}" if said else text.count(rest, "condition")
        said.append(f"no difference shown under {under}")
    return f"{'; '.join(said)}".capitalize()


def _own(under: UnderCondition) -> tuple[str, str]:
    """The original under the condition, and what it loses against itself on clean images."""
    return _figure(under.original), text.fixed(under.original.drop, 2)


def _own_interval(under: UnderCondition) -> str:
    return text.interval(under.original.drop_low, under.original.drop_high, 2)


def _figure(f: Fidelity) -> str:
    """The figure in percent, or the SQNR of the worst output in dB."""
    if f.metric != "energy":
        return text.fixed(f.value, 2)
    return text.sqnr(min(f.outputs, key=lambda o: float("inf") if o.sqnr_db is None else o.sqnr_db))


def _result(under: UnderCondition) -> tuple[str, ...]:
    d, figure = under.difference, "" if under.fidelity is None else _figure(under.fidelity)
    if d is None:
        return figure, "", "", "(compared with)"
    return figure, text.signed(d.value, 2), text.interval(d.low, d.high, 2), d.verdict
