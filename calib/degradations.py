"""What spoils a camera's image: one function a degradation, and the table of their levels.

Every function takes pixels (uint8, (H, W, C), C = 1 or 3), a parameter in the unit that the table states, and a
random generator; it returns new uint8 pixels of the same shape, and exactly the old ones at the table's `neutral`.

    noise          y = x + n,  n ~ N(0, variance), for each channel by itself
    blur           y = (g (x) g^T) * x,  g_i = exp(-i^2 / 2 s^2) / sum,  s = 0.3 ((k - 1) / 2 - 1) + 0.8
    contrast       y = (1 + c) x
    motion blur    y = mean of x along a straight line of `length` pixels
    low light      l = v^2, v = x / 255;  N l photons arrive;  a shorter exposure keeps each with probability e:
                   k ~ Binomial(N l, e), near enough N(N e l, N e (1 - e) l);  y = 255 sqrt(k / N)
    over-exposure  y = 255 sqrt(2^stops v^2)
    haze           y = t x + (1 - t) A,  t = exp(-depth * density)
    rescale        y = up(down(x))

all rounded to the nearest integer and clipped to 0..255; nothing is rounded twice but in the blur, between its axes.
Light is taken as the square of the pixel value, which is close to sRGB's curve and needs only a square root.

The first seven have the levels of QRID (Karimov, Imani, Kazakov, "Quantization Robustness to Input Degradations for
Object Detection", arXiv:2508.19600, 2025), as its published code states them to albumentations (another commit of it
has standard deviations of 10-30 and 35-55 for the noise, which is far more). Contrast multiplies there, and so here,
about 0 and not about the image's mean: the image darkens too. JPEG qualities are libjpeg's scale, with 4:2:0 chroma,
as in OpenCV and Pillow. Blur mirrors the image at its border without repeating the edge.
"""

from __future__ import annotations

import functools
import io
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image

#: (pixels, parameter, random generator) -> pixels.
Function = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

#: Photons that a white pixel gathers at the exposure of the original image: a small sensor.
PHOTONS = 1000
#: The light that haze scatters towards the camera, drawn from this range of grey values.
AIRLIGHT = (200, 245)
#: Elements that are worked on at once, so that what lies between stays in the cache.
_CHUNK = 1 << 16
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


# --------------------------------------------------------------------------------------------- helpers


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


@functools.cache
def _quantiles() -> np.ndarray:
    """Return 2^14 quantiles of the standard normal distribution (float32), in the middle of equal shares."""
    normal = statistics.NormalDist()
    upper = np.array([normal.inv_cdf(0.5 + (i + 0.5) / 2**14) for i in range(2**13)], np.float32)
    table = np.concatenate([-upper[::-1], upper])
    table.setflags(write=False)
    return table


def _drawn(table: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` of the table's 2^14 values, drawn evenly.

    With quantiles in the table that is noise of their distribution, cut at 4.0 standard deviations: a few times as
    fast as the generator's own, and as exact as 8-bit pixels can show.
    """
    bits = rng.bit_generator.random_raw(count // 4 + 1).view(np.uint16)[:count]
    bits &= 2**14 - 1
    return np.take(table, bits, mode="clip")


def _mapped(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Return factor * pixels, rounded and clipped, by a table of all 256 values."""
    table = np.clip(np.rint(np.arange(256) * factor), 0, 255).astype(np.uint8).tobytes()
    return np.frombuffer(pixels.tobytes().translate(table), np.uint8).reshape(pixels.shape)


def _mirrored(pixels: np.ndarray, radius: int, axis: int) -> np.ndarray:
    """Return the pixels with `radius` more on both ends of an axis: c b | a b c | b a."""
    length = pixels.shape[axis]
    period = max(2 * (length - 1), 1)
    indices = np.concatenate([np.arange(-radius, 0), np.arange(length, length + radius)]) % period
    before, after = np.split(np.take(pixels, np.minimum(indices, period - indices), axis), 2, axis)
    return np.concatenate([before, pixels, after], axis)


def _rows(pixels: np.ndarray) -> Iterator[slice]:
    """Return slices of rows that are worked on at once."""
    height, width, channels = pixels.shape
    return _chunks(height, max(1, _CHUNK // (width * channels)))


# --------------------------------------------------------------------------------------------- QRID's


def clean(pixels: np.ndarray, parameter: float, rng: np.random.Generator) -> np.ndarray:
    """Return the pixels as they are."""
    return pixels


def gaussian_noise(pixels: np.ndarray, variance: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise of this variance, on the scale of 0..255.

    Rounding to integers adds 1/12 to the variance (Sheppard, 1898), so that much less is drawn.
    """
    sigma = math.sqrt(max(variance - 1 / 12, 0.0))
    table = np.rint(sigma * _quantiles()).astype(np.int16)
    flat, out = pixels.reshape(-1), np.empty(pixels.size, np.uint8)
    for part in _chunks(pixels.size, _CHUNK):
        noisy = _drawn(table, rng, part.stop - part.start)
        noisy += flat[part]
        out[part] = np.clip(noisy, 0, 255, out=noisy)
    return out.reshape(pixels.shape)


def gaussian_blur(pixels: np.ndarray, kernel: float, rng: np.random.Generator) -> np.ndarray:
    """Blur with a Gaussian of this odd kernel size, sigma derived from it as OpenCV does where none is given."""
    weights = blur_weights(int(kernel))
    return _smoothed(_smoothed(pixels, weights, 1), weights, 0)


def blur_weights(kernel: int) -> list[int]:
    """Return the kernel in 1/256, sum 256, as OpenCV's fixed-point filter of 8-bit images has it."""
    sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    half = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(1, kernel // 2 + 1)]
    side = [round(256 * value / (1 + 2 * sum(half))) for value in half]
    return [*side[::-1], 256 - 2 * sum(side), *side]


def _smoothed(pixels: np.ndarray, weights: list[int], axis: int) -> np.ndarray:
    """Correlate along an axis with a symmetric kernel in 1/256; 255 * 256 + 128 fits 16 bits."""
    radius, length = len(weights) // 2, pixels.shape[axis]
    padded, out = _mirrored(pixels, radius, axis), np.empty_like(pixels)
    for rows in _rows(pixels):
        part = padded[rows.start : rows.stop + (0 if axis else 2 * radius)].astype(np.uint16)
        count = length if axis else rows.stop - rows.start
        shifted = [part[:, i : i + count] if axis else part[i : i + count] for i in range(2 * radius + 1)]
        total = shifted[radius] * np.uint16(weights[radius])
        total += np.uint16(128)
        pair = np.empty_like(total)
        for i in range(radius):
            np.add(shifted[i], shifted[-1 - i], out=pair)
            pair *= np.uint16(weights[i])
            total += pair
        total >>= 8
        out[rows] = total
    return out


def contrast(pixels: np.ndarray, change: float, rng: np.random.Generator) -> np.ndarray:
    """Multiply by 1 + `change`, as albumentations' RandomBrightnessContrast does."""
    return _mapped(pixels, 1 + change)


def jpeg(pixels: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Compress and decompress at this quality; 100 stands for no compression at all.

    Sides over 8,192 are compressed in pieces of that size.
    """
    if quality >= 100:
        return pixels
    for axis in (0, 1):
        if pixels.shape[axis] > _JPEG_SIDE:
            pieces = np.split(pixels, range(_JPEG_SIDE, pixels.shape[axis], _JPEG_SIDE), axis)
            return np.concatenate([jpeg(piece, quality, rng) for piece in pieces], axis)
    with Image.open(io.BytesIO(encode_jpeg(pixels, int(quality))), formats=["JPEG"]) as image:
        return np.asarray(image).reshape(pixels.shape)


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Return the pixels as a JPEG file."""
    stream = io.BytesIO()
    _image(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


# --------------------------------------------------------------------------------------------- ours


def motion_blur(pixels: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    """Average along a line of `length` (odd, under 256) pixels through each pixel, in a random direction."""
    count, angle = int(length), rng.random() * math.pi
    reach = count // 2
    along = np.arange(-reach, reach + 1)
    down, right = np.rint(along * math.sin(angle)).astype(int), np.rint(along * math.cos(angle)).astype(int)
    padded, out = _mirrored(_mirrored(pixels, reach, 0), reach, 1), np.empty_like(pixels)
    width = pixels.shape[1]
    for rows in _rows(pixels):
        part = padded[rows.start : rows.stop + 2 * reach].astype(np.uint16)
        total = np.full((rows.stop - rows.start, *pixels.shape[1:]), count // 2, np.uint16)
        for y, x in zip(down + reach, right + reach, strict=True):
            total += part[y : y + len(total), x : x + width]
        total //= np.uint16(count)
        out[rows] = total
    return out


def low_light(pixels: np.ndarray, exposure: float, rng: np.random.Generator) -> np.ndarray:
    """Keep the part `exposure` of the photons, each by chance: darker, with shot noise.

    Thinning a Poisson process gives a Poisson process, so what the original holds of shot noise is kept in proportion.
    """
    keep = np.float32(exposure)
    table = _quantiles() * np.float32(255 * math.sqrt(exposure * (1 - exposure) / PHOTONS))
    flat, out = pixels.reshape(-1), np.empty(pixels.size, np.uint8)
    for part in _chunks(pixels.size, _CHUNK):
        light = _drawn(table, rng, part.stop - part.start)  # 255^2 k / N = x (e x + 255 sqrt(e (1 - e) / N) z)
        light += keep * flat[part]
        light *= flat[part]
        np.clip(light, 0, 255**2, out=light)
        out[part] = np.rint(np.sqrt(light, out=light), out=light)
    return out.reshape(pixels.shape)


def over_exposure(pixels: np.ndarray, stops: float, rng: np.random.Generator) -> np.ndarray:
    """Let in 2^`stops` times the light, clipped at white."""
    return _mapped(pixels, 2 ** (stops / 2))


def haze(pixels: np.ndarray, veil: float, rng: np.random.Generator) -> np.ndarray:
    """Mix in airlight, as fog and distant rain do; in the middle row it makes up the part `veil`.

    The law of Koschmieder (1924), as used by Narasimhan and Nayar (2002). The distance is not known: it is taken to
    grow from the lowest row (half that of the middle) to the top one (one and a half).
    """
    airlight = rng.uniform(*AIRLIGHT)
    height = len(pixels)
    distance = 1.5 - (np.arange(height) + 0.5) / height
    through = np.rint(255 * (1 - veil) ** distance).astype(np.uint16)[:, None]
    added = np.rint((255 - through) * airlight + 127).astype(np.uint16)
    lines, out = pixels.reshape(height, -1), np.empty_like(pixels)
    for rows in _rows(pixels):
        mixed = lines[rows] * through[rows]
        mixed += added[rows]
        mixed //= np.uint16(255)
        out[rows] = mixed.reshape(out[rows].shape)
    return out


def rescale(pixels: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Make the image `factor` (an integer) times smaller, as a sensor bins, and bilinearly as large again."""
    image, times = _image(pixels), int(factor)
    small = image.reduce(times)  # of the rounded-up size: the box leaves the excess out
    box = (0, 0, image.width / times, image.height / times)
    return np.asarray(small.resize(image.size, Image.Resampling.BILINEAR, box)).reshape(pixels.shape)


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
        "haze": Degradation("Haze of fog or rain", haze, 0.3, 0.6, "of airlight", 0),
        "rescale": Degradation("Down- and up-scaling", rescale, 2, 4, "times smaller", 1, 1),
    }
)
#: The conditions of the paper: clean and seven degradations.
QRID = tuple(name for name, degradation in CONDITIONS.items() if degradation.qrid)
