"""Two Slices in a row along different axes are one.

    x[a0:b0:c0 along A][a1:b1:c1 along B] = x[a0:b0:c0 along A, a1:b1:c1 along B]        A and B disjoint

since a slice along one axis changes no other. Each Slice walks over its tensor; exporters write one for each axis.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .constants import Names, add_initializer, remove_unused, small_array


def merge_slices(node: ir.Node, model: ir.Model) -> bool:
    """Take the Slice in front of `node` into it, if its output is read by nothing else. Say whether it was done."""
    first = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] is not None else None
    if first is None or first.op_type != "Slice" or not isinstance(node.graph, ir.Graph):
        return False
    between = first.outputs[0]
    if len(between.uses()) > 1 or between.is_graph_output() or first.graph is not node.graph:
        return False
    parts = [_parameters(n) for n in (first, node)]
    if parts[0] is None or parts[1] is None or set(parts[0][2]) & set(parts[1][2]):
        return False
    names, old = Names.of(model), [*first.inputs[1:], *node.inputs[1:]]
    joined = [np.concatenate([a, b]) for a, b in zip(parts[0], parts[1], strict=True)]
    node.resize_inputs(5)
    node.replace_input_with(0, first.inputs[0])
    for i, (what, array) in enumerate(zip(("starts", "ends", "axes", "steps"), joined, strict=True), start=1):
        tensor = ir.tensor(array.astype(np.int64))
        node.replace_input_with(i, add_initializer(node.graph, names.fresh(f"{node.name}_{what}"), tensor))
    node.graph.remove(first, safe=True)
    remove_unused([value for value in old if value is not None])
    return True


def _parameters(node: ir.Node) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return constant starts, ends, axes (not negative) and steps; None where one is computed or the rank unknown."""
    data = node.inputs[0]
    given = [small_array(value) if value is not None else None for value in node.inputs[1:]]
    if data is None or data.shape is None or len(given) < 2 or given[0] is None or given[1] is None:
        return None
    if any(array is None and value is not None for array, value in zip(given, node.inputs[1:], strict=True)):
        return None
    starts, ends = given[0], given[1]
    axes = given[2] if len(given) > 2 and given[2] is not None else np.arange(len(starts))
    steps = given[3] if len(given) > 3 and given[3] is not None else np.ones(len(starts), np.int64)
    return starts, ends, axes % len(data.shape), steps
