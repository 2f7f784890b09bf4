"""TensorRT: the tables first, the class second. Contract-checked, not run on hardware.

What is written here are the ONNX files that TensorRT builds from; the engine itself is built on the device, by
backends/agent, since it runs nowhere else. Source of the rules: NVIDIA's explicit-quantization guide and
Model-Optimizer's placement.

- activations int8, symmetric, zero points explicit and 0; one scale per tensor
- weights stay float behind a Q/DQ pair with one scale per output channel (TensorRT 8 reads no int8 initializer)
- biases stay float (int32 -> DequantizeLinear is refused by every version)
- FP8 (E4M3, from SM 8.9 on) like INT8, but weights are stored as FP8; INT4 for weights of Gemm and MatMul only, packed
  and in blocks (from SM 8.0 and TensorRT 10 on)
- Q/DQ in front of Conv, ConvTranspose, Gemm and MatMul; on the skip branch of a residual Add; never behind them
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...compiler.errors import UserError
from ...compiler.types import Artifact, DeviceProfile, FloatScheme, OpSupport, QuantScheme, Refusal
from ..base import FLOAT32, Lowering, Runner, Schemes, Shipped
from . import shipping

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

INT8 = QuantScheme(
    "int8-symmetric",
    "int8",
    symmetric=True,
    bias="float32",
    stored_weights="float",
    placement="inputs",
    source="NVIDIA's explicit-quantization guide",
)
FP8 = replace(
    INT8,
    name="float8e4m3fn",
    activation="float8e4m3fn",
    weight="float8e4m3fn",
    weight_max=448,
    stored_weights="integer",
    simulated=True,
)
INT4 = replace(
    INT8, name="int4-weights", activation=None, weight="int4", weight_max=7, block=128, stored_weights="integer"
)
#: From this TensorRT on the types of the graph are kept (strong typing), which Q/DQ in float16 needs opset 19 for.
STRONGLY_TYPED_FROM, FLOAT16_OPSET = (10, 12), 19
_BELOW_FLOAT32 = ("fp16", "int8", "fp8", "int4", "w4a8")
#: The newest opset that parsers before a version read (onnx-tensorrt's operators.md by release).
OPSETS = (((8, 5), 13), ((10, 0), 17), ((10, 9), 20), ((99, 0), 21))
#: The first TensorRT that reads FP8 and INT4 tensors from ONNX.
FEW_BITS_FROM = 10

_ACTIVATIONS = _WEIGHTS = ("int8", "float8e4m3fn")
SUPPORTS: tuple[OpSupport, ...] = (
    OpSupport("Conv", "linear", _ACTIVATIONS, _WEIGHTS, "optional", ("constant-weight", "enough-channels")),
    OpSupport("ConvTranspose", "linear", ("int8",), ("int8",), "optional", ("constant-weight",)),
    OpSupport(
        "Gemm", "linear", _ACTIVATIONS, (*_WEIGHTS, "int4"), "optional", ("constant-weight", "plain-gemm", "a-matrix")
    ),
    OpSupport(
        "MatMul",
        "linear",
        _ACTIVATIONS,
        (*_WEIGHTS, "int4"),
        "optional",
        ("constant-weight", "rank-2-weight", "a-matrix"),
    ),
    OpSupport("Add", "combine", _ACTIVATIONS, output="optional"),
    OpSupport("AveragePool", "combine", ("int8",), output="optional"),
    OpSupport("GlobalAveragePool", "combine", ("int8",), output="optional"),
    OpSupport("Resize", "combine", ("int8",), output="optional"),
    OpSupport("Concat", "combine", _ACTIVATIONS, output="optional"),
)
#: Rows to add where the products inside attention shall run on integers too.
ATTENTION: tuple[OpSupport, ...] = (
    OpSupport(
        "MatMul", "product", ("int8",), output="optional", needs=("two-activations", "short-sequence", "no-mask")
    ),
)


class TensorRT:
    """Lowers to the ONNX file from which a TensorRT engine is built on the device."""

    name: ClassVar[str] = "tensorrt"
    supports: ClassVar[tuple[OpSupport, ...]] = SUPPORTS
    attention: ClassVar[tuple[OpSupport, ...]] = ATTENTION
    casts: ClassVar[bool] = True
    in_process: ClassVar[bool] = False
    runs_onnx: ClassVar[bool] = True

    def prepared(self, how: Lowering) -> TensorRT:
        """Return itself: nothing is tuned here."""
        return self

    def unavailable(self) -> UserError | None:
        """Return None: whether TensorRT is there is the device's to say, this machine being one of them."""
        return None

    def schemes(self, profile: DeviceProfile) -> Schemes:
        """By the device's types: INT8 from SM 7.2 on; INT4 weights from 8.0, FP8 from 8.9, both from version 10."""
        has = set(profile.dtypes)
        sm = "" if profile.sm is None else f" (SM {profile.sm:g})"
        instead = "int8" if "int8" in has else "fp16"
        old = _too_old(profile, instead)

        def where(dtype: str, scheme: QuantScheme | FloatScheme, why: str) -> QuantScheme | FloatScheme | str:
            return scheme if dtype in has else f"{profile.title}{sm} {why}"

        int8 = where("int8", INT8, "has no INT8 units; use --precision fp16")
        fp8 = where("float8e4m3fn", FP8, f"has no FP8 units, which came with SM 8.9; use --precision {instead}")
        int4 = where("int4", INT4, f"has no INT4 weights, which came with SM 8.0; use --precision {instead}")
        return {
            "fp32": FLOAT32,
            "fp16": where("float16", FloatScheme("float16", "float16"), "has no FP16 units; use --precision fp32"),
            "int8": int8,
            "fp8": fp8 if isinstance(fp8, str) else old or fp8,
            "int4": int4 if isinstance(int4, str) else old or int4,
            "w4a8": f"TensorRT has no kernels for INT4 weights with INT8 activations; use --precision {instead}",
        }

    def newest_opset(self, profile: DeviceProfile) -> int | None:
        """Return the newest opset of the device's version; where that is open, one that most versions read."""
        version = profile.toolchain.get("tensorrt")
        found = (8, 5) if version is None else _numbers(version)
        return next(opset for before, opset in OPSETS if found < before)

    def check(self, model: ir.Model, profile: DeviceProfile) -> tuple[Refusal, ...]:
        """Return the operators that TensorRT's parser refuses, and Q/DQ of the model's own that version 8 does."""
        version = profile.toolchain.get("tensorrt")
        old = None if version is None or _numbers(version) >= (FEW_BITS_FROM, 0) else version
        found = ((node, _objection(node, old)) for node in model.graph.all_nodes())
        return tuple(
            Refusal(node.name or node.op_type, "tensorrt-operator", why) for node, why in found if why is not None
        )

    def lower(self, model: Path, profile: DeviceProfile, precision: str) -> Artifact:
        """Return the ONNX file from which the engine is built on the device.

        Before 10.12 that is `model` itself, in float32: flags of the builder choose the types. Later versions keep the
        types of the graph, hence a copy in float16 beside it, `<stem>-float16.onnx`, for the precisions below float32.
        Where the version is unknown both are there, and the artifact is `model`. Which nodes of the copy stay in
        float32 is marked in the model (see passes/cast_fp16.py).
        """
        version = profile.toolchain.get("tensorrt")
        typed = version is None or _numbers(version) >= STRONGLY_TYPED_FROM
        copy = _float16_copy(model) if typed and precision in _BELOW_FLOAT32 else None
        name = model.name if copy is None or version is None else copy.name
        return Artifact(self.name, precision, model.parent, name)

    def open(self, artifact: Artifact, threads: int) -> Runner:
        """Open an artifact in this machine's TensorRT, in a process of its own. UnavailableError where there is none.

        The bundle's engine is opened where it was built for this very machine, else a new one is built.
        """
        from ..targets.here import HereTarget

        return HereTarget().open(self, artifact, threads)

    def shipped(self, artifact: Artifact, threads: int) -> Shipped:
        """Return the ONNX files, of which the device takes the one that its version wants, and the engine if any."""
        return shipping.shipped(artifact)


_REFUSED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
_UNSIGNED = "its zero point is uint8, or missing, which means that: TensorRT {} reads int8 only"


def _objection(node: ir.Node, old: str | None) -> str | None:
    """Return why the parser refuses a node; `old` is a version before 10, None for later and unknown ones."""
    if node.op_type in _REFUSED:
        return f"TensorRT has no {node.op_type}"
    if old is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None or (zero.dtype is not None and zero.dtype.name == "UINT8"):
        return _UNSIGNED.format(old)
    what = node.inputs[0]
    if node.op_type == "DequantizeLinear" and what is not None and what.const_value is not None:
        return f"its weight is stored in integers, which TensorRT {old} does not read"
    return None


def _too_old(profile: DeviceProfile, instead: str) -> str | None:
    """Return why the device's TensorRT reads no FP8 or INT4; None where it does, or where its version is open."""
    version = profile.toolchain.get("tensorrt")
    if version is None or int(version.partition(".")[0]) >= FEW_BITS_FROM:
        return None
    return (
        f"TensorRT {version}, which {profile.title} comes with, reads no FP8 or INT4 from ONNX, only version "
        f"{FEW_BITS_FROM} and later do; use --precision {instead}"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Return major and minor version; what is no number counts as 0."""
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:2])


def _float16_copy(path: Path) -> Path | None:
    """Write the model with float16 weights and activations beside it; return the file, None where that cannot be."""
    from ...compiler import model as model_io
    from ...passes.cast_fp16 import CastFloat16
    from ...passes.raise_opset import RaiseOpset

    model = model_io.load(path)
    raised = RaiseOpset(FLOAT16_OPSET).apply(model)
    if raised.refusals:
        logger.warning("%s stays in float32: %s", path, raised.refusals[0].why)
        return None
    CastFloat16().apply(model)
    copy = path.with_name(f"{path.stem}-float16.onnx")
    model_io.save(model, copy)
    return copy
