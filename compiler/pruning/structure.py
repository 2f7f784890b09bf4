"""What of a model can go: units of channels, and whole branches of residual sums. Both are named, and cut together.

What goes is a mapping of names to units; a branch has the one unit 0. Channels are cut before branches, since the names
of groups are those in the whole model; a group inside a branch may go with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ...passes import branch_rewrites, channel_cuts
from ...passes.branches import Branch, Branches
from ...passes.branches import branches as find_branches
from ...passes.channel_cuts import ChannelGroups
from ..latency.shapes import Shape
from ..latency.table import LatencyTable
from ..types import Refusal
from . import costs
from .branch_ranking import branch_axes
from .costs import Costs


@dataclass(frozen=True, eq=False)
class Structure:
    """The groups of channels and the branches of one model."""

    groups: ChannelGroups
    branches: Branches

    @classmethod
    def of(cls, model: ir.Model) -> Structure:
        """Find them; `model`, which has been normalised, is not changed."""
        return cls(channel_cuts.groups(model), find_branches(model))

    def __bool__(self) -> bool:
        return bool(len(self.groups) or len(self.branches))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """What was not understood, or must stay whole."""
        return (*self.groups.refusals, *self.branches.refusals)

    @property
    def axes(self) -> dict[str, int]:
        """Along which axis each tensor that has units of some group is cut."""
        return {member.tensor: member.axis for group in self.groups for member in group.members if not member.node}

    def split(self, removed: Mapping[str, Sequence[int]]) -> tuple[dict[str, Sequence[int]], tuple[Branch, ...]]:
        """Return the units of channels, and the branches; of two branches of one sum the one named first."""
        names = {branch.name for branch in self.branches}
        units = {name: gone for name, gone in removed.items() if name not in names}
        return units, self.branches.feasible([name for name, gone in removed.items() if name in names and gone])

    def feasible(self, removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return what can go of it without leaving a tensor empty, or a sum without operands."""
        units, chosen = self.split(removed)
        return {**self.groups.feasible(units), **{branch.name: [0] for branch in chosen}}

    def cut(self, model: ir.Model, removed: Mapping[str, Sequence[int]]) -> ir.Model:
        """Return the model without what is removed; `model` is not changed."""
        units, chosen = self.split(removed)
        return branch_rewrites.removed(channel_cuts.cut(model, units), chosen)

    def mask(self, model: ir.Model, removed: Mapping[str, Sequence[int]]) -> ir.Model:
        """Return the model with what is removed taken as 0: what `cut` must be equal to."""
        units, chosen = self.split(removed)
        return channel_cuts.mask(branch_rewrites.silenced(model, chosen), units)

    def counted(self, model: ir.Model, unit: str) -> Costs:
        """Return what the layers cost in "macs" or "params"."""
        return costs.counted(model, self.groups.groups, unit).also(branch_axes(self.branches.branches))

    def timed(self, shapes: Sequence[Shape], table: LatencyTable) -> Costs:
        """Return what the nodes of these shapes cost in milliseconds."""
        return costs.timed(self.groups.groups, shapes, table).also(branch_axes(self.branches.branches))
