"""Which layers read what a convolution makes through steps of one channel each, and how these lie on the images.

    convolution -> Relu, Clip, MaxPool, Identity, depthwise convolutions -> convolutions of all channels

Anything else behind it (a residual sum, a Sigmoid, a Concat, an output of the model) is told as None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...passes.chains import Clip, Depthwise, MaxPool, Step, Taps
from ..fitting.layerwise import bias_of, is_layer
from ..fitting.layout import layout_of

#: As many numbers as an image has directions.
Two = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Link:
    """A node of a chain, and how it is laid on its input, with rows and columns of padding in front and behind."""

    node: ir.Node
    taps: Taps = Taps()
    before: Two = (0, 0)
    after: Two = (0, 0)

    def outputs(self, size: Two) -> Two:
        """Return the height and width of what it makes of an image."""
        rows, columns = (n + a + b for n, a, b in zip(size, self.before, self.after, strict=True))
        return self.taps.outputs((0, rows, columns))

    def step(self, kept: np.ndarray) -> Step:
        """Return it as a step of the channels `kept`."""
        if self.node.op_type == "MaxPool":
            return MaxPool(self.taps)
        if self.node.op_type == "Conv":
            weight = weight_of(self.node)
            taps = weight.reshape(len(weight), -1)[kept].T.astype(np.float32)
            return Depthwise(self.taps, taps, bias_of(self.node, len(weight))[kept].astype(np.float32))
        return Clip(*(_bounds(self.node) or (0.0, np.inf)))


@dataclass(frozen=True, eq=False)
class End:
    """A convolution that reads the channels, and the links up to it."""

    links: tuple[Link, ...]
    reader: Link


def ends(value: ir.Value, links: tuple[Link, ...] = ()) -> Iterator[End | None]:
    """Yield all that read a tensor through links; None for what is no convolution."""
    if value.is_graph_output() or not value.uses():
        yield None
        return
    for use in value.uses():
        link = link_of(use.node) if use.idx == 0 else None
        if link is None:
            yield None
        elif is_convolution(use.node):
            yield End(links, link)
        else:
            yield from ends(use.node.outputs[0], (*links, link))


def link_of(node: ir.Node) -> Link | None:
    """Return a node as a link; None where it is no step, and no convolution of all channels."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "MaxPool":
        return _pool(node)
    if node.op_type == "Conv":
        return _laid(node) if is_convolution(node) or _is_depthwise(node) else None
    return Link(node) if _bounds(node) is not None else None


def is_convolution(node: ir.Node) -> bool:
    """Say whether a node is a convolution of images, of all channels, that has a layout."""
    return _groups(node) == 1


def weight_of(node: ir.Node) -> np.ndarray:
    """Return a layer's weight."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def matrix(weight: np.ndarray) -> np.ndarray:
    """Return a convolution's weight as (out, taps * in)."""
    return weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)


def unmatrix(rows: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return (out, taps * in) in the shape of the weight, but for the number of outputs."""
    return rows.reshape(len(rows), *shape[2:], shape[1]).transpose(0, 3, 1, 2)


def _laid(node: ir.Node) -> Link:
    found = layout_of(node, weight_of(node).shape)
    assert not isinstance(found, str) and found.spatial is not None
    kernel, strides, dilations, pads = found.spatial
    return Link(node, Taps(_two(kernel), _two(strides), _two(dilations)), _two(pads[:2]), _two(pads[2:]))


def _pool(node: ir.Node) -> Link | None:
    attributes = node.attributes
    kernel = attributes.get_ints("kernel_shape", [])
    automatic = attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if len(kernel) != 2 or automatic or attributes.get_int("ceil_mode", 0) != 0 or len(node.outputs) > 1:
        return None
    strides, dilations = (_two(attributes.get_ints(name, [1, 1])) for name in ("strides", "dilations"))
    pads = attributes.get_ints("pads", [0, 0, 0, 0])
    return Link(node, Taps(_two(kernel), strides, dilations), _two(pads[:2]), _two(pads[2:]))


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return between what a node leaves its input; None where it does something else, or these are no constants."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type not in ("Identity", "Clip"):
        return None
    found = [-np.inf, np.inf]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            if value.const_value is None:
                return None
            found[i] = float(value.const_value.numpy())
    return found[0], found[1]


def _is_depthwise(node: ir.Node) -> bool:
    groups = _groups(node)
    return groups > 1 and weight_of(node).shape[:2] == (groups, 1)


def _groups(node: ir.Node) -> int:
    """Return in how many groups a convolution of images has its channels; 0 where it is none, or has no layout."""
    if node.op_type != "Conv" or not is_layer(node) or weight_of(node).ndim != 4:
        return 0
    found = layout_of(node, weight_of(node).shape)
    return 0 if isinstance(found, str) else found.groups


def _two(numbers: Sequence[int]) -> Two:
    return int(numbers[0]), int(numbers[1])
