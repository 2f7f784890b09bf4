"""Convolutions that make channels some of which are cut, fitted to what those that read them lose (passes/making.py).

A producer is taken where, up to each convolution that reads what it makes, each step takes a channel by itself
(chain_links.py), all readers miss the same channels, and it is small. Else it stays as least squares to its own old
output made it. Out of the images small tiles of the readers' outputs are drawn, with all that they see of what the
producer reads (tiles.py); there a reader shall give what its own weights make of the uncut network's input, and what
a residual Add behind it lacks on its other input. The readers themselves are fitted when the walk comes to them.

With half of their MACs cut, ResNet-20 and 32 gain 0.6 and 0.7 dB by it and lose 6.4 and 3.7 points instead of 8.2 and
6.1; a detector of whose first layer 8 of 24 channels are gone gains 0.3 to 0.4 dB.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes.making import refitted_filters
from ..fitting.layerwise import Ahead, Choice, Site, bias_of
from .chain_links import End, ends, is_convolution, matrix, unmatrix, weight_of
from .tiles import Drawing

#: Most inputs of the producer and of a reader, and weights that are fitted: a step is some seconds there.
_WIDEST, _WEIGHTS = 600, 32768


@dataclass(frozen=True, eq=False)
class Made:
    """A producer's better weight, and the depthwise convolutions between it and its readers: they stay as they are."""

    choice: Choice
    passed: frozenset[str]


def made_for_readers(site: Site, weight: np.ndarray, left_alone: Collection[str] = (), seed: int = 0) -> Made | None:
    """Return a better weight for a layer that makes channels; None where there is none, or the layer is not taken.

    `weight` is what least squares made of it. Layers `left_alone` are no readers: nobody will fit them.
    """
    ahead = site.ahead
    if ahead is None or not is_convolution(site.node) or not _can_be_drawn(ahead):
        return None
    found = _readers(site.node, left_alone)
    kept = _kept(found, ahead)
    if not len(kept) or not _is_small(site.node, found, len(kept)):
        return None
    drawing = Drawing(site.node, kept, ahead, np.random.default_rng(seed))
    bias = bias_of(site.node, len(weight))
    shift = site.moments.shift(site.moments.layout.matrix(weight.astype(np.float64)))
    start = np.concatenate([matrix(weight), (bias + shift)[:, None]], axis=1)[kept]
    filters = refitted_filters(start, [drawing.reader(end) for end in found])
    if filters is None:
        return None
    better = weight.copy()
    better[kept] = unmatrix(filters[:, :-1], weight.shape)
    shift[kept] = filters[:, -1] - bias[kept]
    passed = (link.node for end in found for link in end.links)
    return Made(Choice(better, shift=shift), frozenset(node.name or "" for node in passed if node.op_type == "Conv"))


def _can_be_drawn(ahead: Ahead) -> bool:
    """Say whether some images are held out and some are not, all of one size."""
    same = len({x.shape[1:] for x in ahead.x}) == 1
    return same and any(ahead.held_out) and not all(ahead.held_out)


def _readers(node: ir.Node, left_alone: Collection[str]) -> list[End]:
    """Return all that read what a layer makes; none where one of them is not to be had."""
    found = []
    for end in ends(node.outputs[0]):
        weight = None if end is None else end.reader.node.inputs[1]
        if end is None or weight is None or len(weight.uses()) > 1 or end.reader.node.name in left_alone:
            return []
        found.append(end)
    return found


def _kept(found: Sequence[End], ahead: Ahead) -> np.ndarray:
    """Return the channels that are left, the same for all readers; none where nothing is cut.

    The masked network has a product with a constant in front of each reader whose channels are cut.
    """
    masks = []
    for end in found:
        twin = ahead.twins.get(end.reader.node.name)
        source = None if twin is None or twin.inputs[0] is None else twin.inputs[0].producer()
        factors = None if source is None or source.op_type != "Mul" else source.inputs[1]
        if factors is None or factors.const_value is None:
            return np.zeros(0, int)
        masks.append(np.flatnonzero(factors.const_value.numpy().reshape(-1)))
    same = bool(masks) and all(np.array_equal(mask, masks[0]) for mask in masks)
    return masks[0] if same else np.zeros(0, int)


def _is_small(node: ir.Node, found: Sequence[End], kept: int) -> bool:
    own, *others = (math.prod(weight_of(n).shape[1:]) for n in (node, *(end.reader.node for end in found)))
    return max(own, *others) <= _WIDEST and own * kept <= _WEIGHTS
