"""Where SmoothQuant's factors may go: a normalisation, the constants that scale it, and the linear nodes that read it.

Rules
1. The source is LayerNormalization or RMSNormalization over the last axis, or a Mul by a constant vector, each perhaps
   followed by an Add of a constant vector, which is how older exporters write them.
2. All its readers, through data movement that keeps the last axis, are MatMul or Gemm with a constant weight of their
   own. Several may read it (q, k and v apart): they share s.
3. A constant g or b that other nodes share is copied; a shared weight is not: it stays, and so does the layer.
4. No scale passes through GELU, Softmax or another function that is not homogeneous: what reads those is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .constants import Names, add_initializer, constant, small_array, why_fixed
from .weights import WIDE, Stays, along_axis, changeable, float64, scale, set_constant

#: The rule under which refusals are recorded.
RULE = "smooth"


class _Constant(NamedTuple):
    """Where a gain or a shift stands: input `slot` of `node`."""

    node: ir.Node
    slot: int
    is_shift: bool

    @property
    def tensor(self) -> ir.TensorProtocol:
        """Its numbers; the last axis are the channels."""
        tensor = constant(self.node.inputs[self.slot])
        assert tensor is not None
        return tensor

    @property
    def channels(self) -> int:
        """How many numbers it has."""
        return int(self.tensor.size)

    def divide(self, s: np.ndarray, graph: ir.Graph, names: Names) -> None:
        """Divide by `s`, or replace it by a divided copy where it is shared."""
        value, tensor = self.node.inputs[self.slot], self.tensor
        assert value is not None
        if why_fixed(value) is not None:
            value = add_initializer(graph, names.fresh(f"{value.name}_smoothed"), tensor)
            self.node.replace_input_with(self.slot, value)
        set_constant(value, float64(tensor) / s, tensor.dtype)


@dataclass(frozen=True, eq=False)
class Site:
    """One normalisation with its constants, the tensors whose numbers change, and those of them the linears read."""

    node: ir.Node
    constants: tuple[_Constant, ...]
    changed: tuple[ir.Value, ...]
    read: tuple[ir.Value, ...]
    linears: tuple[ir.Node, ...]

    def largest(self, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the maxima per channel, float64 (C,). Raises Stays where they are missing or do not fit."""
        found = []
        for value in self.read:
            maxima = ranges.get(value.name or "")
            if maxima is None:
                raise Stays(f"{value.name} has no measured maxima per channel")
            channels = self.constants[0].channels
            if maxima.shape != (channels,) or not np.isfinite(maxima).all():
                raise Stays(f"the maxima of {value.name} are not {channels} finite numbers")
            found.append(np.abs(maxima).astype(np.float64))
        largest: np.ndarray = np.max(found, axis=0)
        return largest

    def energy(self) -> np.ndarray:
        """Return g^2 + b^2, float64 (C,)."""
        g, b = np.ones(1), np.zeros(1)
        for part in self.constants:
            array = float64(part.tensor).reshape(-1)
            g, b = (g, b + array) if part.is_shift else (g * array, b * array)
        energy: np.ndarray = g**2 + b**2
        return energy

    def apply(self, s: np.ndarray, graph: ir.Graph, names: Names) -> None:
        """Divide the constants and multiply the weights. Raises Stays before anything is changed."""
        along = [along_axis(changeable(node.inputs[1]), _row_axis(node), s) for node in self.linears]
        for node, factor in zip(self.linears, along, strict=True):
            scale(node.inputs[1], factor)
        for part in self.constants:
            part.divide(s, graph, names)
        for value in self.changed:
            value.name = names.fresh(f"{value.name}_smoothed")


def sites(graph: ir.Graph, refusals: list[Refusal]) -> Iterator[Site]:
    """Yield the sites of the main graph; a normalisation read by a linear node that is no site becomes a refusal."""
    for node in list(graph):
        constants, walk = _constants(node), _Walk()
        if constants:
            walk.follow(node.outputs[0])
        if not walk.linears:
            continue
        inner = dict.fromkeys(part.node.outputs[0] for part in constants if part.node is not node)
        site = Site(node, constants, (*inner, *walk.changed), tuple(dict.fromkeys(walk.read)), tuple(walk.linears))
        try:
            _check(site, walk.blocked)
        except Stays as why:
            refusals.append(Refusal(label(node), RULE, str(why)))
        else:
            yield site


def _check(site: Site, blocked: str | None) -> None:
    """Raise Stays unless every reader is a linear node whose weight has a row for each channel and may change."""
    if blocked is not None:
        raise Stays(blocked)
    few = next((part for part in site.constants if part.tensor.dtype not in WIDE), None)
    if few is not None:
        raise Stays(f"{few.tensor.name} is {few.tensor.dtype}, which has too few bits for the quotient")
    for node in site.linears:
        along_axis(changeable(node.inputs[1]), _row_axis(node), np.empty(site.constants[0].channels))


class _Walk:
    """Follows a tensor through data movement that keeps its last axis, to the linear nodes that read it."""

    def __init__(self) -> None:
        self.changed: list[ir.Value] = []
        self.read: list[ir.Value] = []
        self.linears: list[ir.Node] = []
        self.blocked: str | None = None

    def follow(self, value: ir.Value) -> None:
        """Note `value`, its readers, and what data movement makes of it."""
        self.changed.append(value)
        if value.is_graph_output():
            self.blocked = f"{value.name} is a graph output"
        for node, index in value.uses():
            keeps = _MOVES.get(node.op_type) if not node.domain else None
            if node.graph is not value.graph or node.domain:
                self.blocked = f"{label(node)} ({node.op_type}) reads it too"
            elif _is_linear(node, index):
                self.read.append(value)
                self.linears.append(node)
            elif keeps is not None and index == 0 and keeps(node):
                self.follow(node.outputs[0])
            elif node.op_type not in _SHAPE_ONLY:
                self.blocked = f"{label(node)} ({node.op_type}) reads it too, and not to multiply it by a weight"


# ------------------------------------------------------------------------------------------- nodes

#: Normalisation over the last axis -> the inputs that are its gain and its shift.
_NORMS: dict[str, tuple[int, ...]] = {"LayerNormalization": (1, 2), "RMSNormalization": (1,)}
_SHAPE_ONLY = ("Shape", "Size")
#: f(s x) is not s f(x): no scale of the input can be taken back behind these.
_NOT_HOMOGENEOUS = frozenset(
    ("Gelu", "Softmax", "Sigmoid", "Tanh", "Erf", "Elu", "Selu", "HardSigmoid", "HardSwish", "Mish", "Softplus")
)


def _constants(node: ir.Node) -> tuple[_Constant, ...]:
    """Return the constants that scale and shift the output of `node`, first to last; empty if it is no source."""
    if node.domain:
        return ()
    if node.op_type in _NORMS:
        return _of_norm(node)
    index = _vector_input(node) if node.op_type in ("Mul", "Add") else None
    if index is None:
        return ()
    last = _Constant(node, index, node.op_type == "Add")
    if not last.is_shift:
        return (last,)
    scaled = node.inputs[1 - index]
    inner = scaled.producer() if scaled is not None else None
    if scaled is None or inner is None or inner.op_type == "Add" or inner.graph is not node.graph:
        return ()
    before = _constants(inner) if len(scaled.uses()) == 1 and not scaled.is_graph_output() else ()
    return (*before, last) if before and before[0].channels == last.channels else ()


def _of_norm(node: ir.Node) -> tuple[_Constant, ...]:
    """Return gain and shift of a normalisation over the last axis, where they are constants that no caller gives."""
    x, given = node.inputs[0], [i for i in _NORMS[node.op_type] if i < len(node.inputs) and node.inputs[i] is not None]
    last = len(x.shape) - 1 if x is not None and x.shape is not None else -1
    if node.attributes.get_int("axis", -1) not in (-1, last) or not all(_is_vector(node.inputs[i]) for i in given):
        return ()
    return tuple(_Constant(node, i, i == 2) for i in given)


def _vector_input(node: ir.Node) -> int | None:
    """Return which input of a Mul or Add is a constant vector over the last axis."""
    return next((i for i in (0, 1) if _is_vector(node.inputs[i]) and constant(node.inputs[1 - i]) is None), None)


def _is_vector(value: ir.Value | None) -> bool:
    tensor = constant(value)
    dims = tensor.shape.numpy() if tensor is not None else ()
    return len(dims) > 0 and dims[-1] > 1 and math.prod(dims) == dims[-1]


def _is_linear(node: ir.Node, index: int) -> bool:
    """Say whether `node` sums over the last axis of its input `index`."""
    transposed = node.attributes.get_int("transA", 0)
    return node.op_type in ("MatMul", "Gemm") and index == 0 and transposed == 0


def _row_axis(linear: ir.Node) -> int:
    """Return the axis of the weight along which its inputs lie. Raises Stays if the weight may not change."""
    rank = len(changeable(linear.inputs[1]).shape)
    if rank < 2:
        raise Stays(f"the weight of {label(linear)} is a vector")
    return rank - 2 if linear.op_type == "MatMul" else 1 if linear.attributes.get_int("transB", 0) else 0


def rows(linear: ir.Node) -> np.ndarray:
    """Return the weight of a MatMul or Gemm as float64 (inputs, outputs). Raises Stays if it may not change."""
    weight = float64(changeable(linear.inputs[1]))
    axis = _row_axis(linear)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _same_last(node: ir.Node) -> bool:
    """Say whether a node that keeps the order of all elements also keeps the length of the last axis."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or not x.shape or not y.shape:
        return False
    return isinstance(x.shape[-1], int) and x.shape[-1] == y.shape[-1]


def _transposes_others(node: ir.Node) -> bool:
    perm = node.attributes.get_ints("perm", ())
    return bool(perm) and perm[-1] == len(perm) - 1


def _gathers_others(node: ir.Node) -> bool:
    x, axis = node.inputs[0], node.attributes.get_int("axis", 0)
    rank = len(x.shape) if x is not None and x.shape is not None else None
    return rank is not None and axis % rank != rank - 1


def _slices_others(node: ir.Node) -> bool:
    x, axes = node.inputs[0], small_array(node.inputs[3]) if len(node.inputs) > 3 else None
    rank = len(x.shape) if x is not None and x.shape is not None else None
    return rank is not None and axes is not None and rank - 1 not in {int(a) % rank for a in axes}


#: Data movement -> does it leave the last axis as it is?
_MOVES: dict[str, Callable[[ir.Node], bool]] = {
    "Identity": lambda node: True,
    "Reshape": _same_last,
    "Flatten": _same_last,
    "Squeeze": _same_last,
    "Unsqueeze": _same_last,
    "Transpose": _transposes_others,
    "Gather": _gathers_others,
    "Slice": _slices_others,
}


def not_homogeneous(graph: ir.Graph) -> list[Refusal]:
    """Name the linear nodes whose input comes out of a function through which no scale passes."""
    found = []
    for node in graph:
        if node.domain or not _is_linear(node, 0) or constant(node.inputs[1]) is None:
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        while source is not None and source.op_type in _MOVES and source.inputs[0] is not None:
            source = source.inputs[0].producer()
        if source is not None and source.op_type in _NOT_HOMOGENEOUS:
            why = f"its input comes out of {source.op_type}, through which no scale per channel passes"
            found.append(Refusal(label(node), RULE, why))
    return found


def label(node: ir.Node) -> str:
    """Return what a node is called: exporters often leave the name empty."""
    return node.name or node.outputs[0].name or node.op_type
