"""Layers that read channels through a chain, and what they lose. Pure numpy; sums are float64.

A reader gives M = U V' + c of the rows U that it reads (outputs, taps * channels), and shall give T. V and c are what
least squares makes of them, with a pull r towards the weight W that it had, as in pruning.py:

    V = argmin |T - M|^2 + r |V - W|^2

Where a Relu reads M + L alone, an error counts only where T + L or M + L is positive (forgiving.py): V is fitted twice,
the second time to targets made anew from what the first gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .chains import Inside, Step, Taps, seen_by_sum

#: Pull of the readers to the weight they had, and of white coordinates to the plain ones; of the mean of the diagonal.
_RIDGE = 1e-3
#: Less than anything that is measured: what must not be 0 where nothing is read.
LEAST = 1e-30


@dataclass(frozen=True, eq=False)
class Tiles:
    """Pieces of images: `patches` (tiles, height, width, in) that the filters see; what a reader shall give of them.

    `inside` belongs to the steps and, last, the reader; `target` and `level` (rows, out) to the reader's outputs:
    `level` is what is added in front of a Relu that forgives; None where there is none.
    """

    patches: np.ndarray
    inside: Sequence[Inside]
    target: np.ndarray
    level: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the channels through a chain: `weight` (out, taps * channels), and its tiles in pieces."""

    steps: Sequence[Step]
    taps: Taps
    weight: np.ndarray
    fitted: Sequence[Tiles]
    held_out: Sequence[Tiles]


@dataclass(frozen=True, eq=False)
class Seat:
    """A reader with the weight and the bias that suit the filters."""

    reader: Reader
    weight: np.ndarray
    bias: np.ndarray | None = None

    def read(self, filters: np.ndarray, pieces: Sequence[Tiles]) -> list[np.ndarray]:
        """Return what it reads of tiles with these filters, piece by piece."""
        turned = filters.T.astype(np.float32)
        return [read_through(self.reader.steps, self.reader.taps, p.patches @ turned, p.inside) for p in pieces]

    def made(self, read: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return what it gives."""
        assert self.bias is not None
        weight, bias = self.weight.T.astype(np.float32), self.bias.astype(np.float32)
        return [u @ weight + bias for u in read]

    def refitted(self, read: Sequence[np.ndarray]) -> Seat:
        """Return it with the best weight and bias for what is read now."""
        pieces, mean = self.reader.fitted, mean_of(read)
        gram = product(read, read, mean, mean)
        wanted = [piece.target for piece in pieces]
        if self.bias is not None:  # what it gives already says what is forgiven
            wanted = [m + r for m, r in zip(self.made(read), self.missing(read), strict=True)]
        found = self._fitted(read, wanted, gram, mean)
        if any(piece.level is not None for piece in pieces):
            wanted = [m + r for m, r in zip(found.made(read), found.missing(read), strict=True)]
            found = found._fitted(read, wanted, gram, mean)
        return found

    def missing(self, read: Sequence[np.ndarray], pieces: Sequence[Tiles] | None = None) -> list[np.ndarray]:
        """Return what it lacks, where that counts; of the fitted tiles if no others are named."""
        pieces = self.reader.fitted if pieces is None else pieces
        return [
            (piece.target - made) * counted(piece, made) for piece, made in zip(pieces, self.made(read), strict=True)
        ]

    def _fitted(
        self, read: Sequence[np.ndarray], wanted: Sequence[np.ndarray], gram: np.ndarray, mean: np.ndarray
    ) -> Seat:
        centre, old = mean_of(wanted), self.reader.weight
        cross = product(wanted, read, centre, mean)
        pull = _RIDGE * np.trace(gram) / len(gram) + LEAST
        weight = old + np.linalg.solve(gram + pull * np.eye(len(gram)), (cross - old @ gram).T).T
        return Seat(self.reader, weight, centre - weight @ mean)


def counted(piece: Tiles, made: np.ndarray) -> np.ndarray:
    """Return where an error counts: everywhere but where a Relu takes away what is made and shall be taken."""
    if piece.level is None:
        return np.ones((1, 1), bool)
    found: np.ndarray = (piece.target + piece.level > 0) | (made + piece.level > 0)
    return found


def energy(target: Sequence[np.ndarray]) -> float:
    """Return |T - mean T|^2."""
    mean = mean_of(target).astype(np.float32)
    return max(squares([t - mean for t in target]), LEAST)


def read_through(steps: Sequence[Step], taps: Taps, tiles: np.ndarray, inside: Sequence[Inside]) -> np.ndarray:
    """Return what a reader reads (rows, taps * channels) of what the filters make."""
    for step, where in zip(steps, inside[:-1], strict=True):
        tiles, _ = step.run(tiles, where)
    return rows_of(taps.gathered(seen_by_sum(tiles, inside[-1])), 2)


def rows_of(array: np.ndarray, behind: int) -> np.ndarray:
    """Return an array as rows: all but the last axes, by as many numbers as these have."""
    return array.reshape(-1, int(np.prod(array.shape[-behind:])))


# ------------------------------------------------------------------------------------------- sums


def squares(pieces: Sequence[np.ndarray]) -> float:
    """Return the sum of all squares."""
    return sum(float(np.square(piece, dtype=np.float64).sum()) for piece in pieces)


def dot(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Return the sum of all products."""
    return sum(float(np.vdot(a, b)) for a, b in zip(one, other, strict=True))


def mean_of(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean row."""
    total: np.ndarray = np.sum([piece.sum(0, dtype=np.float64) for piece in pieces], 0) / sum(map(len, pieces))
    return total


def product(one: Sequence[np.ndarray], other: Sequence[np.ndarray], centre: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the sum of outer products about the means: of each piece in float32, of all in float64."""
    total = np.zeros((one[0].shape[1], other[0].shape[1]))
    left, right = centre.astype(np.float32), mean.astype(np.float32)
    for a, b in zip(one, other, strict=True):
        total += (a - left).T @ (b - right)
    return total


def whitening(gram: np.ndarray) -> np.ndarray:
    """Return L^-1 of gram + ridge = L L': rows times L^-T are white."""
    pull = _RIDGE * np.trace(gram) / len(gram) + LEAST
    inverse: np.ndarray = np.linalg.inv(np.linalg.cholesky(gram + pull * np.eye(len(gram))))
    return inverse
