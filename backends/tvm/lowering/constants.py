"""What is known when the network is compiled is computed then, by numpy: TVM would compile a function for each
constant.

Also what the passes over Relax share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax


def number(value: Any) -> np.ndarray | None:
    """Return a constant's numbers, None where a value is none."""
    return value.value.numpy() if hasattr(value, "value") and hasattr(value.value, "numpy") else None


def rewritten(module: Any, mutator: Any, before: Callable[[Any, Any], None] | None = None) -> Any:
    """Return the module with its Relax functions as a mutator leaves them; `before(mutator, function)` prepares it."""
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            if before is not None:
                before(mutator, function)
            mutator.builder_.update_func(name, mutator.visit_expr(function))
    return mutator.builder_.get()


def _shape(call: Any) -> list[int]:
    return [int(i) for i in call.ty.shape]


def _turned(call: Any, x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    axes = call.attrs.axes
    return np.transpose(x, None if axes is None else [int(i) for i in axes])


def _reshaped(call: Any, x: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return x.reshape(_shape(call))


_KNOWN: dict[str, Callable[..., Any]] = {
    "relax.permute_dims": _turned,
    "relax.reshape": _reshaped,
    "relax.expand_dims": _reshaped,
    "relax.squeeze": _reshaped,
    "relax.astype": lambda call, x: x.astype(str(call.ty.dtype)),
    "relax.add": lambda _, x, y: x + y,
    "relax.subtract": lambda _, x, y: x - y,
    "relax.multiply": lambda _, x, y: x * y,
    "relax.divide": lambda _, x, y: x / y,
    "relax.sqrt": lambda _, x: np.sqrt(x),
    "relax.less": lambda _, x, y: np.less(x, y),
    "relax.where": lambda _, x, y, z: np.where(x, y, z),
}


@relax.expr_functor.mutator
class _Folded(relax.PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        make = _KNOWN.get(getattr(call.op, "name", ""))
        if make is None:
            return call
        given = [self.known(a) for a in (call.args[:1] if make in (_turned, _reshaped) else call.args)]
        if any(g is None for g in given):
            return call
        try:
            # an array of its own, in order; ascontiguousarray would give a scalar an axis
            return relax.const(np.array(make(call, *given), order="C"), str(call.ty.dtype))
        except (TypeError, ValueError):  # a shape that is no number
            return call

    def known(self, value: Any) -> np.ndarray | None:
        return number(self.lookup_binding(value) if isinstance(value, relax.Var) else value)


def folded(module: Any) -> Any:
    """Return the module with operators of constants as constants, those of the table."""
    return rewritten(module, _Folded(module))
