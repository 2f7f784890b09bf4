"""Types and shapes of all values, inferred afresh by ONNX without a byte of the weights.

What a file says of its inner values may be stale (a batch size edited at the inputs alone is common), so only the
number of dimensions is believed where inference knows nothing; what other domains' operators give is believed in full,
since nothing can be inferred there. Graph inputs and outputs are the model's signature and never change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from .constants import graphs, light_proto

#: Names that inference makes up for dimensions it does not know.
_UNKNOWN = re.compile(r"unk__\d+")


def infer_shapes(model: ir.Model) -> str | None:
    """Set type and shape of every inner value; return what is wrong with the model where inference found a fault.

    After a fault the values that do not depend on it are still inferred.
    """
    proto = light_proto(model)
    believed = {value.name for value in _outputs_of(model) if value.producer().domain}  # type: ignore[union-attr]  # it is an output
    for graph in _graph_protos(proto.graph):
        kept = [info for info in graph.value_info if info.name in believed]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    fault = None
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        fault = str(error).strip().splitlines()[0][:300]
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    _take_over(model.graph, inferred.graph)
    return fault


def _take_over(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    types = {info.name: info.type for info in proto.value_info}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            if value.name and not value.is_graph_output():
                _set(value, types.get(value.name))
        for attribute in node_proto.attribute:
            if attribute.HasField("g"):
                _take_over(node.attributes[attribute.name].as_graph(), attribute.g)
            for subgraph, subproto in zip(_graphs_of(node, attribute), attribute.graphs, strict=True):
                _take_over(subgraph, subproto)


def _set(value: ir.Value, found: onnx.TypeProto | None) -> None:
    shape = ir.serde.deserialize_type_proto_for_shape(found) if found is not None else None
    if found is not None:
        value.type = ir.serde.deserialize_type_proto_for_type(found) or value.type
    if shape is not None:
        value.shape = ir.Shape([_known(dim) for dim in shape])
    elif value.shape is not None:
        value.shape = ir.Shape([None] * len(value.shape))


def _known(dim: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return None if dim.value is None or _UNKNOWN.fullmatch(dim.value) else dim.value


def _outputs_of(model: ir.Model) -> Iterator[ir.Value]:
    return (value for graph in graphs(model) for node in graph for value in node.outputs)


def _graphs_of(node: ir.Node, attribute: onnx.AttributeProto) -> Iterable[ir.Graph]:
    return node.attributes[attribute.name].as_graphs() if attribute.graphs else ()


def _graph_protos(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graph_protos(subgraph)
