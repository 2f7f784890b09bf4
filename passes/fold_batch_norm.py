"""BatchNormalization folded into the linear operator beside it, or written as Mul and Add.

Algebra. At inference, per channel c (axis 1), with s = gamma / sqrt(var + epsilon) and t = beta - mean s,

    BN(y)_c = s_c y_c + t_c

behind a linear operator, y = L(x; W) + b        BN(y) = L(x; W s) + (b s + t),  s along the output channels of W
    Conv           W: (out, in/group, k…)        s along axis 0
    ConvTranspose  W: (in, out/group, k…)        the inputs of group g make the outputs of group g, so with W as
                                                 (group, in/group, out/group, k…), s is (group, 1, out/group, 1…)
    Gemm           alpha A W + beta C            s along axis 1 of W (axis 0 if transB); alpha stays;
                                                 C becomes (beta C) s + t, and beta 1
    MatMul         x W (+ b), of rank 2          s along axis 1 of W; the Add has b s + t
in front of a Conv without padding               Conv(s x + t; W) + b = Conv(x; W s) + (b + sum_{in,k} W t)
                                                 s, t along the input channels: output o of group g reads those of g.
                                                 With padding it would be wrong: a padded 0 stands for s 0 + t
alone                                            Mul by s, Add of t, both of shape (C, 1, 1…)

All of it is computed in float64 and stored in the weight's own type.

Rules, in this order, for every BatchNormalization of the main graph
1. behind a linear operator that only it reads; 2. in front of a Conv; 3. alone, where neither applies.
A weight that may not be changed is a refusal, and the node stays: shared, a graph input or output, computed at run
time, or of 16 bits. So are training mode, statistics as outputs, and numbers that folding would spoil.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .base import Pass, PassResult, Stage
from .constants import Names, add_initializer, constant, graphs, remove_unused, supplant
from .weights import ALONG_OUTPUTS, WIDE, Stays, along_axis, along_inputs, changeable, float64, scale, set_constant

#: What t may lose to cancellation between mean s and beta, relative to the size of the output.
_CANCELLATION = 2.5e-5


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every BatchNormalization that can be folded without changing a result."""

    name: ClassVar[str] = "fold-batch-norm"
    stage: ClassVar[Stage] = "fold"

    def call(self, model: ir.Model) -> PassResult:
        """Fold in place."""
        work = _Work(model.graph, Names.of(model))
        nodes = [n for graph in graphs(model) for n in graph if n.op_type == "BatchNormalization" and not n.domain]
        folded = sum(work.fold(node, model.opset_imports[""]) for node in nodes)
        return PassResult(model, modified=folded > 0, rewrites=folded, refusals=tuple(work.refusals))


class _Affine(NamedTuple):
    """BN(y) = s y + t per channel; float64, shape (C,)."""

    s: np.ndarray
    t: np.ndarray


#: A rule returns False where it does not fit, and raises Stays before it has changed anything.
_Rule = Callable[["_Work", ir.Node, _Affine], bool]


@dataclass
class _Work:
    graph: ir.Graph
    names: Names
    refusals: list[Refusal] = field(default_factory=list)

    def fold(self, node: ir.Node, opset: int) -> bool:
        """Apply the first rule that fits; record why if none does, or why a better one did not."""
        why = _why_not_affine(node, self.graph, opset)
        if why is not None:
            return self._refuse(node, "batch-norm", why)
        affine = _affine(node)
        for name, rule in _RULES.items():
            try:
                if rule(self, node, affine):
                    return True
            except Stays as why_not:
                return self._refuse(node, name, str(why_not))
        return self._refuse(node, "batch-norm", "the number of dimensions of its input is unknown")

    def only_reader(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether `node` alone reads `value`, once."""
        return [user for user, _ in value.uses()] == [node] and not value.is_graph_output()

    def read_elsewhere(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether `value`, which a linear operator makes for `node`, has other readers; recorded if so."""
        if self.only_reader(node, value):
            return False
        self.note(node, "fold-behind", f"{value.name} is read elsewhere too, so its weights must stay")
        return True

    def note(self, node: ir.Node, rule: str, why: str) -> None:
        """Record a refusal."""
        self.refusals.append(Refusal(self.label(node), rule, why))

    def label(self, node: ir.Node) -> str:
        """What a node is called: exporters often leave the name empty."""
        return node.name or node.outputs[0].name or node.op_type

    def _refuse(self, node: ir.Node, rule: str, why: str) -> bool:
        self.note(node, rule, why)
        return False

    def constant(self, stem: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        """Add `array`, in `dtype`, to the graph under a free name."""
        return add_initializer(self.graph, self.names.fresh(stem), ir.tensor(array.astype(dtype.numpy())))

    def set_bias(self, node: ir.Node, array: np.ndarray, dtype: ir.DataType) -> None:
        """Give a node with a bias of its own (input 2) another one, or its first."""
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            set_constant(bias, array, dtype)
            return
        weight = node.inputs[1]
        node.resize_inputs(3)
        node.replace_input_with(2, self.constant(f"{weight.name if weight else node.name}_bias", array, dtype))

    def replace(self, node: ir.Node, nodes: list[ir.Node]) -> None:
        """Put `nodes` in the place of `node`; the last one's output takes the name of its first."""
        self.graph.insert_before(node, nodes)
        supplant(node.outputs[0], nodes[-1].outputs[0])
        self.remove(node)

    def remove(self, node: ir.Node) -> None:
        """Remove a node that nothing reads any more, and its constants if nothing else reads them."""
        inputs = [value for value in node.inputs if value is not None]
        self.graph.remove(node, safe=True)
        remove_unused(inputs)


# ------------------------------------------------------------------------------------------- the affine map


def _why_not_affine(node: ir.Node, graph: ir.Graph, opset: int) -> str | None:
    """Say why a BatchNormalization is no fixed affine map that this pass may rewrite."""
    if node.graph is not graph:
        return "it is inside the body of a control-flow node"
    if node.attributes.get_int("training_mode", 0):
        return "it is in training mode, where the statistics are those of each batch"
    extra = [value for value in node.outputs[1:] if value.name]
    if any(value.uses() or value.is_graph_output() or opset < 14 for value in extra):
        return "its statistics are outputs, which means training"
    tensors = [constant(value) for value in node.inputs[1:]]
    if any(tensor is None for tensor in tensors):
        return "its scale, bias, mean or variance is not constant"
    if any(tensor.dtype not in WIDE for tensor in tensors if tensor is not None):
        return "its parameters are of 16 bits, too few for the product"
    shapes = {tensor.shape.numpy() for tensor in tensors if tensor is not None}
    if len(shapes) != 1 or len(shapes.pop()) != 1:  # opset 8 could normalise every pixel by itself
        return "its parameters are not one number per channel"
    return _why_inexact(node)


def _why_inexact(node: ir.Node) -> str | None:
    """Say what float32 would lose in t = beta - mean s, where s mean is far larger than any output."""
    with np.errstate(all="ignore"):
        gamma, beta, mean, _ = _parameters(node)
        affine = _affine(node)
    if not all(np.isfinite(numbers).all() for numbers in affine):
        return "its parameters give no finite numbers"
    output = (np.abs(gamma) + np.abs(beta)).max(initial=0.0)  # a normalised input is of the order of 1
    lost = np.abs(mean * affine.s).max(initial=0.0) * np.finfo(np.float32).eps
    return "its mean is so far from 0 that float32 would lose the result" if lost > _CANCELLATION * output else None


def _parameters(node: ir.Node) -> list[np.ndarray]:
    """Scale, bias, mean and variance in float64."""
    tensors = (constant(value) for value in node.inputs[1:5])
    return [tensor.numpy().astype(np.float64) for tensor in tensors if tensor is not None]


def _affine(node: ir.Node) -> _Affine:
    gamma, beta, mean, var = _parameters(node)
    s = gamma / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5))
    return _Affine(s, beta - mean * s)


# ------------------------------------------------------------------------------------------- rules


def _behind(work: _Work, node: ir.Node, affine: _Affine) -> bool:
    """Rule 1 for the operators with a bias of their own."""
    y = node.inputs[0]
    linear = _producer(y, work.graph)
    along_outputs = ALONG_OUTPUTS.get(linear.op_type) if linear is not None else None
    if y is None or linear is None or along_outputs is None or work.read_elsewhere(node, y):
        return False
    weight = changeable(linear.inputs[1])
    bias = linear.inputs[2] if len(linear.inputs) > 2 else None
    old = float64(changeable(bias)) * linear.attributes.get_float("beta", 1.0) if bias is not None else 0.0
    s = along_outputs(linear, weight, affine.s)
    linear.attributes.pop("beta", None)
    scale(linear.inputs[1], s)
    work.set_bias(linear, old * affine.s + affine.t, weight.dtype)
    _take_over(work, node, y)
    return True


def _behind_matmul(work: _Work, node: ir.Node, affine: _Affine) -> bool:
    """Rule 1 for MatMul, whose bias is an Add."""
    y = node.inputs[0]
    add = _producer(y, work.graph)
    if y is None or y.shape is None or len(y.shape) != 2 or add is None or add.op_type not in ("Add", "MatMul"):
        return False
    product, bias = (y, None) if add.op_type == "MatMul" else _product_and_bias(add, work.graph)
    matmul = _producer(product, work.graph)
    weight_value = matmul.inputs[1] if matmul is not None else None
    if product is None or weight_value is None or constant(weight_value) is None:
        return False
    if work.read_elsewhere(node, y) or not (product is y or work.only_reader(add, product)):
        return False
    weight = changeable(weight_value)
    old = float64(changeable(bias)) if bias is not None else None
    s = along_axis(weight, 1, affine.s)
    scale(weight_value, s)
    if bias is None or old is None:
        t = work.constant(f"{weight_value.name}_bias", affine.t, weight.dtype)
        work.replace(node, [ir.node("Add", [y, t], name=work.names.fresh(f"{work.label(node)}_add"))])
    else:
        set_constant(bias, old * affine.s + affine.t, weight.dtype)
        _take_over(work, node, y)
    return True


def _before_conv(work: _Work, node: ir.Node, affine: _Affine) -> bool:
    """Rule 2."""
    x, y = node.inputs[0], node.outputs[0]
    users = [(user, index) for user, index in y.uses() if user.op_type == "Conv" and not user.domain and index == 0]
    if not users or users[0][0].graph is not work.graph or not work.only_reader(users[0][0], y):
        return False
    conv = users[0][0]
    padded = any(conv.attributes.get_ints("pads", ())) or conv.attributes.get_string("auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    )
    if padded:
        work.note(node, "fold-before", f"{conv.name} pads its input with zeros, which are no zeros before the norm")
        return False
    weight = changeable(conv.inputs[1])
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    old = float64(changeable(bias)) if bias is not None else 0.0
    s, t = (along_inputs(conv, weight, numbers) for numbers in affine)
    shift = (float64(weight) * t).sum(axis=tuple(range(1, len(weight.shape))))
    scale(conv.inputs[1], s)
    work.set_bias(conv, old + shift, weight.dtype)
    conv.replace_input_with(0, x)
    work.remove(node)
    return True


def _alone(work: _Work, node: ir.Node, affine: _Affine) -> bool:
    """Rule 3."""
    x, y = node.inputs[0], node.outputs[0]
    shape = x.shape if x is not None and x.shape is not None else y.shape
    dtype = (x.dtype if x is not None else None) or y.dtype or ir.DataType.FLOAT
    if shape is None or len(shape) < 2:
        return False
    if dtype not in WIDE:
        raise Stays(f"it computes in {dtype}, which has too few bits for Mul and Add")
    label = work.label(node)
    column = (-1, *(1 for _ in range(len(shape) - 2)))
    s, t = (
        work.constant(f"{label}_{suffix}", numbers.reshape(column), dtype)
        for suffix, numbers in zip(("scale", "shift"), affine, strict=True)
    )
    mul = ir.node("Mul", [x, s], name=work.names.fresh(f"{label}_mul"))
    product = mul.outputs[0]
    product.name, product.type, product.shape = work.names.fresh(f"{y.name}_scaled"), ir.TensorType(dtype), shape
    add = ir.node("Add", [product, t], name=work.names.fresh(f"{label}_add"))
    work.replace(node, [mul, add])
    return True


_RULES: dict[str, _Rule] = {
    "fold-behind": _behind,
    "fold-behind-matmul": _behind_matmul,
    "fold-before": _before_conv,
    "mul-add": _alone,
}


# ------------------------------------------------------------------------------------------- the graph


def _producer(value: ir.Value | None, graph: ir.Graph) -> ir.Node | None:
    """Return the node of the default domain in `graph` itself that makes `value`."""
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.graph is graph else None


def _product_and_bias(add: ir.Node, graph: ir.Graph) -> tuple[ir.Value | None, ir.Value | None]:
    """Which input of an Add comes from a MatMul, and the constant other one; (None, None) if that is not so."""
    for product, bias in (add.inputs, tuple(reversed(add.inputs))):
        matmul = _producer(product, graph)
        if matmul is not None and matmul.op_type == "MatMul" and constant(bias) is not None:
            return product, bias
    return None, None


def _take_over(work: _Work, node: ir.Node, y: ir.Value) -> None:
    """Let the input `y` of a BatchNormalization be its output."""
    supplant(node.outputs[0], y)
    work.remove(node)
