"""How much each quantized layer errs by itself, and by how much its output is shifted.

Teacher forcing: in one graph the float model runs beside its quantized copy, and every QuantizeLinear of the copy
reads the *float* model's tensor of that name. Each layer then works on exact inputs that it rounds itself, so the
error at its output is its own, that of its rounded inputs and weights, and nothing added up from layers before it:

    SQNR_l = 10 log10( sum y_l^2 / sum (y_l - y'_l)^2 )

    shift_l[c] = mean over images and positions of (y_l - y'_l) in channel c

Adding the shift to the layer's bias makes its output right on average: empirical bias correction (Nagel et al. 2019,
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

from ..backends.ort import Session
from . import model as model_io
from .types import Progress, silent

if TYPE_CHECKING:
    from .fidelity import Batch


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
    layers = []
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
        if same is not None and _reads_dequantized(node) and same.op_type == node.op_type:
            layers.append((node.name or "", same.outputs[0], outputs[0]))
    graph.outputs.clear()
    for name, exact_out, twin_out in layers:
        _append_sums(graph, name, exact_out, twin_out, nodes[name].op_type)
    graph.sort()
    RemoveUnusedNodesPass()(twin)
    return twin, [name for name, _, _ in layers]


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


def _append_sums(graph: ir.Graph, name: str, exact: ir.Value, twin: ir.Value, op: str) -> None:
    """Append the sums of squares of a tensor and of its error, and the error's mean per image and channel."""

    def add(op: str, inputs: list[ir.Value], out: str, **attributes: int) -> ir.Value:
        value = ir.Value(name=out, type=ir.TensorType(ir.DataType.FLOAT))
        graph.append(ir.node(op, inputs, attributes or None, outputs=[value], name=out))
        return value

    difference = add("Sub", [exact, twin], f"{name}::difference")
    for out, value in (("signal", exact), ("error", difference)):
        total = add("ReduceSumSquare", [value], f"{name}::{out}", keepdims=0)
        total.shape = ir.Shape([])
        graph.outputs.append(total)
    if op in ("Conv", "ConvTranspose"):
        graph.outputs.append(add("GlobalAveragePool", [difference], f"{name}::shift"))
    elif op == "Gemm":
        graph.outputs.append(add("Identity", [difference], f"{name}::shift"))
