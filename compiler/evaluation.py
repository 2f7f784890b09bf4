"""A model or bundle on images, as they are or degraded, beside its original; and opening either kind to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..backends import base as backends
from ..backends.ort import OperatorTime, Session, profile
from ..calib import degrade as degradations
from ..calib import folder as folders
from ..calib import preprocess as preprocessing
from . import bundle, devices, fidelity, robustness
from . import model as model_io
from .errors import DataError, UserError
from .metrics import load_metric
from .types import Artifact, Fidelity, Preprocess, Progress, Robustness, UnderCondition

if TYPE_CHECKING:
    from ..backends.base import Runner, Target
    from .fidelity import Metric

#: How many images a model gets at once, and what the judged model is called beside its original.
_BATCH, _RESULT = 8, "result"


def evaluate(
    path: Path,
    images: Path,
    *,
    against: Path | None,
    metric: str | None,
    preprocess: str | None,
    threads: int,
    seed: int,
    progress: Progress,
) -> Fidelity:
    """See api.evaluate. DataError where there is neither a reference nor a label to judge by."""
    judge = load_metric(metric) if metric else None
    runner, data, reference = _opened(path, images, against, judge, preprocess, threads)
    labelled = data.labels() is not None
    by_labels = data.box_labels is not None or (labelled and judge is None)
    if reference is None and not by_labels:
        raise DataError(
            "nothing to judge by",
            where=str(images),
            fix="give --against ORIGINAL, or images in class folders, or for a detector box labels",
        )
    found = fidelity.compare(
        reference or runner,
        {_RESULT: runner},
        data.batches(_BATCH),
        images=len(data),
        metric=judge,
        labelled=labelled,
        seed=seed,
        progress=progress,
    )[_RESULT]
    return found if reference is not None else _alone(found)


def _alone(found: Fidelity) -> Fidelity:
    """Return what the labels alone say: there is nothing to compare with."""
    boxes = None if found.boxes is None else replace(found.boxes, reference_ap50=None, reference_ap=None)
    return replace(
        found,
        reference=None,
        reference_top5=None,
        drop=None,
        drop_low=None,
        drop_high=None,
        outputs=(),
        boxes=boxes,
    )


def evaluate_degraded(
    path: Path,
    images: Path,
    degrade: str,
    *,
    against: Path | None,
    metric: str | None,
    preprocess: str | None,
    threads: int,
    seed: int,
    progress: Progress,
) -> Robustness:
    """See api.robustness. UserError for names that are no conditions, DataError for arrays in place of images."""
    conditions = _conditions(degrade)
    judge = load_metric(metric) if metric else None
    runner, data, reference = _opened(path, images, against, judge, preprocess, threads)
    under = degradations.under(data, conditions, seed)
    seen = fidelity.compare_together(
        reference or runner,
        {} if reference is None else {_RESULT: runner},
        folders.together(under, _BATCH),
        images=len(data),
        metric=judge,
        labelled=data.labels() is not None,
        progress=progress,
    )
    return robustness.judge(seen, None if reference is None else _RESULT, seed=seed)


def _conditions(text: str) -> tuple[str, ...]:
    """Return the conditions that `--degrade` names, clean in front."""
    plan = degradations.parse(text)
    if plan.kind != "conditions":
        what = f"{plan.kind} is a way to calibrate; eval measures each condition by itself"
        raise UserError(what, where=f"--degrade {text}", fix="give all, qrid or names: " + ", ".join(plan.conditions))
    return (fidelity.CLEAN, *(name for name in plan.conditions if name != fidelity.CLEAN))


def _opened(
    path: Path, images: Path, against: Path | None, judge: Metric | None, preprocess: str | None, threads: int
) -> tuple[Runner, folders.Folder, Runner | None]:
    """Return the model, the images, with their box labels for a decoder, and the reference where there is one."""
    runner = _judged(path, threads)
    data = folders.open_folder(images, _preprocess(path, preprocess, runner), runner.inputs)
    if judge is not None and judge.decode is not None:
        data = data.with_box_labels()
    other = against or _source(path)
    reference = None if other is None else open_any(other, threads, optimise=False)
    return runner, data, reference


def _judged(path: Path, threads: int) -> Runner:
    """Open a bundle, or an ONNX file, to be judged: quality needs no device, so ONNX Runtime runs what is ONNX."""
    if not path.is_dir():
        return open_any(path, threads)
    artifact = bundle.artifact_of(path, bundle.read_manifest(path))
    if not artifact.model.endswith(".onnx"):
        return backends.load(artifact.backend).open(artifact, threads)
    return Session(artifact.folder / artifact.model, threads=threads)


def open_any(path: Path, threads: int, *, optimise: bool = True, device: str = "local") -> Runner:
    """Open a bundle, or an ONNX file in ONNX Runtime as on `device`, on this machine.

    Raises the errors of model.load, bundle.open_bundle and Session.
    """
    if path.is_dir():
        manifest = bundle.read_manifest(path)
        artifact: Artifact = bundle.artifact_of(path, manifest)
        return backends.load(artifact.backend).open(artifact, threads)
    model_io.load(path)  # its faults are explained better than ONNX Runtime explains them
    if not optimise:
        return Session(path, threads=threads, optimise=False)
    runtime = backends.load("ort")
    return runtime.open(runtime.lower(path, devices.find(device), "as given"), threads)


def operator_times(path: Path, threads: int) -> list[OperatorTime]:
    """Return where the time of a call of a bundle, or an ONNX file, goes; a TVM module's kernels by their ONNX nodes.

    Errors as of open_any.
    """
    if path.is_dir():
        runner = open_any(path, threads)
        if isinstance(runner, backends.Profiled):
            return kernel_times(runner.profile(model_io.sample_inputs(runner.inputs, seed=0)))
    return profile(path / bundle.MODEL if path.is_dir() else path, threads)


def kernel_times(rows: Sequence[tuple[str, str | None, float]]) -> list[OperatorTime]:
    """Return the kernels of a call, by the ONNX nodes that they compute where these are known, the slowest first."""
    total = sum(ms for _, _, ms in rows) or 1.0
    named = [OperatorTime(node or name, 1, ms, ms / total) for name, node, ms in rows]
    return sorted(named, key=lambda row: -row.milliseconds)


def open_there(path: Path, target: Target, threads: int) -> Runner:
    """Open a bundle on a target elsewhere. UserError for what cannot run there, else the errors of open_any."""
    if not path.is_dir():
        what = "an ONNX file cannot run there as it is"
        raise UserError(what, where=f"{path} --target {target.url}", fix="compile it for there, and give the bundle")
    artifact = bundle.artifact_of(path, bundle.read_manifest(path))
    return target.open(backends.load(artifact.backend), artifact, threads)


def _source(path: Path) -> Path | None:
    """Return the original that a bundle was made from, where it still lies there unchanged."""
    if not path.is_dir():
        return None
    source = bundle.read_manifest(path).get("source_path")
    if source is None or not Path(source["path"]).is_file():
        return None
    return Path(source["path"]) if bundle.digest(Path(source["path"])) == source["sha256"] else None


def _preprocess(path: Path, stated: str | None, runner: Runner) -> Preprocess | None:
    if path.is_dir() and stated is None:
        carried = bundle.preprocess_of(bundle.read_manifest(path))
        if carried is not None:
            return carried
    return preprocessing.resolve(stated, path, runner.inputs[0])


def to_json(path: Path, against: Path | None, result: Fidelity | Robustness) -> dict[str, object]:
    """Return the document that `eval --json` prints: one entry a condition.

    An entry is the model's fidelity; with `--degrade` also `original`, `difference` and its `verdict`.
    """
    from .report import serial

    document = {"model": str(path), "against": None if against is None else str(against)}
    if not isinstance(result, Robustness):
        return {**document, "conditions": {fidelity.CLEAN: serial.plain(result)}}
    return {
        **document,
        "seed": result.seed,
        "conditions": {name: _entry(found) for name, found in result.conditions.items()},
        "together": list(result.together),
        "notes": list(result.notes),
    }


def _entry(found: UnderCondition) -> dict[str, object]:
    """Return a condition's entry; the figures of the original where there is nothing beside it."""
    from .report import serial

    return {
        **serial.plain(found.fidelity or found.original),
        "original": serial.plain(found.original),
        "difference": serial.plain(found.difference),
        "verdict": None if found.difference is None else found.difference.verdict,
    }
