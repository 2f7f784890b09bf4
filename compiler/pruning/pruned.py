"""From a float model to one with fewer channels: what `--prune` asks for, or what measurement shows to pay.

    join-moves -> groups (channel_cuts) -> ranking (importance) -> how many of each (allocation) -> cut and repair

A named part of the MACs or parameters is cut as asked. Where latency is what counts, cuts are priced in milliseconds of
the network as it will run (latencies.py), and race.py says how far they go: as far as the quality budget allows
(`auto`), or until a stated latency is measured to hold. Where no cut is shown to be faster, nothing is pruned.

Pruning works on the model with BatchNormalization folded in (docs/decisions.md); the scale of a BatchNormalization, one
of the criteria, is read from the model before that. The cut itself is exact but for the channels that are masked, and
is proven: the masked original and the cut network are run side by side on sample inputs (proof.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...passes.cut_moves import JoinMoves
from .. import model as model_io
from .. import pipeline, trials
from ..candidates import Candidate
from ..delivery import delivery
from ..proof import Prover
from ..race import Chosen, Race
from ..types import Pruning
from .contest import Cuts
from .costs import Costs
from .cutting import Cutting, Made
from .latencies import Pricing

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..job import Job
    from ..options import Saving

#: Parts of the parameters that `--prune auto --for size` tries to save.
AUTO = (0.15, 0.3, 0.45)


@dataclass(frozen=True, eq=False)
class Pruned:
    """What is compiled on: the float candidate, all that were tried on the way to it, and what the report says."""

    base: Candidate
    tried: tuple[Candidate, ...]
    pruning: Pruning


def prune(this: Job, model: ir.Model, baseline: Candidate, work: Path, request: Saving) -> Pruned:
    """Saving `model`, which is that of `baseline`. There must be images."""
    start = time.perf_counter()
    joined, moved = pipeline.run(model_io.copy(model), [JoinMoves()], Prover(model))
    cutting = Cutting.of(this, joined, moved, start)
    found = _nothing(cutting) or _chosen(this, cutting, baseline, work, request)
    made = found.what
    if made is not None and this.seconds_left != 0:
        made = cutting.finished(made, work)
    tried = () if made is None else (made.candidate,)  # the last measurement must not turn to what was turned down
    summary = cutting.summary(request, made, found.why, found.trials, found.notes)
    return Pruned(baseline if made is None else made.candidate, tried, summary)


def _nothing(cutting: Cutting) -> Chosen[Made] | None:
    """Return why nothing can be cut; None where something can."""
    if cutting.rankings:
        return None
    if cutting.notes:
        return Chosen(None, "nothing was pruned: there was no time to rank anything")
    if not cutting.structure:
        return Chosen(None, "no channel of the model can be cut")
    return Chosen(None, "nothing could be repaired behind a cut")


def _chosen(this: Job, cutting: Cutting, baseline: Candidate, work: Path, request: Saving) -> Chosen[Made]:
    if request.kind == "latency" or not (request.saved or this.options.goal == "size"):
        return _by_latency(this, cutting, baseline, work, request)
    kind = request.kind if request.saved else "params"
    costs = cutting.structure.counted(cutting.model, kind)
    if not costs.of({}):
        why = "how many MACs the layers have is not known (shapes are dynamic): --prune params:30% counts weights"
        return Chosen(None, why)
    found = [_part(cutting, costs, saved, work, bool(request.saved)) for saved in request.saved or AUTO]
    made = [one for one in found if isinstance(one, Made)]
    if not made:
        return Chosen(None, next(one for one in found if isinstance(one, str)))
    if not request.saved:
        return _smallest(this, made)
    (saved,), reached = request.saved, 1 - costs.of(made[0].removed) / costs.of({})
    short = f"{100 * reached:.3g}% is what can be cut in whole units"
    return Chosen(made[0], "pruned as asked" if reached >= saved - 1e-9 else short)


def _part(cutting: Cutting, costs: Costs, saved: float, work: Path, final: bool) -> Made | str:
    """Return the network without that part of the cost: with branches gone or without, whichever comes closer."""
    proposals = [cutting.proposed(costs, saved)]
    if cutting.loses_branches(proposals[0]):
        other = cutting.proposed(costs, saved, whole=False)
        proposals += [other] if costs.of(other) <= (1 - saved) * costs.of({}) else []
    return cutting.closest(proposals, work, f"pruned {100 * saved:.0f}%", final)


def _by_latency(this: Job, cutting: Cutting, baseline: Candidate, work: Path, request: Saving) -> Chosen[Made]:
    """Cut by milliseconds: a named part of them, or to a stated latency, or as far as the quality budget allows."""
    if not this.timed_here:
        why = f"nothing can be shown to pay where {this.not_timed}; --prune 30% is obeyed"
        return Chosen(None, why)
    run = delivery(this)
    prices = Pricing.of(this, cutting.model, cutting.structure, cutting.steps, run)
    race = Race(this, Cuts(cutting, prices, work), baseline)
    if request.saved:
        found = race.part(request.saved[0])
    elif this.options.budget.max_latency_ms is not None:
        found = race.limit(this.options.budget.max_latency_ms)
    else:
        found = race.budget()
    shapes = sum(map(len, prices.table.known.values()))
    told = f"cuts are priced by {shapes} timed shapes of layers, which explain what was timed within"
    return replace(found, notes=(f"{told} {100 * prices.table.misfit:.0f} %",))


def _smallest(this: Job, made: Sequence[Made]) -> Chosen[Made]:
    """Return the smallest that loses no more than the budget allows; nothing where all do, or nobody can say."""
    most = this.options.budget.max_drop
    drops = {name: found.drop for name, found in trials.judge(this, [one.candidate for one in made]).items()}
    holding = [one for one in made if (drop := drops.get(one.candidate.name)) is not None and drop <= most]
    if not holding:
        return Chosen(None, f"each cut that was tried loses more than {most:g} points, or was not judged")
    smallest = min(holding, key=lambda one: model_io.size_bytes(one.candidate.path))
    return Chosen(smallest, "the smallest that holds the budget")
