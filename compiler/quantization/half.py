"""The float16 candidate: which nodes must stay in float32 is measured; the rest is cast, here or by the backend.

A backend that types its artifacts itself (`casts`, see backends/base.py) is handed a float32 model in which those nodes
are marked; others get the model already cast. Quality is judged on a float32 model that rounds wherever the cast one
would, since CPUs compute neighbouring float16 operators in float32 and hide what overflows in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...calib import cache
from ...passes.cast_fp16 import CastFloat16, mark_float32
from .. import model as model_io
from .. import pipeline
from ..job import Job
from .closeness import few
from .float16_safety import find_unsafe, float_tensors, simulated

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..types import PassRecord


@dataclass(frozen=True)
class Half:
    """A float16 model, the float32 one that rounds alike, and the record of the cast."""

    model: ir.Model
    judged: ir.Model
    records: tuple[PassRecord, ...]


def half(this: Job, model: ir.Model) -> Half:
    """Return `model` in float16, for the job's backend; `model` is left as it is."""
    unsafe = unsafe_nodes(this, model)
    cast, records = pipeline.run(model_io.copy(model), [CastFloat16(unsafe)], None)
    if this.backend.casts:
        cast = model_io.copy(model)
        mark_float32(cast, unsafe)
    return Half(cast, simulated(model, unsafe), tuple(records))


def unsafe_nodes(this: Job, model: ir.Model) -> dict[str, str]:
    """Return the nodes that must stay in float32, with reasons; without images only what the operators tell."""
    if this.images is None:
        return find_unsafe(model, {})
    some = few(this.images)
    found = cache.collect_cached(
        model,
        float_tensors(model),
        this.images,
        histogram=False,
        seed=this.options.seed,
        threads=this.threads,
        progress=this.progress,
    )
    return find_unsafe(
        model, found.statistics, some.batches(8), images=len(some), threads=this.threads, progress=this.progress
    )


def write(this: Job, model: ir.Model, work: Path) -> tuple[Half, Path, Path]:
    """Return the float16 model and the files that hold it and its judged form, in `work`."""
    found = half(this, model)
    path, judged = work / "fp16.onnx", work / "fp16-judged.onnx"
    model_io.save(found.model, path)
    model_io.save(found.judged, judged)
    return found, path, judged
