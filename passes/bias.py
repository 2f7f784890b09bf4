"""Where a linear layer's output is shifted: by the bias that it has, or is given.

A MatMul has no bias of its own. Where an Add of a constant c alone reads it, that is one, and a shift d of the layer's
output (one number per output channel: the last axis) goes there, whatever the shape of c:

    (x W + d) + c = x W + (c + d)

The Add gets a constant of its own, so other readers of c keep theirs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .constants import Names, add_initializer


def added_bias(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the Add of a constant that alone reads a MatMul, and which of its inputs is that constant; else None."""
    uses = tuple(node.outputs[0].uses())
    if node.op_type != "MatMul" or len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    add, index = uses[0].node, 1 - uses[0].idx
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx") or add.graph is not node.graph:
        return None
    constant = add.inputs[index]
    fixed = constant is not None and constant.const_value is not None and not constant.is_graph_input()
    return (add, index) if fixed else None


def takes_shift(node: ir.Node) -> bool:
    """Say whether a linear node's output can be shifted, per channel, by a bias that it has or may be given."""
    if node.op_type == "MatMul":
        return added_bias(node) is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or (bias.const_value is not None and not bias.is_graph_input())


def shift_bias(graph: ir.Graph, node: ir.Node, shift: np.ndarray, names: Names) -> None:
    """Add to the layer's bias, which it is given if it has none. A bias that others read as well is copied."""
    added = added_bias(node)
    reader, index = (node, 2) if added is None else added
    old = reader.inputs[index] if index < len(reader.inputs) else None
    weight = node.inputs[1]
    dtype = np.dtype(np.float32) if weight is None or weight.const_value is None else weight.const_value.dtype.numpy()
    before = np.zeros(1) if old is None or old.const_value is None else old.const_value.numpy().astype(np.float64)
    beta = node.attributes.pop("beta", None) if node.op_type == "Gemm" else None
    array = (before * (1.0 if beta is None else beta.as_float()) + shift).astype(dtype)
    name = names.fresh(f"{node.name}_bias_repaired")
    new = add_initializer(graph, name, ir.tensor(array, name=name))
    if index < len(reader.inputs):
        reader.replace_input_with(index, new)
    else:
        reader.resize_inputs(index + 1)
        reader.replace_input_with(index, new)
