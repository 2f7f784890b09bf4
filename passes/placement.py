"""Where quantization goes: which nodes run on integers, which tensors get a scale. Analysis only, no rewriting.

Two placements, named by the scheme (see QuantScheme):

kernels   A node is quantized where the backend has an integer kernel for it: its activations are read from
          DequantizeLinear, and its output, after a ReLU or Clip that the rounding absorbs, goes into
          QuantizeLinear. Every consumer of that output then reads the dequantized tensor, since the float one
          no longer exists. A `combine` node (Add, Concat, …) joins only if an input of it is an integer
          already and something behind it works on integers too; a `move` node (Reshape, MaxPool, …) works on
          the integers themselves.
inputs    Q/DQ stands in front of Conv, ConvTranspose, Gemm and MatMul, and on the skip branch of a residual Add
          whose other branch comes out of such a node; nothing on their outputs. This is what TensorRT fuses.

Nodes in subgraphs (If, Loop) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ..compiler.types import OpSupport, QuantScheme, Range, Refusal

#: Activations that a kernel's own rounding performs for free when the quantized range ends where they clip.
ABSORBED = ("Relu", "Clip")


@dataclass
class Placement:
    """What shall be quantized.

    `nodes` maps each quantized node to its role; `ranges` each tensor with a scale of its own to its range;
    `produced` holds the tensors that will exist as integers only; `reads` the (node, input index) pairs that
    shall read a dequantized tensor although the float one exists.
    """

    nodes: dict[ir.Node, str] = field(default_factory=dict)
    ranges: dict[ir.Value, Range] = field(default_factory=dict)
    produced: set[ir.Value] = field(default_factory=set)
    reads: set[tuple[ir.Node, int]] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)


def place(
    model: ir.Model,
    ranges: Mapping[str, Range],
    supports: tuple[OpSupport, ...],
    scheme: QuantScheme,
    keep_float: Mapping[str, str],
) -> Placement:
    """Decide what is quantized. `keep_float` maps node names to the reason why they stay in float."""
    table = {row.op: row for row in supports}
    placement = Placement()
    step = {"kernels": _around_kernel, "inputs": _in_front}[scheme.placement]
    for node in model.graph:
        row = table.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if row is None:
            continue
        why = keep_float.get(node.name or "")
        refusal = ("kept-float", why) if why else _objection(node, row, ranges, model)
        if refusal is None:
            refusal = step(node, row, ranges, placement, frozenset(table))
        if refusal is not None and (row.role == "linear" or refusal[0] == "kept-float"):
            placement.refusals.append(Refusal(node.name or node.op_type, *refusal))
    return placement


def activation_inputs(node: ir.Node, row: OpSupport) -> list[int]:
    """Return the indices of the inputs that are activations."""
    if row.role == "combine":
        return [i for i, value in enumerate(node.inputs) if value is not None]
    return [0]


def output_tensor(node: ir.Node) -> ir.Value:
    """Return what the node hands on: its output, or that of the ReLU or Clip that alone follows it."""
    value = node.outputs[0]
    uses = tuple(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        follower = uses[0].node
        if follower.op_type in ABSORBED and follower.inputs[0] is value and follower.graph is node.graph:
            return follower.outputs[0]
    return value


Objection = tuple[str, str] | None


def _around_kernel(
    node: ir.Node, row: OpSupport, ranges: Mapping[str, Range], placement: Placement, ops: frozenset[str]
) -> Objection:
    inputs = activation_inputs(node, row)
    if row.role != "linear" and not any(node.inputs[i] in placement.produced for i in inputs):
        return "no-integer-input", "none of its inputs is an integer tensor, so rounding it would only cost"
    if row.role == "move":
        placement.nodes[node] = row.role
        placement.produced.update(node.outputs)
        return None
    out = output_tensor(node)
    if row.role == "combine" and not any(use.node.op_type in ops for use in out.uses()):
        return "no-integer-reader", "nothing behind it works on integers, so rounding its output would only cost"
    if row.output == "required":
        chosen = ranges.get(out.name or "")
        if chosen is None:
            return "no-range", f"its output {out.name!r} has no calibrated range"
        placement.ranges[out] = chosen
        placement.produced.add(out)
    placement.nodes[node] = row.role
    for i in inputs:
        _read(node, i, ranges, placement)
    return None


def _in_front(
    node: ir.Node, row: OpSupport, ranges: Mapping[str, Range], placement: Placement, ops: frozenset[str]
) -> Objection:
    if row.role == "linear":
        placement.nodes[node] = row.role
        _read(node, 0, ranges, placement)
    elif node.op_type == "Add":
        skip = _skip_branch(node, placement)
        if skip is not None:
            _read(node, skip, ranges, placement)
    return None


def _read(node: ir.Node, index: int, ranges: Mapping[str, Range], placement: Placement) -> None:
    value = node.inputs[index]
    assert value is not None and value.name is not None
    placement.reads.add((node, index))
    if value not in placement.produced:
        placement.ranges.setdefault(value, ranges[value.name])


def _skip_branch(node: ir.Node, placement: Placement) -> int | None:
    """Return which input of a residual Add is the skip: the one that does not come straight from a layer.

    Straight means out of a quantized linear node with no other consumer. If both do, the second input is
    taken as the skip (a projection shortcut); if none does, the Add is left alone.
    """
    straight = [
        value is not None and value.producer() in placement.nodes and len(tuple(value.uses())) == 1
        for value in node.inputs
    ]
    return {(True, False): 1, (False, True): 0, (True, True): 1}.get((straight[0], straight[1]))


# ------------------------------------------------------------------------------------------ objections


def _objection(node: ir.Node, row: OpSupport, ranges: Mapping[str, Range], model: ir.Model) -> Objection:
    """Return (rule, reason) if the node cannot run on integers, whatever surrounds it."""
    for name in row.needs:
        why = NEEDS[name](node, model)
        if why is not None:
            return name, why
    for i in activation_inputs(node, row):
        value = node.inputs[i]
        assert value is not None
        if value.const_value is not None:
            return "constant-input", f"its input {value.name!r} is a constant"
        if value.dtype not in (None, ir.DataType.FLOAT):
            return "not-float32", f"its input {value.name!r} is {value.dtype}"
        if row.role != "move" and value.name not in ranges:
            return "no-range", f"its input {value.name!r} has no calibrated range"
    return None


def _constant_weight(node: ir.Node, model: ir.Model) -> str | None:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or weight.const_value is None or weight.is_graph_input():
        return "its weight is not a constant"
    if weight.const_value.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.const_value.dtype}, not float32"
    return None


def _constant_bias(node: ir.Node, model: ir.Model) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    if bias.const_value is None or bias.is_graph_input():
        return "its bias is not a constant"
    return None


def _plain_gemm(node: ir.Node, model: ir.Model) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "transA is set"
    if node.attributes.get_float("alpha", 1.0) != 1.0:
        return "alpha is not 1"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    channels = weight.const_value.shape[0 if node.attributes.get_int("transB", 0) else 1]
    if bias is not None and (bias.const_value is None or bias.const_value.size != channels):
        return "its bias is not one number per output"
    return None


def _weight_of_rank_2(node: ir.Node, model: ir.Model) -> str | None:
    weight = node.inputs[1]
    rank = len(weight.const_value.shape) if weight is not None and weight.const_value is not None else None
    return None if rank == 2 else f"its weight has rank {rank}, not 2"


def _max_pool_on_integers(node: ir.Node, model: ir.Model) -> str | None:
    if model.opset_imports.get("", 0) < 12:
        return "MaxPool takes integers from opset 12 on"
    return "its indices are used" if len(node.outputs) > 1 else None


def _pad_with_zero(node: ir.Node, model: ir.Model) -> str | None:
    if model.opset_imports.get("", 0) < 13:
        return "Pad takes integers from opset 13 on"
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is not None and (value.const_value is None or value.const_value.numpy().any()):
        return "it pads with something other than 0"
    return None


def _nearest_resize(node: ir.Node, model: ir.Model) -> str | None:
    mode = node.attributes.get_string("mode", "nearest")
    return None if mode == "nearest" else f"mode {mode} computes new values"


#: The conditions that a row of a support table may name in `needs`.
NEEDS: Mapping[str, Callable[[ir.Node, ir.Model], str | None]] = {
    "constant-weight": _constant_weight,
    "constant-bias": _constant_bias,
    "plain-gemm": _plain_gemm,
    "rank-2-weight": _weight_of_rank_2,
    "max-pool-on-integers": _max_pool_on_integers,
    "pad-with-zero": _pad_with_zero,
    "nearest-resize": _nearest_resize,
}


def observed_tensors(model: ir.Model, supports: tuple[OpSupport, ...]) -> tuple[str, ...]:
    """Return the names of the float tensors whose ranges `place` may ask for, in graph order, each once."""
    table = {row.op: row for row in supports}
    found: dict[str, None] = {}
    for node in model.graph:
        row = table.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if row is None or row.role == "move":
            continue
        values = [node.inputs[i] for i in activation_inputs(node, row)] + [output_tensor(node)]
        for value in values:
            if value is not None and value.const_value is None and value.dtype in (None, ir.DataType.FLOAT):
                found[value.name or ""] = None
    return tuple(name for name in found if name)
