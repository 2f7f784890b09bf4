"""Which nodes run on integers: the frontier of error against latency, for one quantizer on this machine.

1. Every rounding's own error at the network's outputs is measured on calibration images (contributions.py).
2. Every node's latency in float and on integers, and that of the steps between them, is measured (costs.py).
3. An integer program gives the assignments that are best for their latency (mixed.py).

What comes out are predictions beside assignments; driver.py builds, measures and judges them like any candidate.
Without a target to measure on, the multiply-accumulates left in float stand in for the latency.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..passes.placement import Placement, place
from . import contributions, costs, mixed
from .closeness import few
from .errors import BudgetError
from .layers import LINEAR, macs
from .quantizer import Quantizer
from .switchboard import Switchboard
from .types import Progress
from .units import Wiring, wire

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..calib.folder import Folder

#: At least this share of the multiply-accumulates stays on integers where integers were asked for.
LEAST_INTEGER = 0.5
#: Points of the frontier, and its mixtures' and their timing's extent.
_POINTS, _MIXTURES, _SECONDS = 6, 6, 3.0
#: Images that each rounding is judged on, within these limits: so many as keep the input numbers, and the
#: multiply-accumulates of running the network once for each rounding, below the other two.
_FEWEST, _MOST, _NUMBERS, _WORK = 2, 32, 4 * 3 * 352 * 352, 1e12
#: Assignments are looked for up to this multiple of the plain one's latency, or of the float one's if that is less.
_REACH = 1.06
#: Seconds after which no further image is taken, where no budget is stated.
_PATIENCE = 45.0


@dataclass(frozen=True)
class Point:
    """One assignment: what stays in float (with the reason), and what is predicted of it.

    `speedup` is over the float model, None where nothing was measured; `db` is the SQNR of the outputs, `integer_macs`
    the share on integers.
    """

    keep_float: Mapping[str, str]
    speedup: float | None
    db: float
    integer_macs: float


@dataclass(frozen=True)
class Exploration:
    """The frontier, the plain assignment's predictions, and how far the latency model is off on what was measured."""

    points: tuple[Point, ...]
    plain: Point
    contributions: contributions.Contributions
    latency_misfit: float | None
    images: int


def explore(
    quantizer: Quantizer,
    images: Folder,
    feed: Mapping[str, np.ndarray] | None,
    *,
    threads: int,
    seed: int = 0,
    least_integer: float = LEAST_INTEGER,
    reach: float | None = _REACH,
    seconds: float | None = None,
    progress: Progress,
) -> Exploration | None:
    """Return the frontier; None where there is nothing to choose.

    `feed` is one input to time, None to time nothing. At least `least_integer` of the multiply-accumulates stays on
    integers, and nothing slower than `reach` times the plain assignment is looked for (None: whatever it takes).
    `seconds` bounds the measuring of errors and the search.
    """
    scheme = quantizer.scheme
    wiring = wire(quantizer.model, _placement(quantizer))
    if len(wiring.units) < 2:
        return None
    deadline = time.monotonic() + (_PATIENCE if seconds is None else seconds)
    bare = replace(quantizer, scheme=replace(scheme, shield_float=False, nhwc_kernels=False)).build().model
    board = Switchboard(quantizer.model, bare, wiring, threads=threads)
    some = _images(images, quantizer.model, len(wiring.units))
    errors = contributions.measure(
        board,
        wiring,
        some.batches(max(1, min(16, len(some) // 2))),
        images=len(some),
        cumulative=False,
        seed=seed,
        deadline=deadline,
        progress=progress,
    )
    del board
    work = _float_macs(quantizer.model, wiring)
    if feed is None:
        prices, measure = _no_costs(wiring), "float_macs"
    else:
        build = functools.partial(_built, quantizer, wiring)
        prices = costs.measure(
            build, wiring, feed, threads=threads, mixtures=_MIXTURES, seconds=_SECONDS, seed=seed, progress=progress
        )
        measure = "ms"
    problem = mixed.mixed_problem(wiring, prices, errors, {"float_macs": {n: (part, 0.0) for n, part in work.items()}})
    everything, nothing = (_uniform(problem, precision) for precision in (mixed.INTEGER, mixed.FLOAT))
    possible = sum(work.values()) if work else 1.0  # layers without an integer form are float whatever is chosen
    limits = {"float_macs": max(possible - least_integer, 0.0)}
    fastest = min(everything.predicted["ms"], nothing.predicted["ms"])
    reached = {} if reach is None or feed is None else {"ms": reach * fastest}
    search = functools.partial(
        mixed.frontier, problem, "error", measure, points=_POINTS, deadline=deadline, progress=progress
    )
    try:
        found = search(limits=limits | reached)
    except BudgetError:  # nothing with so much on integers is as fast
        found = search(limits=limits)
    float_ms = nothing.predicted["ms"] if feed is not None else None
    points = [_point(one, wiring, errors, possible, float_ms) for one in found]
    return Exploration(
        tuple(p for p in points if p.keep_float),
        _point(everything, wiring, errors, possible, float_ms),
        errors,
        prices.misfit if feed is not None else None,
        errors.images,
    )


def _placement(quantizer: Quantizer) -> Placement:
    return place(quantizer.model, quantizer.ranges, quantizer.supports, quantizer.scheme, quantizer.kept)


def _images(images: Folder, model: ir.Model, units: int) -> Folder:
    some = few(images)
    size = sum(math.prod(d or 1 for d in spec.shape[1:]) for spec in images.specs)
    work = units * sum(macs(n) or 0 for n in model.graph if n.op_type in LINEAR)
    most = min(_MOST, _NUMBERS // max(size, 1), int(_WORK / max(work, 1)))
    count = min(len(some), max(_FEWEST, most))
    return some.subset(i * len(some) // count for i in range(count))


def _built(quantizer: Quantizer, wiring: Wiring, integer: frozenset[str]) -> ir.Model:
    return quantizer.build(_in_float(wiring, integer)).model


def _in_float(wiring: Wiring, integer: frozenset[str]) -> dict[str, str]:
    reason = "mixed precision: in float the network is closer to the original for its latency"
    realised = wiring.realised(set(integer))
    return {unit.name: reason for unit in wiring.units if unit.name not in realised}


def _point(
    one: mixed.Assignment,
    wiring: Wiring,
    errors: contributions.Contributions,
    possible: float,
    float_ms: float | None,
) -> Point:
    error = errors.expected(one.predicted.get("error", 0.0))
    return Point(
        _in_float(wiring, one.having(mixed.INTEGER)),
        None if float_ms is None else float_ms / one.predicted["ms"],
        -10 * math.log10(error) if error > 0 else math.inf,
        possible - one.predicted.get("float_macs", 0.0),
    )


def _float_macs(model: ir.Model, wiring: Wiring) -> dict[str, float]:
    """Return each unit's share of the network's multiply-accumulates."""
    every = {n.name or "": macs(n) or 0 for n in model.graph if n.op_type in LINEAR}
    total = sum(every.values()) or 1
    return {unit.name: every[unit.name] / total for unit in wiring.units if every.get(unit.name)}


def _uniform(problem: mixed.Problem, precision: str) -> mixed.Assignment:
    choice = dict.fromkeys(problem.choices, precision)
    return mixed.Assignment(choice, problem.amounts(choice))


def _no_costs(wiring: Wiring) -> costs.Costs:
    nothing = {link.tensor: 0.0 for link in wiring.links}
    return costs.Costs(nothing, nothing, nothing, nothing)
