"""The only place that reads or writes ONNX files; onnx_file, model_checks and external_data are its parts.

`load` gives a model that can be worked on or says, as a ModelError, what is wrong with the file. `save`
writes the lowest IR version that the model needs (runtimes refuse the newest), and only the opset imports
that are used; the opset itself is left alone. Weights outside the file stay there until somebody asks for
their values: `load` checks that they are there, `save` and `fingerprint` stream them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from . import external_data, model_checks, onnx_file
from .errors import ModelError, OutputError
from .files import atomic_file, write_atomic
from .types import InputSpec

#: Weights above this are saved beside the ONNX file: protobuf ends at 2 GB, and copies on the way.
INLINE_LIMIT = 1_500_000_000
#: A model that came with more external data than this keeps it external when it is saved.
EXTERNAL_LIMIT = 100_000_000
#: Weights up to this are handed to ONNX Runtime as bytes; in memory that takes about three times their size.
BYTES_LIMIT = 256_000_000


# ------------------------------------------------------------------------------------------- reading


def load(path: Path) -> ir.Model:
    """Read and check the ONNX model at `path`; initializers in other files are checked but not read.

    The result is sorted topologically, and initializers of IR version 3 and older, where they are constants
    listed among the inputs, are inputs no more. Raises ModelError for whatever is wrong with the file.
    """
    path = Path(path)
    proto = onnx_file.parse(path)
    try:
        model_checks.check(proto, str(path))
        external_data.resolve(proto, path)
        model = ir.serde.deserialize_model(proto)
    except ir.serde.SerdeError as error:
        raise ModelError(f"is damaged: {_root(error)}", where=str(path), fix=onnx_file.GET_AGAIN) from error
    try:
        for graph in _outermost(model):
            graph.sort()
    except ValueError as error:  # the only one that sort raises
        fix = "a graph must not depend on its own results: export the model again"
        raise ModelError("has a cycle among its nodes", where=str(path), fix=fix) from error
    _modernise(model)
    return model


def size_bytes(path: Path) -> int:
    """The bytes of the ONNX file at `path`, one that `load` accepts, and of its external data files."""
    path = Path(path)
    outside = external_data.files(onnx_file.parse(path), path)
    return path.stat().st_size + sum(file.stat().st_size for file in outside)


def _root(error: BaseException) -> str:
    """The first line of what set off a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or ["unreadable"])[0][:200]


def _modernise(model: ir.Model) -> None:
    """Say in today's terms what an old or lenient file means; no number changes."""
    for imports in _imports(model):
        if "ai.onnx" in imports:
            imports[""] = imports.pop("ai.onnx")
    if any(node.domain == "com.microsoft" for node in model.graph.all_nodes()):
        model.opset_imports.setdefault("com.microsoft", 1)  # onnxruntime can do without the import
    if model.ir_version < 4:  # from then on an initializer among the inputs is a default that callers may override
        constants = [value for value in model.graph.inputs if value.is_initializer()]
        for value in constants:
            model.graph.inputs.remove(value)
        model.ir_version = 4


# ------------------------------------------------------------------------------------------- writing


def save(model: ir.Model, path: Path) -> list[Path]:
    """Write `model` to `path`, and large weights to `<stem>.onnx.data` beside it; return the files written.

    The files appear whole or not at all, and `model` is unchanged. Weights go to the second file if there are
    more than INLINE_LIMIT bytes, or if more than EXTERNAL_LIMIT of them are external already.
    Raises OutputError.
    """
    path = Path(path)
    lean = _lean(model)
    values = _initializers(lean)
    outside = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    if weights_bytes(model) <= INLINE_LIMIT and sum(tensor.nbytes for tensor in outside) <= EXTERNAL_LIMIT:
        write_atomic(path, serialize(model))
        return [path]
    data = path.with_name(f"{path.stem}.onnx.data")
    if data.resolve() in {Path(tensor.path).resolve() for tensor in outside}:
        what = "the weights of this very model are read from there"
        raise OutputError(what, where=str(data), fix="write to another folder, or under another name")
    plan = external_data.move_out(values, data.name)
    with atomic_file(path) as file, atomic_file(data) as weights:
        file.write(ir.serde.serialize_model(lean).SerializeToString())
        file.flush()  # a full disk shows here, before either file has its name
        external_data.write(plan, weights)
    return [path, data]


def serialize(model: ir.Model) -> bytes:
    """Return `model` as the bytes of one ONNX file, its external weights brought in; under 2 GB."""
    lean = _lean(model)
    external_data.bring_in(_initializers(lean))
    data: bytes = ir.serde.serialize_model(lean).SerializeToString()
    return data


def session_source(model: ir.Model, folder: Path) -> bytes | Path:
    """Return what an onnxruntime.InferenceSession can be made from.

    That is bytes for models with up to BYTES_LIMIT of weights, and else the path of a new file in `folder`,
    which must outlive the session. Raises OutputError.
    """
    if weights_bytes(model) <= BYTES_LIMIT:
        return serialize(model)
    return save(model, Path(folder) / f"session-{secrets.token_hex(6)}.onnx")[0]


def _lean(model: ir.Model) -> ir.Model:
    """Return a clone, tensors shared, with the lowest IR version and the opset imports that suffice."""
    lean = model.clone()
    nodes = [node for graph in _outermost(lean) for node in graph.all_nodes()]
    used = {"", *(node.domain for node in nodes)}
    kept = {domain: version for domain, version in lean.opset_imports.items() if domain in used}
    lean.opset_imports.clear()
    lean.opset_imports.update(kept)
    lean.ir_version = _lowest_ir_version(lean)
    return lean


def _lowest_ir_version(model: ir.Model) -> int:
    """The lowest IR version that has what `model` uses; before 4, initializers had to be inputs."""
    imports = [onnx.helper.make_opsetid(*entry) for entries in _imports(model) for entry in entries.items()]
    tensors = (value.const_value for value in _initializers(model))
    return max(
        4,
        onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True),
        *(8 for _ in model.functions),
        *(10 for function in model.functions.values() if function.overload),
        *(_IR_OF_TYPE.get(tensor.dtype.name.rstrip("FNUZ"), 4) for tensor in tensors if tensor is not None),
    )


#: The IR version in which an element type came (name without its FN, FNUZ).
_IR_OF_TYPE = {
    **dict.fromkeys(("FLOAT8E4M3", "FLOAT8E5M2"), 9),
    **dict.fromkeys(("INT4", "UINT4"), 10),
    "FLOAT4E2M1": 11,
    "FLOAT8E8M0": 12,
    **dict.fromkeys(("INT2", "UINT2"), 13),
}


# ------------------------------------------------------------------------------------------- asking


def copy(model: ir.Model) -> ir.Model:
    """Return an independent copy of `model`; only the tensors, which nobody changes in place, are shared."""
    twin = model.clone()
    for value in _values(twin):
        value.type = deepcopy(value.type)  # onnx_ir shares it, and setting a dtype would change both models
    return twin


def fingerprint(model: ir.Model) -> str:
    """Return the SHA-256, in hex, of structure and weights: equal for equal models, wherever they lie."""
    lean = _lean(model)
    digest = hashlib.sha256()
    for value in _initializers(lean):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        for chunk in external_data.chunks(tensor):
            digest.update(chunk)
        value.const_value = external_data.reference(tensor, "", None)
    digest.update(ir.serde.serialize_model(lean).SerializeToString(deterministic=True))
    return digest.hexdigest()


def weights_bytes(model: ir.Model) -> int:
    """The bytes of all constants of `model`: initializers, and tensors in attributes."""
    return sum(tensor.nbytes for tensor in _constants(model))


def parameters(model: ir.Model) -> int:
    """How many numbers the float constants of `model` hold."""
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    return sum(tensor.size for tensor in _constants(model) if tensor.dtype in floats)


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """What a caller must give: name, numpy dtype name and shape of the inputs that are not initializers.

    Raises ModelError for inputs that are no tensors, or of unknown rank.
    """
    return tuple(_input_spec(value) for value in model.graph.inputs if not value.is_initializer())


def parts(path: Path) -> tuple[dict[str, Path], tuple[InputSpec, ...], tuple[str, ...]]:
    """Return the files beside an ONNX file by the names that it knows them by, its inputs, and its outputs' names.

    Raises the errors of `load`.
    """
    model, folder = load(path), path.parent.resolve()
    outside = external_data.files(onnx_file.parse(path), path)
    beside = {file.resolve().relative_to(folder).as_posix(): file for file in outside}
    return beside, input_specs(model), output_names(model)


def output_names(model: ir.Model) -> tuple[str, ...]:
    """The names of the graph's outputs, in their order."""
    return tuple(value.name or "" for value in model.graph.outputs)


def _input_spec(value: ir.Value) -> InputSpec:
    where = f"input {value.name!r}"
    if not isinstance(value.type, ir.TensorType):
        raise ModelError(f"is no tensor but {value.type}", where=where, fix="export a model that takes tensors")
    if value.shape is None:
        fix = "export the model with an input shape; single dimensions may be dynamic"
        raise ModelError("has no shape, not even a number of dimensions", where=where, fix=fix)
    shape = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    return InputSpec(value.name or "", value.type.dtype.numpy().name, shape)


def _imports(model: ir.Model) -> list[dict[str, int]]:
    return [graph.opset_imports for graph in _outermost(model)]


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """Every graph: the main one, the functions, and the subgraphs of either."""
    for graph in _outermost(model):
        yield graph
        yield from graph.subgraphs()


def _outermost(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _initializers(model: ir.Model) -> list[ir.Value]:
    graphs = (graph for graph in _graphs(model) if isinstance(graph, ir.Graph))
    return [value for graph in graphs for value in graph.initializers.values()]


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from _initializers(model)
    for graph in _graphs(model):
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    yield from (value.const_value for value in _initializers(model) if value.const_value is not None)
    for graph in _graphs(model):
        for attribute in (attribute for node in graph for attribute in node.attributes.values()):
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


# ------------------------------------------------------------------------------------------- sample inputs

#: What a dynamic dimension becomes: in an image-like input (4 dimensions and more), and in others.
_CHANNELS, _SPATIAL, _LENGTH = 3, 64, 16
#: One past the largest sample of an integer type: an index must fit a small table, but a byte is a pixel.
_INTEGER_END: Mapping[str, int] = {"uint8": 256}
_DEFAULT_END = 4


def sample_inputs(specs: Sequence[InputSpec], seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    """Return random arrays of the given names, dtypes and shapes, for proofs; the same for the same seed.

    Floats are standard normal, integers small and not negative, strings empty. A dynamic first dimension
    becomes `batch`; others become 3 channels and 64 pixels where there are four dimensions or more, else 16.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: _sample(rng, np.dtype(spec.dtype), _concrete(spec.shape, batch)) for spec in specs}


def _concrete(shape: tuple[int | None, ...], batch: int) -> tuple[int, ...]:
    image = len(shape) >= 4
    usual = [batch, _CHANNELS if image else _LENGTH]
    usual += [_SPATIAL if image else _LENGTH] * len(shape)
    return tuple(default if dim is None else dim for dim, default in zip(shape, usual, strict=False))


def _sample(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype.kind == "O":
        return np.full(shape, "", dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, _INTEGER_END.get(dtype.name, _DEFAULT_END), shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)
