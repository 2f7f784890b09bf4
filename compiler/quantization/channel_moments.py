"""Mean and variance of each channel of a network's tensors, from BatchNormalization's statistics alone: no images.

What a BatchNormalization gives is, by what it saw in training, of mean beta_c and variance gamma_c^2 v_c / (v_c + eps)
in channel c. It is taken as normal (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias
Correction", section 4.2.1), and so is every tensor below whose variance is known. With y of mean m and deviation s,
phi and Phi the density and distribution of N(0, 1), and p = (a - m) / s, q = (b - m) / s, P = Phi(q) - Phi(p):

    Clip, y' = min(max(y, a), b)     E y'   = a Phi(p) + b (1 - Phi(q)) + m P + s (phi(p) - phi(q))
                                     E y'^2 = a^2 Phi(p) + b^2 (1 - Phi(q)) + (m^2 + s^2) P
                                              + 2 m s (phi(p) - phi(q)) + s^2 (p phi(p) - q phi(q))
    Relu                             Clip with a = 0, b infinite; terms with an infinite bound are 0
    Add of two tensors               means add; variances add, too, where no BatchNormalization is behind both, which
                                     are then taken as independent; else the variance is not known
    Add of a constant a channel      the mean moves
    Concat, Slice, Pad               channels are put together, taken, or made of a constant
    Slice along positions            nothing changes: all positions of a channel are taken to be alike
    average over positions           the mean stays; the variance is not known
    Flatten of one position          nothing changes

No claim is made of any other tensor: not of what a layer gives that no BatchNormalization follows, of a maximum over
positions, or of a graph input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from scipy.special import ndtr

from ...passes.constants import constant, small_array


@dataclass(frozen=True, eq=False)
class Moments:
    """`mean` and `variance` (float64, one per channel; the variance None where it is not known) of a tensor.

    Channels lie along axis 1. `origins` are the BatchNormalizations behind it, by the names of their outputs.
    """

    mean: np.ndarray
    variance: np.ndarray | None
    origins: frozenset[str]


def of_batch_norms(model: ir.Model) -> dict[str, Moments]:
    """Return the moments of what each BatchNormalization with constant parameters gives, by that tensor's name."""
    found = {}
    for node in model.graph:
        tensors = [t for t in map(constant, node.inputs[1:5]) if t is not None]
        if node.op_type != "BatchNormalization" or len(tensors) < 4 or node.attributes.get_int("training_mode", 0) != 0:
            continue
        gamma, beta, _, variance = (t.numpy().astype(np.float64) for t in tensors)
        name = node.outputs[0].name or ""
        normalised = variance / (variance + node.attributes.get_float("epsilon", 1e-5))
        found[name] = Moments(beta, gamma**2 * normalised, frozenset({name}))
    return found


def propagate(model: ir.Model, known: Mapping[str, Moments]) -> dict[str, Moments]:
    """Return the moments of all tensors of the graph that follow from those `known` by name."""
    found: dict[str, Moments] = {}
    for node in model.graph:
        name = node.outputs[0].name or ""
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        inputs = [found.get(v.name or "") if v is not None else None for v in node.inputs]
        moments = known.get(name) or (rule(node, inputs) if rule is not None and inputs else None)
        if moments is not None:
            found[name] = moments
    return found


# ------------------------------------------------------------------------------------------ the normal distribution


def clipped(mean: np.ndarray, variance: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of a normal variable clipped to [low, high]; either may be infinite."""
    deviation = np.sqrt(np.maximum(variance, 1e-300))  # a constant is its own limit
    p, q = (low - mean) / deviation, (high - mean) / deviation
    below, above, between = ndtr(p), ndtr(-q), ndtr(q) - ndtr(p)
    densities = _density(p) - _density(q)
    first = mean * between + deviation * densities + _times(low, below) + _times(high, above)
    second = (mean**2 + deviation**2) * between + 2 * mean * deviation * densities
    second = second + deviation**2 * (_edge(p) - _edge(q)) + _times(low**2, below) + _times(high**2, above)
    return first, np.maximum(second - first**2, 0.0)


def _density(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


def _edge(z: np.ndarray) -> np.ndarray:
    """Return z phi(z), which goes to 0 at infinity."""
    finite = np.where(np.isfinite(z), z, 0.0)
    return np.asarray(finite * _density(finite))


def _times(bound: float, probability: np.ndarray) -> np.ndarray:
    """Return the part of a bound; an infinite one is never reached."""
    return bound * probability if math.isfinite(bound) else np.zeros_like(probability)


# ------------------------------------------------------------------------------------------ rules

_Inputs = Sequence[Moments | None]
_Rule = Callable[[ir.Node, _Inputs], Moments | None]


def _same(node: ir.Node, inputs: _Inputs) -> Moments | None:
    return inputs[0]


def _relu(node: ir.Node, inputs: _Inputs) -> Moments | None:
    return _clip_to(inputs[0], 0.0, math.inf)


def _clip(node: ir.Node, inputs: _Inputs) -> Moments | None:
    bounds = [node.attributes.get_float("min", -math.inf), node.attributes.get_float("max", math.inf)]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            array = small_array(value)
            if array is None:
                return None
            bounds[i] = float(array.reshape(()))
    return _clip_to(inputs[0], *bounds)


def _clip_to(x: Moments | None, low: float, high: float) -> Moments | None:
    if x is None or x.variance is None:
        return None
    return Moments(*clipped(x.mean, x.variance, low, high), x.origins)


def _add(node: ir.Node, inputs: _Inputs) -> Moments | None:
    a, b = inputs
    if a is None or b is None:
        known, other = (a, node.inputs[1]) if b is None else (b, node.inputs[0])
        number = _per_channel(other, known)
        return None if known is None or number is None else replace(known, mean=known.mean + number)
    if len(a.mean) != len(b.mean):  # broadcast
        return None
    variance = None
    if a.variance is not None and b.variance is not None and a.origins.isdisjoint(b.origins):
        variance = a.variance + b.variance
    return Moments(a.mean + b.mean, variance, a.origins | b.origins)


def _per_channel(value: ir.Value | None, beside: Moments | None) -> np.ndarray | None:
    """Return a constant of one number, or one a channel (axis 1 of 4), as an array that adds to means."""
    array = small_array(value)
    if array is None or beside is None:
        return None
    if array.size == 1:
        return array.reshape(()).astype(np.float64)
    aligned = array.ndim in (3, 4) and array.size == array.shape[-3] == len(beside.mean)
    return array.reshape(-1).astype(np.float64) if aligned else None


def _concat(node: ir.Node, inputs: _Inputs) -> Moments | None:
    parts = [part for part in inputs if part is not None]
    if len(parts) < len(inputs) or node.attributes.get_int("axis", 0) != 1:
        return None
    variances = [part.variance for part in parts if part.variance is not None]
    return Moments(
        np.concatenate([part.mean for part in parts]),
        np.concatenate(variances) if len(variances) == len(parts) else None,
        frozenset().union(*(part.origins for part in parts)),
    )


def _slice(node: ir.Node, inputs: _Inputs) -> Moments | None:
    x, parameters = inputs[0], [small_array(value) for value in node.inputs[1:]]
    if x is None or len(parameters) < 3 or any(array is None for array in parameters):
        return None
    starts, ends, axes, *steps = ([int(n) for n in array] for array in parameters if array is not None)
    for start, end, axis, step in zip(starts, ends, axes, steps[0] if steps else [1] * len(axes), strict=True):
        if axis <= 0:  # images, or counted from the end: which axis is not known here
            return None
        if axis == 1:
            x = _only(x, np.arange(len(x.mean))[start:end:step])
    return x


def _only(x: Moments, channels: np.ndarray) -> Moments:
    return Moments(x.mean[channels], None if x.variance is None else x.variance[channels], x.origins)


def _pad(node: ir.Node, inputs: _Inputs) -> Moments | None:
    """Channels in front and behind; positions in front and behind would be unlike the others."""
    x, pads = inputs[0], small_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if (
        x is None
        or pads is None
        or node.attributes.get_string("mode", "constant") != "constant"
        or len(node.inputs) > 3
    ):
        return None
    number = node.inputs[2] if len(node.inputs) > 2 else None
    filler = np.zeros(()) if number is None else small_array(number)
    before, after = np.split(pads, 2)
    if filler is None or (np.delete(before, 1) != 0).any() or (np.delete(after, 1) != 0).any():
        return None
    width = (int(before[1]), int(after[1]))
    if min(width) < 0:
        return None
    variance = None if x.variance is None else np.pad(x.variance, width)
    return Moments(np.pad(x.mean, width, constant_values=float(filler.reshape(()))), variance, x.origins)


def _average(node: ir.Node, inputs: _Inputs) -> Moments | None:
    x = inputs[0]
    if x is None or any(node.attributes.get_ints("pads", ())) or "auto_pad" in node.attributes:
        return None
    return replace(x, variance=None)


def _reduce_mean(node: ir.Node, inputs: _Inputs) -> Moments | None:
    x, source = inputs[0], node.inputs[0]
    axes = small_array(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attributes.get_ints("axes", ()))
    if x is None or axes is None or source is None or source.shape is None:
        return None
    rank = len(source.shape)
    positions = set((axes % rank).tolist())
    return replace(x, variance=None) if rank > 2 and positions == set(range(2, rank)) else None


def _flatten(node: ir.Node, inputs: _Inputs) -> Moments | None:
    """Make a matrix (images, channels) of a tensor with one position."""
    x, source, shape = inputs[0], node.inputs[0], node.outputs[0].shape
    if x is None or source is None or source.shape is None or shape is None:
        return None
    one = all(size == 1 for size in source.shape[2:])
    return x if one and len(shape) == 2 and shape[1] == len(x.mean) else None


_RULES: Mapping[str, _Rule] = {
    "Identity": _same,
    "Relu": _relu,
    "Clip": _clip,
    "Add": _add,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "AveragePool": _average,
    "GlobalAveragePool": _average,
    "ReduceMean": _reduce_mean,
    "Flatten": _flatten,
    "Reshape": _flatten,
    "Squeeze": _flatten,
}
