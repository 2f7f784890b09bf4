"""compile(): load -> exact passes -> quantize -> measure -> judge -> guard -> bundle.

Each step is a function that takes the job (what was asked, and of whom) and hands its result on; nothing is kept
between compiles but the content-keyed caches.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .._version import __version__
from ..backends.ort import Session
from ..passes.quant_params import needed_opset
from . import bundle, devices, fidelity, files, guard, job, layers, pipeline, wording
from . import model as model_io
from .candidates import Candidate, Lossy, feed, lossy, save, widened
from .errors import BudgetError
from .explain import annotate, explain
from .job import Job
from .options import Options
from .proof import Prover
from .report import text
from .types import (
    Attempt,
    Fidelity,
    Layer,
    Measurement,
    Progress,
    Refusal,
    Report,
    silent,
)

if TYPE_CHECKING:
    from ..backends.base import Runner


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
    found = lossy(this, float_model, scheme, prover, work)
    candidates = [baseline, *found.candidates]
    measured, judged = _measure(this, candidates), _judge(this, candidates)
    if found.quantizer is not None and _should_widen(this, candidates, measured, judged):
        more = widened(this, found.quantizer, work)
        candidates += more
        judged |= _judge(this, more)
        measured = _measure(this, [c for c in candidates if c not in more or not _loses(this, judged[c.name])])
    named = None if options.precision == "auto" else options.precision
    attempts = guard.choose([_attempt(c, measured, judged) for c in candidates], options.budget, named=named)
    chosen, attempt = next((c, a) for c, a in zip(candidates, attempts, strict=True) if a.chosen)
    records += [*found.records, *chosen.records] if chosen is not baseline else []
    refusals = (*(r for record in records for r in record.refusals), *found.refusals)
    report = Report(
        model=path.name,
        device=this.profile,
        backend=this.backend.name,
        target="local" if this.target else "none",
        precision=chosen.precision,
        headline="",
        original=measured["original"],
        baseline=measured["fp32"],
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
    )
    report = replace(report, headline=text.headline(report))
    _write(this, chosen, baseline, report, staged)
    return report, _broken(attempt, options)


def _should_widen(
    this: Job, candidates: Sequence[Candidate], measured: Mapping[str, Measurement], judged: Mapping[str, Fidelity]
) -> bool:
    """Step back only where it can help: the budget is broken, and matters, and integers are faster to begin with."""
    named = this.options.precision != "auto"
    if named and not this.options.budget.drop_stated:
        return False
    attempts = [_attempt(c, measured, judged) for c in candidates[1:]]
    if not all(a.fidelity is not None and _loses(this, a.fidelity) for a in attempts):
        return False
    return named or any(guard.shown_faster(a) or a.measurement.median_ms is None for a in attempts)


def _loses(this: Job, found: Fidelity) -> bool:
    return found.drop is not None and found.drop > this.options.budget.max_drop


# ------------------------------------------------------------------------------------------ measuring and judging


def _measure(this: Job, candidates: Sequence[Candidate]) -> dict[str, Measurement]:
    names = ["original", *(c.name for c in candidates)]
    if this.target is None:
        return {n: Measurement(n, "none", None, reason=this.not_measured) for n in names}
    runners: dict[str, Runner] = {}
    runners["original"] = this.backend.open(this.backend.lower(this.path, this.profile, "fp32"), this.threads)
    for c in candidates:
        runners[c.name] = this.backend.open(this.backend.lower(c.path, this.profile, c.precision), this.threads)
    return this.target.measure(runners, feed(this), baseline="fp32", threads=this.threads, progress=this.progress)


def _judge(this: Job, candidates: Sequence[Candidate]) -> dict[str, Fidelity]:
    """Compare the candidates with the original, which runs with ONNX Runtime's optimisations off."""
    if this.judged is None or not candidates:
        return {}
    return fidelity.compare(
        Session(this.path, threads=this.threads, optimise=False),
        {c.name: Session(c.judged or c.path, threads=this.threads, fuse_quantized=c.fused) for c in candidates},
        this.judged.batches(8),
        images=len(this.judged),
        metric=this.metric,
        labelled=this.options.eval is not None,
        seed=this.options.seed,
        progress=this.progress,
    )


def _attempt(c: Candidate, measured: Mapping[str, Measurement], judged: Mapping[str, Fidelity]) -> Attempt:
    left_out = Measurement(c.name, "none", None, reason="it is outside the quality budget")
    measurement = measured.get(c.name, left_out)
    size = model_io.size_bytes(c.path)
    found = Attempt(c.name, c.precision, measurement, judged.get(c.name), size, False, "")
    if c.predicted is None:
        return found
    baseline = measured["fp32"].median_ms  # what is predicted is the ratio to it
    ms = None if baseline is None or c.predicted.speedup is None else baseline / c.predicted.speedup
    return replace(found, predicted_ms=ms, predicted_db=c.predicted.db, calibration_db=c.calibration_db)


# ------------------------------------------------------------------------------------------ reporting


def _layers(this: Job, found: Lossy, chosen: Candidate, refusals: tuple[Refusal, ...]) -> tuple[Layer, ...]:
    """Describe the layers of what is handed over; where that is float, with what was found out about the best try."""
    tried = chosen if chosen.keep_float is not None else next(iter(found.candidates), None)
    if found.quantizer is None or tried is None or tried.keep_float is None:
        return layers.describe(chosen.model, {}, refusals)
    rows = explain(
        replace(found.quantizer, kept=tried.keep_float),
        this.images,
        statistics=found.statistics,
        contributions=found.contributions,
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
