"""What the nodes of a network take on the target with some of its channels cut, in the precision that is delivered.

Networks with random cuts are made of the model and timed side by side as they will run (delivery.py); the table of
their layers' shapes predicts all other cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...passes.channel_cuts import ChannelGroup, ChannelGroups
from .. import job
from .. import model as model_io
from ..delivery import Delivery, keep, table_of, timed
from ..latency.shapes import Shape, shapes
from ..latency.table import LatencyTable, Timed
from . import costs
from .costs import Costs
from .structure import Structure

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..job import Job

#: Networks that are timed; fewer of those with more bytes of weights than LARGE, which are slower and larger.
_NETWORKS, _FEW, LARGE = 16, 8, 20_000_000
#: A group keeps at least this part of its units in what is timed.
_LEAST = 0.25
#: How often a proposal is timed, and how well what was foretold of it must hold.
_PROPOSALS, _AGREED = 5, 0.02


@dataclass
class Pricing:
    """The milliseconds of a model's nodes by what is cut of it, on one input, as `run` delivers it.

    `table` grows: what an allocation proposes is timed itself before it is believed (`settled`). `left_behind`: what is
    there only once a branch is gone, by its name; `timed`: the proposals so far.
    """

    this: Job
    model: ir.Model
    structure: Structure
    feed: Mapping[str, np.ndarray]
    run: Delivery
    table: LatencyTable
    left_behind: dict[str, float] = field(default_factory=dict)
    timed: list[dict[str, list[int]]] = field(default_factory=list)

    @classmethod
    def of(cls, this: Job, model: ir.Model, structure: Structure, steps: Mapping[str, int], run: Delivery) -> Pricing:
        """Time cuts of the model, or take what is known from before."""
        feed, axes = job.one_input(this), structure.axes
        count = _FEW if model_io.weights_bytes(model) > LARGE else _NETWORKS
        cuts = variants(structure.groups, steps, count, this.options.seed)
        networks = [structure.cut(model, gone) for gone in cuts]
        return cls(this, model, structure, feed, run, table_of(this, networks, feed, axes, run))

    def costs(self) -> Costs:
        """Return the milliseconds as costs of what is cut."""
        found = self.structure.timed(self._shapes(self.model), self.table)
        return found.adding({name: costs.once_gone(name, ms) for name, ms in self.left_behind.items()})

    def settled(self, propose: Callable[[Costs], dict[str, list[int]]]) -> dict[str, list[int]]:
        """Return what is proposed once what is foretold of it holds.

        The best of many cuts is the one of which too much is foretold, more often than not. So it is timed, which the
        next proposal knows of, until proposal and table agree.
        """
        for _ in range(_PROPOSALS):
            priced = self.costs()
            removed = propose(priced)
            if not any(removed.values()):
                break
            network = self.structure.cut(self.model, removed)
            found = self._shapes(network)
            if removed in self.timed and all(self.table.knows(s.family, *s.amounts({})) for s in found):
                break
            whole, other = self._time([self.model, network])
            self.timed.append(removed)
            self.table = self.table.learned(whole, priced.of({}), other)
            self.table = keep(self.this, self.table, self.run)
            real = self.table.call_ms + sum(self.table.ms(s.family, *s.amounts({})) or 0.0 for s in found)
            if abs(priced.of(removed) / real - 1) <= _AGREED:
                break
            self._learn_what_is_left_behind(removed, real)
        return removed

    def _learn_what_is_left_behind(self, removed: Mapping[str, Sequence[int]], real: float) -> None:
        """Put what a cut network takes beyond its nodes as they were on its branches: constants are added there."""
        _, chosen = self.structure.split(removed)
        beyond = real - self.costs().of(removed)
        for branch in chosen:
            self.left_behind[branch.name] = max(self.left_behind.get(branch.name, 0.0) + beyond / len(chosen), 0.0)

    def _shapes(self, network: ir.Model) -> tuple[Shape, ...]:
        return shapes(network, self.feed, self.structure.axes)

    def _time(self, networks: Sequence[ir.Model]) -> list[Timed]:
        return timed(self.this, networks, self.feed, self.structure.axes, self.run)


def variants(groups: ChannelGroups, steps: Mapping[str, int], count: int, seed: int) -> list[dict[str, list[int]]]:
    """Return `count` random cuts, the first of nothing; every group has each of its sizes about equally often."""
    rng = np.random.default_rng(seed)
    sizes = {group.name: _sizes(group, steps.get(group.name, 1)) for group in groups}
    drawn = {
        name: rng.permutation([left[i * len(left) // (count - 1)] for i in range(count - 1)])
        for name, left in sizes.items()
    }
    cuts: list[dict[str, list[int]]] = [{}]
    for i in range(count - 1):
        cuts.append(groups.feasible({g.name: range(int(drawn[g.name][i]), g.units) for g in groups}))
    return cuts


def _sizes(group: ChannelGroup, step: int) -> Sequence[int]:
    """Return how many units the group may keep, ascending: all of them, or some steps fewer."""
    return [left for left in range(group.units % step, group.units + 1, step) if left >= max(1, _LEAST * group.units)]
