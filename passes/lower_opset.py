"""Bring a model down to an older opset of the default domain, for runtimes that read no newer one (TensorRT 8: 17).

Most of what newer opsets changed in an operator are types that it takes, or attributes and inputs with defaults: a node
that uses none of them means the same in the older one. Rules, by the operator's schema in both opsets:

1. The same schema: nothing to do.
2. Another one: each attribute is one of the older schema, or has its default, and is dropped; no value of it is one of
   NEW_VALUES; the inputs are no more than the older one takes, and of types that it takes.
3. Reduce* (18): the axes move from an input back to an attribute. Split (18): num_outputs becomes lengths.
4. MEANS_OTHERWISE: operators whose meaning changed; and operators that the older opset has not. They keep the opset.

All nodes have to come along: a model has one opset. Otherwise it stays, with the first node's reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from ..compiler.types import Refusal
from .base import Pass, PassResult, Stage
from .constants import add_initializer, graphs, small_array

#: Operators that mean something else in older opsets although they look alike: names of modes, scales by group.
MEANS_OTHERWISE = ("GridSample", "GroupNormalization", "DFT")
#: Values that attributes got later, which no schema lists: operator, attribute, value, first opset.
NEW_VALUES = (
    ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric", 19),
    ("Pad", "mode", "wrap", 19),
)
#: Reductions whose axes became an input in opset 18; ReduceSum's did in 13.
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_AXES_FROM = 18


@dataclass(frozen=True)
class LowerOpset(Pass):
    """Bring a model of a newer opset of the default domain to opset `target`."""

    name: ClassVar[str] = "lower-opset"
    stage: ClassVar[Stage] = "normalise"

    target: int = 17

    def call(self, model: ir.Model) -> PassResult:
        """Change `model` in place, all of it or nothing."""
        opset = model.opset_imports.get("", self.target)
        if opset <= self.target:
            return PassResult(model, modified=False)
        changes: list[Callable[[], object]] = []
        for graph in graphs(model):
            for node in graph:
                found = _way_down(node, opset, self.target) if node.domain in ("", "ai.onnx") else []
                if isinstance(found, str):
                    refusal = Refusal(node.name or node.op_type, self.name, f"opset {opset} stays: {found}")
                    return PassResult(model, modified=False, refusals=(refusal,))
                changes += found
        for change in changes:
            change()
        _set_opset(model, self.target)
        return PassResult(model, modified=True, rewrites=1, notes=(f"opset {opset} became {self.target}",))


def _set_opset(model: ir.Model, target: int) -> None:
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if "" in imports:
            imports[""] = target


def _way_down(node: ir.Node, opset: int, target: int) -> list[Callable[[], object]] | str:
    """Return what to change for a node to mean the same in `target`, or why it cannot."""
    try:
        new = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return f"{node.op_type} is not known to the installed onnx"
    try:
        old = onnx.defs.get_schema(node.op_type, target)
    except onnx.defs.SchemaError:
        return f"opset {target} has no {node.op_type}, which came with {new.since_version}"
    if old.since_version == new.since_version:
        return []
    if node.op_type in MEANS_OTHERWISE:
        return f"{node.op_type} meant something else before opset {new.since_version}"
    if node.op_type in (f"Reduce{kind}" for kind in _REDUCTIONS) and target < _AXES_FROM <= opset:
        return _axes(node, old)
    if node.op_type == "Split" and "num_outputs" in node.attributes:
        return _lengths(node)
    for op, name, value, since in NEW_VALUES:
        used = node.op_type == op and name in node.attributes and node.attributes[name].value == value
        if used and target < since:
            return f"{op} has {name} {value}, which came with opset {since}"
    return _plainly(node, old, new)


def _plainly(node: ir.Node, old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> list[Callable[[], object]] | str:
    """Drop attributes that the older schema has not, where they have their defaults."""
    changes: list[Callable[[], object]] = []
    for name, attribute in node.attributes.items():
        if name in old.attributes:
            continue
        default = new.attributes[name].default_value if name in new.attributes else None
        if default is None or attribute.is_ref() or attribute.value != ir.serde.deserialize_attribute(default).value:
            return f"{node.op_type} has {name}, which came with opset {new.since_version}"
        changes.append(functools.partial(node.attributes.pop, name))
    if len(node.inputs) > old.max_input:
        return f"{node.op_type} has {len(node.inputs)} inputs, and {old.max_input} before opset {new.since_version}"
    return _types(node, old) or changes


def _types(node: ir.Node, old: onnx.defs.OpSchema) -> str | None:
    """Return which input has a type that the older schema does not take; None where none is known to."""
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in old.type_constraints}
    ends = [(old.inputs, n, value) for n, value in enumerate(node.inputs)]
    ends += [(old.outputs, n, value) for n, value in enumerate(node.outputs)]
    for formals, position, value in ends:
        if value is None or value.dtype is None or not isinstance(value.type, ir.TensorType | None):
            continue
        formal = formals[min(position, len(formals) - 1)]
        taken = allowed.get(formal.type_str, {formal.type_str})
        name = f"tensor({_ONNX_NAMES.get(value.dtype, value.dtype.name.lower())})"
        if name not in taken:
            return f"{node.op_type} takes no {value.dtype.name.lower()} there"
    return None


_ONNX_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


def _axes(node: ir.Node, old: onnx.defs.OpSchema) -> list[Callable[[], object]] | str:
    """Return how the axes become an attribute; they have to be constant."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    empty = "noop_with_empty_axes" in node.attributes and node.attributes["noop_with_empty_axes"].as_int() != 0
    if empty:
        return f"{node.op_type} does nothing without axes, which opset {_AXES_FROM} brought"
    values = None if axes is None else small_array(axes)
    if axes is not None and values is None:
        return f"{node.op_type} has axes that are computed, which opset {_AXES_FROM} brought"
    why = _types(node, old) if axes is None else None
    if why is not None:
        return why

    def change() -> None:
        node.attributes.pop("noop_with_empty_axes", None)
        if values is not None:
            node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in values.ravel()])
        if len(node.inputs) > 1:
            node.resize_inputs(1)

    return [change]


def _lengths(node: ir.Node) -> list[Callable[[], object]] | str:
    """Return how num_outputs becomes lengths; the size of the axis has to be known, unless all parts are equal."""
    value, parts = node.inputs[0], node.attributes["num_outputs"].as_int()
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if not isinstance(size, int):
        return "Split has num_outputs, which came with opset 18, on an axis whose size is not known"
    each = -(-size // parts)
    lengths = [min(each, size - n * each) for n in range(parts)]

    def change() -> None:
        node.attributes.pop("num_outputs")
        assert isinstance(node.graph, ir.Graph)
        lengths_of = ir.tensor(np.array(lengths, np.int64))
        node.resize_inputs(2)
        node.replace_input_with(1, add_initializer(node.graph, f"{node.outputs[0].name}_lengths", lengths_of))

    return [change]
