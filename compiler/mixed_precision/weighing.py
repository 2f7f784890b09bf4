"""Which nodes run on integers, and with weights of how many bits: measured for one quantizer on this machine.

1. Every rounding's own error at the network's outputs is measured on calibration images (contributions.py).
2. Every node's latency in float and on integers, and that of the steps between them, is measured (costs.py).
3. Where the size is limited: every node's bytes; where weights may have 4 bits: the errors of those.
4. An integer program gives the assignments that are best for their latency (mixed.py, program.py, tradeoff.py).

What comes out are predictions beside assignments; driver.py builds, measures and judges them like any candidate.
Measurements are kept as they are made (memory.py): the next compile of the same begins where this one ends.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ...passes.placement import Placement, place
from .. import memory
from .. import model as model_io
from ..layers import LINEAR, macs
from ..quantization.quantizer import Quantizer
from ..types import Progress
from . import contributions, costs, mixed
from .sampling import Sample, choose
from .switchboard import Switchboard
from .tradeoff import LEAST_INTEGER, REACH, Point, Tradeoff
from .units import Wiring, wire

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ...calib.folder import Folder
    from ..quantization.closeness import Closeness

#: The mixtures' and their timing's extent.
_MIXTURES, _SECONDS = 6, 3.0
#: Latencies that fit what was measured worse than this are not believed a second time: the machine was busy.
_BELIEVED = 0.15
#: Predictions go through what is measured of assignments with these parts of the roundings' sum.
_SHARES = (1.0, 0.3, 0.1)
#: Seconds after which no further image is taken, where no budget is stated.
_PATIENCE = 45.0


@dataclass(frozen=True, eq=False)
class Narrow:
    """The same quantizer with weights of 4 bits, as an alternative for each unit; and whether float is one as well."""

    quantizer: Quantizer
    floats: bool = True


@dataclass(frozen=True, eq=False)
class Exploration:
    """The frontier, the plain assignment's predictions, and the program that they come from."""

    points: tuple[Point, ...]
    plain: Point
    tradeoff: Tradeoff


def explore(
    quantizer: Quantizer,
    images: Folder,
    feed: Mapping[str, np.ndarray] | None,
    *,
    threads: int,
    seed: int = 0,
    least_integer: float = LEAST_INTEGER,
    reach: float | None = REACH,
    seconds: float | None = None,
    progress: Progress,
) -> Exploration | None:
    """Return the frontier, the plain assignment and the one in float left out; None where there is nothing to choose.

    `feed` is one input to time, None to time nothing. `least_integer` and `reach` as for Tradeoff.frontier. `seconds`
    bounds the measuring of errors and the search.
    """
    deadline = time.monotonic() + (_PATIENCE if seconds is None else seconds)
    found = weigh(quantizer, images, feed, threads=threads, seed=seed, deadline=deadline, progress=progress)
    if found is None:
        return None
    some = found.frontier(least_integer=least_integer, reach=reach, deadline=deadline, progress=progress)
    return Exploration(mixtures(found, some), found.point(found.uniform(mixed.INTEGER)), found)


def mixtures(tradeoff: Tradeoff, some: Iterable[mixed.Assignment]) -> tuple[Point, ...]:
    """Return the points of these assignments that are neither all in float nor all on integers of 8 bits."""
    points = [tradeoff.point(one) for one in some]
    units = len(tradeoff.wiring.units)
    return tuple(p for p in points if (p.keep_float or p.narrow) and len(p.keep_float) < units)


def weigh(
    quantizer: Quantizer,
    images: Folder,
    feed: Mapping[str, np.ndarray] | None,
    *,
    threads: int,
    seed: int = 0,
    narrow: Narrow | None = None,
    sizes: Mapping[str, float] | None = None,
    judge: Closeness | None = None,
    deadline: float | None = None,
    progress: Progress,
) -> Tradeoff | None:
    """Measure what the choices of precision cost; None where there is nothing to choose.

    `sizes` are bytes of the files that hold all of the model in float, and all that can be with weights of 8 or 4
    bits, by mixed.py's names of these. Predicted errors go through what `judge` measures of a few assignments. With
    `deadline` (on time.monotonic's clock) no further image is taken.
    """
    wiring = wire(quantizer.model, _placement(quantizer))
    if len(wiring.units) < 2:
        return None
    deadline = time.monotonic() + _PATIENCE if deadline is None else deadline
    sample = choose(quantizer, images, len(wiring.units), judge)
    errors, hit = _errors(quantizer, wiring, sample, threads, seed, deadline, progress)
    if judge is not None:
        errors = _measured(errors, quantizer, wiring, judge, deadline)
    prices, timed = _latencies(quantizer, wiring, feed, threads, seed, progress)
    added: dict[str, float] = {}
    if narrow is not None:
        finer, again = _errors(narrow.quantizer, wiring, sample, threads, seed, deadline, progress)
        # sums are larger with 4 bits: what is to be expected of them is fitted there
        errors, hit = replace(finer, sources=errors.sources, alone=errors.alone), hit and again
        added = _of_weights(finer)
        if judge is not None:
            everything = frozenset(unit.name for unit in wiring.units)
            sums = errors.added(everything) - sum(_of_weights(errors).values()) + sum(added.values())
            errors = errors.through([(sums, _judged(judge, narrow.quantizer, wiring, everything))])
    work = _float_macs(quantizer.model, wiring)
    extra = {"float_macs": {name: {mixed.FLOAT: share} for name, share in work.items()}}
    extra["wide"] = {name: {mixed.INTEGER: 1.0} for name in added}
    if sizes is not None:
        extra["bytes"] = unit_bytes(quantizer.model, wiring, sizes)
    problem = mixed.mixed_problem(wiring, prices, errors, extra, narrow=added, floats=narrow is None or narrow.floats)
    possible = sum(work.values()) if work else 1.0  # layers without an integer form are float whatever is chosen
    return Tradeoff(problem, wiring, errors, possible, None if feed is None else prices.misfit, hit and timed)


def _placement(quantizer: Quantizer) -> Placement:
    return place(quantizer.model, quantizer.ranges, quantizer.supports, quantizer.scheme, quantizer.kept)


# ------------------------------------------------------------------------------------------ errors


def _errors(
    quantizer: Quantizer,
    wiring: Wiring,
    sample: Sample,
    threads: int,
    seed: int,
    deadline: float,
    progress: Progress,
) -> tuple[contributions.Contributions, bool]:
    """Measure what each rounding adds; say whether all of it was known from an earlier compile."""
    bare = replace(quantizer, scheme=replace(quantizer.scheme, shield_float=False, nhwc_kernels=False)).build().model
    board = Switchboard(quantizer.model, bare, wiring, threads=threads)
    some = sample.images
    batch = max(1, min(16, len(some) // 2))
    models = [model_io.fingerprint(quantizer.model), model_io.fingerprint(bare)]
    weights = [f"{weight:.4g}" for weight in sample.weights]
    key = memory.context(
        "errors", models=models, batch=batch, weights=weights, threads=threads, **memory.of_images(some)
    )
    kept = memory.Memory(key)
    try:
        found = contributions.measure(
            board,
            wiring,
            some.batches(batch),
            images=len(some),
            cumulative=False,
            seed=seed,
            deadline=deadline,
            progress=progress,
            memory=kept,
            weights=sample.weights,
        )
    finally:
        kept.close()
    return found, kept.misses == 0


def _measured(
    errors: contributions.Contributions, quantizer: Quantizer, wiring: Wiring, judge: Closeness, deadline: float
) -> contributions.Contributions:
    """Let predictions go through what the judge measures of everything on integers, and of lighter assignments."""
    points: list[tuple[float, float]] = []
    for share in _SHARES:
        if points and time.monotonic() > deadline:
            break
        units = errors.lighter(wiring, share)
        if units:
            points.append((errors.added(units), _judged(judge, quantizer, wiring, units)))
    return errors.through(points)


def _judged(judge: Closeness, quantizer: Quantizer, wiring: Wiring, units: frozenset[str]) -> float:
    """Return the error with these units on integers, relative to the energy of the output that has the largest."""
    model = _built(quantizer, wiring, units)
    return float(10.0 ** (-judge.decibels(model, simulated=quantizer.scheme.simulated) / 10))


def _of_weights(found: contributions.Contributions) -> dict[str, float]:
    """Return what each unit's weights add by themselves."""
    pairs = zip(found.sources, found.alone, strict=True)
    return {source.units[0]: float(error) for source, error in pairs if source.kind == "weight"}


# ------------------------------------------------------------------------------------------ latencies


def _latencies(
    quantizer: Quantizer,
    wiring: Wiring,
    feed: Mapping[str, np.ndarray] | None,
    threads: int,
    seed: int,
    progress: Progress,
) -> tuple[costs.Costs, bool]:
    """Measure what each unit takes; say whether it was known. Nothing takes any time where there is no input."""
    if feed is None:
        nothing = {link.tensor: 0.0 for link in wiring.links}
        return costs.Costs(nothing, nothing, nothing, nothing), True
    key = memory.context(
        "latencies",
        models=[model_io.fingerprint(quantizer.model), model_io.fingerprint(quantizer.build().model)],
        inputs={name: [list(array.shape), array.dtype.name] for name, array in feed.items()},
        extent=[_MIXTURES, _SECONDS, seed],
        **memory.of_machine(threads),
    )
    kept = memory.Memory(key)
    try:
        known = kept.get("costs")
        if known is not None and known["misfit"] <= _BELIEVED:
            return costs.Costs(**known), True
        build = functools.partial(_built, quantizer, wiring)
        found = costs.measure(
            build, wiring, feed, threads=threads, mixtures=_MIXTURES, seconds=_SECONDS, seed=seed, progress=progress
        )
        kept.put("costs", asdict(found))
    finally:
        kept.close()
    return found, False


def _built(quantizer: Quantizer, wiring: Wiring, integer: frozenset[str]) -> ir.Model:
    realised = wiring.realised(set(integer))
    return quantizer.build({unit.name: "to be timed" for unit in wiring.units if unit.name not in realised}).model


# ------------------------------------------------------------------------------------------ work and bytes


def _float_macs(model: ir.Model, wiring: Wiring) -> dict[str, float]:
    """Return each unit's share of the network's multiply-accumulates."""
    every = {n.name or "": macs(n) or 0 for n in model.graph if n.op_type in LINEAR}
    total = sum(every.values()) or 1
    return {unit.name: every[unit.name] / total for unit in wiring.units if every.get(unit.name)}


#: Bytes of one weight.
_WIDTHS = {mixed.FLOAT: 4.0, mixed.INTEGER: 1.0, mixed.NARROW: 0.5}


def unit_bytes(model: ir.Model, wiring: Wiring, sizes: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the bytes of each unit in each precision that `sizes` has, so that uniform choices come out as measured.

    A unit takes its weights' bytes, and its part of what the file takes beside all units' weights: scales, nodes and
    names of its precision, an equal part for every unit.
    """
    weights = {n.name or "": _numbers(n) for n in model.graph if n.op_type in LINEAR}
    names = [unit.name for unit in wiring.units]
    numbers = {name: weights.get(name, 0) for name in names}
    rest = {k: max(size - _WIDTHS[k] * sum(numbers.values()), 0.0) / len(names) for k, size in sizes.items()}
    return {name: {k: _WIDTHS[k] * numbers[name] + rest[k] for k in sizes} for name in names}


def _numbers(node: ir.Node) -> int:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return 0 if weight is None or weight.const_value is None else int(weight.const_value.size)
