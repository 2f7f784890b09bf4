"""From a float model to one whose layers are chains of smaller ones: what `--low-rank` asks for, or is shown to pay.

    menu (errors) -> prices (parameters, MACs, milliseconds) -> allocation -> repair (the factors) -> chains

A named part of the parameters, MACs or latency is saved as asked, with layers only whose chains are foretold to be
faster where that suffices, and latency counts. `auto` tries several parts of the time, with such layers only, and keeps
what guard.py would hand over: where nothing is shown to be faster inside the budget, nothing is factorized. With `--for
size` it keeps the smallest that holds the quality.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...passes import factorize
from .. import guard, job, trials
from .. import model as model_io
from ..candidates import Candidate, save
from ..proof import Prover
from ..pruning.cutting import multiple_of
from ..pruning.images import repair_feeds
from ..pruning.latencies import Delivery, delivery
from ..types import LowRank, LowRankLayer, PassRecord
from .allocation import allocate
from .menu import Item, menu, refusals
from .prices import priced
from .repair import fitted

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..job import Job
    from ..options import Saving

#: Parts of the time, or with `--for size` of the parameters, that `auto` tries to save.
AUTO = (0.1, 0.2, 0.35)
#: The chains give what the composed weights give, but for float32's rounding between them.
TOLERANCE = 1e-4
#: A chain is faster where it is foretold to take at most this part of the layer's time.
_FASTER = 0.95
#: Times of layers that explain those of whole networks worse than this are of no use.
_BELIEVED = 0.5


@dataclass(frozen=True, eq=False)
class Factorized:
    """What is compiled on: the float candidate, what was tried on the way to it, and what the report says."""

    base: Candidate
    tried: tuple[Candidate, ...]
    summary: LowRank


@dataclass(frozen=True, eq=False)
class _Kitchen:
    """The float candidate that is factorized, the images, and the menu with prices."""

    this: Job
    base: Candidate
    feeds: Sequence[Mapping[str, np.ndarray]]
    menu: Mapping[str, Sequence[Item]]
    run: Delivery | None
    start: float

    @property
    def model(self) -> ir.Model:
        """The model of the candidate."""
        return self.base.model

    def faster(self) -> dict[str, list[Item]]:
        """Return the menu without chains that are not foretold to be faster than their layers."""
        return {
            name: [items[0], *(item for item in items[1:] if _is_faster(item, items[0]))]
            for name, items in self.menu.items()
        }

    def total(self, kind: str) -> float:
        """Return what all layers cost as they are."""
        return sum(_cost(items[0], kind) for items in self.menu.values())

    def chosen(self, kind: str, saved: float, quick: bool) -> dict[str, Item] | None:
        """Return an item for each layer so that the part is saved; None where it cannot be."""
        whole = float(model_io.parameters(self.model)) if kind == "params" else self.total(kind)
        limit = self.total(kind) - saved * whole
        return allocate(self.faster() if quick else self.menu, lambda item: _cost(item, kind), limit)

    def made(self, chosen: Mapping[str, Item], work: Path, name: str) -> Candidate | str:
        """Return the network with these chains, fitted and proven, as a file in `work`; or why there is none."""
        forms = {layer: item.choice for layer, item in chosen.items() if item.choice is not None}
        if not forms:
            return "no layer becomes smaller"
        model, chains = fitted(
            self.model, forms, self.feeds,
            seed=self.this.options.seed, threads=self.this.threads, progress=self.this.progress,
        )  # fmt: skip
        found = factorize.factorized(model, chains)
        proof = Prover(model).prove(found, TOLERANCE)
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
        stem = name.replace(" ", "-").replace("%", "").replace(",", "")
        return save(Candidate(name, "fp32", work / f"{stem}.onnx", found, (*self.base.records, record)))


def low_rank(this: Job, base: Candidate, work: Path, request: Saving) -> Factorized:
    """Factorize the model of `base`. There must be images."""
    assert this.images is not None
    start, timed = (
        time.perf_counter(),
        this.target is not None and (request.kind == "latency" or this.options.goal == "latency"),
    )
    feeds = repair_feeds(base.model, this.images, threads=this.threads)
    scheme = job.quant_scheme(this)
    whole = scheme is not None and scheme.activation in ("uint8", "int8")
    offered = menu(
        base.model, feeds,
        multiple=multiple_of(this.profile), integers=scheme.weight_max if scheme is not None and whole else None,
        seed=this.options.seed, threads=this.threads, deadline=this.deadline, progress=this.progress,
    )  # fmt: skip
    run = delivery(this) if timed else None
    items, table = priced(this, base.model, offered, run)
    notes: tuple[str, ...] = ()
    if table is not None:
        notes = (f"layers are priced by timed shapes, which explain what was timed within {100 * table.misfit:.0f} %",)
    if table is not None and table.misfit > _BELIEVED:
        run, items = None, {name: [replace(i, ms=None) for i in offers] for name, offers in items.items()}
        notes = (f"times of layers explain those of networks within {100 * table.misfit:.0f} % only: not believed",)
    kitchen = _Kitchen(this, base, feeds, items, run, start)
    found, chosen, why = _named(kitchen, base, work, request) if request.saved else _auto(kitchen, base, work)
    summary = _summary(kitchen, request, found, chosen, why, notes)
    return Factorized(base if found is None else found, () if found is None else (found,), summary)


_Found = tuple[Candidate | None, Mapping[str, Item], str]


def _named(kitchen: _Kitchen, base: Candidate, work: Path, request: Saving) -> _Found:
    (saved,) = request.saved
    name = _name(base, f"low rank {100 * saved:.3g}%")
    if not kitchen.total(request.kind):
        return None, {}, "what the layers cost is not known (shapes are dynamic): --low-rank 30% counts parameters"
    chosen = kitchen.chosen(request.kind, saved, quick=True) if kitchen.run is not None else None
    slower = ""
    if chosen is None:
        chosen = kitchen.chosen(request.kind, saved, quick=False)
        count = 0 if chosen is None or kitchen.run is None else _slower(kitchen, chosen)
        slower = f"; {count} of its chains are foretold to be slower than their layers" if count else ""
    if chosen is None:
        return None, {}, "no choice of ranks saves that much"
    made = kitchen.made(chosen, work, name)
    if isinstance(made, str):
        return None, {}, made
    return made, chosen, f"factorized as asked{slower}"


def _auto(kitchen: _Kitchen, base: Candidate, work: Path) -> _Found:
    this = kitchen.this
    size = this.options.goal == "size"
    if not size and kitchen.run is None:
        why = this.not_measured or "the times of layers are not believed"
        return None, {}, f"nothing can be shown to pay where nothing is measured ({why})"
    kind = "params" if size else "ms"
    found: list[tuple[Candidate, Mapping[str, Item]]] = []
    for saved in AUTO:
        chosen = kitchen.chosen(kind, saved, quick=not size)
        if chosen is None or (found and this.seconds_left == 0):
            break
        made = kitchen.made(chosen, work, _name(base, f"low rank {100 * saved:.0f}%"))
        if isinstance(made, Candidate):
            found.append((made, chosen))
    if not found:
        return None, {}, "no layer's chain is foretold to save time here, and nothing was factorized"
    return _smallest(this, found) if size else _fastest(kitchen, base, found)


def _fastest(kitchen: _Kitchen, base: Candidate, found: Sequence[tuple[Candidate, Mapping[str, Item]]]) -> _Found:
    this, run = kitchen.this, kitchen.run
    assert run is not None
    every = [run.delivered(one) for one in (base, *(made for made, _ in found))]
    measured, judged = trials.measure(this, every, seconds=trials.BRIEF), trials.judge(this, every)
    attempts = guard.choose([trials.attempt(c, measured, judged, base.name) for c in every], this.options.budget,
                            named=None)  # fmt: skip
    for (made, chosen), attempt in zip(found, attempts[1:], strict=True):
        if attempt.chosen:
            return made, chosen, "the fastest that holds the budget, of the ranks that were tried"
    tried = "; ".join(f"{a.name}: {a.verdict}" for a in attempts[1:])
    return None, {}, f"factorization does not pay here, and nothing was factorized ({tried})"


def _smallest(this: Job, found: Sequence[tuple[Candidate, Mapping[str, Item]]]) -> _Found:
    drops = {name: f.drop for name, f in trials.judge(this, [made for made, _ in found]).items()}
    most = this.options.budget.max_drop
    holding = [one for one in found if (drop := drops.get(one[0].name)) is not None and drop <= most]
    if not holding:
        return None, {}, f"each that was tried loses more than {most:g} points, or was not judged"
    made, chosen = min(holding, key=lambda one: model_io.size_bytes(one[0].path))
    return made, chosen, "the smallest that holds the budget"


def _name(base: Candidate, name: str) -> str:
    return name if base.name == "fp32" else f"{base.name}, {name}"


def _cost(item: Item, kind: str) -> float:
    if kind == "params":
        return item.params
    return item.macs if kind == "macs" else item.ms or 0.0


def _is_faster(item: Item, layer: Item) -> bool:
    return item.ms is not None and layer.ms is not None and item.ms <= _FASTER * layer.ms


def _slower(kitchen: _Kitchen, chosen: Mapping[str, Item]) -> int:
    return sum(i.choice is not None and not _is_faster(i, kitchen.menu[name][0]) for name, i in chosen.items())


def _summary(
    kitchen: _Kitchen,
    request: Saving,
    found: Candidate | None,
    chosen: Mapping[str, Item],
    why: str,
    notes: tuple[str, ...],
) -> LowRank:
    rows = tuple(_row(name, items, chosen.get(name, items[0])) for name, items in kitchen.menu.items())
    judged = {} if found is None else trials.judge(kitchen.this, [found])
    return LowRank(
        asked=request.text,
        why=why,
        kept=found is not None,
        candidate=None if found is None else found.name,
        layers=rows,
        refusals=refusals(kitchen.model),
        parameters_before=model_io.parameters(kitchen.model),
        parameters_after=None if found is None else model_io.parameters(found.model),
        fitted=None if found is None else judged.get(found.name),
        notes=notes,
    )


def _row(name: str, items: Sequence[Item], item: Item) -> LowRankLayer:
    """Return a layer as it became; of one that stays, the fastest chain beside it."""
    layer, others = items[0], [other for other in items[1:] if other.ms is not None]
    shown = item
    if item.choice is None and others:
        shown = min(others, key=lambda other: other.ms or 0.0)
    return LowRankLayer(
        node=name,
        form=None if item.choice is None else item.choice.form,
        ranks=() if item.choice is None else item.choice.ranks,
        parameters=layer.params,
        parameters_left=item.params,
        macs=layer.macs or None,
        macs_left=item.macs or None,
        predicted_ms=layer.ms,
        predicted_ms_chain=shown.ms if shown is not layer else None,
    )
