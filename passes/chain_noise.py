"""What rounding to integers costs a layer, whole or as a chain: part of its error where integers will run.

Algebra. Weights are rounded per output channel of each link, symmetrically: V^ is the weight that the rounded links
stand for, and |X (W - V^)'|^2 counts both what the rank leaves out and what rounding adds. A tensor z between two links
is rounded with one step for all its channels, from -k sigma to k sigma of the strongest:

    step = 2 k max_c sigma_c / 255          noise = n step^2 / 12 sum over c of g_c

where sigma_c^2 = f_c H f_c' / n for the vector f_c over the layer's patch that makes channel c (at the kernel's centre
where the links so far have no kernel), and g_c is the energy of what the links behind z make of a one in c. What the
layer itself reads is rounded either way, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .factorize import Chain, composed
from .metric import Metric, energy_of

#: A tensor reaches so many of its standard deviations.
_REACH = 5.0
#: Steps from the least to the largest value of a tensor.
_LEVELS = 255


def rounded(weight: np.ndarray, most: int = 127) -> np.ndarray:
    """Return a weight (out, …) rounded per output channel to integers of at most `most` times a step, as float64."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1).reshape(-1, *[1] * (weight.ndim - 1))
    step = np.where(largest > 0, largest, 1.0) / most
    found: np.ndarray = np.rint(weight / step) * step
    return found


def energy(chain: Chain, weight: np.ndarray, metrics: Sequence[Metric], rows: int, most: int = 127) -> float:
    """Return |X (W - V^)'|^2 with the noise between the links, for a weight (groups, out, in, k…)."""
    links = Chain(chain.form, tuple(type(f)(_rounded(chain.form, f.arrays, most), f.error) for f in chain.groups), 0.0)
    stands_for = composed(links, weight.shape)
    total = 0.0
    for factors, w, v, h in zip(chain.groups, weight, stands_for, metrics, strict=True):
        total += energy_of(w - v, h)
        for made, gains in _between(chain.form, factors.arrays, w.shape[2:]):
            strongest = np.einsum("ci,ci->c", made @ h, made).max(initial=0.0) / max(rows, 1)
            step = 2 * _REACH * math.sqrt(max(float(strongest), 0.0)) / _LEVELS
            total += rows * step**2 / 12 * float(gains.sum())
    return total


def _rounded(form: str, arrays: Sequence[np.ndarray], most: int) -> tuple[np.ndarray, ...]:
    """Return the links' weights, each rounded per output channel of its own: (p, rank) has them along rank."""
    turned = {"svd": (), "cp": (1, 2, 3)}.get(form, (len(arrays) - 1,))
    return tuple(rounded(a.T, most).T if i in turned else rounded(a, most) for i, a in enumerate(arrays))


def _between(form: str, arrays: Sequence[np.ndarray], kernel: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return of each tensor between two links its channels as vectors over the patch (channels, in k…), and gains."""
    size = math.prod(kernel)
    if form == "svd":
        return [(arrays[1].reshape(len(arrays[1]), -1), np.square(arrays[0]).sum(axis=0))]
    if form == "cp":
        last, first, rows, columns = arrays
        point, at = np.eye(size)[size // 2], kernel[1] // 2
        stripe = np.einsum("yr,x->ryx", rows, np.eye(kernel[1])[at]).reshape(-1, size)
        whole = np.einsum("yr,xr->ryx", rows, columns).reshape(-1, size)
        a, c, d = (np.square(m).sum(axis=0) for m in (last, rows, columns))
        return [
            (_spread(first, point[None].repeat(first.shape[1], axis=0)), a * c * d),
            (_spread(first, stripe), a * d),
            (_spread(first, whole), a),
        ]
    core, first = arrays[-2:]
    taps = core.shape[2]  # kernel positions that the first link does not have
    centre = np.eye(taps)[taps // 2][None].repeat(first.shape[1], axis=0)
    behind = core if form != "tucker" else np.tensordot(arrays[0], core, 1)
    found = [(_spread(first, centre), np.square(behind).sum(axis=(0, 2)))]
    if form == "tucker":
        whole = np.einsum("srq,pr->spq", core, first, optimize=True).reshape(len(core), -1)
        found.append((whole, np.square(arrays[0]).sum(axis=0)))
    return found


def _spread(first: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Return (rank, p q) of B (p, rank) and what each component takes of the kernel's other positions (rank, q)."""
    found: np.ndarray = np.einsum("pr,rq->rpq", first, taps).reshape(first.shape[1], -1)
    return found
