"""Q/DQ pairs become integer arithmetic: a pass over Relax, before anything is folded.

A layer that reads DQ(x) with scale s and zero point z, and weights DQ(w) with scales t_o and no zero point, computes

    y_o = sum s (x - z) t_o w = s t_o (sum x w - z sum w)

so the sum runs in 32-bit integers over bytes as they are, filled up with z at the edges, and -z sum w is a constant.
What follows (bias, ReLU, the next Q) stays in float32 and is fused behind the sum, in registers: float requantization.
Sums are exact: |sum| <= 255 x 128 x terms < 2^31 for up to 65,793 terms; layers with more stay in floats. Bytes are
moved by 128 to the signedness that the machine's dot product wants, in the Q before it.

Q and DQ that are left become elementwise operators. Q multiplies by 1/s, rounded to float32, where ONNX Runtime
divides: the two differ, by one step, only where x/s is within 1e-7 of a half. `fixed_point` requantizes by integers
alone (fixed_point.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Op

from ..spaces.machine import Dot, Machine
from .constants import number, rewritten
from .fixed_point import LARGEST, dyadic
from .importer import bounded

#: Most products of two bytes in a sum that 32 bits hold.
_MOST = (2**31 - 1) // (255 * 128)
#: x + this - this is x rounded, ties to even, for |x| < 2^22: float32 has no digits behind the point there. Said in a
#: tensor each time, lest a compiler takes it away; TVM calls the C library for each number of its own rounding.
_ROUND = np.array([1.5 * 2**23], np.float32)
#: From NCHW to NHWC, and back.
_LAST, _SECOND = [0, 2, 3, 1], [0, 3, 1, 2]
_CONV2D, _MATMUL, _QUANTIZE, _DEQUANTIZE, _PERMUTE, _ADD, _RELU, _RESHAPE = (
    Op.get(f"relax.{name}")
    for name in ("nn.conv2d", "matmul", "quantize", "dequantize", "permute_dims", "add", "nn.relu", "reshape")
)


@dataclass(frozen=True, eq=False)
class Total:
    """A layer as a sum of integers: y = factor (value + constant), `value` int32, the others by output channel.

    `along` is the shape in which a number for each output channel is broadcast.
    """

    value: Any
    constant: np.ndarray
    factor: np.ndarray
    along: tuple[int, ...]


def in_integers(module: Any, machine: Machine, *, fixed_point: bool = False) -> Any:
    """Return the module with its quantized layers in integers, and no Q or DQ; `fixed_point` as in fixed_point.py."""

    def prepared(mutator: Any, function: Any) -> None:
        mutator.dot, mutator.fixed_point = machine.dot, fixed_point
        mutator.before = {b.var: b.value for block in function.body.blocks for b in block.bindings}
        uses = Counter(a for value in mutator.before.values() for a in getattr(value, "args", ()) if _is_variable(a))
        mutator.once = {variable for variable, count in uses.items() if count == 1}

    return rewritten(module, _Integers(module), prepared)


def _is_variable(value: Any) -> bool:
    return isinstance(value, relax.Var)


@relax.expr_functor.mutator
class _Integers(relax.PyExprMutator):  # type: ignore[misc]
    """Layers and Q/DQ pairs as integer arithmetic.

    `dot` is the machine's dot product, `before` what made a value, `once` the values that are read by one call alone.
    """

    dot: Dot | None
    fixed_point: bool
    before: dict[Any, Any]
    once: set[Any]

    def visit_call_(self, call: Any) -> Any:
        made = None
        if call.op in (_CONV2D, _MATMUL):
            made = self.layer(call)
        elif call.op == _QUANTIZE and self.fixed_point:
            made = self.requantized(call)
        elif call.op == _PERMUTE:
            made = self.unanchored(call)
        call = super().visit_call_(call) if made is None else made
        if made is None and call.op == _QUANTIZE:
            return self.quantized(call)
        if made is None and call.op == _DEQUANTIZE:
            return self.dequantized(call)
        return call

    def layer(self, call: Any) -> Any:
        """Return a layer as a sum of integers and a factor in float32; None where it is no such layer."""
        total = self.total(call)
        if total is None:
            return None
        value = total.value
        if total.constant.any():
            constant = total.constant.reshape(total.along).astype(np.int32)
            value = self.builder_.emit(relax.op.add(value, relax.const(constant, "int32")))
        factor = total.factor.reshape(total.along).astype(np.float32)
        return relax.op.multiply(relax.op.astype(value, "float32"), relax.const(factor, "float32"))

    def requantized(self, call: Any) -> Any:
        """Return a Q right behind a layer, or its bias, or its ReLU, by integers alone; None where it is none."""
        x, scale, zero = call.args
        s, z, kind = number(scale), number(zero), str(call.attrs.out_dtype)
        relu = self.only(x, _RELU)
        added = self.only(x if relu is None else relu.args[0], _ADD)
        inner = added.args[0] if added is not None else x if relu is None else relu.args[0]
        layer = self._either(inner)
        bias = np.zeros(1) if added is None else number(added.args[1])
        if layer is None or bias is None or s is None or z is None or s.size != 1 or kind not in ("int8", "uint8"):
            return None
        total = self.total(layer)
        parts = None if total is None else dyadic(total.factor / np.float64(s.reshape(())))
        if total is None or parts is None or not _by_channel(bias, total.along):
            return None
        m, n = (part.reshape(total.along) for part in parts)
        steps = np.rint(bias.reshape(-1).astype(np.float64) / total.factor)
        if np.abs(steps).max() > LARGEST:
            return None
        whole = total.constant + steps.astype(np.int64)
        known = {"m": m, "n": n, "constant": whole.reshape(total.along), "half": np.int64(1) << (n - 1)}
        c = {name: relax.const(np.ascontiguousarray(value), "int64") for name, value in known.items()}
        value = relax.op.add(relax.op.astype(total.value, "int64"), c["constant"])
        value = relax.op.right_shift(relax.op.add(relax.op.multiply(value, c["m"]), c["half"]), c["n"])
        z0, limits = int(z.reshape(())), np.iinfo(kind)
        moved = self.builder_.emit(relax.op.add(value, along(np.array([z0]), call, 0, "int64")))
        low = max(limits.min, z0) if relu is not None else limits.min
        return relax.op.astype(bounded(moved, low, limits.max), kind)

    def unanchored(self, call: Any) -> Any:
        """Return the Q inside T'(reshape(Q(reshape(T(x))))), passes/anchor_layout.py: it is of use elsewhere alone."""
        chain, value = [call], call.args[0]
        for op in (_RESHAPE, _QUANTIZE, _RESHAPE, _PERMUTE):
            found = self.source(value, op)
            if found is None:
                return None
            chain.append(found)
            value = found.args[0]
        _, back, q, _, there = chain
        scale = number(q.args[1])
        turns = [[int(i) for i in one.attrs.axes or ()] for one in (there, call)]
        if turns != [_LAST, _SECOND] or scale is None or scale.size != 1 or _sizes(back) != _sizes(there):
            return None
        inner = relax.op.quantize(value, *q.args[1:], axis=1, out_dtype=str(q.attrs.out_dtype))
        return self.quantized(self.builder_.normalize(self._with_new(inner)))

    def _with_new(self, call: Any) -> Any:
        """Return a call with its arguments as they are rewritten."""
        return super().visit_call_(call)

    def only(self, value: Any, op: Any) -> Any:
        """Return the call of an operator that made a value which nothing else reads."""
        return self.source(value, op) if value in self.once else None

    def _either(self, value: Any) -> Any:
        convolution = self.only(value, _CONV2D)
        return self.only(value, _MATMUL) if convolution is None else convolution

    def source(self, value: Any, op: Any) -> Any:
        """Return the call that made a value, if it is of an operator."""
        found = self.before.get(value, value) if isinstance(value, relax.Var) else value
        return found if getattr(found, "op", None) == op else None

    def total(self, call: Any) -> Total | None:
        """Return a layer as a sum of integers; None where it is no quantized layer, or the sum may overflow."""
        x, weight = self.source(call.args[0], _DEQUANTIZE), self.weight(call.args[1])
        if x is None or weight is None:
            return None
        given, scale, zero = x.args
        s, z, (w, t) = number(scale), number(zero), weight
        convolution = call.op == _CONV2D
        if w.ndim != (4 if convolution else 2):
            return None
        outputs = w.shape[0 if convolution else 1]
        kind = str(given.ty.dtype)
        if s is None or z is None or s.size != 1 or z.size != 1 or w.size // outputs > _MOST:
            return None
        if kind not in ("int8", "uint8") or t.size not in (1, outputs):
            return None
        value, z0 = self.visit_expr(given), int(z.reshape(()))
        if self.dot is not None and kind != self.dot.activations:
            move = 128 if kind == "int8" else -128
            wide = relax.op.add(relax.op.astype(value, "int16"), relax.const(np.int16(move), "int16"))
            value, z0 = self.builder_.emit(relax.op.astype(wide, self.dot.activations)), z0 + move
        factor = np.broadcast_to(np.float64(s.reshape(())) * t.astype(np.float64).reshape(-1), (outputs,))
        axes = tuple(range(1, w.ndim)) if convolution else (0,)
        constant = -z0 * w.astype(np.int64).sum(axis=axes)
        if convolution:
            made, shape = self._convolution(call, value, z0, w), (1, -1, *(1 for _ in w.shape[2:]))
        else:
            made, shape = relax.op.matmul(value, relax.const(w), out_dtype="int32"), (-1,)
        return Total(self.builder_.emit(made), constant, factor, shape)

    def _convolution(self, call: Any, value: Any, zero: int, w: np.ndarray) -> Any:
        """Return the sum over taps; the edges are filled up with the zero point."""
        at, pads = call.attrs, [int(p) for p in call.attrs.padding]
        if any(pads):
            top, left, bottom, right = pads
            width = [0, 0, 0, 0, top, bottom, left, right]
            value = self.builder_.emit(relax.op.nn.pad(value, width, "constant", float(zero)))
        weight = relax.const(w)
        return relax.op.nn.conv2d(
            value, weight, at.strides, 0, at.dilation, at.groups, "NCHW", "OIHW", out_dtype="int32"
        )

    def weight(self, value: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Return int8 weights and their scales, where a value is DQ of a constant, turned or not."""
        turned = self.source(value, _PERMUTE)
        found = self.source(value if turned is None else turned.args[0], _DEQUANTIZE)
        parts = None if found is None else [number(a) for a in found.args]
        if parts is None or any(p is None for p in parts):
            return None
        w, t, z = parts
        if w is None or t is None or z is None or w.dtype.itemsize != 1:
            return None
        if w.dtype == np.uint8 and (z == 128).all():
            w, z = (w.astype(np.int16) - 128).astype(np.int8), np.zeros_like(z)
        if turned is not None and [int(i) for i in turned.attrs.axes or (1, 0)] != [1, 0]:
            return None
        outputs_first = w.ndim > 2 or turned is not None
        axis = int(found.attrs.axis) % max(w.ndim, 1)
        if z.any() or w.dtype != np.int8 or (t.size > 1 and axis != (0 if outputs_first else w.ndim - 1)):
            return None
        return (w if turned is None else np.ascontiguousarray(w.T)), t

    def quantized(self, call: Any) -> Any:
        x, scale, zero = call.args
        s, z = number(scale), number(zero)
        kind = str(call.attrs.out_dtype)
        if s is None or z is None or kind not in ("int8", "uint8", "int16", "uint16"):
            return call
        by, limits = (1.0 / s.astype(np.float64)).astype(np.float32), np.iinfo(kind)
        low, high = (limit - z.astype(np.float32) for limit in (limits.min, limits.max))
        found = relax.op.multiply(x, along(by, x, call.attrs.axis))
        # z is a whole number: what is bounded first is rounded to the same
        found = relax.op.maximum(found, along(low, x, call.attrs.axis))
        found = relax.op.minimum(found, along(high, x, call.attrs.axis))
        for make in (relax.op.add, relax.op.subtract):
            found = make(found, along(_ROUND, x, 0))
        if z.any():
            found = relax.op.add(found, along(z.astype(np.float32), x, call.attrs.axis))
        return relax.op.astype(found, kind)

    def dequantized(self, call: Any) -> Any:
        x, scale, zero = call.args
        s, z = number(scale), number(zero)
        kind = str(x.ty.dtype)
        if s is None or z is None or kind not in ("int8", "uint8", "int16", "uint16", "int32"):
            return call
        found = relax.op.astype(x, "float32")
        if z.any():
            found = relax.op.subtract(found, along(z.astype(np.float32), x, call.attrs.axis))
        return relax.op.multiply(found, along(s.astype(np.float32), x, call.attrs.axis))


def _by_channel(bias: np.ndarray, along: tuple[int, ...]) -> bool:
    """Say whether a bias is one number, or one for each output channel in the shape in which these are broadcast."""
    shape = (1,) * (len(along) - bias.ndim) + bias.shape
    return bias.size == 1 or (len(shape) == len(along) and all(a in (-1, b) for a, b in zip(along, shape, strict=True)))


def _sizes(value: Any) -> list[int]:
    return [int(i) for i in value.ty.shape]


def along(values: np.ndarray, x: Any, axis: int, dtype: str = "float32") -> Any:
    """Return numbers as a constant that x can be multiplied by: one, or one for each index of an axis.

    One is a tensor, too: scalars would be written into the function, which were another one in each network then.
    """
    shape = [1] * x.ty.ndim
    if values.size > 1:
        shape[int(axis)] = -1
    return relax.const(values.reshape(shape), dtype)
