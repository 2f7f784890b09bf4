"""The checker of TensorRT's artifacts can fail: for each rule there are files that break it, by one change each."""

from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import qdq_rules
import zoo


def pair(name: str, scale: str = "") -> str:
    """Return Q and DQ of an activation; the dequantized tensor is the name with a d behind it."""
    scale = scale or f"{name}_s"
    return f"{name}q = QuantizeLinear ({name}, {scale}, z)\n{name}d = DequantizeLinear ({name}q, {scale}, z)\n"


def weight(name: str, axis: int = 0) -> str:
    """Return Q and DQ of a weight with scales along an axis."""
    return (
        f"{name}q = QuantizeLinear <axis = {axis}> ({name}, {name}_var, {name}_z)\n"
        f"{name}d = DequantizeLinear <axis = {axis}> ({name}q, {name}_var, {name}_z)\n"
    )


def zeros(name: str, count: int, kind: str = "int8") -> str:
    return f"{kind}[{count}] {name} = {{{', '.join('0' * count)}}}"


def fewer(old: int, new: int) -> tuple[str, str]:
    """Return the change from so many zeros to fewer of them."""
    return ", ".join("0" * old), ", ".join("0" * new)


#: A residual block, a Concat, a pool and a Gemm, right for TensorRT 8.5.
WEAK = f"""g (float[N,16,8,8] x) => (float[N,24] y)
<float[16,16,3,3] w1, float[16] w1_var, {zeros("w1_z", 16)}, float[16] b1,
 float[16] scale, float[16] bias, float[16] mean, float[16] var,
 float[16,16,3,3] w2, float[16] w2_var, {zeros("w2_z", 16)}, float[16] b2,
 float[16,16,2,2] w3, float[16] w3_var, {zeros("w3_z", 16)},
 float[24,32,1,1] w4, float[24] w4_var, {zeros("w4_z", 24)},
 float[24,24] w5, float[24] w5_var, {zeros("w5_z", 24)}, float[24] b5,
 float x_s = {{0.05}}, float a_s = {{0.02}}, float c_s = {{0.03}}, float e_s = {{0.04}}, float f_s = {{0.06}},
 int8 z = {{0}}> {{
    {pair("x")}{weight("w1")}
    v = Conv <pads = [1,1,1,1]> (xd, w1d, b1)
    n = BatchNormalization (v, scale, bias, mean, var)
    a = Relu (n)
    {pair("a")}{weight("w2")}
    u = Conv <pads = [1,1,1,1]> (ad, w2d, b2)
    s = Add (u, xd)
    c = Relu (s)
    {pair("c")}{weight("w3", 1)}
    t = ConvTranspose <strides = [2,2]> (cd, w3d)
    m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t)
    k = Concat <axis = 1> (cd, m)
    {pair("k", "c_s")}{weight("w4")}
    l = Conv (kd, w4d)
    e = Relu (l)
    {pair("e")}
    p = GlobalAveragePool (ed)
    f = Flatten (p)
    {pair("f")}{weight("w5")}
    y = Gemm <transB = 1> (fd, w5d, b5)
}}"""

#: What a strongly typed TensorRT gets: float16, but for the graph's own ends.
STRONG = f"""g (float[N,16,8,8] x) => (float[N,16,8,8] y)
<float16[16,16,3,3] w1, float16[16] w1_var, {zeros("w1_z", 16)}, float16[16] b1, float16 h_s, int8 z = {{0}}> {{
    h = Cast <to = 10> (x)
    {pair("h", "h_var")}{weight("w1")}
    v = Conv <pads = [1,1,1,1]> (hd, w1d, b1)
    a = Relu (v)
    y = Cast <to = 1> (a)
}}""".replace("float16 h_s", "float16 h_var")

FP8 = f"""g (float[N,32,8,8] x) => (float[N,32,8,8] y)
<float[32,32,3,3] w1, float[32] w1_var, {zeros("w1_z", 32, "float8e4m3fn")}, float x_s = {{0.05}},
 float8e4m3fn z = {{0}}> {{
    {pair("x")}{weight("w1")}
    y = Conv <pads = [1,1,1,1]> (xd, w1d)
}}"""

INT4 = """g (float[N,32] x) => (float[N,24] y)
<int4[32,24] w, float[2,24] w_var, int4[2,24] w_z> {
    d = DequantizeLinear <axis = 0, block_size = 16> (w, w_var, w_z)
    y = MatMul (x, d)
}"""

ATTENTION = f"""g (float[2,25,16] x, float[2,25,16] k) => (float[2,25,25] y, float[2,25,25] other)
<float x_s = {{0.05}}, float t_s = {{0.05}}, float half = {{0.5}}, int8 z = {{0}}> {{
    {pair("x")}
    t = Transpose <perm = [0,2,1]> (k)
    {pair("t")}
    r = MatMul (xd, td)
    other = MatMul (x, t)
    h = Mul (r, half)
    y = Softmax (h)
}}"""

MLP = f"""g (float[N,32] x) => (float[N,16] y)
<float[32,16] w, float[16] w_var, {zeros("w_z", 16)}, float x_s = {{0.05}}, int8 z = {{0}}> {{
    {pair("x")}{weight("w", 1)}
    y = MatMul (xd, wd)
}}"""

DEPTHWISE = f"""g (float[N,24,8,8] x) => (float[N,24,8,8] y)
<float[24,1,3,3] w, float[24] w_var, {zeros("w_z", 24)}, float x_s = {{0.05}}, int8 z = {{0}}> {{
    r = Relu (x)
    {pair("r", "x_s")}{weight("w")}
    y = Conv <pads = [1,1,1,1], group = 24> (rd, wd)
}}"""

#: name -> (text, opset, TensorRT, precision)
BASES = {
    "weak": (WEAK, 13, (8, 5), "int8"),
    "strong": (STRONG, 19, (10, 13), "int8"),
    "fp8": (FP8, 19, (10, 3), "fp8"),
    "int4": (INT4, 21, (10, 3), "int4"),
    "attention": (ATTENTION, 17, (8, 6), "int8"),
    "mlp": (MLP, 17, (8, 6), "int8"),
    "depthwise": (DEPTHWISE, 17, (8, 6), "int8"),
}


def written(path, base, changes=(), values=None, opset=None):
    """Write a base with pieces of its text replaced and some of its weights given."""
    text = BASES[base][0]
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    given = dict(values or {})
    if base == "int4":
        given.setdefault("w_z", np.zeros((2, 24)))
    onnx.save(ir.to_proto(zoo.model(text, given, opset=opset or BASES[base][1])), path)
    return path


def rules(violations: list[str]) -> set[str]:
    return {line.partition(":")[0] for line in violations}


@pytest.mark.parametrize("base", BASES)
def test_right_files_pass(base, tmp_path):
    path = written(tmp_path / "m.onnx", base)
    assert qdq_rules.violations(path, *BASES[base][2:], original=path) == []


@pytest.mark.parametrize("version", [(8, 4), (8, 6), (10, 0), (10, 11)])
def test_older_versions_take_the_same_file(version, tmp_path):
    assert qdq_rules.violations(written(tmp_path / "m.onnx", "weak"), version, "int8") == []


def test_every_rule_is_broken_once():
    assert {case.rule for case in BROKEN} == set(qdq_rules.RULES)


class Case(NamedTuple):
    """A change to a base that breaks `rule`, and `also` these others, which follow from it."""

    rule: str
    base: str
    changes: tuple[tuple[str, str], ...] = ()
    also: tuple[str, ...] = ()
    version: tuple[int, int] | None = None
    opset: int | None = None
    values: dict[str, np.ndarray] = {}
    precision: str | None = None


GEMM = "y = Gemm <transB = 1> (fd, w5d, b5)"

BROKEN = [
    Case("valid", "weak", (("f = Flatten (p)", "f = Flatten <axis = 9> (p)"),)),
    Case("precision", "fp8", version=(8, 6), also=("opset",)),
    Case("precision", "int4", version=(8, 6), also=("opset", "integer-initializer")),
    Case("opset", "weak", opset=18),
    Case("opset", "mlp", version=(8, 2)),  # opset 17
    Case("opset", "int4", version=(10, 1)),  # opset 21
    Case("opset", "strong", opset=18, also=("valid", "mixed-types", "float32-layer")),
    Case("integer-operator", "weak", (("e = Relu (l)", "e = Relu (l)\no1, o2, o3 = DynamicQuantizeLinear (l)"),)),
    Case(
        "float32-only",
        "weak",
        (("f = Flatten (p)", "ph = Cast <to = 10> (p)\nfh = Flatten (ph)\nf = Cast <to = 1> (fh)"),),
    ),
    Case("float32-only", "strong", version=(10, 3), also=("scale-type",)),
    Case("signature", "mlp", (("x", "image"),)),
    Case("signature", "mlp", (("[N,32]", "[4,32]"),)),
    Case("signature", "mlp", (("[N,16] y", "[M,16] y"),)),
    Case("mixed-types", "strong", (("float16[16] b1", "float[16] b1"),), also=("valid",)),
    Case("float32-layer", "mlp", version=(10, 13), opset=19),
    Case(
        "three-inputs", "weak", (("(a, a_s, z)", "(a, a_s)"), ("(aq, a_s, z)", "(aq, a_s)")), also=("dequantized-type",)
    ),
    Case("three-inputs", "weak", (("(aq, a_s, z)", "(aq, a_s)"),)),
    Case("zero-type", "weak", (("int8 z", "uint8 z"),), also=("dequantized-type",)),
    Case("zero-type", "fp8", precision="int8"),
    Case("zero-type", "mlp", opset=19, version=(10, 3), precision="fp8"),
    Case("zero-value", "weak", (("int8 z = {0}", "int8 z = {1}"),)),
    Case(
        "zero-value",
        "weak",
        (("f = Flatten (p)", "f = Flatten (p)\nzc = Identity (z)"), ("(f, f_s, z)", "(f, f_s, zc)")),
    ),
    Case("zero-size", "weak", ((zeros("w1_z", 16), "int8 w1_z = {0}"),)),
    Case(
        "scale-constant",
        "weak",
        (("float a_s = {0.02}, ", ""), ("a = Relu (n)", "a = Relu (n)\na_s = ReduceMax <keepdims = 0> (a)")),
        also=("requantized", "split-pair"),
    ),
    Case("scale-positive", "weak", values={"w2_var": np.r_[np.ones(15), 0]}),
    Case("scale-positive", "weak", values={"w2_var": np.r_[np.ones(15), -1]}),
    Case("scale-positive", "weak", values={"w2_var": np.r_[np.ones(15), np.inf]}),
    Case("scale-type", "strong", (("float16 h_var", "float h_var"),), also=("valid", "mixed-types", "float32-layer")),
    Case("scale-underflow", "strong", values={"h_var": np.array(1e-7)}),
    Case("scale-underflow", "strong", values={"w1_var": np.r_[np.ones(15), 1e-7]}),
    Case("scale-underflow", "strong", values={"w1_var": np.r_[np.ones(15), 0.0]}, also=("scale-positive",)),
    Case("scale-shape", "weak", (("float[24] w5_var", "float[12] w5_var"), (zeros("w5_z", 24), zeros("w5_z", 12)))),
    Case("scale-shape", "int4", (("block_size = 16", "block_size = 8"),)),
    Case(
        "scale-shape",
        "int4",
        (
            ("int4[32,24] w, float[2,24] w_var, int4[2,24] w_z", "int4[40,24] w, float[3,24] w_var, int4[3,24] w_z"),
            ("[N,32]", "[N,40]"),
        ),
        values={"w_z": np.zeros((3, 24))},
    ),
    Case(
        "activation-scales",
        "weak",
        (
            (pair("x"), pair("x", "x_var").replace("x_var, z", "x_var, w1_z").replace("Linear", "Linear <axis = 1>")),
            ("float x_s = {0.05}", "float[16] x_var"),
        ),
    ),
    Case("weight-axis", "weak", ((weight("w5"), weight("w5", 1)),)),
    Case("weight-axis", "weak", ((weight("w3", 1), weight("w3", 0)),)),
    Case("weight-axis", "weak", ((weight("w2"), weight("w2", 1)),)),
    Case(
        "integer-initializer",
        "mlp",
        ((weight("w", 1), "wd = DequantizeLinear <axis = 1> (w, w_var, w_z)\n"), ("float[32,16] w,", "int8[32,16] w,")),
    ),
    Case("quantized-bias", "weak", ((GEMM, pair("b5", "f_s") + GEMM.replace("b5", "b5d")),)),
    Case(
        "dequantized-type",
        "weak",
        ((GEMM, "b5d = DequantizeLinear (b5, f_s)\n" + GEMM.replace("b5)", "b5d)")), ("float[24] b5", "int32[24] b5")),
        also=("three-inputs", "quantized-bias", "integer-initializer"),
    ),
    Case(
        "int4",
        "int4",
        (("[32,24] w", "[32,23] w"), ("[2,24]", "[2,23]"), ("[N,24]", "[N,23]")),
        values={"w_z": np.zeros((2, 23))},
    ),
    Case(
        "int4",
        "int4",
        (("MatMul (x, d)", "MatMul (d, x)"), ("[N,32] x", "[24,3] x"), ("[N,24] y", "[32,3] y")),
        also=("bare-input",),
    ),
    Case(
        "int4",
        "int4",
        (
            ("float[N,32] x", "float[N,24] x"),
            ("[N,24] y", "[N,32] y"),
            ("y = MatMul (x, d)", "t = Transpose (d)\ny = MatMul (x, t)"),
        ),
    ),
    Case("fp8", "fp8", (("float[N,32", "float[N,16"), ("[32,32", "[16,16"), ("[32]", "[16]"), fewer(32, 16))),
    Case("fp8", "fp8", (("3,3]", "7,7]"), ("[1,1,1,1]", "[3,3,3,3]"))),
    Case("fp8", "fp8", (("Conv <", "ConvTranspose <"), (weight("w1"), weight("w1", 1)))),
    Case("bare-input", "weak", (("(fd, w5d, b5)", "(fd, w5, b5)"),)),
    Case("bare-input", "weak", (("(fd, w5d, b5)", "(f, w5d, b5)"),), also=("unwanted-pair",)),
    Case(
        "computed-weight",
        "mlp",
        ((weight("w", 1), "v = Abs (w)\n" + pair("v", "x_s")), ("MatMul (xd, wd)", "Gemm (xd, vd)")),
    ),
    Case("unwanted-pair", "weak", (("p = GlobalAveragePool (ed)", "p = ReduceMean <axes = [2,3]> (ed)"),)),
    Case(
        "unwanted-pair",
        "mlp",
        (("y = MatMul (xd, wd)", "t = MatMul (xd, wd)\n" + pair("t", "x_s").replace("td =", "y =")),),
    ),
    Case("unwanted-pair", "mlp", (("y = MatMul (xd, wd)", "y = MatMul (xd, wd)\n" + pair("y", "x_s")),)),
    Case(
        "split-kernel",
        "weak",
        (("n = BatchNormalization (v,", pair("v", "a_s") + "n = BatchNormalization (vd,"),),
        also=("unwanted-pair",),
    ),
    Case(
        "split-kernel",
        "weak",
        (("e = Relu (l)", pair("l", "e_s") + "e = Relu (ld)"),),
        also=("unwanted-pair", "lonely-activation"),
    ),
    Case(
        "split-kernel",
        "mlp",
        (("y = MatMul (xd, wd)", "t = MatMul (xd, wd)\n" + pair("t", "x_s") + "y = Add (td, w_var)"),),
        also=("float-result", "output-operator"),
    ),
    Case("lonely-activation", "weak", (("c = Relu (s)", pair("s", "c_s") + "c = Relu (sd)"),), also=("unwanted-pair",)),
    Case("both-branches", "weak", (("s = Add (u, xd)", pair("u", "a_s") + "s = Add (ud, xd)"),)),
    Case("wrong-branch", "weak", (("s = Add (u, xd)", "uu = Exp (u)\ns = Add (uu, xd)"),)),
    Case("bare-skip", "weak", (("s = Add (u, xd)", "s = Add (u, x)"),)),
    Case("float-result", "weak", (("f = Flatten (p)", "pe = Exp (p)\nf = Flatten (pe)"),)),
    Case(
        "output-operator",
        "mlp",
        (
            (
                "y = MatMul (xd, wd)",
                "t = MatMul (xd, wd)\no = Slice (x, f0, f16, i1)\n" + pair("o", "x_s") + "y = Add (t, od)",
            ),
            ("int8 z", "int64[1] f0 = {0}, int64[1] f16 = {16}, int64[1] i1 = {1}, int8 z"),
        ),
        also=("float-result",),
    ),
    Case(
        "requantized",
        "weak",
        (("u = Conv <pads = [1,1,1,1]> (ad,", pair("ad", "e_s") + "u = Conv <pads = [1,1,1,1]> (add,"),),
    ),
    Case(
        "requantized",
        "weak",
        (("l = Conv (kd", pair("k", "e_s").replace("kq", "jq").replace("kd", "jd") + "l = Conv (jd"),),
        also=("concat-scales", "unwanted-pair"),
    ),
    Case("split-pair", "weak", (("(aq, a_s, z)", "(aq, e_s, z)"),)),
    Case("concat-scales", "weak", ((pair("k", "c_s"), pair("k", "e_s")),), also=("requantized",)),
    Case(
        "concat-scales",
        "weak",
        (("k = Concat <axis = 1> (cd, m)", pair("m", "e_s") + "k = Concat <axis = 1> (cd, md)"),),
        also=("requantized",),
    ),
    Case("depthwise-channels", "depthwise", (("24", "20"), fewer(24, 20)), also=("small-layer",)),
    Case("small-layer", "depthwise", (("3,3]", "1,3]"), ("[1,1,1,1]", "[0,1,0,1]"))),
    Case("small-layer", "mlp", (("16", "8"), fewer(16, 8))),
    Case("vector-product", "mlp", (("[N,", "[1,"),)),
    Case("attention", "attention", (("25", "600"),)),
    Case("attention", "attention", (("[2,25", "[2,M"), ("25]", "M]"))),
    Case("attention", "attention", (("y = Softmax (h)", "hm = Add (h, other)\ny = Softmax (hm)"),)),
]


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.rule}-{i}") for i, case in enumerate(BROKEN)])
def test_a_broken_file_is_reported(case, tmp_path):
    """The rule is named, and nothing else is but what follows from the change."""
    path = written(tmp_path / "m.onnx", case.base, case.changes, case.values, case.opset)
    _, _, version, precision = BASES[case.base]
    original = written(tmp_path / "original.onnx", case.base)
    if case.rule == "signature":
        path, original = original, path
    else:
        original = None
    found = qdq_rules.violations(path, case.version or version, case.precision or precision, original)
    assert case.rule in rules(found), found
    assert rules(found) <= {case.rule, *case.also}, found
