"""TVM: float32 and INT8 modules for CPUs, with schedules of our own. The tables first, the backend second.

Q/DQ pairs become integer arithmetic (lowering/integers.py): layers with weights on the machine's dot product of bytes,
the rest in float32 between Q and DQ, fused. No 4-bit tensors, no FP8 and no blocks.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...compiler.errors import ModelError, UnavailableError, UserError
from ...compiler.types import Artifact, DeviceProfile, OpSupport, QuantScheme, Refusal
from ..base import FLOAT32, Lowering, Schemes, Shipped
from . import support

if TYPE_CHECKING:
    import onnx_ir as ir

    from .runner import Module

_8_BITS = ("uint8", "int8")

INT8 = QuantScheme(
    "uint8-int8",
    "uint8",
    symmetric=False,
    source="the operands of VNNI's dot product; SDOT's are signed, and moved by 128 where it runs",
)
SUPPORTS: tuple[OpSupport, ...] = (
    OpSupport("Conv", "linear", _8_BITS, ("int8",), needs=("constant-weight", "constant-bias")),
    OpSupport("Gemm", "linear", _8_BITS, ("int8",), "optional", ("constant-weight", "constant-bias", "plain-gemm")),
    OpSupport("MatMul", "linear", _8_BITS, ("int8",), "optional", ("constant-weight", "rank-2-weight")),
    OpSupport("Add", "combine", _8_BITS, needs=("no-softmax-behind",)),
    OpSupport("Concat", "combine", _8_BITS),
    OpSupport("MaxPool", "move", _8_BITS, needs=("max-pool-on-integers",)),
    OpSupport("Flatten", "move", _8_BITS),
    OpSupport("Reshape", "move", _8_BITS),
    OpSupport("Slice", "move", _8_BITS),
    OpSupport("Transpose", "move", _8_BITS),
)

_SAID = ".json"
_VERSION, _FFI = "0.27", "0.1.14.post1"
_NARROW = "TVM's modules are float32 or int8 in this version of edgec, not {}"
_ON_GPU = "TVM's CUDA modules are float32 in this version of edgec: take fp32, or --backend tensorrt"


@dataclass
class Made:
    """What one compile has made already: libraries by content, since a candidate is lowered to be measured, and once
    more where it is handed over; and whether the user has had enough of tuning (Ctrl-C).
    """

    libraries: dict[str, Path] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class Tvm:
    """Compiles to a library for a device's CPU, or a CUDA module. `how`: seconds of tuning, threads, and so on."""

    how: Lowering = Lowering()
    made: Made = field(default_factory=Made)
    name: ClassVar[str] = "tvm"
    supports: ClassVar[tuple[OpSupport, ...]] = SUPPORTS
    casts: ClassVar[bool] = False
    runs_onnx: ClassVar[bool] = False
    in_process: ClassVar[bool] = True

    def prepared(self, how: Lowering) -> Tvm:
        """Return the backend as one compile wants it."""
        return replace(self, how=how, made=Made())

    def unavailable(self) -> UserError | None:
        """Return why TVM cannot be used on this machine, or None."""
        fix = 'pip install "edgec[tvm]"'
        if find_spec("tvm") is None:
            return UnavailableError("TVM is not installed", where="backend tvm", fix=fix)
        if not metadata.version("apache-tvm").startswith(_VERSION) or metadata.version("apache-tvm-ffi") != _FFI:
            why = f"edgec needs apache-tvm {_VERSION} with apache-tvm-ffi {_FFI}; others crash when a module is saved"
            return UnavailableError(why, where="backend tvm", fix=fix)
        return None

    def schemes(self, profile: DeviceProfile) -> Schemes:
        """Return float32, INT8 on CPUs, and why there is nothing else."""
        narrow = {name: _NARROW.format(name) for name in ("fp16", "fp8", "int4", "w4a8")}
        return {"fp32": FLOAT32, "int8": INT8 if profile.kind == "cpu" or profile.sm is None else _ON_GPU, **narrow}

    def newest_opset(self, profile: DeviceProfile) -> int | None:
        """Return None: it reads what the installed onnx knows."""
        return None

    def check(self, model: ir.Model, profile: DeviceProfile) -> tuple[Refusal, ...]:
        """Return the inputs and nodes that TVM, or its importer, does not take."""
        return tuple(support.refusals(model))

    def lower(self, model: Path, profile: DeviceProfile, precision: str) -> Artifact:
        """Tune and compile an ONNX file to a library beside it, with a file that says what it reads, gives and is.

        What was compiled of the same file already is taken. UnavailableError where TVM is missing, or knows no such
        device.
        """
        from . import building

        problem = self.unavailable()
        if problem is not None:
            raise problem
        key = _content(model, profile)
        done = self.made.libraries.get(key)
        if done is None:
            how = replace(self.how, tune=0.0) if self.made.interrupted else self.how
            done, interrupted = building.build(model, profile, how)
            self.made.libraries[key] = done
            self.made.interrupted |= interrupted
        library = model.with_suffix(done.suffix)
        if done != library:
            for suffix in (done.suffix, done.suffix + _SAID):
                shutil.copy(done.with_suffix(suffix), model.with_suffix(suffix))
        return Artifact(self.name, precision, model.parent, library.name)

    def open(self, artifact: Artifact, threads: int) -> Module:
        """Open a library on this machine. UnavailableError without TVM or the device, ModelError where it is broken."""
        from .runner import opened

        problem = self.unavailable()
        if problem is not None:
            raise problem
        return opened(artifact.folder / artifact.model, threads)

    def shipped(self, artifact: Artifact, threads: int) -> Shipped:
        """Return the library with what is said beside it. ModelError where that is damaged."""
        from .runner import Facts

        path = artifact.folder / artifact.model
        try:
            facts = Facts.of(path)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError("what is said beside it is damaged", where=str(path), fix="compile again") from error
        said = path.with_name(path.name + _SAID)
        options = {"threads": threads}
        return Shipped(
            "tvm", {"library": path}, {said.name: said}, facts.inputs, facts.outputs, facts.provider, options
        )


def _content(model: Path, profile: DeviceProfile) -> str:
    """Return a hash of an ONNX file, of the files with its tensors beside it, and of the device."""
    hashed = hashlib.sha256(profile.name.encode())
    beside = (p for p in model.parent.glob(f"{model.name}*") if p != model and p.is_file())
    for path in (model, *sorted(beside)):
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()
