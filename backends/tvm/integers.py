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

from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Op

from .constants import number, rewritten
from .importer import bounded
from .machine import Dot, Machine

#: Most products of two bytes in a sum that 32 bits hold.
_MOST = (2**31 - 1) // (255 * 128)
_CONV2D, _MATMUL, _QUANTIZE, _DEQUANTIZE, _PERMUTE = (
    Op.get(f"relax.{name}") for name in ("nn.conv2d", "matmul", "quantize", "dequantize", "permute_dims")
)


def in_integers(module: Any, machine: Machine) -> Any:
    """Return the module with its quantized layers in integers, and no Q or DQ."""

    def prepared(mutator: Any, function: Any) -> None:
        mutator.dot = machine.dot
        mutator.before = {b.var: b.value for block in function.body.blocks for b in block.bindings}

    return rewritten(module, _Integers(module), prepared)


@relax.expr_functor.mutator
class _Integers(relax.PyExprMutator):  # type: ignore[misc]
    """Layers and Q/DQ pairs as integer arithmetic; `dot` is the machine's dot product, `before` what made a value."""

    dot: Dot | None
    before: dict[Any, Any]

    def visit_call_(self, call: Any) -> Any:
        made = None
        if call.op in (_CONV2D, _MATMUL):
            made = self.layer(call)
        call = super().visit_call_(call) if made is None else made
        if made is None and call.op == _QUANTIZE:
            return self.quantized(call)
        if made is None and call.op == _DEQUANTIZE:
            return self.dequantized(call)
        return call

    def source(self, value: Any, op: Any) -> Any:
        """Return the call that made a value, if it is of an operator."""
        found = self.before.get(value, value) if isinstance(value, relax.Var) else value
        return found if getattr(found, "op", None) == op else None

    def layer(self, call: Any) -> Any:
        x, weight = (self.source(call.args[0], _DEQUANTIZE), self.weight(call.args[1]))
        if x is None or weight is None:
            return None
        given, scale, zero = x.args
        s, z = number(scale), number(zero)
        w, t = weight
        convolution = call.op == _CONV2D
        outputs = w.shape[0 if convolution else 1]
        terms = w.size // outputs
        if s is None or z is None or s.size != 1 or z.size != 1 or terms > _MOST:
            return None
        kind = str(given.ty.dtype)
        if kind not in ("int8", "uint8") or t.size not in (1, outputs):
            return None
        value, z0 = self.visit_expr(given), int(z.reshape(()))
        if self.dot is not None and kind != self.dot.activations:
            move = 128 if kind == "int8" else -128
            wide = relax.op.add(relax.op.astype(value, "int16"), relax.const(np.int16(move)))
            value, z0 = self.builder_.emit(relax.op.astype(wide, self.dot.activations)), z0 + move
        axes = tuple(range(1, w.ndim)) if convolution else (0,)
        summed = -z0 * w.astype(np.int64).sum(axis=axes)
        if convolution:
            shape = (1, -1) + (1,) * (w.ndim - 2)
            at, pads = call.attrs, [int(p) for p in call.attrs.padding]
            if any(pads):
                top, left, bottom, right = pads
                width = [0, 0, 0, 0, top, bottom, left, right]
                value = self.builder_.emit(relax.op.nn.pad(value, width, "constant", float(z0)))
            total = relax.op.nn.conv2d(
                value, relax.const(w), at.strides, 0, at.dilation, at.groups, "NCHW", "OIHW", out_dtype="int32"
            )
        else:
            shape = (-1,)
            total = relax.op.matmul(value, relax.const(w), out_dtype="int32")
        total = self.builder_.emit(total)
        if z0:
            total = self.builder_.emit(relax.op.add(total, relax.const(summed.reshape(shape).astype(np.int32))))
        factor = (np.float64(s.reshape(())) * t.astype(np.float64).reshape(-1)).astype(np.float32)
        factor = np.broadcast_to(factor, (outputs,)).reshape(shape)
        return relax.op.multiply(relax.op.astype(total, "float32"), relax.const(np.ascontiguousarray(factor)))

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
        outputs_first = w.ndim > 2 or turned is not None
        axis = int(found.attrs.axis) % w.ndim
        if z.any() or w.dtype != np.int8 or (t.size > 1 and axis != (0 if outputs_first else w.ndim - 1)):
            return None
        if turned is not None:
            if w.ndim != 2:
                return None
            w = np.ascontiguousarray(w.T)
        return w, t

    def quantized(self, call: Any) -> Any:
        x, scale, zero = call.args
        s, z = number(scale), number(zero)
        kind = str(call.attrs.out_dtype)
        if s is None or z is None or kind not in ("int8", "uint8", "int16", "uint16"):
            return call
        by = (1.0 / s.astype(np.float64)).astype(np.float32)
        found = relax.op.round(relax.op.multiply(x, along(by, x, call.attrs.axis)))
        if z.any():
            found = relax.op.add(found, along(z.astype(np.float32), x, call.attrs.axis))
        limits = np.iinfo(kind)
        return relax.op.astype(bounded(self.builder_.normalize(found), limits.min, limits.max), kind)

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


def along(values: np.ndarray, x: Any, axis: int) -> Any:
    """Return numbers as a constant that x can be multiplied by: one, or one for each index of an axis.

    One is a tensor, too: scalars would be written into the function, which were another one in each network then.
    """
    shape = [1] * x.ty.ndim
    if values.size > 1:
        shape[int(axis)] = -1
    return relax.const(values.reshape(shape))
