"""What each layer could be: its forms at several ranks, with the error and the costs of each.

The error of a choice is that of the layer's own output, in the metric of what it reads (passes/metric.py), times what
the network makes of an error there: measured at the outputs with one truncation of that layer alone. It is found on
images that are held out: factors fit the rows that they were made for better than others. Where integers will run, what
rounding does to the layer, and to its chain, is part of it (passes/chain_noise.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from ...passes import chain_noise, factorize
from ...passes.bias import takes_shift
from ...passes.factorize import Chain, Choice
from ...passes.low_rank import Factors
from ...passes.metric import Metric, energy_of
from .. import layers
from .. import model as model_io
from ..fitting import gram
from ..fitting.images import split
from ..fitting.layerwise import is_layer
from ..fitting.layout import MOST_INPUTS, layout_of
from ..fitting.probe import Probe
from ..fitting.stream import Stream
from ..latency.shapes import name_of
from ..types import Progress, Refusal, silent

#: Parts of the largest rank that saves weights at which a form is offered.
PARTS = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
#: For the errors on the menu factors are not refined: where they start they err a tenth more, in the same order.
_SWEEPS = 0
#: Layers with more inputs are offered in fewer forms, at fewer ranks: each fit of a ResNet-50's takes seconds.
_WIDE = 600
#: Ranks under twice this are any number.
_LEAST = 4
#: Rows of held-out images that judge a layer.
_JUDGES = 1024
#: With fewer of them, those that the factors are made for judge as well.
_FEWEST = 16
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
    """A layer that can be a chain: its node, its weight (groups, out, in, k…), float64, and what it reads.

    `metrics` are made of most images, `judges` of others (`rows` of them); of all where there are few.
    """

    node: ir.Node
    weight: np.ndarray
    metrics: Sequence[Metric]
    judges: Sequence[Metric]
    rows: int

    @cached_property
    def energy(self) -> float:
        """That of its output on the images that judge."""
        return sum(energy_of(w, h) for w, h in zip(self.weight, self.judges, strict=True))

    def lost(self, other: np.ndarray) -> float:
        """Return the energy of the error of another weight in its place, on the images that judge."""
        return sum(energy_of(w - v, h) for w, v, h in zip(self.weight, other, self.judges, strict=True))


def seen(
    model: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    held_out: bool = True,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> Iterator[Seen]:
    """Yield each layer that can be a chain with what it reads, in the graph's order.

    Without `held_out`, all images are there to fit to, and to judge.
    """
    batches, apart = split(model, feeds, seed) if held_out else (feeds, [False] * len(feeds))
    stream, rng = Stream(model, batches, threads), np.random.default_rng(seed)
    nodes = [node for node in model.graph if is_layer(node, half=True) and objection(node) is None]
    for done, node in enumerate(nodes):
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        array = weight.const_value.numpy().astype(np.float64)
        layout = layout_of(node, array.shape, wide=True)
        assert not isinstance(layout, str), layout
        layout = replace(layout, biased=takes_shift(node))  # as in the walk that will fit it
        x, y = stream.pull(node.inputs[0]), stream.pull(node.outputs[0])
        images, rows = sum(map(len, x)), layout.rows_of(y)
        fit, judge, judged = gram.sums(layout, rows), gram.judging(layout, _JUDGES), max(1, sum(apart))
        for one, wanted, held in zip(x, y, apart, strict=True):
            if held:
                judge.add(*layout.rows(one, wanted, -(-_JUDGES // judged), rng))
            else:
                fit.add(*layout.rows(one, wanted, math.ceil(layout.most * len(one) / images), rng))
        progress("reading the layers", done + 1, len(nodes))
        metrics, enough = fit.metrics(), judge.rows >= _FEWEST
        judges, count = (judge.as_they_are(), judge.rows) if enough else (metrics, fit.rows)
        yield Seen(node, factorize.as_groups(node, array), metrics, judges, count)


def objection(node: ir.Node) -> str | None:
    """Return why a linear layer is not on the menu; None where it is."""
    why = factorize.objection(node)
    weight = node.inputs[1] if why is None else None
    if weight is None or weight.const_value is None:
        return why
    if not is_layer(node, half=True):
        return f"its weight is {weight.const_value.dtype.name}"
    shape = tuple(weight.const_value.shape.numpy())
    found = layout_of(node, shape, wide=True)
    if isinstance(found, str):
        return found
    return None if factorize.forms(groups_of(node, shape)) else "it has one input and one output in each group"


def groups_of(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (groups, out, in, k…) of a weight that is stored in this shape."""
    return factorize.as_groups(node, np.broadcast_to(np.float32(0), shape)).shape


def refusals(model: ir.Model) -> tuple[Refusal, ...]:
    """Return the linear layers that are not on the menu, and why."""
    found = ((node, objection(node)) for node in model.graph if node.op_type in layers.LINEAR)
    return tuple(Refusal(name_of(node), factorize.RULE, why) for node, why in found if why is not None)


def choices(shape: Sequence[int], multiple: int = 4) -> list[Choice]:
    """Return the forms and ranks at which a weight (groups, out, in, k…) is offered: those with fewer numbers than it.

    Ranks are multiples of `multiple` where they are twice as large: kernels work on blocks.
    """
    _, out, ins, *kernel = shape
    size, found = math.prod(shape), list[Choice]()
    inputs = ins * math.prod(kernel)
    for form in factorize.forms(shape):
        if (inputs > _WIDE and form in ("tucker", "cp")) or (inputs > MOST_INPUTS and form != "svd"):
            continue
        for part in PARTS[1::2] if inputs > _WIDE and form != "svd" else PARTS:
            single = (_rounded(part * size / Choice(form, (1, 1)).weights(shape), multiple),)
            ranks = (_rounded(part * out, multiple), _rounded(part * ins, multiple)) if form == "tucker" else single
            choice = Choice(form, ranks)
            if choice.weights(shape) < size and choice not in found:
                found.append(choice)
    return found


def _rounded(rank: float, multiple: int) -> int:
    while multiple > _LEAST and rank < 2 * multiple:
        multiple //= 2
    return max(int(rank) if rank < 2 * multiple else int(rank / multiple) * multiple, 1)


def menu(
    model: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    multiple: int = 4,
    integers: int | None = None,
    seed: int = 0,
    threads: int = 0,
    deadline: float | None = None,
    progress: Progress = silent,
) -> dict[str, list[Item]]:
    """Return what each layer could be, itself first, by node name.

    Where weights will be integers of at most `integers`, rounding is part of the errors. What was not reached at the
    deadline is left out.
    """
    probe, found = Probe(model, feeds, threads), {}
    for layer in seen(model, feeds, seed=seed, threads=threads, progress=progress):
        if deadline is not None and time.monotonic() >= deadline:
            break
        shape, offered = layer.weight.shape, choices(layer.weight.shape, multiple)
        chains = factorize.fitted(offered, layer.weight, layer.metrics, _SWEEPS)
        lost = [layer.lost(factorize.composed(chain, shape)) for chain in chains]
        amplified = _amplified(model, layer, probe, chains, lost) / max(layer.energy, 1e-300)
        kept = 0.0
        if integers is not None:
            kept = layer.lost(np.stack([chain_noise.rounded(one, integers) for one in layer.weight]))
            lost = [chain_noise.energy(c, layer.weight, layer.judges, layer.rows, integers) for c in chains]
        items = [Item(None, amplified * kept, layer.weight.size, layers.macs(layer.node) or 0)]
        items += [Item(c, amplified * e, c.weights(shape), 0) for c, e in zip(offered, lost, strict=True)]
        found[name_of(layer.node)] = items
    return found


def _amplified(model: ir.Model, layer: Seen, probe: Probe, chains: Sequence[Chain], lost: Sequence[float]) -> float:
    """Return what the outputs' relative error is, over that of the layer's output, for a small change of its kind.

    That is a step towards the chain that loses least, but enough to measure.
    """
    whole, order = layer.energy, sorted(range(len(chains)), key=lambda i: lost[i])
    if not order or whole <= 0 or lost[order[-1]] <= 0:
        return 0.0
    i = next((i for i in order if lost[i] >= _PROBED * whole), order[-1])
    step = min(1.0, math.sqrt(_PROBED * whole / lost[i]))
    changed = layer.weight + step * (factorize.composed(chains[i], layer.weight.shape) - layer.weight)
    error = probe.error(with_weights(model, {name_of(layer.node): changed}))
    return error / (step**2 * lost[i] / whole) if error > 0 else 1.0  # nothing is seen of it: all layers count alike


def with_weights(model: ir.Model, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """Return the model with other weights (groups, out, in, k…): those that chains stand for, for example."""
    twin = model_io.copy(model)
    for node in twin.graph:
        if (array := weights.get(name_of(node))) is not None:
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None
            dtype = weight.const_value.dtype.numpy()
            stored = np.ascontiguousarray(factorize.as_stored(node, array)).astype(dtype)
            weight.const_value = ir.tensor(stored, name=weight.name)
    return twin


def stand_in(choice: Choice, shape: Sequence[int], seed: int = 0) -> Chain:
    """Return a chain of the right shapes and random numbers for a weight (groups, out, in, k…): as fast as the real."""
    rng, (groups, out, ins, *kernel), ranks = np.random.default_rng(seed), shape, choice.ranks
    size, rank = math.prod(kernel), ranks[0]
    sizes: dict[str, tuple[tuple[int, ...], ...]] = {
        "svd": ((out, rank), (rank, ins, *kernel)),
        "channels": ((out, rank, size), (ins, rank)),
        "spatial": ((out, rank, size // (kernel[0] if kernel else 1)), (ins * (kernel[0] if kernel else 1), rank)),
        "tucker": ((out, rank), (rank, ranks[-1], size), (ins, ranks[-1])),
        "cp": ((out, rank), (ins, rank), *((k, rank) for k in kernel)),
    }
    arrays = tuple(rng.normal(size=s) / math.sqrt(math.prod(s[1:])) for s in sizes[choice.form])
    return Chain(choice.form, (Factors(arrays, math.nan),) * groups, math.nan)
