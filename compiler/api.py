"""The public Python API: the command line's verbs as functions. Paths may be str or Path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import devices as device_table
from .bundle import Bundle, open_bundle
from .inspection import inspect
from .options import Options, parse_low_rank, parse_prune, parse_steps
from .types import Budget, DeviceProfile, Fidelity, Inspection, Measurement, Progress, Range, Report, Robustness, silent

__all__ = [
    "Bundle",
    "bench",
    "calibrate",
    "compile",
    "devices",
    "evaluate",
    "inspect",
    "open_bundle",
    "robustness",
    "Inspection",
]

PathLike = str | Path


def compile(
    model: PathLike,
    out: PathLike,
    *,
    device: str = "local",
    backend: str = "auto",
    target: str | None = None,
    calib: PathLike | None = None,
    ranges: PathLike | None = None,
    eval: PathLike | None = None,
    metric: str | None = None,
    preprocess: str | None = None,
    precision: str = "auto",
    method: str = "auto",
    without: str | Sequence[str] = (),
    degrade: str = "clean",
    robust: bool = False,
    prune: str | None = None,
    low_rank: str | None = None,
    goal: str = "latency",
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    max_size_bytes: int | None = None,
    time_budget: float | None = None,
    tune: float = 60.0,
    fixed_point: bool = False,
    threads: int = 0,
    seed: int = 0,
    verify: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Report:
    """Compile an ONNX file for a device, leave a bundle in the folder `out`, and return the report.

    `max_drop` is in points (1.0 where None, then a named precision may exceed it), `time_budget` and `tune` (TVM's
    schedules; 0: those of before) in seconds. `fixed_point`: TVM requantizes by integers alone.
    `without` names steps of quantization to leave out (options.STEPS). `degrade` says under which conditions the
    images are calibrated on (quantization/conditions.py); `robust` tries several ways and keeps what held-out
    images support (quantization/robust.py). `prune` cuts channels: "auto", "30%" of the MACs, "params:50%"
    (pruning/). Raises the classes of compiler/errors.py; each message says what, where and how to fix.
    """
    from . import driver

    budget = Budget(1.0 if max_drop is None else max_drop, max_latency_ms, max_size_bytes, max_drop is not None)
    options = Options(
        device=device,
        backend=backend,
        target=target,
        calib=_path(calib),
        ranges=_path(ranges),
        eval=_path(eval),
        metric=metric,
        preprocess=preprocess,
        precision=precision,
        method=method,
        without=parse_steps(without if isinstance(without, str) else ",".join(without)),
        degrade=degrade,
        robust=robust,
        prune=None if prune is None else parse_prune(prune),
        low_rank=None if low_rank is None else parse_low_rank(low_rank),
        goal=goal,
        budget=budget,
        time_budget=time_budget,
        tune=tune,
        fixed_point=fixed_point,
        threads=threads,
        seed=seed,
        verify=verify,
        force=force,
    )
    return driver.compile(Path(model), Path(out), options, progress)


def calibrate(
    model: PathLike,
    images: PathLike,
    out: PathLike | None = None,
    *,
    method: str = "auto",
    degrade: str = "clean",
    device: str = "local",
    preprocess: str | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> dict[str, Range]:
    """Return the range of every tensor that quantization on `device` asks for; write them to `out` as JSON.

    The tensors are those of the model after the exact passes, which is what `compile --ranges` expects.
    """
    from . import calibration

    return calibration.calibrate(
        Path(model),
        Path(images),
        _path(out),
        method=method,
        degrade=degrade,
        device=device,
        preprocess=preprocess,
        seed=seed,
        threads=threads,
        progress=progress,
    )


def evaluate(
    model: PathLike,
    images: PathLike,
    *,
    against: PathLike | None = None,
    metric: str | None = None,
    preprocess: str | None = None,
    threads: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> Fidelity:
    """Judge a bundle or an ONNX file on a folder of images, beside its original or the model `against`."""
    from . import evaluation

    return evaluation.evaluate(
        Path(model),
        Path(images),
        against=_path(against),
        metric=metric,
        preprocess=preprocess,
        threads=threads,
        seed=seed,
        progress=progress,
    )


def robustness(
    model: PathLike,
    images: PathLike,
    degrade: str = "all",
    *,
    against: PathLike | None = None,
    metric: str | None = None,
    preprocess: str | None = None,
    threads: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> Robustness:
    """Judge a bundle or an ONNX file on the same images under each condition, beside its original or `against`.

    `degrade` is `all`, `qrid` (the conditions of that paper) or names of conditions with commas between them; clean is
    always among them. The degradations are drawn with `seed`. A model without an original is judged by itself.
    """
    from . import evaluation

    return evaluation.evaluate_degraded(
        Path(model),
        Path(images),
        degrade,
        against=_path(against),
        metric=metric,
        preprocess=preprocess,
        threads=threads,
        seed=seed,
        progress=progress,
    )


def bench(
    model: PathLike,
    *,
    against: PathLike | None = None,
    device: str = "local",
    target: str = "local",
    threads: int = 0,
    seconds: float = 4.0,
    builds: int = 1,
    progress: Progress = silent,
) -> list[Measurement]:
    """Measure a bundle or an ONNX file, interleaved with `against` where given, and return it with the baseline last.

    `against` is the baseline of the speed-up; a bundle that carries its float baselines is compared with those.
    `target`: this machine, a device (ssh://), or with rpc://HOST:PORT/KEY a board for TVM's bundles. `builds`: TensorRT
    engines are built so often, for an error bar over builds. Raises UnavailableError where the bundle's backend or the
    target is not there, UserError for what does not run there.
    """
    from . import benching

    return benching.bench(
        Path(model),
        against=_path(against),
        device=device,
        target=target,
        threads=threads,
        seconds=seconds,
        builds=builds,
        progress=progress,
    )


def devices(name: str | None = None) -> Sequence[DeviceProfile]:
    """Return all device profiles, or the one called `name`. DeviceError if there is none."""
    return [device_table.find(name)] if name else list(device_table.load_profiles().values())


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)
