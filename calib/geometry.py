"""Where an image's pixels come to lie in a model's input.

Each way of resizing makes a window of the image the whole input; a point of the image is then at

    x' = (x - left) / (right - left)      y' = (y - top) / (bottom - top)      in fractions of the input

    stretch    the image itself
    crop       the largest centred window with the input's shape
    letterbox  the image and, on two sides, the border that is padded: it reaches beyond the image

An image that has the input's size already is left as it is. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

#: Left, top, right, bottom, in pixels of the image.
Window = tuple[float, float, float, float]
_Size = tuple[int, int]


def window(resize: str, size: _Size, target: _Size) -> Window:
    """Return the part of an image of `size` that becomes the whole input of the size `target`."""
    return whole(size, target) if size == target else _WINDOWS[resize](size, target)


def whole(size: _Size, _: _Size) -> Window:
    """Return all of the image."""
    return 0.0, 0.0, float(size[0]), float(size[1])


def largest(size: _Size, target: _Size) -> Window:
    """Return the largest centred window that has the target's shape."""
    (width, height), (to_width, to_height) = size, target
    scale = min(width / to_width, height / to_height)
    left, top = (width - to_width * scale) / 2, (height - to_height * scale) / 2
    right, bottom = min(left + to_width * scale, width), min(top + to_height * scale, height)
    return max(left, 0.0), max(top, 0.0), right, bottom


def fitted(size: _Size, target: _Size) -> tuple[_Size, _Size]:
    """Return the size that the whole image gets inside the target, and where its left upper corner comes to lie."""
    scale = min(target[0] / size[0], target[1] / size[1])
    inner = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return inner, ((target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2)


def _padded(size: _Size, target: _Size) -> Window:
    inner, corner = fitted(size, target)
    left, top = (-at * whole / new for at, whole, new in zip(corner, size, inner, strict=True))
    right, bottom = ((to - at) * whole / new for to, at, whole, new in zip(target, corner, size, inner, strict=True))
    return left, top, right, bottom


_WINDOWS: Mapping[str, Callable[[_Size, _Size], Window]] = {"stretch": whole, "crop": largest, "letterbox": _padded}
