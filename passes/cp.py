"""A convolution's weight as a sum of products of four vectors (CP), by alternating least squares in the metric of H.

    V[o, i, y, x] = sum over r of A[o, r] B[i, r] c[y, r] d[x, r]

so the layer is a chain of 1x1, depthwise K x 1, depthwise 1 x K, 1x1 (Lebedev et al. 2015, "Speeding-up convolutional
neural networks using fine-tuned CP-decomposition"). Given all factors but one the error is a quadratic of that one.

CP may diverge, with factors that grow against each other; so each factor is pulled to 0 with a weight relative to its
own normal matrix, and columns are brought to one length after each sweep (Phan et al. 2020, "Stable low-rank tensor
decomposition for compression of convolutional neural network").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .low_rank import SWEEPS, Factors, descended, solved_normal
from .metric import error_of

#: Pull of the factors to 0, relative to the mean diagonal of their normal matrices.
_PULL = 1e-4
#: What is left of it in the end, if A grows by no more than this factor.
_FREE, _GROWN = 1e-10, 1.5


def cp(weight: np.ndarray, metric: np.ndarray, rank: int, *, sweeps: int = 4 * SWEEPS, seed: int = 0) -> Factors:
    """Return A (out, rank), B (in, rank), c (rows, rank) and d (columns, rank) of W (out, in, rows, columns).

    Alternating least squares end where they started near: once at the leading vectors of each mode, once at what fits
    the weight alone; the better stands.
    """
    rng = np.random.default_rng(seed)
    start = [_leading(weight, mode, rank, rng) for mode in range(4)]
    first = _alternated(weight, metric, start, sweeps)
    blind = _alternated(weight, np.eye(len(metric)), start, sweeps)
    second = _alternated(weight, metric, list(blind.arrays), sweeps)
    return _settled(weight, metric, min(first, second, key=lambda found: found.error))


def _alternated(weight: np.ndarray, metric: np.ndarray, start: Sequence[np.ndarray], sweeps: int) -> Factors:
    """Return the best that some sweeps of alternating least squares come by, what they start from included."""
    modes = list(start)
    best = (error_of(weight, _composed(modes), metric), tuple(modes))
    given = (weight.reshape(len(weight), -1) @ metric).reshape(weight.shape)
    for _ in range(sweeps):
        modes[1] = _channels(given, metric, modes)
        for mode in (2, 3):
            modes[mode] = _mode(given, metric, modes, mode)
        parts = _spread(modes[1:], weight.shape[1:])
        modes[0] = solved_normal(parts.T @ metric @ parts, parts.T @ given.reshape(len(weight), -1).T, _PULL).T
        modes = _one_length(modes)
        error = error_of(weight, _composed(modes), metric)
        if error < best[0]:
            best = (error, tuple(m.copy() for m in modes))
    return Factors(best[1], best[0])


def _settled(weight: np.ndarray, metric: np.ndarray, found: Factors) -> Factors:
    """Return the factors with A solved for once more without the pull, unless A grows by that."""
    last, *others = found.arrays
    parts = _spread(others, weight.shape[1:])
    free = solved_normal(parts.T @ metric @ parts, parts.T @ metric @ weight.reshape(len(weight), -1).T, _FREE).T
    error = error_of(weight, _composed([free, *others]), metric)
    grows = np.linalg.norm(free) > _GROWN * np.linalg.norm(last)
    return found if grows or error >= found.error else Factors((free, *others), error)


def _leading(weight: np.ndarray, mode: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    """Return the first singular vectors along a mode; random columns beyond them."""
    flat = np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1)
    vectors = np.linalg.eigh(flat @ flat.T)[1][:, ::-1][:, :rank]
    more = rng.normal(size=(weight.shape[mode], rank - vectors.shape[1])) / np.sqrt(weight.shape[mode])
    return np.concatenate([vectors, more], axis=1)


def _spread(modes: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """Return the Khatri-Rao product of B, c and d: (in rows columns, rank)."""
    found: np.ndarray = np.einsum("ir,yr,xr->iyxr", *modes, optimize=True).reshape(int(np.prod(shape)), -1)
    return found


def _composed(modes: Sequence[np.ndarray]) -> np.ndarray:
    found: np.ndarray = np.einsum("or,ir,yr,xr->oiyx", *modes, optimize=True)
    return found


def _channels(given: np.ndarray, metric: np.ndarray, modes: Sequence[np.ndarray]) -> np.ndarray:
    """Return a better B, the others being given: its normal matrix, (in rank)^2, is never made."""
    last, first, rows, columns = modes
    kernel = np.einsum("yr,xr->yxr", rows, columns).reshape(-1, last.shape[1])
    ins, size, crossed = len(first), len(kernel), last.T @ last
    right = np.einsum("oiq,or,qr->ir", given.reshape(len(given), ins, size), last, kernel, optimize=True)
    strength = float(np.trace(metric)) / len(metric) * float(np.trace(crossed)) / len(crossed)
    pull = _PULL * strength * float(np.square(kernel).sum(axis=0).mean())

    def applied(b: np.ndarray) -> np.ndarray:
        spread = (b[:, None] * kernel).reshape(ins * size, -1) @ crossed
        found: np.ndarray = ((metric @ spread).reshape(ins, size, -1) * kernel).sum(axis=1) + pull * b
        return found

    return descended(applied, right, first)


def _mode(given: np.ndarray, metric: np.ndarray, modes: Sequence[np.ndarray], mode: int) -> np.ndarray:
    """Return the best c or d, the others being given."""
    out, _, rank = modes[0], modes[mode], modes[0].shape[1]
    letters = "iyx"
    mine, sizes = letters[mode - 1], [len(m) for m in modes[1:]]
    others = [(letter, m) for letter, m in zip(letters, modes[1:], strict=True) if letter != mine]
    terms = ",".join(f"{letter}r" for letter, _ in others)
    right = np.einsum(f"oiyx,or,{terms}->{mine}r", given, out, *(m for _, m in others), optimize=True)
    upper = letters.upper()
    also = ",".join(f"{letter.upper()}s" for letter, _ in others)
    normal = np.einsum(
        f"{letters}{upper},{terms},{also},rs->{mine}r{mine.upper()}s",
        metric.reshape(*sizes, *sizes), *(m for _, m in others), *(m for _, m in others), out.T @ out, optimize=True,
    )  # fmt: skip
    size = sizes[mode - 1] * rank
    return solved_normal(normal.reshape(size, size), right.reshape(size), _PULL).reshape(sizes[mode - 1], rank)


def _one_length(modes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the same components with columns of one length in all modes."""
    lengths = np.array([np.linalg.norm(mode, axis=0) for mode in modes])
    whole = np.prod(lengths, axis=0) ** (1 / len(modes))
    return [mode * np.where(length > 0, whole / np.where(length > 0, length, 1.0), 0.0)
            for mode, length in zip(modes, lengths, strict=True)]  # fmt: skip
