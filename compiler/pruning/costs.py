"""What a network costs, layer by layer, when some of its channels are cut: in MACs, in parameters, in milliseconds.

The cost of a layer is a function of the parts left along its axes,

    C(removed) = sum over layers l of c_l(left along axis 1, left along axis 2, …)

so what a cut saves depends on the others: a Conv between two groups that are halved costs a quarter. MACs and
parameters are c_l = whole_l * product of the parts. Milliseconds come from the table of shapes (latency/table.py), for
every node that computes, with or without a weight: there the axes are the channels of what it reads and writes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ...passes.channel_cuts import ChannelGroup
from .. import layers
from ..latency.shapes import Shape, name_of
from ..latency.table import LatencyTable


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis: which group's unit each of its `size` indices belongs to, by group name; -1 elsewhere."""

    size: int
    units: Mapping[str, np.ndarray]

    def left(self, removed: Mapping[str, Collection[int]]) -> float:
        """Return the part of the axis that is left without these units."""
        gone = sum(np.isin(units, list(removed.get(group, ()))).sum() for group, units in self.units.items())
        return 1 - float(gone) / self.size


@dataclass(frozen=True, eq=False)
class LayerCost:
    """What one layer costs: `of`, given the part that is left along each of its axes."""

    axes: tuple[Axis, ...]
    of: Callable[[Sequence[float]], float]


@dataclass(frozen=True, eq=False)
class Costs:
    """What each layer costs, by name, in `unit`; and what costs the same whatever is cut."""

    layers: Mapping[str, LayerCost]
    unit: str
    fixed: float = 0.0

    def of(self, removed: Mapping[str, Collection[int]]) -> float:
        """Return the cost of the network without these units."""
        return self.fixed + math.fsum(self.of_layer(name, removed) for name in self.layers)

    def of_layer(self, name: str, removed: Mapping[str, Collection[int]]) -> float:
        """Return the cost of one layer without these units."""
        layer = self.layers[name]
        return layer.of([axis.left(removed) for axis in layer.axes])

    def adding(self, more: Mapping[str, LayerCost]) -> Costs:
        """Return these costs and those of others."""
        return replace(self, layers={**self.layers, **more})

    def also(self, switches: Mapping[str, Sequence[Axis]]) -> Costs:
        """Return these costs where layers, by name, cost nothing any more once such an axis is gone."""
        found = dict(self.layers)
        for name, axes in switches.items():
            if name in found:
                found[name] = _switched(found[name], tuple(axes))
        return replace(self, layers=found)


def once_gone(name: str, cost: float) -> LayerCost:
    """Return what costs so much once a branch is gone, and nothing before."""
    return LayerCost((Axis(1, {name: np.zeros(1, np.intp)}),), lambda left: cost * (1 - left[0]))


def _switched(layer: LayerCost, switches: tuple[Axis, ...]) -> LayerCost:
    def of(left: Sequence[float]) -> float:
        whole = len(layer.axes)
        return layer.of(left[:whole]) if all(left[whole:]) else 0.0

    return LayerCost((*layer.axes, *switches), of)


# ------------------------------------------------------------------------------------------- counted


def counted(model: ir.Model, groups: Sequence[ChannelGroup], unit: str) -> Costs:
    """Return what the linear layers cost in "macs" or "params". Layers of unknown shape cost nothing."""
    axes = _axes(groups)
    found = {}
    for node in model.graph:
        if node.op_type not in layers.LINEAR or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        weight = node.inputs[1]
        if weight.const_value is None:
            continue
        name = name_of(node)
        whole = float(weight.const_value.size if unit == "params" else layers.macs(node) or 0)
        mine = tuple(axes.get((name, weight.name or ""), {}).values())
        found[name] = LayerCost(mine, functools.partial(_part_of, whole))
    return Costs(found, unit)


def _part_of(whole: float, left: Sequence[float]) -> float:
    return whole * math.prod(left)


def _axes(groups: Sequence[ChannelGroup]) -> dict[tuple[str, str], dict[int, Axis]]:
    """Return the axes of tensors, and of constants as each node reads them: (node or "", tensor) -> axis -> Axis."""
    found: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]] = {}
    for group in groups:
        for member in group.members:
            found.setdefault((member.node, member.tensor), {}).setdefault(member.axis, {})[group.name] = member.units
    return {
        key: {axis: Axis(len(next(iter(units.values()))), units) for axis, units in by_axis.items()}
        for key, by_axis in found.items()
    }


# ------------------------------------------------------------------------------------------- timed


def timed(groups: Sequence[ChannelGroup], shapes: Sequence[Shape], table: LatencyTable) -> Costs:
    """Return what the nodes of a network cost in milliseconds; what the table does not know costs nothing."""
    axes = {tensor: next(iter(found.values())) for (node, tensor), found in _axes(groups).items() if not node}
    return Costs({shape.node: _timed(shape, axes, table) for shape in shapes}, "ms", table.call_ms)


def _timed(shape: Shape, axes: Mapping[str, Axis], table: LatencyTable) -> LayerCost:
    names = list(dict.fromkeys(port.tensor for port in (*shape.inputs, *shape.outputs) if port.tensor in axes))

    def of(left: Sequence[float]) -> float:
        return table.ms(shape.family, *shape.amounts(dict(zip(names, left, strict=True)))) or 0.0

    return LayerCost(tuple(axes[name] for name in names), of)
