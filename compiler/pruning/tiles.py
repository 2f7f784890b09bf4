"""Tiles of a reader's output, with all that they see of what the producer of its channels reads (producers.py).

From the last link back to the first, a tile of (height, width) at `at` is made of `spans` at `origins`:

    span <- (span - 1) stride + (kernel - 1) dilation + 1          origin <- origin * stride - padding
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes.chains import Inside, Taps, seen_by_sum
from ...passes.reading import Reader, Tiles, read_through
from ..fitting.layerwise import Ahead, bias_of
from ..fitting.targets import Beside
from .chain_links import End, Two, link_of, matrix, weight_of

#: Height and width of a tile: neighbours share most of what they see.
_TILE = 4
#: Most outputs of a reader that are fitted to, positions of the producer's output, and numbers in its patches (100 MB).
#: On FastestDet's first layer 740,000 positions gain nothing over 300,000.
ROWS, POSITIONS, NUMBERS = 32768, 300_000, 25_000_000
#: Positions of the producer's output that are worked on at a time.
_PIECE = 16384


@dataclass(frozen=True, eq=False)
class Drawing:
    """Draws tiles for the readers of `node`, of whose channels those `kept` are left."""

    node: ir.Node
    kept: np.ndarray
    ahead: Ahead
    rng: np.random.Generator

    def reader(self, end: End) -> Reader:
        """Return a reader with its tiles: from every image as many."""
        weight, ahead = weight_of(end.reader.node), self.ahead
        view = _View.of(self.node, end, ahead.x[0].shape[2:])
        beside, images = ahead.beside(end.reader.node), sum(map(len, ahead.x))
        parts: tuple[list[Tiles], list[Tiles]] = ([], [])
        for i, apart in enumerate(ahead.held_out):
            number = max(1, round(view.most * len(ahead.x[i]) / images))
            image, at = np.arange(number) % len(ahead.x[i]), view.drawn(number, self.rng)
            for start in range(0, number, view.piece):
                part = slice(start, start + view.piece)
                tiles = view.tiles(ahead.x[i], ahead.coarse_x[i], image[part], at[:, part])
                parts[apart].append(_beside(tiles, beside, i, image[part], at[:, part], view.spans[-1]))
        steps = [link.step(self.kept) for link in end.links]
        return Reader(steps, end.reader.taps, matrix(weight[:, self.kept]).astype(np.float64), *parts)


@dataclass(frozen=True, eq=False)
class _View:
    """What tiles of one reader see: `sizes` and `spans` of what the producer reads, then of what each link gives."""

    node: ir.Node
    end: End
    sizes: Sequence[Two]
    spans: Sequence[Two]

    @classmethod
    def of(cls, node: ir.Node, end: End, size: Sequence[int]) -> _View:
        own = link_of(node)
        assert own is not None
        chain = (own, *end.links, end.reader)
        sizes = [(int(size[0]), int(size[1]))]
        for link in chain:
            sizes.append(link.outputs(sizes[-1]))
        spans = [(min(_TILE, sizes[-1][0]), min(_TILE, sizes[-1][1]))]
        for link in reversed(chain):
            spans.append(link.taps.spans(spans[-1]))
        return cls(node, end, sizes, spans[::-1])

    @property
    def most(self) -> int:
        """How many tiles there are at most."""
        each, width = math.prod(self.spans[1]), math.prod(weight_of(self.node).shape[1:]) + 1
        return min(NUMBERS // (each * width), POSITIONS // each, ROWS // math.prod(self.spans[-1]))

    @property
    def piece(self) -> int:
        """How many tiles are worked on at a time."""
        return max(1, _PIECE // math.prod(self.spans[1]))

    def drawn(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Return where so many tiles begin: (2, number)."""
        ends = zip(self.sizes[-1], self.spans[-1], strict=True)
        return np.stack([rng.integers(0, size - span + 1, number) for size, span in ends])

    def tiles(self, x: np.ndarray, coarse_x: np.ndarray, image: np.ndarray, at: np.ndarray) -> Tiles:
        """Return tiles at these places of the images, with what the reader gives in the uncut network as the target."""
        own = link_of(self.node)
        assert own is not None
        origins = [at]
        for link in reversed((own, *self.end.links, self.end.reader)):
            strides, pads = np.array(link.taps.strides)[:, None], np.array(link.before)[:, None]
            origins.append(origins[-1] * strides - pads)
        origins.reverse()
        inside = [_inside(*each) for each in zip(origins[:-1], self.spans[:-1], self.sizes[:-1], strict=True)]
        exact, coarse = (
            _patches(_crops(array, image, origins[0], self.spans[0]), own.taps, inside[0]) for array in (x, coarse_x)
        )
        return Tiles(coarse, inside[1:], self._made(exact, inside[1:]))

    def _made(self, patches: np.ndarray, inside: Sequence[Inside]) -> np.ndarray:
        """Return what the reader gives of these patches with all channels and the weights that there were."""
        weight, reader = weight_of(self.node), self.end.reader
        filters = np.concatenate([matrix(weight), bias_of(self.node, len(weight))[:, None]], axis=1).astype(np.float32)
        steps = [link.step(np.arange(len(weight))) for link in self.end.links]
        own = matrix(weight_of(reader.node))
        made: np.ndarray = read_through(steps, reader.taps, patches @ filters.T, inside) @ own.T
        return made + bias_of(reader.node, len(own)).astype(np.float32)


def _beside(tiles: Tiles, beside: Beside, batch: int, image: np.ndarray, at: np.ndarray, span: Two) -> Tiles:
    """Return the tiles with what a residual Add behind the reader lacks on its other input."""
    if beside.skip is None or beside.coarse_skip is None:
        return Tiles(
            tiles.patches, tiles.inside, tiles.target, np.zeros_like(tiles.target) if beside.forgiving else None
        )
    skip, coarse_skip = (
        _crops(arrays[batch], image, at, span).reshape(len(tiles.target), -1)
        for arrays in (beside.skip, beside.coarse_skip)
    )
    target = tiles.target + skip - coarse_skip
    return Tiles(tiles.patches, tiles.inside, target, coarse_skip if beside.forgiving else None)


def _inside(origin: np.ndarray, span: Two, size: Two) -> Inside:
    """Say which positions of tiles lie inside of the image."""
    rows, columns = (
        (a[:, None] + np.arange(s) >= 0) & (a[:, None] + np.arange(s) < n)
        for a, s, n in zip(origin, span, size, strict=True)
    )
    found = rows[:, :, None, None] & columns[:, None, :, None]
    return None if found.all() else found


def _crops(array: np.ndarray, image: np.ndarray, origin: np.ndarray, span: Two) -> np.ndarray:
    """Return (tiles, height, width, channels) cut out of (images, channels, height, width); the edge beyond it."""
    rows, columns = (
        (a[:, None] + np.arange(s)).clip(0, n - 1) for a, s, n in zip(origin, span, array.shape[2:], strict=True)
    )
    found: np.ndarray = array[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found


def _patches(tiles: np.ndarray, taps: Taps, inside: Inside) -> np.ndarray:
    """Return what each filter sees, and a 1 for its bias: (tiles, height, width, in + 1)."""
    read = taps.gathered(seen_by_sum(tiles, inside))
    read = read.reshape(*read.shape[:3], -1)
    return np.concatenate([read, np.ones((*read.shape[:3], 1), read.dtype)], axis=-1)
