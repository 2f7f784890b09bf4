"""How the weight, the input and the output of a linear layer become matrices.

A layer is Y = X V' a group: X (rows, in) are patches for a Conv, in the order of the weight's own axes (in, k…), and
the input's rows for Gemm and MatMul. Of a Conv's output positions a random sample is taken.

Shapes: X (groups, rows, in), Y (groups, rows, out), weights (groups, out, in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

#: Inputs of a layer above which its Gram matrix, of which several copies are held, is not made.
MOST_INPUTS = 8192
#: Rows of a layer: so many, or so many times its inputs if that is more, if the images have them.
ROWS, ROWS_PER_INPUT = 16384, 8
#: Numbers that are kept of the rows of a layer without a Gram matrix: 256 MB.
_KEPT = 64_000_000


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
    def wide(self) -> bool:
        """Whether rows are kept of this layer in place of a Gram matrix."""
        return self.inputs > MOST_INPUTS

    @property
    def is_matrix(self) -> bool:
        """Whether the layer has no kernel: Gemm, MatMul, or a Conv of single positions."""
        return self.spatial is None or math.prod(self.spatial[0]) == 1

    @property
    def most(self) -> int:
        """How many rows are summed up, or kept, at most."""
        return max(1, _KEPT // self.inputs) if self.wide else max(ROWS, ROWS_PER_INPUT * self.inputs)

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

    def rows_of(self, y: Sequence[np.ndarray]) -> int:
        """Return how many rows are drawn from all batches of an output."""
        channels = -1 if self.spatial is None else 1
        rows: int = sum(a.size // a.shape[channels] for a in y)
        return min(self.most, rows)

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


def layout_of(node: ir.Node, shape: tuple[int, ...], *, wide: bool = False) -> Layout | str:
    """Return the layout of a linear node with a weight of this shape, or the reason why it has none.

    With `wide`, layers have one whose Gram matrix would be too large, if they do not work in groups.
    """
    found = _layout(node, shape)
    if isinstance(found, Layout) and found.wide and not (wide and found.groups == 1):
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
