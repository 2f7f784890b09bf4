"""From a float model to one whose layers are chains of smaller ones: what `--low-rank` asks for, or is shown to pay.

    menu (errors) -> prices (parameters, MACs, milliseconds) -> allocation -> repair (the factors) -> chains

A named part of the parameters or MACs is saved as asked, with layers only whose chains are foretold to be faster where
that suffices, and latency counts. A named part of the latency is raced for (race.py) until it is measured; so is a
stated latency, and a stated size is aimed at until the file is as small. `auto` saves as much of the time as the
quality budget allows, with faster chains only: where nothing is shown to be faster, nothing is factorized. With `--for
size` it keeps the smallest that holds the quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import model as model_io
from .. import race, trials
from ..candidates import Candidate
from ..race import Race
from ..types import LowRank, LowRankLayer
from .contest import Made, Ranks
from .kitchen import Chosen, Kitchen, is_faster
from .menu import Item, refusals

if TYPE_CHECKING:
    from ..job import Job
    from ..options import Saving

#: Parts of the parameters that `--low-rank auto --for size` tries to save.
AUTO = (0.1, 0.2, 0.35)
#: How often a stated size is aimed at.
_AIMS = 4

_Found = race.Chosen[Made]


@dataclass(frozen=True, eq=False)
class Factorized:
    """What is compiled on: the float candidate, what was tried on the way to it, and what the report says."""

    base: Candidate
    tried: tuple[Candidate, ...]
    summary: LowRank


def low_rank(this: Job, base: Candidate, work: Path, request: Saving) -> Factorized:
    """Factorize the model of `base`. There must be images."""
    fast = request.kind == "latency" or this.options.goal == "latency"
    kitchen = Kitchen.of(this, base, work, timed=this.target is not None and fast)
    found = _chosen(kitchen, request)
    made = found.what
    candidate = None if made is None else made.candidate or kitchen.made(made.chosen, made.name)
    if isinstance(candidate, str):
        found, candidate = race.Chosen(None, candidate, found.trials), None
    summary = _summary(kitchen, request, found, candidate)
    return Factorized(candidate or base, () if candidate is None else (candidate,), summary)


def _chosen(kitchen: Kitchen, request: Saving) -> _Found:
    this, budget = kitchen.this, kitchen.this.options.budget
    if not kitchen.menu:
        return race.Chosen(None, "no layer of the model can be a chain of smaller ones")
    if request.saved and request.kind != "latency":
        return _named(kitchen, request)
    if not request.saved and this.options.goal == "size":
        return _smallest(kitchen)
    if not request.saved and budget.max_size_bytes is not None:
        return _sized(kitchen, budget.max_size_bytes)
    if not kitchen.timed:
        why = this.not_measured or "the times of layers are not believed"
        return race.Chosen(None, f"nothing can be shown to pay where nothing is measured ({why})")
    contest = Race(this, Ranks(kitchen), kitchen.base)
    if request.saved:
        return contest.part(request.saved[0])
    return contest.budget() if budget.max_latency_ms is None else contest.limit(budget.max_latency_ms)


def _named(kitchen: Kitchen, request: Saving) -> _Found:
    (saved,) = request.saved
    name = kitchen.called(f"low rank {100 * saved:.3g}%")
    if not kitchen.total(request.kind):
        why = "what the layers cost is not known (shapes are dynamic): --low-rank 30% counts parameters"
        return race.Chosen(None, why)
    chosen = kitchen.chosen(request.kind, saved, quick=True) if kitchen.timed else None
    slower = ""
    if chosen is None:
        chosen = kitchen.chosen(request.kind, saved, quick=False)
        count = 0 if chosen is None or not kitchen.timed else _slower(kitchen, chosen)
        slower = f"; {count} of its chains are foretold to be slower than their layers" if count else ""
    if chosen is None:
        return race.Chosen(None, "no choice of ranks saves that much")
    return race.Chosen(Made(name, chosen), f"factorized as asked{slower}")


def _sized(kitchen: Kitchen, limit: int) -> _Found:
    """Save as many parameters as it takes for the file, as it will be delivered, to be that small; no more."""
    size = model_io.size_bytes(kitchen.run.delivered(kitchen.base).path)
    if size <= limit:
        return race.Chosen(None, f"the whole network takes {size / 1e3:.4g} kB as it is, and nothing was factorized")
    part, best = 1 - limit / size, None
    for _ in range(_AIMS):
        chosen = kitchen.chosen("params", part, quick=False) or kitchen.cheapest("params")
        made = Made(kitchen.called(f"low rank {100 * part:.3g}%"), chosen)
        one = kitchen.stand_in(chosen, made.name)
        if isinstance(one, str):
            return race.Chosen(None, one)
        found = model_io.size_bytes(kitchen.run.delivered(one).path)
        best = made
        if found <= limit or chosen == kitchen.cheapest("params"):
            break
        part += 1.01 * (found - limit) / size
    held = "" if found <= limit else f", which {limit / 1e3:.4g} kB asked for and no choice of ranks gives"
    return race.Chosen(best, f"factorized to {found / 1e3:.4g} kB in place of {size / 1e3:.4g} kB{held}")


def _smallest(kitchen: Kitchen) -> _Found:
    """Return the smallest of some that holds the budget."""
    this, found = kitchen.this, list[Made]()
    for saved in AUTO:
        chosen = kitchen.chosen("params", saved, quick=False)
        if chosen is None or (found and this.seconds_left == 0):
            break
        name = kitchen.called(f"low rank {100 * saved:.0f}%")
        made = kitchen.made(chosen, name)
        if isinstance(made, Candidate):
            found.append(Made(name, chosen, made))
    rounded = [kitchen.run.rounded(one.candidate) for one in found if one.candidate is not None]
    drops = {name: f.drop for name, f in trials.judge(this, rounded).items()}
    most = this.options.budget.max_drop
    holding = [one for one in found if (drop := drops.get(one.name)) is not None and drop <= most]
    if not holding:
        return race.Chosen(None, f"each that was tried loses more than {most:g} points, or was not judged")
    smallest = min(holding, key=lambda one: sum(item.params for item in one.chosen.values()))
    return race.Chosen(smallest, "the smallest that holds the budget")


def _slower(kitchen: Kitchen, chosen: Chosen) -> int:
    return sum(i.choice is not None and not is_faster(i, kitchen.menu[name][0]) for name, i in chosen.items())


def _summary(kitchen: Kitchen, request: Saving, found: _Found, candidate: Candidate | None) -> LowRank:
    chosen: Chosen = {} if candidate is None or found.what is None else found.what.chosen
    rows = tuple(_row(name, items, chosen.get(name, items[0])) for name, items in kitchen.menu.items())
    judged = {} if candidate is None else trials.judge(kitchen.this, [candidate])
    return LowRank(
        asked=request.text,
        why=found.why,
        kept=candidate is not None,
        candidate=None if candidate is None else candidate.name,
        layers=rows,
        refusals=refusals(kitchen.model),
        parameters_before=model_io.parameters(kitchen.model),
        parameters_after=None if candidate is None else model_io.parameters(candidate.model),
        fitted=None if candidate is None else judged.get(candidate.name),
        predicted_speedup=None if candidate is None else kitchen.foretold(chosen),
        tried=found.trials,
        notes=kitchen.notes,
    )


def _row(name: str, items: Sequence[Item], item: Item) -> LowRankLayer:
    """Return a layer as it became; of one that stays, the fastest chain beside it."""
    layer, others = items[0], [other for other in items[1:] if other.ms is not None]
    shown = item
    if item.choice is None and others:
        shown = min(others, key=lambda other: other.ms or 0.0)
    return LowRankLayer(
        node=name,
        form=None if item.choice is None else item.choice.form,
        ranks=() if item.choice is None else item.choice.ranks,
        parameters=layer.params,
        parameters_left=item.params,
        macs=layer.macs or None,
        macs_left=item.macs or None,
        predicted_ms=layer.ms,
        predicted_ms_chain=shown.ms if shown is not layer else None,
    )
