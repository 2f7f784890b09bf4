"""`edgec bench`: a bundle or an ONNX file, measured here, on a device, or as it was measured there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import base as backends
from ..backends import targets
from ..backends.targets.on_device import DeviceTarget, Remote
from . import answering, bundle, devices, evaluation, recipe
from . import model as model_io
from .errors import UserError
from .types import Artifact, DeviceProfile, Measurement, Progress

if TYPE_CHECKING:
    from ..backends.base import Runner, Target
    from ..backends.ort import OperatorTime

#: ONNX Runtime's execution providers that a device is measured by, where it has them, the fastest first.
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


def bench(
    path: Path,
    *,
    against: Path | None,
    device: str,
    target: str,
    threads: int,
    seconds: float,
    builds: int,
    progress: Progress,
) -> list[Measurement]:
    """See api.bench."""
    manifest = bundle.read_manifest(path) if path.is_dir() else {}
    if target == "local" and against is None and path.is_dir() and recipe.came_back(path):
        return recipe.joined(path)
    in_process = not manifest or backends.load(manifest["backend"]).in_process
    with closing(targets.of(target, progress, in_process=in_process)) as there:
        there.check()
        if isinstance(there, DeviceTarget):
            named = manifest.get("device", device) if device == "local" else device
            profile = answering.profile_of(there, named)
            count, runners = threads, _on_device(there, path, manifest, against, profile, threads)
            measure: Callable[..., dict[str, Measurement]] = functools.partial(there.measure, builds=builds)
        else:
            count = (threads or _built_for(manifest) or devices.usable_cores()) if there.is_here else threads
            runners = _opened(there, path, against, count, device)
            measure = there.measure
        baseline = list(runners)[-1]
        feed = model_io.sample_inputs(runners[path.name].inputs, seed=0)
        measured = measure(runners, feed, baseline=baseline, threads=count, seconds=seconds, progress=progress)
    return [measured[name] for name in runners]


def operators(path: Path, *, device: str, target: str, threads: int, progress: Progress) -> list[OperatorTime]:
    """Return where the time of a call goes, on this machine or on a device; errors as of bench."""
    if target.startswith("rpc:"):
        what = "times of operators are not told by boards behind a tracker"
        raise UserError(what, where=f"--profile --target {target}", fix="leave --profile out")
    if not target.startswith("ssh:"):
        manifest = bundle.read_manifest(path) if path.is_dir() else {}
        if not manifest or backends.load(manifest["backend"]).in_process:
            return evaluation.operator_times(path, threads)
    with closing(targets.of(target, progress, in_process=False)) as there:
        assert isinstance(there, DeviceTarget)
        manifest = bundle.read_manifest(path) if path.is_dir() else {}
        profile = answering.profile_of(there, manifest.get("device", device) if device == "local" else device)
        runner = next(iter(_on_device(there, path, manifest, None, profile, threads).values()))
        assert isinstance(runner, Remote)
        return evaluation.kernel_times(runner.profile(model_io.sample_inputs(runner.inputs, seed=0)))


def _opened(there: Target, path: Path, against: Path | None, threads: int, device: str) -> dict[str, Runner]:
    """Return what runs in this process, or on boards: the model, and the baseline if there is one."""
    carried = path / bundle.BASELINE
    other = against or (carried if there.is_here and carried.is_file() else None)
    paths = {path.name: path} | ({} if other is None else {f"{other.name} (baseline)": other})
    if there.is_here:
        return {name: evaluation.open_any(one, threads, device=device) for name, one in paths.items()}
    return {name: evaluation.open_there(one, there, threads) for name, one in paths.items()}


def _on_device(
    there: DeviceTarget,
    path: Path,
    manifest: Mapping[str, Any],
    against: Path | None,
    profile: DeviceProfile,
    threads: int,
) -> dict[str, Runner]:
    """Return what runs on a device: the model, with a bundle's float baselines or the one that was given."""

    def opened(one: Path) -> Runner:
        artifact = bundle.artifact_of(one, bundle.read_manifest(one)) if one.is_dir() else _onnx(one, profile)
        return there.open(backends.load(artifact.backend), artifact, threads)

    if against is not None:
        return {path.name: opened(path), f"{against.name} (baseline)": opened(against)}
    if not path.is_dir():
        return _by_provider(there, path, profile, threads)
    found = recipe.compared(path, bundle.artifact_of(path, manifest), profile, threads)
    runners: dict[str, Runner] = {name: Remote(there, one) for name, one in found.models.items()}
    result = {path.name: runners.pop(recipe.RESULT)}
    return result | {f"{name} (baseline)" if name == found.baseline else name: one for name, one in runners.items()}


def _by_provider(there: DeviceTarget, path: Path, profile: DeviceProfile, threads: int) -> dict[str, Runner]:
    """Return an ONNX file in each execution provider that the device's ONNX Runtime has; the CPU is the last."""
    plain = _onnx(path, profile)
    has = (there.probed.get("onnxruntime") or {}).get("providers") or ()
    known = [name for name in PROVIDERS if name in has]
    if len(known) < 2:
        return {path.name: there.open(backends.load("ort"), plain, threads)}
    each = {name: replace(plain, providers=tuple(dict.fromkeys((name, *plain.providers[-1:])))) for name in known}
    names = [path.name, *(f"{path.name} ({name.removesuffix('ExecutionProvider')})" for name in known[1:])]
    return {
        name: there.open(backends.load("ort"), artifact, threads)
        for name, artifact in zip(names, each.values(), strict=True)
    }


def _onnx(path: Path, profile: DeviceProfile) -> Artifact:
    model_io.load(path)  # its faults are explained better than ONNX Runtime explains them
    return backends.load("ort").lower(path, profile, "as given")


def _built_for(manifest: Mapping[str, Any]) -> int:
    """Return the threads that a bundle's kernels were built for, 0 where they take any."""
    return int(manifest.get("threads") or 0) if manifest.get("backend") == "tvm" else 0
