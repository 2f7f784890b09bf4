"""Preprocessing: reading the file, choosing, and what becomes of an image."""

import numpy as np
import pytest
from edgec.calib.preprocess import PRESETS, apply, load_preprocess, resolve
from edgec.compiler.errors import DataError
from edgec.compiler.types import InputSpec, Preprocess
from PIL import Image

NCHW = InputSpec("x", "float32", (None, 3, 8, 6))
NHWC = InputSpec("x", "float32", (1, 8, 6, 3))
GRAY = InputSpec("x", "float32", (1, 1, 8, 8))


def written(folder, text, name="m.preprocess.yaml"):
    path = folder / name
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------ the file


def test_all_keys(tmp_path):
    text = "size: [8, 6]\nresize: Letterbox\ncolor: BGR\nscale: 1/255\nmean: [1, 2, 3]\nstd: 2\nlayout: nhwc\n"
    assert load_preprocess(written(tmp_path, text)) == Preprocess(
        (8, 6), "letterbox", "bgr", 1 / 255, (1.0, 2.0, 3.0), (2.0,), "NHWC"
    )


def test_one_number_is_a_square(tmp_path):
    assert load_preprocess(written(tmp_path, "size: 224")).size == (224, 224)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("size: 8\nmeen: 0\n", "line 2", "did you mean 'mean'"),
        ("size: [8, 6, 3]\n", "line 1", "size is [8, 6, 3]"),
        ("size: [8, 0]\n", "line 1", "size is"),
        ("size: true\n", "line 1", "size is"),
        ("resize: squash\n", "line 1", "stretch, letterbox, crop"),
        ("color: rgb\nscale: 0\n", "line 2", "positive number"),
        ("scale: 1/0\n", "line 1", "positive number"),
        ("scale: .inf\n", "line 1", "positive number"),
        ("mean: [0, a, 0]\n", "line 1", "mean is"),
        ("mean: []\n", "line 1", "mean is"),
        ("\nstd: [1, 0, 1]\n", "line 2", "std is"),
        ("mean: [1, 2]\n", "line 1", "has 2 values"),
        ("color: gray\nmean: [1, 2, 3]\n", "line 2", "has 3 values"),
        ("size: 8\nsize: 9\n", "line 2", "stated twice"),
        ("size: [8\n", "line", "not valid YAML"),
        ("", "m.preprocess.yaml", "holds no keys"),
        ("- size\n", "m.preprocess.yaml", "holds no keys"),
    ],
)
def test_faults_name_the_line(tmp_path, text, line, says):
    with pytest.raises(DataError) as caught:
        load_preprocess(written(tmp_path, text))
    assert line in str(caught.value) and says in str(caught.value)
    assert caught.value.fix


def test_a_binary_file_is_no_text(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DataError, match="not text"):
        load_preprocess(path)


# ------------------------------------------------------------------------------------------ choosing


def test_nothing_stated_follows_the_model_and_says_so(tmp_path):
    pre = resolve(None, tmp_path / "m.onnx", NCHW)
    assert (pre.size, pre.layout, pre.color, pre.scale) == ((8, 6), "NCHW", "rgb", 1 / 255)
    assert {"size 8x6", "resize stretch", "color rgb", "scale 1/255"} <= set(pre.assumed)


def test_layout_and_colour_of_the_model(tmp_path):
    assert resolve(None, tmp_path / "m.onnx", NHWC).layout == "NHWC"
    assert resolve(None, tmp_path / "m.onnx", GRAY).color == "gray"


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec("x", "float32", (1, 3, None, None)),
        InputSpec("x", "float32", (1, 64, 8, 8)),
        InputSpec("x", "float32", (1, 128)),
        InputSpec("x", "int64", (1, 3, 8, 8)),
    ],
)
def test_no_guess_where_the_input_is_no_image_of_known_size(tmp_path, spec):
    assert resolve(None, tmp_path / "m.onnx", spec) is None


def test_sidecar_is_picked_up_and_argument_wins(tmp_path):
    written(tmp_path, "mean: 0.5\n")
    model = tmp_path / "m.onnx"
    assert resolve(None, model, NCHW) == Preprocess((8, 6), mean=(0.5,))
    assert resolve("raw-255", model, NCHW) == Preprocess((8, 6), scale=1.0)
    other = written(tmp_path, "mean: 0.25\n", "other.yaml")
    assert resolve(str(other), model, NCHW).mean == (0.25,)


def test_unknown_name_has_the_nearest_one(tmp_path):
    with pytest.raises(DataError, match="did you mean 'imagenet'"):
        resolve("imagnet", tmp_path / "m.onnx", NCHW)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_an_rgb_model(tmp_path, name):
    pre = resolve(name, tmp_path / "m.onnx", NCHW)
    assert pre.size == (8, 6) and pre.assumed == ()
    assert apply(Image.new("RGB", (20, 10)), pre, NCHW).shape == (1, 3, 8, 6)


@pytest.mark.parametrize(
    ("text", "spec", "says"),
    [
        ("size: [8, 8]", NCHW, "8x8 pixels"),
        ("color: gray", NCHW, "1 channels"),
        ("color: rgb", GRAY, "3 channels"),
        ("layout: NHWC", NCHW, "NHWC"),
        ("mean: 0", InputSpec("x", "float32", (1, 3, None, None)), "no fixed size"),
        ("mean: 0", InputSpec("x", "float32", (1, 10)), "no image"),
        ("scale: 1/255", InputSpec("x", "uint8", (1, 3, 8, 6)), "as they are"),
        ("std: 2", InputSpec("x", "uint8", (1, 3, 8, 6)), "as they are"),
    ],
)
def test_what_does_not_fit_the_model(tmp_path, text, spec, says):
    path = written(tmp_path, text)
    with pytest.raises(DataError) as caught:
        resolve(None, tmp_path / "m.onnx", spec)
    assert says in str(caught.value) and str(path) in str(caught.value) and caught.value.fix


def test_a_stated_size_fixes_a_dynamic_model(tmp_path):
    written(tmp_path, "size: [4, 5]")
    assert resolve(None, tmp_path / "m.onnx", InputSpec("x", "float32", (1, 3, None, None))).size == (4, 5)


# ------------------------------------------------------------------------------------------ images


def picture(mode="RGB", size=(6, 8), seed=0):
    bands = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *bands), dtype=np.uint8)
    return Image.fromarray(pixels, mode) if mode == "CMYK" else Image.fromarray(pixels)


def test_values_follow_the_formula():
    pre = Preprocess((8, 6), scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = picture()
    pixels = np.asarray(image).astype(np.float64)
    expected = ((pixels / 255 - pre.mean) / pre.std).transpose(2, 0, 1)[None]
    got = apply(image, pre, NCHW)
    assert got.dtype == np.float32
    # one float32 multiplication and one addition of values up to 3
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_bgr_reverses_before_mean_and_std():
    pre = Preprocess((8, 6), color="bgr", scale=1.0, mean=(1.0, 2.0, 3.0))
    image = picture()
    expected = np.asarray(image)[:, :, ::-1].astype(np.float32) - [1, 2, 3]
    np.testing.assert_array_equal(apply(image, pre, NCHW)[0], expected.transpose(2, 0, 1))


def test_nhwc():
    pre = Preprocess((8, 6), layout="NHWC", scale=1.0)
    np.testing.assert_array_equal(apply(picture(), pre, NHWC)[0], np.asarray(picture()))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_dtypes(dtype):
    spec = InputSpec("x", dtype, (1, 3, 8, 6))
    got = apply(picture(), Preprocess((8, 6), scale=1.0), spec)
    assert got.dtype == dtype and got.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(got[0].astype(np.uint8), np.asarray(picture()).transpose(2, 0, 1))


def test_uint8_models_get_scale_one_by_themselves(tmp_path):
    written(tmp_path, "color: rgb")
    assert resolve(None, tmp_path / "m.onnx", InputSpec("x", "uint8", (1, 3, 8, 6))).scale == 1


def test_alpha_is_dropped_and_grey_repeated():
    pre = Preprocess((8, 6), scale=1.0)
    image = picture("RGBA")
    np.testing.assert_array_equal(apply(image, pre, NCHW)[0], np.asarray(image)[:, :, :3].transpose(2, 0, 1))
    gray = picture("L")
    np.testing.assert_array_equal(apply(gray, pre, NCHW)[0], np.stack([np.asarray(gray)] * 3))


def test_palette_with_transparency_and_cmyk():
    pre = Preprocess((8, 6), scale=1.0)
    palette = picture().quantize(16)
    palette.info["transparency"] = b"\x00" * 16
    expected = np.asarray(palette.convert("RGBA"))[:, :, :3].transpose(2, 0, 1)
    np.testing.assert_array_equal(apply(palette, pre, NCHW)[0], expected)
    assert apply(picture("CMYK"), pre, NCHW).shape == (1, 3, 8, 6)


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    spec = InputSpec("x", "float32", (1, 1, 1, 4))
    with Image.open(tmp_path / "deep.png") as image:
        got = apply(image, Preprocess((1, 4), color="gray", scale=1.0), spec)
    np.testing.assert_array_equal(got.ravel(), [0, 0, 1, 255])


def test_one_pixel_image_is_stretched():
    got = apply(Image.new("RGB", (1, 1), (10, 20, 30)), Preprocess((8, 6), scale=1.0), NCHW)
    np.testing.assert_array_equal(got[0], np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 8, 6)))


def test_letterbox_centres_on_grey():
    pre = Preprocess((8, 8), resize="letterbox", scale=1.0)
    got = apply(Image.new("RGB", (16, 8), (200, 200, 200)), pre, NCHW)[0, 0]
    np.testing.assert_array_equal(got[[0, 1, 6, 7]], 114)
    np.testing.assert_array_equal(got[2:6], 200)


def test_crop_takes_the_centre():
    image = Image.new("RGB", (16, 8), (0, 0, 0))
    image.paste((255, 255, 255), (4, 0, 12, 8))
    got = apply(image, Preprocess((8, 8), resize="crop", scale=1.0), NCHW)
    assert (got == 255).all()


def test_orientation_in_exif_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    picture("L", (4, 4)).save(tmp_path / "a.png", exif=exif)
    spec = InputSpec("x", "float32", (1, 1, 4, 4))
    with Image.open(tmp_path / "a.png") as image:
        got = apply(image, Preprocess((4, 4), color="gray", scale=1.0), spec)
    np.testing.assert_array_equal(got[0, 0], np.asarray(picture("L", (4, 4))))
