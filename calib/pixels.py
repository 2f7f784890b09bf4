"""Arithmetic on 8-bit images that costs little beside decoding them: what degradations are made of.

    look-up            y = T[x]
    noise              y = x + n,  n ~ N(mean, sigma^2), rounded to integers, saturating
    symmetric kernels  y = (k1 * k2 * ... * x) / (sum k1)(sum k2)...,  along one axis, in integers of 16 bits

The limit is memory and the overhead of calls, so: pixels are copied once out of Pillow and once back into it; work goes
by pieces that stay in the cache; noise is drawn as grain is drawn for films (Norkin and Birkbeck, "Film Grain Synthesis
for AV1 Video Codec", 2018): a tile of it for each image, read from random places; a kernel that is a product of shorter
ones is applied as such (Wells, "Efficient Synthesis of Gaussian Filters by Cascaded Uniform Filters", 1986).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from random import Random

import numpy as np
from numpy.lib.stride_tricks import as_strided
from PIL import Image

#: A symmetric kernel of positive integers, and the distance of its taps.
Factor = tuple[tuple[int, ...], int]

#: Elements that are worked on at once, so that what lies between stays in the cache.
CHUNK = 1 << 17
#: With fewer pixels Pillow's look-up takes longer to read its table than to use it.
_FEW_PIXELS = 1 << 14
#: Noise is read in lines of this many samples, from a tile.
_LINE, _TILE = 4096, 1 << 16
#: The tile's samples start at one of so many places in a table that all images share.
_STARTS = 1 << 18
#: The largest magnitude of the noise, in grey values: it is kept in 8 bits.
NOISE_LIMIT = 127


# --------------------------------------------------------------------------------------------- Pillow


def read(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image in mode L or RGB: uint8, (H, W, C), read-only. One copy; `np.asarray` makes two."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, len(image.getbands()))


def write(pixels: np.ndarray) -> Image.Image:
    """Return contiguous pixels, uint8, (H, W, C), as an image in mode L or RGB."""
    height, width, channels = pixels.shape
    return Image.frombytes("L" if channels == 1 else "RGB", (width, height), pixels)


def looked_up(image: Image.Image, table: np.ndarray) -> Image.Image:
    """Return the image with each value replaced by the table's: 256 numbers, rounded and clipped."""
    values = np.clip(np.rint(table), 0, 255).astype(np.uint8)
    if image.width * image.height < _FEW_PIXELS:
        return Image.frombytes(image.mode, image.size, image.tobytes().translate(values.tobytes()))
    return image.point(values.tolist() * len(image.getbands()))


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Return slices of rows that are worked on at once, where each is `width` elements."""
    size = max(1, CHUNK // width)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


# --------------------------------------------------------------------------------------------- noise


def uniform(rng: Random, count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1), float32, 24 bits each."""
    return (np.frombuffer(rng.randbytes(4 * count), "<u4") >> 8).astype(np.float32) / np.float32(2**24)


@functools.cache
def _normal() -> np.ndarray:
    """Return standard normal samples, float32, independent of each other.

    Each is one of 2^14 quantiles, in the middle of equal shares: cut at 4.0 standard deviations, and as exact as 8-bit
    pixels can show. NumPy keeps the bits of a generator the same for ever, and not what it makes of them.
    """
    normal = statistics.NormalDist()
    upper = np.array([normal.inv_cdf(0.5 + (i + 0.5) / 2**14) for i in range(2**13)], np.float32)
    quantiles = np.concatenate([-upper[::-1], upper])
    bits = np.random.PCG64(2007).random_raw((_STARTS + _TILE) // 4).astype("<u8").view("<u2")
    table: np.ndarray = quantiles[bits >> 2]
    table.setflags(write=False)
    return table


def noisy(pixels: np.ndarray, sigma: float, mean: float, rng: Random) -> np.ndarray:
    """Add normal noise to each value (uint8, any shape), rounded to an integer; clip to 0..255.

    Beyond 65,536 values samples come again, in other lines and at other distances: correlations are as those of that
    many independent samples, within 1/256 of none (one deviation). ValueError where they would go beyond `NOISE_LIMIT`.
    """
    if abs(mean) + 4 * sigma > NOISE_LIMIT:
        raise ValueError(f"noise of deviation {sigma:.3g} about {mean:.3g} goes beyond {NOISE_LIMIT}")
    flat, start = pixels.reshape(-1), rng.randrange(_STARTS)
    bounds = _bounded(_normal()[start : start + min(flat.size, _TILE)], sigma, mean)
    out = np.empty_like(flat)
    if flat.size <= _TILE:
        _saturated(flat, bounds, out)
        return out.reshape(pixels.shape)
    windows = [as_strided(each, (_TILE - _LINE, _LINE), (1, 1)) for each in bounds]
    for part in chunks(flat.size, 1):
        values = flat[part]
        lines = (uniform(rng, -(-values.size // _LINE)) * (_TILE - _LINE)).astype(np.intp)
        _saturated(values, [window[lines].reshape(-1)[: values.size] for window in windows], out[part])
    return out.reshape(pixels.shape)


def _saturated(values: np.ndarray, bounds: Iterable[np.ndarray], out: np.ndarray) -> None:
    """Write values + noise to `out`, within 0..255."""
    low, high, noise = bounds
    np.maximum(values, low, out=out)
    np.minimum(out, high, out=out)
    np.add(out, noise, out=out)


def _bounded(samples: np.ndarray, sigma: float, mean: float) -> np.ndarray:
    """Return (3, N) uint8: what x has to be at least and at most for x + n to be in 0..255, and n modulo 256."""
    scaled = samples * np.float32(sigma)
    scaled += np.float32(mean)
    out, zero = np.empty((3, len(samples)), np.int8), np.zeros(len(samples), np.int8)
    low, high, noise = out
    noise[:] = np.rint(scaled, out=scaled)
    np.maximum(np.negative(noise, out=low), zero, out=low)
    np.invert(np.maximum(noise, zero, out=high), out=high)
    return out.view(np.uint8)


# --------------------------------------------------------------------------------------------- kernels


def mirror(length: int, radius: int) -> np.ndarray:
    """Return indices -radius .. length + radius - 1, mirrored where they are outside: c b | a b c | b a."""
    period = max(2 * (length - 1), 1)
    indices = np.arange(-radius, length + radius) % period
    return np.minimum(indices, period - indices)


def product(factors: Sequence[Factor]) -> np.ndarray:
    """Return the kernel that the factors make together, as integers."""
    kernel = np.ones(1, int)
    for taps, distance in factors:
        spread = np.zeros((len(taps) - 1) * distance + 1, int)
        spread[::distance] = taps
        kernel = np.convolve(kernel, spread)
    return kernel


def framed(pixels: np.ndarray, above: int, beside: int) -> Iterator[tuple[slice, np.ndarray, int]]:
    """Yield (rows, piece, pitch) for pieces of the image in a mirrored frame, `above` by `beside` pixels broad.

    A piece is uint16, flat, each of its rows `pitch` elements: neighbours in any direction are at a fixed distance, and
    sums of them are sums of long slices. Those over the right border mean nothing; the piece has room for the last.
    """
    height, width, channels = pixels.shape
    down = mirror(height, above) if above else None
    pitch = (width + 2 * beside) * channels
    for rows in chunks(height, pitch):
        lines = pixels[down[rows.start : rows.stop + 2 * above]] if down is not None else pixels[rows]
        piece = np.empty(len(lines) * pitch + 2 * beside * channels, np.uint16)
        inside = piece[: len(lines) * pitch].reshape(len(lines), -1, channels)
        inside[:, beside : beside + width] = lines
        if beside:
            right = mirror(width, beside)
            inside[:, :beside] = lines[:, right[:beside]]
            inside[:, beside + width :] = lines[:, right[beside + width :]]
        yield rows, piece, pitch


def smoothed(pixels: np.ndarray, down: Sequence[Factor], right: Sequence[Factor]) -> np.ndarray:
    """Correlate with products of factors over their sums along axis 0 and then 1, rounded each; the image is mirrored.

    Each factor has two taps or more; a product's length is odd, and its sum at most 256, so that sums fit 16 bits.
    """
    out, totals = np.empty_like(pixels), [math.prod(sum(taps) for taps, _ in factors) for factors in (down, right)]
    for rows, sums, pitch in framed(pixels, _radius(down), _radius(right)):
        if down:
            sums = divided(_cascade(sums, down, pitch), totals[0])
        if right:
            sums = divided(_cascade(sums, right, pixels.shape[2]), totals[1])
        out[rows] = unframed(sums, out[rows].shape)
    return out


def divided(sums: np.ndarray, divisor: int) -> np.ndarray:
    """Return the sums (uint16, overwritten) over `divisor`, rounded."""
    sums += np.uint16(divisor // 2)
    sums //= np.uint16(divisor)
    return sums


def unframed(sums: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return flat sums as (rows, W, C), without what is over the right border."""
    return sums.reshape(shape[0], -1, shape[2])[:, : shape[1]]


def _radius(factors: Sequence[Factor]) -> int:
    return sum((len(taps) - 1) * distance for taps, distance in factors) // 2


def _cascade(piece: np.ndarray, factors: Sequence[Factor], step: int) -> np.ndarray:
    """Return the sums over neighbours at `step`, where all are inside."""
    for taps, distance in factors:
        count, middle = piece.size - distance * step * (len(taps) - 1), len(taps) // 2
        shifted = [piece[i * distance * step :][:count] for i in range(len(taps))]
        piece = _times(shifted[0] + shifted[-1], taps[0])
        for i in range(1, middle):
            piece += _times(shifted[i] + shifted[-1 - i], taps[i])
        if len(taps) % 2:
            piece += _times(shifted[middle], taps[middle])
    return piece


def _times(values: np.ndarray, factor: int) -> np.ndarray:
    return values if factor == 1 else values * np.uint16(factor)
