"""The float candidate that is factorized, what its layers could be and cost, and the networks that are made of that."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...passes import factorize
from ...passes.bias import shift_bias, takes_shift
from ...passes.constants import Names, remove_unused
from .. import devices, job
from .. import model as model_io
from ..candidates import Candidate, save
from ..delivery import Delivery, delivery
from ..fitting.images import repair_feeds
from ..fitting.layerwise import is_layer
from ..latency.shapes import name_of
from ..layers import axes_of
from ..proof import Prover
from ..types import PassRecord
from .allocation import allocate
from .menu import Item, groups_of, menu, refusals, stand_in
from .prices import Prices, priced
from .repair import fitted

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..job import Job

#: The chains give what the composed weights give, but for float32's rounding between them; or float16's, of 5e-4 each.
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2
#: A chain is faster where it is foretold to take at most this part of the layer's time.
_FASTER = 0.95
#: Times of layers that explain those of whole networks worse than this are of no use.
_BELIEVED = 0.5

#: What each layer becomes, by its name; itself where the item has no choice.
Chosen = Mapping[str, Item]


@dataclass(frozen=True, eq=False)
class Kitchen:
    """The candidate, the images, and the menu with its prices. `run` is how networks will be delivered."""

    this: Job
    base: Candidate
    feeds: Sequence[Mapping[str, np.ndarray]]
    prices: Prices
    run: Delivery
    work: Path
    start: float
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, this: Job, base: Candidate, work: Path, timed: bool) -> Kitchen:
        """Find out what the layers of `base` could be; with `timed`, how fast on the target. There must be images."""
        assert this.images is not None
        start, scheme = time.perf_counter(), job.quant_scheme(this)
        integers = None if scheme is None or scheme.activation not in ("uint8", "int8") else scheme.weight_max
        feeds = repair_feeds(base.model, this.images, threads=this.threads)
        offered = menu(
            base.model, feeds,
            multiple=devices.multiple_of(this.profile), integers=integers,
            seed=this.options.seed, threads=this.threads, deadline=this.deadline, progress=this.progress,
        )  # fmt: skip
        run = delivery(this)
        prices = priced(this, base.model, offered, run if timed else None)
        notes: tuple[str, ...] = ()
        if prices.misfit is not None:
            told = f"{100 * prices.misfit:.0f} %"
            notes = (f"layers are priced by timed shapes, which explain what was timed within {told}",)
            if prices.misfit > _BELIEVED:
                prices = prices.without_times()
                notes = (f"times of layers explain those of networks within {told} only: not believed",)
        return cls(this, base, feeds, prices, run, work, start, notes)

    @property
    def model(self) -> ir.Model:
        """The model of the candidate."""
        return self.base.model

    @property
    def menu(self) -> Mapping[str, Sequence[Item]]:
        """What each layer could be, itself first."""
        return self.prices.menu

    @property
    def timed(self) -> bool:
        """Whether milliseconds are known."""
        return self.prices.whole_ms is not None

    def total(self, kind: str) -> float:
        """Return what all layers on the menu cost as they are: "params", "macs" or "ms"."""
        return sum(cost_of(items[0], kind) for items in self.menu.values())

    def whole(self, kind: str) -> float:
        """Return what the network costs as it is, with what is not on the menu."""
        if kind == "params":
            return float(model_io.parameters(self.model))
        return float(self.prices.whole_macs or 0) if kind == "macs" else self.prices.whole_ms or 0.0

    def foretold(self, chosen: Chosen) -> float | None:
        """Return how many times as fast as it is the network is foretold to be; None where nothing was timed."""
        whole = self.prices.whole_ms
        if whole is None:
            return None
        saved = sum(cost_of(self.menu[name][0], "ms") - cost_of(item, "ms") for name, item in chosen.items())
        return whole / max(whole - saved, 1e-9)

    def faster(self) -> dict[str, list[Item]]:
        """Return the menu without chains that are not foretold to be faster than their layers."""
        return {
            name: [items[0], *(item for item in items[1:] if is_faster(item, items[0]))]
            for name, items in self.menu.items()
        }

    @cached_property
    def biased(self) -> ir.Model:
        """The model with the biases that repair will add, of zeros."""
        twin, names = model_io.copy(self.model), Names.of(self.model)
        old = list(twin.graph.initializers.values())
        for node in list(twin.graph):
            if is_layer(node, half=True) and takes_shift(node):
                assert node.inputs[1] is not None and node.inputs[1].const_value is not None
                outs = node.inputs[1].const_value.shape.numpy()[axes_of(node)[1]]
                each = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
                shift_bias(twin.graph, node, np.zeros(outs * each), names)
        remove_unused(old)
        return twin

    def chosen(self, kind: str, saved: float, quick: bool) -> Chosen | None:
        """Return an item for each layer so that the part is saved; None where it cannot be.

        With `quick`, of chains that are foretold to be faster only.
        """
        limit = self.total(kind) - saved * self.whole(kind)
        if kind == "params":
            limit -= model_io.parameters(self.biased) - self.whole(kind)
        return allocate(self.faster() if quick else self.menu, lambda item: cost_of(item, kind), limit)

    def cheapest(self, kind: str) -> Chosen:
        """Return what costs least."""
        menu = self.faster() if kind == "ms" else self.menu
        return {name: min(items, key=lambda item: (cost_of(item, kind), item.error)) for name, items in menu.items()}

    def stand_in(self, chosen: Chosen, name: str) -> Candidate | str:
        """Return a network as fast, and as large, as one with these chains, of random numbers."""
        nodes = {name_of(node): node for node in self.model.graph}
        chains = {}
        for layer, choice in _choices(chosen).items():
            weight = nodes[layer].inputs[1]
            assert weight is not None and weight.const_value is not None
            chains[layer] = stand_in(choice, groups_of(nodes[layer], tuple(weight.const_value.shape.numpy())))
        if not chains:
            return "no layer becomes smaller"
        found = factorize.factorized(self.biased, chains)
        return save(Candidate(name, "fp32", self.work / f"{_stem(name)}-stand-in.onnx", found))

    def made(self, chosen: Chosen, name: str) -> Candidate | str:
        """Return the network with these chains, fitted and proven, as a file; or why there is none."""
        forms = _choices(chosen)
        if not forms:
            return "no layer becomes smaller"
        model, chains = fitted(
            self.model, forms, self.feeds,
            seed=self.this.options.seed, threads=self.this.threads, progress=self.this.progress,
        )  # fmt: skip
        found = factorize.factorized(model, chains)
        half = any(not is_layer(node) and is_layer(node, half=True) for node in model.graph)
        proof = Prover(model).prove(found, HALF_TOLERANCE if half else TOLERANCE)
        if proof.error is not None and not proof.error <= proof.tolerance:
            return f"the chains failed their proof: outputs differ by {proof.error:.1e} from the composed weights'"
        record = PassRecord(
            name="factorize",
            stage="compress",
            exact=False,
            modified=True,
            seconds=time.perf_counter() - self.start,
            nodes_before=len(self.model.graph),
            nodes_after=len(found.graph),
            rewrites=len(chains),
            refusals=refusals(self.model),
            notes=("the proof is that of the chains: the network with the weights that they stand for",),
            proof=proof,
        )
        path = self.work / f"{_stem(name)}.onnx"
        return save(Candidate(name, "fp32", path, found, (*self.base.records, record)))

    def called(self, name: str) -> str:
        """Return the name of a network that is made: with what was done to it before."""
        return name if self.base.name == "fp32" else f"{self.base.name}, {name}"


def cost_of(item: Item, kind: str) -> float:
    """Return the parameters, MACs or milliseconds of an item."""
    if kind == "params":
        return item.params
    return item.macs if kind == "macs" else item.ms or 0.0


def is_faster(item: Item, layer: Item) -> bool:
    """Say whether a chain is foretold to be faster than its layer."""
    return item.ms is not None and layer.ms is not None and item.ms <= _FASTER * layer.ms


def _choices(chosen: Chosen) -> dict[str, factorize.Choice]:
    return {layer: item.choice for layer, item in chosen.items() if item.choice is not None}


def _stem(name: str) -> str:
    return name.replace(" ", "-").replace("%", "").replace(",", "")
