"""A layer written as a chain of smaller ones, given the factors (low_rank.py): the graph's side of factorization.

    form        Conv (out, in, k…), of each group                              Gemm, MatMul
    svd         k… to rank, 1x1 to out                                         to rank, to out
    channels    1x1 to rank, k… to out                                         -
    spatial     K x 1 to rank, 1 x K to out (two dimensions)                   -
    tucker      1x1 to the first rank, k… to the second, 1x1 to out            -
    cp          1x1 to rank, depthwise K x 1, depthwise 1 x K, 1x1 to out (two dimensions)     -

Strides, padding and dilations go to the factor that has the kernel along that axis; padding with zeros passes through
what comes before, which has no bias. The bias stays with the last factor, activations stay where they were. What works
in groups becomes a chain in as many groups, of one rank each.

Rules
1. A chain replaces a layer only where it has fewer weights than the layer.
2. The chain's output has the layer's name, and so have its readers.

Not touched: weights that others read or that are computed, ConvTranspose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from . import cp, low_rank
from .constants import Names, add_initializer, remove_unused, supplant
from .low_rank import Factors, Parted, Spectrum
from .metric import Metric
from .shapes import infer_shapes

RULE = "factorize"
_CONV = ("svd", "channels", "spatial", "tucker", "cp")


@dataclass(frozen=True, eq=False)
class Chain:
    """A form and its factors, of each group: arrays as low_rank.py has them. `error` is that of all groups together."""

    form: str
    groups: tuple[Factors, ...]
    error: float

    @property
    def weights(self) -> int:
        """How many numbers the factors have."""
        return sum(array.size for factors in self.groups for array in factors.arrays)


@dataclass(frozen=True)
class Choice:
    """A form with its ranks, of each group: one number, or two (of the outputs, of the inputs) for tucker."""

    form: str
    ranks: tuple[int, ...]

    def fitted(self, weight: np.ndarray, metrics: Sequence[Metric], sweeps: int = low_rank.SWEEPS) -> Chain:
        """Return the factors of a weight (groups, out, in, k…) that are best in the metric of what each group reads."""
        return fitted([self], weight, metrics, sweeps)[0]

    def weights(self, shape: Sequence[int]) -> int:
        """How many numbers the factors of a weight (groups, out, in, k…) have."""
        (groups, out, ins, *kernel), ranks = shape, self.ranks
        size, first = math.prod(kernel), ranks[0]
        if self.form == "svd":
            return groups * first * (out + ins * size)
        if self.form == "channels":
            return groups * first * (ins + out * size)
        if self.form == "spatial":
            return groups * first * (ins * kernel[0] + out * kernel[1])
        if self.form == "tucker":
            return groups * (out * first + first * ranks[1] * size + ranks[1] * ins)
        return groups * first * (out + ins + sum(kernel))


def forms(shape: Sequence[int]) -> tuple[str, ...]:
    """Return the forms that a weight (groups, out, in, k…) can have."""
    _, out, ins, *kernel = shape
    flat = len(kernel) == 2 and min(kernel) > 1
    if out == ins == 1:
        return ("spatial",) if flat else ()
    if math.prod(kernel) == 1:
        return ("svd",)
    return _CONV if flat else ("svd", "channels", "tucker")


def fitted(
    choices: Sequence[Choice], weight: np.ndarray, metrics: Sequence[Metric], sweeps: int = low_rank.SWEEPS
) -> list[Chain]:
    """Return the chain of each choice; what several ranks of a form share is found once."""
    seen = [_Matter(one, metric) for one, metric in zip(weight.astype(np.float64), metrics, strict=True)]
    whole = sum(matter.energy for matter in seen)
    chains = []
    for choice in choices:
        found = tuple(_FITS[choice.form](matter, choice.ranks, sweeps) for matter in seen)
        lost = sum(f.error * matter.energy for f, matter in zip(found, seen, strict=True))
        chains.append(Chain(choice.form, found, lost / whole if whole > 0 else 0.0))
    return chains


def composed(chain: Chain, shape: Sequence[int]) -> np.ndarray:
    """Return the weight (groups, out, in, k…), float64, that a chain stands for."""
    found: np.ndarray = np.stack([_composed(chain.form, factors.arrays) for factors in chain.groups])
    return found.reshape(shape)


def _composed(form: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    found: np.ndarray
    if form == "svd":
        return np.tensordot(arrays[0], arrays[1], 1)
    if form == "cp":
        found = np.einsum("or,ir,yr,xr->oiyx", *arrays, optimize=True)
        return found
    found = np.einsum("orq,pr->opq", arrays[-2], arrays[-1], optimize=True)
    return np.tensordot(arrays[0], found, 1) if form == "tucker" else found


@dataclass(frozen=True, eq=False)
class _Matter:
    """The weight (out, in, k…) of one group and its metric."""

    weight: np.ndarray
    metric: Metric

    @cached_property
    def energy(self) -> float:
        return float(self.spectrum[0].sum())

    @cached_property
    def spectrum(self) -> Spectrum:
        return low_rank.spectrum(self.weight, self.metric)

    @cached_property
    def channels(self) -> Parted:
        return self._parted(self.weight.shape[1])

    @cached_property
    def rows(self) -> Parted:
        return self._parted(self.weight.shape[1] * self.weight.shape[2])

    def _parted(self, p: int) -> Parted:
        return Parted(self.weight.reshape(len(self.weight), p, -1), self.dense)

    @property
    def dense(self) -> np.ndarray:
        assert isinstance(self.metric, np.ndarray), "of layers of few rows there is only svd"
        return self.metric


_FITS: Mapping[str, Callable[[_Matter, tuple[int, ...], int], Factors]] = {
    "svd": lambda one, ranks, _: low_rank.svd(one.weight, one.spectrum, ranks[0]),
    "channels": lambda one, ranks, sweeps: low_rank.reduced(one.channels, ranks[0], sweeps),
    "spatial": lambda one, ranks, sweeps: low_rank.reduced(one.rows, ranks[0], sweeps),
    "tucker": lambda one, ranks, sweeps: low_rank.tucker(one.channels, one.spectrum, ranks[0], ranks[1], sweeps),
    "cp": lambda one, ranks, sweeps: cp.cp(one.weight, one.dense, ranks[0], sweeps=4 + 4 * sweeps),
}

# ------------------------------------------------------------------------------------------- which layers


def objection(node: ir.Node) -> str | None:
    """Return why a linear layer cannot be a chain; None where it can."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return "its weight is computed at run time"
    if node.op_type == "ConvTranspose":
        return "there is no form for ConvTranspose"
    if weight.is_graph_output() or weight.is_graph_input():
        return "its weight is an input or output of the network"
    if len(weight.uses()) > 1:
        return "its weight is shared"
    if len(weight.const_value.shape) < 2 or (node.op_type == "MatMul" and len(weight.const_value.shape) != 2):
        return "its weight is no matrix"
    turned, scale = node.attributes.get_int("transA", 0), node.attributes.get_float("alpha", 1.0)
    if node.op_type == "Gemm" and (turned or scale != 1.0):
        return "transA or alpha is set"
    return None


def as_groups(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """Return a layer's weight as (groups, out, in, k…)."""
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    rows = weight.T if _is_turned(node) else weight
    return rows.reshape(groups, -1, *rows.shape[1:])


def as_stored(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """Return (groups, out, in, k…) as the layer stores it."""
    rows = weight.reshape(-1, *weight.shape[2:])
    return rows.T if _is_turned(node) else rows


def _is_turned(node: ir.Node) -> bool:
    """Say whether a layer's weight is stored as (in, out)."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))


# ------------------------------------------------------------------------------------------- the graph


def factorized(model: ir.Model, chains: Mapping[str, Chain]) -> ir.Model:
    """Return `model` with these layers, by node name, as chains; `model` is not changed."""
    twin = model.clone()
    names, old = Names.of(twin), list(twin.graph.initializers.values())
    for node in list(twin.graph):
        if node.name and node.name in chains:
            _replace(twin.graph, node, chains[node.name], names)
    remove_unused(old)
    fault = infer_shapes(twin)
    assert fault is None, f"the chains contradict the graph: {fault}"
    return twin


def _replace(graph: ir.Graph, node: ir.Node, chain: Chain, names: Names) -> None:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    dtype, kernel = weight.const_value.dtype, tuple(weight.const_value.shape.numpy()[2:])
    links = _links(node, chain, kernel)
    value, made = node.inputs[0], list[ir.Node]()
    for i, (array, attributes) in enumerate(links):
        last = i == len(links) - 1
        name = names.fresh(f"{node.name}_{chain.form}{i}")
        called = names.fresh(f"{name}_weight")
        stored = ir.tensor(np.ascontiguousarray(array).astype(dtype.numpy()), name=called)
        inputs = [value, add_initializer(graph, called, stored), *(node.inputs[2:] if last else ())]
        if last and node.op_type == "Gemm" and "beta" in node.attributes:
            attributes = [*attributes, node.attributes["beta"]]
        made.append(ir.Node("", node.op_type, inputs, attributes, name=node.name if last else name))
        value = made[-1].outputs[0]
        value.name = names.fresh(f"{name}_out")
    graph.insert_before(node, made)
    supplant(node.outputs[0], made[-1].outputs[0])
    graph.remove(node, safe=True)


_Link = tuple[np.ndarray, list[ir.Attr]]


def _links(node: ir.Node, chain: Chain, kernel: Sequence[int]) -> list[_Link]:
    """Return the weight and the attributes of each layer of a chain, the first to run first."""
    arrays = chain.groups[0].arrays
    if node.op_type == "MatMul":
        return [(array.T, []) for array in reversed(arrays)]
    if node.op_type == "Gemm":
        return [(array, [ir.AttrInt64("transB", 1)]) for array in reversed(arrays)]
    of_groups = [_convolutions(chain.form, factors.arrays, kernel) for factors in chain.groups]
    found = []
    for links in zip(*of_groups, strict=True):
        array, along, groups = np.concatenate([one for one, _, _ in links]), links[0][1], sum(g for _, _, g in links)
        attributes = _attributes(node, kernel, along)
        found.append((array, [*attributes, ir.AttrInt64("group", groups)] if groups > 1 else attributes))
    return found


def _convolutions(
    form: str, arrays: Sequence[np.ndarray], kernel: Sequence[int]
) -> list[tuple[np.ndarray, Sequence[int], int]]:
    """Return of each convolution of one group: its weight, the axes along which it has the kernel, and its groups."""
    rank, point, every = arrays[-1].shape[-1], [1] * len(kernel), range(len(kernel))
    if form == "svd":
        last, first = arrays
        return [(first, every, 1), (last.reshape(*last.shape, *point), (), 1)]
    if form == "cp":
        last, first, rows, columns = arrays
        return [
            (first.T.reshape(rank, -1, 1, 1), (), 1),
            (rows.T.reshape(rank, 1, -1, 1), (0,), rank),
            (columns.T.reshape(rank, 1, 1, -1), (1,), rank),
            (last.reshape(*last.shape, 1, 1), (), 1),
        ]
    core, first = arrays[-2:]
    if form == "spatial":
        return [(first.T.reshape(rank, -1, kernel[0], 1), (0,), 1), (core[:, :, None], (1,), 1)]
    links: list[tuple[np.ndarray, Sequence[int], int]] = [
        (first.T.reshape(rank, -1, *point), (), 1),
        (core.reshape(*core.shape[:2], *kernel), every, 1),
    ]
    return links if form == "channels" else [*links, (arrays[0].reshape(*arrays[0].shape, *point), (), 1)]


def _attributes(node: ir.Node, kernel: Sequence[int], along: Sequence[int]) -> list[ir.Attr]:
    """Return the attributes of a Conv that has the layer's kernel along some axes, and 1 along the others."""
    rank = len(kernel)
    found = [ir.AttrInt64s("kernel_shape", [k if axis in along else 1 for axis, k in enumerate(kernel)])]
    for name, neutral in (("strides", 1), ("dilations", 1), ("pads", 0)):
        values = node.attributes.get_ints(name)
        if values is not None:
            kept = [value if axis % rank in along else neutral for axis, value in enumerate(values)]
            found.append(ir.AttrInt64s(name, kept))
    if "auto_pad" in node.attributes and along:
        found.append(node.attributes["auto_pad"])
    return found
