"""Candidates that the device's TensorRT does not build: which layers to leave in float for the build to pass.

Some versions have no kernel for a quantized layer that others have, and say so only when they build (TensorRT #4832).
What the failure names is left in float first. Where that is nothing, or not enough, it is searched for:

    layers in their order, l1 .. ln; B(S) is whether the model builds with the layers in S left in float
    the least k with B(culprits + {l1 .. lk}) ends in a culprit, lk: bisection, log2 n builds; then the rest again

That finds all culprits if leaving more in float never breaks a build. A build takes minutes on a board, so at most
MOST_BUILDS are made; where they are not enough the candidate is dropped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..backends.targets.on_device import DeviceTarget
from . import candidates, job, layers
from .types import StepRecord

if TYPE_CHECKING:
    from ..backends.targets.device import Refused
    from .candidates import Candidate, Lossy
    from .job import Job

#: Builds that one candidate may cost, beside the first.
MOST_BUILDS = 24
_WHY = "TensorRT does not build the engine with this layer quantized: {}"


@dataclass(frozen=True)
class Search:
    """What a search came to: the layers to leave in float, None where no set of them was found, and the builds made."""

    culprits: tuple[str, ...] | None
    builds: int


def mended(this: Job, found: Lossy) -> Lossy:
    """Return the candidates with the layers in float that keep their engines from being built; told as a step.

    Those that do not build at all are left out. Nothing is asked where nothing is built on a device.
    """
    if not isinstance(this.target, DeviceTarget) or this.backend.in_process:
        return found
    failing = {name: why for name, why in _failures(this, found.candidates).items() if why is not None}
    if not failing:
        return found
    kept, told = [], []
    for c in found.candidates:
        one, said = (c, None) if c.name not in failing else _without_culprits(this, c, failing[c.name])
        kept += [one] if one is not None else []
        told += [said] if said is not None else []
    step = StepRecord("buildable", True, None, None, 0.0, "; ".join(told))
    why_not = found.why_not if kept else "; ".join(told)
    return replace(found, candidates=tuple(kept), steps=(*found.steps, step), why_not=why_not)


def _failures(this: Job, some: Sequence[Candidate]) -> dict[str, Refused | None]:
    """Build the candidates' engines on the device, and return why each does not build."""
    if not some:
        return {}
    assert isinstance(this.target, DeviceTarget)
    runners = {
        c.name: this.target.open(
            this.backend, this.backend.lower(c.path, this.profile, c.precision), this.target_threads
        )
        for c in some
    }
    return this.target.builds(runners, job.one_input(this))


def _without_culprits(this: Job, c: Candidate, why: Refused) -> tuple[Candidate | None, str]:
    """Return the candidate with its culprits in float, None where it does not build, and what is to be said."""
    if c.quantizer is None:
        return None, f"{c.name} was dropped: {why.what}"
    names = [row.node for row in layers.describe(c.model, {}, ()) if row.precision not in ("float32", "float16")]
    built: dict[frozenset[str], tuple[Candidate, Refused | None]] = {}

    def fails(culprits: Collection[str]) -> Refused | None:
        key = frozenset(culprits)
        if key not in built:
            kept = {**(c.keep_float or {}), **{name: _WHY.format(why.what) for name in culprits}}
            one = candidates.again(this, c, kept)
            built[key] = (one, _failures(this, [one])[one.name])
        return built[key][1]

    found = search(names, fails, why.nodes)
    if found.culprits is None:
        return None, f"{c.name} was dropped: {why.what}; no set of layers to leave in float was found"
    one = built[frozenset(found.culprits)][0]
    listed = ", ".join(found.culprits)
    # the search wrote other tries into the same file
    return candidates.save(one), f"{c.name}: {listed} left in float after {found.builds} more builds, since {why.what}"


def search(names: Sequence[str], fails: Callable[[Collection[str]], Refused | None], named: Sequence[str]) -> Search:
    """Return the layers among `names` without which the build passes; `named` are those that the failure names.

    `fails(culprits)` says why the build with those in float fails, or None.
    """
    builds = 0

    def failure(culprits: Collection[str]) -> Refused | None:
        nonlocal builds
        builds += 1
        return fails(culprits)

    culprits = [name for name in names if name in named]
    why = failure(culprits) if culprits else None
    while culprits and why is not None and builds < MOST_BUILDS:
        more = [name for name in names if name in why.nodes and name not in culprits]
        if not more:
            break
        culprits += more
        why = failure(culprits)
    if culprits and why is None:
        return Search(tuple(culprits), builds)
    if failure(names) is not None:
        return Search(None, builds)  # it is not the Q/DQ
    while builds < MOST_BUILDS:
        rest = [name for name in names if name not in culprits]
        low, high = 0, len(rest)  # with rest[:high] in float it builds; with rest[:low] it does not, or is not known to
        while high - low > 1 and builds < MOST_BUILDS:
            middle = (low + high) // 2
            if failure([*culprits, *rest[:middle]]) is None:
                high = middle
            else:
                low = middle
        culprits.append(rest[high - 1])
        if failure(culprits) is None:
            return Search(tuple(culprits), builds)
    return Search(None, builds)
