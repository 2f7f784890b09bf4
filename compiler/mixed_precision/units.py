"""What mixed precision chooses for: the units of a network, and the tensors they hand to each other.

A unit is a node that can run on integers (role linear or combine) with the activation that its rounding absorbs and
the data movements behind it: these run on integers exactly where their source does, so there is nothing to choose.
A link is what one unit, one graph input or one node that always stays in float hands on: a tensor and its moved forms.
Between units of different precision the link pays a conversion (costs.py), and it is rounded, and adds its error
(contributions.py), as soon as one of its `rounded_by` runs on integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...passes.placement import Placement, output_tensor

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Unit:
    """One node with an integer form. `members` are the names of all nodes that share its precision, itself first.

    A unit that only joins its neighbours (role combine) runs on integers where one of `needs`, which it reads, does,
    and one of `feeds`, which read it; both are empty where it can by itself.
    """

    name: str
    role: str
    members: tuple[str, ...]
    needs: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """A tensor on its way. `producer` is a unit, None for what is float whatever is chosen, and so are `readers`.

    `elements` of one image, None where the shape is dynamic beyond the batch.
    """

    tensor: str
    producer: str | None
    readers: tuple[str | None, ...]
    rounded_by: tuple[str, ...]
    elements: int | None = None


@dataclass(frozen=True)
class Wiring:
    """The units in graph order, the links between them, and for every tensor of the graph the link it belongs to."""

    units: tuple[Unit, ...]
    links: tuple[Link, ...]
    link_of: Mapping[str, str]

    def realised(self, wanted: set[str]) -> set[str]:
        """Return the units that do run on integers when `wanted` are asked for: without those that cannot join."""
        useful: set[str] = set()
        for unit in reversed(self.units):
            if unit.name in wanted and (not unit.feeds or not useful.isdisjoint(unit.feeds)):
                useful.add(unit.name)
        done: set[str] = set()
        for unit in self.units:
            if unit.name in useful and (not unit.needs or not done.isdisjoint(unit.needs)):
                done.add(unit.name)
        return done


def wire(model: ir.Model, placement: Placement) -> Wiring:
    """Return the units and links of the float `model`, whose fullest quantization is `placement`."""
    homes: dict[ir.Value, str] = {value: value.name or "" for value in model.graph.inputs}
    producers: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    member_of: dict[ir.Node, str | None] = {}
    for node in model.graph:
        role = placement.nodes.get(node)
        if role == "move":
            home = homes[node.inputs[0]]  # type: ignore[index]  # a movement always has its input
        elif role is not None:
            home = output_tensor(node).name or ""
            producers[home] = node.name or ""
        else:
            absorbed = next((v for v in node.inputs if v is not None and homes.get(v) == node.outputs[0].name), None)
            home = homes[absorbed] if absorbed is not None else ""
        for value in node.outputs:
            homes[value] = home or value.name or ""
        member_of[node] = producers.get(homes[node.outputs[0]]) if home else None
        if member_of[node] is not None:
            members.setdefault(producers[home], []).append(node.name or "")
    units = {node.name or "": node for node, role in placement.nodes.items() if role != "move"}
    links = _links(homes, producers, placement, set(units.values()), member_of)
    readers = {link.producer: tuple(r for r in link.readers if r is not None) for link in links if link.producer}
    joining = {name for name, node in units.items() if placement.nodes[node] == "combine" and placement.produced}
    return Wiring(
        tuple(
            Unit(
                name,
                placement.nodes[node],
                tuple(members[name]),
                _needs(node, homes, producers, placement) if name in joining else (),
                readers[name] if name in joining else (),
            )
            for name, node in units.items()
        ),
        tuple(links),
        {value.name or "": home for value, home in homes.items()},
    )


def _links(
    homes: Mapping[ir.Value, str],
    producers: Mapping[str, str],
    placement: Placement,
    units: set[ir.Node],
    member_of: Mapping[ir.Node, str | None],
) -> list[Link]:
    """Collect the readers of each link; links that no unit has a part in are left out."""
    readers: dict[str, dict[str | None, None]] = {}
    rounded: dict[str, dict[str, None]] = {}
    sizes: dict[str, int | None] = {}
    for value, home in homes.items():
        reads, rounds = readers.setdefault(home, {}), rounded.setdefault(home, {})
        if value.name == home:
            sizes[home] = _elements(value)
        if home in producers and value in placement.produced:
            rounds.setdefault(producers[home])
        if value.is_graph_output():
            reads.setdefault(None)
        for node, i in value.uses():
            if node in units:
                reads.setdefault(node.name or "")
                if (node, i) in placement.reads:
                    rounds.setdefault(node.name or "")
            elif member_of.get(node) is None or member_of[node] != producers.get(home):
                reads.setdefault(None)
    return [
        Link(home, producers.get(home), tuple(reads), tuple(rounded[home]), sizes.get(home))
        for home, reads in readers.items()
        if home in producers or any(r is not None for r in reads)
    ]


def _needs(
    node: ir.Node, homes: Mapping[ir.Value, str], producers: Mapping[str, str], placement: Placement
) -> tuple[str, ...]:
    """A node that joins has an integer form only where an input is produced as integers (placement.py)."""
    values = [v for v in node.inputs if v is not None and v in placement.produced]
    return tuple(dict.fromkeys(producers[homes[v]] for v in values if homes[v] in producers))


def _elements(value: ir.Value) -> int | None:
    if value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else None for dim in value.shape]
    return None if None in dims[1:] else math.prod(d for d in dims[1:] if d is not None)
