"""compile(): load -> exact passes -> quantize -> measure -> judge -> guard -> bundle.

Each step is a function that takes the job (what was asked, and of whom) and hands its result on; nothing is kept
between compiles but the content-keyed caches.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .._version import __version__
from ..backends.base import Profiled
from ..backends.targets.on_device import DeviceTarget
from ..backends.tensorrt import shipping
from ..passes.quant_params import needed_opset
from . import bundle, devices, exploration, files, guard, job, layers, pipeline, recipe, rivals, wording
from . import model as model_io
from .candidates import Candidate, Lossy, save
from .errors import BudgetError, UnavailableError
from .explanation.explain import annotate, explain
from .job import Job
from .options import Options
from .proof import Prover
from .report import text
from .types import (
    Artifact,
    Attempt,
    Layer,
    PassRecord,
    Progress,
    Refusal,
    Report,
    silent,
)

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)


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
    with contextlib.nullcontext() if this.target is None else contextlib.closing(this.target):
        return _made(this, original, staged, work, start)


def _made(this: Job, original: ir.Model, staged: Path, work: Path, start: float) -> tuple[Report, str | None]:
    """Do it for a job that is resolved."""
    options, path = this.options, this.path
    prover = Prover(original, verify=options.verify)
    scheme = job.quant_scheme(this)
    opset = None if scheme is None else needed_opset(scheme)
    passes = pipeline.exact_passes(opset, this.backend.newest_opset(this.profile))
    float_model, records = pipeline.run(model_io.copy(original), passes, prover)
    job.refuse_unsupported(this, float_model)
    baseline = save(Candidate("fp32", "fp32", work / "fp32.onnx", float_model))
    explored = exploration.tried(this, float_model, baseline, scheme, prover)
    tried, not_rivals = rivals.raced(explored)
    base, found, cut, state = tried.base, tried.found, tried.cut, tried.state
    this, attempts, chosen, attempt = tried.this, tried.attempts, tried.chosen, tried.attempt
    records += _passes(base, found, chosen)
    refusals = (*(r for record in records for r in record.refusals), *found.refusals)
    report = Report(
        model=path.name,
        device=this.profile,
        backend=this.backend.name,
        target=this.target.url if this.target else "none",
        precision=chosen.precision,
        headline="",
        original=state.measured["original"],
        baseline=state.measured[state.candidates[0].name],
        result=attempt.measurement,
        fidelity=attempt.fidelity,
        budget=options.budget,
        size_before_bytes=model_io.size_bytes(path),
        size_after_bytes=attempt.size_bytes,
        passes=tuple(records),
        steps=found.steps,
        attempts=attempts,
        layers=_timed(this, chosen, _layers(this, found, chosen, refusals)),
        refusals=refusals,
        calibration=found.calibration,
        preprocess=this.preprocess,
        warnings=(*filter(None, [found.why_not]), *not_rivals, *wording.warnings(this, chosen.precision)),
        advice=(*wording.advice(explored.this, attempts), *wording.beside(state.measured, attempt.measurement)),
        versions=_versions(this.backend.name),
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


def _timed(this: Job, chosen: Candidate, rows: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the layers with the times of their kernels, where the backend tells them."""
    if this.target is None or this.timed_here and this.backend.runs_onnx:
        return rows
    lowered = this.backend.lower(chosen.path, this.profile, chosen.precision)
    runner = this.target.open(this.backend, lowered, this.target_threads)
    if not isinstance(runner, Profiled):
        return rows
    try:
        kernels = runner.profile(job.one_input(this))
    except UnavailableError as error:  # what is measured and judged by now shall not be lost for it
        logger.warning("layers were not timed: %s", error.what)
        return rows
    macs = {row.node: row.macs or 0 for row in rows}
    times: dict[str, float] = {}
    for _, nodes, ms in kernels:
        # a kernel that computes several is its largest layer's, with what is fused to that
        known = [node for node in (nodes or "").split(" + ") if node in macs]
        if known:
            node = max(known, key=lambda name: macs[name])
            times[node] = times.get(node, 0.0) + ms
    return tuple(replace(row, latency_ms=times.get(row.node)) for row in rows)


def _write(this: Job, chosen: Candidate, baseline: Candidate, report: Report, staged: Path) -> None:
    model_io.save(chosen.model, staged / bundle.MODEL)
    if this.target is None and chosen is not baseline:
        model_io.save(baseline.model, staged / bundle.BASELINE)
    profile = this.profile if this.target is not None else devices.of_any_version(this.profile)
    artifact = this.backend.lower(staged / bundle.MODEL, profile, chosen.precision)
    if isinstance(this.target, DeviceTarget) and not this.backend.in_process:
        _bring_engine(this, artifact, staged)
    if this.target is None:
        recipe.write(staged, artifact, profile, job.one_input(this))
    bundle.write(staged, artifact, report, this.path)


def _bring_engine(this: Job, artifact: Artifact, staged: Path) -> None:
    """Put the engine that was built on the device into the bundle, with what it is tied to."""
    assert isinstance(this.target, DeviceTarget)
    runner = this.target.open(this.backend, artifact, this.target_threads)
    try:
        found = this.target.fetch(runner, job.one_input(this), staged / shipping.ENGINE)
    except UnavailableError as error:
        logger.warning("the engine was not brought back (it is built where the bundle is opened): %s", error.what)
        return
    said = found | {"engine": shipping.ENGINE}
    (staged / shipping.SAID).write_text(json.dumps(said, indent=1), encoding="utf-8")


def _broken(attempt: Attempt, options: Options) -> str | None:
    """Return the stated budget that even the chosen attempt breaks."""
    budget = options.budget
    stated = budget if budget.drop_stated else replace(budget, max_drop=float("inf"))
    return guard.broken(attempt, stated)


#: What a backend is made of beside what all are.
_PARTS = {"tvm": ("apache-tvm", "apache-tvm-ffi")}


def _versions(backend: str) -> dict[str, str]:
    names = (*_PARTS.get(backend, ()), "onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy")
    return {
        "edgec": __version__,
        "python": platform.python_version(),
        **{n: metadata.version(n) for n in names},
    }
