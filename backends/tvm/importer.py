"""From an ONNX file to Relax: TVM's importer, with converters of our own where its own hide what is done.

Its converters of Clip and Pad make functions at once, in which no pass sees an operator: layouts could not be changed
across them. Ours say the same in Relax operators.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

from ...compiler.errors import ModelError
from ...compiler.types import InputSpec
from .constants import number

logger = logging.getLogger(__name__)


def imported(path: Path, inputs: Sequence[InputSpec]) -> Any:
    """Return the network as an IRModule with batch 1. ModelError where TVM's importer fails."""
    shapes = {spec.name: [1 if dim is None else dim for dim in spec.shape] for spec in inputs}
    said, theirs = io.StringIO(), onnx_frontend._get_convert_map()
    ours = {name: _converter(make, theirs[name]) for name, make in _OURS.items()}
    try:
        # it prints what it stumbles over before it raises
        with contextlib.redirect_stdout(said), _converters(onnx_frontend, {**theirs, **ours}):
            return from_onnx(onnx.load(path), shape_dict=shapes)
    except Exception as error:  # TVM raises what it likes
        logger.debug("TVM's importer said: %s", said.getvalue())
        why = str(error).strip().splitlines()[0]
        raise ModelError(f"TVM cannot import it: {why}", where=str(path), fix="use --backend ort") from error


@contextlib.contextmanager
def _converters(frontend: Any, known: dict[str, Any]) -> Iterator[None]:
    with mock.patch.object(frontend, "_get_convert_map", lambda: known):
        yield


Convert = Callable[[Any, dict[str, Any]], Any]


def _converter(make: Convert, theirs: Any) -> Any:
    """Return a class as the importer wants it: ours where it gives something, else theirs."""

    class Converter:
        @staticmethod
        def get_converter(opset: int) -> Callable[..., Any]:
            def convert(builder: Any, inputs: Any, attributes: dict[str, Any], params: Any) -> Any:
                found = make(inputs, attributes)
                if found is None:
                    return theirs.get_converter(opset)(builder, inputs, attributes, params)
                return found

            return convert

    return Converter


def _number(inputs: Any, index: int) -> np.ndarray | None:
    """Return a constant input's numbers; None where it is none."""
    found = inputs[index] if len(inputs) > index else None
    return number(found)


def _floats(x: Any) -> bool:
    return "float" in str(x.ty.dtype)


def bounded(x: Any, low: float | None, high: float | None) -> Any:
    """Return x between bounds; clip itself has no layout that can be changed."""
    dtype = str(x.ty.dtype)
    if low is not None and low > -np.inf:
        x = relax.op.maximum(x, relax.const(low, dtype))
    if high is not None and high < np.inf:
        x = relax.op.minimum(x, relax.const(high, dtype))
    return x


def _clip(inputs: Any, attributes: dict[str, Any]) -> Any:
    ends: list[float | None] = []
    for index, name in ((1, "min"), (2, "max")):
        given = inputs[index] if len(inputs) > index else None
        number = _number(inputs, index)
        if (given is not None and number is None) or (number is not None and number.size != 1):
            return None
        ends.append(attributes.get(name) if number is None else float(number.reshape(())))
    if not _floats(inputs[0]) or any(e is not None and np.isnan(e) for e in ends):
        return None
    return bounded(inputs[0], *ends)


def _hard_swish(inputs: Any, attributes: dict[str, Any]) -> Any:
    (x,) = inputs[:1]
    dtype = str(x.ty.dtype)
    gate = relax.op.multiply(bounded(relax.op.add(x, relax.const(3.0, dtype)), 0.0, 6.0), relax.const(1 / 6, dtype))
    return relax.op.multiply(x, gate)


def _hard_sigmoid(inputs: Any, attributes: dict[str, Any]) -> Any:
    (x,) = inputs[:1]
    alpha, beta = (relax.const(attributes.get(n, d), str(x.ty.dtype)) for n, d in (("alpha", 0.2), ("beta", 0.5)))
    return bounded(relax.op.add(relax.op.multiply(x, alpha), beta), 0.0, 1.0)


def _pad(inputs: Any, attributes: dict[str, Any]) -> Any:
    """Pad with a constant, by numbers that are known, on all axes, nowhere less than nothing."""
    pads, fill = _number(inputs, 1), _number(inputs, 2)
    plain = attributes.get("mode", b"constant") == b"constant" and (len(inputs) < 4 or inputs[3] is None)
    if pads is None or not plain or (pads < 0).any() or (fill is None and len(inputs) > 2 and inputs[2] is not None):
        return None
    widths = np.asarray(pads).reshape(2, -1).T.reshape(-1)
    return relax.op.nn.pad(
        inputs[0], [int(i) for i in widths], "constant", 0.0 if fill is None else float(fill.reshape(()))
    )


_OURS: dict[str, Convert] = {"Clip": _clip, "HardSwish": _hard_swish, "HardSigmoid": _hard_sigmoid, "Pad": _pad}
