"""How many units each group gives up: the least error for what is to be saved.

    minimise    sum over groups g of e_g(r_g)       subject to      C(r) <= limit

r_g units of group g are cut, in the order of its elimination; e_g is its error curve (importance.py), C what the
network then costs (costs.py), in MACs, parameters or milliseconds. The greedy walk is passes/pruning.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...passes import pruning
from .costs import Costs
from .importance import Ranking

#: How many steps at a time are tried to be given back: a curve may be level for a while.
STRIDES = (1, 2, 4, 8, 16, 32, 64)


def allocate(
    costs: Costs, rankings: Mapping[str, Ranking], saved: float, steps: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """Return the units to remove of each group, so that the part `saved` of the cost goes, or as much as there is.

    `steps`: group -> how many units go at a time, 1 if not named. At least one unit of each group stays.
    """
    names = list(rankings)
    curves = [ranking.curve for ranking in rankings.values()]
    sizes, limit = [(steps or {}).get(name, 1) for name in names], (1 - saved) * costs.of({})
    cost = _by_cuts(costs, rankings)
    cuts = pruning.allocate(
        curves,
        cost,
        limit,
        steps=sizes,
        least=[0] * len(names),  # the curves end before the last unit
    )
    cuts = _given_back(curves, cost, limit, sizes, cuts)
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


def _by_cuts(costs: Costs, rankings: Mapping[str, Ranking]) -> Callable[[Sequence[int]], float]:
    """Return the cost as a function of how many units each group loses, in its order; each layer is asked once.

    A layer's cost changes with its own groups only, so it is kept by how many units these have lost.
    """
    place = {name: i for i, name in enumerate(rankings)}
    layers = []
    fixed = [costs.fixed]
    for layer in costs.layers.values():
        parts = [{place[g]: _parts(units, axis.size, rankings[g]) for g, units in axis.units.items() if g in place}
                 for axis in layer.axes]  # fmt: skip
        mine = sorted({group for axis in parts for group in axis})
        if mine:
            layers.append((layer, parts, mine, dict[tuple[int, ...], float]()))
        else:
            fixed.append(layer.of([1.0] * len(layer.axes)))
    base = math.fsum(fixed)

    def cost(cuts: Sequence[int]) -> float:
        total = base
        for layer, parts, mine, seen in layers:
            key = tuple([cuts[group] for group in mine])
            found = seen.get(key)
            if found is None:
                left = [1 - sum(gone[cuts[group]] for group, gone in axis.items()) for axis in parts]
                found = seen[key] = layer.of([float(part) for part in left])
            total += found
        return total

    return cost


def _parts(units: np.ndarray, size: int, ranking: Ranking) -> np.ndarray:
    """Return which part of an axis goes with the first 0, 1, 2, … units of a group's order."""
    order = np.asarray(ranking.order, np.intp)
    counts = np.bincount(units[units >= 0], minlength=int(order.max(initial=0)) + 1)
    return np.concatenate([[0], np.cumsum(counts[order])]) / size
