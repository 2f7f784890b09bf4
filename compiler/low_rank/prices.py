"""What the items on a menu cost in multiply-accumulates and, where a target is at hand, in milliseconds.

Every item is a chain in one network: the i-th network has the i-th choice of each layer, as random numbers of the right
shapes, whose nodes' MACs are counted. Networks that have each form of each layer at its highest and at its lowest rank,
and others as far as that goes, are timed side by side as they will run; the table of shapes (latency/table.py)
foretells the ranks in between. Shapes that were timed before are not timed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...passes import factorize
from .. import job, layers
from ..delivery import Delivery, table_of
from ..latency.shapes import Shape, name_of, on_input, shapes
from ..latency.table import LatencyTable
from .menu import Item, groups_of, stand_in

if TYPE_CHECKING:
    from ..job import Job


#: How many layers a chain has.
_LINKS = {"svd": 2, "channels": 2, "spatial": 2, "tucker": 3, "cp": 4}
#: Networks that are timed beside the whole one: as many as five forms have ends.
_TIMED = 10


@dataclass(frozen=True, eq=False)
class Prices:
    """A menu with what its items cost, and what the whole network does: with layers that are on no menu.

    MACs are None where those of some layer are not known; milliseconds, and their misfit, where nothing was timed.
    """

    menu: Mapping[str, Sequence[Item]]
    whole_macs: int | None = None
    whole_ms: float | None = None
    misfit: float | None = None

    def without_times(self) -> Prices:
        """Return the same without milliseconds."""
        menu = {name: [replace(item, ms=None) for item in items] for name, items in self.menu.items()}
        return Prices(menu, self.whole_macs)


def priced(this: Job, model: ir.Model, menu: Mapping[str, Sequence[Item]], run: Delivery | None) -> Prices:
    """Return the menu with MACs and, where it is said how networks will `run`, milliseconds."""
    feed, most = job.one_input(this), max((len(items) for items in menu.values()), default=1)
    networks = [network(model, {n: i for n, items in menu.items() if i < len(items)}, menu) for i in range(1, most)]
    shaped = [{shape.node: shape for shape in shapes(one, feed)} for one in (model, *networks)]
    table = None
    if run is not None and networks:
        table = table_of(this, [model, *(network(model, plan, menu) for plan in plans(menu))], feed, {}, run)
    counted = [macs_of(one, feed) for one in (model, *networks)]
    by_name = [{name_of(node): node for node in one.graph} for one in (model, *networks)]
    found: dict[str, list[Item]] = {}
    for name, items in menu.items():
        found[name] = []
        for i, item in enumerate(items):
            nodes = nodes_of(by_name[i][name], item)
            macs = sum(counted[i].get(node) or 0 for node in nodes)
            found[name].append(replace(item, macs=macs, ms=_ms(table, shaped[i], nodes)))
    every = list(counted[0].values())
    total = None if any(macs is None for macs in every) else sum(macs or 0 for macs in every)
    if table is None:
        return Prices(found, total)
    whole = table.call_ms + sum(table.ms(shape.family, *shape.amounts({})) or 0.0 for shape in shaped[0].values())
    return Prices(found, total, whole, table.misfit)


def nodes_of(layer: ir.Node, item: Item) -> list[str]:
    """Return the names of the nodes that a layer became: itself and those of its chain before it."""
    links = 1 if item.choice is None else _LINKS[item.choice.form]
    found = [layer]
    while len(found) < links:
        before = found[-1].inputs[0].producer() if found[-1].inputs[0] is not None else None
        assert before is not None, "a chain is shorter than its form"
        found.append(before)
    return [name_of(node) for node in found]


def plans(menu: Mapping[str, Sequence[Item]]) -> list[dict[str, int]]:
    """Return which item of each layer is in which network: each form's highest rank and its lowest, then others.

    Each layer begins elsewhere, so that the networks are mixtures, as those will be that are foretold: were all layers
    of one size in each, a network of small ones would stay in the caches that mixtures do not fit into.
    """
    order: dict[str, list[int]] = {}
    for name, items in menu.items():
        by_form: dict[str, list[int]] = {}
        for i, item in enumerate(items):
            if item.choice is not None:
                by_form.setdefault(item.choice.form, []).append(i)
        ends = [i for found in by_form.values() for i in (found[0], found[-1])]
        middle = [found[len(found) // 2] for found in by_form.values()]
        order[name] = list(dict.fromkeys([*ends, *middle, *(i for found in by_form.values() for i in found)]))
    count = min(max(map(len, order.values()), default=0), _TIMED)
    starts = {name: place * len(found) // len(order) for place, (name, found) in enumerate(order.items())}
    return [
        {name: found[(starts[name] + i) % len(found)] for name, found in order.items() if found} for i in range(count)
    ]


def network(model: ir.Model, plan: Mapping[str, int], menu: Mapping[str, Sequence[Item]]) -> ir.Model:
    """Return the model with these items, by number, as chains of random numbers; layers without one stay."""
    nodes = {name_of(node): node for node in model.graph}
    chains = {}
    for name, i in plan.items():
        choice = menu[name][i].choice
        if choice is not None:
            weight = nodes[name].inputs[1]
            assert weight is not None and weight.const_value is not None
            chains[name] = stand_in(choice, groups_of(nodes[name], tuple(weight.const_value.shape.numpy())))
    return factorize.factorized(model, chains)


def macs_of(model: ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, int | None]:
    """Return the MACs of each linear node on this input; None of those whose shapes remain unknown."""
    twin = on_input(model, feed)
    return {name_of(node): layers.macs(node) for node in twin.graph if node.op_type in layers.LINEAR}


def _ms(table: LatencyTable | None, found: Mapping[str, Shape], nodes: Sequence[str]) -> float | None:
    """Return the milliseconds of some nodes; None where the table does not know one of them."""
    if table is None:
        return None
    times = [table.ms(found[n].family, *found[n].amounts({})) if n in found else None for n in nodes]
    return None if any(ms is None for ms in times) else sum(ms or 0.0 for ms in times)
