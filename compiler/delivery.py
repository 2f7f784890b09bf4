"""What will run of a float network, and the times of the shapes of its layers as it will run.

Networks are timed side by side in the precision that will be delivered (how they round does not matter for their
latency); shapes that were timed before, of this model or another, are not timed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from . import job, memory
from .candidates import Candidate, save
from .latency import table as tables
from .latency.networks import time_networks
from .latency.shapes import shapes
from .latency.table import LatencyTable, Timed
from .memory import Memory
from .options import STEPS
from .proof import Prover
from .quantization.quantizer import Quantizer
from .quantization.search import search
from .types import Range

if TYPE_CHECKING:
    import onnx_ir as ir

    from .job import Job

#: Seconds of timing for each network.
_SECONDS = 0.5
#: A table that fits what was measured worse than this is not kept for the next time: the machine was busy.
_BELIEVED = 0.15


@dataclass(frozen=True, eq=False)
class Delivery:
    """What will run: its precision's name, and how to make something as fast of a float network.

    `rounded` makes a candidate of a float one that is about as good, or bad, as what will run: calibrated by extremes.
    """

    precision: str
    make: Callable[[ir.Model], ir.Model]
    rounded: Callable[[Candidate], Candidate] = lambda one: one

    def delivered(self, one: Candidate) -> Candidate:
        """Return a float candidate as fast as it will be, under its own name; its quality is that of its floats."""
        path = one.path.with_name(f"{one.path.stem}-delivered.onnx")
        return save(Candidate(one.name, one.precision, path, self.make(one.model), judged=one.path))


#: What runs in floats as it is.
FLOATS = Delivery("fp32", lambda model: model)


def delivery(this: Job) -> Delivery:
    """Return the precision that cuts are made for: integers wherever they will be tried, else floats."""
    scheme = job.quant_scheme(this)
    if scheme is None or scheme.activation is None:
        return FLOATS
    supports = this.backend.supports

    def quantized(model: ir.Model) -> ir.Model:
        return Quantizer(model, supports, scheme, _ranges(model)).build().model

    def rounded(one: Candidate) -> Candidate:
        plainly = replace(this.options, method="minmax", without=tuple(step for step in STEPS if step != "ranges"))
        found = search(replace(this, options=plainly), one.model, scheme, Prover(one.model))
        path = one.path.with_name(f"{one.path.stem}-rounded.onnx")
        return save(Candidate(one.name, one.precision, path, found.quantizer.build().model))

    return Delivery("int8" if this.options.precision == "auto" else this.options.precision, quantized, rounded)


def _ranges(model: ir.Model) -> dict[str, Range]:
    """Return made-up ranges: what a rectifier gives is not negative, as it will be."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    rectified = {value for node in model.graph if node.op_type in ("Relu", "Clip") for value in node.outputs}
    return {value.name: Range(0.0 if value in rectified else -1.0, 1.0) for value in values if value.name}


def timed(
    this: Job, networks: Sequence[ir.Model], feed: Mapping[str, np.ndarray], axes: Mapping[str, int], run: Delivery
) -> list[Timed]:
    """Time networks on one input as they will run; `axes` as for shapes()."""
    return time_networks(
        networks, feed, axes=axes, run_as=run.make, threads=this.threads,
        seconds=_SECONDS * len(networks), progress=this.progress,
    )  # fmt: skip


def table_of(
    this: Job, networks: Sequence[ir.Model], feed: Mapping[str, np.ndarray], axes: Mapping[str, int], run: Delivery
) -> LatencyTable:
    """Time networks as they will run, or take what is known of the shapes of their layers from before."""
    wanted: dict[str, list[tuple[float, float]]] = {}
    for network in networks:
        for shape in shapes(network, feed, axes):
            wanted.setdefault(shape.family, []).append(shape.amounts({}))
    with _memory(this, run) as kept:
        table = tables.recall(kept, wanted)
    return keep(this, tables.from_timed(timed(this, networks, feed, axes, run)), run) if table is None else table


def keep(this: Job, table: LatencyTable, run: Delivery) -> LatencyTable:
    """Keep a table for the next compile, if it is believed; return it with what is kept of the same families."""
    if table.misfit > _BELIEVED:
        return table
    with _memory(this, run) as kept:
        return tables.remember(kept, table)


def _memory(this: Job, run: Delivery) -> AbstractContextManager[Memory]:
    """Return where the shapes that were timed on this machine, and run so, are kept."""
    parts = {"precision": run.precision, "backend": this.backend.name, **memory.of_machine(this.threads)}
    return closing(Memory(memory.context("layers", **parts)))
