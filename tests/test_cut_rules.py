"""What ties, pins and rewrites when channels are cut: small graphs where that can be said by hand."""

import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.passes.channel_cuts import cut, groups, mask
from equivalence import assert_equivalent

RTOL = 2e-5  # sums over fewer terms are rounded otherwise


def pruned(text, *, opset=17, rtol=RTOL, **weights):
    """Return the units of each group, and all reasons; every group, and all together, were cut as if masked."""
    model = zoo.model(text, weights, opset=opset)
    found = groups(model)
    chosen = [{group.name: list(range(0, group.units, 2))} for group in found]
    chosen += [{group.name: list(range(1, group.units))} for group in found]
    for gone in map(found.feasible, [*chosen, {name: units for part in chosen for name, units in part.items()}]):
        assert_equivalent(mask(model, gone), cut(model, gone), rtol=rtol)
    return [group.units for group in found], " | ".join(refusal.why for refusal in found.refusals)


def nodes(model, op):
    return [node for node in model.graph if node.op_type == op]


def numbers(node, index):
    return node.inputs[index].const_value.numpy().tolist()


HEAD = "g (float[N,3,4,4] x) => (float[N,2,4,4] y) <float[6,3,1,1] w1, float[2,6,1,1] w2"
DEEP = "g (float[N,3,4,4] x) => (float[N,2] y) <float[6,3,1,1] w1, float[6,2] w2"


def between(lines, declared="", head=HEAD, last="y = Conv (b, w2)", **options):
    """A graph with `lines` between a convolution that makes a, of 6 channels, and one that reads b."""
    return pruned(f"{head}{', ' * bool(declared)}{declared}> {{ a = Conv (x, w1)\n{lines}\n{last} }}", **options)


# ------------------------------------------------------------------------------------------- handed on


@pytest.mark.parametrize(
    "line",
    [
        "b = Sigmoid (a)", "b = HardSwish (a)", "b = Erf (a)", "b = Elu (a)", "b = Clip (a, one, six)", "b = Sign (a)",
        "b = Softmax <axis = 2> (a)", "b = ReduceMean <axes = [2,3]> (a)\n", "b = LpNormalization <axis = 3> (a)",
        "b = MaxPool <kernel_shape = [1,1]> (a)", "b = Dropout (a)", "b = Pow (a, two)", "b = Where (t, a, one)",
        "c = Cast <to = 1> (a)\nd = Less (c, one)\nb = Where (d, a, c)", "b, i = TopK <axis = 2> (a, four)",
        "b = PRelu (a, slopes)", "b = Mul (slopes, a)", "b = Sub (table, a)", "b = Add (scalar, a)",
        "b = InstanceNormalization (a, six_of, six_of)", "b = Identity (a)",
        "c, m = Dropout (a)\nb = Where (m, c, one)",
    ],
)  # fmt: skip
def test_what_keeps_channels_apart_hands_them_on(line):
    declared = (
        "float one = {0.5}, float six = {6.0}, float two = {2.0}, bool t = {1}, int64[1] four = {4},"
        " float[6,1,1] slopes, float[1,6,4,4] table, float scalar, float[6] six_of"
    )
    declared = ", ".join(part for part in declared.split(", ") if part.split()[1] in line)
    head = HEAD.replace("float[N,2,4,4] y", "float[N,2,h,w] y")
    assert between(line, declared, head) == ([6], "")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("b = Softmax <axis = 1> (a)", "normalises over channels"),
        ("b = LRN <size = 3> (a)", "no rule for LRN"),
        ("b = LayerNormalization <axis = 1> (a, table)", "normalises over channels"),
        ("b = GroupNormalization <num_groups = 1> (a, scale, scale)", "normalises over channels"),
        ("b, i = TopK <axis = 1> (a, six)", "sorts or sums up channels"),
        ("b = Einsum <equation = \"nchw->nchw\"> (a)", "no rule for Einsum"),
    ],
)  # fmt: skip
def test_what_combines_channels_pins_them_and_says_so(line, why):
    declared = ["float[6] scale", "float[6,4,4] table", "int64[1] six = {6}"]
    declared = ", ".join(part for part in declared if f" {part.split()[1]}" in line)
    units, found = between(line, declared, opset=21)
    assert units == [] and why in found


def test_a_mean_over_channels_pins_and_a_gate_for_all_channels_does_not():
    gate = "m = ReduceMean <axes = [1]> (a)\nb = Mul (m, a)"
    units, why = between(gate)
    assert units == [] and "is taken over channels" in why
    assert between("m = Conv (x, g)\nb = Mul (m, a)", "float[1,3,1,1] g") == ([6], "")


def test_gates_and_sums_tie():
    units, why = between("c = Conv (x, v)\nd = Sigmoid (c)\ne = Mul (a, d)\nb = Max (e, a, c)", "float[6,3,1,1] v")
    assert (units, why) == ([6], "")


def test_group_norm_is_cut_by_its_groups():
    line = "b = GroupNormalization <num_groups = 3> (a, s, s)"
    assert between(line, "float[6] s", opset=21) == ([3], "")
    # as PyTorch writes it: groups as instances
    line = "c = Reshape (a, by)\nd = InstanceNormalization (c, s, s)\ne = Reshape (d, back)\nb = Mul (e, k)"
    declared = "int64[3] by = {0,3,-1}, int64[4] back = {0,6,4,4}, float[3] s, float[6,1,1] k"
    assert between(line, declared) == ([3], "")


# ------------------------------------------------------------------------------------------- convolutions in groups


@pytest.mark.parametrize(
    ("op", "group", "shape", "outs", "units"),
    [
        ("Conv", 12, "12,1,3,3", 12, [12]),  # depthwise
        ("Conv", 12, "24,1,3,3", 24, [12]),  # two outputs a channel
        ("Conv", 6, "12,2,3,3", 12, [6]),  # as many groups as channels in one, and more: whole groups
        ("Conv", 3, "9,4,3,3", 9, [4, 3]),  # fewer: positions within them
        ("Conv", 2, "2,6,3,3", 2, [6]),  # one output a group cannot be cut
        ("ConvTranspose", 12, "12,1,3,3", 12, [12]),
        ("ConvTranspose", 12, "12,2,3,3", 24, [12]),
        ("ConvTranspose", 3, "12,3,3,3", 9, [4, 3]),
        ("ConvTranspose", 1, "12,5,3,3", 5, [12, 5]),
    ],
)
def test_groups_stay_of_one_size(op, group, shape, outs, units):
    found = pruned(f"""
    g (float[N,3,6,6] x) => (float[N,2,4,4] y)
    <float[12,3,1,1] w1, float[{shape}] w2, float[{outs}] b2, float[2,{outs},{3 if op == "Conv" else 3},3] w3> {{
        a = Conv (x, w1)
        b = {op} <group = {group}, pads = [1,1,1,1]> (a, w2, b2)
        c = Relu (b)
        y = Conv (c, w3)
    }}""")
    assert found[0] == units


def test_the_group_attribute_counts_what_is_left():
    model = zoo.model("""
    g (float[N,3,4,4] x) => (float[N,2,4,4] y) <float[12,3,1,1] w1, float[12,2,1,1] w2, float[2,12,1,1] w3> {
        a = Conv (x, w1)
        b = Conv <group = 6> (a, w2)
        y = Conv (b, w3)
    }""")
    result = cut(model, {"a": [0, 5]})
    assert [node.attributes.get_int("group", 1) for node in nodes(result, "Conv")] == [1, 4, 1]
    assert [list(node.inputs[1].shape) for node in nodes(result, "Conv")] == [[8, 3, 1, 1], [8, 2, 1, 1], [2, 8, 1, 1]]


# ------------------------------------------------------------------------------------------- data that moves


@pytest.mark.parametrize(
    ("lines", "declared", "units"),
    [
        ("b = Slice (a, from, to, axis)", "int64[1] from = {1}, int64[1] to = {5}, int64[1] axis = {1}", [6]),
        ("b = Slice (a, from, to, axis, step)",
         "int64[1] from = {-1}, int64[1] to = {-9}, int64[1] axis = {-3}, int64[1] step = {-2}", [6]),
        ("b = Gather <axis = 1> (a, which)", "int64[4] which = {5,-5,0,5}", [6]),
        ("c = Gather <axis = 1> (a, table)\nb = Reshape (c, back)",
         "int64[2,3] table = {0,1,2,3,4,5}, int64[4] back = {0,6,4,4}", [3]),
        ("b = Pad (a, pads, fill)", "int64[8] pads = {0,1,1,0,0,-2,0,-1}, float fill = {1.5}", [6]),
        ("c = Unsqueeze (a, at)\nd = Squeeze (c, at)\nb = Tile (d, two)",
         "int64[1] at = {2}, int64[4] two = {1,2,1,1}", [6]),
        ("c = SpaceToDepth <blocksize = 2> (a)\nb = DepthToSpace <blocksize = 2> (c)", "", [6]),
        ("c, d, e = Split <axis = 1> (a, parts)\nb = Concat <axis = 1> (e, d, c, a)", "int64[3] parts = {1,2,3}", [5]),
        ("c, d = Split <axis = 1> (a)\nb = Concat <axis = 1> (c, d)", "", [6]),
        ("m = GlobalAveragePool (a)\nc = Expand (m, to)\nb = Add (a, c)", "int64[4] to = {1,6,4,4}", [6]),
        ('b = Resize <mode = "nearest"> (a, , , to)', "int64[4] to = {2,6,4,4}", [6]),
        ("c = Transpose <perm = [0,2,3,1]> (a)\nd = Reshape (c, flat)\ne = Reshape (d, back)\n"
         "b = Transpose <perm = [0,3,1,2]> (e)", "int64[3] flat = {0,-1,6}, int64[4] back = {0,4,4,6}", [6]),
    ],
)  # fmt: skip
def test_moves_are_rewritten(lines, declared, units):
    width = {"Tile": 12, "Pad": 5, "Concat <axis = 1> (e": 12, "from = {1}": 4, "{-9}": 3, "which": 4}
    width = next((n for key, n in width.items() if key in lines + declared), 6)
    pixels = "h,w"
    head = f"g (float[2,3,4,4] x) => (float[2,2,{pixels}] y) <float[6,3,1,1] w1, float[2,{width},1,1] w2"
    assert between(lines, declared, head)[0] == units


def test_old_opsets_keep_bounds_in_attributes():
    units, why = between(
        "c = Slice <axes = [1], starts = [1], ends = [9]> (a)\nd, e = Split <axis = 1, split = [2,3]> (c)\n"
        "f = Pad <pads = [0,1,0,0,0,2,0,0]> (e)\ng = Concat <axis = 1> (f, d)\n"
        "h = Slice <axes = [1], starts = [2], ends = [8]> (g)\nb = Softmax <axis = 3> (h)",
        opset=9,
    )
    assert (units, why) == ([6], "")


def test_a_range_with_holes_becomes_a_gather_and_an_even_one_stays():
    text = f"""{HEAD.replace("float[2,6,1,1]", "float[2,3,1,1]")}, int64[1] from = {{0}}, int64[1] to = {{6}},
      int64[1] axis = {{1}}, int64[1] step = {{2}}> {{
        a = Conv (x, w1)
        b = Slice (a, from, to, axis, step)
        y = Conv (b, w2)
    }}"""
    text = text.replace("y = Conv (b, w2)", "c = Relu (a)\nd = Concat <axis = 1> (b, c)\ny = Conv (d, w2)").replace(
        "float[2,3,1,1]", "float[2,9,1,1]"
    )
    model = zoo.model(text)
    even = cut(model, {"a": [0, 1]})
    assert not nodes(even, "Gather") and [numbers(nodes(even, "Slice")[0], i) for i in (1, 2, 4)] == [[0], [3], [2]]
    holes = cut(model, {"a": [1]})
    assert numbers(nodes(holes, "Gather")[0], 1) == [0, 1, 3]
    for gone, result in ((0, 1), even), ((1,), holes):
        assert_equivalent(mask(model, {"a": gone}), result, rtol=RTOL)


# ------------------------------------------------------------------------------------------- linear layers, products


def test_flatten_takes_all_pixels_of_a_channel():
    units, why = pruned("""
    g (float[N,3,2,2] x) => (float[N,5] y) <float[4,3,1,1] w1, float[16,6] w2, float[6] b2, float[5,6] w3,
      float[1,5] b3> {
        a = Conv (x, w1)
        f = Flatten (a)
        h = Gemm (f, w2, b2)
        r = Relu (h)
        y = Gemm <transB = 1> (r, w3, b3)
    }""")
    assert (units, why) == ([4, 6], "")


def test_a_bias_that_is_computed_ties():
    units, _ = pruned("""
    g (float[2,3] x) => (float[2,2] y) <float[3,6] w1, float[3,6] w2, float[6,2] w3> {
        c = MatMul (x, w1)
        h = Gemm (x, w2, c)
        r = Relu (h)
        y = MatMul (r, w3)
    }""")
    assert units == [6]


def test_what_a_product_sums_up_is_cut_on_both_sides():
    units, why = pruned("""
    g (float[N,5,3] x) => (float[N,5,2] y) <float[3,4] wq, float[3,4] wk, float[3,6] wv, float[6,2] wo> {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        t = Transpose <perm = [0,2,1]> (k)
        s = MatMul (q, t)
        p = Softmax (s)
        o = MatMul (p, v)
        y = MatMul (o, wo)
    }""")
    assert (units, why) == ([4, 6], "")


ATTENTION = """
g (float[N,5,3] x) => (float[N,5,2] y) <float[3,8] wq, float[3,{k}] wk, float[3,8] wv, float[8,2] wo,
  int64[4] heads = {{0,5,4,2}}, int64[4] keys = {{0,5,{h},2}}, int64[3] join = {{0,5,8}}, float[2] s{more}> {{
    q = MatMul (x, wq)
    q1 = Reshape (q, heads)
    q2 = LayerNormalization (q1, s)
    q3 = Transpose <perm = [0,2,1,3]> (q2)
    k = MatMul (x, wk)
    k1 = Reshape (k, keys)
    k2 = Transpose <perm = [0,2,3,1]> (k1)
    v = MatMul (x, wv)
    v1 = Reshape (v, heads)
    v2 = Transpose <perm = [0,2,1,3]> (v1)
    a = MatMul (q3, k2)
    {line}
    p = Softmax (m)
    o = MatMul (p, v2)
    o1 = Transpose <perm = [0,2,1,3]> (o)
    o2 = Reshape (o1, join)
    y = MatMul (o2, wo)
}}"""


def test_heads_are_cut_as_wholes_with_their_norms_and_biases():
    text = ATTENTION.format(k=8, h=4, more=", float[4,5,5] bias", line="m = Add (a, bias)")
    model = zoo.model(text)
    found = groups(model)
    assert [group.units for group in found] == [4]
    assert set(found[0].producers) == {"q", "k", "v"} and found[0].consumers == ("y",)
    assert pruned(text) == ([4], "")
    result = cut(model, {"q": [2]})
    assert [list(node.inputs[1].shape) for node in nodes(result, "MatMul")[:3]] == [[3, 6]] * 3


def test_keys_that_all_heads_share_stay():
    units, _ = pruned(ATTENTION.format(k=2, h=1, more="", line="m = Identity (a)"))
    assert units == [4]


# ------------------------------------------------------------------------------------------- constants


def test_layers_that_share_a_weight_are_cut_alike():
    text = """
    g (float[N,4,4,4] x, float[N,4,8,8] z) => (float[N,2,4,4] y, float[N,2,8,8] u)
    <float[6,4,1,1] w, float[6] b, float[2,6,1,1] v> {
        a = Conv (x, w, b)
        c = Conv (a, v)
        y = Relu (c)
        d = Conv (z, w, b)
        u = Conv (d, v)
    }"""
    assert pruned(text) == ([6], "")
    result = cut(zoo.model(text), {"a": [0, 3]})
    assert {name: list(value.shape) for name, value in result.graph.initializers.items()} == {
        "w": [4, 4, 1, 1], "b": [4], "v": [2, 4, 1, 1],
    }  # fmt: skip


def test_other_constants_that_are_shared_are_cut_apart():
    text = """
    g (float[N,3,4,4] x) => (float[N,6,4,4] y) <float[6,3,1,1] w, float[6,6,1,1] w2, float[6,6,1,1] w3, float[6] b> {
        a = Conv (x, w, b)
        c = Conv (a, w2, b)
        y = Conv (c, w3, b)
    }"""
    assert pruned(text) == ([6, 6], "")
    result = cut(zoo.model(text), {"a": [0, 3]})
    assert [list(node.inputs[2].shape) for node in nodes(result, "Conv")] == [[4], [6], [6]]


def test_a_weight_read_in_two_ways_is_refused():
    units, why = pruned("""
    g (float[N,6] x) => (float[N,6] y) <float[6,6] w> {
        a = Gemm (x, w)
        b = Relu (a)
        y = Gemm <transB = 1> (b, w)
    }""")
    assert units == [] and "" in why


def test_what_callers_give_or_read_stays():
    units, why = pruned("""
    g (float[N,3,4,4] x, float[6,3,1,1] w) => (float[N,2,4,4] y, float[2,6,1,1] v)
    <float[6,3,1,1] w, float[2,6,1,1] v, float[6,6,1,1] u> {
        a = Conv (x, w)
        b = Conv (a, u)
        y = Conv (b, v)
    }""")
    assert units == [6] and "its weight is computed at run time" in why


def test_a_layer_whose_output_is_read_in_a_body_stays():
    units, why = pruned("""
    g (float[1,3,4,4] x, bool c) => (float[1,1,4,4] y, float[1,4,4,4] z) <float[4,3,1,1] w1, float[1,4,1,1] w2> {
        a = Conv (x, w1)
        y = Conv (a, w2)
        z = If (c) <then_branch = yes () => (float[1,4,4,4] t) { t = Relu (a) },
                    else_branch = no () => (float[1,4,4,4] e) { e = Neg (a) }>
    }""")
    assert units == [] and "control-flow" in why


# ------------------------------------------------------------------------------------------- dimensions as data


def test_a_target_shape_that_is_computed_gets_the_new_lengths():
    units, why = between(
        "s = Shape (a)\nn = Gather (s, zero)\nn1 = Unsqueeze (n, at)\nr = Concat <axis = 0> (n1, rest)\n"
        "c = Reshape (a, r)\nt = Transpose <perm = [0,2,1,3,4]> (c)\nb = Reshape (t, s)",
        "int64 zero = {0}, int64[1] at = {0}, int64[4] rest = {2,3,4,4}",
    )
    assert (units, why) == ([3], "")


def test_sizes_and_expansions_from_shapes():
    lines = (
        "s = Shape <end = 2> (a)\nr = Concat <axis = 0> (s, to)\nc = Resize <mode = \"nearest\"> (a, , , r)\n"
        "m = GlobalAveragePool (c)\nf = Shape (c)\ne = Expand (m, f)\nb = Add (e, c)"
    )  # fmt: skip
    head = HEAD.replace("float[N,2,4,4] y", "float[N,2,7,7] y")
    assert between(lines, "int64[2] to = {7,7}", head) == ([6], "")


@pytest.mark.parametrize(
    "lines",
    [
        "s = Shape (a)\nf = Cast <to = 1> (s)\nm = ReduceSum (f)\nb = Mul (a, m)",
        "s = Size (a)\nf = Cast <to = 1> (s)\nb = Mul (a, f)",
        "s = Shape <start = 1, end = 2> (a)\nk = Mul (s, s)\nf = Cast <to = 1> (k)\nb = Mul (a, f)",
        "s = Shape (a)\nz = ConstantOfShape (s)\nb = Add (a, z)",
        "s = Shape (a)\nc = Gather (s, at)\nl = Identity (c)\nr = Concat <axis = 0> (l, rest)\n"
        "d = Reshape (x, r)\nm = ReduceMean <keepdims = 0> (d)\nb = Add (a, m)",
    ],
)
def test_a_number_of_channels_that_is_computed_with_pins(lines):
    units, why = between(lines, "int64[1] at = {1}, int64[1] rest = {-1}" if "rest" in lines else "")
    assert units == [] and ("number of channels" in why or "no rule for Size" in why)


def test_a_number_of_channels_that_callers_read_pins():
    units, why = pruned("""
    g (float[N,3,4,4] x) => (float[N,2,4,4] y, int64[4] s) <float[6,3,1,1] w1, float[2,6,1,1] w2> {
        a = Conv (x, w1)
        s = Shape (a)
        y = Conv (a, w2)
    }""")
    assert units == [] and "number of channels" in why


def test_the_number_of_images_is_free():
    units, why = between("s = Shape <end = 1> (a)\nf = Cast <to = 1> (s)\nb = Mul (a, f)")
    assert (units, why) == ([6], "")


def test_shape_inference_that_fails_pins_everything():
    model = zoo.model("""
    g (float[1,3,4,4] x) => (float[1,2,4,4] y) <float[6,3,1,1] w1, float[2,5,1,1] w2> {
        a = Conv (x, w1)
        y = Conv (a, w2)
    }""")
    found = groups(model)
    assert len(found) == 0
    assert isinstance(cut(model, {}), ir.Model) and found.refusals


def test_masks_have_the_type_of_what_they_mask():
    text = "g (float16[N,3,4,4] x) => (float16[N,2,4,4] y) <float16[6,3,1,1] a, float16[2,6,1,1] b>"
    model = zoo.model(text + " { c = Conv (x, a)\n y = Conv (c, b) }")
    masked = mask(model, {"c": [1]})
    factor = nodes(masked, "Mul")[0].inputs[1].const_value
    assert factor.dtype == ir.DataType.FLOAT16 and factor.numpy().reshape(-1).tolist() == [1, 0, 1, 1, 1, 1]
    assert np.array_equal(nodes(cut(model, {"c": [1]}), "Conv")[0].inputs[1].shape.numpy(), (5, 3, 1, 1))
