"""How an image becomes a model input: what the user states, what a sidecar says, what the model implies.

    x = (pixel * scale - mean) / std = pixel * (scale / std) - mean / std      per channel, pixel in 0..255

`mean` and `std` are in the order of the channels as the model gets them (for bgr: blue first). Decisions, the same for
every file: images are resized with an antialiased bilinear filter, and only where the size differs; letterbox pads
with grey 114 on both sides, as the YOLO family does; crop takes the largest centred window of the right shape; alpha is
dropped; 16-bit grey is reduced to its high byte; the orientation in EXIF is ignored, as training pipelines do.
Models that take uint8 get the pixels as they are: anything but scale 1, mean 0, std 1 is an error there.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ..compiler.errors import DataError
from ..compiler.types import InputSpec, Preprocess
from . import geometry

#: What fills the border of a letterboxed image.
LETTERBOX_GREY = 114
#: The value types that an image can be turned into.
DTYPES = ("float32", "float16", "float64", "uint8")
SIDECAR = ".preprocess.yaml"

_RGB_MEAN, _RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRESETS: dict[str, Preprocess] = {
    "imagenet": Preprocess(resize="crop", mean=_RGB_MEAN, std=_RGB_STD),
    "imagenet-stretch": Preprocess(mean=_RGB_MEAN, std=_RGB_STD),
    "caffe": Preprocess(color="bgr", scale=1.0, mean=(103.939, 116.779, 123.68)),
    "minus-one-one": Preprocess(mean=(0.5,), std=(0.5,)),
    "zero-one": Preprocess(),
    "raw-255": Preprocess(scale=1.0),
    "yolo": Preprocess(resize="letterbox"),
}


# --------------------------------------------------------------------------------------------- reading the file


def load_preprocess(path: Path) -> Preprocess:
    """Read a preprocessing file (YAML). DataError, with the line, for an unknown key or a wrong value."""
    return _load(path)[0]


def _load(path: Path) -> tuple[Preprocess, frozenset[str]]:
    """Return what the file says, and which keys it states."""
    where = str(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where, fix="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError("is not text", where=where, fix=_FILE_FIX) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}, line {mark.line + 1}" if mark else where
        raise DataError(f"is not valid YAML: {getattr(error, 'problem', None)}", where=line, fix=_FILE_FIX) from error
    if not isinstance(root, yaml.MappingNode):
        raise DataError("holds no keys", where=where, fix=_FILE_FIX)
    fields: dict[str, Any] = {}
    lines: dict[str, str] = {}
    for key_node, value_node in root.value:
        key, line = str(key_node.value), f"{where}, line {key_node.start_mark.line + 1}"
        if key in fields:
            raise DataError(f"{key!r} is stated twice", where=line, fix="keep one of the two")
        fields[key] = _field(key, _plain(value_node), line)
        lines[key] = line
    pre = Preprocess(**fields)
    for key in ("mean", "std"):
        if len(getattr(pre, key)) not in (1, _channels(pre)):
            what = f"{key} has {len(getattr(pre, key))} values, and {pre.color} images have {_channels(pre)} channels"
            raise DataError(what, where=lines[key], fix="give one value, or one for each channel")
    return pre, frozenset(fields)


def _plain(node: yaml.Node) -> Any:
    """Return the node's value as plain Python."""
    return yaml.SafeLoader("").construct_object(node, deep=True)


def _field(key: str, value: Any, line: str) -> Any:
    if key not in _PARSERS:
        near = difflib.get_close_matches(key, _PARSERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown key {key!r}", where=line, fix=f"{hint}known keys: {', '.join(_PARSERS)}")
    expected, parse = _PARSERS[key]
    try:
        return parse(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise DataError(f"{key} is {value!r}", where=line, fix=f"{key} is {expected}") from None


def _number(value: Any) -> float:
    """Return a finite float; text like 1/255 is a fraction."""
    if isinstance(value, bool):
        raise TypeError
    above, slash, below = value.partition("/") if isinstance(value, str) else (value, "", "")
    number = float(above) / float(below) if slash else float(above)
    if not math.isfinite(number):
        raise ValueError
    return number


def _positive(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError
    return number


def _each(parse: Callable[[Any], float]) -> Callable[[Any], tuple[float, ...]]:
    def several(value: Any) -> tuple[float, ...]:
        values = tuple(parse(v) for v in (value if isinstance(value, list) else [value]))
        if not values:
            raise ValueError
        return values

    return several


def _size(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, list) else (value, value)
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width)):
        raise ValueError
    return height, width


def _one_of(*names: str) -> tuple[str, Callable[[Any], str]]:
    by_lower = {name.lower(): name for name in names}

    def parse(value: Any) -> str:
        if str(value).lower() not in by_lower:
            raise ValueError
        return by_lower[str(value).lower()]

    return "one of: " + ", ".join(names), parse


#: key -> (what a value is, in words; value -> field, TypeError or ValueError where it is not that).
_PARSERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "size": ("[height, width], or one number for both", _size),
    "resize": _one_of("stretch", "letterbox", "crop"),
    "color": _one_of("rgb", "bgr", "gray"),
    "scale": ("a positive number, such as 1/255", _positive),
    "mean": ("a number, or one for each channel", _each(_number)),
    "std": ("a positive number, or one for each channel", _each(_positive)),
    "layout": _one_of("NCHW", "NHWC"),
}
_FILE_FIX = f"a preprocessing file holds lines like 'size: [224, 224]'; keys: {', '.join(_PARSERS)}"


# --------------------------------------------------------------------------------------------- choosing


def resolve(name_or_file: str | None, model_path: Path, spec: InputSpec) -> Preprocess | None:
    """Return how images become the model's input `spec`: stated by the user, by the model's sidecar, or assumed.

    `name_or_file` is one of PRESETS or a YAML file; the sidecar is `<model's stem>.preprocess.yaml` beside the
    model. Size, layout and colour that are not stated follow from the model. Where nothing is stated, `assumed`
    lists the rest; None then means that the input does not look like an image, or has no fixed size. DataError
    where what is stated does not fit the model.
    """
    pre, stated, where = _stated(name_or_file, model_path)
    if where is None:
        return _assumed(spec)
    if not _is_image(spec):
        fix = "leave the preprocessing out, and give .npy or .npz files in place of images"
        raise DataError(f"the model's input {_describe(spec)} is no image", where=where, fix=fix)
    pre = _completed(pre, stated, spec)
    _check(pre, spec, where)
    return pre


def _stated(name_or_file: str | None, model_path: Path) -> tuple[Preprocess, frozenset[str], str | None]:
    """Return what is stated, which keys, and where; no place where nothing is."""
    if name_or_file is None:
        sidecar = model_path.with_name(model_path.stem + SIDECAR)
        return (*_load(sidecar), str(sidecar)) if sidecar.is_file() else (Preprocess(), frozenset(), None)
    where = f"--preprocess {name_or_file}"
    if name_or_file in PRESETS:
        color = {"color"} if PRESETS[name_or_file].color == "bgr" else set()
        return PRESETS[name_or_file], frozenset({"resize", "scale", "mean", "std", *color}), where
    if not Path(name_or_file).is_file():
        near = difflib.get_close_matches(name_or_file, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        fix = f"{hint}known names: {', '.join(PRESETS)}"
        raise DataError("is neither a file nor a known name", where=where, fix=fix)
    return (*_load(Path(name_or_file)), name_or_file)


def _assumed(spec: InputSpec) -> Preprocess | None:
    if not _is_image(spec):
        return None
    pre = _completed(Preprocess(), frozenset(), spec)
    if pre.size is None or spec.shape[_channel_axis(pre)] not in (1, 3, None):
        return None
    scale = "1/255" if pre.scale != 1 else "1"
    height, width = pre.size
    says = (f"size {height}x{width}", f"layout {pre.layout}", f"resize {pre.resize}", f"color {pre.color}")
    return dataclasses.replace(pre, assumed=(*says, f"scale {scale}", "mean 0", "std 1"))


def _completed(pre: Preprocess, stated: frozenset[str], spec: InputSpec) -> Preprocess:
    """Fill in what is not stated, from the model: size, layout, grey for one channel, scale 1 for uint8."""
    if "layout" not in stated:
        last, first = spec.shape[3], spec.shape[1]
        pre = dataclasses.replace(pre, layout="NHWC" if last in (1, 3) and first not in (1, 3) else "NCHW")
    if "color" not in stated and spec.shape[_channel_axis(pre)] == 1 and len(pre.mean) == len(pre.std) == 1:
        pre = dataclasses.replace(pre, color="gray")
    if "scale" not in stated and spec.dtype == "uint8":
        pre = dataclasses.replace(pre, scale=1.0)
    if pre.size is None:
        height, width = _model_size(pre, spec)
        pre = dataclasses.replace(pre, size=(height, width) if height and width else None)
    return pre


def _check(pre: Preprocess, spec: InputSpec, where: str) -> None:
    """Raise DataError unless images prepared like that fit the model."""
    if pre.size is None:
        fix = "state it: size: [height, width] in a preprocessing file"
        raise DataError(f"the model's input {_describe(spec)} has no fixed size", where=where, fix=fix)
    channels = spec.shape[_channel_axis(pre)]
    if channels not in (None, _channels(pre)):
        gives = f"gives {_channels(pre)} channels in {pre.layout}"
        what = f"{gives}, and the model's input {_describe(spec)} has {channels}"
        raise DataError(what, where=where, fix="change color (rgb, bgr: 3 channels, gray: 1) or layout (NCHW, NHWC)")
    wanted = _model_size(pre, spec)
    if any(w not in (None, s) for w, s in zip(wanted, pre.size, strict=True)):
        what = f"gives {pre.size[0]}x{pre.size[1]} pixels, which do not fit the model's input {_describe(spec)}"
        raise DataError(what, where=where, fix="leave size out, or export the model with that size")
    if spec.dtype == "uint8" and (pre.scale != 1 or any(pre.mean) or any(s != 1 for s in pre.std)):
        what = f"scales the pixels, and the model's input {_describe(spec)} takes them as they are"
        raise DataError(what, where=where, fix="state scale: 1, mean: 0, std: 1")


def _is_image(spec: InputSpec) -> bool:
    return len(spec.shape) == 4 and spec.dtype in DTYPES


def _describe(spec: InputSpec) -> str:
    return f"{spec.name!r} ({spec.dtype}, {'x'.join('?' if d is None else str(d) for d in spec.shape)})"


def _channel_axis(pre: Preprocess) -> int:
    return 1 if pre.layout == "NCHW" else 3


def _model_size(pre: Preprocess, spec: InputSpec) -> tuple[int | None, int | None]:
    height, width = spec.shape[2:] if pre.layout == "NCHW" else spec.shape[1:3]
    return height, width


def _channels(pre: Preprocess) -> int:
    return 1 if pre.color == "gray" else 3


# --------------------------------------------------------------------------------------------- doing it


def apply(image: Image.Image, pre: Preprocess, spec: InputSpec) -> np.ndarray:
    """Return `image` as a batch of one: (1, C, H, W) or (1, H, W, C) in the dtype of `spec`.

    `pre.size` must be known, as `resolve` makes it. Raises OSError and the like where the image turns out damaged.
    """
    assert pre.size is not None
    pixels = np.asarray(_resized(_in_color(image, pre.color), pre))
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pre.color == "bgr":
        pixels = pixels[:, :, ::-1]
    if pre.layout == "NCHW":
        pixels = pixels.transpose(2, 0, 1)
    if spec.dtype == "uint8":
        return np.ascontiguousarray(pixels)[None]
    factor, offset = _affine(pre)
    out = np.empty((1, *pixels.shape), np.float32)
    np.multiply(pixels, factor, out=out[0], dtype=np.float32)
    if offset.any():
        out += offset
    return out.astype(spec.dtype, copy=False)


def _affine(pre: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 factor and offset, shaped to broadcast over the layout; computed in float64."""
    mean, std = np.array(pre.mean, np.float64), np.array(pre.std, np.float64)
    shape = (-1, 1, 1) if pre.layout == "NCHW" else (1, 1, -1)
    factor, offset = np.broadcast_arrays(pre.scale / std, -mean / std)
    return factor.reshape(shape).astype(np.float32), offset.reshape(shape).astype(np.float32)


def _in_color(image: Image.Image, color: str) -> Image.Image:
    """Return the image in mode L or RGB (bgr is swapped later, on the pixels)."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it at 255
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high_byte.astype(np.uint8))
    if image.mode == "F" or (image.mode == "P" and "transparency" in image.info):  # not in one step with Pillow
        image = image.convert("L" if image.mode == "F" else "RGBA")
    mode = "L" if color == "gray" else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Image.Image, pre: Preprocess) -> Image.Image:
    assert pre.size is not None
    height, width = pre.size
    if image.size == (width, height):
        return image
    return _RESIZE[pre.resize](image, width, height)


def _stretch(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize the largest centred window that has the target's shape."""
    box = geometry.largest(image.size, (width, height))
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def _letterbox(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fit the whole image into the target, centred on grey."""
    inner, corner = geometry.fitted(image.size, (width, height))
    canvas = Image.new(image.mode, (width, height), (LETTERBOX_GREY,) * len(image.getbands()))
    fitted = image if image.size == inner else image.resize(inner, Image.Resampling.BILINEAR)
    canvas.paste(fitted, corner)
    return canvas


_RESIZE: Mapping[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "stretch": _stretch,
    "crop": _crop,
    "letterbox": _letterbox,
}
