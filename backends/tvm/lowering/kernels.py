"""Layers with constant weights as functions that know the machine: what they compute, and how weights lie.

A layer with weights is a sum over taps (kh, kw) and channels. With L float32 lanes of a vector register, output
channel o of group g lies in lane o % L of block o / L; the last block is filled up with zeros:

    acc[n, h, w, g, o] = sum_{kh, kw, c} P[n, h s + kh d, w s + kw d, g C' + c] W[g, o / L, kh, kw, c, o % L]
    y[n, h, w, g O' + o] = acc[n, h, w, g, o]    for o < O'

P is the padded input, C' and O' are a group's channels. So one lane of a register belongs to one output channel, a
weight is one aligned load, an input one broadcast (NHWC, after NeoCPU: Liu et al., "Optimizing CNN model inference on
CPUs", USENIX ATC 2019, who block both). Integers go by fours of channels, c = 4 q + i, with W[g, o / L, kh, kw, q, o %
L, i], as dot products of bytes want them. Depthwise layers have lanes of channels: acc[n, h, w, c] = sum_{kh, kw} P[n,
.., .., c] W[kh, kw, c]. Products (MatMul, Gemm) are the same with rows in place of positions and no taps.

Weights are laid out here, when the network is compiled. What comes after a layer (bias, ReLU, a sum, rounding) is fused
behind it by TVM: `op_pattern` allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

#: The block that sums, and the one that fills up: what schedules look for.
CONTRACTION, DEPTHWISE, PADDED = "contraction", "depthwise", "padded"
_FOUR = 4


@dataclass(frozen=True)
class Window:
    """Where taps lie: kernel, strides, dilations; pads are (top, left, bottom, right), filled with `fill`."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    fill: float = 0.0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return how many positions there are, down and across."""
        top, left, bottom, right = self.pads
        high, wide = (
            (size + pad - (k - 1) * d - 1) // s + 1
            for size, pad, k, s, d in zip(
                (height, width), (top + bottom, left + right), self.kernel, self.strides, self.dilations, strict=True
            )
        )
        return high, wide


def filled(size: int, multiple: int) -> int:
    """Return the least multiple that holds `size`."""
    return -(-size // multiple) * multiple


def rows_in_tiles(positions: int) -> int:
    """Return how many positions are computed where `positions` are wanted: some more where no tile divides them."""
    if positions <= LONGEST or any(positions % tile == 0 for tile in range(4, LONGEST + 1)):
        return positions
    return filled(positions, 8)


#: Positions that one tile has at most.
LONGEST = 28


# ------------------------------------------------------------------------------------------- weights


def packed(weight: np.ndarray, groups: int, lanes: int, fours: bool) -> np.ndarray:
    """Lay out [kh, kw, C', O] as [groups, blocks, kh, kw, C', lanes], or with `fours` [.., C' / 4, lanes, 4]."""
    kh, kw, channels, outputs = weight.shape
    each = outputs // groups
    blocks, depth = filled(each, lanes) // lanes, filled(channels, _FOUR) if fours else channels
    room = np.zeros((kh, kw, depth, groups, blocks * lanes), weight.dtype)
    room[:, :, :channels, :, :each] = weight.reshape(kh, kw, channels, groups, each)
    room = room.reshape(kh, kw, depth, groups, blocks, lanes).transpose(3, 4, 0, 1, 2, 5)
    if fours:
        room = room.reshape(groups, blocks, kh, kw, depth // _FOUR, _FOUR, lanes).swapaxes(-1, -2)
    return np.ascontiguousarray(room)


def packed_depthwise(weight: np.ndarray, lanes: int) -> np.ndarray:
    """Fill [kh, kw, C] up to a multiple of the lanes."""
    kh, kw, channels = weight.shape
    room = np.zeros((kh, kw, filled(channels, lanes)), weight.dtype)
    room[:, :, :channels] = weight
    return room


# ------------------------------------------------------------------------------------------- functions


def dims(sizes: Sequence[int]) -> list[Any]:
    """Return sizes as Relax has them: 64 bits."""
    return [tirx.IntImm("int64", size) for size in sizes]


def convolution(x: Any, weight: Any, outputs: int, window: Window) -> Any:
    """Return acc and y above as TE tensors: x is [N, H, W, C], weight as `packed` gives it."""
    n, height, width, channels = (int(i) for i in x.shape)
    groups, _, kh, kw = (int(i) for i in weight.shape[:4])
    fours = len(weight.shape) == 7
    high, wide = window.size(height, width)
    room = rows_in_tiles(wide)
    (sh, sw), (dh, dw) = window.strides, window.dilations
    depth = int(weight.shape[4]) * (_FOUR if fours else 1)
    p = _padded(x, window, room, depth if groups == 1 else channels)
    axes = [
        te.reduce_axis(_range(kh), "kh"),
        te.reduce_axis(_range(kw), "kw"),
        te.reduce_axis(_range(int(weight.shape[4])), "q"),
    ]
    if fours:
        axes.append(te.reduce_axis(_range(_FOUR), "i"))

    def sums(n: Any, h: Any, w: Any, g: Any, o: Any) -> Any:
        a, e, q, *i = axes
        c = q * _FOUR + i[0] if i else q
        read = p[n, h * sh + a * dh, w * sw + e * dw, g * depth + c]
        return te.sum(_wide(read) * _wide(weight[(g, o // lanes, a, e, q, o % lanes, *i)]), axes)

    lanes, each = int(weight.shape[5]), outputs // groups
    acc = te.compute(dims((n, high, room, groups, int(weight.shape[1]) * lanes)), sums, name=CONTRACTION)
    return te.compute(
        dims((n, high, wide, outputs)), lambda n, h, w, o: acc[n, h, w, o // each, o % each], name="unpacked"
    )


def depthwise(x: Any, weight: Any, window: Window) -> Any:
    """Return y for [N, H, W, C] and [kh, kw, C], the latter filled up, as TE tensors."""
    n, height, width, channels = (int(i) for i in x.shape)
    kh, kw, room = (int(i) for i in weight.shape)
    high, wide = window.size(height, width)
    columns = rows_in_tiles(wide)
    (sh, sw), (dh, dw) = window.strides, window.dilations
    p = _padded(x, window, columns, room)
    axes = [te.reduce_axis(_range(kh), "kh"), te.reduce_axis(_range(kw), "kw")]

    def sums(n: Any, h: Any, w: Any, c: Any) -> Any:
        a, e = axes
        return te.sum(_wide(p[n, h * sh + a * dh, w * sw + e * dw, c]) * _wide(weight[a, e, c]), axes)

    acc = te.compute(dims((n, high, columns, room)), sums, name=DEPTHWISE)
    return te.compute(dims((n, high, wide, channels)), lambda *at: acc[at], name="unpacked")


def product(x: Any, weight: Any, outputs: int) -> Any:
    """Return y for [..., K] and weights [1, blocks, 1, 1, ...] as TE tensors."""
    lead = [int(i) for i in x.shape[:-1]]
    fours = len(weight.shape) == 7
    rows, room = lead[-1], rows_in_tiles(lead[-1])
    depth, lanes = int(x.shape[-1]), int(weight.shape[5])
    p = x
    if fours and depth % _FOUR:
        shape = [*lead, filled(depth, _FOUR)]
        p = te.compute(
            dims(shape), lambda *i: tirx.if_then_else(i[-1] < depth, x[i], tirx.const(0, str(x.dtype))),
            name=PADDED,
        )  # fmt: skip
    axes = [te.reduce_axis(_range(int(weight.shape[4])), "q")]
    if fours:
        axes.append(te.reduce_axis(_range(_FOUR), "i"))

    def sums(*at: Any) -> Any:
        *before, row, o = at
        q, *i = axes
        row = tirx.min(row, rows - 1) if room > rows else row
        read = p[(*before, row, q * _FOUR + i[0] if i else q)]
        return te.sum(_wide(read) * _wide(weight[(0, o // lanes, 0, 0, q, o % lanes, *i)]), axes)

    acc = te.compute(dims((*lead[:-1], room, int(weight.shape[1]) * lanes)), sums, name=CONTRACTION)
    return te.compute(dims((*lead, outputs)), lambda *at: acc[at], name="unpacked")


def _range(size: int) -> tuple[Any, Any]:
    zero, end = dims((0, size))
    return zero, end


def _wide(value: Any) -> Any:
    """Return bytes as int32, floats as they are: LLVM sees that factors are narrow, and takes SMLAL or VPMADDWD."""
    return value.astype("int32") if "int" in str(value.dtype) else value


def _padded(x: Any, window: Window, room: int, channels: int) -> Any:
    """Return the input with zeros around it, and with as many columns and channels as are computed; itself if it is."""
    n, height, width, had = (int(i) for i in x.shape)
    top, left, bottom, _ = window.pads
    across = (room - 1) * window.strides[1] + (window.kernel[1] - 1) * window.dilations[1] + 1
    shape = (n, top + height + bottom, max(across, width) if not left else max(across, left + width), channels)
    if shape == (n, height, width, had):
        return x

    def value(n: Any, h: Any, w: Any, c: Any) -> Any:
        inside = [h >= top, h < top + height, w >= left, w < left + width]
        inside += [c < had] if channels > had else []
        return tirx.if_then_else(tirx.all(*inside), x[n, h - top, w - left, c], tirx.const(window.fill, str(x.dtype)))

    return te.compute(dims(shape), value, name=PADDED)
