"""Where quantization goes: which nodes run on integers, which tensors get a scale. Analysis only, no rewriting.

A node is a candidate where the backend's table has a row for it whose conditions hold (placement_rules.py). Which
candidates are taken depends on the placement that the scheme names (see QuantScheme):

kernels   A node is quantized where the backend has an integer kernel for it: its activations are read from
          DequantizeLinear, and its output, after a ReLU or Clip that the rounding absorbs, goes into
          QuantizeLinear. Every consumer of that output then reads the dequantized tensor, since the float one
          no longer exists. A `combine` node (Add, Concat, …) joins only if an input of it is an integer
          already and a layer behind it works on integers too; a `move` node (Reshape, MaxPool, …) works on
          the integers themselves, and so does a Concat of inputs that can share one scale (placement_join.py).
inputs    Q/DQ stands in front of layers and of what TensorRT fuses with them (placement_inputs.py).

A scheme without an activation type takes the linear candidates and gives no tensor a scale.
Nodes in subgraphs (If, Loop) are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from ..compiler.types import OpSupport, QuantScheme, Range, Refusal
from .placement_inputs import in_front
from .placement_join import share_scales
from .placement_rules import NEEDS, Facts, different_ranges

#: Activations that a kernel's own rounding performs for free when the quantized range ends where they clip.
ABSORBED = ("Relu", "Clip")
#: Roles that are worth integers wherever they stand; the others only join these.
LAYERS = ("linear", "product")
#: Operators whose further inputs say where to, not what.
_ONE_ACTIVATION = ("Resize",)
#: Rules whose refusals are told for every operator; all others only for layers.
_TOLD = ("kept-float", "concat-of-different-ranges")


@dataclass
class Placement:
    """What shall be quantized.

    `nodes` maps each quantized node to its role; `ranges` each tensor with a scale of its own to its range;
    `produced` holds the tensors that will exist as integers only; `reads` the (node, input index) pairs that
    shall read a rounded tensor although the float one exists. `joined` are the Concats whose inputs all have the
    output's scale: they work on the integers themselves.
    """

    nodes: dict[ir.Node, str] = field(default_factory=dict)
    ranges: dict[ir.Value, Range] = field(default_factory=dict)
    produced: set[ir.Value] = field(default_factory=set)
    reads: set[tuple[ir.Node, int]] = field(default_factory=set)
    joined: set[ir.Node] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)

    def read(self, node: ir.Node, index: int, ranges: Mapping[str, Range]) -> None:
        """Let the node read this input dequantized."""
        value = node.inputs[index]
        assert value is not None and value.name is not None
        self.reads.add((node, index))
        if value not in self.produced:
            self.ranges.setdefault(value, ranges[value.name])


Objection = tuple[str, str]
Candidates = dict[ir.Node, OpSupport]


def place(
    model: ir.Model,
    ranges: Mapping[str, Range],
    supports: tuple[OpSupport, ...],
    scheme: QuantScheme,
    keep_float: Mapping[str, str],
) -> Placement:
    """Decide what is quantized. `keep_float` maps node names to the reason why they stay in float."""
    facts = Facts(model.opset_imports.get("", 0), ranges, scheme)
    candidates: dict[ir.Node, OpSupport] = {}
    refused: dict[ir.Node, tuple[OpSupport, Objection]] = {}
    for node, rows in _supported(model, supports):
        why = keep_float.get(node.name or "")
        row, objection = (rows[0], ("kept-float", why)) if why else _chosen_row(node, rows, facts)
        if objection is None:
            candidates[node] = row
        else:
            refused[node] = row, objection
    for node, why in _torn_concats(candidates, ranges).items():
        refused[node] = candidates.pop(node), ("concat-of-different-ranges", why)
    placement = Placement()
    if scheme.activation is None:
        placement.nodes.update({node: row.role for node, row in candidates.items() if row.role == "linear"})
    else:
        step = {"kernels": _around_kernels, "inputs": in_front}[scheme.placement]
        refused |= {node: (candidates[node], objection) for node, objection in step(candidates, ranges, placement)}
    for node in model.graph:
        if node in refused:
            row, objection = refused[node]
            if row.role == "linear" or objection[0] in _TOLD:
                placement.refusals.append(Refusal(node.name or node.op_type, *objection))
    return placement


def activation_inputs(node: ir.Node, row: OpSupport) -> list[int]:
    """Return the indices of the inputs that are activations."""
    if row.role in ("combine", "product") and row.op not in _ONE_ACTIVATION:
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


def observed_tensors(model: ir.Model, supports: tuple[OpSupport, ...]) -> tuple[str, ...]:
    """Return the names of the float tensors whose ranges `place` may ask for, in graph order, each once."""
    found: dict[str, None] = {}
    for node, rows in _supported(model, supports):
        reads = {i for row in rows if row.role != "move" for i in activation_inputs(node, row)}
        values = [node.inputs[i] for i in sorted(reads)] + [output_tensor(node)] * bool(reads)
        for value in values:
            if value is not None and value.const_value is None and value.dtype in (None, ir.DataType.FLOAT):
                found[value.name or ""] = None
    return tuple(name for name in found if name)


# ------------------------------------------------------------------------------------------ around kernels


def _around_kernels(
    candidates: Candidates, ranges: Mapping[str, Range], placement: Placement
) -> Iterator[tuple[ir.Node, Objection]]:
    useful = _useful(candidates)
    for node, row in candidates.items():
        objection = _around_kernel(node, row, ranges, placement, useful)
        if objection is not None:
            yield node, objection
    share_scales(placement)


def _around_kernel(
    node: ir.Node, row: OpSupport, ranges: Mapping[str, Range], placement: Placement, useful: set[ir.Node]
) -> Objection | None:
    inputs = activation_inputs(node, row)
    if row.role not in LAYERS and not any(node.inputs[i] in placement.produced for i in inputs):
        return "no-integer-input", "none of its inputs is an integer tensor, so rounding it would only cost"
    if row.role == "move":
        placement.nodes[node] = row.role
        placement.produced.update(node.outputs)
        return None
    if node not in useful:
        return "no-integer-reader", "no layer behind it works on integers, so rounding its output would only cost"
    out = output_tensor(node)
    if row.output == "required":
        chosen = ranges.get(out.name or "")
        if chosen is None:
            return "no-range", f"its output {out.name!r} has no calibrated range"
        placement.ranges[out] = chosen
        placement.produced.add(out)
    placement.nodes[node] = row.role
    for i in inputs:
        placement.read(node, i, ranges)
    return None


def _useful(candidates: Candidates) -> set[ir.Node]:
    """Return the layers, and the other candidates whose results a layer on integers reads, if through others."""
    useful: set[ir.Node] = set()
    for node, row in reversed(candidates.items()):
        outputs = node.outputs if row.role == "move" else (output_tensor(node),)
        if row.role in LAYERS or any(use.node in useful for out in outputs for use in out.uses()):
            useful.add(node)
    return useful


# ------------------------------------------------------------------------------------------ candidates


def _supported(model: ir.Model, supports: tuple[OpSupport, ...]) -> Iterator[tuple[ir.Node, list[OpSupport]]]:
    """Yield the nodes of the main graph that the table names, each with its rows."""
    table: dict[str, list[OpSupport]] = {}
    for row in supports:
        table.setdefault(row.op, []).append(row)
    for node in model.graph:
        if node.domain in ("", "ai.onnx") and node.op_type in table:
            yield node, table[node.op_type]


def _chosen_row(node: ir.Node, rows: list[OpSupport], facts: Facts) -> tuple[OpSupport, Objection | None]:
    """Return the first row whose conditions hold; else the first one and what it objects to."""
    objections = [(row, _objection(node, row, facts)) for row in rows]
    return next((found for found in objections if found[1] is None), objections[0])


def _objection(node: ir.Node, row: OpSupport, facts: Facts) -> Objection | None:
    """Return (rule, reason) if the node cannot run on integers, whatever surrounds it."""
    scheme = facts.scheme
    if scheme.activation is not None and scheme.activation not in row.activations:
        return "activation-type", f"no kernel of {row.op} takes {scheme.activation} activations"
    if row.role == "linear" and scheme.weight not in row.weights:
        return "weight-type", f"no kernel of {row.op} takes {scheme.weight} weights"
    for name in row.needs:
        why = NEEDS[name](node, facts)
        if why is not None:
            return name, why
    for i in activation_inputs(node, row):
        value = node.inputs[i]
        assert value is not None
        if value.const_value is not None:
            return "constant-input", f"its input {value.name!r} is a constant"
        if value.dtype not in (None, ir.DataType.FLOAT):
            return "not-float32", f"its input {value.name!r} is {value.dtype}"
        if row.role != "move" and scheme.activation is not None and value.name not in facts.ranges:
            return "no-range", f"its input {value.name!r} has no calibrated range"
    return None


def _torn_concats(candidates: Candidates, ranges: Mapping[str, Range]) -> dict[ir.Node, str]:
    """Return the Concats that join results of very different sizes at the end of the network, with the reason."""

    def linear(node: ir.Node) -> bool:
        row = candidates.get(node)
        return row is not None and row.role in LAYERS

    found = {node: different_ranges(node, linear, ranges) for node in candidates if node.op_type == "Concat"}
    return {node: why for node, why in found.items() if why is not None}
