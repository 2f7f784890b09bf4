"""The backend contract: what it supports, how it lowers a model file, how it opens what it made.

To add a backend: a file here (its tables first, its class second) and a line in BACKENDS.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from ..compiler.errors import UserError
from ..compiler.types import (
    Artifact,
    DeviceProfile,
    FloatScheme,
    InputSpec,
    Measurement,
    OpSupport,
    Progress,
    QuantScheme,
    Refusal,
    silent,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

BACKENDS: dict[str, str] = {"ort": "ort:OnnxRuntime", "tensorrt": "tensorrt:TensorRT", "tvm": "tvm:Tvm"}
#: The precisions that a backend answers for.
SCHEMED = ("fp32", "fp16", "int8", "fp8", "int4", "w4a8")
Schemes = Mapping[str, QuantScheme | FloatScheme | str]
FLOAT32 = FloatScheme("float32", "float32")


@dataclass(frozen=True)
class Lowering:
    """How one compile wants things built: seconds of tuning, the threads that it will run with (0: all), the seed.

    `fixed_point`: integers are requantized by integers alone, where the backend can.
    `target` is where it will be measured, for backends that tune there; None where nothing is measured.
    """

    tune: float = 60.0
    threads: int = 0
    seed: int = 0
    progress: Progress = silent
    fixed_point: bool = False
    target: Target | None = None


@dataclass(frozen=True)
class Shipped:
    """An artifact as it is sent to a device: which runtime opens it there (backends/agent), and by which files.

    `files` are those that `runtime` asks for, by role; `beside` lie beside them under these names, as weights outside
    an ONNX file do.
    `options` go with them as JSON: precision, threads, providers, shapes.
    """

    runtime: str
    files: Mapping[str, Path]
    beside: Mapping[str, Path]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    provider: str
    options: Mapping[str, object]


class Runner(Protocol):
    """An opened artifact: arrays in, arrays out, by name."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    provider: str

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; `feed` holds every input."""


@runtime_checkable
class Profiled(Protocol):
    """A runner that times its kernels one by one."""

    def profile(self, feed: Mapping[str, np.ndarray], runs: int = 30) -> list[tuple[str, str | None, float]]:
        """Return each kernel as it is called: its name, the ONNX node that it computes if known, milliseconds."""


class Backend(Protocol):
    """Turns a model file into an artifact for a device, and an artifact into a runner."""

    name: ClassVar[str]
    supports: ClassVar[tuple[OpSupport, ...]]
    #: Whether `lower` casts a float32 model to float16 by itself, where the precision asks for it.
    casts: ClassVar[bool]
    #: Whether it runs ONNX files as they are: then the original is timed by it, too, and layers by its profiler.
    runs_onnx: ClassVar[bool]
    #: Whether its artifacts run in edgec's own process; else the program of backends/agent runs them, here too.
    in_process: ClassVar[bool]

    def prepared(self, how: Lowering) -> Backend:
        """Return the backend as one compile wants it."""

    def unavailable(self) -> UserError | None:
        """Return why the backend cannot run on this machine, or None."""

    def schemes(self, profile: DeviceProfile) -> Schemes:
        """Return, for each of SCHEMED, the scheme to use on the device, or why it cannot be had and what to ask for.

        `fp32` is a FloatScheme everywhere, `fp16` a FloatScheme or a reason, all others a QuantScheme or a reason.
        """

    def newest_opset(self, profile: DeviceProfile) -> int | None:
        """Return the newest opset that the backend reads for the device, None for all that onnx knows."""

    def check(self, model: ir.Model, profile: DeviceProfile) -> tuple[Refusal, ...]:
        """Return what in the model the backend cannot run, before anything is built."""

    def lower(self, model: Path, profile: DeviceProfile, precision: str) -> Artifact:
        """Make an artifact in the folder where the ONNX file `model` lies."""

    def open(self, artifact: Artifact, threads: int) -> Runner:
        """Open an artifact on this machine. UnavailableError where the toolchain is missing."""

    def shipped(self, artifact: Artifact, threads: int) -> Shipped:
        """Return an artifact as it is sent to a device over SSH."""


class Target(Protocol):
    """Where artifacts run and are timed."""

    @property
    def url(self) -> str:
        """What a person calls it: `local`, or what was given to `--target`."""

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""

    def check(self) -> None:
        """Raise UnavailableError where nothing can run there now."""

    def refuses(self, backend: Backend) -> str | None:
        """Return why nothing of this backend's runs there, or None."""

    def open(self, backend: Backend, artifact: Artifact, threads: int) -> Runner:
        """Open an artifact to be run there, on so many threads (0: all). Errors as of Backend.open."""

    def measure(
        self,
        runners: Mapping[str, Runner],
        feed: Mapping[str, np.ndarray],
        *,
        baseline: str,
        threads: int,
        seconds: float = 4.0,
        progress: Progress = silent,
    ) -> dict[str, Measurement]:
        """Time runners that it has opened, on the same input, interleaved; `baseline` names what to compare with."""

    def close(self) -> None:
        """Let go of it: nothing stays behind there."""


def load(name: str) -> Backend:
    """Return the backend called `name`; UserError if there is none."""
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}", fix=f"choose one of: auto, {', '.join(BACKENDS)}")
    module, _, cls = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(f".{module}", __package__), cls)()
    return backend
