"""Close calls of the elimination decided by the whole network's error, after it was repaired.

The ranking (importance.py) sees what the next layers lose. What the outputs make of that differs, most of all where
several layers read a group: of the first such group that is cut, in the graph's order, units that went last are
exchanged, one for one, with those that would have gone next, the network is repaired each time, and the cut whose
outputs err least stands. Only one group: each try is a whole repair, though without what takes longest in one and
says the same of all (producers.py). On a detector whose first layer loses 8 of 24
channels this gained 0.2 to 0.5 dB on held-out photographs, in three drawings of 60 to fit to and 40 to judge by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...passes.branches import Branch
from ...passes.channel_cuts import ChannelGroup, ChannelGroups, Removed
from ..fitting.probe import Probe, is_large
from ..types import Progress, silent
from .importance import Ranking
from .repair import repaired

#: Exchanges that are tried. Large networks (probe.py) are left alone: a repair of theirs takes minutes.
TRIES = 8


def swapped(
    model: ir.Model,
    groups: ChannelGroups,
    removed: Mapping[str, Sequence[int]],
    rankings: Mapping[str, Ranking],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    branches: Sequence[Branch] = (),
    tries: int = TRIES,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> Mapping[str, Sequence[int]]:
    """Return `removed`, or the same with one unit of one group exchanged, whichever errs least on `feeds`."""
    first = _first(model, groups, removed, rankings)
    if first is None or is_large(model):
        return removed
    probe = Probe(model, feeds, threads)
    candidates: list[Mapping[str, Sequence[int]]] = [
        removed,
        *_exchanges(groups, removed, first.name, rankings[first.name].order, tries),
    ]
    errors = []
    for candidate in candidates:
        mended = repaired(model, candidate, feeds, branches=branches, makers=False, seed=seed, threads=threads)
        errors.append(probe.error(mended))
        progress("exchanging channels", len(errors), len(candidates))
    return candidates[int(np.argmin(errors))]


def _first(
    model: ir.Model, groups: ChannelGroups, removed: Removed, rankings: Mapping[str, Ranking]
) -> ChannelGroup | None:
    """Return the group that is made first, of those that are cut and read by several layers; None without any."""
    place = {node.name: i for i, node in enumerate(model.graph)}
    cut = [g for g in groups.groups if removed.get(g.name) and g.name in rankings and len(g.consumers) > 1]
    return min(cut, key=lambda group: min(place[name] for name in group.producers), default=None)


def _exchanges(
    groups: ChannelGroups, removed: Removed, name: str, order: Sequence[int], most: int
) -> list[dict[str, list[int]]]:
    """Return cuts with one unit exchanged, the closest calls first: the last to go against the first to stay."""
    units = next(group.units for group in groups.groups if group.name == name)
    ranked = [*order, *sorted(set(range(units)) - set(order))]  # what was never to go stands last
    gone = [unit for unit in reversed(ranked) if unit in removed[name]]
    kept = [unit for unit in ranked if unit not in removed[name]]
    pairs = sorted(((i, j) for i in range(len(gone)) for j in range(len(kept))), key=lambda pair: (sum(pair), pair))
    found = []
    for i, j in pairs[:most]:
        mine = [*(unit for unit in removed[name] if unit != gone[i]), kept[j]]
        candidate = {other: list(its) for other, its in removed.items()} | {name: mine}
        if groups.feasible(candidate) == candidate:
            found.append(candidate)
    return found
