"""Which factors to equalize by: three choices, from weights, from ranges, and from the noise that both predict.

Algebra, with f the factors, r_tc the largest magnitude of channel c of tensor t, v(c) its variable.

Weights (Nagel et al. 2019, section 4.1: ranges of the weights on both sides made equal; here for any number of layers
on either side, the largest counting):     f_v^2 = max |W_in of v| / max |W_out of v|, repeated until nothing moves.

Ranges:    f_v = (max_t r_tv / max_c r_tc) ^ -alpha, so that alpha = 1 gives every channel its tensor's whole grid.

Noise. Rounding is taken as uniform noise, independent of all else. In the units of the network as it was,

    tensor t   step D_t = (max_c f_c high_c + max_c f_c low_c) / levels, noise of channel c: (D_t / f_c)^2 / 12
    layer L    reading t: sum_{o,i} W_oi^2 (D_t / f_i)^2 / 12
               its weights, of step S_o = max_i |W_oi| / f_i / weight_max: sum_o S_o^2 / 12 sum_i f_i^2 E[x_i^2]

each relative to the energy of L's output; what no layer reads counts relative to its own energy. A layer's own factor
f_o falls out of both: scales per output channel absorb it. The sum is minimised over log f by L-BFGS, with a p-norm in
place of each maximum and p rising; no choice is returned that the sum, with true maxima, finds worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .channel_groups import PINNED, ChannelVariables, Layer
from .channel_rules import LAYERS
from .weights import float64

#: Tensor -> largest magnitude per channel, (C,), or lowest and highest value, (2, C), along the axis that
#: `ChannelVariables.channels` names (one number where that is None; more where all have the same variable).
Ranges = Mapping[str, np.ndarray]
#: Tensor -> mean square per channel, (C,).
Energies = Mapping[str, np.ndarray]

#: Factors lie between this and its inverse: channels that are all but dead gain nothing from more.
LARGEST = 64.0
#: Where no energies are given, a channel's mean square is taken as (largest / 5)^2.
_PEAK = 5.0
#: The p-norms that stand for a maximum, one after the other.
_NORMS = (8, 32, 128)
#: Operators through which a tensor keeps its grid.
_KEEPS_GRID = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "Pad", "MaxPool"}
_KEEPS_GRID |= {"Identity", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Dropout"}

# ------------------------------------------------------------------------------------------- from weights and ranges


def weight_range_factors(variables: ChannelVariables, *, largest: float = LARGEST, sweeps: int = 200) -> np.ndarray:
    """Return factors that give the weights before and behind every channel the same range, float64 (variables,)."""
    layers = [(layer, np.abs(rows).max(axis=2, initial=0.0), ids) for layer, rows, ids in _rows(variables)]
    factors = np.ones(variables.count)
    for _ in range(sweeps):
        before, behind = np.zeros(variables.count), np.zeros(variables.count)
        for layer, magnitudes, ids in layers:
            scaled = magnitudes * factors[layer.outputs][:, None] / factors[ids]
            np.maximum.at(before, layer.outputs, scaled.max(axis=1, initial=0.0))
            np.maximum.at(behind, ids, scaled)
        both = (before > 0) & (behind > 0) & ~variables.pinned
        step = np.ones(variables.count)
        step[both] = (behind[both] / before[both]) ** 0.25  # half of the way, since the neighbours move, too
        moved = np.clip(factors * step, 1 / largest, largest)
        if np.allclose(moved, factors, rtol=1e-4, atol=0):
            break
        factors = moved
    return factors


def activation_range_factors(
    variables: ChannelVariables, ranges: Ranges, alpha: float = 0.5, *, largest: float = LARGEST
) -> np.ndarray:
    """Return factors that enlarge the small channels of every tensor, float64 (variables,); none at `alpha` 0."""
    share = np.zeros(variables.count)
    for name, given in ranges.items():
        ids, low, high = _by_variable(variables, name, given)
        magnitude = np.maximum(low, high)
        if magnitude.max() > 0:
            np.maximum.at(share, ids, magnitude / magnitude.max())
    moved = (share > 0) & ~variables.pinned
    factors = np.ones(variables.count)
    factors[moved] = np.minimum(share[moved] ** -alpha, largest)
    return factors


# ------------------------------------------------------------------------------------------- from noise


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A quantized tensor, by variable: its highest values, minus its lowest, and what its noise counts."""

    ids: np.ndarray
    high: np.ndarray
    low: np.ndarray
    gain: np.ndarray


@dataclass(frozen=True, eq=False)
class _Weight:
    """A quantized weight: magnitudes (out, in / group), the variables of its inputs, their energy, and its share."""

    magnitudes: np.ndarray
    ids: np.ndarray
    energies: np.ndarray
    share: float


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """What rounding will cost, for any factors: relative noise energy, summed over layers."""

    count: int
    levels: int
    weight_max: int | None
    symmetric: bool
    tensors: tuple[_Tensor, ...]
    weights: tuple[_Weight, ...]

    @classmethod
    def of(
        cls,
        variables: ChannelVariables,
        ranges: Ranges,
        energies: Energies | None = None,
        *,
        levels: int = 255,
        weight_max: int | None = 127,
        symmetric: bool = False,
        importance: Mapping[str, float] | None = None,
    ) -> NoiseModel:
        """Model the noise of tensors that have a range, and of the layers' weights.

        `levels` is the number of steps of an activation, `weight_max` the largest integer of a weight (None: weights
        stay in float), `symmetric` whether the zero point is 0. `importance` says by tensor, 1 if absent, how much
        noise of a given relative energy in it counts: in a layer's output, or in a tensor that an Add or the like
        reads. Channels of a tensor that share a variable (those of a pinned one) count with their mean energy.
        """
        build = _Builder(variables, ranges, energies or {}, importance or {})
        weights = tuple(build.layer(*found) for found in _rows(variables))
        build.other_readers()
        return cls(variables.count, levels, weight_max, symmetric, build.tensors(), weights)

    def noise(self, factors: np.ndarray) -> float:
        """Return the predicted relative noise energy, with true maxima."""
        return self.soft(np.log(factors), math.inf)[0]

    def soft(self, logs: np.ndarray, p: float) -> tuple[float, np.ndarray]:
        """Return the noise at factors exp(`logs`), each maximum a p-norm, and its gradient, float64 (variables,)."""
        total, gradient = 0.0, np.zeros(self.count)
        for tensor in self.tensors:
            total += self._activation(tensor, logs, p, gradient)
        for weight in self.weights if self.weight_max is not None else ():
            total += self._rounded(weight, logs, p, gradient)
        return total, gradient

    def _activation(self, tensor: _Tensor, logs: np.ndarray, p: float, gradient: np.ndarray) -> float:
        theta = logs[tensor.ids]
        if self.symmetric:
            high, slope = _norm(np.maximum(tensor.high, tensor.low) * np.exp(theta), p)
            width, slope = 2 * high, 2 * slope
        else:
            (high, up), (low, down) = (_norm(side * np.exp(theta), p) for side in (tensor.high, tensor.low))
            width, slope = high + low, up + down
        received = tensor.gain * np.exp(-2 * theta)
        scale = 1 / (12 * self.levels**2)
        gradient[tensor.ids] += scale * (2 * width * slope * received.sum() - 2 * width**2 * received)
        return float(scale * width**2 * received.sum())

    def _rounded(self, weight: _Weight, logs: np.ndarray, p: float, gradient: np.ndarray) -> float:
        assert self.weight_max is not None
        theta = logs[weight.ids]
        steps, slopes = _norm(weight.magnitudes * np.exp(-theta), p)
        received = weight.energies * np.exp(2 * theta)
        scale = weight.share / (12 * self.weight_max**2)
        each, carried = (steps**2)[:, None], received.sum(axis=1)
        slope = -2 * (steps * carried)[:, None] * slopes + 2 * each * received
        gradient += scale * np.bincount(weight.ids.reshape(-1), slope.reshape(-1), minlength=self.count)
        return float(scale * (steps**2 * carried).sum())


def least_noise_factors(
    model: NoiseModel, starts: tuple[np.ndarray, ...] = (), *, largest: float = LARGEST, iterations: int = 100
) -> np.ndarray:
    """Return factors with the least predicted noise, found from 1 and from each of `starts`, float64 (variables,)."""
    from scipy.optimize import minimize  # heavy

    begin = np.ones(model.count)
    reference = model.noise(begin) or 1.0
    bounds = [(0.0, 0.0), *[(-math.log(largest), math.log(largest))] * (model.count - 1)]

    def objective(logs: np.ndarray, p: float) -> tuple[float, np.ndarray]:
        value, gradient = model.soft(logs, p)
        held = 1e-4 / model.count  # what the noise does not depend on shall stay at 1
        return value / reference + held * float(logs @ logs), gradient / reference + 2 * held * logs

    candidates = [begin, *starts]
    for start in (begin, *starts):
        logs = np.log(start)
        for p in _NORMS:
            options = {"maxiter": iterations}
            logs = minimize(objective, logs, (p,), "L-BFGS-B", jac=True, bounds=bounds, options=options).x
            candidates.append(np.exp(logs))
    best = min(candidates, key=model.noise)
    best[PINNED] = 1.0
    return best


def _norm(values: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the p-norm of non-negative numbers along the last axis and its slope in their logarithms."""
    largest = values.max(axis=-1, keepdims=True, initial=0.0)
    if math.isinf(p):
        return largest[..., 0], np.zeros_like(values)
    powers = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0) ** p
    total = np.maximum(powers.sum(axis=-1, keepdims=True), 1.0)
    norm = largest * total ** (1 / p)
    return norm[..., 0], norm * powers / total


class _Builder:
    """Collects how much the noise of each tensor counts, by variable."""

    def __init__(
        self, variables: ChannelVariables, ranges: Ranges, energies: Energies, importance: Mapping[str, float]
    ) -> None:
        self.variables, self.given, self.importance = variables, energies, importance
        self.sides = {name: _by_variable(variables, name, array) for name, array in ranges.items()}
        self.gains = {name: np.zeros(variables.count) for name in ranges}

    def layer(self, layer: Layer, rows: np.ndarray, ids: np.ndarray) -> _Weight:
        """Count what a layer makes of its input's noise; return what its own rounding needs."""
        source = _grid_of(layer.node.inputs[0], self.sides)
        energies = self.energies(source)[ids]
        squares = (rows**2).sum(axis=2)
        name = layer.node.outputs[0].name or ""
        energy = float(self.given[name].sum() if name in self.given else (squares * energies).sum())
        share = self.importance.get(name, 1.0) / energy if energy > 0 else 0.0
        if source is not None:
            np.add.at(self.gains[source], ids, squares * share)
        return _Weight(np.abs(rows).max(axis=2, initial=0.0), ids, energies * rows.shape[2], share)

    def other_readers(self) -> None:
        """Count the noise of tensors that an Add, a pool or the like reads, relative to their own energy."""
        nodes = [node for layer in self.variables.layers[:1] for node in _graph(layer.node)]
        passing = {*LAYERS, *_KEEPS_GRID}
        read = {v for node in nodes for i, v in enumerate(node.inputs) if i or node.op_type not in passing}
        for name in dict.fromkeys(_grid_of(value, self.sides) for value in read):
            if name is None:
                continue
            ids = np.broadcast_to(self.variables.channels(name)[1], self._channels(name))
            total = float(self.energies(name)[ids].sum())
            if total > 0:
                np.add.at(self.gains[name], ids, self.importance.get(name, 1.0) / total)

    def energies(self, name: str | None) -> np.ndarray:
        """Return the mean square of a tensor's channels by variable; 1 where nothing is known."""
        found = np.ones(self.variables.count)
        if name is not None:
            ids, low, high = self.sides[name]
            found[ids] = (np.maximum(low, high) / _PEAK) ** 2
        if name is not None and name in self.given:
            given = self.given[name]
            channels = np.broadcast_to(self.variables.channels(name)[1], given.shape)
            counts = np.bincount(channels, minlength=self.variables.count)
            sums = np.bincount(channels, given, minlength=self.variables.count)
            found = np.where(counts > 0, sums / np.maximum(counts, 1), found)
        return found

    def tensors(self) -> tuple[_Tensor, ...]:
        """Return the quantized tensors whose noise counts."""
        return tuple(
            _Tensor(ids, high, low, self.gains[name][ids])
            for name, (ids, low, high) in self.sides.items()
            if self.gains[name].any()
        )

    def _channels(self, name: str) -> int:
        return len(self.given[name]) if name in self.given else len(self.variables.channels(name)[1])


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _grid_of(value: ir.Value | None, known: Mapping[str, object]) -> str | None:
    """Return the name of the tensor with a range whose grid `value` has, itself or before data was moved."""
    while value is not None:
        if value.name in known:
            return value.name
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _KEEPS_GRID else None
    return None


def _by_variable(
    variables: ChannelVariables, name: str, given: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a tensor's variables, each once, with minus the lowest and the highest value, both at least 0."""
    given = np.asarray(given, np.float64)
    low, high = (-given[0], given[1]) if given.ndim == 2 else (given, given)
    ids, places = np.unique(np.broadcast_to(variables.channels(name)[1], high.shape), return_inverse=True)
    sides = np.zeros((2, len(ids)))
    for side, values in zip(sides, (low, high), strict=True):
        np.maximum.at(side, places, values)
    return ids, sides[0], sides[1]


def _rows(variables: ChannelVariables) -> Iterator[tuple[Layer, np.ndarray, np.ndarray]]:
    """Yield each layer, its weight as (out, in / group, kernel), and its inputs' variables, (out, in / group)."""
    for layer in variables.layers:
        value = layer.node.inputs[1]
        assert value is not None and value.const_value is not None
        weight, groups = float64(value.const_value), layer.node.attributes.get_int("group", 1)
        if layer.node.op_type == "ConvTranspose":  # (in, out / group, …)
            inputs, outputs = weight.shape[:2]
            blocks = weight.reshape(groups, inputs // groups, outputs, -1).transpose(0, 2, 1, 3)
            rows = blocks.reshape(groups * outputs, inputs // groups, -1)
        else:
            turned = layer.node.op_type == "MatMul" or (
                layer.node.op_type == "Gemm" and not layer.node.attributes.get_int("transB", 0)
            )
            rows = (weight.T if turned else weight).reshape(len(layer.outputs), -1, math.prod(weight.shape[2:]))
        ids = np.repeat(layer.inputs.reshape(groups, -1), len(layer.outputs) // groups, axis=0)
        yield layer, rows, ids
