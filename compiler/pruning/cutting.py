"""One model, its groups and their rankings, made once; and the networks that are cut from it, repaired and proven."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...passes.channel_cuts import ChannelGroups
from .. import devices, layers, trials
from .. import model as model_io
from ..candidates import Candidate, save
from ..fitting.images import repair_feeds
from ..fitting.probe import Probe, is_large
from ..proof import Prover
from ..types import DeviceProfile, PassRecord, PrunedLayer, Pruning, Trial
from . import allocation, importance
from .branch_ranking import rank_branches
from .costs import Costs
from .repair import repaired
from .structure import Structure
from .swaps import swapped

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..job import Job
    from ..options import Saving

#: The cut network gives what the masked one gives, but for sums in another order.
TOLERANCE = 1e-4


def steps_of(groups: ChannelGroups, profile: DeviceProfile) -> dict[str, int]:
    """Return how many units of each group go at a time on a device, so that its kernels stay fast.

    That is the device's channel multiple, halved until a group has four of them: two in three would be too coarse. Of
    a group that has no four fours units go one at a time: no kernel is fast on so few.
    """
    steps = {group.name: _step(group.units, devices.multiple_of(profile)) for group in groups.groups}
    return {name: step for name, step in steps.items() if step > 1}


def _step(units: int, multiple: int) -> int:
    step = multiple
    while step > devices.CPU_STEP and (units % step or units < 4 * step):
        step //= 2
    return 1 if units % step or units < 4 * step else step


def proposed(
    structure: Structure,
    costs: Costs,
    rankings: Mapping[str, importance.Ranking],
    saved: float,
    steps: Mapping[str, int],
) -> dict[str, list[int]]:
    """Return what goes, so that the part `saved` of the cost does, or as much as there is.

    Of two branches of one sum the cheaper goes; the other one is left out, and all is allocated anew.
    """
    left = dict(rankings)
    while True:
        found = allocation.allocate(costs, left, saved, steps)
        by_error = sorted(found, key=lambda name: float(left[name].curve[-1]))
        removed = structure.feasible({name: found[name] for name in by_error})
        given_back = [
            branch.name for branch in structure.branches if branch.name in found and branch.name not in removed
        ]
        if not given_back:
            return removed
        for name in given_back:
            del left[name]


@dataclass(frozen=True, eq=False)
class Made:
    """A cut network, repaired and not. `removed`: the units that are gone, by group.

    `final`: the layers that make what was cut were fitted, too, which takes three times as long. `foretold`: how many
    times as fast as the whole network it was foretold to be.
    """

    candidate: Candidate
    unrepaired: Candidate
    removed: Mapping[str, Sequence[int]]
    final: bool = False
    foretold: float | None = None


@dataclass(frozen=True, eq=False)
class Cutting:
    """The model, its groups, and their rankings. `before` are the records of what was joined to find them."""

    this: Job
    model: ir.Model
    structure: Structure
    feeds: Sequence[Mapping[str, np.ndarray]]
    rankings: Mapping[str, importance.Ranking]
    before: Sequence[PassRecord]
    start: float

    @classmethod
    def of(cls, this: Job, model: ir.Model, before: Sequence[PassRecord], start: float) -> Cutting:
        """Find and rank what can be cut of `model`. There must be images."""
        assert this.images is not None
        structure, threads = Structure.of(model), this.threads
        feeds = repair_feeds(model, this.images, threads=threads) if structure else []
        seed, deadline, progress = this.options.seed, this.deadline, this.progress
        rankings: dict[str, importance.Ranking] = {}
        if structure:
            rankings |= importance.rank(
                model, structure.groups.groups, feeds, seed=seed, threads=threads, deadline=deadline, progress=progress
            )
            rankings |= rank_branches(
                model, structure.branches.branches, feeds,
                seed=seed, threads=threads, deadline=deadline, progress=progress,
            )  # fmt: skip
        return cls(this, model, structure, feeds, rankings, [r for r in before if r.modified], start)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to be said of the ranking."""
        count = len(self.structure.groups) + len(self.structure.branches)
        if self.this.seconds_left != 0 or len(self.rankings) == count:
            return ()
        return (f"the time budget ended when {len(self.rankings)} of {count} groups and branches were ranked",)

    @property
    def steps(self) -> dict[str, int]:
        """How many units of each group go at a time."""
        return steps_of(self.structure.groups, self.this.profile)

    def proposed(self, costs: Costs, saved: float, whole: bool = True) -> dict[str, list[int]]:
        """Return the units that go, so that the part `saved` of the cost does, or as much as there is.

        Branches only where they may go as a `whole`.
        """
        branches = () if whole else {branch.name for branch in self.structure.branches}
        rankings = {name: ranking for name, ranking in self.rankings.items() if name not in branches}
        return proposed(self.structure, costs, rankings, saved, self.steps)

    def closest(
        self, proposals: Sequence[Mapping[str, Sequence[int]]], work: Path, name: str, final: bool = False
    ) -> Made | str:
        """Make what is proposed, with branches and without, and return what errs least on the calibration images."""
        names = [name, f"{name}, channels only"]
        found = [self.made(one, work, called, final) for one, called in zip(proposals, names, strict=False)]
        made = [one for one in found if isinstance(one, Made)]
        if len(made) < 2:
            return made[0] if made else found[0]
        probe = Probe(self.model, self.feeds, self.this.threads)
        return min(made, key=lambda one: probe.error(one.candidate.model))

    def loses_branches(self, removed: Mapping[str, Sequence[int]]) -> bool:
        """Say whether branches go, and a cut in channels alone is worth a try: what branches cost does not add up."""
        return bool(self.structure.split(removed)[1]) and not is_large(self.model)

    def made(self, removed: Mapping[str, Sequence[int]], work: Path, name: str, final: bool = False) -> Made | str:
        """Return the network without these units, as files in `work`; or why there is none."""
        if not any(removed.values()):
            return "no whole unit fits into what is to be cut"
        cut = self.structure.cut(self.model, removed)
        proof = Prover(self.structure.mask(self.model, removed)).prove(cut, TOLERANCE)
        if proof.error is not None and not proof.error <= proof.tolerance:
            return f"the cut failed its proof: its outputs differ by {proof.error:.1e} from the masked network's"
        units, branches = self.structure.split(removed)
        model = repaired(
            self.model, units, self.feeds, branches=branches, makers=final,
            seed=self.this.options.seed, threads=self.this.threads, progress=self.this.progress,
        )  # fmt: skip
        channels = sum(map(len, units.values()))
        whole = f" and {len(branches)} branches" if branches else ""
        record = PassRecord(
            name="prune",
            stage="compress",
            exact=False,
            modified=True,
            seconds=time.perf_counter() - self.start,
            nodes_before=len(self.model.graph),
            nodes_after=len(model.graph),
            rewrites=channels + len(branches),
            refusals=self.structure.refusals,
            notes=(f"the proof is that of the cut: the original with these {channels} channels{whole} masked",),
            proof=proof,
        )
        stem = name.replace(" ", "-").replace("%", "")
        return Made(
            save(Candidate(name, "fp32", work / f"{stem}.onnx", model, (*self.before, record))),
            save(Candidate(f"{name}, not repaired", "fp32", work / f"{stem}-cut.onnx", cut)),
            removed,
            final or is_large(self.model),  # nothing more is done to those
        )

    def finished(self, made: Made, work: Path) -> Made:
        """Return the cut with close calls of its first channels decided by the repaired network, and all fitted."""
        units, branches = self.structure.split(made.removed)
        better = swapped(
            self.model, self.structure.groups, units, self.rankings, self.feeds, branches=branches,
            seed=self.this.options.seed, threads=self.this.threads, progress=self.this.progress,
        )  # fmt: skip
        if better == units and made.final:
            return made
        gone = {**better, **{branch.name: [0] for branch in branches}}
        again = self.made(gone, work, made.candidate.name, final=True)
        return made if isinstance(again, str) else again

    def summary(
        self, request: Saving, made: Made | None, why: str, tried: Sequence[Trial] = (), told: Sequence[str] = ()
    ) -> Pruning:
        """Return what the report says of it."""
        found = Pruning(
            asked=request.text,
            why=why,
            criterion="obs",
            groups=len(self.structure.groups),
            kept=False,
            refusals=self.structure.refusals,
            tried=tuple(tried),
            notes=(*self.notes, *told),
        )
        if made is None:
            return found
        before, after = sizes(self.model), sizes(made.candidate.model)
        judged = trials.judge(self.this, [made.unrepaired, made.candidate])
        gone = (0, 0, 0)  # a layer of a branch
        rows = tuple(
            PrunedLayer(name, ins, outs, *after.get(name, gone)[:2], macs, after.get(name, gone)[2])
            for name, (ins, outs, macs) in before.items()
        )
        return replace(
            found,
            kept=True,
            candidate=made.candidate.name,
            layers=rows,
            parameters_before=model_io.parameters(self.model),
            parameters_after=model_io.parameters(made.candidate.model),
            unrepaired=judged.get(made.unrepaired.name),
            repaired=judged.get(made.candidate.name),
        )


def sizes(model: ir.Model) -> dict[str, tuple[int, int, int | None]]:
    """Return inputs, outputs and MACs of each linear layer with a stored weight, by name."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in layers.LINEAR and len(node.inputs) > 1 else None
        if weight is not None and weight.const_value is not None and len(weight.const_value.shape) > 1:
            shape, (ins, outs) = weight.const_value.shape.numpy(), layers.axes_of(node)
            each = {ins if node.op_type == "Conv" else outs: node.attributes.get_int("group", 1)}  # of one group
            inputs, outputs = (shape[axis] * each.get(axis, 1) for axis in (ins, outs))
            found[node.name or node.outputs[0].name or ""] = (inputs, outputs, layers.macs(node))
    return found
