"""compile(): load -> exact passes -> quantize -> measure -> judge -> guard -> bundle.

Each step is a function that takes the job (what was asked, and of whom) and hands its result on; nothing is kept
between compiles but the content-keyed caches.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .._version import __version__
from ..backends.ort import Session
from ..calib import ranges as calib_ranges
from ..passes.quant_params import needed_opset
from . import bundle, devices, fidelity, files, guard, half, job, layers, mixed_precision, pipeline, wording
from . import model as model_io
from .errors import BudgetError
from .job import Job
from .mixed_precision import Point
from .options import Options
from .proof import Prover
from .quantizer import Quantized, Quantizer
from .report import text
from .report.text import count
from .search import Found, search
from .types import (
    Attempt,
    CalibrationSummary,
    Fidelity,
    Measurement,
    PassRecord,
    Progress,
    QuantScheme,
    Refusal,
    Report,
    StepRecord,
    TensorStatistics,
    silent,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..backends.base import Runner


@dataclass(frozen=True)
class Candidate:
    """A model on disk that may become the result.

    `judged` is the file to judge its quality by where that is another one: types that nothing here computes in are
    rounded by hand. `fused`: ONNX Runtime may use its integer kernels for it. `predicted`: mixed precision's forecast.
    """

    name: str
    precision: str
    path: Path
    model: ir.Model
    records: tuple[PassRecord, ...] = ()
    judged: Path | None = None
    fused: bool = True
    predicted: Point | None = None


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
    baseline = _save(Candidate("fp32", "fp32", work / "fp32.onnx", float_model))
    found = _Found()
    if scheme is not None:
        found = _quantize(this, float_model, scheme, prover, work)
    elif job.wants_float16(this):
        found = _Found(candidates=(_half(this, float_model, work),))
    candidates = [baseline, *found.candidates]
    measured, judged = _measure(this, candidates), _judge(this, candidates)
    if found.quantizer is not None and _should_widen(this, candidates, measured, judged):
        more = _widen(this, found.quantizer, work)
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
        layers=layers.describe(chosen.model, found.quantizer.errors if found.quantizer else {}, refusals),
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


# ------------------------------------------------------------------------------------------ quantizing


@dataclass(frozen=True)
class _Found:
    """What lossy passes gave: nothing at all where only exact passes run."""

    calibration: CalibrationSummary | None = None
    quantizer: Quantizer | None = None
    candidates: tuple[Candidate, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    records: tuple[PassRecord, ...] = ()
    why_not: str | None = None
    refusals: tuple[Refusal, ...] = ()
    statistics: Mapping[str, TensorStatistics] = field(default_factory=dict)


def _quantize(this: Job, model: ir.Model, scheme: QuantScheme, prover: Prover, work: Path) -> _Found:
    if layers.is_quantized(model):
        return _Found(why_not="the model holds quantized operators already: only exact passes ran")
    if this.images is None:
        ranges = {} if this.options.ranges is None else calib_ranges.from_json(this.options.ranges)
        found = Found(Quantizer(model, this.backend.supports, scheme, ranges))
    else:
        found = search(this, model, scheme, prover)
    quantized = found.quantizer.build()
    if not quantized.modified:
        why_not = "no node of the model can be quantized: only exact passes ran"
        return _Found(found.calibration, why_not=why_not, refusals=quantized.records[0].refusals)
    plain = _candidate(this, precision(this), quantized, work)
    mixed, steps = _mixed(this, found.quantizer, plain, work)
    return _Found(
        found.calibration, found.quantizer, mixed, (*found.steps, *steps), found.records, statistics=found.statistics
    )


def _mixed(
    this: Job, quantizer: Quantizer, plain: Candidate, work: Path
) -> tuple[tuple[Candidate, ...], tuple[StepRecord, ...]]:
    """Return the plain candidate and those in which some nodes stay in float, and what was found out on the way."""
    wanted = precision(this) == "int8" and "mixed-precision" not in this.options.without
    if not wanted or this.images is None or this.target is None:
        return (plain,), ()
    start = time.perf_counter()
    found = mixed_precision.explore(
        quantizer,
        this.images,
        _feed(this),
        threads=this.threads,
        seed=this.options.seed,
        seconds=this.options.time_budget,
        progress=this.progress,
    )
    if found is None:
        return (plain,), ()
    candidates = [replace(plain, predicted=found.plain), *_points(this, quantizer, found.points, work)]
    off = "" if found.latency_misfit is None else f", latencies within {100 * found.latency_misfit:.0f} %"
    detail = (
        f"{len(found.points)} assignments, from {count(found.images, 'image')}; models fit what was measured: errors "
        f"within {found.error_misfit_db:.1f} dB{off}"
    )
    seconds = time.perf_counter() - start
    return tuple(candidates), (StepRecord("mixed-precision", True, None, None, seconds, detail),)


def _points(this: Job, quantizer: Quantizer, points: Sequence[Point], work: Path) -> list[Candidate]:
    names: set[str] = set()
    found = []
    for point in points:
        base = name = f"{precision(this)}, {len(point.keep_float)} in float"
        while name in names:
            name = f"{base} ({len(names) + 1})"
        names.add(name)
        candidate = _candidate(this, name, quantizer.build(point.keep_float), work)
        found.append(replace(candidate, predicted=point))
    return found


def _half(this: Job, model: ir.Model, work: Path) -> Candidate:
    found, path, judged = half.write(this, model, work)
    return Candidate("fp16", "fp16", path, found.model, found.records, judged)


def precision(this: Job) -> str:
    """Return the name of the precision that is tried beside float32."""
    return "int8" if this.options.precision == "auto" else this.options.precision


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


def _widen(this: Job, quantizer: Quantizer, work: Path) -> list[Candidate]:
    return [
        _candidate(this, f"{precision(this)}, worst {len(keep)} in float", quantizer.build(keep), work)
        for keep in quantizer.widened()
    ]


def _candidate(this: Job, name: str, quantized: Quantized, work: Path) -> Candidate:
    path = work / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
    scheme = job.quant_scheme(this)
    fused = scheme is None or not scheme.simulated
    return _save(Candidate(name, precision(this), path, quantized.model, quantized.records, fused=fused))


def _save(candidate: Candidate) -> Candidate:
    model_io.save(candidate.model, candidate.path)
    return candidate


# ------------------------------------------------------------------------------------------ measuring and judging


def _measure(this: Job, candidates: Sequence[Candidate]) -> dict[str, Measurement]:
    names = ["original", *(c.name for c in candidates)]
    if this.target is None:
        return {n: Measurement(n, "none", None, reason=this.not_measured) for n in names}
    runners: dict[str, Runner] = {}
    runners["original"] = this.backend.open(this.backend.lower(this.path, this.profile, "fp32"), this.threads)
    for c in candidates:
        runners[c.name] = this.backend.open(this.backend.lower(c.path, this.profile, c.precision), this.threads)
    return this.target.measure(runners, _feed(this), baseline="fp32", threads=this.threads, progress=this.progress)


def _feed(this: Job) -> dict[str, np.ndarray]:
    """Return one input of batch 1: a real image where there is one."""
    images = this.judged or this.images
    if images is not None:
        return dict(next(iter(images.batches(1))).feed)
    return model_io.sample_inputs(model_io.input_specs(model_io.load(this.path)), this.options.seed)


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
    forecast = (None, None) if c.predicted is None else (c.predicted.ms, c.predicted.db)
    return Attempt(c.name, c.precision, measurement, judged.get(c.name), size, False, "", *forecast)


# ------------------------------------------------------------------------------------------ reporting


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
