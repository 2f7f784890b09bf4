"""Measured latency of each unit in each precision, and of the conversions between units of different precision.

ONNX Runtime's profiler times the kernels of a few models: all float, all integer, and random mixtures. Each kernel
belongs to one link (units.py): the tensor whose computation, movement, reordering or conversion it is. With t_l(x) the
time of link l under the assignment x, p its producer,

    float_l = t_l(nothing quantized)         integer_l = t_l(everything quantized)
    enter_l = what t_l(x) exceeds float_l by, where p is float and a reader works on integers
    leave_l = what t_l(x) exceeds integer_l by, where p works on integers and a reader is float

    latency(x) = sum of float_l or integer_l + sum of the enter_l and leave_l that x causes

So whatever a boundary brings about is in its measured price: QuantizeLinear, transposes between layouts, a kernel
that the runtime chooses worse because of it. A boundary that no mixture showed gets the typical price per element.
The profiler slows what it watches, by about the same for every kernel, which matters where kernels are small: so each
kernel's time is corrected to a t - b, with a and b such that the sums fit the models' whole latencies, measured
without the profiler (least relative squares). Then float_l and integer_l are each scaled so that the two ends, the
float model and the fullest quantization, come out as measured: they are what budgets are compared with.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import nnls

from ...backends.ort import Session
from ...backends.targets import timing
from .. import model as model_io
from ..latency.attribution import longest_known
from ..latency.kernel_times import Kernel, profile, undisturbed
from ..types import Progress, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from .units import Link, Wiring

#: Builds the model in which these units, and no others, run on integers.
Build = Callable[[frozenset[str]], "ir.Model"]


@dataclass(frozen=True)
class Costs:
    """Milliseconds by link: in float, on integers, and of the step from one to the other.

    Links that no unit produces take `float_ms` whatever is chosen. `misfit` is the largest relative difference
    between predicted and measured latency among the models that were measured.
    """

    float_ms: Mapping[str, float]
    integer_ms: Mapping[str, float]
    enter_ms: Mapping[str, float]
    leave_ms: Mapping[str, float]
    misfit: float = 0.0

    def predict(self, wiring: Wiring, integer: Iterable[str]) -> float:
        """Return the predicted milliseconds of one call with these units on integers."""
        chosen = wiring.realised(set(integer))
        total = sum(self.float_ms.values())
        for link in wiring.links:
            inside = link.producer in chosen
            if inside:
                total += self.integer_ms[link.tensor] - self.float_ms[link.tensor]
            if _crosses(link, chosen):
                total += (self.leave_ms if inside else self.enter_ms)[link.tensor]
        return total


def _crosses(link: Link, integer: Collection[str]) -> bool:
    """Say whether a reader has another precision than the producer."""
    return any((reader in integer) != (link.producer in integer) for reader in link.readers)


# ---------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Sample:
    """One measured model: the units on integers, the kernels by link (milliseconds, count), and the whole's latency."""

    integer: frozenset[str]
    by_link: Mapping[str, tuple[float, int]]
    whole_ms: float


def measure(
    build: Build,
    wiring: Wiring,
    feed: Mapping[str, np.ndarray],
    *,
    threads: int,
    mixtures: int = 8,
    seconds: float = 6.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Costs:
    """Measure the model in float, on integers, and in random mixtures, and return the costs of its parts.

    `feed` is one input; `seconds` of timing in all, half with and half without the profiler.
    """
    return fit(
        sample(build, wiring, feed, mixed(wiring, mixtures, seed), threads=threads, seconds=seconds, progress=progress),
        wiring,
    )


def mixed(wiring: Wiring, count: int, seed: int) -> list[frozenset[str]]:
    """Return all float, all integer, and `count` random mixtures, in pairs of complements (so all steps show)."""
    names = [unit.name for unit in wiring.units]
    rng = np.random.default_rng(seed)
    found = [frozenset[str](), frozenset(names)]
    for _ in range((count + 1) // 2):
        half = frozenset(name for name, one in zip(names, rng.random(len(names)) < 0.5, strict=True) if one)
        found += [half, frozenset(names) - half]
    return found[: count + 2]


def sample(
    build: Build,
    wiring: Wiring,
    feed: Mapping[str, np.ndarray],
    assignments: Sequence[frozenset[str]],
    *,
    threads: int,
    seconds: float = 6.0,
    progress: Progress = silent,
) -> list[Sample]:
    """Build these assignments and measure them: their kernels, and their latency as a whole, all interleaved."""
    with TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        float_model = build(frozenset())
        for i, assignment in enumerate(assignments):
            paths[str(i)] = Path(folder) / f"{i}.onnx"
            model_io.save(float_model if not assignment else build(assignment), paths[str(i)])
        sessions = {name: Session(path, threads=threads) for name, path in paths.items()}
        calls = {name: functools.partial(session.run, feed) for name, session in sessions.items()}
        whole = timing.interleave(calls, seconds=seconds / 2, warm_up=0.1, min_rounds=20, progress=progress)
        del calls, sessions
        kernels = profile(paths, feed, threads=threads, deadline=time.monotonic() + seconds / 2, progress=progress)
    return [
        Sample(frozenset(wiring.realised(set(a))), by_link(kernels[n], float_model, wiring), undisturbed(whole[n]))
        for n, a in zip(paths, assignments, strict=True)
    ]


def fit(samples: Sequence[Sample], wiring: Wiring) -> Costs:
    """Return the costs that explain the samples; among them must be the float model and the fullest quantization."""
    a, b = _overhead(samples)
    times = [{home: max(a * ms - b * n, 0.0) for home, (ms, n) in s.by_link.items()} for s in samples]
    nothing = min(range(len(samples)), key=lambda i: len(samples[i].integer))
    everything = max(range(len(samples)), key=lambda i: len(samples[i].integer))
    float_ms = {home: times[nothing].get(home, 0.0) for home in {h for t in times for h in t}}
    float_ms |= {link.tensor: float_ms.get(link.tensor, 0.0) for link in wiring.links}
    integer_ms = {link.tensor: times[everything].get(link.tensor, 0.0) for link in wiring.links if link.producer}
    steps: dict[str, dict[str, list[float]]] = {"enter": {}, "leave": {}}
    for one, ms in zip(samples, times, strict=True):
        for link in wiring.links:
            if _crosses(link, one.integer):
                inside = link.producer in one.integer
                own = (integer_ms if inside else float_ms)[link.tensor]
                excess = ms.get(link.tensor, 0.0) - own
                steps["leave" if inside else "enter"].setdefault(link.tensor, []).append(excess)
    enter, leave = (_filled(found, wiring) for found in steps.values())
    costs = _anchored(Costs(float_ms, integer_ms, enter, leave), wiring, samples[nothing], samples[everything])
    return replace(costs, misfit=max(abs(costs.predict(wiring, s.integer) / s.whole_ms - 1) for s in samples))


def _anchored(costs: Costs, wiring: Wiring, nothing: Sample, everything: Sample) -> Costs:
    """Scale the links' times so that the float model and the fullest quantization are predicted as measured."""
    scale = nothing.whole_ms / max(costs.predict(wiring, nothing.integer), 1e-9)
    float_ms = {home: ms * scale for home, ms in costs.float_ms.items()}
    rest = replace(costs, float_ms=float_ms, integer_ms=dict.fromkeys(costs.integer_ms, 0.0))
    links = (link.tensor for link in wiring.links if link.producer in everything.integer)
    own = sum(costs.integer_ms[tensor] for tensor in links)
    scale = max(everything.whole_ms - rest.predict(wiring, everything.integer), 0.0) / max(own, 1e-9)
    return replace(rest, integer_ms={home: ms * scale for home, ms in costs.integer_ms.items()})


def _overhead(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return (a, b): a kernel that the profiler times at t takes a t - b."""
    sums = np.array([[sum(v[i] for v in s.by_link.values()) for i in (0, 1)] for s in samples], dtype=np.float64)
    whole = np.array([s.whole_ms for s in samples])
    (a, b), _ = nnls(sums / whole[:, None] * [1, -1], np.ones(len(samples)))
    return float(a), float(b)


def _filled(steps: Mapping[str, Sequence[float]], wiring: Wiring) -> dict[str, float]:
    """Return each link's median step, at least 0; where none was seen, the median per element of the others."""
    seen = {tensor: max(float(np.median(values)), 0.0) for tensor, values in steps.items()}
    sizes = {link.tensor: link.elements or 0 for link in wiring.links}
    rates = [ms / sizes[tensor] for tensor, ms in seen.items() if sizes[tensor]]
    rate = float(np.median(rates)) if rates else 0.0
    return {tensor: seen.get(tensor, rate * size) for tensor, size in sizes.items()}


# ---------------------------------------------------------------------------------------------- attribution


def by_link(kernels: Iterable[Kernel], model: ir.Model, wiring: Wiring) -> dict[str, tuple[float, int]]:
    """Return (milliseconds, number) by link: of the kernels that compute, move, reorder or convert its tensor.

    ONNX Runtime's names keep those of the nodes and tensors they come from, with something appended; what it made up
    itself (reorders, transposes) belongs to the tensor that it reads.
    """
    homes = dict(wiring.link_of)
    for node in model.graph:
        homes.setdefault(node.name or "", wiring.link_of.get(node.outputs[0].name or "", ""))
    found: dict[str, tuple[float, int]] = {}
    known: dict[str, str] = {}
    for kernel in kernels:
        anonymous = kernel.name == kernel.op or kernel.name.startswith(f"{kernel.op}_token_")
        names = [*kernel.outputs, *([] if anonymous else [kernel.name])]
        upstream = (home for name in kernel.inputs if (home := known.get(name) or wiring.link_of.get(name)))
        home = next((homes[k] for k in (longest_known(name, homes) for name in names) if k), next(upstream, ""))
        for name in kernel.outputs:
            known[name] = home
        ms, count = found.get(home, (0.0, 0))
        found[home] = (ms + kernel.ms, count + 1)
    return found
