"""Bias correction without images: the mean error of each layer from BatchNormalization's statistics.

A layer with weights W, stored as W', reads x and gives W' x + b' where W x + b was meant. Its mean error in output
channel o is known as soon as the mean of x is (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization
and Bias Correction", section 4.2.1; channel_moments.py has the mean):

    shift_o = E[(W x)_o] - E[(W' x)_o] = sum over inputs i and kernel places k of (W - W')[o, i, k] p_k E[x_i]

p_k: the share of output positions at which place k of the kernel lies on the image, and not on its padding, which is
0; it is 1 where the sizes are not known. What rounding the layer's input does to its mean is left out, as there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...passes.bias import takes_shift
from ..fitting.layerwise import is_layer
from .channel_moments import Moments, of_batch_norms, propagate
from .constant_values import evaluate, from_constants

if TYPE_CHECKING:
    import onnx_ir as ir

    from .quantizer import Quantizer


def corrected(quantizer: Quantizer, original: ir.Model) -> Quantizer:
    """Return the quantizer with the biases corrected that `original`'s BatchNormalizations tell enough about.

    `original` is what the quantizer's model was made from by exact passes, BatchNormalizations not yet folded, its
    tensors with the names that they have there.
    """
    moments = propagate(quantizer.model, of_batch_norms(original))
    built = replace(quantizer, scheme=replace(quantizer.scheme, nhwc_kernels=False), bias_shift={}).build().model
    return replace(quantizer, bias_shift=shifts(quantizer.model, built, moments))


def shifts(model: ir.Model, quantized: ir.Model, moments: Mapping[str, Moments]) -> dict[str, np.ndarray]:
    """Return what to add to each layer's output (float64, one number per channel) by node name.

    Left out are layers whose input's mean is not among the `moments`, whose weights are as they were, and transposed
    convolutions.
    """
    twins = {node.name: node for node in quantized.graph}
    pairs = []
    for node in model.graph:
        twin = twins.get(node.name)
        if twin is not None and twin.op_type == node.op_type and _is_known(node):
            x, weight = node.inputs[0], twin.inputs[1]
            assert x is not None and weight is not None
            known = moments.get(x.name or "")
            if known is not None and not weight.is_initializer() and from_constants(weight):
                pairs.append((node, twin, known.mean))
    stored = evaluate(quantized, [twin.inputs[1] for _, twin, _ in pairs if twin.inputs[1] is not None])
    found = {}
    for node, twin, mean in pairs:
        ours, theirs = node.inputs[1], twin.inputs[1]
        assert ours is not None and ours.const_value is not None and theirs is not None
        error = _by_output(node, ours.const_value.numpy()) - _by_output(twin, stored[theirs.name or ""])
        shift = _mean_output(node, error, mean)
        if shift is not None:
            found[node.name or ""] = shift
    return found


def _is_known(node: ir.Node) -> bool:
    """Say whether the mean of what a node gives follows from that of its input, and can be shifted."""
    return is_layer(node) and takes_shift(node) and node.op_type != "ConvTranspose"


def _by_output(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """Return a weight in float64 as (outputs, inputs, kernel places…)."""
    straight = node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0)
    return (weight if straight else weight.T).astype(np.float64)


def _mean_output(node: ir.Node, weight: np.ndarray, mean: np.ndarray) -> np.ndarray | None:
    """Return the mean of what this weight (outputs, inputs of a group, kernel places…) makes of such an input."""
    if node.op_type == "Conv":
        weight = (weight * _coverage(node, weight.shape[2:])).sum(axis=tuple(range(2, weight.ndim)))
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    if len(mean) != groups * weight.shape[1]:
        return None
    grouped = weight.reshape(groups, -1, weight.shape[1])
    return np.asarray(np.einsum("goi,gi->go", grouped, mean.reshape(groups, -1))).reshape(-1)


def _coverage(node: ir.Node, kernel: tuple[int, ...]) -> np.ndarray:
    """Return p_k, of the kernel's shape."""
    ones = np.ones(kernel)
    shape, rank = node.inputs[0].shape if node.inputs[0] is not None else None, len(kernel)
    sizes = [] if shape is None else [n for n in shape[2:] if isinstance(n, int)]
    if len(sizes) != rank:
        return ones
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return ones
    pads = node.attributes.get_ints("pads", [0] * 2 * rank)
    steps, dilations = (node.attributes.get_ints(name, [1] * rank) for name in ("strides", "dilations"))
    shares = []
    for i, (size, places) in enumerate(zip(sizes, kernel, strict=True)):
        last = size + pads[i] + pads[rank + i] - (places - 1) * dilations[i]  # behind the kernel's last start
        at = np.arange(0, last, steps[i])[:, None] + np.arange(places) * dilations[i] - pads[i]
        shares.append(((at >= 0) & (at < size)).mean(axis=0))
    return functools.reduce(np.multiply.outer, shares)
