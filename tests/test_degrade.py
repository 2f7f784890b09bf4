"""Degradations: levels measured on the images, determinism, every kind of image, plans and cache keys."""

import io
import itertools
import math
import os
import subprocess
import sys
import threading
import zlib
from collections import Counter
from random import Random

import numpy as np
import pytest
from edgec.calib import degradations
from edgec.calib import pixels as pixel_arithmetic
from edgec.calib.degradations import AIRLIGHT, PHOTONS, VEIL, blur_weights, encode_jpeg
from edgec.calib.degrade import CONDITIONS, MIXED, QRID, Plan, condition_of, degrade, parameter_of, parse, transform
from edgec.calib.folder import open_folder
from edgec.calib.pixels import noisy, product, smoothed
from edgec.calib.preprocess import apply
from edgec.compiler.errors import UserError
from edgec.compiler.types import InputSpec, Preprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

WORSE = tuple(name for name in CONDITIONS if name != "clean")
NAMES = [f"images/{i:04}.jpg" for i in range(12)]


def texture(height=48, width=64, channels=3, seed=0):
    """An image with all frequencies, few of its values near the ends."""
    noise = np.random.default_rng(seed).normal(size=(height, width, channels))
    smooth = ndimage.gaussian_filter(noise, (1.2, 1.2, 0), mode="wrap")
    return np.clip(128 + 40 * smooth / max(smooth.std(), 1e-9), 0, 255).astype(np.uint8)


def run(condition, pixels, name="a.png", seed=0):
    return np.asarray(transform(condition, seed)[0](Image.fromarray(pixels), name))


def at(condition, pixels, parameter, seed=0):
    return on(pixels, CONDITIONS[condition].function, parameter, seed)


def on(pixels, function, parameter, seed=0):
    """What a degradation makes of (H, W, C) pixels."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(function(image, parameter, Random(seed))).reshape(pixels.shape)


# ------------------------------------------------------------------------------- levels, on the images


def test_the_table():
    assert tuple(list(CONDITIONS)[:8]) == QRID and QRID[0] == "clean" and len(CONDITIONS) == 14
    for name in WORSE:
        entry = CONDITIONS[name]
        assert entry.low < entry.high and not entry.low <= entry.neutral <= entry.high, name


@pytest.mark.parametrize(("condition", "low", "high"), [("noise-low", 10, 50), ("noise-medium", 50, 150)])
def test_noise_variance(condition, low, high):
    grey = np.full((160, 160, 3), 128, np.uint8)
    for name in NAMES:
        noise = run(condition, grey, name).astype(float) - 128
        wanted = parameter_of(condition, 0, name)
        assert low <= wanted <= high
        # the variance of a sample variance of n normal numbers is 2/n: five of its standard deviations
        assert noise.var() == pytest.approx(wanted, rel=5 * math.sqrt(2 / noise.size))
        assert abs(noise.mean()) < 5 * math.sqrt(wanted / noise.size)
        apart = np.corrcoef(noise.reshape(-1, 3).T)  # the channels have noise of their own
        assert np.abs(apart - np.eye(3)).max() < 5 / 160


def test_noise_is_normal():
    noise = at("noise-medium", np.full((400, 400, 1), 128, np.uint8), 144.0).astype(float).ravel() - 128
    assert abs((noise**3).mean() / 12**3) < 0.05 and (noise**4).mean() / 12**4 == pytest.approx(3, abs=0.1)
    assert np.abs(noise).max() > 3.5 * 12
    weak = at("noise-low", np.full((400, 400, 1), 128, np.uint8), 2.0)
    assert weak.var() == pytest.approx(2, rel=0.02)  # rounding's 1/12 would show


@pytest.mark.parametrize(("condition", "kernels"), [("blur-low", {3, 5}), ("blur-high", {7, 9, 11})])
def test_blur_kernel(condition, kernels):
    """The response to a line is the kernel: its support, and the deviation that OpenCV derives from its size."""
    found = set()
    for axis, name in itertools.product((0, 1), NAMES):
        line = np.zeros((41, 41, 1), np.uint8)
        line[(slice(None), 20) if axis else 20] = 255
        response = run(condition, line[:, :, 0], name).astype(float).take(7, 1 - axis)
        size = np.count_nonzero(response)
        found.add(size)
        assert size == parameter_of(condition, 0, name) and response.sum() == pytest.approx(255, abs=size / 2)
        i = np.arange(41) - 20
        weights = np.exp(-(i**2) / (2 * (0.3 * ((size - 1) * 0.5 - 1) + 0.8) ** 2)) * (np.abs(i) <= size // 2)
        # half a pixel value of rounding, and weights in 1/256
        np.testing.assert_allclose(response, 255 * weights / weights.sum(), atol=1.6)
    assert found == kernels


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("shape", [(40, 33, 3), (300, 200, 1), (3, 2, 3), (1, 50, 1)])
def test_blur_is_that_convolution(kernel, shape):
    pixels, weights = texture(*shape), blur_weights(kernel)
    assert weights.sum() == pytest.approx(1, abs=1e-12) and len(weights) == kernel
    exact = ndimage.correlate1d(pixels.astype(float), weights, 0, mode="mirror")
    exact = ndimage.correlate1d(exact, weights, 1, mode="mirror")
    # rounded between the axes and at the end: less than one half each
    assert np.abs(at("blur-low", pixels, kernel) - exact).max() <= 1


@pytest.mark.parametrize(("kernel", "off"), [(3, 0.5), (5, 0.65), (7, 0.65), (9, 0.9), (11, 0.9)])
def test_blur_weights_are_the_gaussian(kernel, off):
    sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8  # as OpenCV derives it
    gauss = np.exp(-((np.arange(kernel) - kernel // 2) ** 2) / (2 * sigma**2))
    weights = blur_weights(kernel)
    assert np.abs(weights - gauss / gauss.sum()).max() <= off / 256
    spread = ((np.arange(kernel) - kernel // 2) ** 2 * weights).sum()
    assert spread == pytest.approx(((np.arange(kernel) - kernel // 2) ** 2 * gauss).sum() / gauss.sum(), rel=0.02)


TAPS = st.sampled_from([(1, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1), (5, 11, 5), (2, 3, 4, 3, 2), (1, 2, 2, 1)])


FACTORS = st.lists(st.tuples(TAPS, st.integers(1, 3)), max_size=3).filter(
    lambda factors: len(product(factors)) % 2 and product(factors).sum() <= 256
)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=20)),
    FACTORS,
    FACTORS,
    st.integers(5, 17),
)
def test_products_of_kernels_are_their_convolution(pixels, down, right, chunk):
    exact = pixels.astype(float)
    for axis, factors in enumerate((down, right)):
        kernel = product(factors)
        exact = ndimage.correlate1d(exact, kernel / kernel.sum(), axis, mode="mirror")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_arithmetic, "CHUNK", 1 << chunk)
        found = smoothed(pixels, down, right)
    # half for each axis that is rounded
    assert np.abs(found - exact).max() <= 0.5 * (bool(down) + bool(right)) + 1e-9


def test_contrast_is_the_ratio_of_deviations_and_of_means():
    pixels = texture(100, 100)
    for name in NAMES:
        changed, alpha = run("low-contrast", pixels, name).astype(float), 1 + parameter_of("low-contrast", 0, name)
        assert 0.4 <= alpha <= 0.7
        assert changed.std() / pixels.std() == pytest.approx(alpha, rel=0.005)  # rounding: 1/12 against some hundreds
        assert changed.mean() / pixels.mean() == pytest.approx(alpha, rel=0.005)  # about 0, as albumentations does


def quality_of(tables):
    """Return libjpeg's quality from a luminance table: the entries of its base table scaled by s percent."""
    base = np.array([16, 11, 10, 16, 24, 40, 51, 61])  # the first row
    scale = np.array(tables[0][:8]) @ base / (base @ base)
    return 100 - 50 * scale if scale <= 1 else 50 / scale


@pytest.mark.parametrize(("condition", "low", "high"), [("jpeg-low", 20, 45), ("jpeg-high", 50, 75)])
def test_jpeg_quality(condition, low, high):
    pixels = texture(64, 64)
    for name in NAMES:
        with Image.open(
            io.BytesIO(encode_jpeg(Image.fromarray(pixels), int(parameter_of(condition, 0, name))))
        ) as image:
            assert low - 1 <= quality_of(image.quantization) <= high + 1
            np.testing.assert_array_equal(np.asarray(image), run(condition, pixels, name))


def test_jpeg_quality_shows_in_the_pixels():
    """JPEG ghosts (Farid, 2009): compressed again with the same table, an image hardly changes."""
    pixels = texture(64, 64, 1, seed=4)[:, :, 0]
    for name in NAMES[:4]:
        once = run("jpeg-low", pixels, name)[:, :, None]
        again = {q: np.square(at("jpeg-low", once, q).astype(float) - once).mean() for q in range(15, 51)}
        assert min(again, key=again.get) == pytest.approx(parameter_of("jpeg-low", 0, name), abs=1)


def test_parameters_cover_their_range_evenly():
    for condition in WORSE:
        entry = CONDITIONS[condition]
        drawn = [parameter_of(condition, 1, str(i)) for i in range(400)]
        assert entry.low <= min(drawn) and max(drawn) <= entry.high
        assert np.mean(drawn) == pytest.approx((entry.low + entry.high) / 2, abs=0.1 * (entry.high - entry.low))
        if entry.step:
            assert set(drawn) == set(np.arange(entry.low, entry.high + 1, entry.step))


def test_motion_blur_spreads_a_point_along_a_line():
    for name in NAMES:
        point = np.zeros((31, 31), np.uint8)
        point[15, 15] = 255
        rows, columns = np.nonzero(run("motion-blur", point, name))
        length = parameter_of("motion-blur", 0, name)
        extent = math.hypot(np.ptp(rows), np.ptp(columns)) + 1
        assert extent == pytest.approx(length, abs=1.5)
        line = np.cov(np.stack([rows, columns]), bias=True)
        assert np.linalg.eigvalsh(line)[0] < 0.3  # thin


def test_low_light_is_a_thinned_poisson_process():
    value, exposure = 200, 0.2
    kept = at("low-light", np.full((300, 300, 1), value, np.uint8), exposure).astype(float)
    light = (kept / 255) ** 2
    original = (value / 255) ** 2
    assert light.mean() == pytest.approx(exposure * original, rel=0.01)
    # rounding to y adds (dl/dy)^2 / 12 with l = (y / 255)^2
    rounding = (2 * kept.mean() / 255**2) ** 2 / 12
    assert light.var() == pytest.approx(exposure * (1 - exposure) * original / PHOTONS + rounding, rel=0.05)
    assert not at("low-light", np.zeros((9, 9, 1), np.uint8), exposure).any()  # no light, no noise


@pytest.mark.parametrize("exposure", [0.05, 0.1, 0.25])
def test_low_light_keeps_mean_and_variance_at_every_level(exposure):
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4000, 1)[:, :, None]
    kept = at("low-light", levels, exposure)[:, :, 0].astype(float)
    light, expected = (kept / 255) ** 2, exposure * (np.arange(256) / 255) ** 2
    # half a grey value of the look-up, half a one of rounding, and five deviations of the mean
    off = (2 * np.sqrt(expected) * 255 + 1) / 255**2 + 5 * np.sqrt(expected / PHOTONS / 4000)
    assert (np.abs(light.mean(1) - expected) <= off).all()
    assert light.mean() == pytest.approx(expected.mean(), rel=0.005)  # the look-up's rounding is of either sign
    lit = expected * PHOTONS >= 1
    ratio = light.var(1)[lit] / (expected * (1 - exposure) / PHOTONS)[lit]
    assert ratio.mean() == pytest.approx(1, abs=0.05) and np.abs(ratio - 1).max() < 0.25


def rainy(name, size=(300, 400), value=0):
    """A plain grey image in the rain, less its veil: what part of each pixel is a streak's; and the sky."""
    seen = run("rain", np.full(size, value, np.uint8), name).astype(float)
    cover = parameter_of("rain", 0, name)
    veil = np.median(seen)  # streaks are few
    sky = value + (veil - value) / (VEIL * cover)
    return (seen - veil) / (sky - veil), sky


def test_rain_covers_what_it_says():
    for name in NAMES:
        share, sky = rainy(name)
        # half a grey value of the veil is up to a tenth of it
        assert AIRLIGHT[0] * 0.9 <= sky <= AIRLIGHT[1] * 1.1
        # streaks are 0.3 to 0.7 strong, evenly; those that cross are counted once
        assert share.mean() / 0.5 == pytest.approx(parameter_of("rain", 0, name), rel=0.2)
        assert share.min() > -0.02 and 0.6 < share.max() < 0.75
        assert (share > 0.1).mean() < 0.15


def test_rain_is_thin_lines_at_one_angle():
    for name in NAMES[:4]:
        parts, count = ndimage.label(rainy(name)[0] > 0.02, np.ones((3, 3)))
        angles, lengths = [], []
        for i in range(1, count + 1):
            rows, columns = np.nonzero(parts == i)
            spread, axes = np.linalg.eigh(np.cov(np.stack([rows, columns])))
            if len(rows) >= 20 and spread[0] < 0.5:  # whole, and not two that cross
                angles.append(math.degrees(math.atan(axes[1, 1] / axes[0, 1])))
                lengths.append(np.ptp(rows) + 1)
        assert len(angles) > 20 and np.abs(angles).max() < 21 and np.std(angles) < 1.5
        assert np.median(lengths) == round((0.06 + parameter_of("rain", 0, name)) * 300)


def test_rain_brightens_the_dark_and_hides_contrast():
    pixels = texture(100, 100)
    dark = at("rain", (pixels // 4), 0.05).astype(int) - pixels // 4
    assert dark.min() > 0 and dark.max() > 50
    # mixed and not added: nothing is lighter than the sky but what was before
    bright = at("rain", np.full((100, 100, 3), 250, np.uint8), 0.05)
    assert bright.min() >= AIRLIGHT[0] - 1 and bright.max() <= 250
    little, much = (np.abs(at("rain", pixels, c, 3).astype(int) - pixels).mean() for c in (0.02, 0.06))
    assert 0 < little < much


def test_over_exposure_and_haze_against_their_formulas():
    pixels = texture(60, 40)
    exact = np.clip(np.rint(pixels * 2 ** (1.2 / 2)), 0, 255)
    np.testing.assert_array_equal(at("over-exposure", pixels, 1.2), exact)
    airlight = Random(0).uniform(*AIRLIGHT)
    through = (0.6 ** (1.5 - (np.arange(60) + 0.5) / 60))[:, None, None]
    # the transmission is in 1/256
    assert np.abs(at("haze", pixels, 0.4) - (through * pixels + (1 - through) * airlight)).max() <= 1.01


def test_rescale_keeps_ramps_and_loses_detail():
    ramp = np.repeat(np.arange(0, 236, 4, dtype=np.uint8)[None], 33, 0)[:, :, None]
    inner = (slice(None), slice(8, -8))
    for factor in (2, 3, 4):  # 59 divides by none of them: nothing may shift
        assert np.abs(at("rescale", ramp, factor)[inner].astype(int) - ramp[inner]).max() <= 2
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None]
    assert np.ptp(at("rescale", checks, 2)) <= 1


# ------------------------------------------------------------------------------------- determinism

_PRINT = """
import sys, zlib, numpy as np
from PIL import Image
from edgec.calib.degrade import CONDITIONS, transform
pixels = (np.arange(40 * 30 * 3) * 7 % 256).astype(np.uint8).reshape(40, 30, 3)
for condition in sys.argv[1].split(","):
    for name in ("a/1.png", "b\\u00fc.png"):
        out = transform(condition, 5)[0](Image.fromarray(pixels), name)
        print(condition, name.encode(), zlib.crc32(np.asarray(out).tobytes()))
"""


def test_same_in_another_process_whatever_the_order_and_the_hash_seed():
    names = [*CONDITIONS, "mixed:0.5"]

    def lines(order, hash_seed):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", _PRINT, ",".join(order)]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()

    first, second = lines(names, "1"), lines(names[::-1], "2")
    assert len(set(first)) == 2 * len(names) and sorted(first) == sorted(second)


def test_pixels_of_version_2():
    """Where this fails, pixels have changed: raise VERSION, then these numbers."""
    pixels = (np.arange(40 * 30 * 3) * 7 % 256).astype(np.uint8).reshape(40, 30, 3)
    found = {c: zlib.crc32(run(c, pixels, "a/1.png", 5).tobytes()) for c in GOLDEN}
    assert found == GOLDEN


#: CRC-32 of the pixels; without those that Pillow makes, which may change with it.
GOLDEN = {
    "noise-low": 3693304857,
    "noise-medium": 1959032375,
    "blur-low": 850955308,
    "blur-high": 3366153136,
    "low-contrast": 3146633359,
    "motion-blur": 562619081,
    "low-light": 2937460451,
    "over-exposure": 2848858115,
    "haze": 4278069272,
    "rain": 770833112,
}


def test_seed_name_and_condition_each_matter():
    pixels = texture()
    for condition in WORSE:
        drawn = {parameter_of(condition, seed, name) for seed in range(10) for name in NAMES}
        assert len(drawn) > (100 if not CONDITIONS[condition].step else 1)
    same = run("noise-low", pixels, "a", 0)
    assert np.array_equal(same, run("noise-low", pixels, "a", 0))
    assert not np.array_equal(same, run("noise-low", pixels, "b", 0))
    assert not np.array_equal(same, run("noise-low", pixels, "a", 1))
    low, medium = ([parameter_of(c, 0, str(i)) for i in range(500)] for c in ("noise-low", "noise-medium"))
    assert abs(np.corrcoef(low, medium)[0, 1]) < 5 / math.sqrt(500)


def test_noise_fields_are_independent():
    grey = np.full((100, 100), 128, np.uint8)
    drawn = itertools.product(("noise-low", "noise-medium"), ("a", "b"), (0, 1))
    fields = [run(condition, grey, name, seed).ravel().astype(float) for condition, name, seed in drawn]
    assert np.abs(np.corrcoef(fields) - np.eye(8)).max() < 5 / 100


@pytest.mark.parametrize("size", [(32, 32, 3), (300, 421, 3), (40, 5000, 1)])
def test_noise_saturates_and_does_not_see_the_image(size):
    noise = noisy(np.full(size, 128, np.uint8), 20.0, -11.0, Random(3)).astype(int) - 128
    assert noise.mean() == pytest.approx(-11, abs=5 * 20 / math.sqrt(noise.size))
    pixels = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    np.testing.assert_array_equal(noisy(pixels, 20.0, -11.0, Random(3)), np.clip(pixels + noise, 0, 255))
    with pytest.raises(ValueError, match="goes beyond 127"):
        noisy(pixels, 30.0, 11.0, Random(0))


def correlation(first, second):
    """The circular correlation of two noise fields at all shifts."""
    fields = [np.fft.rfft2(field - field.mean()) / field.std() for field in (first, second)]
    return np.fft.irfft2(fields[0] * fields[1].conj(), first.shape) / first.size


def test_noise_has_no_pattern():
    """Samples come again in images of this size, but neither near by nor at any one distance, nor in other images."""
    grey = np.full((375, 500, 3), 128, np.uint8)
    fields = [run("noise-medium", grey, name).astype(float).reshape(375, 1500) - 128 for name in NAMES[:3]]
    # the deviation of a correlation where all samples are independent, and where those of a tile are
    one, tile = 1 / math.sqrt(grey.size), 1 / 256
    for field in fields:
        alone = correlation(field, field)
        assert alone[0, 0] == pytest.approx(1)
        alone[0, 0] = 0
        assert np.abs(alone).max() < 5.5 * tile and alone.std() < 1.1 * one
        spectrum = np.abs(np.fft.rfft2(field)) ** 2 / field.size / field.var()
        bands = [part.mean() for part in np.array_split(spectrum[:, 1:], 10, 1)]
        np.testing.assert_allclose(bands, 1, atol=5 * math.sqrt(20) * tile)  # white: a mean of a tenth of 2^16 / 2
        strips = np.square(field).reshape(25, -1).mean(1)
        np.testing.assert_allclose(strips, field.var(), rtol=5 * math.sqrt(2 * 25) * one)
    for first, second in itertools.combinations(fields, 2):
        across = correlation(first, second)
        assert np.abs(across).max() < 5.5 * tile and across.std() < 1.1 * one


def test_noise_of_small_images_is_independent():
    grey = np.full((32, 32, 3), 128, np.uint8)
    fields = np.stack([run("noise-low", grey, str(i)).ravel() for i in range(200)]) - 128.0
    apart = np.corrcoef(fields)[np.triu_indices(200, 1)]
    assert apart.std() == pytest.approx(1 / math.sqrt(3072), rel=0.05) and np.abs(apart).max() < 6 / math.sqrt(3072)
    assert np.abs(fields.mean(0)).max() < 6 * fields.std() / math.sqrt(200)


def test_an_image_can_be_degraded_again_and_from_threads():
    image, expected = Image.fromarray(texture()), {c: run(c, texture()) for c in CONDITIONS}
    wrong = []

    def work():
        for condition in CONDITIONS:
            if not np.array_equal(np.asarray(transform(condition, 0)[0](image, "a.png")), expected[condition]):
                wrong.append(condition)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and np.array_equal(np.asarray(image), texture())


# ------------------------------------------------------------------------------------- mixed


@pytest.mark.parametrize("fraction", [0, 0.25, 0.5, 1])
def test_fraction_of_mixed(fraction):
    names = [str(i) for i in range(4000)]
    counts = Counter(condition_of(Plan("mixed", QRID, fraction), 3, name) for name in names)
    share = 1 - counts["clean"] / len(names)
    assert share == pytest.approx(fraction, abs=4 * math.sqrt(fraction * (1 - fraction) / len(names)))
    assert set(counts) <= set(QRID)
    for condition in QRID[1:]:
        p = fraction / 7
        assert counts[condition] / len(names) == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / len(names)))


def test_mixed_without_a_fraction_gives_every_condition_as_many():
    counts = Counter(condition_of(parse("mixed"), 0, str(i)) for i in range(4000))
    assert set(counts) == set(QRID) and all(abs(n - 500) < 100 for n in counts.values())


def test_a_larger_fraction_only_adds():
    for name in map(str, range(300)):
        half, most = (condition_of(parse(text), 0, name) for text in ("mixed:0.5", "mixed:0.9"))
        assert half in ("clean", most)


def test_an_image_of_a_mixture_is_that_of_its_condition():
    mixed, _ = transform("mixed", 2)
    image = Image.fromarray(texture())
    for name in NAMES:
        alone, _ = transform(condition_of(parse("mixed"), 2, name), 2)
        assert np.array_equal(np.asarray(mixed(image, name)), np.asarray(alone(image, name)))


def test_a_list_gives_each_image_one_of_its_names():
    plan = parse("haze,noise-low,blur-high")
    drawn = {str(i): condition_of(plan, 4, str(i)) for i in range(3000)}
    counts = Counter(drawn.values())
    assert set(counts) == {"noise-low", "blur-high", "haze"}  # clean only where it is named
    assert all(abs(n - 1000) < 130 for n in counts.values())  # 5 standard deviations of 26
    assert drawn != {name: condition_of(plan, 5, name) for name in drawn}
    change, key = transform("haze,noise-low,blur-high", 4)
    image = Image.fromarray(texture())
    for name in NAMES:
        alone, _ = transform(condition_of(plan, 4, name), 4)
        assert np.array_equal(np.asarray(change(image, name)), np.asarray(alone(image, name)))
    again, same_key = transform("blur-high, haze,noise-low", 4)
    assert key == same_key and "noise-low,blur-high,haze" in key
    assert all(np.array_equal(np.asarray(change(image, n)), np.asarray(again(image, n))) for n in NAMES)


def test_one_name_more_changes_only_the_images_that_get_it():
    fewer, more = parse("noise-low,haze"), parse("clean,noise-low,haze")
    drawn = [(condition_of(fewer, 0, str(i)), condition_of(more, 0, str(i))) for i in range(600)]
    changed = [new for old, new in drawn if old != new]
    assert set(changed) == {"clean"} and abs(len(changed) - 200) < 60  # 5 standard deviations of 12


# ------------------------------------------------------------------------------------- every image

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40).flatmap(
    lambda shape: st.sampled_from([(*shape, 1), (*shape, 3)])
)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, SHAPES), st.sampled_from(WORSE), st.floats(0, 1, exclude_max=True), st.integers(0, 9))
def test_dtype_shape_and_identity(pixels, condition, u, seed):
    before, entry = pixels.copy(), CONDITIONS[condition]
    out = at(condition, pixels, entry.parameter(u), seed)
    assert out.dtype == np.uint8 and out.shape == pixels.shape
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(at(condition, pixels, entry.neutral, seed), pixels)


@pytest.mark.parametrize("condition", WORSE)
def test_nothing_wraps_around(condition):
    """Black and white stay near their ends: an overflow would swap them."""
    entry = CONDITIONS[condition]
    for u in (0, 0.5, 0.999):
        black = at(condition, np.zeros((20, 20, 3), np.uint8), entry.parameter(u))
        white = at(condition, np.full((20, 20, 3), 255, np.uint8), entry.parameter(u))
        assert black.max() < {"haze": 210, "rain": 200}.get(condition, 60)
        assert white.min() > (20 if condition == "low-light" else 95)
        if condition in ("blur-low", "blur-high", "motion-blur", "rescale", "over-exposure"):
            assert not black.any() and (white == 255).all()


@pytest.mark.parametrize("condition", ["noise-low", "blur-low", "low-contrast", "low-light", "over-exposure", "haze"])
def test_a_little_strength_changes_little(condition):
    """Identity is no special case: the closer to neutral, the closer to the image."""
    entry, pixels = CONDITIONS[condition], texture()
    near = entry.neutral + 0.001 * (entry.low - entry.neutral)
    assert np.abs(at(condition, pixels, near).astype(int) - pixels).max() <= 2


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]


def of_mode(mode, size=(24, 20)):
    image = Image.fromarray(texture(size[1], size[0], 4))
    if mode in ("I", "I;16"):
        grey = texture(size[1], size[0], 1)[:, :, 0].astype(np.int32) * 256 + 77
        return Image.fromarray(grey if mode == "I" else grey.astype(np.uint16))
    steps = {"PA": ("LA", "PA"), "RGBa": ("RGBA", "RGBa"), "HSV": ("RGB", "HSV")}
    for step in steps.get(mode, ("RGB", mode) if mode not in ("RGBA", "LA") else (mode,)):
        image = image.convert(step)
    assert image.mode == mode
    return image


@pytest.mark.parametrize("color", ["rgb", "gray"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read_as_preprocessing_reads_it(mode, color):
    image, channels = of_mode(mode), 1 if color == "gray" else 3
    spec, pre = InputSpec("x", "uint8", (1, channels, 20, 24)), Preprocess((20, 24), color=color, scale=1.0)
    identity = degrade(image, CONDITIONS["clean"], 0, Random(0))
    # YCbCr to grey takes Y where it can: one rounding of RGB between
    atol = 1 if (mode, color) == ("YCbCr", "gray") else 0
    np.testing.assert_allclose(
        apply(identity, pre, spec).astype(int), apply(image, pre, spec).astype(int), atol=atol, rtol=0
    )
    for condition in WORSE:
        out = transform(condition, 0)[0](image, "a")
        assert out.size == image.size and out.mode in ("L", "LA", "RGB", "RGBA")
        assert apply(out, pre, spec).shape == (1, channels, 20, 24)
    assert transform("clean", 0)[0](image, "a") is image


def test_transparent_palette():
    image = of_mode("P")
    image.info["transparency"] = 3
    assert transform("blur-low", 0)[0](image, "a").mode == "RGBA"


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("condition", WORSE)
def test_alpha_is_untouched_and_colour_does_not_see_it(condition, mode):
    image = of_mode(mode)
    out = transform(condition, 0)[0](image, "a")
    assert out.mode == mode and np.array_equal(np.asarray(out)[..., -1], np.asarray(image)[..., -1])
    plain = transform(condition, 0)[0](image.convert(mode[:-1]), "a")
    assert np.array_equal(np.asarray(out.convert(mode[:-1])), np.asarray(plain))


def test_16_bit_png_is_its_high_byte(tmp_path):
    deep = (texture(20, 24, 1)[:, :, 0].astype(np.uint16) << 8) + 200
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
        for condition in WORSE:
            out = np.asarray(transform(condition, 0)[0](image, "a"))
            np.testing.assert_array_equal(out, run(condition, (deep >> 8).astype(np.uint8), "a"))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (2, 1, 3), (1, 70_000), (70_000, 2, 3), (3, 5, 4)])
def test_tiny_and_extreme_sizes(condition, shape):
    out = run(condition, np.full(shape, 100, np.uint8))
    assert out.shape == shape and out.dtype == np.uint8


@pytest.mark.parametrize("condition", WORSE)
def test_very_large(condition):
    """Twelve million pixels: pieces of the work fit together, so a large image is like its small part."""
    tile = texture(100, 125, 1)[:, :, 0]
    large = run(condition, np.tile(tile, (30, 32)))
    assert large.shape == (3000, 4000)
    if condition in ("low-contrast", "over-exposure", "blur-low", "blur-high", "motion-blur"):
        np.testing.assert_array_equal(large[1000:1100, 1000:1125], large[2000:2100, 3000:3125])
    if condition in ("noise-low", "noise-medium", "low-light"):  # noise does not repeat
        assert not np.array_equal(large[1000:1100, 1000:1125], large[2000:2100, 3000:3125])


@pytest.mark.parametrize("condition", WORSE)
def test_what_is_said_about_an_image_does_not_matter(condition):
    image = Image.fromarray(texture())
    image.info.update(comment=b"x" * 70_000, dpi=(72, 72), icc_profile=b"y" * 200)
    np.testing.assert_array_equal(np.asarray(transform(condition, 0)[0](image, "a")), run(condition, texture(), "a"))


def test_jpeg_in_pieces_is_jpeg(monkeypatch):
    pixels = texture(96, 64, 1)
    whole = at("jpeg-low", pixels, 30)
    monkeypatch.setattr(degradations, "_JPEG_SIDE", 32)
    np.testing.assert_array_equal(at("jpeg-low", pixels, 30), whole)


# ------------------------------------------------------------------------------------- folders


def folder_of(tmp_path):
    for i in range(3):
        Image.fromarray(texture(16, 16, seed=i)).save(tmp_path / f"{i}.png")
    return open_folder(tmp_path, Preprocess((16, 16), scale=1.0), (InputSpec("x", "float32", (None, 3, 16, 16)),))


def test_manifest_keys_differ(tmp_path):
    folder = folder_of(tmp_path)
    keys = [folder.manifest()]
    for condition, seed in itertools.product([*WORSE, "mixed:0.5", "mixed:0.25", "mixed", "haze,rescale"], (0, 1)):
        keys.append(folder.transformed(*transform(condition, seed)).manifest())
    assert len(set(keys)) == len(keys)
    assert folder.transformed(*transform("clean", 1)).manifest() == keys[0]  # the same pixels, the same statistics
    assert transform("mixed", 0)[1] == transform(f"mixed:{MIXED}", 0)[1]


def test_key_changes_with_the_version(monkeypatch):
    before = transform("haze", 0)[1]
    monkeypatch.setattr("edgec.calib.degrade.VERSION", -1)
    assert transform("haze", 0)[1] != before


def test_batches_of_a_degraded_folder(tmp_path):
    folder = folder_of(tmp_path)
    degraded = folder.transformed(*transform("low-contrast", 0))
    for clean, dark in zip(folder.batches(), degraded.batches(), strict=True):
        alpha = 1 + parameter_of("low-contrast", 0, clean.names[0])
        np.testing.assert_allclose(dark.feed["x"], alpha * clean.feed["x"], atol=0.51)
    assert not degraded.skipped


# ------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("clean", Plan("conditions", ("clean",))),
        ("all", Plan("conditions", tuple(CONDITIONS))),
        ("qrid", Plan("conditions", QRID)),
        ("mixed", Plan("mixed", QRID, MIXED)),
        ("mixed:0.5", Plan("mixed", QRID, 0.5)),
        (" mixed:1 ", Plan("mixed", QRID, 1.0)),
        ("minimax", Plan("minimax", QRID)),
        ("blur-high, noise-low,blur-high", Plan("conditions", ("noise-low", "blur-high"))),
        ("haze,qrid", Plan("conditions", (*QRID, "haze"))),
    ],
)
def test_parse(text, plan):
    assert parse(text) == plan and parse(plan.text) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("noise", "'noise-low'"),
        ("noise-lo", "did you mean 'noise-low'"),
        ("Haze", "did you mean 'haze'"),
        ("clean,bluring-high", "'blur-high'"),
        ("zzz", "known: clean, noise-low"),
        ("", "a name is missing"),
        ("clean,,haze", "a name is missing"),
        ("mixed:1.5", "no fraction"),
        ("mixed:-0.1", "no fraction"),
        ("mixed:nan", "no fraction"),
        ("mixed:half", "mixed:0.5"),
        ("mixed:", "no fraction"),
        ("clean,mixed", "give mixed alone"),
        ("haze,minimax", "give minimax alone"),
    ],
)
def test_wrong_names(text, says):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert says in str(caught.value) and caught.value.where == f"--degrade {text}" and caught.value.fix


def test_minimax_is_no_transform():
    with pytest.raises(ValueError, match="several conditions"):
        transform("minimax", 0)
    with pytest.raises(UserError, match="unknown degradation"):
        transform("smog", 0)
