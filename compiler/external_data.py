"""Weights that lie outside the ONNX file: where they are, whether they are all there, and streaming them.

Data is read and written in chunks through plain file calls, never through a mapping of the whole file (mapped
pages count as resident memory), so that a model larger than the memory can be loaded, hashed and saved.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from . import model_checks
from .errors import ModelError

#: Where a tensor starts in a data file of ours: a multiple of the page size, so that runtimes can map it.
ALIGNMENT = 4096
#: Tensors up to this stay in the ONNX file: shapes and scales, which readers want at once.
INLINE_BYTES = 1024
_CHUNK = 1 << 22

_BESIDE = "put the data file beside the model under the name it was exported with, or export both again"


def resolve(proto: onnx.ModelProto, path: Path) -> None:
    """Check all external data of the model read from `path` and point it at absolute paths.

    Initializers stay outside; the data of attributes, and of tensors without elements, is brought in.
    Raises ModelError for data that is missing, too short, or outside the model's folder.
    """
    for (tensor, _, initializer), file, offset in _extents(proto, path):
        length = model_checks.size_bytes(tensor)
        del tensor.external_data[:]
        if length == 0 or not initializer:
            tensor.raw_data = b"".join(_read(file, offset, length))
            tensor.ClearField("data_location")
            continue
        for key, value in (("location", str(file)), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)


def files(proto: onnx.ModelProto, path: Path) -> set[Path]:
    """The data files that the model read from `path` refers to. Raises ModelError as `resolve` does."""
    return {file for _, file, _ in _extents(proto, path)}


def chunks(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """Yield the bytes of a tensor, little-endian and packed as in a file; external ones piece by piece."""
    if isinstance(tensor, ir.ExternalTensor):
        yield from _read(Path(tensor.path), tensor.offset or 0, tensor.nbytes)
    else:
        yield tensor.tobytes()


def bring_in(values: Iterable[ir.Value]) -> None:
    """Let the initializers `values` that lie outside be read, without being kept, when they are serialised."""
    for value in values:
        if isinstance(value.const_value, ir.ExternalTensor):
            read = functools.partial(_in_memory, value.const_value)
            dtype, shape = value.const_value.dtype, value.const_value.shape
            value.const_value = ir.LazyTensor(read, dtype=dtype, shape=shape, name=value.name)


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    data = b"".join(chunks(tensor))
    dims = tensor.shape.numpy()
    return ir.serde.TensorProtoTensor(onnx.TensorProto(data_type=tensor.dtype, dims=dims, raw_data=data))


def move_out(values: list[ir.Value], location: str) -> list[tuple[int, ir.TensorProtocol]]:
    """Make the larger initializers in `values` refer to file `location`; return (offset, data) to write."""
    bring_in(value for value in values if not _is_large(value.const_value))
    plan, end = [], 0
    for value in values:
        tensor = value.const_value
        if tensor is None or not _is_large(tensor):
            continue
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + tensor.nbytes
        plan.append((offset, tensor))
        value.const_value = reference(tensor, location, offset)
    return plan


def _is_large(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes > INLINE_BYTES


def reference(tensor: ir.TensorProtocol, location: str, offset: int | None) -> ir.ExternalTensor:
    """Return a tensor of the same type and shape whose data is said to lie at `offset` of `location`."""
    length = None if offset is None else tensor.nbytes
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(location, offset, length, tensor.dtype, shape=shape, name=tensor.name or "")


def write(plan: list[tuple[int, ir.TensorProtocol]], file: BinaryIO) -> None:
    """Write the tensors of `plan` to `file` at their offsets."""
    for offset, tensor in plan:
        file.write(bytes(offset - file.tell()))
        for chunk in chunks(tensor):
            file.write(chunk)


def _extents(proto: onnx.ModelProto, path: Path) -> Iterator[tuple[model_checks.Held, Path, int]]:
    """Yield (held tensor, file, offset) of all external data, after checking that it is there in full."""
    sizes: dict[str, tuple[Path, int]] = {}
    for held in model_checks.tensors(proto):
        tensor, owner, _ = held
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        location, due = entry.get("location", ""), model_checks.size_bytes(tensor)
        if location not in sizes:
            file = _inside(location, owner, path)
            sizes[location] = file, file.stat().st_size
        file, there = sizes[location]
        try:
            offset, length = int(entry.get("offset", 0)), int(entry.get("length", due))
        except ValueError:
            raise _fault(f"{owner} has an offset or length that is no number", path, _BESIDE) from None
        if offset < 0 or length != due:
            what = f"{owner} needs {due} bytes of external data; {length} from offset {offset} are declared"
            raise _fault(what, path, _BESIDE)
        if offset + due > there:
            what = f"{owner} ends at byte {offset + due} of {location!r}, but that file has only {there} bytes"
            raise _fault(what, path, "the data file is cut short: copy, download or export it again")
        yield held, file, offset


def _inside(location: str, owner: str, path: Path) -> Path:
    """Return the resolved data file, which must lie in the model's folder.

    Where the model is itself a link, as in a download cache, the folder that it points into counts as well.
    """
    folder = path.parent
    try:
        file = Path(os.path.realpath(folder / location, strict=True))
        missing = not file.is_file()
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        missing = True
    # judged by its words, and again with links followed: what is missing can still be named outside
    climbs = os.path.isabs(location) or os.path.normpath(location).split(os.sep)[0] == os.pardir
    roots = (Path(os.path.realpath(folder)), Path(os.path.realpath(path)).parent)
    if climbs or not (missing or any(file.is_relative_to(root) for root in roots)):
        what = f"{owner} has its data in {location!r}, which is outside the model's folder"
        raise _fault(what, path, "copy the data into the model's folder and export the model with that name")
    if missing:
        raise _fault(f"{owner} has its data in {location!r}, and there is no such file", path, _BESIDE)
    return file


def _read(file: Path, offset: int, length: int) -> Iterator[bytes]:
    while length:
        try:
            with file.open("rb") as stream:
                stream.seek(offset)
                chunk = stream.read(min(_CHUNK, length))
        except OSError as error:  # not to be taken for a fault of whoever is writing what we yield
            what = f"holds weights and can no longer be read: {error.strerror}"
            raise ModelError(what, where=str(file), fix=_BESIDE) from error
        if not chunk:
            raise ModelError("holds weights and has become shorter", where=str(file), fix=_BESIDE)
        offset, length = offset + len(chunk), length - len(chunk)
        yield chunk


def _fault(what: str, path: Path, fix: str) -> ModelError:
    return ModelError(what, where=str(path), fix=fix)
