"""compile(): load -> exact passes -> quantize -> measure -> judge -> guard -> bundle.

Each step is a function that takes the job (what was asked, and of whom) and hands its result on; nothing is kept
between compiles but the content-keyed caches.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .._version import __version__
from ..backends import base as backends
from ..backends.ort import Session
from ..backends.targets.local import LocalTarget
from ..calib import cache, folder, preprocess
from ..calib import ranges as calib_ranges
from . import bundle, devices, fidelity, files, guard, headline, layers, pipeline
from . import model as model_io
from .errors import BudgetError, DataError, UnavailableError, UserError
from .metrics import load_metric
from .options import PLANNED_PRECISIONS, PRECISIONS, Options
from .proof import Prover
from .quantizer import DEFAULT_METHOD, Quantized, Quantizer, choose_ranges, collapsed, observed, widened
from .types import (
    Attempt,
    CalibrationSummary,
    DeviceProfile,
    Fidelity,
    Measurement,
    PassRecord,
    Preprocess,
    Progress,
    QuantScheme,
    Range,
    Refusal,
    Report,
    silent,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..backends.base import Backend, Runner

_NO_CALIBRATION = (
    "without calibration images only exact passes ran; --calib FOLDER with a few hundred images allows INT8"
)


@dataclass(frozen=True)
class Job:
    """One compile: what was asked, resolved to objects."""

    path: Path
    options: Options
    profile: DeviceProfile
    backend: Backend
    target: LocalTarget | None
    not_measured: str | None
    threads: int
    preprocess: Preprocess | None
    images: folder.Folder | None
    judged: folder.Folder | None
    metric: fidelity.Metric | None
    progress: Progress


@dataclass(frozen=True)
class Candidate:
    """A model on disk that may become the result."""

    name: str
    precision: str
    path: Path
    model: ir.Model
    quantized: Quantized | None = None


def compile(model: Path, out: Path, options: Options, progress: Progress = silent) -> Report:
    """Compile `model` for a device and leave a bundle in `out`.

    Raises ModelError, DataError, DeviceError, OutputError (exit code 2), BudgetError (3, the best attempt is kept in
    `out`) and UnavailableError (4).
    """
    start = time.perf_counter()
    _check_precision(options)
    with files.staged_folder(out, options.force) as staged, TemporaryDirectory() as work:
        report, broken = _compile(model, staged, Path(work), options, progress, start)
    if broken is not None:
        raise BudgetError(broken, where=str(model), fix=f"relax the budget; the best attempt is in {out}")
    return report


def _compile(
    path: Path, staged: Path, work: Path, options: Options, progress: Progress, start: float
) -> tuple[Report, str | None]:
    original = model_io.load(path)
    job = _job(path, original, options, progress)
    _refuse_unsupported(job, original)
    prover = Prover(original, verify=options.verify)
    exact = pipeline.exact_passes(for_integers=_wants_integers(job))
    float_model, records = pipeline.run(model_io.copy(original), exact, prover)
    baseline = _save(Candidate("fp32", "fp32", work / "fp32.onnx", float_model))
    calibration, quantizer, errors, candidates = _quantize(job, float_model, work)
    candidates = [baseline, *candidates]
    measured = _measure(job, candidates)
    judged = _judge(job, candidates)
    if quantizer is not None and errors and _should_widen(job, candidates, measured, judged):
        more = _widen(job, quantizer, errors, candidates[-1], work)
        measured |= {k: v for k, v in _measure(job, [baseline, *more]).items() if k not in measured}
        judged |= _judge(job, more)
        candidates += more
    attempts = guard.choose(
        [_attempt(c, measured, judged) for c in candidates],
        options.budget,
        named=None if options.precision == "auto" else options.precision,
    )
    chosen_at = next(i for i, a in enumerate(attempts) if a.chosen)
    chosen, attempt = candidates[chosen_at], attempts[chosen_at]
    if chosen.quantized is not None:
        records.append(chosen.quantized.record)
    report = Report(
        model=path.name,
        device=job.profile,
        backend=job.backend.name,
        target="local" if job.target else "none",
        precision=chosen.precision,
        headline=headline.compose(job.profile, attempt, measured["original"]),
        original=measured["original"],
        baseline=measured["fp32"],
        result=attempt.measurement,
        fidelity=attempt.fidelity,
        budget=options.budget,
        size_before_bytes=model_io.size_bytes(path),
        size_after_bytes=attempt.size_bytes,
        passes=tuple(records),
        attempts=attempts,
        layers=layers.describe(chosen.model, errors, _all_refusals(records)),
        refusals=_all_refusals(records),
        calibration=calibration,
        preprocess=job.preprocess,
        warnings=_warnings(job, calibration),
        advice=_advice(job, chosen, attempt),
        versions=_versions(),
        machine=devices.local_profile().title,
        seconds=time.perf_counter() - start,
        seed=options.seed,
    )
    _write(job, chosen, baseline, report, staged)
    return report, _broken(attempt, options)


# ------------------------------------------------------------------------------------------ resolving


def _check_precision(options: Options) -> None:
    if options.precision in PLANNED_PRECISIONS:
        raise UserError(f"{options.precision} is not in this version of edgec", where="--precision", fix="choose one of: " + ", ".join(PRECISIONS))
    if options.precision not in PRECISIONS:
        raise UserError(f"unknown precision {options.precision!r}", where="--precision", fix="choose one of: " + ", ".join(PRECISIONS))


def _job(path: Path, model: ir.Model, options: Options, progress: Progress) -> Job:
    profile = devices.find(options.device)
    backend = backends.load(profile.backends[0] if options.backend == "auto" else options.backend)
    target, why = _target(options, profile, backend)
    specs = model_io.input_specs(model)
    pre = images = judged = None
    if options.calib or options.eval:
        pre = preprocess.resolve(options.preprocess, path, specs[0])
    if options.calib:
        images = folder.open_folder(options.calib, pre, specs)
    if options.eval:
        judged = folder.open_folder(options.eval, pre, specs)
    elif images is not None:
        images, judged = images.split(options.seed)
    return Job(
        path=path,
        options=options,
        profile=profile,
        backend=backend,
        target=target,
        not_measured=why,
        threads=options.threads or len(os.sched_getaffinity(0)),
        preprocess=pre,
        images=images,
        judged=judged,
        metric=load_metric(options.metric) if options.metric else None,
        progress=progress,
    )


def _target(options: Options, profile: DeviceProfile, backend: Backend) -> tuple[LocalTarget | None, str | None]:
    """Return where to measure, or why nothing is measured. UnavailableError for what was asked and is not there."""
    url = options.target or ("local" if devices.is_this_machine(profile) else None)
    if url is None:
        return None, f"this machine is not a {profile.title}; carry the bundle there and run edgec bench on it"
    if url != "local":
        raise UnavailableError(f"target {url!r} is not in this version of edgec", where="--target", fix="use --target local, or leave it out")
    problem = backend.unavailable()
    if problem is not None:
        raise problem
    return LocalTarget(), None


def _wants_integers(job: Job) -> bool:
    if job.options.precision == "fp32":
        return False
    scheme = job.backend.schemes(job.profile)["int8"]
    has_ranges = job.images is not None or job.options.ranges is not None
    if job.options.precision == "int8":
        if isinstance(scheme, str):
            raise UserError(scheme, where="--precision int8", fix="leave --precision out, or choose another device or backend")
        if not has_ranges:
            raise DataError("INT8 needs images to calibrate on", where="--precision int8", fix="add --calib FOLDER, or --ranges FILE")
    return has_ranges and not isinstance(scheme, str)


def _refuse_unsupported(job: Job, model: ir.Model) -> None:
    refusals = job.backend.check(model, job.profile)
    if refusals:
        lines = "; ".join(f"{r.node}: {r.why}" for r in refusals[:5])
        raise UserError(f"{len(refusals)} nodes cannot run there: {lines}", where=f"backend {job.backend.name}", fix="choose --backend ort")


# ------------------------------------------------------------------------------------------ quantizing


def _quantize(
    job: Job, model: ir.Model, work: Path
) -> tuple[CalibrationSummary | None, Quantizer | None, dict[str, float], list[Candidate]]:
    scheme = job.backend.schemes(job.profile)["int8"]
    if not _wants_integers(job) or isinstance(scheme, str):
        return None, None, {}, []
    ranges, summary = _ranges(job, model, scheme)
    quantizer = Quantizer(model, job.backend.supports, scheme, ranges)
    candidate = quantizer.build({})
    errors: dict[str, float] = {}
    if job.images is not None and candidate.record.modified:
        errors = quantizer.errors(candidate, job.images, job.threads, job.progress)
        bad = collapsed(errors)
        if bad:
            candidate = quantizer.build(bad)
    return summary, quantizer, errors, [_candidate("int8", candidate, work)]


def _ranges(job: Job, model: ir.Model, scheme: QuantScheme) -> tuple[Mapping[str, Range], CalibrationSummary | None]:
    if job.options.ranges is not None:
        return calib_ranges.from_json(job.options.ranges), None
    assert job.images is not None
    method = DEFAULT_METHOD if job.options.method == "auto" else job.options.method
    start = time.perf_counter()
    found = cache.collect_cached(
        model,
        observed(model, job.backend.supports),
        job.images,
        histogram=method != "minmax",
        seed=job.options.seed,
        threads=job.threads,
        progress=job.progress,
    )
    seconds = time.perf_counter() - start
    summary = CalibrationSummary(
        folder=str(job.options.calib),
        images=len(job.images),
        held_out=0 if job.options.eval or job.judged is None else len(job.judged),
        method=method,
        skipped=tuple(job.images.skipped),
        images_per_second=None if found.cached else len(job.images) / seconds,
        cached=found.cached,
        key=found.key,
    )
    return choose_ranges(found.statistics, method, scheme), summary


def _should_widen(
    job: Job, candidates: Sequence[Candidate], measured: Mapping[str, Measurement], judged: Mapping[str, Fidelity]
) -> bool:
    """Step back only where it can help: the budget is broken, matters, and integers are faster at all."""
    if job.options.precision == "int8" and not job.options.budget.drop_stated:
        return False
    attempt = _attempt(candidates[-1], measured, judged)
    slower = attempt.measurement.speedup is not None and attempt.measurement.speedup <= 1
    drop = attempt.fidelity.drop if attempt.fidelity else None
    return drop is not None and drop > job.options.budget.max_drop and not (slower and job.options.precision == "auto")


def _widen(job: Job, quantizer: Quantizer, errors: Mapping[str, float], first: Candidate, work: Path) -> list[Candidate]:
    already = first.quantized.keep_float if first.quantized else {}
    return [
        _candidate(f"int8, {len(keep)} in float", quantizer.build(keep), work) for keep in widened(errors, already)
    ]


def _candidate(name: str, quantized: Quantized, work: Path) -> Candidate:
    path = work / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
    return _save(Candidate(name, "int8", path, quantized.model, quantized))


def _save(candidate: Candidate) -> Candidate:
    model_io.save(candidate.model, candidate.path)
    return candidate


# ------------------------------------------------------------------------------------------ measuring and judging


def _measure(job: Job, candidates: Sequence[Candidate]) -> dict[str, Measurement]:
    names = ["original", *(c.name for c in candidates)]
    if job.target is None:
        return {n: Measurement(n, "none", None, reason=job.not_measured) for n in names}
    runners: dict[str, Runner] = {}
    runners["original"] = job.backend.open(job.backend.lower(job.path, job.profile, "fp32"), job.threads)
    for c in candidates:
        runners[c.name] = job.backend.open(job.backend.lower(c.path, job.profile, c.precision), job.threads)
    return job.target.measure(runners, _feed(job), baseline="fp32", threads=job.threads, progress=job.progress)


def _feed(job: Job) -> dict[str, np.ndarray]:
    """Return one input of batch 1: a real image where there is one."""
    images = job.judged or job.images
    if images is not None:
        return dict(next(iter(images.subset([0]).batches(1))).feed)
    return model_io.sample_inputs(model_io.input_specs(model_io.load(job.path)), job.options.seed)


def _judge(job: Job, candidates: Sequence[Candidate]) -> dict[str, Fidelity]:
    """Compare the candidates with the original, which runs with ONNX Runtime's optimisations off."""
    if job.judged is None or not candidates:
        return {}
    return fidelity.compare(
        Session(job.path, threads=job.threads, optimise=False),
        {c.name: Session(c.path, threads=job.threads) for c in candidates},
        job.judged.batches(8),
        images=len(job.judged),
        metric=job.metric,
        labelled=job.options.eval is not None,
        seed=job.options.seed,
        progress=job.progress,
    )


def _attempt(c: Candidate, measured: Mapping[str, Measurement], judged: Mapping[str, Fidelity]) -> Attempt:
    return Attempt(c.name, c.precision, measured[c.name], judged.get(c.name), model_io.size_bytes(c.path), False, "")


# ------------------------------------------------------------------------------------------ reporting


def _write(job: Job, chosen: Candidate, baseline: Candidate, report: Report, staged: Path) -> None:
    model_io.save(chosen.model, staged / bundle.MODEL)
    if job.target is None and chosen is not baseline:
        model_io.save(baseline.model, staged / bundle.BASELINE)
    artifact = job.backend.lower(staged / bundle.MODEL, job.profile, chosen.precision)
    bundle.write(staged, artifact, report, job.path)


def _all_refusals(records: Sequence[PassRecord]) -> tuple[Refusal, ...]:
    return tuple(r for record in records for r in record.refusals)


def _warnings(job: Job, calibration: CalibrationSummary | None) -> tuple[str, ...]:
    found = []
    if job.preprocess is not None and job.preprocess.assumed:
        found.append("preprocessing was not stated; assumed: " + ", ".join(job.preprocess.assumed))
    for images in (job.images, job.judged if job.options.eval else None):
        if images is not None and images.skipped:
            names = ", ".join(r.node for r in images.skipped[:3])
            found.append(f"{len(images.skipped)} unreadable files were skipped: {names}")
        found += list(images.notes) if images is not None else []
    if job.judged is None:
        found.append("quality was not judged: no images")
    return tuple(found)


def _advice(job: Job, chosen: Candidate, attempt: Attempt) -> tuple[str, ...]:
    advice = []
    scheme = job.backend.schemes(job.profile)["int8"]
    if isinstance(scheme, str):
        advice.append(scheme)
    elif job.images is None and job.options.ranges is None and job.options.precision == "auto":
        advice.append(_NO_CALIBRATION)
    m = attempt.measurement
    if chosen.precision != "fp32" and m.speedup is not None and m.speedup < 1:
        advice.append(f"{chosen.precision} was asked for, but FP32 is faster here ({1 / m.speedup:.2f}x): --precision auto takes it")
    if job.target is None:
        advice.append(f"on the device: edgec bench BUNDLE measures it there ({job.not_measured})")
    return tuple(advice)


def _broken(attempt: Attempt, options: Options) -> str | None:
    """Return the stated budget that even the chosen attempt breaks."""
    budget = options.budget
    stated = budget if budget.drop_stated else replace(budget, max_drop=float("inf"))
    return guard.broken(attempt, stated)


def _versions() -> dict[str, str]:
    names = ("onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {"edgec": __version__, "python": platform.python_version(), **{n: metadata.version(n) for n in names}}
