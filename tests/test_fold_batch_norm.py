"""Every BatchNormalization that can be folded is, with the same numbers; the others say why not."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler import model as model_io
from edgec.passes import weights as passes_weights
from edgec.passes.fold_batch_norm import FoldBatchNorm
from edgec.passes.normalise import Normalise
from equivalence import assert_equivalent

RTOL = 1e-5  # one float32 rounding of each weight, summed over at most 200 products
OPSETS = (9, 11, 13, 14, 15, 17, 20)


def ops(model):
    return [node.op_type for node in model.graph]


def norm(channels, names="scale, bias, mean, var"):
    return ", ".join(f"float[{channels}] {name.strip()}" for name in names.split(","))


def dims(*sizes):
    return ",".join(map(str, sizes))


def fold(text, *, opset=15, weights=None):
    """Fold a model; check the numbers and return it with the result."""
    before, model = zoo.model(text, weights, opset=opset), zoo.model(text, weights, opset=opset)
    result = FoldBatchNorm()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_equivalent(before, model, rtol=RTOL)
    return model, result


def conv(op="Conv", *, rank=2, group=1, bias=True, attributes=""):
    out = 6 if group < 6 else group
    inside = 4 if 4 % group == 0 else group
    weight = (out, inside // group) if op == "Conv" else (inside, out // group)
    size = [5] * rank
    return f"""
    g (float[N,{dims(inside, *size)}] x) => (float[N,{dims(out, *("D" * rank))}] y)
    <float[{dims(*weight, *[3] * rank)}] w, float[{out}] b, {norm(out)}> {{
        c = {op} <group = {group}{attributes}> (x, w{", b" if bias else ""})
        y = BatchNormalization <epsilon = 0.01> (c, scale, bias, mean, var)
    }}"""


# ------------------------------------------------------------------------------------------- behind


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_behind_a_convolution(op, rank, group, bias, opset):
    model, result = fold(conv(op, rank=rank, group=group, bias=bias), opset=opset)
    assert ops(model) == [op] and result.rewrites == 1 and not result.refusals
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert set(model.graph.initializers) <= {"w", "b", "w_bias"}


def test_behind_a_depthwise_convolution_with_a_multiplier():
    text = f"""
    g (float[N,3,5,5] x) => (float[N,6,3,3] y) <float[6,1,3,3] w, {norm(6)}> {{
        c = Conv <group = 3> (x, w)
        y = BatchNormalization (c, scale, bias, mean, var)
    }}"""
    assert ops(fold(text)[0]) == ["Conv"]


def test_padding_strides_and_dilations_do_not_matter_behind_a_convolution():
    text = conv(attributes=", pads = [1,2,1,0], strides = [2,1], dilations = [1,2]")
    assert ops(fold(text)[0]) == ["Conv"]


@pytest.mark.parametrize("c", [None, "", "[1]", "[5]", "[1,5]", "[2,1]", "[2,5]"])
@pytest.mark.parametrize(("trans_a", "trans_b"), itertools.product((0, 1), repeat=2))
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (1.5, 0.0)])
def test_behind_gemm(c, trans_a, trans_b, alpha, beta):
    inputs = "x, w" if c is None else "x, w, c"
    text = f"""
    g (float[{"4,2" if trans_a else "2,4"}] x) => (float[2,5] y)
    <float[{"5,4" if trans_b else "4,5"}] w, float{c or ""} c, {norm(5)}> {{
        m = Gemm <transA = {trans_a}, transB = {trans_b}, alpha = {alpha}, beta = {beta}> ({inputs})
        y = BatchNormalization (m, scale, bias, mean, var)
    }}"""
    assert ops(fold(text)[0]) == ["Gemm"]


@pytest.mark.parametrize("bias", ["", "[1]", "[5]", "[1,5]"])
@pytest.mark.parametrize("order", ["m, b", "b, m"])
def test_behind_matmul_and_add(bias, order):
    text = f"""
    g (float[N,4] x) => (float[N,5] y) <float[4,5] w, float{bias} b, {norm(5)}> {{
        m = MatMul (x, w)
        [sum] a = Add ({order})
        y = BatchNormalization (a, scale, bias, mean, var)
    }}"""
    before = zoo.model(text)
    model = zoo.model(text)
    Normalise()(model)  # so that the number of dimensions is known
    FoldBatchNorm()(model)
    assert ops(model) == ["MatMul", "Add"]
    assert_equivalent(before, model, rtol=RTOL)


def with_shapes(text, weights=None, opset=15):
    model = zoo.model(text, weights, opset=opset)
    before = model_io.copy(model)
    Normalise()(model)
    result = FoldBatchNorm()(model)
    assert_equivalent(before, model, rtol=RTOL)
    return model, result


def test_behind_matmul_alone_the_shift_is_added():
    text = f"""
    g (float[N,4] x) => (float[N,5] y) <float[4,5] w, {norm(5)}> {{
        m = MatMul (x, w)
        y = BatchNormalization (m, scale, bias, mean, var)
    }}"""
    model, _ = with_shapes(text)
    assert ops(model) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    "body",
    [
        f"g (float[N,5,4] x) => (float[N,5,6] y) <float[4,6] w, {norm(5)}> {{ m = MatMul (x, w)",
        f"g (float[4,5] x) => (float[6,5] y) <float[6,4] w, {norm(5)}> {{ m = MatMul (w, x)",
        f"g (float[4,5] x) => (float[6,5] y) <float[6,4] w, {norm(5)}> {{ m = Gemm (w, x)",
    ],
    ids=["channels are not the last axis", "the weight is on the left", "the weight is on the left of Gemm"],
)
def test_a_product_whose_weight_has_no_channel_axis_is_left(body):
    model, result = with_shapes(body + " y = BatchNormalization (m, scale, bias, mean, var) }")
    assert ops(model)[1:] == ["Mul", "Add"] or result.refusals


def test_two_norms_behind_one_convolution():
    text = f"""
    g (float[N,3,5,5] x) => (float[N,4,5,5] y)
    <float[4,3,1,1] w, {norm(4)}, {norm(4, "scale2, bias2, mean2, var2")}> {{
        c = Conv (x, w)
        n = BatchNormalization (c, scale, bias, mean, var)
        y = BatchNormalization (n, scale2, bias2, mean2, var2)
    }}"""
    model, result = fold(text)
    assert ops(model) == ["Conv"] and result.rewrites == 2


def test_float64_stays_float64():
    text = f"""
    g (double[N,4] x) => (double[N,5] y) <double[4,5] w, {norm(5).replace("float", "double")}> {{
        m = Gemm (x, w)
        y = BatchNormalization (m, scale, bias, mean, var)
    }}"""
    model, _ = fold(text)
    assert ops(model) == ["Gemm"]
    assert {v.const_value.dtype for v in model.graph.initializers.values()} == {ir.DataType.DOUBLE}


# ------------------------------------------------------------------------------------------- in front, alone


def before_conv(*, rank=2, group=1, bias=True, attributes=""):
    out = 8
    return f"""
    g (float[N,{dims(4, *[5] * rank)}] x) => (float[N,{dims(out, *("D" * rank))}] y)
    <{norm(4)}, float[{dims(out, 4 // group, *[3] * rank)}] w, float[{out}] b> {{
        n = BatchNormalization (x, scale, bias, mean, var)
        y = Conv <group = {group}{attributes}> (n, w{", b" if bias else ""})
    }}"""


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_in_front_of_a_convolution(rank, group, bias, opset):
    model, result = fold(before_conv(rank=rank, group=group, bias=bias), opset=opset)
    assert ops(model) == ["Conv"] and result.rewrites == 1


@pytest.mark.parametrize("attributes", [', auto_pad = "VALID"', ", pads = [0,0,0,0]", ', auto_pad = "NOTSET"'])
def test_a_convolution_that_says_it_does_not_pad(attributes):
    assert ops(fold(before_conv(attributes=attributes))[0]) == ["Conv"]


@pytest.mark.parametrize("attributes", [', auto_pad = "SAME_UPPER"', ", pads = [0,1,0,0]"])
def test_padding_in_front_is_refused_and_the_norm_becomes_mul_and_add(attributes):
    model, result = fold(before_conv(attributes=attributes))
    assert ops(model) == ["Mul", "Add", "Conv"]
    assert [refusal.rule for refusal in result.refusals] == ["fold-before"]


def test_between_two_convolutions_the_first_takes_it():
    text = f"""
    g (float[N,3,5,5] x) => (float[N,2,5,5] y) <float[4,3,1,1] w, {norm(4)}, float[2,4,1,1] v> {{
        c = Conv (x, w)
        n = BatchNormalization (c, scale, bias, mean, var)
        y = Conv (n, v)
    }}"""
    model, _ = fold(text)
    assert ops(model) == ["Conv", "Conv"] and "w_bias" in model.graph.initializers


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_alone(rank, opset):
    shape = dims("N", 3, *[4] * (rank - 2))
    text = f"""
    g (float[{shape}] x) => (float[{shape}] y) <{norm(3)}> {{
        r = Relu (x)
        y = BatchNormalization (r, scale, bias, mean, var)
    }}"""
    model, _ = with_shapes(text, opset=opset)
    assert ops(model) == ["Relu", "Mul", "Add"]
    shapes = {v.shape.numpy() for v in model.graph.initializers.values()}
    assert shapes == {(3, *[1] * (rank - 2))}


@pytest.mark.parametrize(
    ("outputs", "end"),
    [("float[N,4,5,5] y, float[N,4,5,5] c", ""), ("float[N,4,5,5] y, float[N,4,5,5] e", "e = Exp (c)")],
    ids=["a graph output", "read elsewhere"],
)
def test_a_convolution_that_is_read_twice_keeps_its_weights(outputs, end):
    text = f"""
    g (float[N,3,5,5] x) => ({outputs}) <float[4,3,1,1] w, {norm(4)}> {{
        c = Conv (x, w)
        y = BatchNormalization (c, scale, bias, mean, var)
        {end}
    }}"""
    model, result = with_shapes(text)
    assert ops(model)[:3] == ["Conv", "Mul", "Add"]
    assert [refusal.rule for refusal in result.refusals] == ["fold-behind"]


# ------------------------------------------------------------------------------------------- refusals

SIMPLE = conv()
TRAINING = SIMPLE.replace("<epsilon = 0.01>", "<training_mode = 1>").replace("y = Batch", "y, rm, rv = Batch")

REFUSED = {
    "a shared weight": (
        SIMPLE.replace("=> (", "=> (float[6,4,3,3] v, ").replace("c = ", "v = Exp (w) c = "),
        "w is shared",
    ),
    "a shared bias": (SIMPLE.replace("=> (", "=> (float[6] b2, ").replace("c = ", "b2 = Exp (b) c = "), "b is shared"),
    "a weight that is an input": (SIMPLE.replace("x)", "x, float[6,4,3,3] w)", 1), "w is a graph input"),
    "a bias that is an input": (SIMPLE.replace("x)", "x, float[6] b)", 1), "b is a graph input"),
    "a weight that is an output": (SIMPLE.replace("=> (", "=> (float[6,4,3,3] w, "), "w is a graph output"),
    "a weight computed at run time": (
        SIMPLE.replace("x)", "x, float[6,4,3,3] v)", 1).replace("c = ", "u = Neg (v) c = ").replace("(x, w", "(x, u"),
        "u is computed at run time",
    ),
    "a scale that is an input": (SIMPLE.replace("x)", "x, float[6] scale)", 1), "is not constant"),
    "a mean computed at run time": (
        SIMPLE.replace("x)", "x, float[6] v)", 1).replace("c = ", "u = Neg (v) c = ").replace("bias, mean", "bias, u"),
        "is not constant",
    ),
    "training mode": (TRAINING, "training mode"),
    "a norm of unknown rank": (
        f"g (float[N,3,4] x, int64[R] s) => (z) <{norm(3)}> "
        "{ r = Reshape (x, s)  y = BatchNormalization (r, scale, bias, mean, var)  z = Neg (y) }",
        "number of dimensions of its input is unknown",
    ),
    "a norm in a branch": (
        f"g (float[N,3] x, bool c) => (float[N,3] y) <{norm(3)}> {{ y = If (c) "
        "<then_branch = yes () => (float[N,3] a) { a = BatchNormalization (x, scale, bias, mean, var) }, "
        "else_branch = no () => (float[N,3] b) { b = Identity (x) }> }",
        "inside the body",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    text, why = REFUSED[case]
    model = zoo.model(text)
    before = ir.to_proto(model).SerializeToString()
    result = FoldBatchNorm()(model)
    assert [why in refusal.why for refusal in result.refusals] == [True], result.refusals
    assert not result.modified and ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_sixteen_bits_are_refused(kind):
    model = zoo.model(SIMPLE.replace("float[", f"{kind}["))
    result = FoldBatchNorm()(model)
    assert not result.modified and "16 bits" in result.refusals[0].why


@pytest.mark.parametrize("op", ["Conv", "Relu"])
def test_sixteen_bit_weights_beside_wide_parameters_are_refused(op):
    text = SIMPLE.replace("float[", "float16[")
    for name in ("scale", "bias", "mean", "var"):
        text = text.replace(f"float16[6] {name}", f"float[6] {name}")
    if op == "Relu":
        text = text.replace("Conv <group = 1> (x, w, b)", "Relu (x)").replace("[N,4,5,5]", "[N,6,5,5]")
    model = zoo.model(text)
    Normalise()(model)
    result = FoldBatchNorm()(model)
    assert not result.modified and "too few bits" in result.refusals[0].why


def test_statistics_as_outputs_are_refused():
    """Before opset 14 it is the number of outputs that says that the node trains."""
    model = zoo.model(SIMPLE.replace("y = Batch", "y, rm, rv, sm, sv = Batch"), opset=9)
    result = FoldBatchNorm()(model)
    assert not result.modified and "statistics" in result.refusals[0].why


def test_numbers_per_pixel_are_refused():
    parameters = norm(4).replace("float[4]", "float[4,2,2]")
    text = f"""
    g (float[N,3,2,2] x) => (float[N,4,2,2] y) <float[4,3,1,1] w, {parameters}> {{
        c = Conv (x, w)
        y = BatchNormalization <spatial = 0> (c, scale, bias, mean, var)
    }}"""
    result = FoldBatchNorm()(zoo.model(text, opset=8))
    assert not result.modified and "per channel" in result.refusals[0].why


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"var": np.full(6, -1.0)}, "no finite numbers"),
        ({"mean": np.full(6, 1e6), "var": np.full(6, 1.0)}, "far from 0"),
    ],
)
def test_numbers_that_folding_would_spoil_are_refused(weights, why):
    model = zoo.model(SIMPLE, weights)
    result = FoldBatchNorm()(model)
    assert not result.modified and why in result.refusals[0].why


# ------------------------------------------------------------------------------------------- names, size, oracle


def test_names_that_are_taken_are_not_taken_again():
    text = conv(bias=False).replace("float[6] b,", "float[1] w_bias,").replace("(x, w)", "(x, w)  d = Exp (w_bias)")
    model, _ = fold(text.replace("=> (", "=> (float[1] d, "))
    assert "w_bias_2" in model.graph.initializers


def test_a_parameter_that_others_read_stays():
    model, _ = fold(SIMPLE.replace("=> (", "=> (float[6] e, ").replace("c = ", "e = Exp (mean) c = "))
    assert "mean" in model.graph.initializers and "var" not in model.graph.initializers


@pytest.mark.parametrize("text", [conv(group=2), conv("ConvTranspose", group=2), before_conv(group=2)])
def test_large_weights_are_folded_when_they_are_read(text, tmp_path, monkeypatch):
    before = zoo.model(text)
    onnx.save(ir.to_proto(before), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    monkeypatch.setattr(passes_weights, "LAZY_BYTES", 0)
    model = model_io.load(tmp_path / "m.onnx")
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    FoldBatchNorm()(model)
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)
    assert ops(model) in (["Conv"], ["ConvTranspose"])
    assert_equivalent(before, model, rtol=RTOL)


@pytest.mark.parametrize(
    "text",
    [conv(), conv(bias=False), conv(group=2), conv("ConvTranspose", group=2), conv("ConvTranspose", rank=1)],
)
def test_onnxscript_folds_to_the_same_numbers(text):
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules.common import _fuse_batchnorm as oracle

    theirs = rewrite(zoo.model(text), oracle.rules)
    ours, _ = fold(text)
    assert ops(theirs) == ops(ours)
    assert_equivalent(theirs, ours, rtol=RTOL)
    want, got = (model.graph.node(0).inputs[1].const_value.numpy() for model in (theirs, ours))
    np.testing.assert_allclose(got, want, rtol=1e-6)  # they round to float32 on the way, we do not
