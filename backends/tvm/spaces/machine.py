"""What schedules need to know of a processor: its vectors, its registers, its dot product, the threads to run on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm.target.codegen import target_has_features as has

from . import intrinsics


@dataclass(frozen=True)
class Dot:
    """An instruction that adds four products of bytes to each 32-bit lane: TVM's name of it, its operands' types."""

    intrinsic: str
    activations: str
    weights: str = "int8"


@dataclass(frozen=True)
class Machine:
    """A processor as schedules see it: float32 lanes of a vector register, registers, threads; TVM's target of it."""

    lanes: int
    registers: int
    dot: Dot | None
    threads: int
    target: Any = field(default=None, repr=False, compare=False)


#: LLVM's feature, float32 lanes, registers; the first that the target has. The last is what any target can do.
_VECTORS = (("avx512f", 16, 32), ("avx2", 8, 16), ("avx", 8, 16), ("neon", 4, 32), ("", 4, 16))
#: LLVM's feature, float32 lanes of the registers that it works on, and the instruction.
_DOTS = (
    ("avx512vnni", 16, Dot(intrinsics.VNNI, "uint8")),
    ("avxvnni", 8, Dot(intrinsics.VNNI_256, "uint8")),
    ("avx2", 8, Dot(intrinsics.MADD, "uint8")),
    ("dotprod", 4, Dot(intrinsics.SDOT, "int8")),
    ("neon", 4, Dot(intrinsics.SMULL, "int8")),
)


def machine_of(target: Any) -> Machine:
    """Return what a TVM target of kind llvm says of its processor."""
    intrinsics.register()
    lanes, registers = next((lanes, count) for name, lanes, count in _VECTORS if not name or has(name, target))
    dot = next((dot for name, width, dot in _DOTS if width == lanes and has(name, target)), None)
    return Machine(lanes, registers, dot, int(target.attrs.get("num-cores", 1)), target)
