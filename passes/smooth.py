"""SmoothQuant: outlier channels move from the activations behind a normalisation into the weights that read them.

Source: Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022 (eq. 3 and 4). The choice among exponents by predicted error is ours.

Algebra. With x = n g + b behind a normalisation (channels on the last axis), read by linear nodes y = x W + c, any
s > 0 over the channels gives the same y:

    y = (x / s) (diag(s) W) + c        x / s = n (g / s) + b / s

so g and b are divided, the rows of W multiplied, and nothing is added to the graph. The migration takes

    s_j = a_j^alpha / w_j^(1 - alpha)      a_j = max |x_j| over the images,  w_j = max over outputs |W_j|

divided by its geometric mean, which rounding does not see. alpha 1 levels the activations, alpha 0 the weights. Done
again with the maxima a / s that the new model has, it gives s = 1: a second run changes nothing. (Every tensor whose
numbers change is renamed, so that maxima of the old one are not taken for its own.)

Predicted error, of uniform rounding with steps d and D, d^2 / 12 each, added up over the linear nodes:

    d = 2 max_j (a_j / s_j) / levels       D_o = max_j |s_j W_jo| / weight_max
    sum_o [ d^2 sum_j (s_j W_jo)^2  +  D_o^2 sum_j e_j / s_j^2 ] / 12        e_j = E x_j^2 = g_j^2 + b_j^2

since n has variance 1; where that is more than a_j^2, which it cannot be, a_j^2 is taken.

Where it applies: smooth_sites.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import Refusal
from .base import Pass, PassResult, Stage
from .constants import Names
from .smooth_sites import Site, label, not_homogeneous, rows, sites
from .weights import Stays

#: Exponents that are tried where none is given.
GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: A migration that predicts less than this share of today's error is worth it (0.2 dB).
_WORTH = 0.955
#: Factors this close to 1 are float32's rounding of an earlier migration.
_SAME = 1e-3


@dataclass(frozen=True)
class Smooth(Pass):
    """Migrate the outlier channels behind normalisations into the weights that read them.

    `ranges` maps tensors (see `smoothed_tensors`) to their largest magnitudes per channel, floats of shape (C,).
    `alpha` is the exponent, from 0 to 1; None chooses it for each normalisation by predicted error, for weights
    of `weight_max` steps either side of 0 and activations of `levels` steps, and leaves those where none would help.
    """

    name: ClassVar[str] = "smooth"
    stage: ClassVar[Stage] = "quantize"

    ranges: Mapping[str, np.ndarray] = field(default_factory=dict)
    alpha: float | None = 0.5
    weight_max: int = 127
    levels: int = 255

    def call(self, model: ir.Model) -> PassResult:
        """Migrate in place."""
        names, refusals, gains = Names.of(model), [*not_homogeneous(model.graph)], []
        for site in sites(model.graph, refusals):
            try:
                gains.append(self._migrate(site, model.graph, names))
            except Stays as why:
                refusals.append(Refusal(label(site.node), self.name, str(why)))
        done = [gain for gain in gains if gain is not None]
        notes = (f"predicted rounding error behind them: {min(done):.1f} to {max(done):.1f} dB less",) if done else ()
        return PassResult(model, bool(done), rewrites=len(done), refusals=tuple(refusals), notes=notes)

    def _migrate(self, site: Site, graph: ir.Graph, names: Names) -> float | None:
        """Migrate at one site; return by how many dB the predicted error falls, None where s is 1 already. Stays."""
        largest, weights = site.largest(self.ranges), [rows(node) for node in site.linears]
        energy = np.minimum(site.energy(), largest**2)

        def error(s: np.ndarray) -> float:
            return predicted_error(largest, energy, weights, s, self.weight_max, self.levels)

        alpha = choose_alpha(largest, weights, error) if self.alpha is None else self.alpha
        s = np.ones_like(largest) if alpha is None else factors(largest, weights, alpha)
        if np.abs(s - 1).max() < _SAME:
            return None
        before, after = error(np.ones_like(s)), error(s)
        site.apply(s, graph, names)
        return 10 * math.log10(before / after) if after else 0.0


def smoothed_tensors(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the tensors whose maxima per channel (last axis) `Smooth` asks for, each once."""
    names = (value.name or "" for site in sites(model.graph, []) for value in site.read)
    return tuple(dict.fromkeys(names))


# ------------------------------------------------------------------------------------------- the numbers


def factors(largest: np.ndarray, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Return s (C,) for maxima `largest` (C,) and weights of shape (C, outputs); float64.

    Dead channels (no activation, or no weight) take 1, or what keeps an activation that nothing weighs from being
    the largest of all.
    """
    a = largest.astype(np.float64)
    w = np.max([np.abs(weight).max(axis=1, initial=0.0) for weight in weights], axis=0)
    alive, s = (a > 0) & (w > 0), np.ones_like(a)
    if not alive.any():
        return s
    logs = alpha * np.log(a[alive]) - (1 - alpha) * np.log(w[alive])
    s[alive] = np.exp(logs - logs.mean())
    most = (a[alive] / s[alive]).max()
    s[~alive] = np.maximum(a[~alive] / most, 1.0)
    return s


def predicted_error(
    largest: np.ndarray,
    energy: np.ndarray,
    weights: Sequence[np.ndarray],
    s: np.ndarray,
    weight_max: int = 127,
    levels: int = 255,
) -> float:
    """Return the error energy (summed over outputs, for one position) that rounding x / s and s W is predicted to make.

    `largest` and `energy` are max |x_j| and E x_j^2, of shape (C,); weights are (C, outputs), one step per output.
    """
    step, carried, total = 2 * float((largest / s).max(initial=0.0)) / levels, float((energy / s**2).sum()), 0.0
    for weight in weights:
        scaled = weight * s[:, None]
        steps = np.abs(scaled).max(axis=0, initial=0.0) / weight_max
        total += step**2 * float((scaled**2).sum()) + float((steps**2).sum()) * carried
    return total / 12


def choose_alpha(
    largest: np.ndarray,
    weights: Sequence[np.ndarray],
    error: Callable[[np.ndarray], float],
    grid: Sequence[float] = GRID,
) -> float | None:
    """Return the exponent of `grid` whose factors have the least `error(s)`; None where s = 1 is about as good."""
    found = {alpha: error(factors(largest, weights, alpha)) for alpha in grid}
    best = min(found, key=lambda alpha: found[alpha])
    return best if found[best] < _WORTH * error(np.ones(len(largest))) else None
