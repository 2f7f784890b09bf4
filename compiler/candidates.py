"""The candidates that may become the result beside the float baseline: quantized, mixed, or in float16.

search.py decides how to quantize, mixed_precision.py which nodes stay in float, half.py what float16 bears; here they
become models on disk. driver.py measures and judges them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..calib import ranges as calib_ranges
from . import half, job, layers
from . import model as model_io
from .contributions import Contributions
from .mixed_precision import Exploration, Point, explore
from .quantizer import Quantized, Quantizer
from .report.text import count
from .search import Found, search
from .types import CalibrationSummary, PassRecord, QuantScheme, Refusal, StepRecord, TensorStatistics

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from .job import Job
    from .proof import Prover


@dataclass(frozen=True)
class Candidate:
    """A model on disk that may become the result.

    `judged` is the file to judge its quality by where that is another one: types that nothing here computes in are
    rounded by hand. `fused`: ONNX Runtime may use its integer kernels for it. `predicted`: mixed precision's forecast,
    and `calibration_db` what it is to be compared with. `keep_float`: the nodes left in float, None where nothing is
    quantized.
    """

    name: str
    precision: str
    path: Path
    model: ir.Model
    records: tuple[PassRecord, ...] = ()
    judged: Path | None = None
    fused: bool = True
    predicted: Point | None = None
    calibration_db: float | None = None
    keep_float: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Lossy:
    """What lossy passes gave: nothing at all where only exact passes run."""

    calibration: CalibrationSummary | None = None
    quantizer: Quantizer | None = None
    candidates: tuple[Candidate, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    records: tuple[PassRecord, ...] = ()
    why_not: str | None = None
    contributions: Contributions | None = None
    refusals: tuple[Refusal, ...] = ()
    statistics: Mapping[str, TensorStatistics] = field(default_factory=dict)


def lossy(this: Job, model: ir.Model, scheme: QuantScheme | None, prover: Prover, work: Path) -> Lossy:
    """Return what may be tried beside the float `model`, its files in `work`."""
    if scheme is not None:
        return _quantize(this, model, scheme, prover, work)
    if job.wants_float16(this):
        return Lossy(candidates=(_half(this, model, work),))
    return Lossy()


def feed(this: Job) -> dict[str, np.ndarray]:
    """Return one input of batch 1: a real image where there is one."""
    images = this.judged or this.images
    if images is not None:
        return dict(next(iter(images.batches(1))).feed)
    return model_io.sample_inputs(model_io.input_specs(model_io.load(this.path)), this.options.seed)


def _quantize(this: Job, model: ir.Model, scheme: QuantScheme, prover: Prover, work: Path) -> Lossy:
    if layers.is_quantized(model):
        return Lossy(why_not="the model holds quantized operators already: only exact passes ran")
    if this.images is None:
        ranges = {} if this.options.ranges is None else calib_ranges.from_json(this.options.ranges)
        found = Found(Quantizer(model, this.backend.supports, scheme, ranges))
    else:
        found = search(this, model, scheme, prover)
    quantized = found.quantizer.build()
    if not quantized.modified:
        why_not = "no node of the model can be quantized: only exact passes ran"
        return Lossy(found.calibration, why_not=why_not, refusals=quantized.records[0].refusals)
    plain = _candidate(this, precision(this), quantized, work)
    start = time.perf_counter()
    mix = _explore(this, found.quantizer)
    if mix is None:
        return replace(_lossy(found, (plain,)), steps=found.steps)
    candidates = [replace(plain, predicted=mix.plain), *_points(this, found.quantizer, mix.points, work)]
    if found.judge is not None:
        candidates = [replace(c, calibration_db=found.judge.decibels(c.model)) for c in candidates]
    step = StepRecord("mixed-precision", True, None, None, time.perf_counter() - start, _told(mix))
    return replace(_lossy(found, tuple(candidates)), steps=(*found.steps, step), contributions=mix.contributions)


def _lossy(found: Found, candidates: tuple[Candidate, ...]) -> Lossy:
    return Lossy(
        found.calibration, found.quantizer, candidates, found.steps, found.records, statistics=found.statistics
    )


def _explore(this: Job, quantizer: Quantizer) -> Exploration | None:
    """Look for what shall stay in float, where integers are measured on this machine and not left out."""
    wanted = precision(this) == "int8" and "mixed-precision" not in this.options.without
    if not wanted or this.images is None or this.target is None:
        return None
    return explore(
        quantizer,
        this.images,
        feed(this),
        threads=this.threads,
        seed=this.options.seed,
        seconds=this.options.time_budget,
        progress=this.progress,
    )


def _told(found: Exploration) -> str:
    off = "" if found.latency_misfit is None else f", latencies within {100 * found.latency_misfit:.0f} %"
    return (
        f"{len(found.points)} assignments, from {count(found.images, 'image')}; models fit what was measured: errors "
        f"within {found.contributions.misfit_db:.1f} dB{off}"
    )


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


def widened(this: Job, quantizer: Quantizer, work: Path) -> list[Candidate]:
    """Return candidates with ever more of the worst layers in float."""
    return [
        _candidate(this, f"{precision(this)}, worst {len(keep)} in float", quantizer.build(keep), work)
        for keep in quantizer.widened()
    ]


def _candidate(this: Job, name: str, quantized: Quantized, work: Path) -> Candidate:
    path = work / f"{name.replace(', ', '-').replace(' ', '-')}.onnx"
    scheme = job.quant_scheme(this)
    fused = scheme is None or not scheme.simulated
    return save(
        Candidate(
            name,
            precision(this),
            path,
            quantized.model,
            quantized.records,
            fused=fused,
            keep_float=quantized.keep_float,
        )
    )


def save(candidate: Candidate) -> Candidate:
    """Write the candidate's model to its path, and return it."""
    model_io.save(candidate.model, candidate.path)
    return candidate
