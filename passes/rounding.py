"""Rounding a layer's weight so that the layer's OUTPUT errs least, not the weight. Pure numpy, float64.

Algebra. Rows of X (n, in) are what the layer reads in the already quantized network, rows of Y (n, out) what it should
give: the FP32 network's output (AdaQuant's lesson, Hubara et al. 2020). For a weight V (out, in)

    |Y - X V'|^2  =  tr (V - T) X'X (V - T)'  +  what no V can change,      T = Y'X (X'X)^-1

so sums over rows, X'X (`gram`) and Y'X (`cross`), are all that is needed of the images. T, the best weight without a
grid, is only estimated from them: it is shrunk towards the weight W that the layer has,

    T = W + (Y'X - W X'X) (X'X + shrink m I)^-1            m = mean of X'X's diagonal

(ridge regression; W where nothing is known), and wanted are integers Q and scales s, V = s Q, of least

    objective = tr (V - T) H (V - T)'                      H = X'X + damping m I

which can be inverted whatever the inputs. Where the layer has a bias, the sums are taken about the means: the bias then
takes care of the mean error.

Rows of V are independent of each other. With D = T - V, one walk along the inputs,

    q_i = round((t_i + sum_{j != i} d_j M_ji) / s_i)        d_i = t_i - s_i q_i

is three methods, by M and by what D starts from:

    gptq        M = R_ji / R_ii, H = R R', R upper triangular; D starts at 0. What was lost so far is made up for as if
                all later weights were free. The same integers as GPTQ (Frantar et al. 2022) and OBQ's update in a
                fixed order (Frantar, Alistarh 2022), without H^-1: its recursion is the triangular system's.
    gpfq        M = H_ji / H_ii for j < i; D starts at 0. The greedy path following of Zhang, Zhou, Saab 2022.
    descent     M = H_ji / H_ii; D starts from another result. Each step is the exact minimum in one integer, so the
                objective never rises.

For fixed integers the objective is quadratic in a scale, so its minimum has a closed form (`refitted`).

Shapes: a leading axis g holds the groups of a grouped convolution: weights (g, out, in), Gram matrices (g, in, in).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: Clipping tried for the scale: parts of the largest magnitude that the largest integer shall stand for. A finer grid
#: gains nothing once scales are refitted: 23.3 dB with 4 of them and with 6, 23.5 dB with 13 (ResNet-20, 4 bits).
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
#: The same for layers with more inputs than WIDE, where each try takes seconds.
FEW_FRACTIONS, WIDE = (0.9, 0.7), 1536
#: Integers beyond this are many: nothing needs to be clipped, and one sweep is enough (ResNet-20: no difference).
MANY = 15
#: How far T is pulled back to W: for few integers, and for many, where there is less to mend and T soon follows the
#: noise of the calibration images. ResNet-20, SQNR of the logits of unseen images: at 4 bits 100 costs 1.5 dB, at 8
#: bits 1 costs 0.4 to 0.6 dB (with 100 and with 48 images), and 10 to 100 are alike.
SHRINK, SHRINK_MANY = 1.0, 10.0
#: Keeps H invertible; anything from 0.003 to 0.03 does as well.
DAMPING = 1e-2
#: Sweeps of coordinate descent; what later ones gain is little.
SWEEPS = 6
#: Inputs that are walked one by one before what they changed is handed on to all later inputs in one product.
_BLOCK = 64
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer's rounding problem, all float64.

    `weight` (g, out, in) is what plain rounding rounds, `target` T (g, out, in) the best weight without a grid, `gram`
    H (g, in, in) positive definite. Integers lie in `low` to `high`. `columns` (in) says which of its row's scales
    each input takes; all zeros for a scale per channel. `shared`: one scale serves all rows.
    """

    weight: np.ndarray
    target: np.ndarray
    gram: np.ndarray
    low: int
    high: int
    columns: np.ndarray
    shared: bool = False

    @functools.cached_property
    def coupling(self) -> np.ndarray:
        """H_ji / H_ii with a diagonal of 0 (g, in, in)."""
        return _coupling(self.gram)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The inputs of each group by falling energy (g, in)."""
        return np.argsort(-np.diagonal(self.gram, axis1=1, axis2=2), axis=1, kind="stable")

    @functools.cached_property
    def triangular(self) -> np.ndarray:
        """R_ji / R_ii with a diagonal of 0, for the inputs in their natural order (g, in, in)."""
        return _triangular(self.gram)

    @functools.cached_property
    def triangular_ordered(self) -> np.ndarray:
        """The same for the inputs in the order of `order`."""
        rows = np.take_along_axis(self.gram, self.order[:, :, None], axis=1)
        return _triangular(np.take_along_axis(rows, self.order[:, None, :], axis=2))

    def widest_scales(self, weight: np.ndarray | None = None) -> np.ndarray:
        """Return the scales (g, out, scales) that clip nothing of `weight`, or of the target; 1 where all is 0."""
        weight = self.target if weight is None else weight
        size = int(self.columns.max(initial=0)) + 1
        largest = np.zeros((*weight.shape[:2], size))
        for k in range(size):
            largest[..., k] = np.abs(weight[..., self.columns == k]).max(axis=-1, initial=0.0)
        if self.shared:
            largest[:] = largest.max(initial=0.0)
        return np.where(largest > 0, largest / self.high, 1.0)

    def errors(self, difference: np.ndarray) -> np.ndarray:
        """Return d H d' of each row d of V - T: (g, out)."""
        found: np.ndarray = ((difference @ self.gram) * difference).sum(axis=-1)
        return found


@dataclass(frozen=True, eq=False)
class Rounded:
    """Integers (g, out, in) as int8, scales (g, out, scales) as float32, and each row's objective (g, out)."""

    integers: np.ndarray
    scales: np.ndarray
    errors: np.ndarray

    @property
    def objective(self) -> float:
        """The sum over all rows."""
        return float(self.errors.sum())


Method = Callable[[Problem, np.ndarray], Rounded]


def problem(
    weight: np.ndarray,
    gram: np.ndarray,
    cross: np.ndarray,
    *,
    low: int,
    high: int,
    shrink: float | None = None,
    damping: float = DAMPING,
    columns: np.ndarray | None = None,
    shared: bool = False,
) -> Problem:
    """Return the problem of a weight (g, out, in), with `gram` X'X (g, in, in) and `cross` Y'X (g, out, in).

    A group whose inputs are all 0 gets H proportional to I: there rounding to the nearest is best. `shrink` is SHRINK
    or SHRINK_MANY where it is not given.
    """
    if shrink is None:
        shrink = SHRINK_MANY if high > MANY else SHRINK
    weight = weight.astype(np.float64)
    size = weight.shape[-1]
    energy = np.trace(gram, axis1=1, axis2=2) / size
    unit = np.where(energy > 0, energy, 1.0)[:, None, None] * np.eye(size)
    shift = np.linalg.solve(gram + shrink * unit, (cross - weight @ gram).swapaxes(1, 2)).swapaxes(1, 2)
    columns = np.zeros(size, dtype=np.intp) if columns is None else columns
    return Problem(weight, weight + shift, gram + damping * unit, low, high, columns, shared)


# ------------------------------------------------------------------------------------------- methods


def nearest(p: Problem, scales: np.ndarray) -> Rounded:
    """Round the weight itself to the nearest, half to even: the baseline of every other method."""
    scales = scales.astype(np.float32)
    steps = _steps(p, scales)
    integers = np.clip(np.rint(p.weight / steps), p.low, p.high)
    return Rounded(integers.astype(np.int8), scales, p.errors(steps * integers - p.target))


def gptq(p: Problem, scales: np.ndarray, order: str = "activation") -> Rounded:
    """Round input after input, making up for what was lost in all that follow (Frantar et al. 2022).

    `order` is "activation" (most energy first) or "natural". A row that plain rounding serves better keeps that.
    """
    if order == "natural":
        return _followed(p, scales, p.triangular)
    scales = scales.astype(np.float32)
    index = np.broadcast_to(p.order[:, None, :], p.target.shape)
    target, steps = (np.take_along_axis(a, index, axis=2) for a in (p.target, _steps(p, scales)))
    walked = _walk(target, steps, p.triangular_ordered, None, p.low, p.high)
    integers = np.empty_like(walked)
    np.put_along_axis(integers, index, walked, axis=2)
    return better(p, nearest(p, scales), _rated(p, integers, scales))


def gpfq(p: Problem, scales: np.ndarray) -> Rounded:
    """Round input after input, each making up for what was lost so far (Zhang, Zhou, Saab 2022).

    A row that plain rounding serves better keeps that.
    """
    return _followed(p, scales, np.triu(p.coupling))


def coordinate_descent(p: Problem, start: Rounded, sweeps: int = SWEEPS) -> Rounded:
    """Improve `start` integer by integer, the scales fitted again before each sweep; the objective never rises."""
    best = start
    for _ in range(sweeps):
        fitted = refitted(p, best)
        integers = _walk(
            p.target, _steps(p, fitted.scales), p.coupling, fitted.integers.astype(np.float64), p.low, p.high
        )
        swept = better(p, fitted, _rated(p, integers, fitted.scales))
        unchanged = np.array_equal(swept.integers, best.integers)
        best = better(p, best, swept)
        if unchanged:
            break
    return best


def refitted(p: Problem, rounded: Rounded) -> Rounded:
    """Return the same integers with the scales that serve them best, one scale of each row after the other."""
    integers = rounded.integers.astype(np.float64)
    scales = rounded.scales.astype(np.float64)
    pull = (p.target - integers * _steps(p, rounded.scales)) @ p.gram
    for k in range(scales.shape[2]):
        part = p.columns == k
        spread = integers[..., part] @ p.gram[:, part, :]  # (g, out, in)
        gain = (pull[..., part] * integers[..., part]).sum(axis=-1)
        curvature = (spread[..., part] * integers[..., part]).sum(axis=-1)
        if p.shared:
            gain, curvature = (np.full_like(a, a.sum()) for a in (gain, curvature))
        step = np.divide(gain, curvature, out=np.zeros_like(gain), where=curvature > 0)
        step = np.where(scales[..., k] + step > _SMALLEST_SCALE, step, 0.0)
        scales[..., k] += step
        pull -= step[..., None] * spread
    return better(p, rounded, _rated(p, integers, scales.astype(np.float32)))


def searched(p: Problem, method: Method, fractions: Sequence[float] = ()) -> Rounded:
    """Return each row's best result of `method` over scales that clip more and more; () for the usual fractions."""
    widest = p.widest_scales()
    if not fractions:
        narrow = p.target.shape[2] <= WIDE
        fractions = (1.0,) if p.high > MANY else FRACTIONS if narrow else FEW_FRACTIONS
    return functools.reduce(functools.partial(better, p), (method(p, f * widest) for f in fractions))


def descent(p: Problem) -> Rounded:
    """Coordinate descent from the best that `gptq` gives over the scales: errs least of all, the default."""
    return coordinate_descent(p, searched(p, gptq), 1 if p.high > MANY else SWEEPS)


def better(p: Problem, one: Rounded, other: Rounded) -> Rounded:
    """Return row by row whichever errs less, `one` where both do alike; as a whole where a scale is shared."""
    if p.shared:
        return other if other.objective < one.objective else one
    take = other.errors < one.errors
    return Rounded(
        np.where(take[..., None], other.integers, one.integers),
        np.where(take[..., None], other.scales, one.scales),
        np.where(take, other.errors, one.errors),
    )


#: What rounder.py offers: a problem to a result, scales searched.
METHODS: dict[str, Callable[[Problem], Rounded]] = {
    "auto": descent,
    "nearest-clipped": lambda p: searched(p, nearest),
    "gptq": lambda p: searched(p, gptq),
    "gpfq": lambda p: searched(p, gpfq),
    "descent": descent,
}


# ------------------------------------------------------------------------------------------- the walk


def _followed(p: Problem, scales: np.ndarray, matrix: np.ndarray) -> Rounded:
    scales = scales.astype(np.float32)
    integers = _walk(p.target, _steps(p, scales), matrix, None, p.low, p.high)
    return better(p, nearest(p, scales), _rated(p, integers, scales))


def _walk(
    target: np.ndarray, steps: np.ndarray, matrix: np.ndarray, start: np.ndarray | None, low: int, high: int
) -> np.ndarray:
    """Return the integers (g, out, in) of one walk; `start` holds the integers that D starts from, None for D = 0."""
    lost = np.zeros_like(target) if start is None else target - steps * start
    owed = np.zeros_like(target) if start is None else lost @ matrix
    integers = np.empty_like(target)
    size = target.shape[-1]
    for begin in range(0, size, _BLOCK):
        part = slice(begin, min(begin + _BLOCK, size))
        wanted, step, old, near = (_inputs_first(a[..., part]) for a in (target, steps, lost, owed))
        coupling = np.ascontiguousarray(np.moveaxis(matrix[:, part, part], 0, 2))[..., None]  # (from, to, g, 1)
        changed, chosen = np.empty_like(near), np.empty_like(near)
        for i in range(len(near)):
            q = np.rint((wanted[i] + near[i]) / step[i])
            chosen[i] = np.minimum(np.maximum(q, low), high)
            changed[i] = wanted[i] - step[i] * chosen[i] - old[i]
            near[i + 1 :] += coupling[i, i + 1 :] * changed[i]
        integers[..., part] = np.moveaxis(chosen, 0, 2)
        owed[..., part.stop :] += np.moveaxis(changed, 0, 2) @ matrix[:, part, part.stop :]
    return integers


def _inputs_first(array: np.ndarray) -> np.ndarray:
    """Return (g, out, in) as (in, g, out), in that order in memory too."""
    return np.ascontiguousarray(np.moveaxis(array, 2, 0))


def _rated(p: Problem, integers: np.ndarray, scales: np.ndarray) -> Rounded:
    scales = scales.astype(np.float32)
    return Rounded(integers.astype(np.int8), scales, p.errors(integers * _steps(p, scales) - p.target))


def _steps(p: Problem, scales: np.ndarray) -> np.ndarray:
    """Return each weight's scale (g, out, in), as float32 holds it."""
    steps: np.ndarray = scales.astype(np.float64)[..., p.columns]
    return steps


def _coupling(gram: np.ndarray) -> np.ndarray:
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    matrix: np.ndarray = gram / diagonal[:, None, :]
    return _without_diagonal(matrix)


def _triangular(gram: np.ndarray) -> np.ndarray:
    upper = np.linalg.cholesky(gram[:, ::-1, ::-1])[:, ::-1, ::-1]  # H = R R', R upper triangular
    matrix: np.ndarray = upper / np.diagonal(upper, axis1=1, axis2=2)[:, None, :]
    return _without_diagonal(matrix)


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    index = np.arange(matrix.shape[-1])
    matrix[:, index, index] = 0.0
    return matrix
