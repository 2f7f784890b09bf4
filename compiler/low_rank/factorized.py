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
from ..delivery import FLOATS
from ..race import Race
from ..types import Attempt, LowRank, LowRankLayer
from .contest import Made, Ranks
from .kitchen import Chosen, Kitchen, is_faster
from .menu import Item, refusals

if TYPE_CHECKING:
    from ..job import Job
    from ..options import Saving

#: Parts of the parameters that `--low-rank auto --for size` tries to save.
AUTO = (0.1, 0.2, 0.35)
#: How often a stated size is aimed at; a little below it, since what is fitted may be rounded otherwise, and how near.
_AIMS, _SLACK, _CLOSE = 12, 0.99, 0.95

_Found = race.Chosen[Made]


@dataclass(frozen=True, eq=False)
class Factorized:
    """What is compiled on: the float candidate, what was tried on the way to it, and what the report says."""

    base: Candidate
    tried: tuple[Candidate, ...]
    summary: LowRank


def low_rank(this: Job, base: Candidate, work: Path, request: Saving, whole: Attempt | None = None) -> Factorized:
    """Factorize the model of `base`. There must be images. `whole` is the best of the network as it is, if explored."""
    fast = request.kind == "latency" or this.options.goal == "latency"
    kitchen = Kitchen.of(this, base, work, timed=this.timed_here and fast)
    found = _chosen(kitchen, request, whole)
    made = found.what
    candidate = None if made is None else made.candidate or kitchen.made(made.chosen, made.name)
    if isinstance(candidate, str):
        found, candidate = race.Chosen(None, candidate, found.trials), None
    summary = _summary(kitchen, request, found, candidate)
    return Factorized(candidate or base, () if candidate is None else (candidate,), summary)


def _chosen(kitchen: Kitchen, request: Saving, whole: Attempt | None) -> _Found:
    this, budget = kitchen.this, kitchen.this.options.budget
    if not kitchen.menu:
        late = "there was no time to look at any layer" if this.seconds_left == 0 else None
        return race.Chosen(None, late or "no layer of the model can be a chain of smaller ones")
    if request.saved and request.kind != "latency":
        return _named(kitchen, request)
    if not request.saved and budget.max_size_bytes is not None:
        if whole is None or whole.size_bytes > budget.max_size_bytes:
            return _sized(kitchen, budget.max_size_bytes, whole)
        if budget.max_latency_ms is None:
            held = f"the whole network takes {_kilobytes(whole.size_bytes)} as it is"
            return race.Chosen(None, f"{held}, and nothing was factorized")
    if not request.saved and this.options.goal == "size":
        return _smallest(kitchen)
    if not this.timed_here:
        return race.Chosen(None, f"nothing can be shown to pay where {this.not_timed}")
    if not kitchen.timed:
        return race.Chosen(None, "the times of layers are not believed, and nothing was factorized")
    contest = Race(this, Ranks(kitchen), kitchen.base)
    if request.saved:
        return contest.part(request.saved[0])
    return contest.budget() if budget.max_latency_ms is None else contest.limit(budget.max_latency_ms)


def _named(kitchen: Kitchen, request: Saving) -> _Found:
    (saved,) = request.saved
    name = kitchen.called(f"low rank {100 * saved:.3g}%")
    if not kitchen.whole(request.kind):
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


def _sized(kitchen: Kitchen, limit: int, whole: Attempt | None) -> _Found:
    """Save as few parameters as it takes for the file to be that small, in the precision that the whole network is in.

    The part is bisected on files with numbers of no meaning, which are as large; what repair adds is there already.
    """
    run = kitchen.run if whole is None or whole.precision != "fp32" else FLOATS
    size = model_io.size_bytes(run.delivered(kitchen.base).path)
    low, high, best = 0.0, 1.0, None
    part = min(max(1 - limit / size, 0.01), 0.99)
    for _ in range(_AIMS):
        chosen = kitchen.chosen("params", part, quick=False) or kitchen.cheapest("params")
        made = Made(kitchen.called(f"low rank {100 * part:.4g}%"), chosen)
        one = kitchen.stand_in(chosen, made.name)
        if isinstance(one, str):
            low, part = part, (part + high) / 2
            continue
        found = model_io.size_bytes(run.delivered(one).path)
        if found <= _SLACK * limit:
            best, high = (made, found), part
            if found >= _CLOSE * limit:
                break
        elif chosen == kitchen.cheapest("params"):
            why = f"no choice of ranks is as small as {_kilobytes(limit)}: the smallest has {_kilobytes(found)}"
            return race.Chosen(made, why)
        else:
            low = part
        part = (low + high) / 2 if high < 1 else min(part + max(1.05 * (found - limit) / size, 0.01), 0.99)
    if best is None:
        return race.Chosen(None, f"no choice of ranks was found that is as small as {_kilobytes(limit)}")
    return race.Chosen(best[0], f"factorized to {_kilobytes(best[1])} in place of {_kilobytes(size)}")


def _kilobytes(count: int) -> str:
    return f"{count / 1e3:.4g} kB"


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
        lost = f"each that was tried loses more than {most:g} points, or was not judged"
        return race.Chosen(None, lost if found else "no choice of ranks is smaller by a tenth")
    smallest = min(holding, key=lambda one: sum(item.params for item in one.chosen.values()))
    return race.Chosen(smallest, "the smallest that holds the budget")


def _slower(kitchen: Kitchen, chosen: Chosen) -> int:
    before = {name: items[0].ms for name, items in kitchen.menu.items()}
    return sum(
        i.choice is not None and i.ms is not None and i.ms > (before[name] or i.ms) for name, i in chosen.items()
    )


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
        macs_before=kitchen.prices.whole_macs,
        macs_after=None if candidate is None else _macs_after(kitchen, chosen),
        fitted=None if candidate is None else judged.get(candidate.name),
        predicted_speedup=None if candidate is None else kitchen.foretold(chosen),
        tried=found.trials,
        notes=kitchen.notes,
    )


def _macs_after(kitchen: Kitchen, chosen: Chosen) -> int | None:
    before = kitchen.prices.whole_macs
    return None if before is None else before - sum(kitchen.menu[name][0].macs - i.macs for name, i in chosen.items())


def _row(name: str, items: Sequence[Item], item: Item) -> LowRankLayer:
    """Return a layer as it became; of one that stays, the closest chain that is faster, or the fastest, beside it."""
    layer, others = items[0], [other for other in items[1:] if other.ms is not None]
    shown, faster = item, [other for other in others if is_faster(other, items[0])]
    if item.choice is None and others:
        shown = min(faster, key=lambda i: i.error) if faster else min(others, key=lambda i: i.ms or 0.0)
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
