"""Nodes whose result is known before the model runs, and nodes that do nothing.

Algebra. A node folds to a constant c where
  its inputs are constants        c = node(inputs), computed by ONNX Runtime, so that no bit changes
  it asks for a shape             Shape, Size, and Gather or Slice of a Shape, of dimensions that are all static
  it is a Constant                c is its attribute
A node does nothing, y = x, where NO_OPS says so of its operator. Nothing is assumed about values that callers can
override, about operators of other domains, or about random ones.

A constant may grow by GROWTH_BYTES, or to GROWTH_FACTOR times its inputs (what a Cast of float16 or int8 weights
needs); beyond that folding would trade a small file for a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from .constants import constant, small_array

GROWTH_BYTES, GROWTH_FACTOR = 1 << 18, 4
#: Above this many bytes of inputs a node is not computed here: the memory of a compile stays bounded.
INPUT_LIMIT = 1 << 28

#: Never computed: random results, and the pairs that say how a model is quantized.
_KEPT = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")
    + ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
)
#: Their output's size lies in their inputs' values, so it must be inferred before they are computed.
_GROWING = frozenset(("ConstantOfShape", "Expand", "EyeLike", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"))


# ------------------------------------------------------------------------------------------- constant results


def constant_attribute(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the value of a Constant node; None for other nodes, and for sparse or referenced values."""
    if node.op_type != "Constant" or len(node.attributes) != 1:
        return None
    name, attribute = next(iter(node.attributes.items()))
    if attribute.is_ref() or name == "sparse_value":
        return None
    return ir.convenience.get_const_tensor(node.outputs[0])


def static_dimensions(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the result of a node that asks for dimensions which are all static, else None."""
    asked = _asked(node)
    if asked is None or not all(isinstance(dim, int) for dim in np.ravel(asked)):
        return None
    return ir.tensor(np.asarray(asked).astype(np.int64))


def _asked(node: ir.Node) -> np.ndarray | None:
    """The dimensions that a node asks for, as an array of integers and names."""
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if node.op_type in ("Shape", "Size"):
        return _dimensions(node, source)
    producer = source.producer()
    if producer is None or producer.domain or producer.op_type != "Shape" or producer.inputs[0] is None:
        return None
    dims = _dimensions(producer, producer.inputs[0])
    if dims is None:
        return None
    if node.op_type == "Gather":
        index = small_array(node.inputs[1])
        inside = index is not None and bool(np.all((index >= -len(dims)) & (index < len(dims))))
        return np.asarray(dims[index], dtype=object) if inside else None
    if node.op_type == "Slice":
        starts, ends, axes, steps = slice_bounds(node)
        if starts is None or ends is None or len(starts) != 1 or steps is None or list(axes or [0]) != [0]:
            return None
        return dims[starts[0] : ends[0] : steps[0]] if steps[0] > 0 else None
    return None


def _dimensions(node: ir.Node, source: ir.Value) -> np.ndarray | None:
    if source.shape is None:
        return None
    dims = np.array(list(source.shape), dtype=object)
    if node.op_type == "Size":
        return np.array(math.prod(dims) if source.shape.is_static() else None, dtype=object)
    end = node.attributes["end"].as_int() if "end" in node.attributes else None
    return dims[node.attributes.get_int("start", 0) : end]


def is_constant(node: ir.Node) -> bool:
    """Whether all that goes into `node` is constant, and its result may be a constant too."""
    if node.domain or node.op_type in _KEPT or not any(node.inputs):
        return False
    if any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
        return False
    constants = all(constant(value) is not None for value in node.inputs if value is not None)
    return constants and not any(value.is_graph_output() for value in node.outputs)


def why_too_large(node: ir.Node) -> str | None:
    """Say why a node of constants is left for run time; None if it is small enough to be computed now."""
    tensors = (constant(value) for value in node.inputs)
    given = sum(t.nbytes for t in tensors if t is not None and t.dtype != ir.DataType.STRING)
    if given > INPUT_LIMIT:
        return f"its inputs are constants of {given >> 20} MB"
    sizes = [_nbytes(value) for value in node.outputs if value.name]
    if None in sizes:
        return "the size of its constant result is unknown" if node.op_type in _GROWING else None
    made = sum(size or 0 for size in sizes)
    limit = max(GROWTH_FACTOR * given, GROWTH_BYTES)
    return f"its constant result would take {made >> 10} kB" if made > limit else None


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _nbytes(value: ir.Value) -> int | None:
    if value.dtype in (None, ir.DataType.STRING) or value.shape is None or not value.shape.is_static():
        return None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


def compute(node: ir.Node, model: ir.Model) -> list[ir.TensorProtocol] | None:
    """Return the outputs of a node whose inputs are constants; None where ONNX Runtime cannot give them."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    inputs = {value.name: constant(value) for value in node.inputs if value is not None}
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node)],
        "constants",
        [],
        [onnx.ValueInfoProto(name=value.name) for value in node.outputs if value.name],
        [_serialized(name or "", tensor) for name, tensor in inputs.items() if tensor is not None],
    )
    imports = [onnx.helper.make_opsetid("", model.opset_imports[""])]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=max(4, model.ir_version))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what cannot be computed stays as it is: nobody needs to be told
    model_faults = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented)
    # RuntimeError: a type that its Python interface cannot hand over, such as bfloat16
    unable = (*model_faults, state.RuntimeException, RuntimeError)
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results = session.run(None, {})
    except unable:
        return None
    if not all(isinstance(result, np.ndarray) and result.dtype.kind in "fiub" for result in results):
        return None
    return [ir.tensor(result) for result in results]


def _serialized(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.Tensor(tensor.numpy(), dtype=tensor.dtype)
    proto = ir.serde.serialize_tensor(tensor)
    proto.name = name
    return proto


# ------------------------------------------------------------------------------------------- nodes that do nothing


def does_nothing(node: ir.Node, opset: int) -> bool:
    """Whether the first output of `node` always equals its first input."""
    test = None if node.domain else NO_OPS.get(node.op_type)
    return test is not None and node.inputs[0] is not None and test(node, opset)


def ints(node: ir.Node, index: int, attribute: str) -> list[int] | None:
    """Return integers that are an attribute in older opsets and a constant input in newer ones; None if neither."""
    if attribute in node.attributes:
        return list(node.attributes[attribute].as_ints())
    array = small_array(node.inputs[index]) if index < len(node.inputs) else None
    return None if array is None else [int(number) for number in array.ravel()]


def slice_bounds(
    node: ir.Node,
) -> tuple[list[int] | None, list[int] | None, list[int] | None, list[int] | None]:
    """Return the starts, ends, axes and steps of a Slice: None where unknown, and for axes also where absent."""
    starts, ends = ints(node, 1, "starts"), ints(node, 2, "ends")
    has_steps = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = ints(node, 4, "steps") if has_steps else [1] * len(starts or ())
    return starts, ends, ints(node, 3, "axes"), steps


def _same_type(node: ir.Node, opset: int) -> bool:
    del opset
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    if node.op_type == "CastLike":
        target = node.inputs[1].dtype if node.inputs[1] is not None else None
        return source is not None and source == target
    return source is not None and source.value == node.attributes["to"].as_int()


def _same_elements(node: ir.Node, opset: int) -> bool:
    """A reordering of nothing: equal dimensions, of which one may be dynamic, since the number of elements stays."""
    del opset
    x, y = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or y.shape is None or y.is_graph_output() or len(x.shape) != len(y.shape):
        return False
    pairs = [(a, b) for a, b in zip(x.shape, y.shape, strict=True) if not (isinstance(a, int) and a == b)]
    dynamic = all(not isinstance(dim, int) for pair in pairs for dim in pair)
    return len(pairs) <= 1 and dynamic and 0 not in list(x.shape)


def _expands_nothing(node: ir.Node, opset: int) -> bool:
    del opset
    x, target = node.inputs[0], ints(node, 1, "shape")
    if x is None or x.shape is None or target is None or len(target) > len(x.shape):
        return False
    return all(new == 1 or new == old for new, old in zip(reversed(target), reversed(list(x.shape)), strict=False))


def _keeps_order(node: ir.Node, opset: int) -> bool:
    del opset
    perm = ints(node, len(node.inputs), "perm")
    return perm is not None and perm == sorted(perm)


def _pads_nothing(node: ir.Node, opset: int) -> bool:
    del opset
    pads = ints(node, 1, "pads")
    return pads is not None and not any(pads)


def _slices_everything(node: ir.Node, opset: int) -> bool:
    del opset
    starts, ends, _, steps = slice_bounds(node)
    if starts is None or ends is None or steps is None:
        return False
    return not any(starts) and all(end >= np.iinfo(np.int32).max for end in ends) and set(steps) <= {1}


def _drops_nothing(node: ir.Node, opset: int) -> bool:
    """Dropout at inference: from opset 12 the third input says whether it trains, before that it never does here."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return False
    if opset < 12 or len(node.inputs) < 3 or node.inputs[2] is None:
        return opset >= 7
    training = small_array(node.inputs[2])
    return training is not None and not training.any()


def _one_input(node: ir.Node, opset: int) -> bool:
    del opset
    return len(node.inputs) == 1


def _always(node: ir.Node, opset: int) -> bool:
    del node, opset
    return True


#: Operator -> when its first output is its first input, unchanged.
NO_OPS: dict[str, Callable[[ir.Node, int], bool]] = {
    "Identity": _always,
    "Dropout": _drops_nothing,
    "Cast": _same_type,
    "CastLike": _same_type,
    "Reshape": _same_elements,
    "Flatten": _same_elements,
    "Expand": _expands_nothing,
    "Transpose": _keeps_order,
    "Pad": _pads_nothing,
    "Slice": _slices_everything,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _one_input),
}
