"""How much each quantized layer errs by itself, and by how much its output is shifted.

Teacher forcing: in one graph the float model runs beside its quantized copy, and every QuantizeLinear of the copy
reads the *float* model's tensor of that name. Each layer then works on exact inputs that it rounds itself, so the
error at its output is its own, that of its rounded inputs and weights, and nothing added up from layers before it:

    SQNR_l = 10 log10( sum y_l^2 / sum (y_l - y'_l)^2 )

    shift_l[c] = mean over images and positions of (y_l - y'_l) in channel c

The output y_l is that of the layer with its bias, which for a MatMul is the constant that an Add behind it adds.
Adding the shift to the bias makes the output right on average: empirical bias correction (Nagel et al. 2019,
"Data-Free Quantization through Weight Equalization and Bias Correction", section 4.2, with measured inputs). Sums and
means are reduced inside the graph; a few numbers a layer and image batch come back, whatever the tensors' size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...backends.ort import Session
from ...passes.bias import added_bias
from .. import model as model_io
from ..types import Progress, silent

if TYPE_CHECKING:
    from ..fidelity import Batch


@dataclass(frozen=True, eq=False)
class LayerError:
    """One layer's own error: `sqnr_db`, and the `shift` of its output per channel, None where it has no channels."""

    sqnr_db: float
    shift: np.ndarray | None


def layer_errors(
    original: ir.Model,
    quantized: ir.Model,
    batches: Iterable[Batch],
    *,
    images: int,
    threads: int = 0,
    simulated: bool = False,
    progress: Progress = silent,
) -> dict[str, LayerError]:
    """Return the own error of every node that both models have and that reads a dequantized tensor, by node name.

    `original` is the float model that `quantized` was made from; neither is changed. `simulated`: its types have no
    kernels here.
    """
    twin, layers = _twin(original, quantized)
    if not layers:
        return {}
    sums = np.zeros((len(layers), 2), dtype=np.float64)
    shifts: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    done = 0
    with TemporaryDirectory() as folder:
        session = Session(model_io.session_source(twin, Path(folder)), threads=threads, fuse_quantized=not simulated)
        for batch in batches:
            out = session.run(batch.feed)
            sums += np.array([[out[f"{name}::signal"], out[f"{name}::error"]] for name in layers], dtype=np.float64)
            for name, y in out.items():
                if name.endswith("::shift"):
                    shifts[name] = shifts.get(name, 0.0) + y.reshape(len(y), -1).astype(np.float64).sum(0)
                    rows[name] = rows.get(name, 0) + len(y)  # not the images: a Reshape may have made more rows
            done += batch.count
            progress("judging the layers", done, images)
    signal, error = sums.T
    decibels = 10 * np.log10(np.maximum(signal, 1e-300) / np.maximum(error, 1e-300))
    found = {}
    for name, db in zip(layers, decibels, strict=True):
        shift = shifts.get(f"{name}::shift")
        found[name] = LayerError(float(db), None if shift is None else shift / rows[f"{name}::shift"])
    return found


def _twin(original: ir.Model, quantized: ir.Model) -> tuple[ir.Model, list[str]]:
    """Return the graph of both models side by side, its outputs the sums, and the names of the judged nodes."""
    twin = model_io.copy(original)
    graph = twin.graph
    twin.opset_imports.update(quantized.opset_imports)
    exact = {v.name: v for node in graph for v in node.outputs} | {v.name: v for v in graph.inputs}
    nodes = {node.name or "": node for node in graph}
    copies = _copy_initializers(quantized.graph, graph)
    copies.update({v: exact[v.name] for v in quantized.graph.inputs})
    layers: list[tuple[ir.Node, ir.Node]] = []
    for node in quantized.graph:
        inputs = [None if v is None else copies.get(v, v) for v in node.inputs]
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
            inputs[0] = exact.get(node.inputs[0].name, inputs[0])
        outputs = [ir.Value(name=f"{v.name}::twin", type=v.type, shape=v.shape) for v in node.outputs]
        graph.append(
            ir.Node(
                node.domain,
                node.op_type,
                inputs,
                node.attributes.values(),
                outputs=outputs,
                name=f"{node.name}::twin",
            )
        )
        copies.update(zip(node.outputs, outputs, strict=True))
        same = nodes.get(node.name or "")
        if same is not None and same.op_type == node.op_type and _reads_dequantized(node) and _is_float(same):
            layers.append((same, node))
    judged = [(same, _with_bias(same), copies[_with_bias(node)], _outputs(same)) for same, node in layers]
    graph.outputs.clear()
    for layer in judged:
        _append_sums(graph, *layer)
    graph.sort()
    RemoveUnusedNodesPass()(twin)
    return twin, [same.name or "" for same, _ in layers]


def _copy_initializers(source: ir.Graph, target: ir.Graph) -> dict[ir.Value, ir.Value]:
    copies = {}
    for name, value in source.initializers.items():
        if name in target.initializers:
            copies[value] = target.initializers[name]
            continue
        copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        target.register_initializer(copy)
        copies[value] = copy
    return copies


def _reads_dequantized(node: ir.Node) -> bool:
    """Say whether an activation (not only a weight) of the node comes out of DequantizeLinear."""
    value = node.inputs[0] if node.inputs else None
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear" and node.op_type != "QuantizeLinear"


def _is_float(node: ir.Node) -> bool:
    """Say whether the node gives numbers that can be off: a Shape may read a dequantized tensor, too."""
    return node.outputs[0].dtype in (None, ir.DataType.FLOAT) and node.op_type not in ("Shape", "Size")


def _with_bias(node: ir.Node) -> ir.Value:
    """Return the layer's output; of a MatMul whose bias is added behind it, that sum."""
    found = added_bias(node)
    return node.outputs[0] if found is None else found[0].outputs[0]


def _append_sums(graph: ir.Graph, node: ir.Node, exact: ir.Value, twin: ir.Value, outputs: int | None) -> None:
    """Append the sums of squares of a tensor and of its error, and the error's mean per image and channel.

    `outputs`: so many channels lie along the last axis behind others, see `_outputs`.
    """
    name = node.name

    def add(op: str, inputs: list[ir.Value], out: str, **attributes: int | list[int]) -> ir.Value:
        value = ir.Value(name=f"{name}::{out}", type=ir.TensorType(ir.DataType.FLOAT))
        graph.append(ir.node(op, inputs, attributes or None, outputs=[value], name=value.name))
        return value

    difference = add("Sub", [exact, twin], "difference")
    for out, value in (("signal", exact), ("error", difference)):
        total = add("ReduceSumSquare", [value], out, keepdims=0)
        total.shape = ir.Shape([])
        graph.outputs.append(total)
    if node.op_type in ("Conv", "ConvTranspose"):
        graph.outputs.append(add("GlobalAveragePool", [difference], "shift"))
    elif node.op_type == "Gemm":
        graph.outputs.append(add("Identity", [difference], "shift"))
    elif outputs is not None:
        shape = ir.Value(name=f"{name}::rows", const_value=ir.tensor([0, -1, outputs], dtype=ir.DataType.INT64))
        graph.register_initializer(shape)
        rows = add("Reshape", [difference, shape], "of images")
        columns = add("Transpose", [rows], "channels second", perm=[0, 2, 1])
        graph.outputs.append(add("GlobalAveragePool", [columns], "shift"))


def _outputs(node: ir.Node) -> int | None:
    """Return the channels of a MatMul that takes a bias; None for other nodes."""
    shape = node.outputs[0].shape
    if added_bias(node) is None or shape is None or len(shape) < 2 or not isinstance(shape[-1], int):
        return None
    return shape[-1]
