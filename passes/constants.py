"""What the passes share: which constants may be rewritten, free names, and the model without its weights.

A constant may be read when it is an initializer of the main graph that no caller can override (it is no graph
input). It may be rewritten when, besides, no caller reads it (it is no graph output) and one node alone uses it.

Weights are replaced, never written into: that a tensor is the same object therefore means that it is equal,
and models can be compared, checked and converted without a byte of their weights (`light_proto`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

#: Constants up to this are looked into (shapes, axes, pads, scalars); larger ones stay where they are.
SMALL_BYTES = 4096


# ------------------------------------------------------------------------------------------- constants


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer that no caller can override, else None."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def small_array(value: ir.Value | None, limit: int = SMALL_BYTES) -> np.ndarray | None:
    """Return a constant of at most `limit` bytes as an array; None for all else."""
    tensor = constant(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > limit:
        return None
    return tensor.numpy()


def why_fixed(value: ir.Value) -> str | None:
    """Say why the constant `value` may not be rewritten; None if it may."""
    if not value.is_initializer():
        return f"{value.name} is not a constant"
    if value.is_graph_input():
        return f"{value.name} is a graph input, so callers may replace it"
    if value.is_graph_output():
        return f"{value.name} is a graph output, so callers read it"
    if len(value.uses()) > 1:
        return f"{value.name} is shared: another node uses it too"
    return None


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add `tensor` to `graph` as an initializer called `name` (which must be free) and return its value."""
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def remove_unused(values: list[ir.Value]) -> None:
    """Remove those initializers among `values` that nothing uses and that are no graph input or output."""
    for value in values:
        used = value.uses() or value.is_graph_input() or value.is_graph_output()
        if value.is_initializer() and not used and value.graph is not None and value.name is not None:
            value.graph.initializers.pop(value.name)


# ------------------------------------------------------------------------------------------- values and names


def supplant(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take the place of `old`, its name included; as a graph output also its type, shape and texts.

    `new` must not be a graph output or the input of one. The node that makes `old` is left for removal.
    """
    if old.is_graph_output() or new.type is None:
        new.type = old.type if old.type is not None else new.type
    if old.is_graph_output() or new.shape is None:
        new.shape = old.shape if old.shape is not None else new.shape
    if old.is_graph_output():
        new.doc_string = old.doc_string
        new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name = old.name


class Names:
    """Names that are taken; gives out free ones."""

    def __init__(self, taken: Iterable[str | None]) -> None:
        self._taken = set(taken)
        self._numbers: dict[str, int] = {}

    @classmethod
    def of(cls, model: ir.Model) -> Names:
        """Start with all names of values and nodes of `model`."""
        nodes = [node for graph in graphs(model) for node in graph]
        return cls([*(value.name for value in values(model)), *(node.name for node in nodes)])

    def fresh(self, stem: str) -> str:
        """Return `stem`, or `stem_2`, `stem_3`, … if that is taken; it is taken from then on."""
        name = stem
        while name in self._taken:
            self._numbers[stem] = self._numbers.get(stem, 1) + 1
            name = f"{stem}_{self._numbers[stem]}"
        self._taken.add(name)
        return name


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of the model once: inputs and outputs of the main graph first, functions left out."""
    found = [*model.graph.inputs, *model.graph.outputs]
    for graph in graphs(model):
        found += [*graph.inputs, *graph.initializers.values()]
        found += [value for node in graph for value in node.outputs]
    yield from dict.fromkeys(found)


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph and its subgraphs at any depth; not the functions."""
    yield model.graph
    yield from model.graph.subgraphs()


# ------------------------------------------------------------------------------------------- without the weights


@contextmanager
def without_weights(model: ir.Model) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Within the context, initializers over SMALL_BYTES are references to data that does not exist.

    Yields the tensors by the location that stands for them.
    """
    large = [
        (value, value.const_value)
        for graph in graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.STRING
        and value.const_value.nbytes > SMALL_BYTES
    ]
    for value, tensor in large:
        value.const_value = ir.ExternalTensor(
            str(id(tensor)), 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or ""
        )
    try:
        yield {str(id(tensor)): tensor for _, tensor in large}
    finally:
        for value, tensor in large:
            value.const_value = tensor


def light_proto(model: ir.Model) -> onnx.ModelProto:
    """Return the protobuf of `model` without the data of its larger initializers; shapes and types are there."""
    with without_weights(model):
        return ir.serde.serialize_model(model)


@dataclass(frozen=True)
class Fingerprint:
    """Equal for the same model with the same tensor objects, hence `modified` tells the truth."""

    digest: bytes
    tensors: tuple[ir.TensorProtocol, ...] = field(compare=False, repr=False)  # alive, so that no id comes twice

    @classmethod
    def of(cls, model: ir.Model) -> Fingerprint:
        """Take the fingerprint of `model` as it is now."""
        with without_weights(model) as tensors:
            data = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        return cls(hashlib.sha256(data).digest(), tuple(tensors.values()))
