"""Tensors as they travel: a type by its ONNX Runtime-like name, a shape, and bytes in C order, little endian."""

from typing import Dict, List, NamedTuple, Sequence

#: Bytes of one element; names are NumPy's, and ml_dtypes' for what NumPy has not.
SIZES: Dict[str, float] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "int4": 0.5,
}


class Described(NamedTuple):
    """A tensor's name, type and shape; -1 for a dimension that is open."""

    name: str
    dtype: str
    shape: List[int]


class Tensor(NamedTuple):
    """A tensor with its content."""

    dtype: str
    shape: List[int]
    data: bytes


def count(shape: Sequence[int]) -> int:
    """Return the number of elements."""
    total = 1
    for size in shape:
        total *= size
    return total


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor; two 4-bit numbers share one. KeyError for a type that is unknown."""
    return int(-(-count(shape) * SIZES[dtype] // 1))
