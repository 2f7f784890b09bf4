"""Layers as chains of smaller ones, fitted to what they read and give. Pure numpy, float64.

Algebra. A layer reads rows of X (n, in) and gives Y = X W'. Any other weight V of its shape errs by

    |X (W - V)'|^2 = tr (W - V) H (W - V)'          H: metric.py

so H is all that is needed of the images. Of W, seen as W[o, p, q] with the inputs (p, q) in two parts, there are

    svd       V = A B             A (out, r), B (r, in): the layer itself with r outputs, then 1x1
              the best A are the first r eigenvectors of W H W', B = A'W: the truncated singular value decomposition of
              W H^1/2 (Zhang et al. 2016, "Accelerating very deep convolutional networks"; Eckart, Young 1936)
    reduced   V[o, p, q] = sum over r of C[o, r, q] B[p, r]           B first, along p alone; then C
              p the channels, q the kernel: 1x1 to r channels, then the kernel
              p the channels and the kernel's rows, q its columns: K x 1, then 1 x K (Jaderberg et al. 2014,
              "Speeding up convolutional neural networks with low rank expansions")
    tucker    V[o, p, q] = sum over s, r of A[o, s] C[s, r, q] B[p, r]       1x1, the kernel, 1x1 (Kim et al. 2016,
              "Compression of deep convolutional neural networks for fast and low power mobile applications")
    cp        four factors (cp.py)

`svd` has its optimum in closed form. The others are found by alternating least squares: given all factors but one the
error is a quadratic of that one, in which it is solved for; so the error never rises. Started from the eigenvectors of
W's part along p (HOSVD; De Lathauwer et al. 2000), with H's mean over q as the metric.

What stands between two factors is scaled so that each gets the root of a component's strength: INT8 afterwards sees no
weight or channel that dwarfs the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .metric import RIDGE, Metric

#: Sweeps of alternating least squares, and steps of conjugate gradients within one.
SWEEPS, _STEPS = 8, 12


@dataclass(frozen=True, eq=False)
class Factors:
    """A chain that stands for a weight: `arrays` as in the header, first applied last in the name, and its `error`.

    svd (A, B); reduced (C, B); tucker (A, C, B); cp (A, B, c, d). `error` is relative to tr W H W'.
    """

    arrays: tuple[np.ndarray, ...]
    error: float


# ------------------------------------------------------------------------------------------- svd

#: Eigenvalues and eigenvectors, as `spectrum` has them.
Spectrum = tuple[np.ndarray, np.ndarray]


def spectrum(weight: np.ndarray, metric: Metric) -> Spectrum:
    """Return the eigenvalues of W H W', descending, and its eigenvectors (out, out) as columns."""
    flat = weight.reshape(len(weight), -1)
    values, vectors = np.linalg.eigh(flat @ metric @ flat.T)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def svd(weight: np.ndarray, known: Spectrum, rank: int) -> Factors:
    """Return A (out, rank) and B (rank, in…) of the least error, from the spectrum of the weight in its metric."""
    values, vectors = known
    strength = values[:rank] ** 0.25  # a component's output has the root of its eigenvalue; half of it to each side
    strength = np.where(strength > 0, strength, 1.0)
    left, whole = vectors[:, :rank], float(values.sum())
    inner = left.T @ weight.reshape(len(weight), -1)
    found = (left * strength, (inner / strength[:, None]).reshape(rank, *weight.shape[1:]))
    return Factors(found, float(values[rank:].sum()) / whole if whole > 0 else 0.0)


# ------------------------------------------------------------------------------------------- two parts of the inputs


@dataclass(frozen=True, eq=False)
class Parted:
    """A weight W (out, p, q) and the metric H (p q)^2 of what it reads, with what several ranks share."""

    weight: np.ndarray
    metric: np.ndarray

    @cached_property
    def given(self) -> np.ndarray:
        """W H, (out, p, q)."""
        found: np.ndarray = (self.weight.reshape(len(self.weight), -1) @ self.metric).reshape(self.weight.shape)
        return found

    @cached_property
    def energy(self) -> float:
        """tr W H W'."""
        return float(np.vdot(self.given, self.weight))

    @cached_property
    def roots(self) -> tuple[np.ndarray, np.ndarray]:
        """The root of H's mean over q, (p, p), and its inverse where it has one."""
        _, p, q = self.weight.shape
        values, vectors = np.linalg.eigh(np.einsum("aqbq->ab", self.metric.reshape(p, q, p, q)) / q)
        root = np.sqrt(np.maximum(values, 0.0))
        inverse = np.where(root > 1e-10 * root.max(initial=0.0), 1 / np.maximum(root, 1e-300), 0.0)
        return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T

    @cached_property
    def start(self) -> np.ndarray:
        """What B starts from: of any rank its first columns."""
        return self._leading(self.weight)

    def turned(self, last: np.ndarray) -> Parted:
        """Return A'W in the same metric, for A (out, outputs)."""
        found = Parted(np.tensordot(last.T, self.weight, 1), self.metric)
        found.__dict__.update(given=np.tensordot(last.T, self.given, 1), roots=self.roots)
        return found

    def error(self, core: np.ndarray, first: np.ndarray) -> float:
        """Return the relative error of C and B, from sums that are there already."""
        _, rank, q = core.shape
        flat = core.reshape(len(core), -1)
        cross = np.vdot(np.einsum("opq,pr->orq", self.given, first, optimize=True), core)
        lost = self.energy - 2 * float(cross) + float(np.vdot(flat @ _inner(self.metric, first), flat))
        return max(lost, 0.0) / self.energy if self.energy > 0 else 0.0

    def _leading(self, weight: np.ndarray) -> np.ndarray:
        """Return the first eigenvectors along p, (p, p), with H's mean over q as the metric."""
        root, inverse = self.roots
        white = root @ weight.swapaxes(0, 1).reshape(len(root), -1)
        left = np.linalg.eigh(white @ white.T)[1][:, ::-1]
        found: np.ndarray = inverse @ left  # what the rows of W in this metric are projected on
        return found


def reduced(parted: Parted, rank: int, sweeps: int = SWEEPS) -> Factors:
    """Return C (out, rank, q) and B (p, rank), by alternating least squares."""
    first = np.linalg.qr(parted.start[:, :rank])[0]
    core = _core(parted, first)
    for _ in range(sweeps):
        first = np.linalg.qr(_first(parted, core, first))[0]
        core = _core(parted, first)
    return Factors(_balanced(core, first, parted.metric), parted.error(core, first))


def tucker(parted: Parted, known: Spectrum, outputs: int, inputs: int, sweeps: int = SWEEPS) -> Factors:
    """Return A (out, outputs), C (outputs, inputs, q) and B (p, inputs) (HOOI in the metric of H; `known`: W's)."""
    last = known[1][:, :outputs]
    first = np.linalg.qr(parted.turned(last).start[:, :inputs])[0]
    for sweep in range(sweeps + 1):
        whole = _core(parted, first)
        last = spectrum(whole, _inner(parted.metric, first))[1][:, :outputs]
        core = np.tensordot(last.T, whole, 1)
        if sweep < sweeps:
            first = np.linalg.qr(_first(parted.turned(last), core, first))[0]
    error = parted.error(np.tensordot(last, core, 1), first)
    core, first = _balanced(core, first, parted.metric)
    strength = np.sqrt(np.linalg.norm(core.reshape(outputs, -1), axis=1))
    strength = np.where(strength > 0, strength, 1.0)
    return Factors((last * strength, core / strength[:, None, None], first), error)


def _inner(metric: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the metric of what B gives, (rank q, rank q)."""
    p, rank = first.shape
    q = len(metric) // p
    half = np.tensordot(first.T, metric.reshape(p, q, p * q), 1).reshape(rank * q, p, q)
    inner = np.einsum("apq,pr->arq", half, first, optimize=True).reshape(rank * q, rank * q)
    found: np.ndarray = (inner + inner.T) / 2
    return found


def _core(parted: Parted, first: np.ndarray) -> np.ndarray:
    """Return the best C (out, rank, q), B being given."""
    (out, _, q), rank = parted.weight.shape, first.shape[1]
    right = np.einsum("opq,pr->orq", parted.given, first, optimize=True).reshape(out, rank * q)
    found: np.ndarray = solved_normal(_inner(parted.metric, first), right.T).T.reshape(out, rank, q)
    return found


def _first(parted: Parted, core: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return a better B (p, rank), C being given: conjugate gradients from `start`, so the error never rises."""
    _, p, q = parted.weight.shape
    blocks, crossed = parted.metric.reshape(p, q, p, q), np.tensordot(core, core, (0, 0))  # (rank, q, rank, q)
    right = np.einsum("opq,orq->pr", parted.given, core, optimize=True)

    def applied(b: np.ndarray) -> np.ndarray:
        spread = np.einsum("bs,rqst->brqt", b, crossed, optimize=True)
        found: np.ndarray = np.einsum("aqbt,brqt->ar", blocks, spread, optimize=True)
        return found

    return descended(applied, right, start)


def descended(applied: Callable[[np.ndarray], np.ndarray], right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return what some steps of conjugate gradients make of `start`, towards applied(x) = right."""
    found, left = start.copy(), right - applied(start)
    direction, energy = left.copy(), float(np.vdot(left, left))
    least = 1e-18 * max(float(np.vdot(right, right)), 1e-300)
    for _ in range(_STEPS):
        if energy <= least:
            break
        image = applied(direction)
        step = energy / max(float(np.vdot(direction, image)), 1e-300)
        found += step * direction
        left -= step * image
        before, energy = energy, float(np.vdot(left, left))
        direction = left + energy / before * direction
    return found


def _balanced(core: np.ndarray, first: np.ndarray, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return C and B turned to the principal axes of what B gives, half of each axis' strength on either side."""
    rank = first.shape[1]
    q = core.shape[2]
    inner = _inner(metric, first).reshape(rank, q, rank, q)
    values, turn = np.linalg.eigh(np.einsum("aqbq->ab", inner) / q)
    turn = turn[:, ::-1]
    turned = np.einsum("orq,rs->osq", core, turn, optimize=True)
    made = np.sqrt(np.maximum(values[::-1], 0.0))
    read = np.linalg.norm(turned.swapaxes(0, 1).reshape(rank, -1), axis=1)
    strength = np.where((made > 0) & (read > 0), np.sqrt(read / np.where(made > 0, made, 1.0)), 1.0)
    strength = np.where(strength > 0, strength, 1.0)
    return turned / strength[:, None], (first @ turn) * strength


def solved_normal(normal: np.ndarray, right: np.ndarray, pull: float = RIDGE) -> np.ndarray:
    """Solve normal equations; directions of no weight stay 0."""
    scale = float(np.trace(normal)) / len(normal)
    if scale <= 0:
        return np.zeros_like(right)
    found: np.ndarray = np.linalg.solve(normal + pull * scale * np.eye(len(normal)), right)
    return found
