"""ONNX Runtime: the tables first (what its integer kernels take, on which CPU), the backend second.

Sources of the tables: onnxruntime's own Q/DQ selectors (core/optimizer/qdq_transformer) for which patterns become
integer kernels; for the schemes, its quantization guide and our measurements (docs/benchmarks.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..compiler.errors import ModelError, UnavailableError, UserError
from ..compiler.types import Artifact, DeviceProfile, InputSpec, OpSupport, QuantScheme, Refusal

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def _scheme(name: str, activation: Literal["uint8", "int8"], source: str, weight_max: int = 127) -> QuantScheme:
    """Asymmetric activations, so that ReLU is absorbed by the rounding; weights symmetric per channel.

    Float layers are shielded: since 1.21 ONNX Runtime's WeightBiasQuantization turns the float weights of a Conv or
    Gemm between DequantizeLinear and QuantizeLinear into int8 with one scale for all channels.
    """
    return QuantScheme(name, activation, False, weight_max=weight_max, shield_float=True, source=source)


#: First row whose features the device has. On x86, uint8 x int8 maps to vpdpbusd with VNNI; without it
#: vpmaddubsw adds two products in 16 bits and saturates from 255 * 127 * 2 on, hence 7-bit weights.
SCHEMES: tuple[tuple[tuple[str, ...], QuantScheme], ...] = (
    (
        ("avx512_vnni",),
        _scheme(
            "uint8-int8",
            "uint8",
            "measured: 1.85x on ResNet-20, where int8 activations are slower than float32",
        ),
    ),
    (("avx_vnni",), _scheme("uint8-int8", "uint8", "the same instruction on 256 bits; not measured here")),
    (
        ("avx2",),
        _scheme("uint8-int7", "uint8", "onnxruntime's quantization guide (reduce_range), not measured here", 63),
    ),
    (
        ("neon",),
        _scheme("int8-int8", "int8", "onnxruntime's Arm kernels (SDOT, SMLAL) take int8 x int8; not measured here"),
    ),
    ((), _scheme("uint8-int8", "uint8", "where the CPU is unknown")),
)

_LINEAR = ("constant-weight", "constant-bias")
SUPPORTS: tuple[OpSupport, ...] = (
    OpSupport("Conv", "linear", weights=("int8", "uint8"), needs=_LINEAR),
    OpSupport("Gemm", "linear", weights=("int8", "uint8"), output="optional", needs=(*_LINEAR, "plain-gemm")),
    OpSupport(
        "MatMul",
        "linear",
        weights=("int8", "uint8"),
        output="optional",
        needs=("constant-weight", "rank-2-weight"),
    ),
    OpSupport("Add", "combine"),
    OpSupport("Mul", "combine"),
    OpSupport("Concat", "combine"),
    OpSupport("AveragePool", "combine"),
    OpSupport("GlobalAveragePool", "combine"),
    OpSupport("LeakyRelu", "combine"),
    OpSupport("MaxPool", "move", needs=("max-pool-on-integers",)),
    OpSupport("Pad", "move", needs=("pad-with-zero",)),
    OpSupport("Resize", "move", needs=("nearest-resize",)),
    OpSupport("Flatten", "move"),
    OpSupport("Gather", "move"),
    OpSupport("Reshape", "move"),
    OpSupport("Slice", "move"),
    OpSupport("Split", "move"),
    OpSupport("Squeeze", "move"),
    OpSupport("Transpose", "move"),
    OpSupport("Unsqueeze", "move"),
)


_CPU = ("CPUExecutionProvider",)


class OnnxRuntime:
    """ONNX Runtime on this machine: the CPU provider, or CUDA where the package and the GPU are there."""

    name: ClassVar[str] = "ort"
    supports: ClassVar[tuple[OpSupport, ...]] = SUPPORTS

    def unavailable(self) -> UserError | None:
        """Return None: onnxruntime is a dependency of edgec."""
        return None

    def schemes(self, profile: DeviceProfile) -> Mapping[str, QuantScheme | str]:
        """INT8 on CPUs by the first matching row of SCHEMES; the CUDA provider has no integer kernels."""
        float32 = QuantScheme("float32", "uint8", symmetric=False)
        if profile.kind == "gpu":
            return {"fp32": float32, "int8": "ONNX Runtime's CUDA provider has no INT8 kernels; use TensorRT"}
        scheme = next(row for needed, row in SCHEMES if set(needed) <= set(profile.features))
        return {"fp32": float32, "int8": scheme}

    def check(self, model: ir.Model, profile: DeviceProfile) -> tuple[Refusal, ...]:
        """Return nothing: ONNX Runtime runs the whole standard, and says itself what it cannot when opened."""
        return ()

    def lower(self, model: Path, profile: DeviceProfile, precision: str) -> Artifact:
        """Return the ONNX file itself: that is what ONNX Runtime runs."""
        gpu = ("CUDAExecutionProvider",) if profile.kind == "gpu" else ()
        return Artifact(self.name, precision, model.parent, model.name, (*gpu, "CPUExecutionProvider"))

    def open(self, artifact: Artifact, threads: int) -> Session:
        """Open the artifact with all optimisations. UnavailableError where a provider is missing."""
        import onnxruntime as ort

        missing = [p for p in artifact.providers if p not in ort.get_available_providers()]
        if missing:
            raise UnavailableError(
                f"this onnxruntime has no {missing[0]}", where="backend ort", fix="pip install onnxruntime-gpu"
            )
        return Session(artifact.folder / artifact.model, threads=threads, providers=artifact.providers or _CPU)


class Session:
    """A Runner over one onnxruntime.InferenceSession.

    `source` is a path or a serialised model. `optimise=False` switches every graph optimisation off: the
    reference that edgec compares with. Raises ModelError where ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        source: Path | bytes,
        *,
        threads: int = 0,
        optimise: bool = True,
        providers: tuple[str, ...] = _CPU,
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # idle threads must not spin on while another session is being timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = source if isinstance(source, bytes) else str(source)
        self._name = "the model" if isinstance(source, bytes) else str(source)
        try:
            self._session = ort.InferenceSession(data, options, providers=list(providers))
        except _refusals() as error:
            raise ModelError(
                f"ONNX Runtime cannot run it: {_first_line(error)}",
                where=self._name,
                fix="check that the model runs in onnxruntime as it is; custom operators are not supported",
            ) from error
        self.inputs = _inputs(self._session)
        self.outputs = tuple(o.name for o in self._session.get_outputs())
        self.provider = self._session.get_providers()[0]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once and return the outputs by name. ModelError where the model fails on this input."""
        try:
            values = self._session.run(None, dict(feed))
        except _refusals(ValueError) as error:  # its own check of the inputs' names raises ValueError
            raise ModelError(
                f"it fails on this input: {_first_line(error)}",
                where=self._name,
                fix="check the inputs' names and shapes: edgec inspect MODEL",
            ) from error
        return dict(zip(self.outputs, values, strict=True))


def _inputs(session: Any) -> tuple[InputSpec, ...]:
    return tuple(
        InputSpec(i.name, _NUMPY.get(i.type, i.type), tuple(d if isinstance(d, int) else None for d in i.shape))
        for i in session.get_inputs()
    )


_NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
}


def _refusals(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the exceptions by which onnxruntime refuses a model (they share no base class of their own)."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        *more,
        state.Fail,
        state.InvalidGraph,
        state.InvalidArgument,
        state.NotImplemented,
        state.InvalidProtobuf,
        state.RuntimeException,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@dataclass(frozen=True)
class OperatorTime:
    """Time of one operator kind in one call: the sum over its nodes, the mean over the runs."""

    op: str
    nodes: int
    milliseconds: float
    share: float


def profile(model: Path, threads: int, runs: int = 50) -> list[OperatorTime]:
    """Return the time of each operator kind of an ONNX file, from ONNX Runtime's own profiler, slowest first.

    The names are those of the optimised graph (QLinearConv, …). Profiling slows the run: only shares compare.
    """
    import onnxruntime as ort

    from ..compiler.model import sample_inputs

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(model), options, providers=list(_CPU))
        feed = sample_inputs(_inputs(session), seed=0)
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, float] = {}
    nodes: dict[str, set[str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            op = event["args"]["op_name"]
            times[op] = times.get(op, 0.0) + event["dur"] / 1e3 / runs
            nodes.setdefault(op, set()).add(event["name"])
    total = sum(times.values()) or 1.0
    found = [OperatorTime(op, len(nodes[op]), t, t / total) for op, t in times.items()]
    return sorted(found, key=lambda row: -row.milliseconds)
