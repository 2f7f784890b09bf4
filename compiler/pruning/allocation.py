"""How many units each group gives up: the least error for what is to be saved.

    minimise    sum over groups g of e_g(r_g)       subject to      C(r) <= (1 - saved) C(0)

r_g units of group g are cut, in the order of its elimination; e_g is its error curve (importance.py). The cost of
layer l is proportional to the elements of its weight that are left, which is a product over the weight's axes,

    C(r) = sum over l of c_l prod over axes a of (elements left along a / elements along a)

so what a cut saves depends on the others: a Conv between two groups that are halved costs a quarter. c_l is a layer's
MACs or its parameters. The greedy walk is passes/pruning.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes import pruning
from ...passes.channel_cuts import ChannelGroup
from .. import layers
from .importance import Ranking

#: How many steps at a time are tried to be given back: a curve may be level for a while.
STRIDES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a weight: which group's unit each index belongs to, by group name; -1 elsewhere; `size` indices."""

    size: int
    units: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Costs:
    """What each layer costs, and how its weight shrinks: `whole` (layer -> cost), `axes` (layer -> its cut axes)."""

    whole: Mapping[str, float]
    axes: Mapping[str, tuple[Axis, ...]]

    def of(self, removed: Mapping[str, Collection[int]]) -> float:
        """Return the cost of the network without these units."""
        return sum(self.of_layer(name, removed) for name in self.whole)

    def of_layer(self, name: str, removed: Mapping[str, Collection[int]]) -> float:
        """Return the cost of one layer without these units."""
        cost = self.whole[name]
        for axis in self.axes.get(name, ()):
            gone = sum(np.isin(units, list(removed.get(group, ()))).sum() for group, units in axis.units.items())
            cost *= 1 - float(gone) / axis.size
        return cost


def costs(model: ir.Model, groups: Sequence[ChannelGroup], kind: str) -> Costs:
    """Return what the layers of a model cost, in "macs" or "params". Layers of unknown shape cost nothing."""
    axes: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for group in groups:
        for member in group.members:
            if member.node:
                axes.setdefault(f"{member.node}\0{member.tensor}", {}).setdefault(member.axis, {})[group.name] = (
                    member.units
                )
    whole, shrinks = {}, {}
    for node in model.graph:
        if node.op_type not in layers.LINEAR or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        weight = node.inputs[1]
        name = node.name or node.outputs[0].name or node.op_type
        if weight.const_value is None:
            continue
        whole[name] = float(weight.const_value.size if kind == "params" else layers.macs(node) or 0)
        found = axes.get(f"{name}\0{weight.name}", {})
        shrinks[name] = tuple(Axis(len(next(iter(by.values()))), by) for by in found.values())
    return Costs(whole, shrinks)


def allocate(
    costs: Costs, rankings: Mapping[str, Ranking], saved: float, steps: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """Return the units to remove of each group, so that the part `saved` of the cost goes, or as much as there is.

    `steps`: group -> how many units go at a time, 1 if not named. At least one unit of each group stays.
    """
    names, tables = list(rankings), _tables(costs, rankings)
    curves = [ranking.curve for ranking in rankings.values()]
    sizes, budget = [(steps or {}).get(name, 1) for name in names], (1 - saved) * costs.of({})

    def cost(cuts: Sequence[int]) -> float:
        taken = dict(zip(names, cuts, strict=True))
        return math.fsum(
            whole * math.prod(1 - sum(gone[taken[group]] for group, gone in axis.items()) for axis in tables[name])
            for name, whole in costs.whole.items()
        )

    cuts = pruning.allocate(
        curves,
        cost,
        budget,
        steps=sizes,
        least=[0] * len(names),  # the curves end before the last unit
    )
    cuts = _given_back(curves, cost, budget, sizes, cuts)
    return {name: list(rankings[name].order[:count]) for name, count in zip(names, cuts, strict=True) if count}


def _given_back(
    curves: Sequence[np.ndarray],
    cost: Callable[[Sequence[int]], float],
    budget: float,
    steps: Sequence[int],
    cuts: Sequence[int],
) -> list[int]:
    """Return fewer cuts where the last strides of the walk went past the budget: what costs most error comes back."""
    cuts = list(cuts)
    while True:
        fewer = [
            (float(curve[taken] - curve[to]), [to if i == group else k for i, k in enumerate(cuts)])
            for group, (curve, step, taken) in enumerate(zip(curves, steps, cuts, strict=True))
            for to in (taken - step * stride for stride in STRIDES)
            if to >= 0
        ]
        fitting = [(back, to) for back, to in fewer if back > 0 and cost(to) <= budget]
        if not fitting:
            return cuts
        _, cuts = max(fitting)


def _tables(costs: Costs, rankings: Mapping[str, Ranking]) -> dict[str, list[dict[str, np.ndarray]]]:
    """Return, by layer and axis, which part of the axis goes with the first 0, 1, 2, … units of each group's order."""

    def parts(axis: Axis, group: str) -> np.ndarray:
        order = np.asarray(rankings[group].order, np.intp)
        inside = axis.units[group][axis.units[group] >= 0]
        counts = np.bincount(inside, minlength=int(order.max(initial=0)) + 1)
        return np.concatenate([[0], np.cumsum(counts[order])]) / axis.size

    return {
        name: [{group: parts(axis, group) for group in axis.units if group in rankings} for axis in costs.axes[name]]
        for name in costs.whole
    }
