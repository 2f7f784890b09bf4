"""What an ONNX file says of its inputs, outputs and nodes, read without the onnx package, which a device may not have.

An ONNX file is a protobuf message (onnx.proto). Its fields are walked in place and weights are stepped over, so a file
of gigabytes costs what its graph costs. Needed beside trtexec, which says none of this and refuses a flag for shapes
where no dimension is open.
"""

import mmap
from typing import Any, Iterator, List, NamedTuple, Tuple

from .faults import Fault
from .tensors import Described

#: TensorProto.DataType by its numbers.
_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
    17: "float8_e4m3fn",
    22: "int4",
}
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5

#: A field: its number, and its value: an integer, or where its bytes begin and end.
_Field = Tuple[int, Any]


class Node(NamedTuple):
    """A node of the graph by its name, which may be empty, and its operator."""

    name: str
    op: str


class Graph(NamedTuple):
    """What the file's graph reads, gives and computes; -1 for an open dimension."""

    inputs: List[Described]
    outputs: List[Described]
    nodes: List[Node]


def read(path: str) -> Graph:
    """Return the graph of an ONNX file. Fault where the file is none; OSError where it cannot be read."""
    with open(path, "rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _graph(view)
        except (ValueError, IndexError, KeyError):  # an empty file is a ValueError of mmap
            raise Fault("%s is no ONNX file, or is cut off" % path, "send it again") from None


def _graph(view: Any) -> Graph:
    spans = [value for number, value in _fields(view, 0, len(view)) if number == 7]
    if not spans:
        raise ValueError("no graph")
    inputs, outputs, nodes, constants = [], [], [], set()
    for number, value in _fields(view, *spans[-1]):
        if number == 1:
            nodes.append(_node(view, *value))
        elif number == 5:
            constants.add(_name(view, 8, *value))
        elif number == 11:
            inputs.append(_described(view, *value))
        elif number == 12:
            outputs.append(_described(view, *value))
    # up to IR version 3 initializers are listed among the inputs
    return Graph([one for one in inputs if one.name not in constants], outputs, nodes)


def _node(view: Any, start: int, end: int) -> Node:
    said = {number: value for number, value in _fields(view, start, end) if number in (3, 4)}
    return Node(*(_text(view, *said[number]) if number in said else "" for number in (3, 4)))


def _name(view: Any, field: int, start: int, end: int) -> str:
    spans = [value for number, value in _fields(view, start, end) if number == field]
    return _text(view, *spans[-1]) if spans else ""


def _described(view: Any, start: int, end: int) -> Described:
    """Return a ValueInfoProto: name = 1, type = 2 {tensor_type = 1 {elem_type = 1, shape = 2 {dim = 1}}}."""
    name, dtype, shape = _name(view, 1, start, end), "", []  # type: str, str, List[int]
    for tensor in _nested(view, (2, 1), start, end):
        for number, value in _fields(view, *tensor):
            if number == 1:
                dtype = _TYPES.get(value, "")
            elif number == 2:
                shape = [_size(view, *span) for n, span in _fields(view, *value) if n == 1]
    return Described(name, dtype, shape)


def _size(view: Any, start: int, end: int) -> int:
    """Return a dimension: dim_value = 1, or open where it has a name or nothing at all."""
    sizes = [value for number, value in _fields(view, start, end) if number == 1]
    return int(sizes[-1]) if sizes else -1


def _nested(view: Any, path: Tuple[int, ...], start: int, end: int) -> List[Tuple[int, int]]:
    spans = [(start, end)]
    for field in path:
        spans = [value for span in spans for number, value in _fields(view, *span) if number == field]
    return spans


def _text(view: Any, start: int, end: int) -> str:
    return bytes(view[start:end]).decode("utf-8")


def _fields(view: Any, start: int, end: int) -> Iterator[_Field]:
    """Go through the fields of a message. ValueError where it is none."""
    while start < end:
        key, start = _varint(view, start)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("not protobuf")
        if kind == _VARINT:
            value, start = _varint(view, start)
            yield number, value
            continue
        if kind == _BYTES:
            size, start = _varint(view, start)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError("not protobuf")
        if start + size > end:
            raise ValueError("cut off")
        yield number, (start, start + size)
        start += size


def _varint(view: Any, start: int) -> Tuple[int, int]:
    """Return a number and where it ends: seven bits a byte, the lowest first, the last byte without the top bit."""
    value = shift = 0
    while shift < 64:
        byte = view[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value - (1 << 64) if value >> 63 else value, start
        shift += 7
    raise ValueError("not protobuf")
