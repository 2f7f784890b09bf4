"""Which nodes float16 would break, found by measuring the float32 model on calibration images.

1. Overflow: an input or output goes beyond 65504 (with HEADROOM, for images not seen), or what is summed up, squared or
   exponentiated inside the node does: squares in normalisations, the total behind a mean, exp(x) in Softplus.
2. Error: in one graph the float32 model runs beside copies of its nodes that read rounded inputs. With f16(x) rounding
   to float16 and y = f(x) the exact result, the node's own error is

       inputs  10 log10( sum y^2 / sum (y - f(f16(x)))^2 )        output  10 log10( sum y^2 / sum (y - f16(y))^2 )

   A node below LEAST_DB amplifies rounding (differences of near numbers, a Softmax of large ones) or gives numbers too
   small for float16. Where it is the rounded inputs that hurt, the nodes that make them stay in float32 too: rounded
   inputs cannot be repaired behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...backends.ort import Session
from ...passes.cast_fp16 import planned
from ...passes.constants import constant
from ...passes.float16 import LEAST_DB, MAX, Slots, castable, rounded
from .. import model as model_io
from ..types import Progress, TensorStatistics, silent

if TYPE_CHECKING:
    from ..fidelity import Batch

#: Images that were not calibrated on may give numbers this much larger.
HEADROOM = 2.0
_LARGEST = MAX / HEADROOM
_SQUARES = (
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "LpPool",
    "MeanVarianceNormalization", "ReduceL2", "RMSNormalization",
)  # fmt: skip
_MEANS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
_EXPONENTIALS = ("Mish", "ReduceLogSumExp", "Softplus")


def float_tensors(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the tensors that would be cast, whose statistics `find_unsafe` wants, each once."""
    nodes, _ = castable(model)
    found = {v.name: None for n, slots in nodes.items() for v in _ends(n, slots) if v.const_value is None}
    return tuple(name for name in found if name)


def find_unsafe(
    model: ir.Model,
    statistics: Mapping[str, TensorStatistics],
    batches: Iterable[Batch] = (),
    *,
    images: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> dict[str, str]:
    """Return the nodes of the float32 `model` that must stay in float32, by name, with the reason.

    `statistics` are those of `float_tensors(model)` (minimum and maximum suffice); tensors without are not judged by
    range. `batches` are a few calibration images (`images` of them) to measure errors on; none measures none.
    """
    nodes, _ = castable(model)
    unsafe: dict[str, str] = {}
    for node, slots in nodes.items():
        why = _overflow(node, slots, statistics) or _overflow_inside(node, statistics)
        if why is not None:
            unsafe[node.name or node.op_type] = why
    judged = {node: slots for node, slots in nodes.items() if (node.name or node.op_type) not in unsafe}
    for node, (from_inputs, from_output) in _errors(model, judged, batches, images, threads, progress).items():
        worst = min(from_inputs, from_output)
        if worst >= LEAST_DB:
            continue
        name = node.name or node.op_type
        unsafe.setdefault(name, f"float16 would leave its result {worst:.0f} dB of precision")
        if from_inputs < LEAST_DB:
            for source in _makers(node, nodes):
                unsafe.setdefault(source.name or source.op_type, f"{name} needs its result in float32")
    return unsafe


def simulated(model: ir.Model, keep_float32: Mapping[str, str] | None = None) -> ir.Model:
    """Return a float32 copy of `model` that rounds to float16 whatever CastFloat16 would cast, for judging on CPUs.

    ONNX Runtime's CPU provider runs neighbouring float16 operators in float32 and rounds only behind the last: what
    overflows in between on a device does not there. Rounding that stands in the graph it carries out.
    """
    twin = model_io.copy(model)
    nodes, _ = planned(twin, keep_float32 or {})
    build = _Builder(twin.graph)
    inputs = [(node, i) for node, slots in nodes.items() for i in slots.inputs]
    outputs = [node.outputs[i] for node, slots in nodes.items() for i in slots.outputs]
    for node, i in inputs:
        value = node.inputs[i]
        if value is not None:
            node.replace_input_with(i, build.rounded_to_half(value))
    for value in outputs:
        readers = tuple(value.uses())
        half = build.rounded_to_half(value)
        for reader, i in readers:
            if reader.op_type != "Cast" or reader not in build.casts:
                reader.replace_input_with(i, half)
        if value.is_graph_output():
            index, name = twin.graph.outputs.index(value), value.name
            value.name, half.name = f"{name}::exact", name
            twin.graph.outputs[index] = half
    twin.graph.sort()
    RemoveUnusedNodesPass()(twin)
    return twin


def _ends(node: ir.Node, slots: Slots) -> list[ir.Value]:
    ends = [*(node.inputs[i] for i in slots.inputs), *(node.outputs[i] for i in slots.outputs)]
    return [v for v in ends if v is not None]


def _makers(node: ir.Node, nodes: Mapping[ir.Node, Slots]) -> list[ir.Node]:
    makers = [v.producer() for i in nodes[node].inputs if (v := node.inputs[i]) is not None]
    return [maker for maker in makers if maker is not None and maker in nodes]


# ------------------------------------------------------------------------------------------ overflow


def _overflow(node: ir.Node, slots: Slots, statistics: Mapping[str, TensorStatistics]) -> str | None:
    for value in _ends(node, slots):
        largest = _magnitude(value, statistics)
        if largest > _LARGEST:
            return f"{value.name} reaches {largest:.3g}, float16 ends at {MAX:.0f}"
    return None


def _overflow_inside(node: ir.Node, statistics: Mapping[str, TensorStatistics]) -> str | None:
    if not node.inputs or node.inputs[0] is None or not node.outputs:
        return None
    source, out = node.inputs[0], node.outputs[0]
    largest = _magnitude(source, statistics)
    if node.op_type in _SQUARES and largest**2 > _LARGEST:
        return f"it squares {source.name}, which reaches {largest:.3g}: float16 ends at {MAX:.0f}"
    if node.op_type in _EXPONENTIALS and largest > math.log(_LARGEST):
        return f"it takes exp of {source.name}, which reaches {largest:.3g}: float16 ends at {MAX:.0f}"
    if node.op_type in _MEANS:
        total = _magnitude(out, statistics) * _terms(node)
        if total > _LARGEST:
            return f"it sums up to {total:.3g} before it divides: float16 ends at {MAX:.0f}"
    return None


def _magnitude(value: ir.Value, statistics: Mapping[str, TensorStatistics]) -> float:
    found = statistics.get(value.name or "")
    return 0.0 if found is None else max(-found.min, found.max)


def _terms(node: ir.Node) -> int:
    """Return how many numbers a mean is taken over; 1 where shapes are unknown."""
    if node.op_type == "AveragePool":
        return math.prod(node.attributes.get_ints("kernel_shape", ()))
    sizes = [None if v is None or v.shape is None else list(v.shape) for v in (node.inputs[0], node.outputs[0])]
    if sizes[0] is None or sizes[1] is None or len(sizes[0]) != len(sizes[1]):
        return 1
    reduced = [a for a, b in zip(sizes[0], sizes[1], strict=True) if a != b]
    return math.prod(a for a in reduced if isinstance(a, int))


# ------------------------------------------------------------------------------------------ error


def _errors(
    model: ir.Model,
    nodes: Mapping[ir.Node, Slots],
    batches: Iterable[Batch],
    images: int,
    threads: int,
    progress: Progress,
) -> dict[ir.Node, tuple[float, float]]:
    """Return each node's precision in dB with rounded inputs, and with a rounded output."""
    judged = [node for node, slots in nodes.items() if slots.outputs]
    sums = np.zeros((len(judged), 3), dtype=np.float64)
    done = 0
    with TemporaryDirectory() as folder:
        session: Session | None = None
        for batch in batches:
            if session is None:
                twin = _twin(model, {i: nodes[node] for i, node in enumerate(judged)}, judged)
                session = Session(model_io.session_source(twin, Path(folder)), threads=threads)
            out = session.run(batch.feed)
            sums += [[float(out[f"{i}::{kind}"]) for kind in _KINDS] for i in range(len(judged))]
            done += batch.count
            progress("looking for what float16 breaks", done, images)
    return {
        node: (_decibels(y, inputs), _decibels(y, out)) for node, (y, inputs, out) in zip(judged, sums, strict=True)
    }


_KINDS = ("signal", "inputs", "output")


def _decibels(signal: float, error: float) -> float:
    """Return the precision; inf where nothing is lost or nothing can be said, -inf where numbers became infinite."""
    if signal == 0 or error == 0 or not math.isfinite(signal):
        return math.inf
    return 10 * math.log10(signal / error) if math.isfinite(error) else -math.inf


def _twin(model: ir.Model, slots: Mapping[int, Slots], judged: list[ir.Node]) -> ir.Model:
    """Return the model with the sums of squares of each judged node's result and of its two errors as outputs."""
    twin = model_io.copy(model)
    by_place = dict(zip(model.graph, twin.graph, strict=True))
    build = _Builder(twin.graph)
    twin.graph.outputs.clear()
    for i, node in enumerate(judged):
        build.judge(by_place[node], slots[i], str(i))
    twin.graph.sort()
    RemoveUnusedNodesPass()(twin)
    return twin


class _Builder:
    """Appends the copies and the sums to one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.rounded: dict[ir.Value, ir.Value] = {}
        self.casts: set[ir.Node] = set()

    def judge(self, node: ir.Node, slots: Slots, name: str) -> None:
        """Append a copy of the node with rounded inputs, and the sums over its first float16 output."""
        inputs = [
            self.rounded_to_half(v) if i in slots.inputs and v is not None else v for i, v in enumerate(node.inputs)
        ]
        outputs = [ir.Value(name=f"{name}::{j}", type=v.type, shape=v.shape) for j, v in enumerate(node.outputs)]
        attributes = node.attributes.values()
        self.graph.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"{name}::copy"))
        index = min(slots.outputs)
        exact, copy = node.outputs[index], outputs[index]
        errors = [self._add("Sub", [exact, v], f"{name}::{kind}-error")
                  for v, kind in ((copy, "inputs"), (self.rounded_to_half(exact), "output"))]  # fmt: skip
        for value, kind in zip((exact, *errors), _KINDS, strict=True):
            total = self._add("ReduceSumSquare", [value], f"{name}::{kind}", keepdims=0)
            total.shape = ir.Shape([])
            self.graph.outputs.append(total)

    def rounded_to_half(self, value: ir.Value) -> ir.Value:
        """Return the float32 tensor that holds the value rounded to float16; constants are rounded here."""
        if value not in self.rounded:
            tensor = constant(value)
            if tensor is None:
                half = self._add("Cast", [value], f"{value.name}::float16", ir.DataType.FLOAT16, to=10)
                self.rounded[value] = self._add("Cast", [half], f"{value.name}::rounded", to=1)
                self.casts.update(n for v in (half, self.rounded[value]) if (n := v.producer()) is not None)
            else:
                array = rounded(tensor.numpy()).astype(np.float32)
                copy = ir.Value(name=f"{value.name}::rounded", type=value.type, shape=value.shape)
                copy.const_value = ir.Tensor(array, name=copy.name)
                self.graph.register_initializer(copy)
                self.rounded[value] = copy
        return self.rounded[value]

    def _add(
        self, op: str, inputs: list[ir.Value], out: str, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: int
    ) -> ir.Value:
        value = ir.Value(
            name=out, type=ir.TensorType(dtype), shape=inputs[0].shape if op != "ReduceSumSquare" else None
        )
        self.graph.append(ir.node(op, inputs, attributes or None, outputs=[value], name=out))
        return value
