"""What a Q/DQ file means, computed on integers: the numbers that its kernels of 8 bits give. Needs numpy and onnx.

Algebra. With x = s_x q_x and w_c = s_w,c q_w,c for output channel c, a layer's real result is

    y_c = s_x s_w,c (sum q_x q_w) + b_c        the sum in int32, which must hold it; the bias a float

What stands between that and the next QuantizeLinear (normalisation, activation, residual Add) is computed on reals, in
float64. QuantizeLinear divides by its scale, rounds half to even and saturates:

    q = min(max(rint(y / s), -128), 127)

Averages are sums of integers, too. Data movement and all other operators: onnx's reference evaluator, on float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from qdq_graph import Graph, Node

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Integers:
    """A dequantized tensor before it is multiplied out: integers, and one scale, or one for each index of `axis`."""

    q: np.ndarray
    scale: np.ndarray
    axis: int

    @property
    def real(self) -> np.ndarray:
        scale = self.scale.astype(np.float64)
        if scale.size > 1:
            scale = scale.reshape([-1 if i == self.axis % self.q.ndim else 1 for i in range(self.q.ndim)])
        return self.q * scale


Value = np.ndarray | Integers


def simulate(
    path: Path, feed: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Return what every QuantizeLinear gives (int64), and the graph outputs (float64 where they are floats).

    `given` maps quantized tensors to integers with which to go on in place of the ones computed, which are returned all
    the same: each stretch from pair to pair is then judged by itself.
    """
    graph = Graph(path)
    values: dict[str, Value] = {name: _wide(array) for name, array in {**graph.constants, **feed}.items()}
    found: dict[str, np.ndarray] = {}
    for node in graph.nodes:
        inputs = [values[name] if name else None for name in node.inputs]
        results = _run(node, inputs, graph.opset)
        values.update(zip(node.outputs, results, strict=True))
        if node.op == "QuantizeLinear":
            found[node.outputs[0]] = results[0]
            values.update({name: given[name].astype(np.int64) for name in node.outputs if name in (given or {})})
    return found | {name: _real(values[name]) for name in graph.outputs}


def _run(node: Node, inputs: list[Value | None], opset: int) -> list[Value]:
    if node.op == "QuantizeLinear":
        return [_quantize(_real(inputs[0]), inputs[1], node.attributes.get("axis", 1))]
    if node.op == "DequantizeLinear":
        return [Integers(inputs[0].astype(np.int64), inputs[1], node.attributes.get("axis", 1))]
    if node.op in _LAYERS:
        return [_layer(node, *inputs[:2], None if len(inputs) < 3 else inputs[2])]
    if node.op in ("AveragePool", "GlobalAveragePool") and isinstance(inputs[0], Integers):
        return [_average(node, inputs[0])]
    return _reference(node, [None if v is None else _real(v) for v in inputs], opset)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if array.dtype in (np.float32, np.float16) else array


def _real(value: Value) -> np.ndarray:
    return value.real if isinstance(value, Integers) else value


def _quantize(x: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    if scale.size > 1:
        scale = scale.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int64)


# ------------------------------------------------------------------------------------------ layers


def _layer(node: Node, x: Value, w: Value, bias: np.ndarray | None) -> np.ndarray:
    """Sum products of integers where both factors are some, else of reals, and scale each output channel."""
    compute, channel = _LAYERS[node.op]
    if not (isinstance(x, Integers) and isinstance(w, Integers)):
        y = compute(node, _real(x), _real(w))
    else:
        y = compute(node, x.q, w.q)
        assert np.abs(y).max(initial=0) <= _INT32, f"{node.name}: the sum does not fit into int32"
        assert x.scale.size == 1, f"{node.name}: its activation has several scales"
        factors = float(x.scale) * w.scale.astype(np.float64).reshape(-1)
        y = y * factors.reshape([-1 if i == channel % y.ndim else 1 for i in range(y.ndim)])
    if bias is not None:
        shape = [-1] + [1] * (y.ndim - 2) if node.op.startswith("Conv") else bias.shape
        y = y + _real(bias).reshape(shape) * node.attributes.get("beta", 1.0)
    return y


def _convolution(node: Node, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(N, C, H, W) by (out, C / group, k, l): the sum over each window."""
    stride, pads, dilation, groups = _geometry(node)
    x = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    windows = _windows(x, w.shape[2:], stride, dilation)  # (N, C, H', W', k, l)
    parts = [
        np.einsum("nchwkl,ockl->nohw", a, b, optimize=False)
        for a, b in zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True)
    ]
    return np.concatenate(parts, 1)


def _transposed(node: Node, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(N, C, H, W) by (C, out / group, k, l): each number paints a window."""
    stride, pads, dilation, groups = _geometry(node)
    (n, _, height, width), (_, outs, rows, columns) = x.shape, w.shape
    size = [(length - 1) * s + (k - 1) * d + 1
            for length, s, k, d in zip((height, width), stride, (rows, columns), dilation, strict=True)]  # fmt: skip
    y = np.zeros((n, outs * groups, *size), dtype=x.dtype)
    for g, (a, b) in enumerate(zip(np.split(x, groups, 1), np.split(w, groups, 0), strict=True)):
        for r in range(rows):
            for c in range(columns):
                top, left = r * dilation[0], c * dilation[1]
                area = (slice(top, top + (height - 1) * stride[0] + 1, stride[0]),
                        slice(left, left + (width - 1) * stride[1] + 1, stride[1]))  # fmt: skip
                y[:, g * outs : (g + 1) * outs, area[0], area[1]] += np.einsum("nchw,co->nohw", a, b[:, :, r, c])
    return y[:, :, pads[0] : size[0] - pads[2], pads[1] : size[1] - pads[3]]


def _gemm(node: Node, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    assert node.attributes.get("alpha", 1.0) == 1.0 and not node.attributes.get("transA", 0)
    return x @ (w.T if node.attributes.get("transB", 0) else w)


def _matmul(node: Node, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x @ w


_LAYERS = {"Conv": (_convolution, 1), "ConvTranspose": (_transposed, 1), "Gemm": (_gemm, 1), "MatMul": (_matmul, -1)}


def _geometry(node: Node) -> tuple[list[int], list[int], list[int], int]:
    given = node.attributes
    assert given.get("auto_pad", b"NOTSET") == b"NOTSET" and "output_shape" not in given
    assert not any(given.get("output_padding", [0]))
    return (
        given.get("strides", [1, 1]),
        given.get("pads", [0] * 4),
        given.get("dilations", [1, 1]),
        given.get("group", 1),
    )


def _windows(x: np.ndarray, kernel: tuple[int, ...], stride: list[int], dilation: list[int]) -> np.ndarray:
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(2, 3))
    return windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def _average(node: Node, x: Integers) -> np.ndarray:
    """Sum integers over each window, then divide by how many there are, padding counted or not."""
    if node.op == "GlobalAveragePool":
        return x.q.sum(axis=(2, 3), keepdims=True) * float(x.scale) / math.prod(x.q.shape[2:])
    stride, pads, dilation, _ = _geometry(node)
    kernel, border = node.attributes["kernel_shape"], ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3]))
    assert not node.attributes.get("ceil_mode", 0)
    there = np.pad(np.ones_like(x.q), border, constant_values=node.attributes.get("count_include_pad", 0))
    sums, counts = (_windows(a, kernel, stride, dilation).sum(axis=(4, 5)) for a in (np.pad(x.q, border), there))
    return sums * float(x.scale) / counts


# ------------------------------------------------------------------------------------------ all else


def _reference(node: Node, inputs: list[np.ndarray | None], opset: int) -> list[np.ndarray]:
    feed = {name: array for name, array in zip(node.inputs, inputs, strict=True) if name}
    ends = [[onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names if name]
            for names in (dict.fromkeys(node.inputs), node.outputs)]  # fmt: skip
    graph = onnx.helper.make_graph([node.proto], "one node", *ends)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [_wide(np.asarray(array)) for array in ReferenceEvaluator(model).run(None, feed)]
