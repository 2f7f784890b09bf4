"""The helper that every other test leans on must itself be able to fail."""

import numpy as np
import pytest
import zoo
from equivalence import assert_equivalent

RTOL = 1e-5  # the very same graph; nothing but the deliberate faults below may differ

GRAPH = """
g (float[N,3,4,4] x) => (float[N,4,4,4] y) <float[4,3,3,3] w, float[4] b> {
    y = Conv <pads = [1,1,1,1]> (x, w, b)
}
"""


def with_weight(change):
    model = zoo.model(GRAPH)
    weight = model.graph.initializers["w"]
    array = weight.const_value.numpy().copy()
    change(array)
    weight.const_value = zoo.ir.tensor(array, name="w")
    return model


def larger(w):
    w *= 1.01


def swapped(w):
    w[[0, 1]] = w[[1, 0]]


def broken(w):
    w[0, 0, 0, 0] = np.nan


def untouched(w):
    pass


def test_a_model_equals_itself():
    assert_equivalent(zoo.model(GRAPH), with_weight(untouched), rtol=RTOL)


@pytest.mark.parametrize("change", [larger, swapped, broken])
def test_another_weight_is_noticed(change):
    with pytest.raises(AssertionError):
        assert_equivalent(zoo.model(GRAPH), with_weight(change), rtol=RTOL)


def test_what_turns_finite_is_noticed():
    with pytest.raises(AssertionError):
        assert_equivalent(with_weight(broken), zoo.model(GRAPH), rtol=RTOL)


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv <pads = [1,1,1,1]> (x, w, b)  zero = Sub (c, c)  y = Add (zero, zero)",
        "c = Conv <pads = [1,1,1,1]> (x, w, b)  d = Cast <to = 11> (c)  y = Cast <to = 10> (d)",
        "c = Conv <pads = [1,1,1,1]> (x, w, b)  y = Concat <axis = 0> (c, c)",
        "z = Conv <pads = [1,1,1,1]> (x, w, b)",
    ],
    ids=["a zeroed output", "another type", "another shape", "another name"],
)
def test_another_output_is_noticed(body):
    out = "z" if body.startswith("z") else "y"
    text = f"g (float[N,3,4,4] x) => ({out}) <float[4,3,3,3] w, float[4] b> {{ {body} }}"
    with pytest.raises(AssertionError):
        assert_equivalent(zoo.model(GRAPH), zoo.model(text), rtol=RTOL)


def test_a_difference_at_one_seed_is_enough():
    always = zoo.model("g (float[N,3] x, bool c) => (float[N,3] y) { y = Identity (x) }")
    sometimes = zoo.model("g (float[N,3] x, bool c) => (float[N,3] y) { z = Neg (x)  y = Where (c, x, z) }")
    with pytest.raises(AssertionError):
        assert_equivalent(always, sometimes, rtol=RTOL, seeds=range(8))


def test_integers_are_compared_exactly():
    before = zoo.model("g (int64[N,4] x) => (int64[N,4] y) { y = Identity (x) }")
    after = zoo.model("g (int64[N,4] x) => (int64[N,4] y) <int64 k = {1}> { y = Add (x, k) }")
    with pytest.raises(AssertionError):
        assert_equivalent(before, after, rtol=1.0)


def test_the_tolerance_is_stated_and_one_seed_is_too_few():
    model = zoo.model(GRAPH)
    with pytest.raises(TypeError):
        assert_equivalent(model, model)
    with pytest.raises(AssertionError):
        assert_equivalent(model, model, rtol=RTOL, seeds=[0])


def test_given_inputs_are_used():
    before = zoo.model("g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }")
    after = zoo.model("g (float[N,3] x) => (float[N,3] y) { y = Identity (x) }")
    assert_equivalent(before, after, rtol=RTOL, inputs={"x": np.ones((2, 3), np.float32)})
    with pytest.raises(AssertionError):
        assert_equivalent(before, after, rtol=RTOL, inputs={"x": -np.ones((2, 3), np.float32)})
