"""The filters of a convolution fitted to what those that read it lose. Pure numpy; sums are float64.

Filters S (channels, in) make h = P S' of the patches P; a chain of steps takes each channel by itself (chains.py), and
each reader i gives M_i = U_i V_i' + c_i of what it reads, U_i = f_i(h), and shall give T_i (reading.py). Wanted are the
S with the least

    E(S) = sum_i  min over V_i, c_i of  |T_i - M_i|^2 / |T_i - mean T_i|^2

where behind a Relu what is negative and shall be counts nothing (G_i below is 0 there; forgiving.py). It is found by
Gauss-Newton steps, damped as Levenberg and Marquardt do: with the gates and the choices of pooling as they stand, D_i,
and what is missing, R_i,

    argmin over e, F of  sum_i |G_i (R_i - D_i(P e') V_i' - U_i F_i')|^2 / |T_i - mean T_i|^2 + damping |(e, F)|^2

by conjugate gradients, e and F in coordinates in which P and U are white. F, the readers' own change, is then thrown
away, and V is what least squares gives (the tangent of the projected problem: Kaufman 1975, "A variable projection
method for solving separable nonlinear least squares problems"). A step stands only if E falls on other images, so
there is no way for it to get worse there; no labels, no gradient descent, and nothing of the network but these layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .chains import seen_by_sum
from .reading import LEAST, Reader, Seat, counted, dot, energy, mean_of, product, rows_of, squares, whitening

#: Steps, and dampings that are tried for one. On ResNet-20 the first gains most, a fourth 1 % and less.
STEPS, _TRIES = 3, 2
#: In white coordinates the error's own curvature is about 1.
_DAMPING, _HARDER, _EASIER = 0.1, 10.0, 1 / 3
#: With fewer rows than so many times the weights, which then follow the noise of the images, the first is larger.
_SURE = 3
#: Rounds of conjugate gradients.
_ROUNDS = 12
#: A step that lowers the error by a smaller part is the last.
_WORTH = 1e-2
#: Part of the largest gain that every channel is taken to have.
_LEAST_GAIN = 1e-3
#: One position in so many tells how the patches lie.
_SPARSE = 4


def refitted_filters(filters: np.ndarray, readers: Sequence[Reader], steps: int = STEPS) -> np.ndarray | None:
    """Return better filters (channels, in); None where no step lowers the error on the tiles held out.

    `filters` are those to begin with; the last column is what the bias is.
    """
    found = _Point.at(filters, [Seat(reader, reader.weight) for reader in readers])
    rows = sum(len(piece.target) for piece in readers[0].fitted)
    damping, before = _DAMPING * max(1.0, (_SURE * filters.size / rows) ** 2), found
    for _ in range(steps):
        tangent = _Tangent(found)
        for _ in range(_TRIES):
            there = _Point.at(found.filters + tangent.step(damping), found.seats)
            if there.error < found.error:
                break
            damping *= _HARDER
        else:
            break
        little = there.error > (1 - _WORTH) * found.error
        found, damping = there, damping * _EASIER
        if little:
            break
    return None if found is before else found.filters


@dataclass(frozen=True, eq=False)
class _Point:
    """Filters, the readers that suit them, what these read of the fitted tiles; and the error on those held out."""

    filters: np.ndarray
    seats: Sequence[Seat]
    read: Sequence[Sequence[np.ndarray]]
    error: float

    @classmethod
    def at(cls, filters: np.ndarray, seats: Sequence[Seat]) -> _Point:
        read = [seat.read(filters, seat.reader.fitted) for seat in seats]
        suited = [seat.refitted(u) for seat, u in zip(seats, read, strict=True)]
        error = 0.0
        for seat in suited:
            apart = seat.reader.held_out
            rest = seat.missing(seat.read(filters, apart), apart)
            error += squares(rest) / energy([p.target for p in apart])
        return cls(filters, suited, read, error)


# ------------------------------------------------------------------------------------------- one step


class _Tangent:
    """The problem made linear at a point: a map of (e, F_1, F_2, …) to the readers' outputs, and its transpose."""

    def __init__(self, point: _Point) -> None:
        self._point = point
        self._states = [self._run(seat) for seat in point.seats]
        self._rest = [s.missing(u) for s, u in zip(point.seats, point.read, strict=True)]
        self._scales = [energy([p.target for p in s.reader.fitted]) ** -0.5 for s in point.seats]
        self._gates = [
            [counted(p, m) for p, m in zip(s.reader.fitted, s.made(u), strict=True)]
            for s, u in zip(point.seats, point.read, strict=True)
        ]
        self._white, self._gain = self._whitening()
        self._means, self._reads = [], []
        for u in point.read:
            mean = mean_of(u)
            self._means.append(mean.astype(np.float32))
            self._reads.append(whitening(product(u, u, mean, mean)))

    def step(self, damping: float) -> np.ndarray:
        """Return e (channels, in) of the damped problem."""
        owed = [[r * s for r in rest] for rest, s in zip(self._rest, self._scales, strict=True)]
        found = [np.zeros(self._point.filters.shape)]
        found += [np.zeros(seat.weight.shape) for seat in self._point.seats]
        pull = self._back(owed)
        direction, size = [p.copy() for p in pull], dot(pull, pull)
        for _ in range(_ROUNDS):
            if size <= 1e-20:
                break
            moved = self._forth(direction)
            length = size / (sum(squares(m) for m in moved) + damping * dot(direction, direction))
            found = [f + length * d for f, d in zip(found, direction, strict=True)]
            owed = [_less(one, moved_one, length) for one, moved_one in zip(owed, moved, strict=True)]
            pull = [p - damping * f for p, f in zip(self._back(owed), found, strict=True)]
            before, size = size, dot(pull, pull)
            direction = [p + size / before * d for p, d in zip(pull, direction, strict=True)]
        step: np.ndarray = (found[0] @ self._white) * self._gain
        return step

    def _forth(self, change: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        filters = ((change[0] @ self._white) * self._gain).T.astype(np.float32)
        found = []
        for i, seat in enumerate(self._point.seats):
            own = (self._scales[i] * seat.weight).T.astype(np.float32)
            turned = (change[1 + i] @ self._reads[i]).T.astype(np.float32)
            level = self._means[i] @ turned
            parts = []
            for j, piece in enumerate(seat.reader.fitted):
                tiles = piece.patches @ filters
                for step, state, where in zip(seat.reader.steps, self._states[i][j][0], piece.inside[:-1], strict=True):
                    tiles = step.forth(tiles, state, where)
                read = rows_of(seat.reader.taps.gathered(seen_by_sum(tiles, piece.inside[-1])), 2)
                parts.append((read @ own + self._point.read[i][j] @ turned - level) * self._gates[i][j])
            found.append(parts)
        return found

    def _back(self, rest: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        filters = np.zeros(self._point.filters.shape)
        others = []
        for i, seat in enumerate(self._point.seats):
            own = (self._scales[i] * seat.weight).astype(np.float32)
            turned = np.zeros(seat.weight.shape)
            for j, piece in enumerate(seat.reader.fitted):
                gated = rest[i][j] * self._gates[i][j]
                turned += gated.T @ self._point.read[i][j] - np.outer(gated.sum(0, dtype=np.float64), self._means[i])
                states, shapes = self._states[i][j]
                size = seat.reader.taps.outputs(shapes[-1])
                read = (gated @ own).reshape(shapes[-1][0], *size, -1, shapes[-1][-1])
                tiles = seen_by_sum(seat.reader.taps.scattered(read, shapes[-1]), piece.inside[-1])
                for k in reversed(range(len(states))):
                    tiles = seat.reader.steps[k].back(tiles, states[k], piece.inside[k], shapes[k])
                filters += rows_of(tiles, 1).T @ rows_of(piece.patches, 1)
            others.append(turned @ self._reads[i].T)
        return [(filters * self._gain) @ self._white.T, *others]

    def _run(self, seat: Seat) -> list[tuple[list[np.ndarray | None], list[tuple[int, ...]]]]:
        """Return, for each piece, the states of the steps and the shapes of what they read, with the reader's last."""
        turned, found = self._point.filters.T.astype(np.float32), []
        for piece in seat.reader.fitted:
            tiles, states, shapes = piece.patches @ turned, [], []
            for step, where in zip(seat.reader.steps, piece.inside[:-1], strict=True):
                shapes.append(tiles.shape)
                tiles, state = step.run(tiles, where)
                states.append(state)
            found.append((states, [*shapes, tiles.shape]))
        return found

    def _whitening(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the map of white coordinates to plain ones, and a scale for each channel: what its readers make of it.

        Both make conjugate gradients short; whatever they are, the least is the same but for the damping.
        """
        channels, width = self._point.filters.shape
        gram, count, gain = np.zeros((width, width)), 0, np.zeros(channels)
        for seat, scale in zip(self._point.seats, self._scales, strict=True):
            for piece in seat.reader.fitted:
                rows = rows_of(piece.patches, 1)[::_SPARSE]
                gram += rows.T @ rows
                count += len(rows)
            positions = sum(len(piece.target) for piece in seat.reader.fitted)
            gain += positions * np.square(seat.weight.reshape(len(seat.weight), -1, channels)).sum((0, 1)) * scale**2
        least = _LEAST_GAIN * gain.max(initial=0.0) + LEAST
        return whitening(gram / count), 1 / np.sqrt(gain + least)[:, None]


def _less(owed: Sequence[np.ndarray], moved: Sequence[np.ndarray], length: float) -> list[np.ndarray]:
    return [o - np.float32(length) * m for o, m in zip(owed, moved, strict=True)]
