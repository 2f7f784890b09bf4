"""Weights of linear operators: which may be changed, and how a vector over channels lies along them.

Algebra. With W as stored, and s over the output channels (t over the input channels)

    Conv           (out, in/group, k…)    s along axis 0; t along axis 1, other channels for each group of outputs
    ConvTranspose  (in, out/group, k…)    rows of group g make the outputs of group g: s is (in, out/group, 1…)
    Gemm           (in, out), or (out, in) if transB
    MatMul         (in, out)

Products are computed in float64 and stored in the weight's own type.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .constants import why_fixed

#: Types that hold a product well enough.
WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
#: Weights above this are multiplied when they are read: memory holds one of them at a time.
LAZY_BYTES = 1 << 24


class Stays(Exception):
    """What a rule would change may not be changed: the reason."""


def changeable(value: ir.Value | None) -> ir.TensorProtocol:
    """Return the tensor of a weight or bias that may be rewritten. Raises Stays if it may not."""
    if value is None or value.const_value is None:
        raise Stays(f"{value.name if value is not None else 'a weight'} is computed at run time")
    why = why_fixed(value)
    if why is not None:
        raise Stays(why)
    if value.const_value.dtype not in WIDE:
        raise Stays(f"{value.name} is {value.const_value.dtype}, which has too few bits for the product")
    return value.const_value


def float64(tensor: ir.TensorProtocol) -> np.ndarray:
    """Read a tensor; an external one through plain file calls, since mapped pages count as memory in use."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy().astype(np.float64)
    shape, dtype = tensor.shape.numpy(), tensor.dtype.numpy().newbyteorder("<")
    return np.fromfile(tensor.path, dtype, math.prod(shape), offset=tensor.offset or 0).reshape(shape).astype("f8")


def scale(value: ir.Value | None, factor: np.ndarray) -> None:
    """Multiply a weight by `factor`, which broadcasts to it; a large one only when it is read."""
    assert value is not None and value.const_value is not None
    tensor = value.const_value

    def product() -> ir.TensorProtocol:
        return ir.Tensor((float64(tensor) * factor).astype(tensor.dtype.numpy()), name=value.name)

    lazy = tensor.nbytes > LAZY_BYTES
    shape = ir.Shape(tensor.shape.numpy())
    value.const_value = ir.LazyTensor(product, tensor.dtype, shape, name=value.name) if lazy else product()


def set_constant(value: ir.Value, array: np.ndarray, dtype: ir.DataType) -> None:
    """Give an initializer another value, of any shape."""
    value.const_value = ir.Tensor(array.astype(dtype.numpy()), name=value.name)
    value.shape = ir.Shape(array.shape)


def along_axis(weight: ir.TensorProtocol, axis: int, s: np.ndarray) -> np.ndarray:
    """Return `s` in the shape that broadcasts along `axis` of `weight`. Raises Stays if the lengths differ."""
    shape = weight.shape.numpy()
    if axis >= len(shape) or shape[axis] != len(s):
        raise Stays(f"{len(s)} channels do not fit a weight of shape {list(shape)}")
    return s.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def along_inputs(conv: ir.Node, weight: ir.TensorProtocol, s: np.ndarray) -> np.ndarray:
    """Return `s`, over the input channels of a Conv, as (out, in/group, 1…). Raises Stays."""
    groups, (outputs, inputs, *kernel) = conv.attributes.get_int("group", 1), weight.shape.numpy()
    return _blocks(s, groups, outputs, inputs, len(kernel))


def _conv_outputs(node: ir.Node, weight: ir.TensorProtocol, s: np.ndarray) -> np.ndarray:
    del node
    return along_axis(weight, 0, s)


def _transposed_outputs(node: ir.Node, weight: ir.TensorProtocol, s: np.ndarray) -> np.ndarray:
    groups, (inputs, outputs, *kernel) = node.attributes.get_int("group", 1), weight.shape.numpy()
    return _blocks(s, groups, inputs, outputs, len(kernel))


def _gemm_outputs(node: ir.Node, weight: ir.TensorProtocol, s: np.ndarray) -> np.ndarray:
    return along_axis(weight, 0 if node.attributes.get_int("transB", 0) else 1, s)


def _blocks(s: np.ndarray, groups: int, rows: int, columns: int, rank: int) -> np.ndarray:
    """Return `s` as (rows, columns, 1…), where the rows of a group share the columns of that group."""
    if groups * columns != len(s) or rows % groups:
        raise Stays(f"{len(s)} channels in {groups} groups do not fit a weight of {rows} x {columns} channels")
    return np.repeat(s.reshape(groups, columns), rows // groups, axis=0).reshape(rows, columns, *[1] * rank)


#: Operator -> a vector over its output channels in the shape that broadcasts to its weight. They raise Stays.
ALONG_OUTPUTS: dict[str, Callable[[ir.Node, ir.TensorProtocol, np.ndarray], np.ndarray]] = {
    "Conv": _conv_outputs,
    "ConvTranspose": _transposed_outputs,
    "Gemm": _gemm_outputs,
}
