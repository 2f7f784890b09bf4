"""compile(): load -> exact passes -> quantize -> measure -> judge -> guard -> bundle.

Each step is a function that takes the job (what was asked, and of whom) and hands its result on; nothing is kept
between compiles but the content-keyed caches.
"""

from __future__ import annotations

import functools
import math
import platform
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING

from .._version import __version__
from ..passes.quant_params import needed_opset
from . import bundle, closing, devices, files, guard, job, layers, pipeline, trials, wording
from . import model as model_io
from .candidates import Candidate, Lossy, lossy, save
from .closing import State
from .errors import BudgetError
from .explanation.explain import annotate, explain
from .job import Job
from .options import Options, Saving
from .proof import Prover
from .report import text
from .types import (
    Attempt,
    Budget,
    Layer,
    PassRecord,
    Progress,
    QuantScheme,
    Refusal,
    Report,
    silent,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from .low_rank.factorized import Factorized
    from .pruning.pruned import Pruned


def compile(model: Path, out: Path, options: Options, progress: Progress = silent) -> Report:
    """Compile `model` for a device and leave a bundle in `out`.

    Raises ModelError, DataError, DeviceError, OutputError (exit code 2), BudgetError (3, the best attempt is kept in
    `out`) and UnavailableError (4).
    """
    start = time.perf_counter()
    job.check_precision(options)
    with files.staged_folder(out, options.force) as staged, TemporaryDirectory() as work:
        report, broken = _compile(model, staged, Path(work), options, progress, start)
    if broken is not None:
        raise BudgetError(broken, where=str(model), fix=f"relax the budget; the best attempt is in {out}")
    return report


def _compile(
    path: Path, staged: Path, work: Path, options: Options, progress: Progress, start: float
) -> tuple[Report, str | None]:
    """Return the report, the bundle being written into `staged`, and the stated budget that could not be met."""
    original = model_io.load(path)
    this = job.resolve(path, original, options, progress)
    prover = Prover(original, verify=options.verify)
    scheme = job.quant_scheme(this)
    opset = None if scheme is None else needed_opset(scheme)
    float_model, records = pipeline.run(model_io.copy(original), pipeline.exact_passes(opset), prover)
    baseline = save(Candidate("fp32", "fp32", work / "fp32.onnx", float_model))
    tried = _tried(this, float_model, baseline, scheme, prover)
    base, found, cut, state = tried.base, tried.found, tried.cut, tried.state
    this, attempts, chosen, attempt = tried.this, tried.attempts, tried.chosen, tried.attempt
    records += _passes(base, found, chosen)
    refusals = (*(r for record in records for r in record.refusals), *found.refusals)
    report = Report(
        model=path.name,
        device=this.profile,
        backend=this.backend.name,
        target="local" if this.target else "none",
        precision=chosen.precision,
        headline="",
        original=state.measured["original"],
        baseline=state.measured["fp32"],
        result=attempt.measurement,
        fidelity=attempt.fidelity,
        budget=options.budget,
        size_before_bytes=model_io.size_bytes(path),
        size_after_bytes=attempt.size_bytes,
        passes=tuple(records),
        steps=found.steps,
        attempts=attempts,
        layers=_layers(this, found, chosen, refusals),
        refusals=refusals,
        calibration=found.calibration,
        preprocess=this.preprocess,
        warnings=(*filter(None, [found.why_not]), *wording.warnings(this, chosen.precision)),
        advice=wording.advice(this, attempts),
        versions=_versions(),
        machine=devices.local_profile().title,
        seconds=time.perf_counter() - start,
        seed=options.seed,
        robust=found.robust,
        pruning=None if cut is None else cut.pruning,
        low_rank=None if tried.low is None else tried.low.summary,
    )
    report = replace(report, headline=text.headline(report))
    _write(this, chosen, baseline, report, staged)
    return report, _broken(attempt, options)


@dataclass(frozen=True, eq=False)
class _Explored:
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
    requests: tuple[Saving | None, Saving | None],
    before: _Explored | None = None,
) -> _Explored:
    """Prune and factorize if asked to, quantize, measure, judge and choose; where nothing is cut, `before` stands."""
    options, base, cut, low = this.options, baseline, None, None
    prune_by, low_rank_by = requests
    # a folder of its own: what was made of the whole network is raced against what is made of a smaller one
    work = Path(mkdtemp(dir=baseline.path.parent)) if any(requests) else baseline.path.parent
    if prune_by is not None:
        from .pruning.pruned import prune  # scipy: heavy

        cut = prune(this, model, baseline, work, prune_by)
        base = cut.base
    if low_rank_by is not None:
        from .low_rank.factorized import low_rank  # scipy: heavy

        low = low_rank(this, base, work, low_rank_by)
        base = low.base
    if before is not None and base is baseline:
        return replace(before, cut=cut, low=low)
    prover = prover if base is baseline else Prover(base.model, verify=options.verify)
    found = lossy(this, base.model, scheme, prover, base.path)
    this = found.this or this
    smaller = [*(cut.tried if cut is not None else ()), *(low.tried if low is not None else ())]
    first = (baseline, *[c for c in smaller if c is base], *found.candidates)
    tried = State(first, trials.measure(this, first), trials.judge(this, first), base.name)
    state = closing.close(this, found, tried, work)
    attempts = guard.choose(
        [state.attempt(c) for c in state.candidates],
        options.budget,
        named=_named(options, requests),
        unasked=_whole(options, requests, base is not baseline),
    )
    chosen, attempt = next((c, a) for c, a in zip(state.candidates, attempts, strict=True) if a.chosen)
    return _Explored(this, base, found, state, attempts, chosen, attempt, cut, low)


def _tried(this: Job, model: ir.Model, baseline: Candidate, scheme: QuantScheme | None, prover: Prover) -> _Explored:
    """Return the cut network if a cut was asked for, or is shown to pay; else the whole one."""
    explored = functools.partial(_explored, this, model, baseline, scheme, prover)
    options, asked = this.options, (this.options.prune, this.options.low_rank)
    named = any(request is not None and request.saved for request in asked)
    if named or (any(asked) and options.goal == "size"):
        return explored(asked)
    whole = explored((None, None))
    if any(asked):
        return _better(whole, explored(asked, whole))
    found = whole
    for requests in _remedies(this, whole.attempt):
        found = _better(found, explored(requests, found))
        if guard.broken(found.attempt, options.budget) is None:
            break
    return found


def _remedies(this: Job, attempt: Attempt) -> list[tuple[Saving | None, Saving | None]]:
    """Return what to make smaller, and how, where all that was tried misses a stated latency or size."""
    limit, ms = this.options.budget.max_latency_ms, attempt.measurement.median_ms
    if this.images is None:
        return []
    if limit is not None and ms is not None and ms > limit:
        return [(Saving("auto"), None), (None, Saving("auto", "params"))]
    most = this.options.budget.max_size_bytes
    return [(None, Saving("auto", "params"))] if most is not None and attempt.size_bytes > most else []


def _better(whole: _Explored, cut: _Explored) -> _Explored:
    """Return what was made smaller if it holds a stated latency or size, or comes nearer; or, without, is faster."""
    pruned, low = cut.cut or whole.cut, cut.low or whole.low
    budget = whole.this.options.budget
    if cut.base is whole.base:
        return replace(cut, cut=pruned, low=low)
    large = budget.max_size_bytes is not None and whole.attempt.size_bytes > budget.max_size_bytes
    why = _missed(whole, cut) if large or budget.max_latency_ms is not None else _no_faster(whole, cut)
    if why is None:
        return replace(cut, cut=pruned, low=low)
    if pruned is not None and pruned.pruning.kept:
        pruned = replace(pruned, pruning=replace(pruned.pruning, kept=False, why=why))
    if low is not None and low.summary.kept:
        low = replace(low, summary=replace(low.summary, kept=False, why=why))
    return replace(whole, cut=pruned, low=low)


def _missed(whole: _Explored, cut: _Explored) -> str | None:
    """Return why what was made smaller for a stated latency or size is not handed over."""
    budget = cut.this.options.budget
    inside = guard.broken(cut.attempt, replace(budget, max_latency_ms=None, max_size_bytes=None)) is None
    nearer = _beyond(cut.attempt, budget) < _beyond(whole.attempt, budget)
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


def _no_faster(whole: _Explored, cut: _Explored) -> str | None:
    """Return why the best of the cut network is not handed over: the best of the whole one is as fast."""
    both = [replace(one.chosen, name=name) for name, one in (("whole", whole), ("cut", cut))]
    found = trials.measure(cut.this, both, seconds=trials.SECONDS)["cut"]
    if found.speedup_low is None or found.speedup_low > guard.MARGIN:
        return None
    speed = text.ratio(found.speedup)
    return f"it does not pay here: the best of the smaller network is {speed} as fast as that of the whole one"


def _named(options: Options, requests: tuple[Saving | None, Saving | None]) -> str | None:
    """Return the precision that is kept to; where cuts are tried out in floats, the fastest is looked for."""
    tried = any(requests) and not any(request is not None and request.saved for request in requests)
    return None if options.precision == "auto" or (tried and options.precision == "fp32") else options.precision


def _whole(options: Options, requests: tuple[Saving | None, Saving | None], smaller: bool) -> int:
    """Return how many of the first attempts are whole where something smaller was asked for, and made."""
    named = any(request is not None and request.saved for request in requests)
    return int(smaller and any(requests) and (named or options.goal == "size"))


def _passes(base: Candidate, found: Lossy, chosen: Candidate) -> list[PassRecord]:
    """Return the records of the passes behind the exact ones that made what is handed over."""
    if chosen.quantizer is None and chosen.precision == "fp32":
        return list(chosen.records)
    return [*base.records, *found.records, *chosen.records]


# ------------------------------------------------------------------------------------------ reporting


def _layers(this: Job, found: Lossy, chosen: Candidate, refusals: tuple[Refusal, ...]) -> tuple[Layer, ...]:
    """Describe the layers of what is handed over; where that is float, with what was found out about the best try."""
    tried = chosen if chosen.keep_float is not None else next(iter(found.candidates), None)
    if tried is None or tried.quantizer is None or tried.keep_float is None:
        return layers.describe(chosen.model, {}, refusals)
    known = found.mix is not None and tried.quantizer is found.mix.quantizer
    rows = explain(
        replace(tried.quantizer, kept=tried.keep_float),
        this.images,
        statistics=found.statistics,
        contributions=found.mix.tradeoff.errors if found.mix is not None and known else None,
        steps=found.steps,
        without=this.options.without,
        features=this.profile.features,
        refusals=refusals,
        threads=this.threads,
        progress=this.progress,
    )
    return rows if tried is chosen else annotate(layers.describe(chosen.model, {}, refusals), rows)


def _write(this: Job, chosen: Candidate, baseline: Candidate, report: Report, staged: Path) -> None:
    model_io.save(chosen.model, staged / bundle.MODEL)
    if this.target is None and chosen is not baseline:
        model_io.save(baseline.model, staged / bundle.BASELINE)
    artifact = this.backend.lower(staged / bundle.MODEL, this.profile, chosen.precision)
    bundle.write(staged, artifact, report, this.path)


def _broken(attempt: Attempt, options: Options) -> str | None:
    """Return the stated budget that even the chosen attempt breaks."""
    budget = options.budget
    stated = budget if budget.drop_stated else replace(budget, max_drop=float("inf"))
    return guard.broken(attempt, stated)


def _versions() -> dict[str, str]:
    names = ("onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {
        "edgec": __version__,
        "python": platform.python_version(),
        **{n: metadata.version(n) for n in names},
    }
