"""Where Q/DQ pairs may stand in an artifact for TensorRT: the second half of qdq_rules.py.

Names: a *pair* is QuantizeLinear and the DequantizeLinear behind it; a *layer* is Conv, ConvTranspose, Gemm or MatMul;
a layer is quantized where it reads an activation from DequantizeLinear. Source: NVIDIA's recommendations for the
placement of pairs, and what Model-Optimizer leaves in float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from qdq_graph import COPIES, FUSED, LAYERS, PAIR, Graph, Node

#: Without weights, but with an integer kernel if the result is quantized too.
COMBINE = ("Add", "Mul", "AveragePool", "GlobalAveragePool", "Resize")
_LEAST, _MULTIPLE, _SEQUENCE = 16, 8, 512


def _bare_input(graph: Graph) -> Iterator[str]:
    """Every input of a quantized layer comes from DequantizeLinear, weights as well; a weight alone only in 4 bits."""
    for node in graph.nodes:
        if node.op not in LAYERS:
            continue
        found = [graph.dequantizer(node, i) for i in range(2)]
        few_bits = found[1] is not None and (graph.scale(found[1]) is not None) and _is_int4(graph, found[1])
        if not few_bits and sum(dq is not None for dq in found) == 1:
            yield f"{node.name}: its input {0 if found[0] is None else 1} is not quantized, the other one is"


def _is_int4(graph: Graph, dq: Node) -> bool:
    array = graph.constants.get(dq.input(0))
    return array is not None and str(array.dtype) == "int4"


def _computed_weight(graph: Graph) -> Iterator[str]:
    """Convolutions and Gemms run on integers with constant weights only."""
    for node in graph.nodes:
        dq = graph.dequantizer(node, 1) if node.op in LAYERS and node.op != "MatMul" else None
        if dq is not None and not graph.is_weight(dq):
            yield f"{node.name}: its quantized weight is computed"


def _unwanted(graph: Graph) -> Iterator[str]:
    """Each reader of an activation's DequantizeLinear has an integer kernel, if behind data movement."""
    for node in graph.pairs():
        if node.op != "DequantizeLinear" or graph.is_weight(node):
            continue
        name = node.outputs[0]
        if name in graph.outputs:
            yield f"{node.name}: it gives the graph output {name}"
        for reader, index in graph.readers.get(name, ()):
            if not _wants(graph, reader, index):
                yield f"{node.name}: {reader.name} ({reader.op}) does not work on integers"
        if name not in graph.outputs and not graph.readers.get(name):
            yield f"{node.name}: nothing reads it"


def _wants(graph: Graph, node: Node, index: int) -> bool:
    if node.op in LAYERS:
        return index < 2
    if node.op in (*COMBINE, "QuantizeLinear"):
        return True
    if node.op == "LayerNormalization":  # a convolution in front of it then gives integers
        return index == 0
    return node.op in COPIES and any(
        _wants(graph, reader, i) for out in node.outputs for reader, i in graph.readers.get(out, ())
    )


def _split_kernel(graph: Graph) -> Iterator[str]:
    """Nothing stands between a layer and its bias, normalisation or activation."""
    for node in graph.nodes:
        biased = node.op in ("Add", "Mul") and len(graph.computed(node)) == 1
        if node.op not in FUSED and not biased:
            continue
        for index in range(len(node.inputs)):
            dq = graph.dequantizer(node, index)
            q = graph.quantizer(dq) if dq is not None else None
            maker = graph.producer.get(q.input(0)) if q is not None else None
            if maker is not None and maker.op in LAYERS:
                yield f"{node.name}: a pair stands between {maker.name} and it"


def _lonely_activation(graph: Graph) -> Iterator[str]:
    """No pairs around an activation or normalisation only."""
    for node in graph.nodes:
        readers = [reader.op for reader, _ in graph.readers.get(node.outputs[0], ())]
        if node.op in FUSED and graph.dequantizer(node, 0) is not None and "QuantizeLinear" in readers:
            yield f"{node.name}: pairs stand around this {node.op} alone"


def _residuals(graph: Graph) -> Iterator[tuple[Node, list[bool]]]:
    """Yield the Adds of two activations, and which of their inputs are dequantized."""
    for node in graph.nodes:
        if node.op == "Add" and len(graph.computed(node)) == 2:
            yield node, [graph.dequantizer(node, i) is not None for i in range(2)]


def _both_branches(graph: Graph) -> Iterator[str]:
    for node, pairs in _residuals(graph):
        if all(pairs):
            yield f"{node.name}: both branches are dequantized, so no layer fuses with it"


def _wrong_branch(graph: Graph) -> Iterator[str]:
    """The branch without a pair is the one that comes out of a quantized layer."""
    for node, pairs in _residuals(graph):
        if sum(pairs) == 1:
            layer = graph.layer_behind(node.inputs[pairs.index(False)])
            if layer is None or not graph.quantized(layer):
                yield f"{node.name}: no quantized layer gives its bare branch, so nothing fuses with it"


def _bare_skip(graph: Graph) -> Iterator[str]:
    """The skip of an Add whose result is quantized has a pair."""
    for node, pairs in _residuals(graph):
        layers = [graph.layer_behind(name) for name in node.inputs]
        fused = [layer for layer in layers if layer is not None and graph.quantized(layer)]
        if not any(pairs) and fused and graph.becomes_integer(node.outputs[0]):
            yield f"{node.name}: its result is quantized and {fused[0].name} could fuse with it, but its skip is bare"


def _float_result(graph: Graph) -> Iterator[str]:
    """What has no weights and reads integers must give integers, or it stays in float."""
    for node in graph.nodes:
        found = [graph.dequantizer(node, i) for i in range(len(node.inputs))]
        reads = any(dq is not None and not graph.is_weight(dq) for dq in found)
        if node.op in COMBINE and reads and not graph.becomes_integer(node.outputs[0]):
            yield f"{node.name}: this {node.op} reads integers, but nothing quantizes its result"


def _output_operator(graph: Graph) -> Iterator[str]:
    """What makes a graph output is quantized only if it is a layer."""
    for node in graph.nodes:
        reads = any(graph.dequantizer(node, i) is not None for i in range(len(node.inputs)))
        if node.op in COMBINE and reads and graph.hands_out(node.outputs[0]):
            yield f"{node.name}: this {node.op} makes a graph output and reads integers"


def _requantized(graph: Graph) -> Iterator[str]:
    """No Q -> DQ -> Q with unequal scales, and no tensor with two scales."""
    for node in graph.pairs():
        scale = graph.scale(node)
        if scale is None:
            continue
        if node.op == "DequantizeLinear":
            for reader, index in graph.ahead(node.outputs[0], COPIES):
                if reader.op == "QuantizeLinear" and index == 0 and not _equal(scale, graph.scale(reader)):
                    yield f"{reader.name}: what {node.name} dequantized is quantized with another scale"
        else:
            for reader, index in graph.readers.get(node.input(0), ()):
                if reader.op == node.op and index == 0 and not _equal(scale, graph.scale(reader)):
                    yield f"{reader.name}: {node.name} quantizes the same tensor with another scale"


def _split_pair(graph: Graph) -> Iterator[str]:
    """A DequantizeLinear has the scale of the QuantizeLinear in front of it."""
    for node in graph.pairs():
        q = graph.quantizer(node) if node.op == "DequantizeLinear" else None
        if q is not None and not _equal(graph.scale(q), graph.scale(node)):
            yield f"{node.name}: its scale is not that of {q.name}"


def _concat_scales(graph: Graph) -> Iterator[str]:
    """What a quantized Concat joins and what it gives has one scale."""
    for node in graph.nodes:
        if node.op != "Concat":
            continue
        results = _scales_ahead(graph, node.outputs[0])
        if not results:
            continue
        parts = [graph.scale(graph.dequantizer(node, i)) for i in range(len(node.inputs))]
        parts += [s for name in node.inputs for s in _scales_ahead(graph, name)]
        if any(scale is not None and not _equal(scale, results[0]) for scale in (*parts, *results)):
            yield f"{node.name}: its inputs and its result have different scales"


def _scales_ahead(graph: Graph, name: str) -> list[np.ndarray | None]:
    """Return the scales with which a tensor is quantized, if behind data movement."""
    return [graph.scale(node) for node, _ in graph.ahead(name, _MOVES) if node.op == "QuantizeLinear"]


_MOVES = tuple(op for op in COPIES if op != "Cast")


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is not None and other is not None and np.array_equal(one.ravel(), other.ravel())


def _depthwise_channels(graph: Graph) -> Iterator[str]:
    for node, shape in _eight_bit(graph, ("Conv",)):
        if node.attributes.get("group", 1) > 1 and (shape[0] or 0) % _MULTIPLE:
            yield f"{node.name}: a convolution in groups of {shape[0]} channels, no multiple of {_MULTIPLE}"


def _small_layer(graph: Graph) -> Iterator[str]:
    """Convolutions and products that fill no integer kernel stay in float."""
    for node, shape in _eight_bit(graph, ("Conv", "Gemm", "MatMul")):
        if node.op == "Conv":
            if not _fills_a_kernel(graph, node, [d or 0 for d in shape]):
                yield f"{node.name}: a convolution with a weight of {shape} fills no integer kernel"
            continue
        inner, columns = reversed(shape) if node.attributes.get("transB", 0) else shape[-2:]
        if min(inner or 0, columns or 0) < _LEAST:
            yield f"{node.name}: a product with a weight of {inner} x {columns} fills no integer kernel"


def _fills_a_kernel(graph: Graph, node: Node, shape: list[int]) -> bool:
    outputs, inputs, *kernel = shape
    if min(outputs, inputs) >= _LEAST:
        return True
    if node.attributes.get("group", 1) > 1:
        return outputs % _MULTIPLE == 0 and min(kernel) >= 3
    first = _source(graph, node) in graph.inputs
    multiple = outputs % _MULTIPLE == 0 or inputs % _MULTIPLE == 0
    return multiple and (first or max(outputs, inputs) >= _LEAST) and len(set(kernel)) == 1


def _source(graph: Graph, layer: Node) -> str:
    """Return the float tensor behind a layer's pair, and behind Casts."""
    name = layer.input(0)
    while (maker := graph.producer.get(name)) is not None and maker.op in (*PAIR, "Cast"):
        name = maker.input(0)
    return name


def _vector_product(graph: Graph) -> Iterator[str]:
    """A product with a vector is bound by memory and stays in float."""
    for node, shape in _eight_bit(graph, ("Gemm", "MatMul")):
        rows = graph.shape(node.input(0))
        one_row = rows is not None and len(rows) > 1 and rows[-2] == 1
        if one_row or 1 in shape[-2:]:
            yield f"{node.name}: it multiplies a vector"


def _attention(graph: Graph) -> Iterator[str]:
    """Products of two activations: sequences of known length up to 512, and no computed mask behind them."""
    for node in graph.nodes:
        found = [graph.dequantizer(node, i) for i in range(2)]
        if node.op != "MatMul" or not all(dq is not None and not graph.is_weight(dq) for dq in found):
            continue
        sizes = [d for name in node.inputs for d in (graph.shape(name) or [None])[-2:]]
        if any(d is None or d > _SEQUENCE for d in sizes):
            yield f"{node.name}: its sequence is longer than {_SEQUENCE}, or of unknown length"
        masks = (r for r, _ in graph.ahead(node.outputs[0], ("Mul", "Div", "Cast", "Reshape", "Add")) if r.op == "Add")
        for reader in masks:
            if len(graph.computed(reader)) == 2:
                yield f"{node.name}: a computed mask is added to its result ({reader.name})"


def _eight_bit(graph: Graph, ops: tuple[str, ...]) -> Iterator[tuple[Node, list[int | None]]]:
    """Yield the layers that read an activation and a constant weight quantized, with the weight's shape."""
    for node in graph.nodes:
        dq = graph.dequantizer(node, 1) if node.op in ops and graph.quantized(node) else None
        shape = graph.shape(dq.input(0)) if dq is not None and graph.is_weight(dq) else None
        if shape is not None and math.prod(d or 0 for d in shape):
            yield node, shape


PLACEMENT: Mapping[str, Callable[[Graph], Iterator[str]]] = {
    "bare-input": _bare_input,
    "computed-weight": _computed_weight,
    "unwanted-pair": _unwanted,
    "split-kernel": _split_kernel,
    "lonely-activation": _lonely_activation,
    "both-branches": _both_branches,
    "wrong-branch": _wrong_branch,
    "bare-skip": _bare_skip,
    "float-result": _float_result,
    "output-operator": _output_operator,
    "requantized": _requantized,
    "split-pair": _split_pair,
    "concat-scales": _concat_scales,
    "depthwise-channels": _depthwise_channels,
    "small-layer": _small_layer,
    "vector-product": _vector_product,
    "attention": _attention,
}
