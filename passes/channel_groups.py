"""Which channels of a network are rescaled together: each element of each tensor gets the number of a variable.

Algebra. Multiply every element x_e of every tensor by a positive factor f[v(e)], v(e) the element's variable:

    y = f(x) commutes with that   where y's elements depend on x's of the same variable only, and f(a x) = a f(x), a > 0
    y = x + z                     needs equal variables on both sides, element by element
    y = W x + b                   W[o,i] -> W[o,i] f[v(y_o)] / f[v(x_i)],   b[o] -> b[o] f[v(y_o)]

A linear operator with constant weights therefore *consumes* the variables of its input and gives its output new ones;
all others hand variables on, tie some of them together, or pin them, which makes their factor 1 (channel_rules.py).
channel_analysis.py has the walk. The network's outputs are the same for any choice of the other factors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .channel_analysis import PINNED, Analysis, trimmed
from .channel_rules import RULES
from .weights import Stays, changeable

__all__ = ["PINNED", "ChannelVariables", "Layer", "Rescaled", "Scaling", "analyse"]

#: A constant may grow to this many elements, where its elements need factors of their own.
_GROWN = 1 << 16

# ------------------------------------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False)
class Rescaled:
    """A constant input of a node and the variables that its elements follow.

    With factors f, its new value is `constant * f[up] / f[down]`, where absent is 1. `up` and `down` broadcast with
    the constant; its shape may grow thereby.
    """

    node: ir.Node
    index: int
    up: np.ndarray | None = None
    down: np.ndarray | None = None

    @property
    def value(self) -> ir.Value:
        """The constant."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear operator with a constant weight: the variables of its input and output channels, both 1-D."""

    node: ir.Node
    inputs: np.ndarray
    outputs: np.ndarray


@dataclass(frozen=True, eq=False)
class ChannelVariables:
    """The variables of a model; `count` of them, 0 included.

    `constants` has all that must be rescaled, `layers` those nodes that join two sets of variables by a weight.
    `unclipped` are nodes that limit their input and were said never to do so.
    """

    count: int
    constants: tuple[Rescaled, ...]
    layers: tuple[Layer, ...]
    unclipped: tuple[ir.Node, ...]
    refusals: tuple[Refusal, ...]
    tensors: Mapping[str, np.ndarray]

    def of(self, value: ir.Value | str) -> np.ndarray | None:
        """Return the variables of a tensor of the main graph, int64, of the tensor's rank (see above).

        None where nothing is known of the tensor, which is then pinned.
        """
        name = value if isinstance(value, str) else value.name
        return self.tensors.get(name or "")

    def channels(self, value: ir.Value | str) -> tuple[int | None, np.ndarray]:
        """Return the one axis along which a tensor's variables differ, and the variables along it, 1-D.

        The axis is None where all elements have the same variable (one number then). Tensors whose variables depend
        on several axes have the axis None, too, and count as pinned.
        """
        ids = self.of(value)
        axes = [] if ids is None else [axis for axis, size in enumerate(ids.shape) if size > 1]
        if ids is None or len(axes) > 1:
            return None, np.array([PINNED])
        return (axes[0] if axes else None), ids.reshape(-1)

    @property
    def pinned(self) -> np.ndarray:
        """One boolean a variable: whether its factor must be 1."""
        return np.array([variable == PINNED for variable in range(self.count)])


def analyse(model: ir.Model, unreached: Collection[str] = ()) -> ChannelVariables:
    """Find the channel variables of the main graph; `model` is not changed.

    `unreached` names outputs of Clip nodes whose finite limits no data reaches: they count as ReLUs.
    """
    work = Scaling(model.graph, unreached=frozenset(unreached))
    work.walk(model)
    return work.result()


# ------------------------------------------------------------------------------------------- the work


@dataclass
class Scaling(Analysis):
    """The analysis of channels that are rescaled, with what its rules record."""

    title: ClassVar[str] = "channel-groups"

    unreached: frozenset[str] = frozenset()
    layers: list[Layer] = field(default_factory=list)
    constants: list[Rescaled] = field(default_factory=list)
    unclipped: list[ir.Node] = field(default_factory=list)

    def rule_of(self, node: ir.Node) -> Callable[[ir.Node], Sequence[np.ndarray]]:
        """Look the operator up in the table of channel_rules.py."""
        if node.op_type not in RULES:
            raise Stays(f"{node.op_type} does not commute with scaling channels, or there is no rule for it")
        return partial(RULES[node.op_type], self)

    def records(self) -> tuple[list[Any], ...]:
        """Return all that rules record."""
        return self.layers, self.constants, self.unclipped

    def result(self) -> ChannelVariables:
        """Resolve the ties and number the variables that are left."""
        names = self.names()
        return ChannelVariables(
            count=int(names.max()) + 1,
            constants=tuple(
                Rescaled(c.node, c.index, *(None if ids is None else names[ids] for ids in (c.up, c.down)))
                for c in self.constants
            ),
            layers=tuple(Layer(layer.node, names[layer.inputs], names[layer.outputs]) for layer in self.layers),
            unclipped=tuple(self.unclipped),
            refusals=tuple(self.refusals),
            tensors={value.name: names[ids] for value, ids in self._ids.items() if value.name},
        )

    def rescale(self, node: ir.Node, index: int, up: np.ndarray | None = None, down: np.ndarray | None = None) -> None:
        """Let a constant input follow variables. Raises Stays if it may not be changed, or would grow too large."""
        tensor = changeable(node.inputs[index])
        shape = tensor.shape.numpy()
        up, down = (trimmed(ids, len(shape)) for ids in (up, down))
        grown = np.broadcast_shapes(shape, *(ids.shape for ids in (up, down) if ids is not None))
        if grown != tuple(shape) and np.prod(grown) > _GROWN:
            raise Stays(f"{node.inputs[index].name} would grow to {list(grown)}")  # type: ignore[union-attr]  # changeable saw to it
        self.constants.append(Rescaled(node, index, up, down))

    def add_layer(self, node: ir.Node, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Record a linear operator with the variables of its channels."""
        self.layers.append(Layer(node, inputs, outputs))
