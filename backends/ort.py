"""ONNX Runtime: the tables first (what its integer kernels take, on which CPU), the backend second.

Sources of the tables: onnxruntime's own Q/DQ selectors (core/optimizer/qdq_transformer) for which patterns become
integer kernels; for the schemes, its quantization guide and our measurements (docs/benchmarks.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..compiler.errors import ModelError, UnavailableError, UserError
from ..compiler.types import Artifact, DeviceProfile, FloatScheme, InputSpec, OpSupport, QuantScheme, Refusal
from .base import FLOAT32, Lowering, Schemes, Shipped

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def _scheme(name: str, activation: Literal["uint8", "int8"], source: str, weight_max: int = 127) -> QuantScheme:
    """Asymmetric activations, so that ReLU is absorbed by the rounding; weights symmetric per channel.

    Float layers are shielded: since 1.21 ONNX Runtime's WeightBiasQuantization turns the float weights of a Conv or
    Gemm between DequantizeLinear and QuantizeLinear into int8 with one scale for all channels.
    """
    return QuantScheme(
        name,
        activation,
        False,
        weight_max=weight_max,
        weight_max_8bit=weight_max,
        shield_float=True,
        nhwc_kernels=True,
        cast_weights=True,
        source=source,
    )


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

#: Weights of 4 bits, floats everywhere else: as fast as float32, an eighth of the size.
INT4 = QuantScheme(
    "int4-weights",
    None,
    symmetric=True,
    weight="int4",
    weight_max=7,
    bias="float32",
    cast_weights=True,
    source="measured: 0.97x to 1.0x of float32's time where Cast and Mul are folded, 2.2x with DequantizeLinear",
)

_LINEAR = ("constant-weight", "constant-bias")
_WEIGHTS: tuple[str, ...] = ("int8", "uint8", "int4")
SUPPORTS: tuple[OpSupport, ...] = (
    OpSupport("Conv", "linear", weights=_WEIGHTS, needs=_LINEAR),
    OpSupport("ConvTranspose", "linear", (), _WEIGHTS, needs=_LINEAR),
    OpSupport("Gemm", "linear", weights=_WEIGHTS, output="optional", needs=(*_LINEAR, "plain-gemm")),
    OpSupport("MatMul", "linear", weights=_WEIGHTS, output="optional", needs=("constant-weight", "rank-2-weight")),
    OpSupport("Add", "combine", needs=("no-softmax-behind",)),
    OpSupport("Mul", "combine", needs=("outside-gelu", "no-softmax-behind")),
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
#: Rows to add where the products inside attention (Q·K^T and attention times V) shall run on integers too. What lies
#: between them, and LayerNormalization, Softmax and GELU, has no row at all: it stays float.
ATTENTION: tuple[OpSupport, ...] = (OpSupport("MatMul", "product", output="optional", needs=("two-activations",)),)


_ANY = ("uint8", "int8", "uint16", "int16", "float8e4m3fn", "float8e5m2")
#: What any format can be judged with here although no kernel has it (`simulated`, placement "inputs"): numbers are
#: rounded by Q/DQ, the arithmetic is float32. Open such models with `Session(…, fuse_quantized=False)`.
SIMULATED: tuple[OpSupport, ...] = (
    *(
        OpSupport(op, "linear", _ANY, (*_WEIGHTS, "float8e4m3fn", "float8e5m2"), "optional", needs)
        for op, needs in (
            ("Conv", _LINEAR),
            ("ConvTranspose", _LINEAR),
            ("Gemm", (*_LINEAR, "plain-gemm")),
            ("MatMul", ("constant-weight", "rank-2-weight")),
        )
    ),
    OpSupport("Add", "combine", _ANY, output="optional"),
)


_CPU = ("CPUExecutionProvider",)


class OnnxRuntime:
    """ONNX Runtime on this machine: the CPU provider, or CUDA where the package and the GPU are there."""

    name: ClassVar[str] = "ort"
    supports: ClassVar[tuple[OpSupport, ...]] = SUPPORTS
    attention: ClassVar[tuple[OpSupport, ...]] = ATTENTION
    casts: ClassVar[bool] = False
    runs_onnx: ClassVar[bool] = True
    in_process: ClassVar[bool] = True

    def prepared(self, how: Lowering) -> OnnxRuntime:
        """Return itself: nothing is tuned here."""
        return self

    def unavailable(self) -> UserError | None:
        """Return None: onnxruntime is a dependency of edgec."""
        return None

    def schemes(self, profile: DeviceProfile) -> Schemes:
        """By the first matching row of SCHEMES on CPUs; the CUDA provider has no integer kernels."""
        no_fp8 = "ONNX Runtime has no FP8 kernels; "
        if _on_gpu(profile):
            no_int8 = "ONNX Runtime's CUDA provider has no INT8 kernels; use TensorRT"
            fp16 = _float16(profile, profile.kind, f"{profile.title} does not compute in float16; use --precision fp32")
            fp8 = no_fp8 + "use TensorRT, or --precision fp16"
            return {"fp32": FLOAT32, "fp16": fp16, "int8": no_int8, "fp8": fp8, "int4": INT4, "w4a8": no_int8}
        int8 = next(row for needed, row in SCHEMES if set(needed) <= set(profile.features))
        slow = "ONNX Runtime converts float16 to float32 on this CPU, and back; use --precision int8"
        fp16 = _float16(profile, "cpu", slow)
        w4a8 = replace(int8, name=f"{int8.activation}-int4", weight="int4", weight_max=7)
        fp8 = no_fp8 + "no CPU computes in FP8; use --precision int8"
        return {"fp32": FLOAT32, "fp16": fp16, "int8": int8, "fp8": fp8, "int4": INT4, "w4a8": w4a8}

    def newest_opset(self, profile: DeviceProfile) -> int | None:
        """Return None: it reads what the installed onnx knows."""
        return None

    def check(self, model: ir.Model, profile: DeviceProfile) -> tuple[Refusal, ...]:
        """Return nothing: ONNX Runtime runs the whole standard, and says itself what it cannot when opened."""
        return ()

    def lower(self, model: Path, profile: DeviceProfile, precision: str) -> Artifact:
        """Return the ONNX file itself: that is what ONNX Runtime runs."""
        gpu = ("CUDAExecutionProvider",) if _on_gpu(profile) else ()
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

    def shipped(self, artifact: Artifact, threads: int) -> Shipped:
        """Return the ONNX file, with the providers that shall run it on the device."""
        from ..compiler import model as model_io

        path, providers = artifact.folder / artifact.model, artifact.providers or _CPU
        options = {"providers": list(providers), "threads": threads}
        return Shipped("onnxruntime", {"onnx": path}, *model_io.parts(path), providers[0], options)


#: ONNX Runtime's rules that drop a Relu or Clip in front of QuantizeLinear as if its type ended where they clip. They
#: run even with Q/DQ fusions off, and take the zero of an 8-bit float for the end of its range (seen with 1.31).
_DROP_RELU = ("ReluQuantRewrite", "ClipQuantRewrite")


class Session:
    """A Runner over one onnxruntime.InferenceSession.

    `source` is a path or a serialised model. `optimise=False` switches every graph optimisation off: the
    reference that edgec compares with. `fuse_quantized=False` leaves Q/DQ as they are, each rounding by itself, and
    optimises the rest: for judging formats without kernels here (FP8, 16 bits). ModelError where ONNX Runtime refuses
    the model.
    """

    def __init__(
        self,
        source: Path | bytes,
        *,
        threads: int = 0,
        optimise: bool = True,
        fuse_quantized: bool = True,
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
        if not fuse_quantized:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        disabled = None if fuse_quantized else list(_DROP_RELU)
        data = source if isinstance(source, bytes) else str(source)
        self._name = "the model" if isinstance(source, bytes) else str(source)
        try:
            self._session = ort.InferenceSession(data, options, providers=list(providers), disabled_optimizers=disabled)
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


def _on_gpu(profile: DeviceProfile) -> bool:
    """Say whether ONNX Runtime runs on the GPU: on a card, and on a Jetson whose build of it was found to have CUDA."""
    return profile.kind == "gpu" or "CUDAExecutionProvider" in profile.toolchain.get("onnxruntime-providers", "")


def _inputs(session: Any) -> tuple[InputSpec, ...]:
    return tuple(
        InputSpec(i.name, _NUMPY.get(i.type, i.type), tuple(d if isinstance(d, int) else None for d in i.shape))
        for i in session.get_inputs()
    )


def _float16(profile: DeviceProfile, kind: str, otherwise: str) -> FloatScheme | str:
    """Return float16 where the device is of the kind and has it (a Jetson has it, but not where ONNX Runtime runs)."""
    has = profile.kind == kind and "float16" in profile.dtypes
    return FloatScheme("float16", "float16") if has else otherwise


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
