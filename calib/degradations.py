"""What spoils a camera's image: one function a degradation, and the table of their levels.

Every function takes an image in mode L or RGB, a parameter in the unit that the table states, and a random generator;
it returns a new image of the same mode and size, with exactly the old pixels at the table's `neutral`.

    noise          y = x + n,  n ~ N(0, variance), for each channel by itself
    blur           y = (g (x) g^T) * x,  g_i = exp(-i^2 / 2 s^2) / sum,  s = 0.3 ((k - 1) / 2 - 1) + 0.8
    contrast       y = (1 + c) x
    motion blur    y = mean of x along a straight line of `length` pixels
    low light      l = v^2, v = x / 255;  N l photons arrive;  a shorter exposure keeps each with probability e:
                   k ~ Binomial(N l, e), mean N e l, variance N e (1 - e) l;  y = 255 sqrt(k / N)
    over-exposure  y = 255 sqrt(2^stops v^2)
    haze           y = t x + (1 - t) A,  t = exp(-depth * density)
    rain           y = (1 - a) h + a S where a streak is, h elsewhere,  h = (1 - w) x + w A
    rescale        y = up(down(x))

all rounded to the nearest integer and clipped to 0..255. Between the axes of a filter, and between the look-up and the
noise of low light, it is rounded once more; rain is cut to integers and not rounded.
Light is taken as the square of the pixel value, which is close to sRGB's curve and needs only a square root.

The first seven have the levels of QRID (Karimov, Imani, Kazakov, "Quantization Robustness to Input Degradations for
Object Detection", arXiv:2508.19600, 2025), as its published code states them to albumentations (another commit of it
has standard deviations of 10-30 and 35-55 for the noise, which is far more). Contrast multiplies there, and so here,
about 0 and not about the image's mean: the image darkens too. JPEG qualities are libjpeg's scale, with 4:2:0 chroma,
as in OpenCV and Pillow. Blur mirrors the image at its border without repeating the edge.

benchmarks/degradations.py measures what they cost. Beside decoding a photo from JPEG, Pillow's look-up is 0.2, copying
pixels out of Pillow and back 0.2, and each sum or product over the image another 0.02, of which a blur takes 10 to 25.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

import numpy as np
from PIL import Image

from .pixels import Factor, chunks, divided, framed, looked_up, noisy, product, read, smoothed, unframed, uniform, write

#: (image in mode L or RGB, parameter, random generator) -> image.
Function = Callable[[Image.Image, float, Random], Image.Image]

#: Photons that a white pixel gathers at the exposure of the original image: a small sensor.
PHOTONS = 1000
#: The light that haze and rain scatter towards the camera, drawn from this range of grey values.
AIRLIGHT = (200, 245)
#: Rain's veil of haze, for each part of the image that streaks cover.
VEIL = 2.5
#: A larger side is compressed in pieces: JPEG ends at 65,535, and Pillow warns of large images. A multiple of 16.
_JPEG_SIDE = 8192


@dataclass(frozen=True)
class Degradation:
    """One condition: `function` at a parameter drawn evenly from `low`..`high`, both included.

    `step` is the distance of the values that the parameter can take, 0 where it is continuous. At `neutral` the
    pixels stay as they are. `qrid`: the paper has this condition, with these levels.
    """

    title: str
    function: Function
    low: float
    high: float
    unit: str
    neutral: float
    step: int = 0
    qrid: bool = False

    def parameter(self, u: float) -> float:
        """Return the parameter at `u` in [0, 1): evenly over the range, or over its steps."""
        if not self.step:
            return self.low + u * (self.high - self.low)
        count = int((self.high - self.low) / self.step) + 1
        return self.low + self.step * int(u * count)


# --------------------------------------------------------------------------------------------- QRID's


def clean(image: Image.Image, parameter: float, rng: Random) -> Image.Image:
    """Return the image as it is."""
    return image


def gaussian_noise(image: Image.Image, variance: float, rng: Random) -> Image.Image:
    """Add noise of this variance, on the scale of 0..255, up to 1,000.

    Rounding to integers adds 1/12 to the variance (Sheppard, 1898), so that much less is drawn.
    """
    return write(noisy(read(image), math.sqrt(max(variance - 1 / 12, 0.0)), 0.0, rng))


def gaussian_blur(image: Image.Image, kernel: float, rng: Random) -> Image.Image:
    """Blur with a Gaussian of this odd kernel size, sigma derived from it as OpenCV does where none is given."""
    factors = blur_factors(int(kernel))
    return write(smoothed(read(image), factors, factors))


#: Products of short kernels that are within 0.9/256 of the Gaussian, at half its cost.
_CASCADES: Mapping[int, tuple[Factor, ...]] = MappingProxyType(
    {
        1: (),
        9: (((1, 1), 1), ((1, 1), 1), ((1, 1, 1), 1), ((1, 3, 1), 2)),
        11: (((1, 1), 1), ((1, 1), 1), ((1, 1), 2), ((1, 1, 1), 1), ((1, 3, 1), 2)),
    }
)


def blur_factors(kernel: int) -> tuple[Factor, ...]:
    """Return what the kernel is the product of: up to 7 in 1/256, as OpenCV's fixed-point filter of 8-bit images."""
    if kernel in _CASCADES:
        return _CASCADES[kernel]
    sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    half = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(1, kernel // 2 + 1)]
    side = [round(256 * value / (1 + 2 * sum(half))) for value in half]
    return (((*side[::-1], 256 - 2 * sum(side), *side), 1),)


def blur_weights(kernel: int) -> np.ndarray:
    """Return the weights of the blur, sum 1."""
    weights: np.ndarray = product(blur_factors(kernel)).astype(float)
    weights /= weights.sum()
    return weights


def contrast(image: Image.Image, change: float, rng: Random) -> Image.Image:
    """Multiply by 1 + `change`, as albumentations' RandomBrightnessContrast does."""
    return looked_up(image, np.arange(256) * (1 + change))


def jpeg(image: Image.Image, quality: float, rng: Random) -> Image.Image:
    """Compress and decompress at this quality; 100 stands for no compression at all.

    Sides over 8,192 are compressed in pieces of that size.
    """
    if quality >= 100:
        return image
    width, height = image.size
    if max(width, height) <= _JPEG_SIDE:
        # the decoder alone: to open it as a file takes as long again where the image is small
        return Image.frombytes(image.mode, image.size, encode_jpeg(image, int(quality)), "jpeg", image.mode, "")
    out = Image.new(image.mode, image.size)
    for left, top in itertools.product(range(0, width, _JPEG_SIDE), range(0, height, _JPEG_SIDE)):
        piece = image.crop((left, top, min(left + _JPEG_SIDE, width), min(top + _JPEG_SIDE, height)))
        out.paste(jpeg(piece, quality, rng), (left, top))
    return out


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return the image as a JPEG file."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, comment=b"")  # not the image's own, which may be too long for JPEG
    return stream.getvalue()


# --------------------------------------------------------------------------------------------- ours


def motion_blur(image: Image.Image, length: float, rng: Random) -> Image.Image:
    """Average along a line of `length` (odd, under 256) pixels through each pixel, in a random direction."""
    count, angle = int(length), rng.random() * math.pi
    reach = count // 2
    along = np.arange(-reach, reach + 1)
    down, right = np.rint(along * math.sin(angle)).astype(int), np.rint(along * math.cos(angle)).astype(int)
    pixels = read(image)
    out = np.empty_like(pixels)
    for rows, piece, pitch in framed(pixels, reach, reach):
        size = (rows.stop - rows.start) * pitch
        first, *others = (down + reach) * pitch + (right + reach) * pixels.shape[2]
        total = piece[first : first + size].copy()
        for start in others:
            total += piece[start : start + size]
        out[rows] = unframed(divided(total, count), out[rows].shape)
    return write(out)


def low_light(image: Image.Image, exposure: float, rng: Random) -> Image.Image:
    """Keep the part `exposure` of the photons, each by chance: darker, with shot noise.

    Thinning a Poisson process gives a Poisson process, so what the original holds of shot noise is kept in proportion.
    The square root of a count has nearly the same deviation everywhere (Anscombe, 1948): `sigma`, the noise that is
    added here. What it is added to is where the mean of the light comes out right, clipped at black as it is.
    """
    sigma = 255 / 2 * math.sqrt((1 - exposure) / PHOTONS)
    if not sigma:
        return image
    base = sigma * np.interp(math.sqrt(exposure) * np.arange(256) / sigma, *_rectified())
    shift = math.ceil(4 * sigma)  # below black, where the noise never reaches it
    return write(noisy(read(looked_up(image, np.maximum(base, -shift) + shift)), sigma, -shift, rng))


@functools.cache
def _rectified() -> tuple[np.ndarray, np.ndarray]:
    """Return the root of the mean of max(0, t + z)^2, z standard normal, and t: (t^2 + 1) F(t) + t f(t)."""
    level = np.concatenate([np.arange(-5, 8, 0.01), np.geomspace(8, 1e6, 1000)])
    below = np.array([math.erfc(-t / math.sqrt(2)) / 2 for t in level])
    return np.sqrt((level**2 + 1) * below + level * np.exp(-(level**2) / 2) / math.sqrt(2 * math.pi)), level


def over_exposure(image: Image.Image, stops: float, rng: Random) -> Image.Image:
    """Let in 2^`stops` times the light, clipped at white."""
    return looked_up(image, np.arange(256) * 2 ** (stops / 2))


def haze(image: Image.Image, veil: float, rng: Random) -> Image.Image:
    """Mix in airlight, as fog does; in the middle row it makes up the part `veil`.

    The law of Koschmieder (1924), as used by Narasimhan and Nayar (2002). The distance is not known: it is taken to
    grow from the lowest row (half that of the middle) to the top one (one and a half).
    """
    airlight, pixels = rng.uniform(*AIRLIGHT), read(image)
    distance = 1.5 - (np.arange(len(pixels)) + 0.5) / len(pixels)
    out = np.empty_like(pixels)
    _mixed(pixels, (1 - veil) ** distance, airlight, out)
    return write(out)


def _mixed(pixels: np.ndarray, through: np.ndarray, light: float, out: np.ndarray) -> None:
    """Write to `out` the pixels mixed with light, of which the part `through` (one a row, in 1/256) comes through."""
    factor = np.rint(256 * through).astype(np.uint16)[:, None]
    added = np.rint((256 - factor) * light + 128).astype(np.uint16)  # with 255 * factor it fits 16 bits
    lines = pixels.reshape(len(pixels), -1)
    for rows in chunks(*lines.shape):
        mixed = lines[rows].astype(np.uint16)
        mixed *= factor[rows]
        mixed += added[rows]
        mixed >>= np.uint16(8)
        out[rows] = mixed.reshape(out[rows].shape)


def rain(image: Image.Image, cover: float, rng: Random) -> Image.Image:
    """Draw streaks over the part `cover` of the image, before a slight veil of haze: the more, the longer and denser.

    A falling drop gathers light from far and wide, nearly that of the sky, and covers each point of its streak for a
    part of the exposure: it is brighter than most of what it hides, and mixed with it (Garg and Nayar, "Vision and
    Rain", 2007). Drops too far to be seen one by one are the veil (as Halder, Lalonde and de Charette, 2019, have it).
    """
    sky, pixels = rng.uniform(*AIRLIGHT), read(image)
    where, share, room = _streaks(image.height, image.width, pixels.shape[2], cover, rng)
    out = np.zeros(pixels.size + 2 * room, np.uint8)
    inside = out[room : room + pixels.size].reshape(pixels.shape)
    _mixed(pixels, np.full(image.height, 1 - VEIL * cover), sky, inside)
    behind = out[where].astype(np.float32)
    share *= np.float32(sky) - behind
    behind += share
    out[where] = np.rint(behind, out=behind)
    return write(inside)


def _streaks(height: int, width: int, channels: int, cover: float, rng: Random) -> tuple[np.ndarray, np.ndarray, int]:
    """Return elements that lie on streaks, intp, what part of each is the streak's, float32, and the room they need.

    Elements are counted from `room` before the image's first; as many behind its last take what is cut off, too. All
    streaks of an image are one antialiased line, up to 20 degrees from upright, in different places and strengths, as
    long as a part of the shorter side, by `cover`. One that leaves on the left or right comes in on the other side.
    """
    side = min(height, width)
    broad, long = 1 + side // 400, max(3, round((0.06 + cover) * side))
    across = math.tan(math.radians(rng.uniform(-20, 20))) * np.arange(long)[:, None]
    left, step = np.floor(across), np.arange(broad + 1)
    coverage = np.clip(np.minimum(step + 1 - across + left, broad - step + across - left), 0, 1)
    line = ((np.arange(long)[:, None] * width + left + step).astype(np.intp) * channels).reshape(-1, 1)
    line = (line - line.min() + np.arange(channels)).ravel()
    above = long * width * channels
    room = max(above, int(line.max()) + 1)
    count = math.ceil(cover * (height + long) * width / (long * broad))
    place, strength = uniform(rng, 2 * count).reshape(2, count, 1)
    start = (place * ((height + long) * width)).astype(np.intp) * channels - above
    share = (0.3 + 0.4 * strength) * np.repeat(coverage.ravel(), channels).astype(np.float32)
    return start + (line + room), share, room


def rescale(image: Image.Image, factor: float, rng: Random) -> Image.Image:
    """Make the image `factor` (an integer up to 4) times smaller, as a sensor bins, and bilinearly as large again.

    Between equal pixels in a row a kernel interpolates: bilinear enlargement is repetition, smoothed.
    """
    times, (width, height) = int(factor), image.size
    small = image.reduce(times)  # of the rounded-up size: the box leaves the excess out
    wide = small.resize((width, small.height), Image.Resampling.NEAREST, (0, 0, width / times, small.height))
    pixels = smoothed(read(wide), (), _ENLARGING[times])
    return write(smoothed(np.repeat(pixels, times, 0)[:height], _ENLARGING[times], ()))


#: Times -> the kernel over that many times repeated pixels.
_ENLARGING: Mapping[int, tuple[Factor, ...]] = MappingProxyType(
    {
        1: (),
        2: (((1, 2, 1), 1),),
        3: (((1, 1, 1), 1),),
        4: (((1, 2, 1), 1), ((1, 1), 2)),
    }
)


# --------------------------------------------------------------------------------------------- the table

#: All conditions, in the order of reports. Names are what users write and what caches are keyed with.
CONDITIONS: Mapping[str, Degradation] = MappingProxyType(
    {
        "clean": Degradation("Clean", clean, 0, 0, "", 0, qrid=True),
        "noise-low": Degradation("Gaussian noise, low", gaussian_noise, 10, 50, "variance", 0, qrid=True),
        "noise-medium": Degradation("Gaussian noise, medium", gaussian_noise, 50, 150, "variance", 0, qrid=True),
        "blur-low": Degradation("Gaussian blur, low", gaussian_blur, 3, 5, "px kernel", 1, 2, qrid=True),
        "blur-high": Degradation("Gaussian blur, high", gaussian_blur, 7, 11, "px kernel", 1, 2, qrid=True),
        "low-contrast": Degradation("Low contrast", contrast, -0.6, -0.3, "contrast change", 0, qrid=True),
        "jpeg-high": Degradation("JPEG, high quality", jpeg, 50, 75, "quality", 100, 1, qrid=True),
        "jpeg-low": Degradation("JPEG, low quality", jpeg, 20, 45, "quality", 100, 1, qrid=True),
        "motion-blur": Degradation("Motion blur", motion_blur, 5, 11, "px length", 1, 2),
        "low-light": Degradation("Low light, shot noise", low_light, 0.05, 0.25, "of the light", 1),
        "over-exposure": Degradation("Over-exposure", over_exposure, 0.7, 1.5, "stops", 0),
        "haze": Degradation("Fog", haze, 0.3, 0.6, "of airlight", 0),
        "rain": Degradation("Rain", rain, 0.02, 0.06, "of streaks", 0),
        "rescale": Degradation("Down- and up-scaling", rescale, 2, 4, "times smaller", 1, 1),
    }
)
#: The conditions of the paper: clean and seven degradations.
QRID = tuple(name for name, degradation in CONDITIONS.items() if degradation.qrid)
