"""Raise the opset of the default domain, with ONNX's version converter.

Rules
1. A model at `target` or above is left alone: an opset is never lowered.
2. Local functions are inlined first, since the converter forgets them.
3. The converter sees the graph without the data of its weights (so their size does not matter), and the weights are
   put back by name. What it does not carry over (metadata and texts of nodes and values) is copied.
4. Where the converter has no way, or makes a model that ONNX's checker or a changed signature condemns, the model
   keeps its opset and the refusal says why.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx.version_converter
import onnx_ir as ir

from ..compiler.types import Refusal
from .base import Pass, PassResult, Stage
from .constants import graphs, values, without_weights
from .normalise import inline_functions

#: What the converter (C++, so the standard exceptions too) and the checker throw.
_FAILURES = (
    onnx.version_converter.ConvertError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    RuntimeError,
    ValueError,
    IndexError,
)


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Bring a model of an older opset of the default domain to opset `target`."""

    name: ClassVar[str] = "raise-opset"
    stage: ClassVar[Stage] = "normalise"

    target: int = 13

    def call(self, model: ir.Model) -> PassResult:
        """Convert `model` in place."""
        opset = model.opset_imports.get("", self.target)
        if opset >= self.target:
            return PassResult(model, modified=False)
        converted = model.clone()
        calls = inline_functions(converted)
        why = calls[0].why if calls else _convert(converted, self.target)
        if why is not None:
            refusal = Refusal("the whole model", self.name, f"opset {opset} stays: {why}")
            return PassResult(model, modified=False, refusals=(refusal,))
        model.graph = converted.graph
        model.functions.clear()
        model.ir_version = max(model.ir_version, _lowest_ir_version(model))
        return PassResult(model, modified=True, rewrites=1, notes=(f"opset {opset} became {self.target}",))


def _convert(model: ir.Model, target: int) -> str | None:
    """Replace the graph of `model` by a converted one; or change nothing and say why that cannot be."""
    with without_weights(model) as weights:
        proto = ir.serde.serialize_model(model)
    try:
        converted = onnx.version_converter.convert_version(proto, target)
        _check(converted)
    except _FAILURES as error:
        return _reason(str(error))
    new = ir.serde.deserialize_model(converted)
    if _signature(new) != _signature(model):
        return "the conversion changes the model's inputs or outputs"
    for graph in graphs(new):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = weights[str(value.const_value.location)]
    _carry_over(model, new)
    model.graph = new.graph
    return None


def _check(proto: onnx.ModelProto) -> None:
    """Let ONNX check a model whose larger initializers have no data: here they are inputs instead."""
    checked = onnx.ModelProto()
    checked.CopyFrom(proto)
    absent = [t for t in checked.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inputs = {value.name for value in checked.graph.input}
    for tensor in absent:
        if tensor.name not in inputs:
            checked.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        checked.graph.initializer.remove(tensor)
    onnx.checker.check_model(checked, full_check=True)


def _reason(message: str) -> str:
    """Strip the converter's source position and assertion from its message."""
    first = next((line for line in message.splitlines() if line.strip()), "it gave no reason")
    return re.sub(r"^\S*\.(?:cc|h):\d+:\s*", "", first).strip()[:300]


def _signature(model: ir.Model) -> list[tuple[str | None, ir.TypeProtocol | None, ir.Shape | None]]:
    ends = [*model.graph.inputs, *model.graph.outputs]
    return [(value.name, value.type, value.shape) for value in ends]


def _carry_over(old: ir.Model, new: ir.Model) -> None:
    """Copy the texts and metadata that the converter does not know."""
    new.graph.metadata_props.update(old.graph.metadata_props)
    known = {value.name: value for value in values(old)}
    for value in values(new):
        before = known.get(value.name)
        if before is None:
            continue
        value.metadata_props.update(before.metadata_props)
        value.doc_string = before.doc_string
        node, source = value.producer(), before.producer()
        if node is not None and source is not None and node.op_type == source.op_type:
            node.metadata_props.update(source.metadata_props)
            node.doc_string = source.doc_string


def _lowest_ir_version(model: ir.Model) -> int:
    imports = [onnx.helper.make_opsetid(*entry) for entry in model.opset_imports.items()]
    return int(onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True))
