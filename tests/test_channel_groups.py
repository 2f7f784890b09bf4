"""Which channels belong together, on small graphs where that can be said by hand; and what is refused, by name."""

import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.passes.channel_groups import PINNED, analyse
from edgec.passes.channel_layout import plan, shrink


def analysed(text, *, opset=17, **weights):
    model = zoo.model(text, weights, opset=opset)
    return analyse(model)


def ids(found, name):
    return found.channels(name)[1]


def whys(found):
    return {r.node: r.why for r in found.refusals}


# ------------------------------------------------------------------------------------------- reshaping


@pytest.mark.parametrize(
    ("sizes", "before", "after", "want"),
    [
        ((1, 4, 1, 1), (1, 4, 5, 5), (2, 2, 25), ((), (1, 4, 1, 1), (2, 2, 1))),
        ((1, 4, 1, 1), ("n", 4, "h", "w"), ("n", 2, 2, "h", "w"), ((), (1, 4, 1, 1), (1, 2, 2, 1, 1))),
        ((1, 4, 1, 1), ("n", 4, "h", "w"), (None, 4, None), ((0, 1, 2, 3), (1, 1, 1, 1), (1, 1, 1))),
        ((1, 4, 1, 1), (None, 4, "h", "w"), (None, 4, "h", "w"), ((), (1, 4, 1, 1), (1, 4, 1, 1))),
        ((1, 4), (0, 4), (4, 0), ((0, 1), (1, 1), (1, 1))),
        ((1, 4, 1, 1), ("n", 4, 3, 3), (None, 36), ((), (1, 4, 3, 3), (1, 36))),
        ((1, 4, 1, 1), ("n", 4, 3, 3), ("n", None), ((), (1, 4, 3, 3), (1, 36))),
        ((1, 4, 1, 1), ("n", 4, 1, 1), ("n", 4), ((), (1, 4, 1, 1), (1, 4))),
        ((1, 4, 1, 1), ("n", 4, "h", 3), ("n", None), ((1, 2, 3), (1, 1, 1, 1), (1, 1))),
        ((1, 4, 1), (2, 4, 3), (4, 2, 3), ((), (2, 4, 1), (4, 2, 1))),
        ((1, 4, 1), ("n", 4, 3), (4, None, 3), ((0, 1), (1, 1, 1), (1, 1, 1))),
    ],
)
def test_a_reshape_is_split_where_it_can_be(sizes, before, after, want):
    assert tuple(plan(sizes, before, after)) == want


def test_shrink_drops_what_nothing_depends_on():
    array = np.broadcast_to(np.arange(3).reshape(1, 3, 1), (2, 3, 4))
    assert shrink(array).shape == (1, 3, 1)
    np.testing.assert_array_equal(shrink(array).reshape(-1), [0, 1, 2])


# ------------------------------------------------------------------------------------------- what is tied to what


def test_a_residual_add_ties_and_a_relu_hands_on():
    found = analysed("""
    g (float[N,3,8,8] x) => (float[N,2,8,8] y) <float[4,3,1,1] w1, float[4,4,1,1] w2, float[2,4,1,1] w3> {
        a = Conv (x, w1)
        b = Relu (a)
        c = Conv (b, w2)
        d = Add (c, b)
        e = Relu (d)
        y = Conv (e, w3)
    }""")
    assert found.count == 5
    assert sorted(ids(found, "a")) == [1, 2, 3, 4]
    for name in "bcde":
        assert found.channels(name)[0] == 1
        np.testing.assert_array_equal(ids(found, name), ids(found, "a"))
    assert (ids(found, "y") == PINNED).all()
    assert found.pinned.tolist() == [True, False, False, False, False]
    assert [layer.node.outputs[0].name for layer in found.layers] == ["a", "c", "y"]


def test_an_option_a_shortcut_ties_the_old_channels_to_the_middle_of_the_new():
    found = analysed("""
    g (float[N,2,8,8] x) => (float[N,1,4,4] y) <float[2,2,1,1] w1, float[4,2,1,1] w2, float[1,4,1,1] w3,
      int64[2] from = {0,0}, int64[2] to = {9,9}, int64[2] axes = {2,3}, int64[2] steps = {2,2},
      int64[8] pads = {0,1,0,0,0,1,0,0}> {
        a = Conv (x, w1)
        s = Slice (a, from, to, axes, steps)
        p = Pad (s, pads)
        b = Conv <strides = [2,2]> (a, w2)
        c = Add (b, p)
        y = Conv (c, w3)
    }""")
    assert found.count == 5  # two of a, and the two where zeros are added
    np.testing.assert_array_equal(ids(found, "b")[1:3], ids(found, "a"))
    assert len(set(ids(found, "b"))) == 4 and found.refusals == ()


def test_a_channel_shuffle_is_a_permutation():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[6,3,1,1] w1, float[1,6,1,1] w2,
      int64[5] split = {0,2,3,4,4}, int64[4] join = {0,6,4,4}> {
        a = Conv (x, w1)
        r = Reshape (a, split)
        t = Transpose <perm = [0,2,1,3,4]> (r)
        b = Reshape (t, join)
        y = Conv (b, w2)
    }""")
    np.testing.assert_array_equal(ids(found, "b"), ids(found, "a")[[0, 3, 1, 4, 2, 5]])


def test_a_channel_shuffle_through_the_batch_axis_as_in_shufflenet():
    found = analysed("""
    g (float[1,3,4,4] x) => (float[1,1,4,4] y, float[1,1,4,4] z) <float[6,3,1,1] w1, float[1,3,1,1] w2,
      float[1,3,1,1] w3, int64[3] split = {3,2,16}, int64[5] join = {2,-1,3,4,4}, int64 zero = {0}, int64 one = {1}> {
        a = Conv (x, w1)
        r = Reshape (a, split)
        t = Transpose <perm = [1,0,2]> (r)
        j = Reshape (t, join)
        b = Gather <axis = 0> (j, zero)
        c = Gather <axis = 0> (j, one)
        y = Conv (b, w2)
        z = Conv (c, w3)
    }""")
    np.testing.assert_array_equal(ids(found, "b"), ids(found, "a")[::2])
    np.testing.assert_array_equal(ids(found, "c"), ids(found, "a")[1::2])


def test_concat_split_and_gather_take_parts():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[2,3,1,1] w1, float[3,3,1,1] w2, float[1,2,1,1] w3,
      int64[2] parts = {1,4}, int64[2] which = {3,0}> {
        a = Conv (x, w1)
        b = Conv (x, w2)
        c = Concat <axis = 1> (a, b)
        p, q = Split <axis = 1> (c, parts)
        r = Gather <axis = 1> (q, which)
        y = Conv (r, w3)
    }""")
    whole = [*ids(found, "a"), *ids(found, "b")]
    np.testing.assert_array_equal(ids(found, "c"), whole)
    np.testing.assert_array_equal(ids(found, "q"), whole[1:])
    np.testing.assert_array_equal(ids(found, "r"), [whole[4], whole[1]])


def test_concat_of_pixels_ties_when_a_conv_reads_them():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,8,4] y) <float[2,3,1,1] w1, float[2,3,1,1] w2, float[1,2,1,1] w3> {
        a = Conv (x, w1)
        b = Conv (x, w2)
        c = Concat <axis = 2> (a, b)
        y = Conv (c, w3)
    }""")
    np.testing.assert_array_equal(ids(found, "a"), ids(found, "b"))
    assert found.count == 3


def test_flatten_repeats_each_channel_for_its_pixels():
    found = analysed("""
    g (float[N,3,2,2] x) => (float[N,5] y) <float[2,3,1,1] w1, float[8,5] w2, float[5] b> {
        a = Conv (x, w1)
        f = Flatten (a)
        y = Gemm (f, w2, b)
    }""")
    np.testing.assert_array_equal(ids(found, "f"), np.repeat(ids(found, "a"), 4))


def test_depthwise_and_batch_norm_begin_new_variables():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,2,2] y) <float[4,3,1,1] w1, float[8,1,3,3] w2,
      float[8] scale, float[8] bias, float[8] mean, float[8] var, float[1,8,1,1] w3> {
        a = Conv (x, w1)
        b = Conv <group = 4> (a, w2)
        n = BatchNormalization (b, scale, bias, mean, var)
        r = Relu (n)
        y = Conv (r, w3)
    }""")
    assert found.count == 1 + 4 + 8 + 8
    assert not set(ids(found, "b")) & set(ids(found, "n"))


def test_a_gate_is_pinned_and_the_main_branch_goes_through():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[4,3,1,1] w1, float[2,4,1,1] w2, float[4,2,1,1] w3,
      float[1,4,1,1] w4> {
        a = Conv (x, w1)
        p = GlobalAveragePool (a)
        s = Conv (p, w2)
        t = Relu (s)
        u = Conv (t, w3)
        v = Sigmoid (u)
        m = Mul (v, a)
        y = Conv (m, w4)
    }""")
    np.testing.assert_array_equal(ids(found, "m"), ids(found, "a"))
    assert PINNED not in ids(found, "a") and PINNED not in ids(found, "s")
    assert (ids(found, "u") == PINNED).all()
    assert "Sigmoid" in " ".join(whys(found).values())


def test_a_square_is_no_gate():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[4,3,1,1] w1, float[1,4,1,1] w2> {
        a = Conv (x, w1)
        m = Mul (a, a)
        y = Conv (m, w2)
    }""")
    assert (ids(found, "a") == PINNED).all()


def test_attention_keeps_the_columns_of_the_values():
    found = analysed("""
    g (float[N,5,6] x) => (float[N,5,6] y) <float[6,6] wq, float[6,6] wk, float[6,6] wv, float[6,6] wo,
      int64[4] heads = {0,5,2,3}, int64[3] joined = {0,5,6}> {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        v1 = Reshape (v, heads)
        v2 = Transpose <perm = [0,2,1,3]> (v1)
        q1 = Reshape (q, heads)
        q2 = Transpose <perm = [0,2,1,3]> (q1)
        k1 = Reshape (k, heads)
        k2 = Transpose <perm = [0,2,3,1]> (k1)
        s = MatMul (q2, k2)
        p = Softmax <axis = -1> (s)
        o = MatMul (p, v2)
        o1 = Transpose <perm = [0,2,1,3]> (o)
        o2 = Reshape (o1, joined)
        y = MatMul (o2, wo)
    }""")
    np.testing.assert_array_equal(ids(found, "o2"), ids(found, "v"))
    assert len(set(ids(found, "v")) - {PINNED}) == 6 and found.channels("o2")[0] == 2
    # q and k meet in a product, of which only k, the "values" there, could be free: softmax forbids it
    assert (ids(found, "q") == PINNED).all() and (ids(found, "k") == PINNED).all()


def test_a_reduction_over_channels_ties_them():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[4,3,1,1] w1, float[1,1,1,1] w2> {
        a = Conv (x, w1)
        m = ReduceMean <axes = [1]> (a)
        y = Conv (m, w2)
    }""")
    assert len(set(ids(found, "a"))) == 1 and PINNED not in ids(found, "a")


@pytest.mark.parametrize(("mode", "tied"), [("DCR", lambda c: c % 2), ("CRD", lambda c: c // 4)])
def test_depth_to_space_ties_the_channels_of_a_block(mode, tied):
    found = analysed(f"""
    g (float[N,3,4,4] x) => (float[N,1,8,8] y) <float[8,3,1,1] w1, float[1,2,1,1] w2> {{
        a = Conv (x, w1)
        d = DepthToSpace <blocksize = 2, mode = "{mode}"> (a)
        y = Conv (d, w2)
    }}""")
    np.testing.assert_array_equal(ids(found, "a"), ids(found, "d")[[tied(c) for c in range(8)]])


# ------------------------------------------------------------------------------------------- what is refused

HEAD = "g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[4,3,1,1] w1, float[1,4,1,1] w2"


@pytest.mark.parametrize(
    ("declared", "line", "why"),
    [
        ("", "b = Sigmoid (a)", "Sigmoid"),
        ("", "b = Elu (a)", "Elu"),
        ("float lo = {0.0}, float hi = {6.0}", "b = Clip (a, lo, hi)", "6.0"),
        ("int64[8] pads = {0,0,0,0,0,0,0,0}, float one = {1.0}", "b = Pad (a, pads, one)", "other than 0"),
        ("", "b = LRN <size = 3> (a)", "LRN"),
    ],
)
def test_what_does_not_commute_pins_and_is_named(declared, line, why):
    found = analysed(f"{HEAD}{', ' * bool(declared)}{declared}> {{ a = Conv (x, w1)\n{line}\ny = Conv (b, w2) }}")
    assert found.count == 1 or (ids(found, "a") == PINNED).all()
    assert any(why in text for text in whys(found).values()), found.refusals


def test_a_clip_at_zero_or_one_that_is_never_reached_is_a_relu():
    text = f"""{HEAD}, float lo = {{0.0}}, float hi = {{6.0}}> {{
        a = Conv (x, w1)
        b = Clip (a, lo)
        c = Clip (b, lo, hi)
        y = Conv (c, w2)
    }}"""
    model = zoo.model(text)
    assert analyse(model).count == 1
    assert analyse(model, {"c"}).count == 5


def test_shared_weights_are_pinned():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[3,3,1,1] w, float[1,3,1,1] w2> {
        a = Conv (x, w)
        b = Conv (a, w)
        y = Conv (b, w2)
    }""")
    assert found.count == 1
    assert any("shared" in text for text in whys(found).values())


def test_a_weight_that_callers_see_is_pinned():
    found = analysed("""
    g (float[N,3,4,4] x, float[3,3,1,1] w) => (float[N,1,4,4] y, float[3,3,1,1] v)
    <float[3,3,1,1] w = {1,2,3,4,5,6,7,8,9}, float[3,3,1,1] v, float[1,3,1,1] w2> {
        a = Conv (x, w)
        b = Conv (a, v)
        y = Conv (b, w2)
    }""")
    assert found.count == 1


def test_a_bias_that_must_stay_pins_the_outputs_only():
    found = analysed("""
    g (float[N,3,4,4] x) => (float[N,1,4,4] y, float[4] b) <float[4,3,1,1] w1, float[4,4,1,1] w2, float[4] b,
      float[1,4,1,1] w3> {
        a = Conv (x, w1)
        c = Conv (a, w2, b)
        y = Conv (c, w3)
    }""")
    assert PINNED not in ids(found, "a") and (ids(found, "c") == PINNED).all()
    assert any("b is a graph output" in text for text in whys(found).values())


def test_what_a_body_reads_is_pinned():
    found = analysed("""
    g (float[1,3,4,4] x, bool c) => (float[1,1,4,4] y, float[1,4,4,4] z) <float[4,3,1,1] w1, float[1,4,1,1] w2> {
        a = Conv (x, w1)
        y = Conv (a, w2)
        z = If (c) <then_branch = yes () => (float[1,4,4,4] t) { t = Relu (a) },
                    else_branch = no () => (float[1,4,4,4] e) { e = Neg (a) }>
    }""")
    assert (ids(found, "a") == PINNED).all()
    assert any("control-flow" in text for text in whys(found).values())


def test_float16_is_pinned():
    found = analysed("""
    g (float16[N,3,4,4] x) => (float16[N,1,4,4] y) <float16[4,3,1,1] w1, float16[1,4,1,1] w2> {
        a = Conv (x, w1)
        y = Conv (a, w2)
    }""")
    assert found.count == 1


def test_a_tensor_of_unknown_shape_is_pinned():
    model = zoo.model("""
    g (float[N,3,4,4] x, int64[K] shape) => (float y) <float[4,3,1,1] w1> {
        a = Conv (x, w1)
        b = Reshape (a, shape)
        c = Relu (b)
        y = ReduceSum <keepdims = 0> (c)
    }""")
    assert analyse(model).count == 1


@pytest.mark.parametrize("animal", zoo.ZOO)
def test_every_graph_can_be_analysed_and_is_left_as_it_was(animal):
    model = zoo.build(animal)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = analyse(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    for value in [*model.graph.inputs, *model.graph.outputs]:
        tensor = found.of(value)
        assert tensor is None or (tensor == PINNED).all(), value.name
    assert found.pinned.sum() == 1 and found.pinned[PINNED]
