"""TVM: float32 modules for this CPU, tuned here. The tables first, the backend second.

TVM 0.27 reads Q/DQ pairs, per tensor and per channel, and runs them as float operators around float layers: integers
come from what this backend will make of `Q/DQ -> Conv -> Q/DQ` itself, which is not in this version. It takes no
QLinearConv, no 4-bit tensors, no FP8 and no blocks. Other targets than this machine are not in this version either.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...compiler.errors import ModelError, UnavailableError, UserError
from ...compiler.types import Artifact, DeviceProfile, InputSpec, OpSupport, QuantScheme, Refusal
from ..base import FLOAT32, Lowering, Schemes
from . import support

if TYPE_CHECKING:
    import onnx_ir as ir

    from .runner import Module

_8_BITS = ("uint8", "int8")

INT8 = QuantScheme(
    "uint8-int8",
    "uint8",
    symmetric=False,
    source="the operands of TVM's dot products for VNNI; not measured",
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

_FLOATS_ONLY = "TVM runs float32 only in this version of edgec: leave --precision out, or choose --backend ort"
#: What stands beside a library: what it reads and gives.
_SAID = ".so.json"
_VERSION, _FFI = "0.27", "0.1.14.post1"


@dataclass(frozen=True)
class Tvm:
    """Compiles to a shared library for this machine. `how` says how long to tune, and for how many threads.

    `built` are the libraries that one compile has made already, by content: a candidate is lowered to be measured, and
    once more where it is handed over.
    """

    how: Lowering = Lowering()
    built: dict[str, Path] = field(default_factory=dict)
    name: ClassVar[str] = "tvm"
    supports: ClassVar[tuple[OpSupport, ...]] = SUPPORTS
    casts: ClassVar[bool] = False
    runs_onnx: ClassVar[bool] = False

    def prepared(self, how: Lowering) -> Tvm:
        """Return the backend as one compile wants it."""
        return replace(self, how=how, built={})

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
        """Return float32, and why there is nothing else."""
        return {"fp32": FLOAT32, **dict.fromkeys(("fp16", "int8", "fp8", "int4", "w4a8"), _FLOATS_ONLY)}

    def check(self, model: ir.Model, profile: DeviceProfile) -> tuple[Refusal, ...]:
        """Return the nodes that TVM's importer does not take."""
        return tuple(support.refusals(model))

    def lower(self, model: Path, profile: DeviceProfile, precision: str) -> Artifact:
        """Tune and compile an ONNX file to a library beside it, with a file that says what it reads and gives.

        What was compiled of the same file already is taken. UnavailableError for other machines than this one.
        """
        from ...compiler import model as model_io
        from . import module, tuning

        if profile.name != "local":
            why = "TVM compiles for this machine only in this version of edgec"
            raise UnavailableError(why, where=f"device {profile.name}", fix="use --device local, or --backend ort")
        problem = self.unavailable()
        if problem is not None:
            raise problem
        library, said = model.with_suffix(".so"), model.with_suffix(_SAID)
        target = module.target_of(module.host_cpu(self.how.threads))
        key = hashlib.sha256(model.read_bytes() + str(target.export()).encode()).hexdigest()
        if key in self.built:
            for one, other in ((self.built[key], library), (self.built[key].with_suffix(_SAID), said)):
                if one != other:
                    shutil.copy(one, other)
            return Artifact(self.name, precision, model.parent, library.name)
        graph = model_io.load(model)
        inputs = model_io.input_specs(graph)
        network = module.imported(model, inputs, target)
        found = tuning.tune(network, self.how.tune, seed=self.how.seed, progress=self.how.progress)
        module.compiled(network, found.records).export_library(str(library))
        facts = {
            "inputs": [[spec.name, spec.dtype, spec.shape] for spec in inputs],
            "outputs": [value.name for value in graph.graph.outputs],
            "target": str(target.export()),
            "tvm": metadata.version("apache-tvm"),
            "schedules tried": found.trials,
            "schedules that failed": found.failed,
        }
        said.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        self.built[key] = library
        return Artifact(self.name, precision, model.parent, library.name)

    def open(self, artifact: Artifact, threads: int) -> Module:
        """Open a library on this machine. UnavailableError without TVM, ModelError where the library does not load."""
        from .runner import Module

        problem = self.unavailable()
        if problem is not None:
            raise problem
        path = artifact.folder / artifact.model
        try:
            facts = json.loads(path.with_suffix(_SAID).read_text(encoding="utf-8"))
            inputs = tuple(InputSpec(name, dtype, tuple(shape)) for name, dtype, shape in facts["inputs"])
            return Module(path, inputs, tuple(facts["outputs"]), threads)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"it does not load: {error}", where=str(path), fix="compile again") from error
