"""Weights and activations in float16, graph inputs and outputs as they were.

Rules
1. Every node runs in float16 that may (float16.py), unless `keep_float32`, or a mark in the model itself, names it.
2. Casts stand only where float32 meets float16, one for each tensor, and never one behind the other.
3. Constants are cast here; one that float32 nodes read too is kept twice. Scales of Q/DQ never become 0.
4. A stretch of float16 without a layer in it is not worth its Casts and stays in float32.
5. Inputs and outputs of the graph keep their types. Subgraphs stay in float32, what they capture is cast for them.

It is lossy: the judge decides. Not touched: models' functions, other domains' operators, the arithmetic of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .base import Pass, PassResult, Stage
from .constants import Names, add_initializer, constant, remove_unused
from .float16 import Slots, Stays, castable, is_bound, is_scale, rounded, rounded_scale, saturated

#: The key of a node's metadata that says why it stays in float32, for models that are cast later.
MARK = "edgec.float32"
#: Operators that are worth a Cast in front of them and behind.
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention")
#: Constants above this are cast when they are read: memory holds one of them at a time.
_LAZY_BYTES = 1 << 24


def mark_float32(model: ir.Model, reasons: Mapping[str, str]) -> None:
    """Write into the nodes named in `reasons` why they must stay in float32, so that any later cast knows."""
    for node in model.graph:
        why = reasons.get(node.name or "")
        if why:
            node.metadata_props[MARK] = why


@dataclass(frozen=True)
class CastFloat16(Pass):
    """Run the model in float16. `keep_float32` maps node names to the reason why they stay in float32."""

    name: ClassVar[str] = "cast-fp16"
    stage: ClassVar[Stage] = "cast"
    exact: ClassVar[bool] = False

    keep_float32: Mapping[str, str] = field(default_factory=dict)

    def call(self, model: ir.Model) -> PassResult:
        """Cast `model` in place."""
        half, stays = planned(model, self.keep_float32)
        if half:
            _Writer(model, half).write()
        refusals = [Refusal(n.name or n.op_type, stays[n].rule, stays[n].why) for n in model.graph if n in stays]
        return PassResult(model, modified=bool(half), rewrites=len(half), refusals=tuple(refusals))


def planned(model: ir.Model, keep_float32: Mapping[str, str]) -> tuple[dict[ir.Node, Slots], dict[ir.Node, Stays]]:
    """Return the nodes that shall run in float16, and those that stay in float32, with the reason."""
    half, stays = castable(model)
    for node in list(half):
        why = keep_float32.get(node.name or "") or node.metadata_props.get(MARK)
        if why:
            stays[node] = Stays("kept-float32", why)
            del half[node]
    return _worth_it(half), stays


def _worth_it(half: dict[ir.Node, Slots]) -> dict[ir.Node, Slots]:
    """Return the nodes whose stretch of float16 holds a layer (rule 4)."""
    kept: dict[ir.Node, Slots] = {}
    todo = [node for node in half if node.op_type in _LAYERS]
    while todo:
        node = todo.pop()
        if node in kept:
            continue
        kept[node] = half[node]
        before = [v.producer() for v in node.inputs if v is not None]
        behind = [use.node for v in node.outputs for use in v.uses()]
        todo += [n for n in (*before, *behind) if n is not None and n in half]
    return {node: slots for node, slots in half.items() if node in kept}


class _Writer:
    """Rewrites one graph; lives for one call."""

    def __init__(self, model: ir.Model, half: Mapping[ir.Node, Slots]) -> None:
        self.graph, self.half = model.graph, half
        self.names = Names.of(model)
        self.native = {node.outputs[i] for node, slots in half.items() for i in slots.outputs}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.constants: dict[tuple[ir.Value, Callable[[np.ndarray], np.ndarray]], ir.Value] = {}

    def write(self) -> None:
        before = list(self.graph.initializers.values())
        for value in [*self.graph.inputs, *before, *(v for node in self.graph for v in node.outputs)]:
            for node, index in tuple(value.uses()):
                self._connect(node, index, value)
        for value in self.native:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
            if value.is_graph_output():
                self._restore_output(value)
        for node in self.half:
            if node.op_type == "Cast" and 0 in self.half[node].outputs:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        self.graph.sort()
        self._drop_borders()
        remove_unused(before)
        self._keep_names()

    def _wants_half(self, node: ir.Node, index: int) -> bool:
        return node in self.half and index in self.half[node].inputs

    def _connect(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Give one reader the value in the type that it wants."""
        if not self._wants_half(node, index):
            if value in self.native:
                node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT))
        elif constant(value) is not None:
            node.replace_input_with(index, self._constant(value, _rounding(node, index)))
        elif value not in self.native:
            node.replace_input_with(index, self._cast(value, ir.DataType.FLOAT16))

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
            source = producer.inputs[0]
            if source.dtype == to == ir.DataType.FLOAT16:  # a Cast from float16: back to what it was
                return source
        key = (value, to)
        if key not in self.casts:
            out = ir.Value(
                name=self.names.fresh(f"{value.name}_{'float16' if to == ir.DataType.FLOAT16 else 'float32'}"),
                type=ir.TensorType(to),
                shape=value.shape,
            )
            name = self.names.fresh(f"{value.name}_Cast")
            self.graph.append(ir.node("Cast", [value], {"to": int(to)}, outputs=[out], name=name))
            self.casts[key] = out
        return self.casts[key]

    def _constant(self, value: ir.Value, rounding: Callable[[np.ndarray], np.ndarray]) -> ir.Value:
        key = (value, rounding)
        if key not in self.constants:
            tensor = constant(value)
            assert tensor is not None
            name = self.names.fresh(f"{value.name}_float16")
            self.constants[key] = add_initializer(self.graph, name, _half_tensor(tensor, name, rounding))
        return self.constants[key]

    def _restore_output(self, value: ir.Value) -> None:
        """Make a float32 copy the graph output, under the old name."""
        final, name = self._cast(value, ir.DataType.FLOAT), value.name
        index = self.graph.outputs.index(value)
        value.name = self.names.fresh(f"{name}_float16")
        final.name, final.doc_string = name, value.doc_string
        self.graph.outputs[index] = final

    def _drop_borders(self) -> None:
        """Bypass the model's own Casts that became the second of a pair; drop those that nothing reads now."""
        ours = {cast.producer() for cast in self.casts.values()}
        for node in list(self.graph):
            source = node.inputs[0] if node.op_type == "Cast" and node not in ours else None
            first = source.producer() if source is not None else None
            origin = first.inputs[0] if first is not None and first in ours else None
            out = node.outputs[0]
            if origin is not None and origin.dtype == out.dtype and not out.is_graph_output():
                out.replace_all_uses_with(origin)
        for node in reversed(list(self.graph)):
            if node.op_type == "Cast" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                self.graph.remove(node, safe=True)

    def _keep_names(self) -> None:
        """Give a constant that exists in float16 only its old name back."""
        for (value, _), half in self.constants.items():
            if value.graph is None and value.name not in self.graph.initializers:
                half.name = value.name


def _rounding(node: ir.Node, index: int) -> Callable[[np.ndarray], np.ndarray]:
    if is_scale(node, index):
        return rounded_scale
    return saturated if is_bound(node, index) else rounded


def _half_tensor(
    tensor: ir.TensorProtocol, name: str, rounding: Callable[[np.ndarray], np.ndarray]
) -> ir.TensorProtocol:
    def half() -> ir.TensorProtocol:
        return ir.Tensor(np.asarray(rounding(tensor.numpy()), dtype=np.float16), name=name)

    if tensor.nbytes <= _LAZY_BYTES:
        return half()
    return ir.LazyTensor(half, ir.DataType.FLOAT16, ir.Shape(tensor.shape.numpy()), name=name)
