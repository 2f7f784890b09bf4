"""What constant tensors of a quantized graph hold, those behind DequantizeLinear as ONNX Runtime computes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...backends.ort import Session
from .. import model as model_io

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def from_constants(value: ir.Value) -> bool:
    """Say whether a tensor comes from initializers alone."""
    if value.const_value is not None:
        return not value.is_graph_input()
    node = value.producer()
    return node is not None and bool(node.inputs) and all(v is None or from_constants(v) for v in node.inputs)


def evaluate(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, np.ndarray]:
    """Return what these tensors of the main graph hold, by name; they come from initializers alone."""
    found = {v.name or "": v.const_value.numpy() for v in values if v.const_value is not None}
    names = {v.name or "" for v in values} - found.keys()
    if not names:
        return found
    part = model_io.copy(model)
    outputs = [v for node in part.graph for v in node.outputs if v.name in names]
    part.graph.outputs.clear()
    part.graph.outputs.extend(outputs)
    needed: set[ir.Node] = set()
    todo = [v.producer() for v in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in needed:
            needed.add(node)
            todo += [v.producer() for v in node.inputs if v is not None]
    part.graph.remove([node for node in part.graph if node not in needed])  # also what subgraphs read
    part.graph.inputs.clear()
    with TemporaryDirectory() as folder:
        return found | Session(model_io.session_source(part, Path(folder)), optimise=False).run({})
