"""Candidates measured on the target, judged on held-out images, and put down as attempts for the guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..backends import base as backends
from ..backends.ort import Session
from ..backends.targets.local import LocalTarget
from ..backends.targets.on_device import DeviceTarget
from . import fidelity, job
from . import model as model_io
from .candidates import Candidate
from .types import Attempt, Fidelity, Measurement

if TYPE_CHECKING:
    from ..backends.base import Backend, Runner
    from .job import Job

#: What the original in ONNX Runtime's CUDA provider is called, where it is measured beside TensorRT.
IN_CUDA = "original in ONNX Runtime, CUDA"
#: How long the final comparison of latencies takes, and one on the way to it.
SECONDS, BRIEF = 4.0, 1.5


def measure(this: Job, candidates: Sequence[Candidate], *, seconds: float = SECONDS) -> dict[str, Measurement]:
    """Time the original and the candidates on the target, interleaved; the first candidate is the baseline."""
    names = ["original", *(c.name for c in candidates)]
    if this.target is None:
        return {n: Measurement(n, "none", None, reason=this.not_measured) for n in names}
    runners: dict[str, Runner] = {}
    missing: dict[str, Measurement] = {}
    home = this.backend if this.backend.runs_onnx else backends.load("ort")  # what runs the original as it is
    refusal = this.target.refuses(home)
    if refusal is not None:
        missing["original"] = Measurement("original", this.target.url, None, reason=refusal)
    else:
        original = home.lower(this.path, this.profile, "fp32")
        runners["original"] = this.target.open(home, original, this.target_threads)
    for c in candidates:
        artifact = this.backend.lower(c.path, this.profile, c.precision)
        runners[c.name] = this.target.open(this.backend, artifact, this.target_threads)
    runners |= _beside(this, home)
    return missing | this.target.measure(
        runners,
        job.one_input(this),
        baseline=candidates[0].name,
        threads=this.target_threads,
        seconds=seconds,
        progress=this.progress,
    )


def _beside(this: Job, home: Backend) -> dict[str, Runner]:
    """Return the original in ONNX Runtime's CUDA provider, where TensorRT runs and the device has that, too."""
    if not isinstance(this.target, DeviceTarget) or home.name != "tensorrt":
        return {}
    if "CUDAExecutionProvider" not in this.profile.toolchain.get("onnxruntime-providers", ""):
        return {}
    runtime = backends.load("ort")
    artifact = runtime.lower(this.path, this.profile, "fp32")
    return {IN_CUDA: this.target.open(runtime, artifact, this.target_threads)}


def judge(this: Job, candidates: Sequence[Candidate], *, as_built: bool = False) -> dict[str, Fidelity]:
    """Compare the candidates with the original, which runs with ONNX Runtime's optimisations off.

    They run in ONNX Runtime, too; `as_built`: in what the backend makes of them, where that runs here.
    """
    if this.judged is None or not candidates:
        return {}
    built = as_built and not this.backend.runs_onnx and isinstance(this.target, LocalTarget)
    return fidelity.compare(
        Session(this.path, threads=this.threads, optimise=False),
        {c.name: _made(this, c) if built else _in_onnx_runtime(this, c) for c in candidates},
        this.judged.batches(8),
        images=len(this.judged),
        metric=this.metric,
        labelled=this.options.eval is not None,
        seed=this.options.seed,
        progress=this.progress,
    )


def _in_onnx_runtime(this: Job, c: Candidate) -> Runner:
    return Session(c.judged or c.path, threads=this.threads, fuse_quantized=c.fused)


def _made(this: Job, c: Candidate) -> Runner:
    return this.backend.open(this.backend.lower(c.path, this.profile, c.precision), this.threads)


def attempt(
    c: Candidate, measured: Mapping[str, Measurement], judged: Mapping[str, Fidelity], base: str = "fp32"
) -> Attempt:
    """Return what is known of a candidate as a row of the report; `base` is the float one that it was made from."""
    left_out = Measurement(c.name, "none", None, reason="it is outside the quality budget")
    measurement = measured.get(c.name, left_out)
    size = model_io.size_bytes(c.path)
    found = Attempt(c.name, c.precision, measurement, judged.get(c.name), size, False, "")
    if c.predicted is None:
        return found
    baseline = measured[base].median_ms  # what is predicted is the ratio to it
    ms = None if baseline is None or c.predicted.speedup is None else baseline / c.predicted.speedup
    return replace(
        found,
        predicted_ms=ms,
        predicted_db=c.predicted.db,
        calibration_db=c.calibration_db,
        integer_macs=c.predicted.integer_macs,
    )
