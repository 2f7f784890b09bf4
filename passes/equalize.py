"""Cross-layer equalization: every channel is multiplied by a factor that the layers around it take back.

Algebra: channel_groups.py. A constant c with the variables `up` and `down` becomes c f[up] / f[down], in float64,
stored in its own type. The outputs of the network do not change; the grid that quantization lays over it does: all
channels of a tensor share one step, so small channels gain from being enlarged.

After Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1, who do
it for chains of two or three layers; equalize_factors.py chooses the factors.

Rules
1. Only constants that one node alone reads are changed; the analysis pins what would need more.
2. A Clip that was said not to reach its limits loses them where its channels are rescaled: the limit would move.

Not touched: subgraphs, 16-bit tensors, and all channels that meet an operator without a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from .base import Pass, PassResult, Stage
from .channel_groups import PINNED, ChannelVariables, Rescaled, analyse
from .constants import remove_unused
from .weights import LAZY_BYTES, float64, scale, set_constant


@dataclass(frozen=True)
class Equalize(Pass):
    """Multiply every channel by the factor of its variable; nothing without factors.

    `factors` has one positive number for each variable of `analyse(model, unreached)`, 1 for the pinned one; ValueError
    where it does not fit the model. `unreached` names outputs of Clip nodes whose limits no data reaches. The same
    factors applied once more scale once more.
    """

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = "quantize"

    factors: np.ndarray | None = field(default=None, compare=False)
    unreached: frozenset[str] = frozenset()

    def call(self, model: ir.Model) -> PassResult:
        """Rescale in place."""
        if self.factors is None:
            return PassResult(model, modified=False)
        variables = analyse(model, self.unreached)
        factors = _valid(self.factors, variables)
        changed = sum(_rescale(constant, factors) for constant in variables.constants)
        changed += sum(_unclip(node) for node in _rescaled_clips(variables, factors))
        return PassResult(model, modified=changed > 0, rewrites=changed, refusals=variables.refusals)


def _valid(factors: np.ndarray, variables: ChannelVariables) -> np.ndarray:
    factors = np.asarray(factors, np.float64)
    if factors.shape != (variables.count,):
        raise ValueError(f"{variables.count} variables need as many factors, not an array of shape {factors.shape}")
    if not (np.isfinite(factors).all() and (factors > 0).all()) or factors[PINNED] != 1:
        raise ValueError("factors must be positive, and that of the pinned variable 1")
    return factors


def _rescale(constant: Rescaled, factors: np.ndarray) -> bool:
    """Give a constant its new value; return whether it differs."""
    one = np.ones(1)
    up, down = (one if ids is None else factors[ids] for ids in (constant.up, constant.down))
    factor = up / down
    value = constant.value
    tensor = value.const_value
    assert tensor is not None
    if (factor == 1).all():
        return False
    shape = tuple(tensor.shape.numpy())
    if tensor.nbytes > LAZY_BYTES and np.broadcast_shapes(shape, factor.shape) == shape:
        scale(value, factor)
        return True
    old = tensor.numpy()
    new = (float64(tensor) * factor).astype(old.dtype)
    if new.shape == old.shape and np.array_equal(new, old, equal_nan=True):
        return False
    set_constant(value, new, tensor.dtype)
    return True


def _rescaled_clips(variables: ChannelVariables, factors: np.ndarray) -> Iterator[ir.Node]:
    for node in variables.unclipped:
        ids = variables.of(node.outputs[0])
        if ids is not None and (factors[ids] != 1).any():
            yield node


def _unclip(node: ir.Node) -> bool:
    """Take away the limits of a Clip that are not 0; return whether there was one."""
    found = False
    for index, name in ((1, "min"), (2, "max")):
        value = node.inputs[index] if index < len(node.inputs) else None
        if name in node.attributes and node.attributes.get_float(name):
            del node.attributes[name]
            found = True
        if value is not None and value.const_value is not None and value.const_value.numpy().any():
            node.replace_input_with(index, None)
            remove_unused([value])
            found = True
    return found
