"""Which networks are explored, the whole one and smaller ones, and which of them is handed over.

    (None, None)            the whole network: quantized, mixed, measured, judged
    (prune, low rank)       the same of a smaller one, that was asked for or is tried

What is asked for with a number is made, and nothing else. `auto` explores the whole network first and a smaller one
beside it; where both channels and ranks are left to it, each alone, and both together with half of the quality budget
for each. A stated latency or size that nothing holds is tried for in the same way. The best of each race once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from . import buildable, closing, guard, trials
from .candidates import Candidate, Lossy, lossy
from .closing import State
from .options import Options, Saving
from .proof import Prover
from .report import text
from .types import Attempt, Budget, Fidelity, QuantScheme

if TYPE_CHECKING:
    import onnx_ir as ir

    from .job import Job
    from .low_rank.factorized import Factorized
    from .pruning.pruned import Pruned

#: Precisions beside which FP16 is the baseline.
HALF_FIRST = ("auto", "int8", "fp8", "int4")
#: What is asked of pruning, and of low rank.
Requests = tuple["Saving | None", "Saving | None"]


@dataclass(frozen=True, eq=False)
class Explored:
    """What was tried on the float model as it is, or as it was cut, and which of that is handed over."""

    this: Job
    base: Candidate
    found: Lossy
    state: State
    attempts: tuple[Attempt, ...]
    chosen: Candidate
    attempt: Attempt
    cut: Pruned | None = None
    low: Factorized | None = None


def _explored(
    this: Job,
    model: ir.Model,
    baseline: Candidate,
    scheme: QuantScheme | None,
    prover: Prover,
    requests: Requests,
    before: Explored | None = None,
) -> Explored:
    """Prune and factorize if asked to, quantize, measure, judge and choose; where nothing is cut, `before` stands."""
    options, base, cut, low = this.options, baseline, None, None
    prune_by, low_rank_by = requests
    # a folder of its own: what was made of the whole network is raced against what is made of a smaller one
    work = Path(mkdtemp(dir=baseline.path.parent)) if any(requests) else baseline.path.parent
    if prune_by is not None:
        from .pruning.pruned import prune  # scipy: heavy

        cut = prune(_halved(this) if _both_auto(requests) else this, model, baseline, work, prune_by)
        base = cut.base
    if low_rank_by is not None:
        from .low_rank.factorized import low_rank  # scipy: heavy

        low = low_rank(this, base, work, low_rank_by, None if before is None else before.attempt)
        base = low.base
    if before is not None and base is baseline:
        return replace(before, cut=cut, low=low)
    prover = prover if base is baseline else Prover(base.model, verify=options.verify)
    found = buildable.mended(this, lossy(this, base.model, scheme, prover, base.path))
    this = found.this or this
    smaller = [*(cut.tried if cut is not None else ()), *(low.tried if low is not None else ())]
    first = (baseline, *[c for c in smaller if c is base], *found.candidates)
    judged = trials.judge(this, first, as_built=True)
    first = _led(this, first, judged)
    tried = State(first, trials.measure(this, first), judged, base.name)
    state = closing.close(this, found, tried, work)
    attempts = guard.choose(
        [state.attempt(c) for c in state.candidates],
        options.budget,
        named=_named(options, requests),
        unasked=_whole(options, requests, base is not baseline),
    )
    chosen, attempt = next((c, a) for c, a in zip(state.candidates, attempts, strict=True) if a.chosen)
    return Explored(this, base, found, state, attempts, chosen, attempt, cut, low)


def _led(this: Job, candidates: tuple[Candidate, ...], judged: Mapping[str, Fidelity]) -> tuple[Candidate, ...]:
    """Return the candidates with the float baseline in front: FP16, where it is what the device is for and holds.

    INT8 is often slower than FP16 on a GPU: shown to be faster than FP32 alone, it would cost quality for nothing.
    """
    half = next((c for c in candidates if c.precision == "fp16"), None)
    cut = any(request is not None for request in (this.options.prune, this.options.low_rank))
    asked = this.options.precision
    if half is None or cut or this.target is None or asked not in HALF_FIRST or not this.backend.casts:
        return candidates
    if asked != "auto" and all(c.precision != asked for c in candidates):
        return candidates  # what was asked for cannot be had, and FP16 was not asked for
    found = judged.get(half.name)
    if found is not None and found.drop is not None and not found.drop <= this.options.budget.max_drop:
        return candidates
    return (half, *[c for c in candidates if c is not half])


def _both_auto(requests: Requests) -> bool:
    return all(request is not None and not request.saved for request in requests)


def _halved(this: Job) -> Job:
    """Return the job with half of the budget for quality: ranks get the other half."""
    budget = replace(this.options.budget, max_drop=this.options.budget.max_drop / 2)
    return replace(this, options=replace(this.options, budget=budget))


def tried(this: Job, model: ir.Model, baseline: Candidate, scheme: QuantScheme | None, prover: Prover) -> Explored:
    """Return the smaller network if one was asked for, or is shown to pay; else the whole one."""
    explored = functools.partial(_explored, this, model, baseline, scheme, prover)
    options, asked = this.options, (this.options.prune, this.options.low_rank)
    named = any(request is not None and request.saved for request in asked)
    if named or (any(asked) and options.goal == "size"):
        return explored(asked)
    found = whole = explored((None, None))
    for requests in _ways(asked) if any(asked) else _remedies(this, whole.attempt):
        found = _better(found, explored(requests, found))
        if not any(asked) and guard.broken(found.attempt, options.budget) is None:
            break
    return found


def _ways(asked: Requests) -> list[Requests]:
    """Return each of what may be tried alone, and both together."""
    prune_by, low_rank_by = asked
    alone: list[Requests] = [(prune_by, None), (None, low_rank_by)]
    return [*alone, asked] if all(asked) else [asked]


def _remedies(this: Job, attempt: Attempt) -> list[Requests]:
    """Return what to make smaller, and how, where all that was tried misses a stated latency or size."""
    limit, ms = this.options.budget.max_latency_ms, attempt.measurement.median_ms
    if this.images is None or not this.backend.runs_onnx:
        return []
    if limit is not None and ms is not None and ms > limit:
        asked = "what --max-latency needs"
        return [(Saving(asked), None), (None, Saving(asked, "params"))]
    most = this.options.budget.max_size_bytes
    return [(None, Saving("what --max-size needs", "params"))] if most is not None and attempt.size_bytes > most else []


def _better(one: Explored, other: Explored) -> Explored:
    """Return the `other`, smaller one if it holds a stated latency or size, or comes nearer; or, without, is faster."""
    budget = one.this.options.budget
    if other.base is one.base:
        return _told(one, other, "")
    large = budget.max_size_bytes is not None and one.attempt.size_bytes > budget.max_size_bytes
    why = _missed(one, other) if large or budget.max_latency_ms is not None else _no_faster(one, other)
    return _told(other, one, "what was made otherwise is better") if why is None else _told(one, other, why)


def _told(kept: Explored, other: Explored, why: str) -> Explored:
    """Return what is handed over, with what is to be said of the other: that it is not, and why."""
    cut, low = kept.cut, kept.low
    if cut is None and other.cut is not None:
        found = other.cut.pruning
        cut = replace(other.cut, pruning=replace(found, kept=False, why=why) if found.kept else found)
    if low is None and other.low is not None:
        summary = other.low.summary
        low = replace(other.low, summary=replace(summary, kept=False, why=why) if summary.kept else summary)
    return replace(kept, cut=cut, low=low)


def _missed(one: Explored, cut: Explored) -> str | None:
    """Return why what was made smaller for a stated latency or size is not handed over."""
    budget = cut.this.options.budget
    inside = guard.broken(cut.attempt, replace(budget, max_latency_ms=None, max_size_bytes=None)) is None
    nearer = _beyond(cut.attempt, budget) < _beyond(one.attempt, budget)
    if guard.broken(cut.attempt, budget) is None or (inside and nearer):
        return None
    tried = [a for a in cut.attempts[1:] if a.measurement.median_ms is not None] or [cut.attempt]
    best = min(tried, key=lambda a: a.measurement.median_ms or math.inf)
    asked = "latency" if budget.max_latency_ms is not None else "size"
    return f"made smaller for the stated {asked}, but {best.name} of that {best.verdict}; nothing was changed"


def _beyond(attempt: Attempt, budget: Budget) -> float:
    """Return by which factor an attempt misses the stated latency or size, whichever is worse."""
    slow = 0.0 if budget.max_latency_ms is None else (attempt.measurement.median_ms or math.inf) / budget.max_latency_ms
    return max(slow, 0.0 if budget.max_size_bytes is None else attempt.size_bytes / budget.max_size_bytes)


def _no_faster(whole: Explored, cut: Explored) -> str | None:
    """Return why the best of the cut network is not handed over: the best of the whole one is as fast."""
    both = [replace(one.chosen, name=name) for name, one in (("whole", whole), ("cut", cut))]
    found = trials.measure(cut.this, both, seconds=trials.SECONDS)["cut"]
    if found.speedup_low is None:
        return "nothing is measured, and the whole network holds what was asked for"
    if found.speedup_low > guard.MARGIN:
        return None
    speed = text.ratio(found.speedup)
    return f"it does not pay here: the best of the smaller network is {speed} as fast as the best otherwise"


def _named(options: Options, requests: Requests) -> str | None:
    """Return the precision that is kept to; where cuts are tried out in floats, the fastest is looked for."""
    tried = any(requests) and not any(request is not None and request.saved for request in requests)
    return None if options.precision == "auto" or (tried and options.precision == "fp32") else options.precision


def _whole(options: Options, requests: Requests, smaller: bool) -> int:
    """Return how many of the first attempts are whole where something smaller was asked for, and made."""
    named = any(request is not None and request.saved for request in requests)
    return int(smaller and any(requests) and (named or options.goal == "size"))
