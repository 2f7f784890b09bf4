"""What each layer could be: its forms at several ranks, with the error and the costs of each.

The error of a choice is that of the layer's own output, in the metric of what it reads (passes/low_rank.py), times what
the network makes of an error there: measured at the outputs with one truncation of that layer alone. Costs are those of
the chain's nodes: parameters, multiply-accumulates, and milliseconds from the table of shapes, for which networks with
all layers in one form at one rank are timed side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes import factorize, low_rank
from ...passes.factorize import Chain, Choice
from ...passes.low_rank import Factors
from .. import layers
from .. import model as model_io
from ..fitting import gram
from ..fitting.layerwise import ROWS, ROWS_PER_INPUT, is_layer
from ..fitting.stream import Stream
from ..latency.shapes import name_of
from ..pruning.probe import Probe
from ..types import Progress, Refusal, silent

#: Parts of the largest rank that saves weights at which a form is offered.
PARTS = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
#: Ranks are multiples of this where they are larger: kernels work on blocks.
MULTIPLE = 4
#: For the errors on the menu factors are not refined: where they start they err a tenth more, in the same order.
_SWEEPS = 0
#: Layers with more inputs are offered in fewer forms, at fewer ranks: each fit of a ResNet-50's takes seconds.
_WIDE = 600
#: The part of the energy that a layer loses when its effect at the outputs is measured.
_PROBED = 0.02


@dataclass(frozen=True, eq=False)
class Item:
    """One choice for a layer: its relative error at the network's outputs, its parameters and MACs; `ms` if timed."""

    choice: Choice | None
    error: float
    params: int
    macs: int
    ms: float | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """A layer that can be a chain: its node, its weight (out, in, k…), float64, and the metric of what it reads."""

    node: ir.Node
    weight: np.ndarray
    metric: np.ndarray


def seen(
    model: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> Iterator[Seen]:
    """Yield each layer that can be a chain with the sums over what it reads, in the graph's order."""
    stream, rng = Stream(model, feeds, threads), np.random.default_rng(seed)
    nodes = [node for node in model.graph if is_layer(node) and objection(node) is None]
    for done, node in enumerate(nodes):
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        array = weight.const_value.numpy().astype(np.float64)
        layout = gram.layout(node, array.shape)
        assert not isinstance(layout, str), layout
        moments, x, y = gram.Moments(layout), stream.pull(node.inputs[0]), stream.pull(node.outputs[0])
        most = -(-max(ROWS, ROWS_PER_INPUT * layout.inputs) // len(x))
        for one, wanted in zip(x, y, strict=True):
            moments.add(*layout.rows(one, wanted, most, rng))
        progress("reading the layers", done + 1, len(nodes))
        yield Seen(node, factorize.as_matrix(node, array), low_rank.ridged(moments.gram()[0]))


def objection(node: ir.Node) -> str | None:
    """Return why a linear layer is not on the menu; None where it is."""
    why = factorize.objection(node)
    weight = node.inputs[1] if why is None else None
    if weight is None or weight.const_value is None:
        return why
    if weight.const_value.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.const_value.dtype.name}, and sums are made of float32 layers"
    found = gram.layout(node, tuple(weight.const_value.shape.numpy()))
    return found if isinstance(found, str) else None


def refusals(model: ir.Model) -> tuple[Refusal, ...]:
    """Return the linear layers that are not on the menu, and why."""
    found = ((node, objection(node)) for node in model.graph if node.op_type in layers.LINEAR)
    return tuple(Refusal(name_of(node), factorize.RULE, why) for node, why in found if why is not None)


def choices(shape: Sequence[int], wide: bool) -> list[Choice]:
    """Return the forms and ranks at which a weight (out, in, k…) is offered: those that have fewer numbers than it."""
    out, ins, *kernel = shape
    size, found = math.prod(shape), list[Choice]()
    for form in factorize.forms(shape):
        if wide and form in ("tucker", "cp"):
            continue
        for part in PARTS[1::2] if wide and form != "svd" else PARTS:
            single = (_rounded(part * size / Choice(form, (1, 1)).weights(shape)),)
            choice = Choice(form, (_rounded(part * out), _rounded(part * ins)) if form == "tucker" else single)
            if choice.weights(shape) < size and choice not in found:
                found.append(choice)
    return found


def _rounded(rank: float) -> int:
    return max(int(rank) if rank < 2 * MULTIPLE else int(rank / MULTIPLE) * MULTIPLE, 1)


def menu(
    model: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    threads: int = 0,
    deadline: float | None = None,
    progress: Progress = silent,
) -> dict[str, list[Item]]:
    """Return what each layer could be, itself first, by node name. What was not reached at the deadline is left out."""
    probe, found = Probe(model, feeds, threads), {}
    for layer in seen(model, feeds, seed=seed, threads=threads, progress=progress):
        if deadline is not None and time.monotonic() >= deadline:
            break
        amplified = _amplified(model, layer, probe)
        wide = len(layer.metric) > _WIDE
        items = [Item(None, 0.0, layer.weight.size, layers.macs(layer.node) or 0)]
        errors = low_rank.svd_errors(layer.weight, layer.metric)
        for choice in choices(layer.weight.shape, wide):
            if choice.form == "svd":
                error = float(errors[choice.ranks[0]])
            else:
                error = choice.fitted(layer.weight, layer.metric, _SWEEPS).factors.error
            items.append(Item(choice, amplified * error, choice.weights(layer.weight.shape), 0))
        found[name_of(layer.node)] = items
    return found


def _amplified(model: ir.Model, layer: Seen, probe: Probe) -> float:
    """Return what the outputs' relative error is, over that of the layer's output, for a truncation of this layer."""
    errors = low_rank.svd_errors(layer.weight, layer.metric)
    rank = int(np.argmax(errors <= _PROBED))
    while rank and errors[rank] <= 0:
        rank -= 1
    if errors[rank] <= 0:
        return 0.0
    chain = Choice("svd", (max(rank, 1),)).fitted(layer.weight, layer.metric)
    if chain.factors.error <= 0:
        return 0.0
    return probe.error(with_weights(model, {name_of(layer.node): chain})) / chain.factors.error


def with_weights(model: ir.Model, chains: Mapping[str, Chain]) -> ir.Model:
    """Return the model with the weights that the chains stand for: what `factorize.factorized` must be equal to."""
    twin = model_io.copy(model)
    for node in twin.graph:
        if (chain := chains.get(name_of(node))) is not None:
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None
            old = weight.const_value.numpy()
            shape = factorize.as_matrix(node, old).shape
            array = factorize.as_matrix(node, factorize.composed(chain, shape)) if len(shape) == 2 else (
                factorize.composed(chain, shape)
            )  # fmt: skip
            weight.const_value = ir.tensor(np.ascontiguousarray(array).astype(old.dtype), name=weight.name)
    return twin


def stand_in(choice: Choice, shape: Sequence[int], seed: int = 0) -> Chain:
    """Return a chain of the right shapes and random numbers: as fast as the real one."""
    rng, (out, ins, *kernel), ranks = np.random.default_rng(seed), shape, choice.ranks
    size, rank = math.prod(kernel), ranks[0]
    sizes: dict[str, tuple[tuple[int, ...], ...]] = {
        "svd": ((out, rank), (rank, ins, *kernel)),
        "channels": ((out, rank, size), (ins, rank)),
        "spatial": ((out, rank, size // (kernel[0] if kernel else 1)), (ins * (kernel[0] if kernel else 1), rank)),
        "tucker": ((out, rank), (rank, ranks[-1], size), (ins, ranks[-1])),
        "cp": ((out, rank), (ins, rank), *((k, rank) for k in kernel)),
    }
    arrays = tuple(rng.normal(size=s) / math.sqrt(math.prod(s[1:])) for s in sizes[choice.form])
    return Chain(choice.form, Factors(arrays, math.nan))
