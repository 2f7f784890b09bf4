"""Layers with constant weights become the functions of kernels.py: a pass over Relax, in NHWC."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from tvm import relax, te
from tvm.ir import Op

from ..spaces.machine import Machine
from . import kernels
from .constants import number, rewritten

#: TVM's kOutEWiseFusable: elementwise functions behind it join it.
_FUSABLE = 4
_CONV2D, _MATMUL, _PAD, _PERMUTE = (
    Op.get(f"relax.{name}") for name in ("nn.conv2d", "matmul", "nn.pad", "permute_dims")
)
#: From NCHW to NHWC, and back.
_LAST, _SECOND = [0, 2, 3, 1], [0, 3, 1, 2]


def specialised(module: Any, machine: Machine) -> tuple[Any, dict[str, str]]:
    """Return the module with its layers as functions of our own, weights laid out for the machine.

    Also the hash of each layer's weights as they were ([kh, kw, C', O] or [K, N]) by that of what is laid out.
    """
    mutator = _Specialised(module)
    mutator.machine, mutator.was = machine, {}
    return rewritten(module, mutator), mutator.was


@relax.expr_functor.mutator
class _Specialised(relax.PyExprMutator):  # type: ignore[misc]
    """Layers as functions for a machine; `was` has the hashes of weights before they were laid out, by those behind."""

    machine: Machine
    was: dict[str, str]

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        made = None
        if call.op == _CONV2D:
            made = self.convolution(call)
        elif call.op == _MATMUL:
            made = self.product(call)
        return call if made is None else made

    def convolution(self, call: Any) -> Any:
        at, (x, weight) = call.attrs, call.args
        array, shape = number(weight), _shape(x)
        if array is None or shape is None or at.data_layout != "NHWC" or at.kernel_layout != "HWIO":
            return None
        top, left, bottom, right = (int(i) for i in at.padding)
        kh, kw, each, outputs = array.shape
        groups, fill = int(at.groups), 0.0
        around = None if any((top, left, bottom, right)) else self.around(x)
        if around is not None:
            x, (top, left, bottom, right), fill = around
        (sh, sw), (dh, dw) = (tuple(map(int, pair)) for pair in (at.strides, at.dilation))
        window = kernels.Window((kh, kw), (sh, sw), (top, left, bottom, right), (dh, dw), fill)
        if groups > 1 and each == 1 and outputs == groups:
            laid = kernels.packed_depthwise(array[:, :, 0], self.machine.lanes)
            return self.call(lambda a, w: kernels.depthwise(a, w, window), "depthwise", x, array, laid)
        fours = _bytes(array) and self.machine.dot is not None
        if fours and groups > 1 and each % 4:
            return None
        laid = kernels.packed(array, groups, self.machine.lanes, fours)
        return self.call(lambda a, w: kernels.convolution(a, w, outputs, window), "conv2d", x, array, laid)

    def around(self, x: Any) -> tuple[Any, tuple[int, int, int, int], float] | None:
        """Return what a Pad of positions alone reads, in NHWC, its (top, left, bottom, right) and its value."""
        turned = self.made_by(x, _PERMUTE)
        found = self.made_by(x if turned is None else turned.args[0], _PAD)
        if found is None or str(found.attrs.pad_mode) != "constant" or (turned is not None and not _is(turned, _LAST)):
            return None
        width = [int(i) for i in found.attrs.pad_width]
        if turned is not None:
            width = width[:2] + width[4:] + width[2:4]
        if any(width[:2] + width[6:]):
            return None
        inside = found.args[0]
        if turned is not None:
            before = self.made_by(inside, _PERMUTE)
            back = before is not None and _is(before, _SECOND)
            inside = before.args[0] if back else self.builder_.emit(relax.op.permute_dims(inside, _LAST))
        return inside, (width[2], width[4], width[3], width[5]), float(found.attrs.pad_value)

    def made_by(self, value: Any, op: Any) -> Any:
        """Return the call that made a value, if it is of an operator."""
        found = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        return found if getattr(found, "op", None) == op else None

    def product(self, call: Any) -> Any:
        x, weight = call.args
        array, shape = number(weight), _shape(x)
        if array is None or array.ndim != 2 or shape is None or len(shape) < 2:
            return None
        laid = kernels.packed(array[None, None], 1, self.machine.lanes, _bytes(array) and self.machine.dot is not None)
        outputs = array.shape[1]
        return self.call(lambda a, w: kernels.product(a, w, outputs), "dense", x, array, laid)

    def call(self, make: Any, name: str, x: Any, array: np.ndarray, weight: np.ndarray) -> Any:
        self.was[hashed(weight)] = hashed(array)

        given = [
            te.placeholder(kernels.dims(_shape(x) or ()), str(x.ty.dtype), name="x"),
            te.placeholder(kernels.dims(weight.shape), str(weight.dtype), name="w"),
        ]
        result = make(*given)
        function = te.create_prim_func([*given, result]).without_attr("global_symbol").with_attr("op_pattern", _FUSABLE)
        out = relax.TensorType([int(i) for i in result.shape], str(result.dtype))
        return relax.call_tir(self.builder_.add_func(function, name), [x, relax.const(weight)], out)


def hashed(array: np.ndarray) -> str:
    """Return a short hash of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _shape(value: Any) -> list[int] | None:
    """Return a tensor's dimensions, None where one is not a number."""
    try:
        return [int(i) for i in value.ty.shape]
    except (TypeError, ValueError, AttributeError):
        return None


def _bytes(array: np.ndarray) -> bool:
    return array.dtype.itemsize == 1


def _is(permutation: Any, axes: list[int]) -> bool:
    return [int(i) for i in permutation.attrs.axes or ()] == axes
