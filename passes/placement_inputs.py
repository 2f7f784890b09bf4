"""Q/DQ in front of layers only, as TensorRT fuses it.

TensorRT moves QuantizeLinear backward and DequantizeLinear forward through operators that commute with rounding, and
fuses DequantizeLinear -> layer -> (normalisation, activation, residual Add) -> QuantizeLinear into one kernel. Hence

1. every activation that a layer reads is quantized; nothing is put behind a layer: the next one's input does that.
2. A residual Add reads its *skip* branch dequantized, and the other one, which comes out of a layer through nothing but
   what fuses with it, bare. If both do, the layer at the end of the longer path from where the branches part computes
   the residual, and the shorter path is the skip (a projection shortcut). If none does, the Add is left alone.
3. A pool, or a Resize behind a layer (through data movement too), reads its input dequantized, whoever else reads it.
4. 2 and 3 hold only where a quantized layer reads the result, and never for what the graph hands out.
5. What is joined by a Concat whose result is quantized shares one scale with it, that of the union of the ranges; what
   has a pair anyway, the Concat reads through it.

Rules 2 to 5 follow the explicit-quantization guide of TensorRT and NVIDIA's Model-Optimizer. Different from the latter,
a skip that comes straight out of a layer counts as a skip if others read it too: it has its Q/DQ already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..compiler.types import OpSupport, Range

if TYPE_CHECKING:
    from .placement import Placement

#: Fused into the layer in front of them; further inputs must be constants.
_FUSIBLE = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh")
_SCALING = ("Add", "Mul", "Sub", "Div")
#: Data movement through which Q and DQ pass.
_COPIES = (
    "Concat", "DepthToSpace", "Dropout", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip


def in_front(
    candidates: dict[ir.Node, OpSupport], ranges: Mapping[str, Range], placement: Placement
) -> Iterator[tuple[ir.Node, tuple[str, str]]]:
    """Decide what reads dequantized inputs; yield nothing, since every candidate layer is taken."""
    for node, row in candidates.items():
        if row.role in ("linear", "product"):
            placement.nodes[node] = row.role
            for i in range(1 if row.role == "linear" else len(node.inputs)):
                placement.read(node, i, ranges)
    for node in reversed(candidates):  # from the end, so that what reads a result is decided before
        index = _input_worth_it(node, placement) if candidates[node].role == "combine" else None
        if index is not None:
            placement.read(node, index, ranges)
    concats = [node for node, row in candidates.items() if node.op_type == "Concat"]
    for group in _joined(concats, placement):
        union = [placement.ranges[value] for value in group]
        whole = Range(min(r.min for r in union), max(r.max for r in union))
        placement.ranges.update(dict.fromkeys(group, whole))
        for node in concats:
            if group & _through_copies(node.outputs[0], placement, forward=True):
                placement.reads.update((node, i) for i, value in enumerate(node.inputs) if value in group)
    yield from ()


def _input_worth_it(node: ir.Node, placement: Placement) -> int | None:
    """Return the input that a node without weights shall read dequantized; None for none of them."""
    out = node.outputs[0]
    if node.op_type == "Concat" or out.is_graph_output() or not _read_on_integers(out, placement):
        return None
    if node.op_type == "Add":
        return _skip_branch(node, placement)
    if node.op_type == "Resize":
        return 0 if _from_a_layer(node.inputs[0], placement) else None
    return 0


def _read_on_integers(value: ir.Value, placement: Placement) -> bool:
    """Say whether a quantized reader takes the value, if through data movement and fused activations."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        for node, index in value.uses():
            if (node, index) in placement.reads:
                return True
            if node not in seen and (node.op_type in (*_COPIES, *_FUSIBLE) or _is_silu(node)):
                seen.add(node)
                todo += node.outputs
    return False


def _from_a_layer(value: ir.Value | None, placement: Placement) -> bool:
    """Say whether a quantized layer gives the value, or part of it, through data movement and fused activations."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        if placement.nodes.get(node) in ("linear", "product"):
            return True
        seen.add(node)
        if node.op_type in (*_COPIES, *_FUSIBLE) or _is_silu(node):
            todo += node.inputs
    return False


# ------------------------------------------------------------------------------------------ residual Adds


def _skip_branch(add: ir.Node, placement: Placement) -> int | None:
    """Return which input of a residual Add is the skip (rule 2); None where it is no residual."""
    first, second = (_layer_behind(value, placement) for value in add.inputs)
    if first is None and second is None or first is second:
        return None
    if first is None or second is None:
        return 0 if first is None else 1
    return 1 if _longer(add.inputs[0], add.inputs[1]) else 0


def _layer_behind(value: ir.Value | None, placement: Placement) -> ir.Node | None:
    """Return the quantized layer from which the value comes through nothing but what fuses with it, read once."""
    readers = 1
    while value is not None and len({use.node for use in value.uses()}) <= readers and not value.is_graph_output():
        node = value.producer()
        if node is None or placement.nodes.get(node) in ("linear", "product"):
            return node
        if _is_silu(node):
            value, readers = _gated(node), 2
        elif node.op_type in _FUSIBLE or node.op_type in _SCALING:
            computed = [v for v in node.inputs if v is not None and v.const_value is None]
            value, readers = computed[0] if len(computed) == 1 else None, 1
        else:
            return None
    return None


def _is_silu(node: ir.Node) -> bool:
    """Say whether the node is the product of x and Sigmoid(x), or HardSigmoid(x)."""
    return node.op_type == "Mul" and _gated(node) is not None


def _gated(mul: ir.Node) -> ir.Value | None:
    for gate, value in zip(mul.inputs, reversed(mul.inputs), strict=True):
        producer = gate.producer() if gate is not None else None
        if producer is not None and producer.op_type in ("Sigmoid", "HardSigmoid") and producer.inputs[0] is value:
            return value
    return None


def _longer(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Say whether the path to the first value is at least as long as the second's, from where they part."""
    one, other = _distances(first), _distances(second)
    shared = one.keys() & other.keys()
    if not shared:
        return len(one) >= len(other)
    parting = min(shared, key=lambda value: one[value] + other[value])
    return one[parting] >= other[parting]


def _distances(value: ir.Value | None) -> dict[ir.Value, int]:
    """Return all values from which this one is computed, itself included, with the fewest nodes in between."""
    assert value is not None
    found, todo = {value: 0}, deque([value])
    while todo:
        value = todo.popleft()
        node = value.producer()
        for source in node.inputs if node is not None else ():
            if source is not None and source.const_value is None and source not in found:
                found[source] = found[value] + 1
                todo.append(source)
    return found


# ------------------------------------------------------------------------------------------ one scale around Concat


def _joined(concats: list[ir.Node], placement: Placement) -> list[set[ir.Value]]:
    """Return the groups of tensors with a scale that quantized Concats join."""
    groups: list[set[ir.Value]] = []
    for concat in concats:
        results = _through_copies(concat.outputs[0], placement, forward=True)
        if results:
            parts = [_through_copies(v, placement, forward=False) for v in concat.inputs if v is not None]
            group = results.union(*parts)
            apart = [g for g in groups if not g & group]
            groups = [*apart, group.union(*(g for g in groups if g & group))]
    return groups


def _through_copies(value: ir.Value, placement: Placement, *, forward: bool) -> set[ir.Value]:
    """Return the tensors with a scale that hold the same numbers as `value`, or some of them."""
    seen, todo = {value}, [value]
    while todo:
        value = todo.pop()
        if forward:
            nodes = [use.node for use in value.uses()]
            more = [out for n in nodes if n.op_type in _COPIES for out in n.outputs]
        else:
            node = value.producer()
            more = [] if node is None or node.op_type not in _COPIES else [v for v in node.inputs if v is not None]
        todo += [v for v in more if v not in seen]
        seen.update(more)
    return {v for v in seen if v in placement.ranges}
