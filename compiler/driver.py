"""compile(): load -> exact passes -> quantize -> measure -> judge -> guard -> bundle.

Each step is a function that takes the job (what was asked, and of whom) and hands its result on; nothing is kept
between compiles but the content-keyed caches.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .._version import __version__
from ..backends.ort import Session
from ..calib import ranges as calib_ranges
from ..passes.quant_params import needed_opset
from . import bundle, devices, fidelity, files, guard, half, job, layers, pipeline, wording
from . import model as model_io
from .errors import BudgetError
from .job import Job
from .options import Options
from .proof import Prover
from .quantizer import Quantized, Quantizer, edges
from .report import text
from .search import Found, search
from .types import (
    Attempt,
    CalibrationSummary,
    Fidelity,
    Measurement,
    PassRecord,
    Progress,
    QuantScheme,
    Report,
    StepRecord,
    silent,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..backends.base import Runner


#: A change that keeps this share of the speed is taken to cost no time.
FREE = 0.96


@dataclass(frozen=True)
class Candidate:
    """A model on disk that may become the result.

    `judged` is the file to judge its quality by where that is another one: types that nothing here computes in are
    rounded by hand. `fused`: ONNX Runtime may use its integer kernels for it.
    """

    name: str
    precision: str
    path: Path
    model: ir.Model
    records: tuple[PassRecord, ...] = ()
    judged: Path | None = None
    fused: bool = True


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
    refusals = tuple(r for record in records for r in record.refusals)
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
        warnings=(*filter(None, [found.why_not]), *wording.warnings(this)),
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


def _quantize(this: Job, model: ir.Model, scheme: QuantScheme, prover: Prover, work: Path) -> _Found:
    if layers.is_quantized(model):
        return _Found(why_not="the model holds quantized operators already: only exact passes ran")
    if this.images is None:
        ranges = {} if this.options.ranges is None else calib_ranges.from_json(this.options.ranges)
        found = Found(Quantizer(model, this.backend.supports, scheme, ranges))
    else:
        found = search(this, model, scheme, prover)
    quantizer = _with_float_edges(this, found.quantizer)
    quantized = quantizer.build()
    if not quantized.modified:
        return _Found(found.calibration, why_not="no node of the model can be quantized: only exact passes ran")
    candidate = _candidate(this, precision(this), quantized, work)
    return _Found(found.calibration, quantizer, (candidate,), found.steps, found.records)


def _half(this: Job, model: ir.Model, work: Path) -> Candidate:
    found, path, judged = half.write(this, model, work)
    return Candidate("fp16", "fp16", path, found.model, found.records, judged)


def precision(this: Job) -> str:
    """Return the name of the precision that is tried beside float32."""
    return "int8" if this.options.precision == "auto" else this.options.precision


def _with_float_edges(this: Job, quantizer: Quantizer) -> Quantizer:
    """Leave first and last layers in float where that is measured to cost no time (within 4 %)."""
    if this.target is None or quantizer.scheme.activation is None or "mixed-precision" in this.options.without:
        return quantizer
    choices = edges(quantizer)
    with TemporaryDirectory() as place:
        runners: dict[str, Runner] = {}
        for i, keep in enumerate([{}, *choices]):
            path = Path(place) / f"{i}.onnx"
            model_io.save(quantizer.build(keep).model, path)
            runners[str(i)] = this.backend.open(this.backend.lower(path, this.profile, precision(this)), this.threads)
        if len(runners) == 1:
            return quantizer
        measured = this.target.measure(runners, _feed(this), baseline="0", threads=this.threads, seconds=2.0)
    for i, keep in enumerate(choices, start=1):
        speed = measured[str(i)].speedup
        if speed is not None and speed >= FREE:
            return replace(quantizer, kept={**quantizer.kept, **keep})
    return quantizer


def _should_widen(
    this: Job, candidates: Sequence[Candidate], measured: Mapping[str, Measurement], judged: Mapping[str, Fidelity]
) -> bool:
    """Step back only where it can help: the budget is broken, and matters, and integers are faster to begin with."""
    named = this.options.precision != "auto"
    if named and not this.options.budget.drop_stated:
        return False
    attempt = _attempt(candidates[-1], measured, judged)
    pays = guard.shown_faster(attempt) or attempt.measurement.median_ms is None or named
    return pays and attempt.fidelity is not None and _loses(this, attempt.fidelity)


def _loses(this: Job, found: Fidelity) -> bool:
    return found.drop is not None and found.drop > this.options.budget.max_drop


def _widen(this: Job, quantizer: Quantizer, work: Path) -> list[Candidate]:
    name = precision(this)
    return [
        _candidate(this, f"{name}, {len(keep)} in float", quantizer.build(keep), work) for keep in quantizer.widened()
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
    return Attempt(c.name, c.precision, measurement, judged.get(c.name), model_io.size_bytes(c.path), False, "")


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
