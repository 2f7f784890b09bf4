"""What the nodes of a network take on the target with some of its channels cut, in the precision that is delivered.

Networks with random cuts are made of the model, quantized where integers are what will run (how they round does not
matter for their latency), and timed side by side (latency/networks.py); the table of their layers' shapes predicts all
other cuts. Shapes that were timed before, of this model or another, are not timed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ...passes.channel_cuts import ChannelGroup, ChannelGroups
from .. import job, memory
from .. import model as model_io
from ..candidates import Candidate, save
from ..latency import table as tables
from ..latency.networks import time_networks
from ..latency.shapes import Shape, shapes
from ..latency.table import LatencyTable, Timed
from ..memory import Memory
from ..options import STEPS
from ..proof import Prover
from ..quantization.quantizer import Quantizer
from ..quantization.search import search
from ..types import Range
from . import costs
from .costs import Costs
from .structure import Structure

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..job import Job

#: Networks that are timed; fewer of those with more bytes of weights than LARGE, which are slower and larger.
_NETWORKS, _FEW, LARGE = 16, 8, 20_000_000
#: Seconds of timing for each of them.
_SECONDS = 0.5
#: A group keeps at least this part of its units in what is timed.
_LEAST = 0.25
#: A table that fits what was measured worse than this is not kept for the next time: the machine was busy.
_BELIEVED = 0.15
#: How often a proposal is timed, and how well what was foretold of it must hold.
_PROPOSALS, _AGREED = 5, 0.02


@dataclass(frozen=True, eq=False)
class Delivery:
    """What will run: its precision's name, and how to make something as fast of a float network.

    `rounded` makes a candidate of a float one that is about as good, or bad, as what will run: calibrated by extremes.
    """

    precision: str
    make: Callable[[ir.Model], ir.Model]
    rounded: Callable[[Candidate], Candidate] = lambda one: one

    def delivered(self, one: Candidate) -> Candidate:
        """Return a float candidate as fast as it will be, under its own name; its quality is that of its floats."""
        path = one.path.with_name(f"{one.path.stem}-delivered.onnx")
        return save(Candidate(one.name, one.precision, path, self.make(one.model), judged=one.path))


#: What runs in floats as it is.
FLOATS = Delivery("fp32", lambda model: model)


def delivery(this: Job) -> Delivery:
    """Return the precision that cuts are made for: integers wherever they will be tried, else floats."""
    scheme = job.quant_scheme(this)
    if scheme is None or scheme.activation is None:
        return FLOATS
    supports = this.backend.supports

    def quantized(model: ir.Model) -> ir.Model:
        return Quantizer(model, supports, scheme, _ranges(model)).build().model

    def rounded(one: Candidate) -> Candidate:
        plainly = replace(this.options, method="minmax", without=tuple(step for step in STEPS if step != "ranges"))
        found = search(replace(this, options=plainly), one.model, scheme, Prover(one.model))
        path = one.path.with_name(f"{one.path.stem}-rounded.onnx")
        return save(Candidate(one.name, one.precision, path, found.quantizer.build().model))

    return Delivery("int8" if this.options.precision == "auto" else this.options.precision, quantized, rounded)


def _ranges(model: ir.Model) -> dict[str, Range]:
    """Return made-up ranges: what a rectifier gives is not negative, as it will be."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    rectified = {value for node in model.graph if node.op_type in ("Relu", "Clip") for value in node.outputs}
    return {value.name: Range(0.0 if value in rectified else -1.0, 1.0) for value in values if value.name}


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
            self._keep()
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
        return time_networks(
            networks, self.feed, axes=self.structure.axes, run_as=self.run.make, threads=self.this.threads,
            seconds=_SECONDS * len(networks), progress=self.this.progress,
        )  # fmt: skip

    def _keep(self) -> None:
        if self.table.misfit <= _BELIEVED:
            with _kept(self.this, self.run) as kept:
                self.table = tables.remember(kept, self.table)


def table_of(
    this: Job,
    networks: Sequence[ir.Model],
    feed: Mapping[str, np.ndarray],
    axes: Mapping[str, int],
    run: Delivery,
) -> LatencyTable:
    """Time networks as they will run, or take what is known of the shapes of their layers from before."""
    wanted: dict[str, list[tuple[float, float]]] = {}
    for network in networks:
        for shape in shapes(network, feed, axes):
            wanted.setdefault(shape.family, []).append(shape.amounts({}))
    with _kept(this, run) as kept:
        table = tables.recall(kept, wanted)
        if table is None:
            table = tables.from_timed(time_networks(
                networks, feed, axes=axes, run_as=run.make, threads=this.threads,
                seconds=_SECONDS * len(networks), progress=this.progress,
            ))  # fmt: skip
            table = tables.remember(kept, table) if table.misfit <= _BELIEVED else table
        return table


def _kept(this: Job, run: Delivery) -> AbstractContextManager[Memory]:
    """Return where the shapes that were timed on this machine, and run so, are kept."""
    parts = {"precision": run.precision, "backend": this.backend.name, **memory.of_machine(this.threads)}
    return closing(Memory(memory.context("layers", **parts)))


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
