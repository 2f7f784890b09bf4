"""Where Q/DQ stands: one small model a rule, and what it becomes, written down.

In a sketch `x~` is the tensor x read through QuantizeLinear and DequantizeLinear; `x` alone is the float tensor. A
tensor that exists as integers only has no plain name in any line.
"""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgec.backends import base as backends
from edgec.backends import ort, tensorrt, tvm
from edgec.compiler import devices
from edgec.compiler.types import Range
from edgec.passes.normalise import Normalise
from edgec.passes.placement import observed_tensors, place
from edgec.passes.placement_lint import lint
from edgec.passes.quantize import Quantize

X86, ARM = (next(s for needed, s in ort.SCHEMES if feature in needed) for feature in ("avx512_vnni", "neon"))
ORT, TRT = (ort.SUPPORTS, X86), (tensorrt.SUPPORTS, tensorrt.INT8)


def parse(text: str, opset: int = 13) -> ir.Model:
    proto = ir.to_proto(zoo.model(text, opset=opset))
    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def quantized(text: str, backend, ranges=None, keep=None, attention=()):
    """Return the model and what the pass said; tensors without a given range have [-1, 1]."""
    supports, scheme = backend
    model = parse(text)
    supports = (*supports, *attention)
    found = {name: Range(-1.0, 1.0) for name in observed_tensors(model, supports)} | (ranges or {})
    result = Quantize(found, supports, scheme, keep_float=keep or {})(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model, result


def sketch(model: ir.Model) -> str:
    lines = []
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            inputs = [_name(v) for v in node.inputs if v is not None and not _is_number(v)]
            outputs = [_stem(v) for v in node.outputs]
            lines.append(f"{', '.join(outputs)} = {node.op_type}({', '.join(inputs)})")
    return "\n".join(lines)


def _name(value: ir.Value) -> str:
    node, mark = value.producer(), ""
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        value, mark = node.inputs[0], "~"
        node = value.producer()
    return _stem(value) + (mark or "~" * (value.dtype in (ir.DataType.UINT8, ir.DataType.INT8)))


def _stem(value: ir.Value) -> str:
    return (
        value.name.removesuffix("_quantized").removesuffix("_float").replace("w1_bias", "b1").replace("w2_bias", "b2")
    )


def _is_number(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == ir.DataType.INT64


def check(expected: str, text: str, backend, **options):
    model, result = quantized(text, backend, **options)
    assert sorted(sketch(model).split("\n")) == sorted(line.strip() for line in expected.strip().split("\n"))
    if backend is TRT:
        assert lint(model) == ()
    return model, result


RESIDUAL = """g (float[N,16,6,6] x) => (float[N,16,6,6] y)
<float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[16,16,1,1] w3> {
    a = Conv <pads = [1,1,1,1]> (x, w1, b1)
    ra = Relu (a)
    b = Conv <pads = [1,1,1,1]> (ra, w2, b2)
    s = Add (b, ra)
    rs = Relu (s)
    y = Conv (rs, w3)
}"""

# ------------------------------------------------------------------------------------------ onnx runtime


def test_kernels_stand_between_integers():
    """Every layer and the Add give integers; the Relus behind them are rounding."""
    expected = """
        a = Conv(x~, w1~, b1~)
        ra = Relu(a)
        b = Conv(ra~, w2~, b2~)
        s = Add(b~, ra~)
        rs = Relu(s)
        y = Conv(rs~, w3~)"""
    check(expected, RESIDUAL, ORT)


@pytest.mark.parametrize(("scheme", "dtype"), [(X86, "UINT8"), (ARM, "INT8")])
def test_activations_have_the_type_of_the_cpu(scheme, dtype):
    model, _ = quantized(RESIDUAL, (ort.SUPPORTS, scheme))
    types = {n.outputs[0].dtype.name for n in model.graph if n.op_type == "QuantizeLinear"}
    assert types == {dtype}


HEAD = """g (float[N,16,6,6] x) => (float[N,36,32] y)
<float[16,16,1,1] w1, float[16,16,1,1] w2, int64[3] shape = {0, -1, 32}> {
    boxes = Conv (x, w1)
    scores = Conv (x, w2)
    joined = Concat <axis = 1> (boxes, scores)
    y = Reshape (joined, shape)
}"""


def test_a_detection_head_keeps_its_parts_apart():
    """Both parts have scales of their own, and what joins them is float: boxes to 100 would wipe out scores to 1."""
    expected = """
        boxes = Conv(x~, w1~)
        scores = Conv(x~, w2~)
        joined = Concat(boxes~, scores~)
        y = Reshape(joined)"""
    _, result = check(expected, HEAD, ORT, ranges={"boxes": Range(-5.0, 100.0)})
    (told,) = result.refusals
    assert (told.node, told.rule) == ("Concat_2", "concat-of-different-ranges") and "factor of 100" in told.why
    assert quantized(HEAD, ORT)[1].refusals == ()


MIDDLE = """g (float[N,16,6,6] x) => (float[N,16,6,6] y)
<float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,32,1,1] w3> {
    a = Conv (x, w1)
    b = Conv (x, w2)
    c = Concat <axis = 1> (a, b)
    y = Conv (c, w3)
}"""


def test_a_concat_in_the_middle_takes_each_input_with_its_own_scale():
    expected = """
        a = Conv(x~, w1~)
        b = Conv(x~, w2~)
        c = Concat(a~, b~)
        y = Conv(c~, w3~)"""
    model, result = check(expected, MIDDLE, ORT, ranges={"a": Range(-5.0, 100.0)})
    assert result.refusals == ()
    scales = {n.inputs[0].producer().inputs[0].name: float(n.inputs[1].const_value.numpy())
              for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].producer()}  # fmt: skip
    assert scales["a"] > 40 * scales["b"]


def test_a_concat_that_also_leaves_the_network_is_kept_apart_too():
    text = MIDDLE.replace("(float[N,16,6,6] y)", "(float[N,16,6,6] y, float[N,32,6,6] c)")
    _, result = quantized(text, ORT, ranges={"a": Range(-5.0, 100.0)})
    assert [r.rule for r in result.refusals] == ["concat-of-different-ranges"]


def test_what_no_layer_reads_stays_float():
    text = """g (float[N,16,6,6] x) => (float[N,96,6] y) <float[16,16,1,1] w1, int64[3] shape = {0, 96, 6}> {
        a = Conv (x, w1)
        s = Add (a, x)
        y = Reshape (s, shape) }"""
    model, _ = quantized(text, ORT)
    assert "s = Add(a~, x)" in sketch(model) and "y = Reshape(s)" in sketch(model)


GELU = """g (float[N,16,6,6] x) => (float[N,16,6,6] y) 
<float[16,16,1,1] w1, float[16,16,1,1] w2, float root = {1.4142135}, float one = {1.0}, float half = {0.5}> {
    a = Conv (x, w1)
    d = Div (a, root)
    e = Erf (d)
    p = Add (e, one)
    m = Mul (a, p)
    g = Mul (m, half)
    y = Conv (g, w2)
}"""


def test_gelu_stays_float_inside():
    model, _ = quantized(GELU, ORT)
    assert {"d = Div(a~, root)", "p = Add(e, one)", "m = Mul(a~, p)", "g = Mul(m, half)", "y = Conv(g~, w2~)"} <= set(
        sketch(model).split("\n")
    )


NORM = """g (float[N,8,16] x) => (float[N,8,16] y)
<float[16] gamma, float[16] beta, float[16,16] w1, float[16] eps_var, float[16,16] w2> {
    h = MatMul (x, w1)
    mean = ReduceMean <axes = [-1]> (h)
    d = Sub (h, mean)
    sq = Mul (d, d)
    variance = ReduceMean <axes = [-1]> (sq)
    v = Add (variance, eps_var)
    sd = Sqrt (v)
    n = Div (d, sd)
    g = Mul (n, gamma)
    o = Add (g, beta)
    y = MatMul (o, w2)
}"""


@pytest.mark.parametrize("backend", [ORT, TRT])
def test_layer_normalisation_stays_float_inside(backend):
    model, _ = quantized(NORM, backend)
    lines = sketch(model).split("\n")
    assert {
        "h = MatMul(x~, w1~)",
        "d = Sub(h, mean)",
        "sq = Mul(d, d)",
        "n = Div(d, sd)",
        "y = MatMul(o~, w2~)",
    } <= set(lines)


ATTENTION = """
g (float[N,4,32,16] q, float[N,4,32,16] k, float[N,4,32,16] v, float[N,1,32,32] mask) => (float[N,4,32,16] y)
<float four = {4.0}> {
    kt = Transpose <perm = [0,1,3,2]> (k)
    scores = MatMul (q, kt)
    scaled = Div (scores, four)
    masked = Add (scaled, mask)
    p = Softmax <axis = -1> (masked)
    y = MatMul (p, v)
}"""


def test_attention_stays_float_unless_asked():
    model, result = quantized(ATTENTION, ORT)
    assert not result.modified and "~" not in sketch(model)


def test_attention_as_asked_rounds_the_factors_only():
    model, _ = quantized(ATTENTION, ORT, attention=ort.ATTENTION)
    assert {
        "scores = MatMul(q~, kt~)",
        "masked = Add(scaled, mask)",
        "p = Softmax(masked)",
        "y = MatMul(p~, v~)",
    } <= set(sketch(model).split("\n"))


def test_tensorrt_leaves_scores_with_a_mask_in_float():
    model, _ = quantized(ATTENTION, TRT, attention=tensorrt.ATTENTION)
    assert {"scores = MatMul(q, kt)", "y = MatMul(p~, v~)"} <= set(sketch(model).split("\n"))


@pytest.mark.parametrize(("length", "taken"), [(512, True), (513, False)])
def test_tensorrt_leaves_long_sequences_in_float(length, taken):
    text = ATTENTION.replace("32,16]", f"{length},16]").replace("32,32]", f"{length},{length}]")
    model, _ = quantized(text, TRT, attention=tensorrt.ATTENTION)
    assert ("y = MatMul(p~, v~)" in sketch(model)) == taken


def test_scaling_in_front_of_a_softmax_stays_float():
    """The scores come out of a Conv, as integers; the product that only serves the Softmax is float all the same."""
    text = """g (float[N,16,6,6] x) => (float[N,16,6,6] y) <float[16,16,1,1] w1, float[16,16,1,1] w2> {
        a = Conv (x, w1)
        m = Mul (a, x)
        p = Softmax <axis = 1> (m)
        y = Conv (p, w2) }"""
    model, _ = quantized(text, ORT)
    assert "m = Mul(a~, x)" in sketch(model)


# ------------------------------------------------------------------------------------------ tensorrt


def test_the_skip_branch_alone_is_dequantized():
    """The Conv in front of the Add fuses with it; biases are float, nothing stands behind a layer."""
    expected = """
        a = Conv(x~, w1~, b1)
        ra = Relu(a)
        b = Conv(ra~, w2~, b2)
        s = Add(b, ra~)
        rs = Relu(s)
        y = Conv(rs~, w3~)"""
    model, _ = check(expected, RESIDUAL, TRT)
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2].const_value
            assert zero.dtype == ir.DataType.INT8 and not zero.numpy().any()
            assert zero.shape == node.inputs[1].const_value.shape


def test_the_longer_of_two_branches_with_layers_is_the_residual():
    """A projection shortcut is the skip, whichever input of the Add it is."""
    text = """g (float[N,16,6,6] x) => (float[N,16,6,6] y)
    <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,16,1,1] w3, float[16,16,1,1] w4> {
        s = Conv (x, w3)
        a = Conv (x, w1)
        ra = Relu (a)
        b = Conv (ra, w2)
        t = Add (INPUTS)
        r = Relu (t)
        y = Conv (r, w4) }"""
    for inputs, line in (("s, b", "t = Add(s~, b)"), ("b, s", "t = Add(b, s~)")):
        model, _ = quantized(text.replace("INPUTS", inputs), TRT)
        assert line in sketch(model) and lint(model) == ()


def test_an_add_without_a_layer_in_front_is_left_alone():
    text = """g (float[N,16,6,6] x) => (float[N,16,6,6] y) <float[16,16,1,1] w1> {
        a = Relu (x)
        b = Sigmoid (x)
        s = Add (a, b)
        y = Conv (s, w1) }"""
    check("a = Relu(x)\nb = Sigmoid(x)\ns = Add(a, b)\ny = Conv(s~, w1~)", text, TRT)


def test_an_add_that_no_layer_reads_or_that_is_an_output_is_left_alone():
    text = """g (float[N,16,6,6] x) => (float[N,16,6,6] y) <float[16,16,1,1] w1> {
        a = Conv (x, w1)
        y = Add (a, x) }"""
    check("a = Conv(x~, w1~)\ny = Add(a, x)", text, TRT)


def test_silu_fuses_with_its_layer():
    """Conv, Sigmoid, Mul and the residual Add are one kernel: no pair between them."""
    text = """g (float[N,16,6,6] x) => (float[N,16,6,6] y) <float[16,16,1,1] w1, float[16,16,1,1] w2> {
        a = Conv (x, w1)
        g = Sigmoid (a)
        m = Mul (a, g)
        s = Add (x, m)
        y = Conv (s, w2) }"""
    check("a = Conv(x~, w1~)\ng = Sigmoid(a)\nm = Mul(a, g)\ns = Add(x~, m)\ny = Conv(s~, w2~)", text, TRT)


def test_nothing_stands_between_a_layer_and_its_normalisation():
    text = """g (float[N,16,6,6] x) => (float[N,16,6,6] y)
    <float[16,16,1,1] w1, float[16] scale, float[16] bias, float[16] mean, float[16] var, float[16,16,1,1] w2> {
        a = Conv (x, w1)
        n = BatchNormalization (a, scale, bias, mean, var)
        r = Relu (n)
        y = Conv (r, w2) }"""
    expected = "a = Conv(x~, w1~)\nn = BatchNormalization(a, scale, bias, mean, var)\nr = Relu(n)\ny = Conv(r~, w2~)"
    check(expected, text, TRT)


def test_one_scale_around_a_concat():
    """What the Concat joins is read by layers of its own too: all of it, and the result, get the union's scale."""
    text = """g (float[N,16,6,6] x) => (float[N,16,6,6] y, float[N,16,6,6] z)
    <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,32,1,1] w3, float[16,16,1,1] w4> {
        a = Conv (x, w1)
        b = Conv (x, w2)
        p = MaxPool <kernel_shape = [1,1]> (a)
        c = Concat <axis = 1> (p, b)
        y = Conv (c, w3)
        z = Conv (a, w4) }"""
    ranges = {"a": Range(-1.0, 2.0), "b": Range(-3.0, 0.5), "c": Range(-3.0, 1.9), "x": Range(-7.0, 0.0)}
    model, _ = quantized(text, TRT, ranges=ranges)
    assert {"c = Concat(p, b)", "y = Conv(c~, w3~)", "z = Conv(a~, w4~)"} <= set(sketch(model).split("\n"))
    scales = {n.inputs[0].name: float(n.inputs[1].const_value.numpy())
              for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[1].const_value.size == 1}  # fmt: skip
    assert scales["a"] == scales["c"] == np.float32(3 / 127) and scales["x"] == np.float32(7 / 127)
    assert lint(model) == ()


def test_a_tail_of_different_ranges_is_told_for_tensorrt_too():
    model, result = quantized(HEAD, TRT, ranges={"boxes": Range(-5.0, 100.0)})
    assert "joined = Concat(boxes, scores)" in sketch(model)
    assert [r.rule for r in result.refusals] == ["concat-of-different-ranges"]


@pytest.mark.parametrize("columns", [16, 10])
def test_a_pool_is_quantized_where_a_layer_reads_it(columns):
    """With 10 columns the Gemm stays float (TensorRT's kernels want 16), and so does the pool in front of it."""
    text = f"""g (float[N,16,6,6] x) => (float[N,{columns}] y) <float[16,16,1,1] w1, float[{columns},16] w2> {{
        a = Conv (x, w1)
        p = GlobalAveragePool (a)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w2) }}"""
    mark = "~" if columns == 16 else ""
    expected = f"a = Conv(x~, w1~)\np = GlobalAveragePool(a{mark})\nf = Flatten(p)\ny = Gemm(f{mark}, w2{mark})"
    check(expected, text, TRT)


def test_upsampling_behind_a_layer_reads_integers():
    text = """g (float[N,16,6,6] x) => (float[N,16,12,12] y)
    <float[16,16,1,1] w1, float[16,16,1,1] w2, float[4] scales = {1, 1, 2, 2}> {
        a = Conv (x, w1)
        r = Relu (a)
        u = Resize <mode = "linear"> (r, , scales)
        y = Conv (u, w2) }"""
    check("a = Conv(x~, w1~)\nr = Relu(a)\nu = Resize(r~, scales)\ny = Conv(u~, w2~)", text, TRT)


@pytest.mark.parametrize("second", ["z = Conv (r, w2)", "z = Relu (r)"])
def test_upsampling_reads_integers_whoever_else_reads_what_it_reads(second):
    """The neck of a detector: what is upsampled is also joined, or convolved, further down; or it is an output."""
    text = f"""g (float[N,16,6,6] x) => (float[N,16,12,12] y, float[N,16,6,6] z)
    <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,16,1,1] w3, float[4] scales = {{1, 1, 2, 2}}> {{
        a = Conv (x, w1)
        r = Relu (a)
        {second}
        u = Resize <mode = "nearest"> (r, , scales)
        y = Conv (u, w3) }}"""
    model, _ = quantized(text, TRT)
    assert "u = Resize(r~, scales)" in sketch(model) and lint(model) == ()


def test_upsampling_behind_data_movement_reads_integers():
    """A Concat of what layers give, as at the end of a ShuffleNet stage; not what comes from an input or an Exp."""
    text = """g (float[N,16,6,6] x) => (float[N,16,12,12] y, float[N,16,12,12] z)
    <float[16,16,1,1] w1, float[16,32,1,1] w2, float[16,16,1,1] w3, float[4] scales = {1, 1, 2, 2}> {
        a = Conv (x, w1)
        c = Concat <axis = 1> (a, x)
        u = Resize <mode = "nearest"> (c, , scales)
        y = Conv (u, w2)
        e = Exp (a)
        v = Resize <mode = "nearest"> (e, , scales)
        z = Conv (v, w3) }"""
    model, _ = quantized(text, TRT)
    assert {"u = Resize(c~, scales)", "v = Resize(e, scales)"} <= set(sketch(model).split("\n"))
    assert lint(model) == ()


def test_a_concat_reads_the_pairs_that_are_there():
    """Through data movement, too; what has no pair of its own is joined as it is, and rounded behind."""
    text = """g (float[2,16,6,6] x) => (float[2,16,6,6] y, float[2,16,6,6] z)
    <float[16,16,1,1] w1, float[16,16,1,1] w2, float[16,32,1,1] w3, float[16,16,1,1] w4, int64[4] s = {2, 32, 6, 6}> {
        a = Conv (x, w1)
        b = Conv (x, w2)
        c = Concat <axis = 1> (a, b)
        r = Reshape (c, s)
        y = Conv (r, w3)
        z = Conv (a, w4) }"""
    model, _ = quantized(text, TRT, ranges={"a": Range(-1.0, 2.0), "r": Range(-3.0, 1.9)})
    assert {"c = Concat(a~, b)", "y = Conv(r~, w3~)", "z = Conv(a~, w4~)"} <= set(sketch(model).split("\n"))
    scales = {n.inputs[0].name: float(n.inputs[1].const_value.numpy())
              for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[1].const_value.size == 1}  # fmt: skip
    assert scales["a"] == scales["r"] == np.float32(3 / 127)
    assert lint(model) == ()


@pytest.mark.parametrize(
    ("shape", "group", "first", "taken"),
    [
        ((16, 16, 1, 1), 1, False, True),
        ((16, 3, 3, 3), 1, True, True),  # the first layer, 16 outputs
        ((8, 3, 3, 3), 1, True, True),
        ((12, 3, 3, 3), 1, True, False),  # neither side is a multiple of 8
        ((8, 8, 3, 3), 1, False, False),  # not the first one, and both sides are small
        ((16, 8, 3, 3), 1, False, True),
        ((16, 8, 1, 3), 1, False, False),  # not square
        ((24, 1, 3, 3), 24, False, True),  # depthwise
        ((24, 1, 1, 3), 24, False, False),
        ((20, 1, 3, 3), 20, False, False),
    ],
)
def test_tensorrt_convolutions_too_small_for_integers(shape, group, first, taken):
    outputs, inputs, height, width = shape
    relu = "" if first else "i = Relu (x)"
    text = f"""g (float[N,{inputs * group},6,6] x) => (float[N,{outputs},H,W] y)
    <float[{outputs},{inputs},{height},{width}] w> {{ {relu}
        y = Conv <group = {group}> ({"x" if first else "i"}, w) }}"""
    _, result = quantized(text.replace("H,W", f"{7 - height},{7 - width}"), TRT)
    assert result.modified == taken
    assert [r.rule for r in result.refusals] == ([] if taken else ["enough-channels"])


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "taken"),
    [
        ("N", 32, 32, True),
        (4, 32, 32, True),
        (1, 32, 32, False),
        ("N", 8, 32, False),
        ("N", 32, 1, False),
        ("N", 32, 10, False),
    ],
)
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_tensorrt_products_too_small_for_integers(op, rows, inner, columns, taken):
    text = (
        f"g (float[{rows},{inner}] x) => (float[{rows},{columns}] y) <float[{inner},{columns}] w> {{ y = {op} (x, w) }}"
    )
    _, result = quantized(text, TRT)
    assert (result.modified, [r.rule for r in result.refusals]) == ((True, []) if taken else (False, ["a-matrix"]))


@pytest.mark.parametrize(
    ("op", "weight", "attributes", "axis", "count"),
    [
        ("Conv", (24, 16, 1, 1), "", 0, 24),
        ("ConvTranspose", (16, 24, 1, 1), "", 1, 24),
        ("ConvTranspose", (16, 12, 1, 1), "<group = 2>", None, 1),  # one index stands for two channels
    ],
)
def test_weight_scales_lie_along_the_output_channels(op, weight, attributes, axis, count):
    shape = ",".join(map(str, weight))
    text = f"g (float[N,16,6,6] x) => (float[N,24,6,6] y) <float[{shape}] w> {{ y = {op} {attributes} (x, w) }}"
    model, _ = quantized(text, TRT)
    quantize = next(n for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "w")
    assert quantize.inputs[1].const_value.size == count
    assert quantize.attributes.get_int("axis", -1) == (-1 if axis is None else axis)
    assert lint(model) == ()


@pytest.mark.parametrize(("trans", "axis"), [(0, 1), (1, 0)])
def test_gemm_scales_lie_along_its_columns(trans, axis):
    shape = "24,16" if trans else "16,24"
    text = f"g (float[N,16] x) => (float[N,24] y) <float[{shape}] w> {{ y = Gemm <transB = {trans}> (x, w) }}"
    model, _ = quantized(text, TRT)
    quantize = next(n for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "w")
    assert (quantize.attributes.get_int("axis", -1), quantize.inputs[1].const_value.size) == (axis, 24)


def test_a_missing_range_and_a_kept_layer_are_told():
    model = parse(RESIDUAL)
    placement = place(model, {"x": Range(-1, 1)}, *TRT, {"Conv_0": "because"})
    rules = {r.node: r.rule for r in placement.refusals}
    assert rules == {"Conv_0": "kept-float", "Conv_2": "no-range", "Conv_5": "no-range"}
    assert not placement.nodes


# ------------------------------------------------------------------------------------------ tvm


def test_tvm_wants_integers_between_all_layers():
    expected = """
        a = Conv(x~, w1~, b1~)
        ra = Relu(a)
        b = Conv(ra~, w2~, b2~)
        s = Add(b~, ra~)
        rs = Relu(s)
        y = Conv(rs~, w3~)"""
    check(expected, RESIDUAL, (tvm.SUPPORTS, tvm.INT8))
    assert backends.load("tvm").schemes(devices.find("raspberry-pi-5"))["int8"] == tvm.INT8


# ------------------------------------------------------------------------------------------ the lint itself

PAIR = (
    "s = Constant <value = float {0.1}> ()\nt = Constant <value = float {0.2}> ()\nz = Constant <value = int8 {0}> ()"
)
BAD = {
    "zero-point": "q = QuantizeLinear (x, s)\nd = DequantizeLinear (q, s)\ny = MatMul (d, x)",
    "both-branches": """q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)\nr = Relu (x)
        q2 = QuantizeLinear (r, s, z)\nd2 = DequantizeLinear (q2, s, z)\ny = Add (d, d2)""",
    "requantized": """q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)
        q2 = QuantizeLinear (d, t, z)\nd2 = DequantizeLinear (q2, t, z)\ny = Mul (d2, x)""",
    "concat-scales": """q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)
        c = Concat <axis = 0> (d, x)\nq2 = QuantizeLinear (c, t, z)
        d2 = DequantizeLinear (q2, t, z)\ny = Mul (d2, d2)""",
    "nothing-behind": "q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)\ny = Exp (d)",
    "half-quantized": "q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)\ny = Gemm (d, x)",
    "split-kernel": """m = MatMul (x, x)\nq = QuantizeLinear (m, s, z)\nd = DequantizeLinear (q, s, z)
        r = Relu (d)\ny = Mul (r, d)""",
    "lonely-activation": """q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)\nr = Relu (d)
        q2 = QuantizeLinear (r, t, z)\nd2 = DequantizeLinear (q2, t, z)\ny = Mul (d2, d)""",
    "scale": """n = Constant <value = float {0.0}> ()\nq = QuantizeLinear (x, n, z)\nd = DequantizeLinear (q, n, z)
        y = Mul (d, x)""",
    "activation-scales": """v = Constant <value = float[4] {0.1, 0.2, 0.1, 0.2}> ()
        w = Constant <value = int8[4] {0, 0, 0, 0}> ()
        q = QuantizeLinear (x, v, w)\nd = DequantizeLinear (q, v, w)\ny = Mul (d, x)""",
    "integer-bias": """q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)
        y = Gemm (d, d, d)""",
    "odd-channels": None,
}


@pytest.mark.parametrize("rule", BAD)
def test_the_lint_finds(rule):
    if rule == "odd-channels":
        text = "g (float[N,20,6,6] x) => (float[N,20,4,4] y) <float[20,1,3,3] w> { y = Conv <group = 20> (x, w) }"
        conv = tuple(row for row in ort.SUPPORTS if row.op == "Conv")  # without TensorRT's exclusions
        model, _ = quantized(text, (conv, tensorrt.INT8))
    else:
        model = parse(f"g (float[4,4] x) => (float[M,K] y) {{ {PAIR}\n{BAD[rule]} }}", opset=17)
        Normalise()(model)
    assert rule in {found.rule for found in lint(model)}


def test_the_lint_wants_scales_of_the_datas_type():
    text = """g (float16[4,4] x) => (float16[4,4] y) { z = Constant <value = int8 {0}> ()
        one = Constant <value = float {1.0}> ()
        s = Cast <to = 10> (one)
        q = QuantizeLinear (x, s, z)\nd = DequantizeLinear (q, s, z)\ny = MatMul (d, d) }"""
    model = parse(text, opset=19)
    assert "scale-type" not in {found.rule for found in lint(model)}
    quantize = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    quantize.inputs[1].type = ir.TensorType(ir.DataType.FLOAT)
    assert "scale-type" in {found.rule for found in lint(model)}
