"""A network run piece by piece over a few batches: only as far as somebody asks, and nothing twice.

Held in memory is what nodes that have not run yet still read. A piece is the nodes that a tensor asked for needs and
that have not run; it becomes a small ONNX model of its own, run by ONNX Runtime with optimisations off, since those
would round other than the graph says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from ...backends.ort import Session
from ..layers import LINEAR

Arrays = list[np.ndarray]


class Stream:
    """One network on its way through `feeds`, batches of inputs by name. The model is read, never changed."""

    def __init__(self, model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], threads: int = 0) -> None:
        self._model, self._threads, self._batches = model, threads, len(feeds)
        self._place = {node: i for i, node in enumerate(model.graph)}
        self._reads = {node: tuple(_reads(node)) for node in model.graph}
        self._readers: dict[ir.Value, set[ir.Node]] = {}
        for node, values in self._reads.items():
            for value in values:
                self._readers.setdefault(value, set()).add(node)
        self._fixed: dict[ir.Value, np.ndarray] = {}
        given = [v for v in model.graph.inputs if not v.is_initializer()]
        self._live: dict[ir.Value, Arrays] = {v: [np.asarray(feed[v.name or ""]) for feed in feeds] for v in given}

    @property
    def bytes(self) -> int:
        """The size of all tensors held."""
        return sum(a.nbytes for arrays in self._live.values() for a in arrays)

    def fix(self, value: ir.Value, array: np.ndarray) -> None:
        """Let a tensor be this constant from now on, whatever makes it in the model."""
        self._fixed[value] = array

    def pull(self, value: ir.Value | None) -> Arrays:
        """Return a tensor, batch by batch, after running what it takes; it is kept while some node has yet to read it.

        A tensor that was let go, since all its readers have run, cannot be had again.
        """
        assert value is not None
        if value not in self._live:
            self._run(self._needed(value), value)
        return self._live[value] if self._readers.get(value) else self._live.pop(value)

    def within_reach(self, value: ir.Value | None) -> bool:
        """Say whether a tensor comes from the images, and can be had without running a linear node first."""
        if value is None or self._is_constant(value):
            return False
        return all(node.op_type not in LINEAR for node in self._needed(value))

    def _needed(self, value: ir.Value) -> list[ir.Node]:
        """Return the nodes to run for a tensor, in order."""
        found: set[ir.Node] = set()
        waiting = [value]
        while waiting:
            at = waiting.pop()
            producer = at.producer()
            if at in self._live or self._is_constant(at) or producer is None or producer in found:
                continue
            found.add(producer)
            waiting.extend(self._reads[producer])
        return sorted(found, key=self._place.__getitem__)

    def _is_constant(self, value: ir.Value) -> bool:
        return value in self._fixed or value.is_initializer()

    def _run(self, nodes: list[ir.Node], wanted: ir.Value) -> None:
        """Run the nodes over all batches; hold what others read of their results, let go what nobody reads any more."""
        for node in nodes:
            for value in self._reads[node]:
                self._readers[value].discard(node)
        results = [v for n in nodes for v in n.outputs if v is wanted or self._readers.get(v)]
        read = dict.fromkeys(v for n in nodes for v in self._reads[n])
        sources = [v for v in read if v in self._live and not self._is_constant(v)]
        session = self._session(nodes, sources, [v for v in read if self._is_constant(v)], results)
        made = [session.run({v.name or "": self._live[v][i] for v in sources}) for i in range(self._batches)]
        for value in results:
            self._live[value] = [one[value.name or ""] for one in made]
        for value in sources:
            if not self._readers[value]:
                del self._live[value]

    def _session(
        self, nodes: list[ir.Node], sources: list[ir.Value], constants: list[ir.Value], results: list[ir.Value]
    ) -> Session:
        graph = onnx.GraphProto(
            name="piece",
            node=map(ir.serde.serialize_node, nodes),
            input=[_info(v.name or "", self._live[v][0]) for v in sources],
            output=[onnx.ValueInfoProto(name=v.name) for v in results],
            initializer=[self._tensor(v) for v in constants],
        )
        imports = [onnx.helper.make_opsetid(*entry) for entry in self._model.opset_imports.items()]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=self._model.ir_version)
        model.functions.extend(ir.serde.serialize_function(f) for f in self._model.functions.values())
        return Session(model.SerializeToString(), threads=self._threads, optimise=False)

    def _tensor(self, value: ir.Value) -> onnx.TensorProto:
        if value in self._fixed:
            return onnx.numpy_helper.from_array(self._fixed[value], value.name)
        assert value.const_value is not None
        tensor = value.const_value
        outside = isinstance(tensor, ir.ExternalTensor)
        proto = ir.serde.serialize_tensor(ir.Tensor(tensor.numpy()) if outside else tensor)
        proto.name = value.name or ""
        return proto


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads: its inputs, and what its subgraphs take from outside."""
    yield from (v for v in node.inputs if v is not None)
    inner = [n for a in node.attributes.values() for g in _graphs(a) for n in g.all_nodes()]
    own = {n.graph for n in inner}
    yield from (v for n in inner for v in n.inputs if v is not None and v.graph not in own)


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def _info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
