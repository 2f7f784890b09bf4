"""Small models for tests, written as text; weights are drawn from a seed by their declared shape.

`ZOO` has one model for each thing that a pass must cope with.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir


def model(text: str, weights: Mapping[str, np.ndarray] | None = None, *, opset: int = 17) -> ir.Model:
    """Parse a graph in ONNX's text form and fill its weights.

    What is declared before the body, `<float[4,3] w>`, and given no value there becomes an initializer: from
    `weights`, or random. Names with `var` in them are positive.
    """
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}'
    proto = onnx.parser.parse_model(text)
    made = {name for node in proto.graph.node for name in node.output}
    have = {tensor.name for tensor in proto.graph.initializer}
    infos = [info for info in proto.graph.value_info if info.name not in made | have]
    for info in infos:
        proto.graph.value_info.remove(info)
        given = (weights or {}).get(info.name)
        proto.graph.initializer.append(_tensor(info, given))
    return ir.from_proto(proto)


def _tensor(info: onnx.ValueInfoProto, given: np.ndarray | None) -> onnx.TensorProto:
    kind = info.type.tensor_type
    shape = [dim.dim_value for dim in kind.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    rng = np.random.default_rng(zlib.crc32(info.name.encode()))
    array = rng.uniform(0.5, 2.0, shape) if "var" in info.name else rng.standard_normal(shape)
    if given is not None:
        assert list(given.shape) == shape, info.name
        array = given
    return onnx.numpy_helper.from_array(array.astype(dtype), info.name)


NORM = "float[{0}] scale, float[{0}] bias, float[{0}] mean, float[{0}] var"

CONV_NORM_RELU = """
g (float[N,3,8,8] x) => (float[N,4,8,8] y)
<float[4,3,3,3] w, float[4] b, float[4] scale, float[4] bias, float[4] mean, float[4] var> {
    c = Conv <pads = [1,1,1,1]> (x, w, b)
    n = BatchNormalization (c, scale, bias, mean, var)
    y = Relu (n)
}
"""

RESIDUAL = """
g (float[N,4,6,6] x) => (float[N,5] y)
<float[4,4,3,3] w1, float[4] scale1, float[4] bias1, float[4] mean1, float[4] var1,
 float[4,1,3,3] w2, float[4] b2, float[4] scale2, float[4] bias2, float[4] mean2, float[4] var2,
 float[5,4] w3, float[5] b3> {
    c1 = Conv <pads = [1,1,1,1]> (x, w1)
    n1 = BatchNormalization (c1, scale1, bias1, mean1, var1)
    r1 = Relu (n1)
    c2 = Conv <pads = [1,1,1,1], group = 4> (r1, w2, b2)
    n2 = BatchNormalization (c2, scale2, bias2, mean2, var2)
    s = Add (n2, x)
    r2 = Relu (s)
    p = GlobalAveragePool (r2)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w3, b3)
}
"""

#: What torch exports: biases made at run time, and a view whose shape is computed.
CLUTTER = """
g (float[N,3,8,8] x) => (float[N,10] y)
<float[4,3,3,3] w, float[4] scale, float[4] bias, float[4] mean, float[4] var, float[10,256] w2, float[10] b2> {
    one = Constant <value_ints = [1]> ()
    zero = Constant <value = float {0.0}> ()
    len = Shape <start = 0, end = 1> (w)
    len1 = Expand (len, one)
    z = CastLike (zero, x)
    zeros = Expand (z, len1)
    c = Conv <pads = [1,1,1,1]> (x, w, zeros)
    n = BatchNormalization (c, scale, bias, mean, var)
    i = Identity (n)
    r = Relu (i)
    dims = Shape (r)
    first = Constant <value_int = 0> ()
    batch = Gather (dims, first)
    axis = Constant <value_ints = [0]> ()
    batch1 = Unsqueeze (batch, axis)
    rest = Constant <value_ints = [256]> ()
    shape = Concat <axis = 0> (batch1, rest)
    f = Reshape (r, shape)
    d, mask = Dropout (f)
    wt = Transpose <perm = [1,0]> (w2)
    m = MatMul (d, wt)
    unused = Exp (m)
    y = Add (m, b2)
}
"""

CONTROL_FLOW = """
g (float[2,3] x, bool c, int64 n) => (float[2,3] y, float[2,3] z) <float[2,3] w> {
    k = Constant <value = float {2.0}> ()
    y = If (c) <then_branch = yes () => (float[2,3] a) { k2 = Mul (k, k)
        a = Mul (x, k2) }, else_branch = no () => (float[2,3] b) { b0 = Identity (x)
        b = Add (b0, w) }>
    true = Constant <value = bool {1}> ()
    z = Loop (n, true, x) <body = turn (int64 i, bool go, float[2,3] v) => (bool more, float[2,3] next) {
        more = Identity (go)
        half = Constant <value = float {0.5}> ()
        next = Mul (v, half) }>
}
"""

CONSTANT_IF = """
g (float[N,1,3] x) => (float[N,3] y) {
    dims = Shape <start = 1, end = 2> (x)
    one = Constant <value_ints = [1]> ()
    c = Equal (dims, one)
    s = If (c) <then_branch = yes () => (float[N,3] a) { axes = Constant <value_ints = [1]> ()
        a = Squeeze (x, axes) }, else_branch = no () => (float[N,1,3] b) { b = Identity (x) }>
    y = Neg (s)
}
"""

FUNCTIONS = """<ir_version: 8, opset_import: ["" : 17, "here" : 1]>
g (float[N,3] x) => (float[N,3] y) {
    a = here.twice (x)
    y = here.twice (a)
}
<domain: "here", opset_import: ["" : 17]>
twice (v) => (w) {
    k = Constant <value = float {2.0}> ()
    w = Mul (v, k)
}
"""

OTHER_FUNCTION = FUNCTIONS.replace('"here", opset_import: ["" : 17]', '"here", opset_import: ["" : 16]')

FOREIGN = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[N,3] x) => (float[N,3] y) {
    k = Constant <value = float[3] {1.0, 2.0, 3.0}> ()
    e = com.microsoft.Gelu (k)
    a = com.microsoft.Gelu (x)
    i = Identity (a)
    y = Mul (i, e)
}
"""

SEQUENCES = """
g (float[N,4] x) => (float[N,2] y, seq(float[N,2]) s) {
    two = Constant <value_ints = [2, 2]> ()
    s = SplitToSequence <axis = 1> (x, two)
    last = Constant <value_int = -1> ()
    y0 = SequenceAt (s, last)
    y = Identity (y0)
}
"""

OPTIONALS = """
g (float[N,4] x) => (float[N,4] y, bool h) {
    o = Optional (x)
    h = OptionalHasElement (o)
    y = OptionalGetElement (o)
}
"""

RANDOM = """
g (float[N,3] x) => (float[N,3] y) {
    p = Constant <value = float[3] {0.5, 0.5, 0.5}> ()
    b = Bernoulli (p)
    n = RandomNormal <shape = [3]> ()
    k = Add (b, n)
    y = Add (x, k)
}
"""

OVERRIDABLE = """
g (float[N,3] x, float[3] k, int64[1] axes) => (float[N,3] y) <float[3] k = {1.0, 2.0, 3.0}, int64[1] axes = {0}> {
    e = Exp (k)
    a = Mul (x, e)
    u = Unsqueeze (a, axes)
    y = Squeeze (u, axes)
}
"""

IDENTITIES = """
g (float[N,3] x) => (float[N,3] a, float[N,3] b, float[N,3] same, float[3] k) {
    i = Identity (x)
    a = Relu (i)
    b = Identity (a)
    same = Identity (x)
    k = Constant <value = float[3] {1.0, 2.0, 3.0}> ()
}
"""

EMBEDDING = """
g (int64[N,5] ids) => (float[N,5,4] y, int64[N,5] next) <float[4,4] table> {
    one = Constant <value = int64 {1}> ()
    next = Add (ids, one)
    same = Cast <to = 7> (ids)
    y = Gather (table, same)
}
"""

QUANTIZED = """
g (float[N,4] x) => (float[N,5] y) <int8[4,5] w> {
    s = Constant <value = float {0.05}> ()
    z = Constant <value = int8 {0}> ()
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    wd = DequantizeLinear (w, s, z)
    y = MatMul (d, wd)
}
"""

#: A float layer that hands over to an integer kernel.
FLOAT_STEM = """
g (float[N,3,6,6] x) => (float[N,4,6,6] y)
<float[4,3,3,3] w, float[N,4,6,6] r, int8[4,4,1,1] v, float s = {0.05}, uint8 z = {10}, int8 zero = {0}> {
    c = Conv <pads = [1,1,1,1]> (x, w)
    r = Relu (c)
    q = QuantizeLinear (r, s, z)
    d = DequantizeLinear (q, s, z)
    e = DequantizeLinear (v, s, zero)
    y = Conv (d, e)
}
"""

OLD = """
g (float[N,3,1,4] x) => (float[N,6] y) <float[3] scale, float[3] bias, float[3] mean, float[3] var> {
    n = BatchNormalization (x, scale, bias, mean, var)
    s = Squeeze <axes = [2]> (n)
    a = Slice <axes = [2], ends = [2], starts = [0]> (s)
    p = Pad <pads = [0,0,0,0,0,0]> (a)
    d = Dropout <ratio = 0.3> (p)
    shape = Constant <value = int64[2] {-1, 6}> ()
    y = Reshape (d, shape)
}
"""

SHARED = """
g (float[N,3,6,6] x) => (float[N,3,6,6] y)
<float[3,3,1,1] w, float[3] scale, float[3] bias, float[3] mean, float[3] var> {
    c1 = Conv (x, w)
    n1 = BatchNormalization (c1, scale, bias, mean, var)
    c2 = Conv (n1, w)
    y = BatchNormalization (c2, scale, bias, mean, var)
}
"""

LONE_NORM = """
g (float[N,3,4] x) => (float[N,3,4] y) <float[3] scale, float[3] bias, float[3] mean, float[3] var> {
    r = Relu (x)
    y = BatchNormalization (r, scale, bias, mean, var)
}
"""

NORM_BEFORE_CONV = """
g (float[N,4,6,6] x) => (float[N,6,4,4] y)
<float[4] scale, float[4] bias, float[4] mean, float[4] var, float[6,2,3,3] w> {
    n = BatchNormalization (x, scale, bias, mean, var)
    y = Conv <group = 2> (n, w)
}
"""

#: Name -> (text, opset). The opset is ignored by texts that state their own.
_TEXTS: dict[str, tuple[str, int]] = {
    "conv-norm-relu": (CONV_NORM_RELU, 15),
    "conv-norm-relu-9": (CONV_NORM_RELU, 9),
    "residual": (RESIDUAL, 13),
    "residual-11": (RESIDUAL, 11),
    "clutter": (CLUTTER, 18),
    "control-flow": (CONTROL_FLOW, 17),
    "constant-if": (CONSTANT_IF, 17),
    "functions": (FUNCTIONS, 17),
    "function-of-another-opset": (OTHER_FUNCTION, 17),
    "foreign": (FOREIGN, 17),
    "sequences": (SEQUENCES, 17),
    "optionals": (OPTIONALS, 18),
    "random": (RANDOM, 17),
    "overridable": (OVERRIDABLE, 17),
    "identities": (IDENTITIES, 17),
    "embedding": (EMBEDDING, 17),
    "quantized": (QUANTIZED, 17),
    "float-stem": (FLOAT_STEM, 17),
    "old": (OLD, 9),
    "shared": (SHARED, 14),
    "lone-norm": (LONE_NORM, 15),
    "norm-before-conv": (NORM_BEFORE_CONV, 15),
}

ZOO: tuple[str, ...] = tuple(_TEXTS)

#: These give other outputs at each run.
NONDETERMINISTIC = frozenset({"random"})


def build(name: str) -> ir.Model:
    """Return a new copy of a model of the zoo."""
    text, opset = _TEXTS[name]
    return model(text, opset=opset)
