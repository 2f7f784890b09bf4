"""What the items on a menu cost in multiply-accumulates and, where a target is at hand, in milliseconds.

Every item is a chain in one network: the i-th network has the i-th choice of each layer, as random numbers of the right
shapes. Their nodes' MACs are counted; some of the networks are timed side by side as they will run, and the table of
shapes (latency/table.py) foretells the rest. Shapes that were timed before are not timed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...passes import factorize
from .. import job, layers
from ..latency.shapes import Shape, name_of, shapes
from ..latency.table import LatencyTable
from ..pruning.latencies import Delivery, table_of
from .menu import Item, groups_of, stand_in

if TYPE_CHECKING:
    from ..job import Job

#: Networks that are timed beside the whole one.
_TIMED = 9


@dataclass(frozen=True, eq=False)
class Prices:
    """A menu with what its items cost; where milliseconds are known, those of the whole network, and their misfit."""

    menu: Mapping[str, Sequence[Item]]
    whole_ms: float | None = None
    misfit: float | None = None

    def without_times(self) -> Prices:
        """Return the same without milliseconds."""
        return Prices({name: [replace(item, ms=None) for item in items] for name, items in self.menu.items()})


def priced(this: Job, model: ir.Model, menu: Mapping[str, Sequence[Item]], run: Delivery | None) -> Prices:
    """Return the menu with MACs and, where it is said how networks will `run`, milliseconds."""
    networks = [_network(model, menu, i) for i in range(1, max((len(items) for items in menu.values()), default=1))]
    feed = job.one_input(this)
    shaped = [{shape.node: shape for shape in shapes(network, feed)} for network in (model, *networks)]
    table = None
    if run is not None and networks:
        chosen = networks[:: -(-len(networks) // _TIMED)]
        table = table_of(this, [model, *chosen], feed, {}, run)
    counted = [_macs(network) for network in (model, *networks)]
    found: dict[str, list[Item]] = {}
    for name, items in menu.items():
        found[name] = []
        for i, item in enumerate(items):
            nodes = nodes_of(name, item)
            macs = sum(counted[i].get(node, 0) for node in nodes)
            found[name].append(replace(item, macs=macs, ms=_ms(table, shaped[i], nodes)))
    if table is None:
        return Prices(found)
    whole = table.call_ms + sum(table.ms(shape.family, *shape.amounts({})) or 0.0 for shape in shaped[0].values())
    return Prices(found, whole, table.misfit)


def nodes_of(layer: str, item: Item) -> list[str]:
    """Return the names of the nodes of a layer as a choice: those that factorize.py gives them."""
    if item.choice is None:
        return [layer]
    links = {"svd": 2, "channels": 2, "spatial": 2, "tucker": 3, "cp": 4}[item.choice.form]
    return [*(f"{layer}_{item.choice.form}{i}" for i in range(links - 1)), layer]


def _network(model: ir.Model, menu: Mapping[str, Sequence[Item]], i: int) -> ir.Model:
    nodes = {name_of(node): node for node in model.graph}
    chains = {}
    for name, items in menu.items():
        choice = items[i].choice if i < len(items) else None
        if choice is not None:
            weight = nodes[name].inputs[1]
            assert weight is not None and weight.const_value is not None
            chains[name] = stand_in(choice, groups_of(nodes[name], tuple(weight.const_value.shape.numpy())))
    return factorize.factorized(model, chains)


def _macs(network: ir.Model) -> dict[str, int]:
    return {name_of(node): layers.macs(node) or 0 for node in network.graph if node.op_type in layers.LINEAR}


def _ms(table: LatencyTable | None, found: Mapping[str, Shape], nodes: Sequence[str]) -> float | None:
    """Return the milliseconds of some nodes; None where the table does not know one of them."""
    if table is None:
        return None
    times = [table.ms(found[n].family, *found[n].amounts({})) if n in found else None for n in nodes]
    return None if any(ms is None for ms in times) else sum(ms or 0.0 for ms in times)
