"""The candidates that may become the result beside the float baseline: quantized, mixed, or in float16.

search.py decides how to quantize, mixing.py which nodes stay in float and which weights have 4 bits, half.py what
float16 bears, settings.py what is tried at all; here they become models on disk. trials.py measures and judges them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import job, layers
from . import model as model_io
from .mixed_precision import mixing
from .mixed_precision.mixing import Mix
from .mixed_precision.tradeoff import Point
from .quantization import half
from .quantization.quantizer import Quantizer
from .quantization.robust import search_robustly
from .quantization.search import Found, from_ranges, search
from .settings import objection
from .types import (
    CalibrationSummary,
    FloatScheme,
    PassRecord,
    QuantScheme,
    Refusal,
    RobustChoice,
    StepRecord,
    TensorStatistics,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from .job import Job
    from .proof import Prover
    from .quantization.closeness import Closeness


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model on disk that may become the result.

    `judged` is the file to judge its quality by where that is another one: types that nothing here computes in are
    rounded by hand. `fused`: ONNX Runtime may use its integer kernels for it. `predicted`: mixed precision's forecast,
    and `calibration_db` what it is to be compared with. `keep_float`: the nodes left in float, None where nothing is
    quantized; `quantizer` built it, None where none did.
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
    quantizer: Quantizer | None = None


@dataclass(frozen=True, eq=False)
class Lossy:
    """What lossy passes gave: nothing at all where only exact passes run.

    `mix` is the program behind the mixtures among the candidates, `judge` what their calibration figures come from.
    `this` is the job that calibrates as `robust` chose; None where it had no say.
    """

    calibration: CalibrationSummary | None = None
    quantizer: Quantizer | None = None
    candidates: tuple[Candidate, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    records: tuple[PassRecord, ...] = ()
    why_not: str | None = None
    mix: Mix | None = None
    judge: Closeness | None = None
    refusals: tuple[Refusal, ...] = ()
    statistics: Mapping[str, TensorStatistics] = field(default_factory=dict)
    this: Job | None = None
    robust: RobustChoice | None = None


def lossy(this: Job, model: ir.Model, scheme: QuantScheme | None, prover: Prover, baseline: Path) -> Lossy:
    """Return what may be tried beside the float `model`, which lies in the file `baseline`; files go beside it."""
    found = _floats_alone(this) if scheme is None else _quantize(this, model, scheme, prover, baseline)
    if not (job.wants_float16(this) or objection(this, "fp16") is None or _half_beside(this)):
        return found
    return replace(found, candidates=(*found.candidates, _half(this, model, baseline.parent)))


def _half_beside(this: Job) -> bool:
    """Say whether FP16 is measured beside fewer bits that were asked for: on a GPU they are often no faster."""
    found = this.backend.schemes(this.profile)["fp16"]
    named = this.options.precision not in ("auto", "fp32", "fp16")
    return named and this.backend.casts and this.target is not None and isinstance(found, FloatScheme)


def _floats_alone(this: Job) -> Lossy:
    why = "--robust chose nothing: only floats are tried here, which are not calibrated"
    return Lossy(why_not=why if this.options.robust else None)


def _quantize(this: Job, model: ir.Model, scheme: QuantScheme, prover: Prover, baseline: Path) -> Lossy:
    if layers.is_quantized(model):
        return Lossy(why_not="the model holds quantized operators already: only exact passes ran")
    this, found, choice = _searched(this, model, scheme, prover)
    plain = _plain(this, found.quantizer, precision(this), baseline.parent)
    if plain.keep_float is None:
        why_not = "no node of the model can be quantized: only exact passes ran"
        return Lossy(found.calibration, why_not=why_not, refusals=plain.records[0].refusals)
    whole = Lossy(
        found.calibration,
        found.quantizer,
        (plain,),
        found.steps,
        found.records,
        judge=found.judge,
        statistics=found.statistics,
        this=this,
        robust=choice,
    )
    return _mixed(this, whole, plain, prover, baseline) if mixing.possible(this) else whole


def _searched(
    this: Job, model: ir.Model, scheme: QuantScheme, prover: Prover
) -> tuple[Job, Found, RobustChoice | None]:
    """Return how to quantize, the job that calibrates so, and what `--robust` chose that by."""
    if this.images is None:
        return this, from_ranges(this, model, scheme), None
    if not this.options.robust:
        return this, search(this, model, scheme, prover), None
    kept = search_robustly(this, model, scheme, prover)
    return kept.this, kept.found, kept.choice


def _mixed(this: Job, found: Lossy, plain: Candidate, prover: Prover, baseline: Path) -> Lossy:
    """Add mixed precision's candidates to the plain one."""
    if this.seconds_left == 0:
        return replace(found, why_not="the time budget ended before mixed precision, which was not tried")
    assert found.quantizer is not None
    start = time.perf_counter()
    ends = mixing.widths(this, found.quantizer, prover, model_io.size_bytes(plain.path))
    mix = mixing.mix(this, found.quantizer, ends, baseline, found.judge)
    if mix is None:
        return found
    candidates = [replace(plain, predicted=mix.uniform(plain.precision))]
    if ends is not None and plain.precision == "int8":
        one = _plain(this, ends.narrow, "w4a8", baseline.parent)
        candidates.append(replace(one, predicted=mix.uniform("w4a8")))
    candidates += points(this, mix, mix.points, baseline.parent, [c.name for c in candidates])
    step = StepRecord("mixed-precision", True, None, None, time.perf_counter() - start, mix.told())
    return replace(
        found,
        candidates=tuple(compared(found.judge, candidates)),
        steps=(*found.steps, step),
        mix=mix,
    )


def compared(judge: Closeness | None, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates with what their predictions are to be compared with."""
    if judge is None:
        return list(candidates)
    return [c if c.predicted is None else replace(c, calibration_db=judge.decibels(c.model)) for c in candidates]


def points(this: Job, mix: Mix, some: Sequence[Point], work: Path, taken: Collection[str]) -> list[Candidate]:
    """Build these points; no two candidates, nor one of them and one of `taken`, have the same name."""
    found: list[Candidate] = []
    names = set(taken)
    for point in some:
        if found and point.narrow and this.seconds_left == 0:
            break  # each has its weights rounded anew
        kind = "w4a8" if point.narrow else precision(this)
        name = base = ", ".join([kind, *point.said])
        while name in names:
            name = f"{base} ({len(names) + 1})"
        names.add(name)
        made = _built(this, mix.quantizer_of(point), point.keep_float, name, kind, work)
        found.append(replace(made, predicted=point))
    return found


def precision(this: Job) -> str:
    """Return the precision that is searched for beside float32."""
    return "int8" if this.options.precision == "auto" else this.options.precision


def _half(this: Job, model: ir.Model, work: Path) -> Candidate:
    found, path, judged = half.write(this, model, work)
    return Candidate("fp16", "fp16", path, found.model, found.records, judged)


def _plain(this: Job, quantizer: Quantizer, name: str, work: Path) -> Candidate:
    """Return the candidate with everything quantized that can be; its `keep_float` is None where nothing can."""
    made = _built(this, quantizer, {}, name, name, work)
    return made if made.records[0].modified else replace(made, keep_float=None)


def again(this: Job, c: Candidate, keep_float: Mapping[str, str]) -> Candidate:
    """Return a quantized candidate with other nodes left in float, under the same name and in the same file."""
    assert c.quantizer is not None
    made = _built(this, c.quantizer, keep_float, c.name, c.precision, c.path.parent)
    return replace(made, predicted=c.predicted, calibration_db=c.calibration_db)


def _built(
    this: Job, quantizer: Quantizer, keep_float: Mapping[str, str], name: str, kind: str, work: Path
) -> Candidate:
    quantized = quantizer.build(keep_float)
    return save(
        Candidate(
            name,
            kind,
            work / f"{name.replace(', ', '-').replace(' ', '-')}.onnx",
            quantized.model,
            quantized.records,
            fused=not quantizer.scheme.simulated,
            keep_float=quantized.keep_float,
            quantizer=quantizer,
        )
    )


def save(candidate: Candidate) -> Candidate:
    """Write the candidate's model to its path, and return it."""
    model_io.save(candidate.model, candidate.path)
    return candidate
