"""From an ONNX file to Relax: TVM's importer, with converters of our own where its own hide what is done.

Its converters of Clip and Pad make functions at once, in which no pass sees an operator: layouts could not be changed
across them. Ours say the same in Relax operators.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

from ....compiler.errors import ModelError
from ....compiler.types import InputSpec
from .constants import number

logger = logging.getLogger(__name__)


def imported(path: Path, inputs: Sequence[InputSpec]) -> Any:
    """Return the network as an IRModule with batch 1. ModelError where TVM's importer fails."""
    shapes = {spec.name: [1 if dim is None else dim for dim in spec.shape] for spec in inputs}
    said, theirs = io.StringIO(), onnx_frontend._get_convert_map()
    known = {**theirs, **{name: _converter(make, theirs.get(name)) for name, make in OURS.items()}}
    try:
        # it prints what it stumbles over before it raises
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(said),
            mock.patch.object(onnx_frontend, "_get_convert_map", lambda: known),
        ):
            return from_onnx(onnx.load(path), shape_dict=shapes)
    except Exception as error:  # TVM raises what it likes
        logger.debug("TVM's importer said: %s", said.getvalue())
        why = str(error).strip().splitlines()[0]
        raise ModelError(f"TVM cannot import it: {why}", where=str(path), fix="use --backend ort") from error


@dataclass(frozen=True)
class Node:
    """What a converter is given: the Relax builder, the node's inputs (None where left out), its attributes."""

    builder: Any
    inputs: Sequence[Any]
    attributes: dict[str, Any]
    opset: int

    def get(self, index: int) -> Any:
        """Return an input, None where it is left out."""
        return self.inputs[index] if len(self.inputs) > index else None

    def emit(self, call: Any) -> Any:
        """Return a call as a value whose type is known."""
        return self.builder.normalize(call)


Convert = Callable[[Node], Any]


def _converter(make: Convert, theirs: Any) -> Any:
    """Return a class as the importer wants it: ours where it gives something, else theirs."""

    class Converter:
        @staticmethod
        def get_converter(opset: int) -> Callable[..., Any]:
            def convert(builder: Any, inputs: Any, attributes: dict[str, Any], params: Any) -> Any:
                found = make(Node(builder, inputs, attributes, opset))
                return theirs.get_converter(opset)(builder, inputs, attributes, params) if found is None else found

            return convert

    return Converter


def bounded(x: Any, low: float | None, high: float | None) -> Any:
    """Return x between bounds; clip itself has no layout that can be changed. The type of x must be known."""
    dtype = str(x.ty.dtype)
    if low is not None and low > -np.inf:
        x = relax.op.maximum(x, relax.const(low, dtype))
    if high is not None and high < np.inf:
        x = relax.op.minimum(x, relax.const(high, dtype))
    return x


def _clip(node: Node) -> Any:
    ends: list[float | None] = []
    for index, name in ((1, "min"), (2, "max")):
        known = number(node.get(index))
        if (node.get(index) is not None and known is None) or (known is not None and known.size != 1):
            return None
        ends.append(node.attributes.get(name) if known is None else float(known.reshape(())))
    if "float" not in str(node.inputs[0].ty.dtype) or any(e is not None and np.isnan(e) for e in ends):
        return None
    return bounded(node.inputs[0], *ends)


def _hard_swish(node: Node) -> Any:
    (x,) = node.inputs[:1]
    dtype = str(x.ty.dtype)
    moved = node.emit(relax.op.add(x, relax.const(3.0, dtype)))
    return relax.op.multiply(x, relax.op.multiply(bounded(moved, 0.0, 6.0), relax.const(1 / 6, dtype)))


def _hard_sigmoid(node: Node) -> Any:
    (x,) = node.inputs[:1]
    alpha, beta = (node.attributes.get(name, usual) for name, usual in (("alpha", 0.2), ("beta", 0.5)))
    scaled = relax.op.multiply(x, relax.const(alpha, str(x.ty.dtype)))
    return bounded(node.emit(relax.op.add(scaled, relax.const(beta, str(x.ty.dtype)))), 0.0, 1.0)


def _folded_by(operator: str) -> Convert:
    """Return a converter of an operator of many inputs that takes them two by two: theirs stacks and reduces."""

    def convert(node: Node) -> Any:
        make = getattr(relax.op, operator)
        return functools.reduce(lambda one, other: node.emit(make(one, other)), node.inputs)

    return convert


def _mean(node: Node) -> Any:
    total = _folded_by("add")(node)
    return relax.op.multiply(total, relax.const(1.0 / len(node.inputs), str(total.ty.dtype)))


def _pow(node: Node) -> Any:
    """Say powers of a constant as products: theirs calls the C library for each number."""
    x, exponent = node.inputs[0], number(node.get(1))
    if exponent is None or exponent.size != 1 or "float" not in str(x.ty.dtype):
        return None
    make = _POWERS.get(float(exponent.reshape(())))
    power = relax.const(float(exponent.reshape(())), str(x.ty.dtype))
    return relax.op.power(x, power) if make is None else make(x)


_POWERS: dict[float, Callable[[Any], Any]] = {
    1.0: lambda x: relax.op.multiply(x, relax.const(1.0, str(x.ty.dtype))),
    2.0: lambda x: relax.op.multiply(x, x),
    3.0: lambda x: relax.op.multiply(relax.op.multiply(x, x), x),
    0.5: relax.op.sqrt,
    -1.0: lambda x: relax.op.divide(relax.const(1.0, str(x.ty.dtype)), x),
}


def _qlinear_conv(node: Node) -> Any:
    """Say it as Q/DQ around a Conv, which integers.py knows."""
    x, s, z, w, t, v, scale, zero, bias = (node.get(i) for i in range(9))
    if bias is not None:
        bias = node.emit(relax.op.multiply(relax.op.astype(bias, "float32"), relax.op.multiply(s, t)))
    given = [node.emit(relax.op.dequantize(x, s, z, axis=1)), node.emit(relax.op.dequantize(w, t, v, axis=0)), bias]
    made = onnx_frontend.Conv.get_converter(node.opset)(node.builder, given, dict(node.attributes), [{}, {}])
    return relax.op.quantize(node.emit(made), scale, zero, axis=1, out_dtype=str(zero.ty.dtype))


def _qlinear_matmul(node: Node) -> Any:
    a, s, z, b, t, v, scale, zero = (node.get(i) for i in range(8))
    one, other = relax.op.dequantize(a, s, z, axis=0), relax.op.dequantize(b, t, v, axis=-1)
    made = node.emit(relax.op.matmul(node.emit(one), node.emit(other)))
    return relax.op.quantize(made, scale, zero, axis=0, out_dtype=str(zero.ty.dtype))


def _conv_integer(node: Node) -> Any:
    """Sum in 32 bits, exactly; not on dot products of bytes."""
    x, w, z, v = (node.get(i) for i in range(4))
    wide = [relax.op.astype(value, "int32") for value in (x, w)]
    if z is not None:
        wide[0] = relax.op.subtract(wide[0], relax.op.astype(z, "int32"))
    if v is not None:
        zeros = v if v.ty.ndim == 0 else relax.op.reshape(v, [-1] + [1] * (w.ty.ndim - 1))
        wide[1] = relax.op.subtract(wide[1], relax.op.astype(zeros, "int32"))
    given = [*(node.emit(value) for value in wide), None]
    return onnx_frontend.Conv.get_converter(node.opset)(node.builder, given, dict(node.attributes), [{}, {}])


def _pad(node: Node) -> Any:
    """Pad with a constant, by numbers that are known, on all axes, nowhere less than nothing."""
    pads, fill = number(node.get(1)), number(node.get(2))
    plain = node.attributes.get("mode", b"constant") == b"constant" and node.get(3) is None
    if pads is None or not plain or (pads < 0).any() or (fill is None and node.get(2) is not None):
        return None
    widths = [int(i) for i in np.asarray(pads).reshape(2, -1).T.reshape(-1)]
    return relax.op.nn.pad(node.inputs[0], widths, "constant", 0.0 if fill is None else float(fill.reshape(())))


OURS: dict[str, Convert] = {
    "Clip": _clip,
    "HardSwish": _hard_swish,
    "HardSigmoid": _hard_sigmoid,
    "Pad": _pad,
    "Max": _folded_by("maximum"),
    "Min": _folded_by("minimum"),
    "Sum": _folded_by("add"),
    "Mean": _mean,
    "Pow": _pow,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "ConvInteger": _conv_integer,
}
