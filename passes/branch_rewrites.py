"""A model with some branches of residual sums silenced, and without them. Algebra: branches.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from . import folding
from .branches import Branch, End, end_of, name_of
from .constants import Names, add_initializer, constant, supplant
from .shapes import infer_shapes


def silenced(model: ir.Model, branches: Iterable[Branch]) -> ir.Model:
    """Return `model` with the weights of the branches' last layers 0; `model` is not changed.

    A weight that others read as well stays theirs. Layers that there are not any more are passed over.
    """
    twin = model.clone()
    nodes, names = {name_of(node): node for node in twin.graph}, Names.of(twin)
    for branch in branches:
        layer = nodes.get(branch.layer)
        weight = layer.inputs[1] if layer is not None else None
        if layer is None or weight is None or weight.const_value is None:
            continue
        tensor = weight.const_value
        name = names.fresh(f"{branch.layer}_silenced")
        zeros = ir.Tensor(np.zeros(tensor.shape.numpy(), tensor.dtype.numpy()), dtype=tensor.dtype, name=name)
        layer.replace_input_with(1, add_initializer(twin.graph, name, zeros))
        if not weight.uses() and not weight.is_graph_output():
            twin.graph.initializers.pop(weight.name or "")
    return twin


def removed(model: ir.Model, branches: Iterable[Branch]) -> ir.Model:
    """Return `model` without these branches; `model`, in which channels may have been cut, is not changed.

    A branch inside another that goes is passed over. The names of graph outputs stay.
    """
    twin = model.clone()
    names = Names.of(twin)
    for branch in branches:
        nodes = {name_of(node): node for node in twin.graph}
        add, layer = nodes.get(branch.add), nodes.get(branch.layer)
        if add is not None and layer is not None:
            _remove(twin, add, layer, names)
            common.RemoveUnusedNodesPass()(twin)
    fault = infer_shapes(twin)
    assert fault is None, f"without the branches the model contradicts itself: {fault}"
    return twin


def _remove(model: ir.Model, add: ir.Node, layer: ir.Node, names: Names) -> None:
    """Put a constant in the place of the operand that ends with this layer."""
    ends = {index: end_of(value) for index, value in enumerate(add.inputs) if value is not None}
    index, end = next((i, one) for i, one in ends.items() if isinstance(one, End) and one.layer is layer)
    _fix(model, layer, _bias(layer), names)
    for node in end.tail:
        results = folding.compute(node, model)
        if results is None:
            raise ValueError(f"{name_of(node)} ({node.op_type}) of a constant cannot be computed")
        _fix(model, node, results[0], names)
    left, skip = add.inputs[index], add.inputs[1 - index]
    assert left is not None and left.const_value is not None and skip is not None
    if not left.const_value.numpy().any():
        _bypass(model.graph, add, skip)


def _fix(model: ir.Model, node: ir.Node, tensor: ir.TensorProtocol, names: Names) -> None:
    """Let all readers of a node's output read a constant."""
    name = names.fresh(f"{node.outputs[0].name}_constant")
    node.outputs[0].replace_all_uses_with(add_initializer(model.graph, name, tensor))


def _bias(layer: ir.Node) -> ir.TensorProtocol:
    """Return what a layer gives whose weight is 0, with 1 along the axes on which it does not depend."""
    weight, rank = constant(layer.inputs[1]), len(layer.outputs[0].shape or ())
    given = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    assert weight is not None and rank
    nothing = np.zeros(_channels(layer, weight.shape.numpy()), weight.dtype.numpy())
    array = nothing if given is None else given.numpy()
    if layer.op_type.startswith("Conv"):
        array = array.reshape(1, -1, *(1,) * (rank - 2))
    elif layer.op_type == "Gemm":
        array = (array * layer.attributes.get_float("beta", 1.0)).astype(weight.dtype.numpy())
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    return ir.Tensor(np.ascontiguousarray(array), dtype=weight.dtype)


def _channels(layer: ir.Node, shape: Sequence[int]) -> int:
    """Return how many outputs a layer has whose weight is of this shape."""
    if layer.op_type == "ConvTranspose":
        return shape[1] * layer.attributes.get_int("group", 1)
    turned = layer.op_type == "Conv" or layer.attributes.get_int("transB", 0) == 1
    return shape[0] if turned else shape[-1]


def _bypass(graph: ir.Graph, add: ir.Node, skip: ir.Value) -> None:
    """Let what reads a sum read its only operand that is left; a graph output keeps its name."""
    total = add.outputs[0]
    if not total.is_graph_output():
        total.replace_all_uses_with(skip)
    elif skip.producer() is None or skip.is_graph_output():
        same = ir.Node("", "Identity", [skip], name=add.name)
        graph.insert_before(add, same)
        supplant(total, same.outputs[0])
    else:
        supplant(total, skip)
    graph.remove(add, safe=True)
