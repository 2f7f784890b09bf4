"""What a linear layer reads, as rows of a matrix, and the sums over such rows that rounding needs.

A layer is Y = X V' a group: X (rows, in) are patches for a Conv, in the order of the weight's own axes (in, k…), and
the input's rows for Gemm and MatMul. Of a Conv's output positions a random sample is taken. Summed are

    X'X and Y'X     about the means of X and Y where the layer's bias takes care of the mean; else as they are

Shapes: X (groups, rows, in), Y (groups, rows, out), weights (groups, out, in). Sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes.forgiving import Rows

#: Inputs of a layer above which its Gram matrix, of which several copies are held, is not made.
MOST_INPUTS = 8192


@dataclass(frozen=True)
class Layout:
    """How one linear node's weight, input and output become matrices.

    `shape` is the weight's own; `spatial` are (kernel, strides, dilations, pads) of a Conv, None for Gemm and MatMul;
    `transposed` weights are stored (in, out). `biased`: the layer's bias will be set to what the mean error asks for.
    A ConvTranspose is the Conv with the kernel turned round over its input with zeros in between: `spread` are the
    steps from one input to the next (Dumoulin, Visin 2016, "A guide to convolution arithmetic for deep learning").
    """

    shape: tuple[int, ...]
    groups: int = 1
    spatial: tuple[tuple[int, ...], ...] | None = None
    transposed: bool = False
    biased: bool = True
    spread: tuple[int, ...] | None = None

    @property
    def inputs(self) -> int:
        """How many weights make one output of a row."""
        if self.spread is not None:
            return math.prod(self.shape) // self.shape[1]
        return self.shape[0] if self.transposed else math.prod(self.shape[1:])

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """Return a weight, or anything of its shape, as (groups, out, in)."""
        rows = weight.T if self.transposed else self._turned(weight)
        return rows.reshape(self.groups, -1, self.inputs)

    def unmatrix(self, matrix: np.ndarray) -> np.ndarray:
        """Return (groups, out, in) in the shape of the weight."""
        rows = matrix.reshape(-1, self.inputs)
        if self.spread is not None:
            rows = rows.reshape(self.shape[1], self.shape[0], *self.shape[2:])
        return rows.T if self.transposed else self._turned(rows).reshape(self.shape)

    def _turned(self, weight: np.ndarray) -> np.ndarray:
        """Return the weight of the Conv that a ConvTranspose is, and the other way round."""
        return weight if self.spread is None else np.flip(weight.swapaxes(0, 1), tuple(range(2, weight.ndim)))

    def rows(self, x: np.ndarray, y: np.ndarray, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return X and Y of at most `most` output positions, drawn without replacement; float64."""
        drawn = self.draw(y, most, rng)
        return self.inputs_at(x, y, drawn), self.outputs_at(y, drawn)

    def draw(self, y: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
        """Return at most `most` output positions, drawn without replacement, as numbers."""
        count = y.size // y.shape[-1] if self.spatial is None else math.prod((len(y), *y.shape[2:]))
        return np.arange(count) if count <= most else np.sort(rng.choice(count, most, replace=False))

    def inputs_at(self, x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Return X at the positions `drawn` of the output `y`; float64."""
        if self.spatial is None:
            return x.reshape(-1, self.inputs)[None, drawn].astype(np.float64)
        at = np.unravel_index(drawn, (len(y), *y.shape[2:]))
        return self._grouped(np.moveaxis(self._patches(x), 1, len(at))[at])  # channels behind positions

    def outputs_at(self, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Return Y at the positions `drawn`; float64."""
        if self.spatial is None:
            return y.reshape(-1, y.shape[-1])[None, drawn].astype(np.float64)
        at = np.unravel_index(drawn, (len(y), *y.shape[2:]))
        return self._grouped(np.moveaxis(y, 1, len(at))[at])

    def _grouped(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(len(rows), self.groups, -1).swapaxes(0, 1).astype(np.float64)

    def _patches(self, x: np.ndarray) -> np.ndarray:
        """Return a view (n, channels, *positions, *kernel) of what a Conv reads."""
        assert self.spatial is not None
        kernel, strides, dilations, pads = self.spatial
        rank = len(kernel)
        if self.spread is not None:
            sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], self.spread, strict=True)]
            apart = np.zeros((*x.shape[:2], *sizes), x.dtype)
            apart[(slice(None), slice(None), *(slice(None, None, step) for step in self.spread))] = x
            x = apart
        padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
        spans = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
        windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in (*strides, *dilations)))
        view: np.ndarray = windows[steps]
        return view


def layout(node: ir.Node, shape: tuple[int, ...]) -> Layout | str:
    """Return the layout of a linear node with a weight of this shape, or the reason why it has none."""
    found = _layout(node, shape)
    if isinstance(found, Layout) and found.inputs > MOST_INPUTS:
        return f"it reads {found.inputs} values, whose Gram matrix would take {8e-9 * found.inputs**2:.1f} GB"
    return found


def _layout(node: ir.Node, shape: tuple[int, ...]) -> Layout | str:
    attributes = node.attributes
    if node.op_type in ("Conv", "ConvTranspose"):
        if attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return "its padding depends on the image (auto_pad)"
        rank = len(shape) - 2
        spatial = (
            shape[2:],
            tuple(attributes.get_ints("strides", [1] * rank)),
            tuple(attributes.get_ints("dilations", [1] * rank)),
            tuple(attributes.get_ints("pads", [0] * 2 * rank)),
        )
        if node.op_type == "ConvTranspose":
            return _transposed(node, shape, spatial)
        return Layout(shape, attributes.get_int("group", 1), spatial)
    if node.op_type == "Gemm":
        if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) != 1.0:
            return "transA or alpha is set"
        return Layout(shape, transposed=not attributes.get_int("transB", 0))
    if node.op_type == "MatMul" and len(shape) == 2:
        return Layout(shape, transposed=True, biased=False)
    return f"no Gram matrix is made for {node.op_type}"


def _transposed(node: ir.Node, shape: tuple[int, ...], spatial: tuple[tuple[int, ...], ...]) -> Layout | str:
    """Return the layout of a ConvTranspose as that of the Conv that it is."""
    kernel, strides, dilations, pads = spatial
    rank = len(kernel)
    more = node.attributes.get_ints("output_padding", [0] * rank)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    around = (*(r - p for r, p in zip(reach, pads[:rank], strict=True)),
              *(r - p + m for r, p, m in zip(reach, pads[rank:], more, strict=True)))  # fmt: skip
    if node.attributes.get_int("group", 1) != 1 or "output_shape" in node.attributes or min(around) < 0:
        return (
            "no Gram matrix is made for a ConvTranspose in groups, of a stated output shape, or cropped by its padding"
        )
    return Layout(shape, 1, (kernel, (1,) * rank, dilations, around), spread=strides)


class Moments:
    """Sums over the rows of one layer, batch after batch."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.rows = layout, 0
        outputs = math.prod(layout.shape) // (layout.inputs * layout.groups)
        self._gram = np.zeros((layout.groups, layout.inputs, layout.inputs))
        self._cross = np.zeros((layout.groups, outputs, layout.inputs))
        self._x, self._y = np.zeros((layout.groups, layout.inputs)), np.zeros((layout.groups, outputs))
        self.energy = 0.0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows: x (groups, rows, in) of what is read, y (groups, rows, out) of what shall come out."""
        self.rows += x.shape[1]
        self._gram += x.swapaxes(1, 2) @ x
        self._cross += y.swapaxes(1, 2) @ x
        self._x += x.sum(axis=1)
        self._y += y.sum(axis=1)
        self.energy += float(np.vdot(y, y))

    def less(self, part: Moments) -> Moments:
        """Return the sums over all rows but those of `part`."""
        rest = Moments(self.layout)
        rest.rows, rest.energy = self.rows - part.rows, self.energy - part.energy
        rest._gram, rest._cross = self._gram - part._gram, self._cross - part._cross
        rest._x, rest._y = self._x - part._x, self._y - part._y
        return rest

    def gram(self) -> np.ndarray:
        """X'X (groups, in, in)."""
        return self._gram - self._about(self._x, self._x)

    def cross(self) -> np.ndarray:
        """Y'X (groups, out, in)."""
        return self._cross - self._about(self._y, self._x)

    def mean(self) -> np.ndarray:
        """Return the mean of what is read (groups, in); 0 where no bias takes care of it."""
        return self._x / max(self.rows, 1) if self.layout.biased else np.zeros_like(self._x)

    def shift(self, weight: np.ndarray) -> np.ndarray:
        """Return what a bias lacks with this weight (groups, out, in): one number per output channel."""
        made = (weight @ self._x[:, :, None])[..., 0]
        shift: np.ndarray = (self._y - made).reshape(-1) / max(self.rows, 1)
        return shift

    def _about(self, one: np.ndarray, other: np.ndarray) -> np.ndarray | float:
        return one[:, :, None] * other[:, None, :] / max(self.rows, 1) if self.layout.biased else 0.0


class Kept:
    """The rows themselves, in float32, of a layer whose targets shall be made anew from what comes out."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows: list[tuple[np.ndarray, ...]] = []

    def add(self, x: np.ndarray, target: np.ndarray, level: np.ndarray) -> None:
        """Keep rows: x (groups, rows, in); target, and what is added to it (groups, rows, out)."""
        self._rows.append(tuple(a.astype(np.float32) for a in (x, target, level)))

    def of_group(self, group: int) -> Rows:
        """Return the rows of one group."""
        x, target, level = (np.concatenate([a[group] for a in each]) for each in zip(*self._rows, strict=True))
        return Rows(x, target, level, self._layout.biased)
