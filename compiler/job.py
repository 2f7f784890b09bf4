"""One compile, resolved: which device, backend, target, images and judge the options mean."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..backends import base as backends
from ..backends import targets
from ..backends.agent import trtexec
from ..backends.base import FLOAT32, Lowering
from ..backends.ort import Session
from ..backends.targets.on_device import DeviceTarget
from ..calib import folder
from ..calib import preprocess as preprocessing
from . import answering, devices, fidelity, matching
from . import model as model_io
from .errors import DataError, ModelError, UnavailableError, UserError
from .metrics import load_metric
from .options import PRECISIONS, Options, Saving
from .proof import LARGE
from .quantization import conditions
from .types import DeviceProfile, FloatScheme, InputSpec, Preprocess, Progress, QuantScheme

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..backends.base import Backend, Target


#: Threads that a device has whose cores are not known.
_CORES = 4
_INSTALL = "install it there (edgec doctor --target URL shows what is), or choose another --backend"


@dataclass(frozen=True)
class Job:
    """One compile: what was asked, resolved to objects.

    `images` are calibrated on, as `--degrade` has them; ranges are chosen for all of `conditions` where there are any.
    The images to judge by are clean. `threads` are those of what runs here, `target_threads` of what runs on the target
    (0: all).
    """

    path: Path
    options: Options
    profile: DeviceProfile
    backend: Backend
    target: Target | None
    not_measured: str | None
    threads: int
    preprocess: Preprocess | None
    images: folder.Folder | None
    judged: folder.Folder | None
    metric: fidelity.Metric | None
    progress: Progress
    #: When the search shall end, on time.monotonic's clock; None where no time budget is stated.
    deadline: float | None = None
    conditions: Mapping[str, folder.Folder] = field(default_factory=dict)
    target_threads: int = 0

    @property
    def timed_here(self) -> bool:
        """Whether layers can be timed in this process as the target would run them: what menus and mixtures cost by."""
        return self.target is not None and self.target.is_here and self.backend.in_process

    @property
    def not_timed(self) -> str:
        """Why layers are not timed here, where they are not."""
        if self.target is None:
            return f"nothing is measured ({self.not_measured})"
        return "no layer is timed: that is done on this machine only, and the target is another"

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the search shall end, at least 0; None where it may take its time."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)


def check_precision(options: Options) -> None:
    """Raise UserError for a precision that is unknown."""
    if options.precision not in PRECISIONS:
        raise UserError(
            f"unknown precision {options.precision!r}",
            where="--precision",
            fix="choose one of: " + ", ".join(PRECISIONS),
        )


def resolve(path: Path, model: ir.Model, options: Options, progress: Progress) -> Job:
    """Resolve the options for one model.

    Raises DeviceError, DataError, UserError (exit code 2) and UnavailableError (4), all before any work is done.
    """
    deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
    profile = devices.find(options.device)
    here = devices.is_this_machine(profile)
    if options.target == "local" and not here:
        raise UserError(
            f"this machine is not a {profile.title}", where="--target local", fix="leave --target out, or --device"
        )
    url = options.target or ("local" if here else None)
    if url is None or not url.startswith("ssh:"):
        backend = _backend(options, profile, url, None)
        return _resolved(path, model, options, progress, deadline, profile, backend, url, None)
    target = targets.of(url, progress)
    try:
        assert isinstance(target, DeviceTarget)
        profile = answering.profile_of(target, options.device)
        backend = _backend(options, profile, url, target)
        return _resolved(path, model, options, progress, deadline, profile, backend, url, target)
    except BaseException:
        target.close()
        raise


def _resolved(
    path: Path,
    model: ir.Model,
    options: Options,
    progress: Progress,
    deadline: float | None,
    profile: DeviceProfile,
    backend: Backend,
    url: str | None,
    reached: Target | None,
) -> Job:
    """Resolve the rest, once device and backend are known; `reached` is the target where it was asked what it is."""
    _check_judge(options)
    _check_degrade(options)
    metric = load_metric(options.metric) if options.metric else None
    threads = options.threads or devices.usable_cores()
    target, why = _target(url, profile, backend, progress, reached)
    if isinstance(target, DeviceTarget) and reached is None:
        profile = matching.toolchain(profile, target.probed)
    there = _target_threads(options, profile, target)
    how = Lowering(options.tune, there, options.seed, progress, options.fixed_point, target)
    backend = backend.prepared(how)
    _check_savings(options, _not_timed(target, backend, why))
    specs = honest_specs(path, model)
    pre = images = judged = None
    if (options.calib or options.eval) and not specs:
        raise DataError("the model has no input", where=str(path), fix="leave --calib and --eval out")
    if options.calib or options.eval:
        pre = preprocessing.resolve(options.preprocess, path, specs[0])
    if options.calib:
        images = folder.open_folder(options.calib, pre, specs)
    if options.eval:
        judged = folder.open_folder(options.eval, pre, specs)
    elif images is not None:
        images, judged = images.split(options.seed)
    found = Job(
        path=path,
        options=options,
        profile=profile,
        backend=backend,
        target=target,
        not_measured=why,
        threads=threads,
        target_threads=there,
        preprocess=pre,
        images=images,
        judged=_with_labels(judged, metric),
        metric=metric,
        progress=progress,
        deadline=deadline,
    )
    if options.robust:
        for some in (images, judged):
            if some is not None:
                conditions.check_images(some, "--robust")
    return calibrated(found, options.degrade)


def _not_timed(target: Target | None, backend: Backend, not_measured: str | None) -> str | None:
    """Return why the times of layers are not known, None where they are taken here."""
    if not backend.runs_onnx:
        return "layers are timed by ONNX Runtime's profiler only"
    here = target is not None and target.is_here and backend.in_process
    return None if here else not_measured or "layers are timed on this machine only, and it runs elsewhere"


def _with_labels(judged: folder.Folder | None, metric: fidelity.Metric | None) -> folder.Folder | None:
    """Return the images to judge by, for a decoder with the objects that are labelled on them. DataError if broken."""
    decodes = metric is not None and metric.decode is not None
    return judged.with_box_labels() if judged is not None and decodes else judged


def calibrated(this: Job, text: str) -> Job:
    """Return a job whose images are clean as one that calibrates by `--degrade text`. Errors as of calibrated_on."""
    if this.images is None:
        return this
    images, several = conditions.calibrated_on(this.images, text, this.options.seed)
    return replace(this, images=images, conditions=several, options=replace(this.options, degrade=text))


def _check_savings(options: Options, not_measured: str | None) -> None:
    """Raise UserError where there are no images to repair by, or latency is to be saved and not measured."""
    for option, request in (("--prune", options.prune), ("--low-rank", options.low_rank)):
        if request is not None:
            _check_saving(option, request, options, not_measured)


def _check_saving(option: str, request: Saving, options: Options, not_measured: str | None) -> None:
    if options.calib is None:
        what = "what is left of the network is repaired on images, and there are none"
        raise UserError(what, where=f"{option} {request.text}", fix="give --calib DIR, a hundred images or more")
    if request.kind == "latency" and not_measured is not None:
        fix = f"{option} macs:30% counts MACs, {option} params:30% parameters"
        raise UserError(f"latency is not measured: {not_measured}", where=f"{option} {request.text}", fix=fix)


def _check_degrade(options: Options) -> None:
    """Raise UserError for what `--degrade`, `--robust` and `--fixed-point` cannot do, DataError without images."""
    if options.fixed_point and options.backend not in ("auto", "tvm"):
        what = f"{options.backend} requantizes in its own way"
        raise UserError(what, where="--fixed-point", fix="leave it out, or choose --backend tvm")
    plan = conditions.check(options.degrade, options.method)
    changed = plan.conditions != (conditions.CLEAN,)
    if not (changed or options.robust):
        return
    where = "--robust" if options.robust else f"--degrade {options.degrade}"
    clashes = {
        f"--degrade {options.degrade}": options.robust and changed,
        f"--method {options.method}": options.robust and options.method != "auto",
        f"--ranges {options.ranges}": options.ranges is not None,
        f"--precision {options.precision}": options.precision in ("fp32", "fp16"),
    }
    clash = next((option for option, found in clashes.items() if found), None)
    if clash is not None:
        what = "they exclude each other: one says how to calibrate, the other leaves no choice in that"
        raise UserError(what, where=f"{where} {clash}", fix="leave one of them out")
    if options.calib is None:
        raise DataError("there are no images to calibrate on", where=where, fix="add --calib FOLDER")


def _check_judge(options: Options) -> None:
    """Raise DataError for a stated judge or quality budget without images to judge on."""
    stated = "--metric" if options.metric else "--max-drop" if options.budget.drop_stated else None
    if stated and not (options.calib or options.eval):
        raise DataError("there are no images to judge on", where=stated, fix="add --calib FOLDER or --eval FOLDER")


def honest_specs(path: Path, model: ir.Model) -> tuple[InputSpec, ...]:
    """Return the model's inputs; batch 1 where it declares any batch but fails on two images.

    Exporters often leave a Reshape with a fixed batch inside. Models too large to try are taken at their word.
    """
    specs = model_io.input_specs(model)
    if not specs or any(s.shape[:1] != (None,) for s in specs) or model_io.weights_bytes(model) > LARGE:
        return specs
    try:
        Session(path, optimise=False).run(model_io.sample_inputs(specs, seed=0, batch=2))
    except ModelError:
        return tuple(replace(s, shape=(1, *s.shape[1:])) for s in specs)
    return specs


def _backend(options: Options, profile: DeviceProfile, url: str | None, reached: DeviceTarget | None) -> Backend:
    """Return the backend that was named, or the device's first choice that can run where it shall be measured."""
    if options.backend != "auto":
        return backends.load(options.backend)
    if url is not None and url.startswith("rpc:"):
        return backends.load("tvm")
    known = [backends.load(name) for name in profile.backends if name in backends.BACKENDS]
    if url == "local":
        known = [b for b in known if b.unavailable() is None and (b.in_process or tensorrt_is_here())]
    if reached is None:
        return known[0]
    refused = {b.name: reached.refuses(b) for b in known}
    able = [b for b in known if refused[b.name] is None and b.unavailable() is None]
    if not able:
        raise UnavailableError("; ".join(str(why) for why in refused.values()), where=f"--target {url}", fix=_INSTALL)
    return able[0]


def tensorrt_is_here() -> bool:
    """Say whether this machine seems to have TensorRT: its module, or trtexec."""
    return find_spec("tensorrt") is not None or trtexec.find() is not None


def _target(
    url: str | None, profile: DeviceProfile, backend: Backend, progress: Progress, reached: Target | None
) -> tuple[Target | None, str | None]:
    """Return where to measure, or why nothing is measured. UnavailableError for what was asked and is not there."""
    if url is None:
        return None, f"this machine is not a {profile.title}"
    target = reached or targets.of(url, progress, in_process=backend.in_process)
    refusal = target.refuses(backend)
    if refusal is not None and url.startswith("rpc:"):
        raise UserError(refusal, where=f"--target {url} --backend {backend.name}", fix="use --backend tvm there")
    if refusal is not None:
        raise UnavailableError(refusal, where=f"--target {url} --backend {backend.name}", fix=_INSTALL)
    problem = backend.unavailable()
    if problem is not None:
        raise problem
    target.check()
    return target, None


def _target_threads(options: Options, profile: DeviceProfile, target: Target | None) -> int:
    """Return the threads to build and measure for: all cores of a board, where they are known, or of this machine."""
    elsewhere = (target is not None and not target.is_here) or not devices.is_this_machine(profile)
    if options.threads or profile.is_local or not elsewhere:
        return options.threads or devices.usable_cores()
    return (profile.cores if profile.kind == "cpu" else None) or _CORES


def one_input(job: Job) -> dict[str, np.ndarray]:
    """Return one input of batch 1 to time with: a real image where there is one."""
    images = job.judged or job.images
    if images is not None:
        return dict(next(iter(images.batches(1))).feed)
    return model_io.sample_inputs(model_io.input_specs(model_io.load(job.path)), job.options.seed)


def scheme(job: Job) -> FloatScheme | QuantScheme:
    """Return what shall be tried beside float32, or float32 itself where nothing else shall or can be.

    `auto` is INT8, where there are images or ranges to quantize by. UserError or DataError for a precision that was
    named and cannot be had.
    """
    named = job.options.precision != "auto"
    precision = job.options.precision if named else "int8"
    found = job.backend.schemes(job.profile)[precision]
    why = _objection(job, found, precision)
    if why is None and not isinstance(found, str):
        return found
    if named and why is not None:
        raise why
    return FLOAT32


def quant_scheme(job: Job) -> QuantScheme | None:
    """Return how to quantize; None where only floats are tried. Errors as of `scheme`."""
    found = scheme(job)
    return found if isinstance(found, QuantScheme) else None


def wants_float16(job: Job) -> bool:
    """Say whether the model shall be cast to float16. Errors as of `scheme`."""
    found = scheme(job)
    return isinstance(found, FloatScheme) and found.dtype == "float16"


def wants_integers(job: Job) -> bool:
    """Say whether numbers of few bits shall be tried. Errors as of `scheme`."""
    return quant_scheme(job) is not None


def _objection(job: Job, found: QuantScheme | FloatScheme | str, precision: str) -> UserError | None:
    """Return why this job cannot have the scheme."""
    where = f"--precision {precision}"
    if isinstance(found, str):
        return UserError(found, where=where, fix="leave --precision out, or choose another device or backend")
    if isinstance(found, FloatScheme) or found.activation is None:
        return None
    if job.images is None and job.options.ranges is None:
        fix = "add --calib FOLDER, or --ranges FILE"
        return DataError(f"{precision.upper()} needs images to calibrate on", where=where, fix=fix)
    return None


def refuse_unsupported(this: Job, model: ir.Model) -> None:
    """Raise UserError for what the backend cannot run in a model behind the exact passes."""
    refusals = this.backend.check(model, this.profile)
    if refusals:
        lines = "; ".join(f"{r.node}: {r.why}" for r in refusals[:5])
        raise UserError(
            f"{len(refusals)} {'node' if len(refusals) == 1 else 'nodes'} cannot run on it: {lines}",
            where=f"backend {this.backend.name}",
            fix="choose --backend ort",
        )
