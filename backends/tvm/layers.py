"""Layers with constant weights become the functions of kernels.py: a pass over Relax, in NHWC."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import kernels
from .machine import Machine

#: TVM's kOutEWiseFusable: elementwise functions behind it join it.
_FUSABLE = 4


def specialised(module: Any, machine: Machine) -> Any:
    """Return the module with its layers as functions of our own, weights laid out for the machine."""
    from tvm import relax
    from tvm.ir import Op

    conv2d, matmul, pad = (Op.get(f"relax.{name}") for name in ("nn.conv2d", "matmul", "nn.pad"))

    @relax.expr_functor.mutator
    class Specialised(relax.PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = super().visit_call_(call)
            made = None
            if call.op == conv2d:
                made = self.convolution(call)
            elif call.op == matmul:
                made = self.product(call)
            return call if made is None else made

        def convolution(self, call: Any) -> Any:
            at, (x, weight) = call.attrs, call.args
            array, shape = _constant(weight), _shape(x)
            if array is None or shape is None or at.data_layout != "NHWC" or at.kernel_layout != "HWIO":
                return None
            top, left, bottom, right = (int(i) for i in at.padding)
            kh, kw, each, outputs = array.shape
            groups, fill = int(at.groups), 0.0
            before = self.lookup_binding(x) if isinstance(x, relax.Var) else None
            if before is not None and getattr(before, "op", None) == pad and not any((top, left, bottom, right)):
                around = _around(before)
                if around is not None:
                    (top, left, bottom, right), fill = around
                    x = before.args[0]
            window = kernels.Window(
                (kh, kw), tuple(map(int, at.strides)), (top, left, bottom, right), tuple(map(int, at.dilation)), fill
            )  # type: ignore[arg-type]
            if groups > 1 and each == 1 and outputs == groups:
                laid = kernels.packed_depthwise(array[:, :, 0], machine.lanes)
                return self.call(lambda a, w: kernels.depthwise(a, w, window), "depthwise", x, laid)
            fours = _bytes(array) and machine.dot is not None
            if fours and groups > 1 and each % 4:
                return None
            laid = kernels.packed(array, groups, machine.lanes, fours)
            return self.call(lambda a, w: kernels.convolution(a, w, outputs, window), "conv2d", x, laid)

        def product(self, call: Any) -> Any:
            x, weight = call.args
            array, shape = _constant(weight), _shape(x)
            if array is None or array.ndim != 2 or shape is None or len(shape) < 2:
                return None
            laid = kernels.packed(array[None, None], 1, machine.lanes, _bytes(array) and machine.dot is not None)
            outputs = array.shape[1]
            return self.call(lambda a, w: kernels.product(a, w, outputs), "dense", x, laid)

        def call(self, make: Any, name: str, x: Any, weight: np.ndarray) -> Any:
            from tvm import te

            given = [
                te.placeholder(kernels.dims(_shape(x) or ()), str(x.ty.dtype), name="x"),
                te.placeholder(kernels.dims(weight.shape), str(weight.dtype), name="w"),
            ]
            result = make(*given)
            function = te.create_prim_func([*given, result]).without_attr("global_symbol").with_attr("op_pattern", _FUSABLE)
            out = relax.TensorType([int(i) for i in result.shape], str(result.dtype))
            return relax.call_tir(self.builder_.add_func(function, name), [x, relax.const(weight)], out)

    found = Specialised(module)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            found.builder_.update_func(name, found.visit_expr(function))
    return found.builder_.get()


def _constant(value: Any) -> np.ndarray | None:
    return value.value.numpy() if hasattr(value, "value") and hasattr(value.value, "numpy") else None


def _shape(value: Any) -> list[int] | None:
    """Return a tensor's dimensions, None where one is not a number."""
    try:
        return [int(i) for i in value.ty.shape]
    except (TypeError, ValueError, AttributeError):
        return None


def _bytes(array: np.ndarray) -> bool:
    return array.dtype.itemsize == 1


def _around(pad: Any) -> tuple[tuple[int, int, int, int], float] | None:
    """Return (top, left, bottom, right) and the value of a Pad in NHWC that fills up positions alone."""
    width = [int(i) for i in pad.attrs.pad_width]
    if str(pad.attrs.pad_mode) != "constant" or any(width[:2] + width[6:]):
        return None
    return (width[2], width[4], width[3], width[5]), float(pad.attrs.pad_value)
