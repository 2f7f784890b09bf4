"""The bytes of an ONNX file: parsed, or told apart from the other files that people hand over by mistake."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from .errors import ModelError

#: The largest message that protobuf reads and writes.
SIZE_LIMIT = 2**31 - 1

GET_AGAIN = "copy, download or export it again, and compare its size with the original's"
_RIGHTS = "check the path and your rights to read it"


def parse(path: Path) -> onnx.ModelProto:
    """Return what protobuf makes of the file at `path`: a message with a graph; nothing more is known of it.

    Raises ModelError for a file that is missing, unreadable, or not ONNX.
    """
    data = _read(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise _not_onnx(data[:512], path) from None
    if not proto.HasField("graph"):
        raise _not_onnx(data[:512], path)
    return proto


def _read(path: Path) -> bytes:
    where = str(path)
    try:
        if path.is_dir():
            raise ModelError("is a folder", where=where, fix="name the .onnx file in it")
        if path.exists() and not path.is_file():
            raise ModelError("is no regular file", where=where, fix="save the model to a file first")
        if path.stat().st_size > SIZE_LIMIT:
            what = "is larger than 2 GB, which no ONNX file can be"
            raise ModelError(what, where=where, fix="export the model with its weights as external data")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError("there is no such file", where=where, fix="check the path" + _nearby(path)) from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=where, fix=_RIGHTS) from error
    if not data:
        raise ModelError("is empty", where=where, fix=GET_AGAIN)
    return data


def _nearby(path: Path) -> str:
    found = sorted(file.name for file in path.parent.glob("*.onnx")) if path.parent.is_dir() else []
    return f"; in that folder there is: {', '.join(found[:5])}" if found else ""


_TORCH = 'export it with torch.onnx.export(model, example_input, "model.onnx")'
_TENSORFLOW = "convert it with tf2onnx: python -m tf2onnx.convert --help"
#: (bytes, where they stand, what such a file is, what to do with it)
_MAGIC = (
    (
        b"version https://git-lfs",
        0,
        "a Git LFS pointer, not the file itself",
        "fetch the file with: git lfs pull",
    ),
    (b"PK\x03\x04", 0, "a zip archive, as PyTorch writes for .pt and .pth", f"unpack it, or {_TORCH}"),
    (b"\x80\x02", 0, "a Python pickle, as old PyTorch checkpoints are", _TORCH),
    (b"\x80\x04", 0, "a Python pickle", _TORCH),
    (b"\x89HDF", 0, "an HDF5 file, as Keras writes", _TENSORFLOW),
    (b"TFL3", 4, "a TensorFlow Lite model", _TENSORFLOW),
    (b"ORTM", 4, "a model in ONNX Runtime's own format", "name the .onnx file that it was made from"),
    (b"ptrt", 0, "a TensorRT engine", "name the .onnx file that it was made from"),
    (b"GGUF", 0, "a GGUF file", "export the network itself to ONNX"),
    (b'{"', 8, "a safetensors file, which holds weights without a network", _TORCH),
    (b"\x1f\x8b", 0, "gzip-compressed", "unpack it with gunzip"),
    (b"\x89PNG", 0, "a PNG image", "name the model; images are given with --calib"),
    (b"\xff\xd8\xff", 0, "a JPEG image", "name the model; images are given with --calib"),
)


def _not_onnx(head: bytes, path: Path) -> ModelError:
    """What a file that is no ONNX model looks like, judged by how it begins."""
    for magic, start, kind, fix in _MAGIC:
        if head[start:].startswith(magic):
            return ModelError(f"is no ONNX file: it is {kind}", where=str(path), fix=fix)
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        what = "is no ONNX file: it is text"
        return ModelError(what, where=str(path), fix="name the .onnx file; a web page means that a download failed")
    begins_well = head[:1] == b"\x08"  # the tag of the IR version, which comes first in every ONNX file
    kind = "begins like ONNX, but is cut short or damaged" if begins_well else "is no ONNX file, or a damaged one"
    return ModelError(kind, where=str(path), fix=GET_AGAIN)
