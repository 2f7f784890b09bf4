"""Adding nodes and constants to a graph under names that are free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class GraphBuilder:
    """Appends to one graph; the graph is sorted by whoever is done with it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._taken = {v.name for n in graph for v in n.outputs} | set(graph.initializers)
        self._taken |= {v.name for v in graph.inputs}

    def unique(self, name: str) -> str:
        """Return `name`, or the first of `name_2`, `name_3`, … that is free, and take it."""
        candidate, n = name, 1
        while candidate in self._taken:
            n += 1
            candidate = f"{name}_{n}"
        self._taken.add(candidate)
        return candidate

    def value(self, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
        """Return a new value, of no node yet."""
        return ir.Value(name=self.unique(name), type=ir.TensorType(dtype), shape=shape)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an initializer; an array of an ml_dtypes type becomes the ONNX type of that name, int4 packed."""
        value = ir.Value(name=self.unique(name))
        value.const_value = ir.Tensor(array, name=value.name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        out: ir.Value,
        near: str | None,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        """Append a node with the one output `out`, named after what it stands `near`; return `out`."""
        name = self.unique(f"{near}_{op}")
        self.graph.append(ir.Node("", op, inputs, attributes, outputs=[out], name=name))
        return out


def onnx_type(name: str) -> ir.DataType:
    """Return the ONNX type by its name in lower case (uint8, float8e4m3fn, …)."""
    return ir.DataType[name.upper()]
