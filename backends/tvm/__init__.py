"""TVM: the tables only; the backend itself is not in this version (see PLANNED in base.py).

TVM 0.27 reads Q/DQ pairs, per tensor and per channel, and runs them as float operators around float layers: integers
come from what this backend will make of `Q/DQ -> Conv -> Q/DQ` itself. It takes no QLinearConv, no 4-bit tensors, no
FP8 and no blocks.
"""

from __future__ import annotations

from ...compiler.types import OpSupport, QuantScheme

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
