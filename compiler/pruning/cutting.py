"""One model, its groups and their rankings, made once; and the networks that are cut from it, repaired and proven."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...passes import channel_cuts, pruning
from ...passes.channel_cuts import ChannelGroups, Removed
from .. import layers, trials
from .. import model as model_io
from ..candidates import Candidate, save
from ..fitting.feeds import calibration_feeds
from ..proof import Prover
from ..types import PassRecord, PrunedLayer, PruneTrial, Pruning
from . import allocation, importance
from .costs import Costs
from .repair import repaired

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..job import Job
    from ..options import Prune

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
class Made:
    """A cut network, repaired and not. `removed`: the units that are gone, by group."""

    candidate: Candidate
    unrepaired: Candidate
    removed: Removed


@dataclass(frozen=True, eq=False)
class Cutting:
    """The model, its groups, and their rankings. `before` are the records of what was joined to find them."""

    this: Job
    model: ir.Model
    groups: ChannelGroups
    feeds: Sequence[Mapping[str, np.ndarray]]
    rankings: Mapping[str, importance.Ranking]
    before: Sequence[PassRecord]
    start: float

    @classmethod
    def of(cls, this: Job, model: ir.Model, before: Sequence[PassRecord], start: float) -> Cutting:
        """Find and rank what can be cut of `model`. There must be images."""
        assert this.images is not None
        groups = channel_cuts.groups(model)
        feeds = calibration_feeds(model, this.images, threads=this.threads) if groups.groups else []
        rankings = importance.rank(
            model, groups.groups, feeds, seed=this.options.seed, threads=this.threads, progress=this.progress
        ) if groups.groups else {}  # fmt: skip
        return cls(this, model, groups, feeds, rankings, [r for r in before if r.modified], start)

    @property
    def steps(self) -> dict[str, int]:
        """How many units of each group go at a time."""
        return steps_of(self.groups, self.this.profile.kind)

    def proposed(self, costs: Costs, saved: float) -> Removed:
        """Return the units that go, so that the part `saved` of the cost does, or as much as there is."""
        return self.groups.feasible(allocation.allocate(costs, self.rankings, saved, self.steps))

    def made(self, removed: Removed, work: Path, name: str) -> Made | str:
        """Return the network without these units, as files in `work`; or why there is none."""
        if not any(removed.values()):
            return "no whole unit fits into what is to be cut"
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
            seconds=time.perf_counter() - self.start,
            nodes_before=len(self.model.graph),
            nodes_after=len(model.graph),
            rewrites=units,
            refusals=self.groups.refusals,
            notes=(f"the proof is that of the cut: the original with these {units} channels masked",),
            proof=proof,
        )
        stem = name.replace(" ", "-").replace("%", "")
        return Made(
            save(Candidate(name, "fp32", work / f"{stem}.onnx", model, (*self.before, record))),
            save(Candidate(f"{name}, not repaired", "fp32", work / f"{stem}-cut.onnx", cut)),
            removed,
        )

    def summary(
        self, request: Prune, made: Made | None, why: str, tried: Sequence[PruneTrial] = (), told: Sequence[str] = ()
    ) -> Pruning:
        """Return what the report says of it."""
        found = Pruning(
            asked=request.text,
            why=why,
            criterion="obs",
            groups=len(self.groups.groups),
            kept=False,
            refusals=self.groups.refusals,
            tried=tuple(tried),
            notes=tuple(told),
        )
        if made is None:
            return found
        before, after = sizes(self.model), sizes(made.candidate.model)
        judged = trials.judge(self.this, [made.unrepaired, made.candidate])
        rows = tuple(
            PrunedLayer(name, *before[name][:2], *after[name][:2], before[name][2], after[name][2])
            for name in before
            if name in after
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
            shape, (ins, outs) = weight.const_value.shape.numpy(), importance.axes_of(node)
            each = {ins if node.op_type == "Conv" else outs: node.attributes.get_int("group", 1)}  # of one group
            inputs, outputs = (shape[axis] * each.get(axis, 1) for axis in (ins, outs))
            found[node.name or node.outputs[0].name or ""] = (inputs, outputs, layers.macs(node))
    return found
