"""TensorRT: the tables first, the class second. Contract-checked, not run on hardware.

This version writes the ONNX artifact that TensorRT builds from; the engine itself is built on the device. Source of
the rules: NVIDIA's explicit-quantization guide and Model-Optimizer's placement.

- activations int8, symmetric, zero points explicit and 0; one scale per tensor
- weights stay float behind a Q/DQ pair with one scale per output channel (TensorRT 8 reads no int8 initializer)
- biases stay float (int32 -> DequantizeLinear is refused by every version)
- Q/DQ in front of Conv, ConvTranspose, Gemm and MatMul; on the skip branch of a residual Add; never behind them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..compiler.errors import UnavailableError, UserError
from ..compiler.types import Artifact, DeviceProfile, OpSupport, QuantScheme, Refusal
from .base import Runner

if TYPE_CHECKING:
    import onnx_ir as ir

INT8 = QuantScheme(
    "int8-symmetric",
    "int8",
    symmetric=True,
    bias="float32",
    stored_weights="float",
    placement="inputs",
    source="NVIDIA's explicit-quantization guide",
)
SUPPORTS: tuple[OpSupport, ...] = (
    OpSupport("Conv", "linear", ("int8",), ("int8",), "optional", ("constant-weight",)),
    OpSupport("ConvTranspose", "linear", ("int8",), ("int8",), "optional", ("constant-weight",)),
    OpSupport("Gemm", "linear", ("int8",), ("int8",), "optional", ("constant-weight", "plain-gemm")),
    OpSupport("MatMul", "linear", ("int8",), ("int8",), "optional", ("constant-weight", "rank-2-weight")),
    OpSupport("Add", "combine", ("int8",), output="optional"),
)


class TensorRT:
    """Lowers to the ONNX file from which a TensorRT engine is built on the device."""

    name: ClassVar[str] = "tensorrt"
    supports: ClassVar[tuple[OpSupport, ...]] = SUPPORTS

    def unavailable(self) -> UserError | None:
        """Return why no engine can be built here."""
        return UnavailableError(
            "building TensorRT engines is not in this version of edgec",
            fix="the bundle's model.onnx is what trtexec builds the engine from, on the device",
        )

    def schemes(self, profile: DeviceProfile) -> Mapping[str, QuantScheme | str]:
        """INT8 where the GPU has integer tensor cores (SM 7.2 and up, not SM 6.2 and below)."""
        float32 = QuantScheme("float32", "int8", symmetric=True)
        if "int8" not in profile.dtypes:
            return {
                "fp32": float32,
                "int8": f"{profile.title} has no INT8 units; --precision fp32 runs as FP16 there",
            }
        return {"fp32": float32, "int8": INT8}

    def check(self, model: ir.Model, profile: DeviceProfile) -> tuple[Refusal, ...]:
        """Return the operators that TensorRT's parser refuses."""
        refused = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
        return tuple(
            Refusal(node.name or node.op_type, "tensorrt-operator", f"TensorRT has no {node.op_type}")
            for node in model.graph.all_nodes()
            if node.op_type in refused
        )

    def lower(self, model: Path, profile: DeviceProfile, precision: str) -> Artifact:
        """Return the ONNX file: the engine is built from it on the device."""
        return Artifact(self.name, precision, model.parent, model.name)

    def open(self, artifact: Artifact, threads: int) -> Runner:
        """Raise UnavailableError: no engine is built in this version."""
        raise self.unavailable() or AssertionError
