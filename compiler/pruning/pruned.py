"""From a float model to one with fewer channels: what `--prune` asks for, or what measurement shows to pay.

    join-moves -> groups (channel_cuts) -> ranking (importance) -> how many of each (allocation) -> cut and repair

A named cut is made as asked. `auto` tries the cuts of AUTO, has them timed and judged like everything else, and keeps
the one that guard.py would hand over: where none is shown to be faster inside the budget, nothing is pruned.

Pruning works on the model with BatchNormalization folded in (docs/decisions.md); the scale of a BatchNormalization, one
of the criteria, is read from the model before that. The cut itself is exact but for the channels that are masked, and
is proven: the masked original and the cut network are run side by side on sample inputs (proof.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...passes import channel_cuts, pruning
from ...passes.channel_cuts import ChannelGroups, Removed
from ...passes.cut_moves import JoinMoves
from .. import guard, layers, pipeline, trials
from .. import model as model_io
from ..candidates import Candidate, save
from ..fitting.feeds import calibration_feeds
from ..proof import Prover
from ..types import Measurement, PassRecord, PrunedLayer, Pruning
from . import allocation, importance
from .repair import repaired

if TYPE_CHECKING:
    from ..job import Job
    from ..options import Prune

#: Parts of the MACs, or with `--for size` of the parameters, that `auto` tries to save.
AUTO = (0.15, 0.3, 0.45)
#: Device kind -> the multiple of channels that is cut. On a CPU ONNX Runtime works on blocks of channels: FastestDet
#: with 30 % of its MACs cut one by one is 1.45 times slower than whole, in fours 1.25 times faster, in eights and
#: sixteens no more. GPUs' matrix units want eights (NVIDIA, "Deep Learning Performance: tensor core requirements").
MULTIPLES = {"cpu": 4}
_OTHERS = 8
#: The cut network gives what the masked one gives, but for sums in another order.
TOLERANCE = 1e-4


def steps_of(groups: ChannelGroups, kind: str) -> dict[str, int]:
    """Return how many units of each group go at a time on a kind of device, so that its kernels stay fast.

    Of a group of few units one at a time: four in eight are half of it, and no kernel is fast on so few.
    """
    multiple = MULTIPLES.get(kind, _OTHERS)
    wide = [group for group in groups.groups if group.units % multiple == 0 and group.units >= 4 * multiple]
    return {group.name: multiple for group in wide}


@dataclass(frozen=True, eq=False)
class Pruned:
    """What is compiled on: the float candidate, all that were tried on the way to it, and what the report says."""

    base: Candidate
    tried: tuple[Candidate, ...]
    pruning: Pruning


def prune(this: Job, model: ir.Model, baseline: Candidate, work: Path, request: Prune) -> Pruned:
    """Prune `model`, which is that of `baseline`. There must be images."""
    assert this.images is not None
    start = time.perf_counter()
    joined, moved = pipeline.run(model_io.copy(model), [JoinMoves()], Prover(model))
    search = _Search.of(this, joined)
    if not search.rankings:
        why = (
            "no channel of the model can be cut"
            if not search.groups.groups
            else "nothing could be repaired behind a cut"
        )
        return Pruned(baseline, (), search.summary(request, None, why))
    if not request.saved and this.options.goal == "latency" and this.target is None:
        why = f"nothing can be shown to pay where nothing is measured ({this.not_measured}); --prune 30% is obeyed"
        return Pruned(baseline, (), search.summary(request, None, why))
    kind = "params" if this.options.goal == "size" and not request.saved else request.kind
    found = [search.candidate(saved, kind, work, start, moved) for saved in request.saved or AUTO]
    made = [one for one in found if isinstance(one, _Made)]
    if not made:
        why = next(one for one in found if isinstance(one, str))
        return Pruned(baseline, (), search.summary(request, None, why))
    base, why = (made[0].candidate, made[0].told) if request.saved else _worth(this, baseline, made)
    chosen = next((one for one in made if one.candidate is base), None)
    tried = () if chosen is None else (chosen.candidate,)  # the last measurement must not turn to what was turned down
    return Pruned(base or baseline, tried, search.summary(request, chosen, why))


def _worth(this: Job, baseline: Candidate, made: Sequence[_Made]) -> tuple[Candidate | None, str]:
    """Return the candidate that is handed over on the evidence of measurements; None where pruning does not pay."""
    cuts = [one.candidate for one in made]
    if this.options.goal == "size":
        return _smallest(this, cuts)
    every = [baseline, *cuts]
    measured, judged = trials.measure(this, every, seconds=trials.BRIEF), trials.judge(this, every)
    attempts = guard.choose([trials.attempt(c, measured, judged) for c in every], this.options.budget, named=None)
    for candidate, attempt in zip(every, attempts, strict=True):
        if attempt.chosen and candidate is not baseline:
            return candidate, "the fastest that holds the budget, of the cuts that were tried"
    tried = "; ".join(f"{attempt.name}: {_speed(attempt.measurement)}{attempt.verdict}" for attempt in attempts[1:])
    return None, f"pruning does not pay here, and nothing was pruned ({tried})"


def _speed(found: Measurement) -> str:
    return "" if found.speedup is None else f"{found.speedup:.2f}x, "


def _smallest(this: Job, made: Sequence[Candidate]) -> tuple[Candidate | None, str]:
    """Return the smallest candidate that loses no more than the budget allows; None where all do, or nobody can say."""
    drops = {name: found.drop for name, found in trials.judge(this, made).items()}
    holding = [c for c in made if (drop := drops.get(c.name)) is not None and drop <= this.options.budget.max_drop]
    if not holding:
        return (
            None,
            f"each cut that was tried loses more than {this.options.budget.max_drop:g} points, or was not judged",
        )
    return min(holding, key=lambda c: model_io.size_bytes(c.path)), "the smallest that holds the budget"


@dataclass(frozen=True, eq=False)
class _Made:
    """A cut network, repaired and not; `told` says whether it is what was asked for."""

    candidate: Candidate
    unrepaired: Candidate
    told: str


@dataclass(frozen=True, eq=False)
class _Search:
    """The model, its groups, and their rankings: made once for all cuts."""

    this: Job
    model: ir.Model
    groups: ChannelGroups
    feeds: Sequence[Mapping[str, np.ndarray]]
    rankings: Mapping[str, importance.Ranking]

    @classmethod
    def of(cls, this: Job, model: ir.Model) -> _Search:
        assert this.images is not None
        groups = channel_cuts.groups(model)
        feeds = calibration_feeds(model, this.images, threads=this.threads) if groups.groups else []
        rankings = importance.rank(
            model, groups.groups, feeds, seed=this.options.seed, threads=this.threads, progress=this.progress
        ) if groups.groups else {}  # fmt: skip
        return cls(this, model, groups, feeds, rankings)

    def removed(self, saved: float, costs: allocation.Costs) -> Removed:
        """Return the units that go, so that the part `saved` of the cost does."""
        steps = steps_of(self.groups, self.this.profile.kind)
        return self.groups.feasible(allocation.allocate(costs, self.rankings, saved, steps))

    def candidate(self, saved: float, kind: str, work: Path, start: float, moved: Sequence[PassRecord]) -> _Made | str:
        """Return the network with that part cut, repaired and not, as files in `work`; or why there is none."""
        costs = costs.counted(self.model, self.groups.groups, kind)
        if not costs.of({}):
            return "how many MACs the layers have is not known (shapes are dynamic): --prune params:30% counts weights"
        removed = self.removed(saved, costs)
        if not any(removed.values()):
            return "no whole unit fits into what is to be cut"
        name = f"pruned {100 * saved:.0f}%"
        cut = channel_cuts.cut(self.model, removed)
        proof = Prover(channel_cuts.mask(self.model, removed)).prove(cut, TOLERANCE)
        if proof.error is not None and not proof.error <= proof.tolerance:
            return f"the cut failed its proof: its outputs differ by {proof.error:.1e} from the masked network's"
        model = repaired(
            self.model, removed, self.feeds, pruning.RIDGE,
            seed=self.this.options.seed, threads=self.this.threads, progress=self.this.progress,
        )  # fmt: skip
        units = sum(len(gone) for gone in removed.values())
        record = PassRecord(
            name="prune",
            stage="compress",
            exact=False,
            modified=True,
            seconds=time.perf_counter() - start,
            nodes_before=len(self.model.graph),
            nodes_after=len(model.graph),
            rewrites=units,
            refusals=self.groups.refusals,
            notes=(f"the proof is that of the cut: the original with these {units} channels masked",),
            proof=proof,
        )
        stem, reached = name.replace(" ", "-").rstrip("%"), 1 - costs.of(removed) / costs.of({})
        told = "cut as asked" if reached >= saved - 1e-9 else f"{100 * reached:.3g}% is what can be cut in whole units"
        records = (*(r for r in moved if r.modified), record)
        return _Made(
            save(Candidate(name, "fp32", work / f"{stem}.onnx", model, records)),
            save(Candidate(f"{name}, not repaired", "fp32", work / f"{stem}-cut.onnx", cut)),
            told,
        )

    def summary(self, request: Prune, made: _Made | None, why: str) -> Pruning:
        """Return what the report says of it."""
        refusals = self.groups.refusals
        before = _sizes(self.model)
        if made is None:
            return Pruning(request.text, why, "obs", len(self.groups.groups), refusals=refusals, kept=False)
        after = _sizes(made.candidate.model)
        judged = trials.judge(self.this, [made.unrepaired, made.candidate])
        rows = tuple(
            PrunedLayer(name, *before[name][:2], *after[name][:2], before[name][2], after[name][2])
            for name in before
            if name in after
        )
        return Pruning(
            asked=request.text,
            why=why,
            criterion="obs",
            groups=len(self.groups.groups),
            kept=True,
            candidate=made.candidate.name,
            layers=rows,
            refusals=refusals,
            parameters_before=model_io.parameters(self.model),
            parameters_after=model_io.parameters(made.candidate.model),
            unrepaired=judged.get(made.unrepaired.name),
            repaired=judged.get(made.candidate.name),
        )


def _sizes(model: ir.Model) -> dict[str, tuple[int, int, int | None]]:
    """Return inputs, outputs and MACs of each linear layer with a stored weight, by name."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in layers.LINEAR and len(node.inputs) > 1 else None
        if weight is not None and weight.const_value is not None and len(weight.const_value.shape) > 1:
            shape, (ins, outs) = weight.const_value.shape.numpy(), importance.axes_of(node)
            each = {ins if node.op_type == "Conv" else outs: node.attributes.get_int("group", 1)}  # of one group
            inputs, outputs = (shape[axis] * each.get(axis, 1) for axis in (ins, outs))
            found[node.name or node.outputs[0].name or ""] = (inputs, outputs, layers.macs(node))
    return found
