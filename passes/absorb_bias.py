"""High biases absorbed by the next layer: what never falls below c need not carry c through the grid.

Algebra (Nagel et al. 2019, section 4.1.3). Where h = W1 x + b1 never falls below c >= 0, channel by channel,

    W2 relu(h) + b2 = W2 relu(h - c) + (b2 + W2 c)         b1 -> b1 - c,   b2 -> b2 + W2 c

with W2 c the sum over input channels and kernel. The range of the activation gets smaller by c, and so does the step
of its grid. It holds as long as no input makes h fall below c, which calibration images cannot prove: hence not exact.

Rules
1. A Conv, ConvTranspose or Gemm, a Relu that alone reads it, and any number of layers that alone read the Relu.
2. These must be Conv without padding (a padded 0 stands for c then) or Gemm.
3. c is the smallest value seen, less a margin, where that is positive.

Not touched: subgraphs, biases that are shared or that callers see, 16-bit layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .base import Pass, PassResult, Stage
from .constants import Names, add_initializer, constant
from .weights import ALONG_OUTPUTS, Stays, along_inputs, changeable, float64, set_constant

_RULE = "absorb-high-bias"


@dataclass(frozen=True)
class AbsorbHighBias(Pass):
    """Move the part of each channel that is always there into the next layer's bias.

    `minima` maps the outputs of layers, in front of their Relu, to the smallest value of each channel, (channels,);
    all but `margin` of a positive one is moved. The same minima applied once more would move it once more.
    """

    name: ClassVar[str] = "absorb-high-bias"
    stage: ClassVar[Stage] = "quantize"
    exact: ClassVar[bool] = False

    minima: Mapping[str, np.ndarray] = field(default_factory=dict)
    margin: float = 0.1

    def call(self, model: ir.Model) -> PassResult:
        """Absorb in place, layer by layer."""
        refusals, moved, names = [], 0, Names.of(model)
        for node in list(model.graph):
            low = self.minima.get(node.outputs[0].name or "") if node.outputs else None
            if low is None or node.domain or node.op_type not in ALONG_OUTPUTS:
                continue
            constant_part = np.maximum(np.asarray(low, np.float64), 0.0) * (1 - self.margin)
            if not constant_part.any():
                continue
            try:
                _move(node, constant_part, model.graph, names)
                moved += 1
            except Stays as why:
                refusals.append(Refusal(node.name or node.outputs[0].name or node.op_type, _RULE, str(why)))
        return PassResult(model, modified=moved > 0, rewrites=moved, refusals=tuple(refusals))


def _move(node: ir.Node, part: np.ndarray, graph: ir.Graph, names: Names) -> None:
    """Take `part` from the layer's bias and give it to its readers; all is computed before anything is changed."""
    readers = _readers(node, graph)
    _check_plain(node)
    count = _output_channels(node)
    if part.shape != (count,):
        raise Stays(f"it has {count} channels, and {part.shape} minima were given")
    new = [(node, _bias(node) - part)]
    new += [(reader, _bias(reader) + _response(reader, part)) for reader in readers]
    for layer, bias in new:
        _set_bias(layer, bias, graph, names)


def _readers(node: ir.Node, graph: ir.Graph) -> list[ir.Node]:
    """Return the layers behind the Relu behind `node`. Raises Stays where anything else reads either tensor."""
    relu = _only_users(node.outputs[0])
    if len(relu) != 1 or relu[0].op_type != "Relu" or relu[0].domain or relu[0].graph is not graph:
        raise Stays("no Relu alone reads it")
    readers = _only_users(relu[0].outputs[0])
    for reader in readers:
        if reader.graph is not graph or reader.domain or reader.op_type not in ("Conv", "Gemm"):
            raise Stays(f"{reader.op_type} reads its Relu, too")
        if reader.inputs[0] is not relu[0].outputs[0] or list(reader.inputs).count(relu[0].outputs[0]) > 1:
            raise Stays(f"{reader.name or reader.op_type} reads its Relu as a weight or bias")
        _check_plain(reader)
        if reader.op_type == "Conv" and _padded(reader):
            raise Stays(f"{reader.name or reader.op_type} pads its input with zeros, which would stand for the bias")
    if not readers:
        raise Stays("nothing reads its Relu")
    return readers


def _only_users(value: ir.Value) -> list[ir.Node]:
    if value.is_graph_output():
        raise Stays(f"{value.name} is a graph output, so callers read it")
    return [user for user, _ in value.uses()]


def _padded(conv: ir.Node) -> bool:
    auto = conv.attributes.get_string("auto_pad", "NOTSET")
    return any(conv.attributes.get_ints("pads", ()) or ()) or auto not in ("NOTSET", "VALID")


def _check_plain(node: ir.Node) -> None:
    if constant(node.inputs[1]) is None:
        raise Stays(f"the weight of {node.name or node.op_type} is not constant")
    if node.attributes.get_int("transA", 0):
        raise Stays(f"transA of {node.name or node.op_type} is set")


def _weight(node: ir.Node) -> ir.TensorProtocol:
    tensor = constant(node.inputs[1])
    assert tensor is not None
    return tensor


def _output_channels(node: ir.Node) -> int:
    shape = _weight(node).shape.numpy()
    if node.op_type == "Gemm":
        return int(shape[0 if node.attributes.get_int("transB", 0) else 1])
    return int(shape[0] if node.op_type == "Conv" else shape[1] * (node.attributes.get_int("group", 1) or 1))


def _bias(node: ir.Node) -> np.ndarray:
    """Return the bias as the layer adds it, float64 (channels,). Raises Stays if it may not be changed."""
    count = _output_channels(node)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return np.zeros(count)
    bias = float64(changeable(value)) * (node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0)
    if bias.size not in (1, count) or bias.shape[-1:] not in ((), (1,), (count,)):
        raise Stays(f"the bias of {node.name or node.op_type} is not one number per output")
    return np.broadcast_to(bias.reshape(-1), count)


def _response(node: ir.Node, part: np.ndarray) -> np.ndarray:
    """Return what a layer makes of the constant input `part`, without its bias."""
    weight = _weight(node)
    if node.op_type == "Conv":
        along = along_inputs(node, weight, part)
        summed: np.ndarray = (float64(weight) * along).sum(axis=tuple(range(1, len(weight.shape))))
        return summed
    rows = float64(weight) if node.attributes.get_int("transB", 0) else float64(weight).T
    if rows.shape[1] != len(part):
        raise Stays(f"{node.name or node.op_type} reads {rows.shape[1]} numbers, not {len(part)} channels")
    product: np.ndarray = (node.attributes.get_float("alpha", 1.0) or 0.0) * (rows @ part)
    return product


def _set_bias(node: ir.Node, bias: np.ndarray, graph: ir.Graph, names: Names) -> None:
    dtype = _weight(node).dtype
    node.attributes.pop("beta", None)
    old = node.inputs[2] if len(node.inputs) > 2 else None
    if old is not None:
        set_constant(old, bias, dtype)
        return
    weight = node.inputs[1]
    stem = f"{weight.name if weight is not None else node.name}_bias"
    node.resize_inputs(3)
    node.replace_input_with(2, add_initializer(graph, names.fresh(stem), ir.tensor(bias.astype(dtype.numpy()))))
