"""What a layer shall give, so that the sum behind it is right; and what its bias lacks for that.

    target_l = y_l + (r_l - r^_l)       shift_l[c] = mean over images and positions of (target_l - y^_l) in channel c

where r is what a residual Add adds to the layer's output, if that is known already. Where a Relu alone reads the sum,
whatever is negative is right wherever y_l + r_l is (passes/forgiving.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes.bias import added_bias
from ...passes.forgiving import ROUNDS, forgiven
from .stream import Arrays, Stream


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a layer shall give, batch by batch; `level` is what the second network's Add adds to it, None for nothing.

    `forgiving`: only a Relu reads the sum.
    """

    target: Arrays
    level: Arrays | None = None
    forgiving: bool = False

    def nearest(self, batch: int, made: np.ndarray) -> np.ndarray:
        """Return the target of a batch where `made` is what the layer gives: the nearest of all that are as good."""
        target = self.target[batch]
        if not self.forgiving:
            return target
        if self.level is None:
            return forgiven(target, made)
        level = self.level[batch]
        return forgiven(target + level, made + level) - level

    def shift(self, got: Arrays, axis: int) -> np.ndarray:
        """Add to `got`, in place, what it lacks on average in each channel (the index of `axis`), and return that."""
        others = tuple(i for i in range(got[0].ndim) if i != axis)
        total = np.zeros(got[0].shape[axis])
        for _ in range(ROUNDS if self.forgiving else 1):
            sums = [(self.nearest(i, g) - g).sum(axis=others, dtype=np.float64) for i, g in enumerate(got)]
            shift: np.ndarray = np.asarray(sum(sums)) / sum(g.size // g.shape[axis] for g in got)
            add_along(got, shift, axis)
            total += shift
        return total


def add_along(arrays: Arrays, shift: np.ndarray, axis: int) -> None:
    """Add a number per channel, the index of `axis`, in place."""
    for array in arrays:
        array += shift.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(array.ndim)])


@dataclass(frozen=True, eq=False)
class Beside:
    """What a residual Add behind a layer adds to its output, in both networks; None where there is none, or not yet.

    `forgiving`: only a Relu reads the sum, or the output itself.
    """

    skip: Arrays | None = None
    coarse_skip: Arrays | None = None
    forgiving: bool = False


def wanted(
    node: ir.Node, y: Arrays, twins: Mapping[str | None, ir.Node], exact: Stream, coarse: Stream, forgive: bool
) -> Wanted:
    """Return y, with the error added that a residual Add behind the layer gets from its other input, if known."""
    found = beside(node, twins, exact, coarse)
    forgive = forgive and found.forgiving
    if found.skip is None or found.coarse_skip is None:
        return Wanted(y, None, forgive)
    if found.skip[0].shape != y[0].shape:
        return Wanted(y)
    target = [a + (s - c) for a, s, c in zip(y, found.skip, found.coarse_skip, strict=True)]
    return Wanted(target, found.coarse_skip, forgive)


def beside(node: ir.Node, twins: Mapping[str | None, ir.Node], exact: Stream, coarse: Stream) -> Beside:
    """Return what stands beside a layer, as far as it is known before any further linear layer runs."""
    biased = added_bias(node)
    out = node.outputs[0] if biased is None else biased[0].outputs[0]
    add, index = _only_reader(out)
    twin = twins.get(add.name) if add is not None else None
    if add is None or twin is None or add.op_type != twin.op_type:
        return Beside()
    if add.op_type == "Relu":
        return Beside(forgiving=True)
    if add.op_type != "Add":
        return Beside()
    other, coarse_other = add.inputs[1 - index], twin.inputs[1 - index]
    if not (exact.within_reach(other) and coarse.within_reach(coarse_other)):
        return Beside()
    behind, _ = _only_reader(add.outputs[0])
    forgiving = behind is not None and behind.op_type == "Relu"
    return Beside(exact.pull(other), coarse.pull(coarse_other), forgiving)


def _only_reader(value: ir.Value) -> tuple[ir.Node | None, int]:
    uses = tuple(value.uses())
    return (uses[0].node, uses[0].idx) if len(uses) == 1 and not value.is_graph_output() else (None, 0)
