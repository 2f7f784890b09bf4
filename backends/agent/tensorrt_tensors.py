"""The tensors of an engine: their types by TensorRT's names, their memory, and what is given to them converted."""

import array
import ctypes
import struct
from typing import Any, Callable

from .cudart import Cuda
from .faults import Fault
from .tensors import Tensor, count, nbytes

#: TensorRT's DataType by name; trt.nptype() refuses half of them.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
    "INT4": "int4",
}


def dtype_of(name: str, dtype: Any) -> str:
    """Return the type of the tensor `name` as it travels. Fault where it has no name here."""
    kind = str(getattr(dtype, "name", dtype)).rsplit(".", 1)[-1]
    if kind not in DTYPES:
        raise Fault("the tensor %s is of TensorRT's type %s, which is not read or written here" % (name, kind))
    return DTYPES[kind]


class Buffer:
    """Memory of one tensor: on the device with a pinned copy on the host, or on the host only, for shape tensors."""

    def __init__(self, cuda: Cuda, size: int, on_host: bool) -> None:
        # an address must not be null, also of a tensor without elements
        self.cuda, self.size, self.room, self.on_host = cuda, size, max(size, 1), on_host
        self.host = cuda.malloc_host(self.room)
        try:
            self.device = 0 if on_host else cuda.malloc(self.room)
        except Fault:
            cuda.free_host(self.host)
            raise

    @property
    def address(self) -> int:
        """The address that the engine works on."""
        return self.host if self.on_host else self.device

    def put(self, data: bytes) -> None:
        """Write the host's side."""
        ctypes.memmove(self.host, data, self.size)

    def get(self) -> bytes:
        """Return the host's side."""
        return ctypes.string_at(self.host, self.size)

    def copy_in(self, stream: int) -> None:
        """Bring it to the device once the stream comes to it."""
        if not self.on_host and self.size:
            self.cuda.copy_in(self.device, self.host, self.size, stream)

    def copy_out(self, stream: int) -> None:
        """Fetch it from the device once the stream comes to it."""
        if not self.on_host and self.size:
            self.cuda.copy_out(self.host, self.device, self.size, stream)

    def free(self) -> None:
        """Give it back."""
        self.cuda.free_host(self.host)
        if not self.on_host:
            self.cuda.free(self.device)


#: The letters of array and struct for types that they know.
_LETTERS = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "uint8": "B",
}

#: From -> to: conversions that keep the values, up to rounding to fewer digits.
_CONVERSIONS = (
    ("int64", "int32"),
    ("int32", "int64"),
    ("float64", "float32"),
    ("float32", "float16"),
    ("float64", "float16"),
    ("float16", "float32"),
    ("uint8", "float32"),
    ("uint8", "float16"),
)


def converted(name: str, tensor: Tensor, dtype: str) -> bytes:
    """Return a tensor's bytes in the type that an engine wants for the input `name`.

    Parsers before 9.0 turn INT64 into INT32, and a strongly typed engine may take float16. Fault where a type cannot be
    converted, where a value does not fit, and where there are too few or too many bytes.
    """
    wanted = nbytes(tensor.dtype, tensor.shape)
    if len(tensor.data) != wanted:
        raise Fault("the input %s has %d bytes, and its shape takes %d" % (name, len(tensor.data), wanted))
    if tensor.dtype == dtype:
        return tensor.data
    if (tensor.dtype, dtype) not in _CONVERSIONS:
        what = "the engine takes the input %s as %s, and it was given as %s" % (name, dtype, tensor.dtype)
        raise Fault(what, "give it as %s" % dtype)
    try:
        return _packed(dtype)(_unpacked(tensor))
    except (OverflowError, struct.error) as error:
        what = "the input %s has a value that is too large for %s, which the engine takes" % (name, dtype)
        raise Fault(what) from error


def _unpacked(tensor: Tensor) -> Any:
    letter = _LETTERS[tensor.dtype]
    if letter == "e":  # which array does not know
        return struct.unpack("<%de" % count(tensor.shape), tensor.data)
    found = array.array(letter)
    found.frombytes(tensor.data)
    return found


def _packed(dtype: str) -> Callable[[Any], bytes]:
    letter = _LETTERS[dtype]
    if letter == "e":
        return lambda values: struct.pack("<%de" % len(values), *values)
    return lambda values: array.array(letter, values).tobytes()
