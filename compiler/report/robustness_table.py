"""A model under each condition as a table: the original's own loss, the model's figure, what it loses, the verdict."""

from __future__ import annotations

from ..types import Fidelity, Robustness, UnderCondition
from . import text
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
    labelled = found.metric == "top1"
    if all(c.fidelity is None for _, c in rows):
        heads = columns("", f"#{'top-1' if labelled else 'beside clean'}", "#lost, points", "#95 % interval")
        return Table(title, heads, tuple((text.clean(n), *_own(c), _own_interval(c)) for n, c in rows))
    own = ("#original", "#its\nloss") if labelled else ("#original",)
    heads = columns("", *own, "#result", "#lost" if labelled else "#more\nlost", "#95 % interval", "verdict")
    about = f"original: beside {'the labels; its loss: beside its top-1' if labelled else 'itself'} on clean images"
    cells = ((text.clean(n), *_own(c)[: len(own)], *_result(c)) for n, c in rows)
    return Table(title, heads, tuple(cells), (about, *found.notes))


def headline(found: Robustness) -> str:
    """Say in one sentence under which conditions a difference was shown; empty where nothing was compared."""
    shown = {name: c.difference.verdict for name, c in found.conditions.items() if c.difference is not None}
    if not shown:
        return ""
    beside = "than the original" if found.metric == "top1" else "than on clean images"
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
