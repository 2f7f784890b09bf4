"""Artifacts that run in another process, on a device or here: sent, built where they need it, and measured there.

One measurement is one job with all that is compared, so that all of it runs interleaved in one process of the device.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import json
import shutil
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import platformdirs

from ...compiler.errors import UnavailableError
from ...compiler.files import write_atomic
from ...compiler.types import Artifact, InputSpec, Measurement, OnDevice, Progress, silent
from ..agent import engines
from ..base import Backend, Runner, Shipped
from . import timing
from .device import Connect, Device, Forgotten, Refused, unavailable

#: What a backend needs there: one of these facts of the probe (backends/agent/probe.py), and what it is called.
_NEEDS = {
    "ort": (("onnxruntime",), "onnxruntime for its python3"),
    "tensorrt": (("tensorrt", "trtexec"), "TensorRT, neither its Python module nor trtexec"),
    "tvm": (("tvm",), "TVM runtime for its python3"),
}
_NOTHING: Mapping[str, Any] = {}
#: A model whose measurement takes so many seconds, at least, also tells copies, throughput and power.
_THOROUGH = 3.0


class Remote:
    """A Runner over an artifact that runs on a device; it is sent when it first runs.

    `provider` is what is expected to run it; a measurement says what did.
    """

    def __init__(self, target: DeviceTarget, sent: Shipped) -> None:
        """Take what is to be sent there."""
        self.target, self.sent = target, sent
        self.inputs, self.outputs, self.provider = sent.inputs, sent.outputs, sent.provider

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once. UnavailableError where the device cannot."""
        return self.target.run(self.sent, feed)

    def profile(self, feed: Mapping[str, np.ndarray], runs: int = 30) -> list[tuple[str, str | None, float]]:
        """Return each kernel, the ONNX nodes that it computes as far as they are known, milliseconds."""
        return self.target.kernels(self.sent, feed)


class DeviceTarget:
    """Runs and times artifacts through the program of backends/agent."""

    is_here = False

    def __init__(self, url: str, connect: Connect, progress: Progress = silent) -> None:
        """Take a way to connect; nothing is connected yet."""
        self.url, self.device, self._who = url, Device(url, connect, progress), me()

    @functools.cached_property
    def probed(self) -> Mapping[str, Any]:
        """What the device is, and what is installed there. UnavailableError where it cannot be reached."""
        return self._asked("probe")

    def check(self) -> None:
        """Raise UnavailableError where the device cannot be reached."""
        _ = self.probed

    def refuses(self, backend: Backend) -> str | None:
        """Return what the device lacks to run a backend's artifacts, or None."""
        keys, what = _NEEDS[backend.name]
        return None if any(key in self.probed for key in keys) else f"the device has no {what}"

    def open(self, backend: Backend, artifact: Artifact, threads: int) -> Runner:
        """Return a runner that sends its artifact when it is needed."""
        return Remote(self, backend.shipped(artifact, threads))

    def measure(
        self,
        runners: Mapping[str, Runner],
        feed: Mapping[str, np.ndarray],
        *,
        baseline: str,
        threads: int,
        seconds: float = 4.0,
        progress: Progress = silent,
        builds: int = 1,
    ) -> dict[str, Measurement]:
        """Time runners in one job there, interleaved. One that does not open there is a measurement with the reason.

        `builds`: how often engines are built, for an error bar over builds. UnavailableError where nothing runs.
        """
        sent = {name: runner.sent for name, runner in runners.items() if isinstance(runner, Remote)}
        thorough = seconds >= _THOROUGH
        how = {"seconds": seconds, "extras": thorough, "builds": builds}
        batch = next((a.shape[0] for a in feed.values() if a.ndim), 1)
        threads = 0 if all(one.runtime == "tensorrt" for one in sent.values()) else threads  # the GPU has its own
        said = self._built("measure", sent, feed, how)
        return measurements(said, baseline, target=self.url, threads=threads, batch=batch)

    def builds(self, runners: Mapping[str, Runner], feed: Mapping[str, np.ndarray]) -> dict[str, Refused | None]:
        """Build engines there for such inputs, and return for each why it does not build, None where it does."""
        sent = {name: runner.sent for name, runner in runners.items() if isinstance(runner, Remote)}
        found = self._built("build", sent, feed)["models"]
        return {name: Refused(one["fault"]) if "fault" in one else None for name, one in found.items()}

    def fetch(self, runner: Runner, feed: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
        """Put the engine for such inputs into the file `path`, building it where it is not there; what is told of it.

        UnavailableError where it does not build.
        """
        assert isinstance(runner, Remote)
        with TemporaryDirectory() as work:
            one = self._asked("build", {path.name: runner.sent}, feed, {"keep": True}, Path(work))["models"][path.name]
            if "fault" in one:
                raise unavailable(Refused(one["fault"]), self.url)
            shutil.copyfile(Path(work) / path.name, path)
        return dict(one)

    def run(self, sent: Shipped, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run an artifact once there."""
        with TemporaryDirectory() as work:
            outputs = self._asked("run", {"model": sent}, feed, {}, Path(work))["outputs"]
            return {
                one["name"]: np.frombuffer(
                    (Path(work) / Path(one["file"]).name).read_bytes(), one["dtype"]
                ).reshape(one["shape"])
                for one in outputs
            }

    def kernels(self, sent: Shipped, feed: Mapping[str, np.ndarray]) -> list[tuple[str, str | None, float]]:
        """Return an artifact's kernels with their ONNX nodes and times; empty where its runtime tells none."""
        how = {"seconds": 0.5, "extras": False, "profile": True}
        one = self._asked("measure", {"model": sent}, feed, how)["models"]["model"]
        if "fault" in one:
            raise unavailable(Refused(one["fault"]), self.url)
        return [(name, " + ".join(nodes) or None, ms) for name, nodes, ms in one.get("kernels") or ()]

    def close(self) -> None:
        """End the session; what was made on the device is removed."""
        self.device.close()

    def _job(self, kind: str, sent: Mapping[str, Shipped], feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Send what a job needs, and return it."""
        models = []
        for name, one in sent.items():
            there = self._sent({path.name: path for path in one.files.values()} | dict(one.beside))
            files = {role: there[path.name] for role, path in one.files.items()}
            if one.runtime == "tensorrt" and self._timings.is_file():
                files["timings"] = self._sent({engines.TIMINGS: self._timings})[engines.TIMINGS]
            models.append(entry(name, one, feed) | {"files": files})
        fed = {} if kind == "build" else self._fed(feed)
        return {"kind": kind, "who": self._who, "models": models, "feed": fed}

    def _fed(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        with TemporaryDirectory() as work:
            files = {}
            for n, array in enumerate(feed.values()):
                path = files[f"input-{n}.bin"] = Path(work) / f"input-{n}.bin"
                path.write_bytes(np.ascontiguousarray(array).tobytes())
            there = self._sent(files) if files else {}
        return {
            name: {"dtype": str(array.dtype), "shape": list(array.shape), "file": there[f"input-{n}.bin"]}
            for n, (name, array) in enumerate(feed.items())
        }

    @functools.cached_property
    def _timings(self) -> Path:
        """Where TensorRT's timings for this device and version are kept: builds need not take them again."""
        told = [self.probed.get(key) for key in ("tensorrt", "trtexec", "model", "gpus", "sm", "driver", "cuda", "l4t")]
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]
        return Path(platformdirs.user_cache_dir("edgec")) / "tensorrt" / f"{name}.cache"

    def _built(
        self, kind: str, sent: Mapping[str, Shipped], feed: Mapping[str, np.ndarray], how: Mapping[str, Any] = _NOTHING
    ) -> dict[str, Any]:
        """Ask for what builds engines, and keep the timings that it took."""
        with TemporaryDirectory() as work:
            found = self._asked(kind, sent, feed, how, Path(work))
            kept = Path(work) / engines.TIMINGS
            if kept.is_file():
                self._timings.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._timings, kept.read_bytes())
        return found

    def _sent(self, files: Mapping[str, Path]) -> dict[str, str]:
        try:
            return self.device.send(files)
        except Refused as refused:
            raise unavailable(refused, self.url) from refused

    def _asked(
        self,
        kind: str,
        sent: Mapping[str, Shipped] = _NOTHING,
        feed: Mapping[str, np.ndarray] = _NOTHING,
        how: Mapping[str, Any] = _NOTHING,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Run a job; all of it once more where the device forgot the session, as after a long time without a line."""
        for last in (False, True):
            try:
                return self.device.run(self._job(kind, sent, feed) | dict(how), folder)
            except Refused as refused:
                raise unavailable(refused, self.url) from refused
            except Forgotten:
                if last:
                    raise
        raise AssertionError


def _shapes(inputs: tuple[InputSpec, ...], feed: Mapping[str, np.ndarray]) -> dict[str, list[list[int]]]:
    """Return the least, best and largest shape of each input with an open dimension: those of what is measured."""
    return {s.name: [list(feed[s.name].shape)] * 3 for s in inputs if None in s.shape and s.name in feed}


def entry(name: str, one: Shipped, feed: Mapping[str, np.ndarray], folder: Path | None = None) -> dict[str, Any]:
    """Return a model as a job has it; its files by their names in `folder`, where they lie there."""
    options = dict(one.options) | {"shapes": _shapes(one.inputs, feed)}
    files = {} if folder is None else {role: str(path.relative_to(folder)) for role, path in one.files.items()}
    return {"name": name, "runtime": one.runtime, "files": files, "options": options}


def measurements(
    said: Mapping[str, Any], baseline: str, *, target: str, threads: int, batch: int
) -> dict[str, Measurement]:
    """Return what a job measured. UnavailableError where the baseline is not among what could be measured."""
    found, notes = said["models"], tuple(said.get("notes") or ())
    missing = {name: _missing(name, target, one["fault"]) for name, one in found.items() if "fault" in one}
    if baseline in missing:
        fault = found[baseline]["fault"]
        raise UnavailableError(f"{baseline}: {fault['what']}", where=target, fix=fault.get("fix"))
    timed = {name: one for name, one in found.items() if "fault" not in one}
    measured = timing.summarise(
        {name: np.array(one["rounds"]) for name, one in timed.items()},
        baseline,
        target=target,
        threads=threads,
        batch=batch,
        providers={name: one["provider"] for name, one in timed.items()},
        calls={name: np.array(one["calls"]) for name, one in timed.items()},
    )
    return missing | {name: _told(measured[name], one, notes) for name, one in timed.items()}


def _missing(name: str, url: str, fault: Mapping[str, Any]) -> Measurement:
    return Measurement(name, url, None, reason=str(fault["what"]))


def _told(measured: Measurement, one: Mapping[str, Any], notes: tuple[str, ...]) -> Measurement:
    """Return a measurement with what the device told beside it."""
    built = one.get("built") or {}
    said = [line for line in (one.get("beside"), *built.get("warnings", ())[:2]) if line]
    told = OnDevice(
        with_copies_ms=one.get("with_copies_ms"),
        throughput=one.get("throughput"),
        joules=one.get("joules"),
        watts=one.get("watts"),
        rail=one.get("rail"),
        builds_ms=tuple(one.get("builds") or ()),
        engine=_engine(built),
        notes=(*notes, *(f"{measured.name}: {line}" for line in said)),
    )
    return replace(measured, on_device=told)


def _engine(built: Mapping[str, Any] | None) -> str | None:
    """Return what was built in words."""
    if not built:
        return None
    if built.get("carried"):
        return "the bundle's own engine"
    flags = f", flags {'+'.join(built['flags'])}" if built.get("flags") else ""
    how = f"{built['typing']}ly typed{flags}, {built['bytes'] / 1e6:.3g} MB, built in {built['seconds']:.0f} s"
    by = " by trtexec" if built.get("with") == "trtexec" else ""
    again = f" (anew: {built['rebuilt']})" if built.get("rebuilt") else ""
    return f"TensorRT {built['version']}{by}, {how}{again}"


def me() -> str:
    """Return who asks, as a device's other users are told: user@machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
