"""What stands between a convolution and those that read it, channel by channel, with its derivative. Pure numpy.

A chain of steps f_1 … f_k takes each channel of h (tiles, height, width, channels) by itself: clipping (a Relu is one),
max pooling, depthwise convolution. About the h at which a chain ran, with the gates and the choices of pooling as they
stood there, it is linear, and `forth` and `back` are that map D and its transpose:

    f(h + e) = f(h) + D e + o(e)          <D e, g> = <e, D' g>

A kernel is taken tap by tap: its tap at offset a sees the slice a, a + stride, … of what it is laid on. Tiles are cut
out of images, so some positions lie outside: `inside` is False there. Those are 0 to a convolution, and no maximum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

#: (tiles, height, width, 1) booleans; None where every position lies inside of the image.
Inside = np.ndarray | None


@dataclass(frozen=True)
class Taps:
    """A kernel of (height, width), laid on every so many positions."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)

    @property
    def count(self) -> int:
        """How many taps there are."""
        return self.kernel[0] * self.kernel[1]

    def spans(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of what so many outputs read."""
        rows, columns = (
            (n - 1) * s + (k - 1) * d + 1
            for n, k, s, d in zip(size, self.kernel, self.strides, self.dilations, strict=True)
        )
        return rows, columns

    def outputs(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the height and width of what comes of tiles of this shape."""
        rows, columns = (
            (n - (k - 1) * d - 1) // s + 1
            for n, k, s, d in zip(shape[1:3], self.kernel, self.strides, self.dilations, strict=True)
        )
        return rows, columns

    def slices(self, size: tuple[int, int]) -> Iterator[tuple[slice, slice, slice]]:
        """Yield what each tap sees of tiles, for so many outputs."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                starts = (i * self.dilations[0], j * self.dilations[1])
                rows, columns = (
                    slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, size, self.strides, strict=True)
                )
                yield slice(None), rows, columns

    def gathered(self, tiles: np.ndarray) -> np.ndarray:
        """Return (tiles, height, width, taps, channels): what each output reads."""
        return np.stack([tiles[part] for part in self.slices(self.outputs(tiles.shape))], axis=3)

    def scattered(self, read: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return the transpose of `gathered`, on tiles of `shape`."""
        found = np.zeros(shape, read.dtype)
        for tap, part in enumerate(self.slices((read.shape[1], read.shape[2]))):
            found[part] += read[:, :, :, tap]
        return found


class Step(Protocol):
    """One step of a chain. `run` returns what comes out, and what `forth` and `back` have to know of it."""

    @property
    def taps(self) -> Taps:
        """What its outputs read."""

    def run(self, tiles: np.ndarray, inside: Inside) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the outputs and the state."""

    def forth(self, change: np.ndarray, state: np.ndarray | None, inside: Inside) -> np.ndarray:
        """Return D e."""

    def back(self, change: np.ndarray, state: np.ndarray | None, inside: Inside, shape: Sequence[int]) -> np.ndarray:
        """Return D' g; `shape` is that of the inputs."""


@dataclass(frozen=True)
class Clip:
    """What lies below `low` or above `high` is that; a Relu where these are 0 and infinite."""

    low: float = 0.0
    high: float = np.inf
    taps: Taps = Taps()

    def run(self, tiles: np.ndarray, inside: Inside) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the outputs, and where nothing was clipped."""
        return np.clip(tiles, np.float32(self.low), np.float32(self.high)), (tiles > self.low) & (tiles < self.high)

    def forth(self, change: np.ndarray, state: np.ndarray | None, inside: Inside) -> np.ndarray:
        """Return the changes that come through."""
        through: np.ndarray = change * state
        return through

    def back(self, change: np.ndarray, state: np.ndarray | None, inside: Inside, shape: Sequence[int]) -> np.ndarray:
        """Return the same: the map is its own transpose."""
        return self.forth(change, state, inside)


@dataclass(frozen=True)
class MaxPool:
    """The largest of what the taps see."""

    taps: Taps

    def run(self, tiles: np.ndarray, inside: Inside) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the outputs, and which tap each is from; of several the first."""
        seen = tiles if inside is None else np.where(inside, tiles, np.float32(-np.inf))
        size = self.taps.outputs(tiles.shape)
        best = np.full((len(tiles), *size, tiles.shape[-1]), -np.inf, tiles.dtype)
        chosen = np.zeros(best.shape, np.uint8 if self.taps.count < 256 else np.int64)
        for tap, part in enumerate(self.taps.slices(size)):
            larger = seen[part] > best
            chosen[larger] = tap
            np.maximum(best, seen[part], out=best)
        return np.where(np.isneginf(best), np.float32(0), best), chosen  # tiles beyond the image, which nobody counts

    def forth(self, change: np.ndarray, state: np.ndarray | None, inside: Inside) -> np.ndarray:
        """Return the changes of the taps that were chosen."""
        assert state is not None
        found = np.zeros(state.shape, change.dtype)
        for tap, part in enumerate(self.taps.slices((state.shape[1], state.shape[2]))):
            found += change[part] * (state == tap)
        return found

    def back(self, change: np.ndarray, state: np.ndarray | None, inside: Inside, shape: Sequence[int]) -> np.ndarray:
        """Return each change at the tap that was chosen."""
        assert state is not None
        found = np.zeros(shape, change.dtype)
        for tap, part in enumerate(self.taps.slices((state.shape[1], state.shape[2]))):
            found[part] += change * (state == tap)
        return found


@dataclass(frozen=True, eq=False)
class Depthwise:
    """A convolution of each channel by itself: `weight` (taps, channels), `bias` (channels,)."""

    taps: Taps
    weight: np.ndarray
    bias: np.ndarray

    def run(self, tiles: np.ndarray, inside: Inside) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the outputs; there is nothing to know of them."""
        return self.forth(tiles, None, inside) + self.bias, None

    def forth(self, change: np.ndarray, state: np.ndarray | None, inside: Inside) -> np.ndarray:
        """Return the same without the bias."""
        seen, size = seen_by_sum(change, inside), self.taps.outputs(change.shape)
        found = np.zeros((len(change), *size, change.shape[-1]), change.dtype)
        for tap, part in zip(self.weight, self.taps.slices(size), strict=True):
            found += seen[part] * tap
        return found

    def back(self, change: np.ndarray, state: np.ndarray | None, inside: Inside, shape: Sequence[int]) -> np.ndarray:
        """Return each change at all that its taps saw."""
        found = np.zeros(shape, change.dtype)
        for tap, part in zip(self.weight, self.taps.slices((change.shape[1], change.shape[2])), strict=True):
            found[part] += change * tap
        return seen_by_sum(found, inside)


def seen_by_sum(tiles: np.ndarray, inside: Inside) -> np.ndarray:
    """Return the tiles with 0 outside of the image."""
    return tiles if inside is None else tiles * inside
