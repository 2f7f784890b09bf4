"""High biases move behind the ReLU: equal where the ReLU never clips, refused where it would not be."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler import model as model_io
from edgec.passes.absorb_bias import AbsorbHighBias
from equivalence import assert_equivalent, session

RTOL = 1e-5  # one float32 sum is made in another order
HIGH = {"b1": np.array([50.0, 0.0, 60.0, 55.0])}  # 3 channels whose bias exceeds any sum over normal inputs

CHAIN = """
g (float[N,3,5,5] x) => (float[N,2,3,3] y, float[N,4,5,5] z) <float[4,3,1,1] w1, float[4] b1, float[2,2,3,3] w2,
  float[4,1,1,1] w3, float[4] b3> {
    h = Conv (x, w1, b1)
    r = Relu (h)
    y = Conv <group = 2> (r, w2)
    z = Conv <group = 4> (r, w3, b3)
}"""
DENSE = """
g (float[N,3] x) => (float[N,2] y) <float[3,4] w1, float[4] b1, float[2,4] w2, float[1,2] b2> {
    h = Gemm <beta = 2.0> (x, w1, b1)
    r = Relu (h)
    y = Gemm <transB = 1, alpha = 0.5, beta = 3.0> (r, w2, b2)
}"""
TRANSPOSED = """
g (float[N,3,3,3] x) => (float[N,2,6,6] y) <float[3,4,2,2] w1, float[4] b1, float[2,4,1,1] w2> {
    h = ConvTranspose <strides = [2,2]> (x, w1, b1)
    r = Relu (h)
    y = Conv (r, w2)
}"""


def minima(model, seeds=(0, 1)):
    """The smallest value of each channel of h, over the inputs on which the models are compared."""
    from equivalence import sample

    tapped = model.clone()
    h = next(v for n in tapped.graph for v in n.outputs if v.name == "h")
    h.type = ir.TensorType(ir.DataType.FLOAT)
    h.shape = ir.Shape([None] * len(model.graph.inputs[0].shape))
    tapped.graph.outputs.append(h)
    opened = session(tapped)
    found = [opened.run(["h"], sample(opened, seed))[0] for seed in seeds]
    return np.min([np.moveaxis(array, 1, 0).reshape(array.shape[1], -1).min(1) for array in found], axis=0)


@pytest.mark.parametrize("text", [CHAIN, DENSE, TRANSPOSED])
def test_the_outputs_are_equal_and_the_activation_is_smaller(text):
    before = zoo.model(text, HIGH)
    low = minima(before)
    assert (low > 0).sum() == 3
    after = model_io.copy(before)
    result = AbsorbHighBias({"h": low}, margin=0.05).apply(after)
    assert result.modified and result.rewrites == 1 and result.refusals == ()
    onnx.checker.check_model(model_io.serialize(after), full_check=True)
    assert_equivalent(before, after, rtol=RTOL)
    np.testing.assert_allclose(minima(after), low - 0.95 * np.maximum(low, 0), rtol=1e-4, atol=1e-4)


def test_only_what_is_always_there_is_moved():
    before = zoo.model(CHAIN)  # biases around 0: the ReLU clips
    low = minima(before)
    assert (low <= 0).all()
    after = model_io.copy(before)
    assert not AbsorbHighBias({"h": low}).apply(after).modified
    assert not AbsorbHighBias().apply(after).modified


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("y = Conv <group = 2> (r, w2)", "y = Conv <group = 2, pads = [1,1,1,1]> (r, w2)"), "pads its input"),
        (("y = Conv <group = 2> (r, w2)", 'y = Conv <group = 2, auto_pad = "SAME_UPPER"> (r, w2)'), "pads its input"),
        (("y = Conv <group = 2> (r, w2)", "y = AveragePool <kernel_shape = [3,3]> (r)"), "AveragePool reads"),
        (("r = Relu (h)", "r = LeakyRelu (h)"), "no Relu alone"),
        (("z = Conv <group = 4> (r, w3, b3)", "z = Neg (h)"), "no Relu alone"),
        (("z = Conv <group = 4> (r, w3, b3)", "z = Conv <group = 4> (r, w3, b1)"), "b1 is shared"),
        (("float[N,4,5,5] z", "float[N,4,5,5] z, float[N,4,5,5] r"), "r is a graph output"),
    ],
)
def test_refusals_are_named_and_change_nothing(change, why):
    assert change[0] in CHAIN
    model = zoo.model(CHAIN.replace(*change), HIGH)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = AbsorbHighBias({"h": np.full(4, 9.0)}).apply(model)
    assert not result.modified and ir.to_proto(model).SerializeToString(deterministic=True) == before
    (refusal,) = result.refusals
    assert why in refusal.why and refusal.rule == "absorb-high-bias" and refusal.node


def test_minima_of_another_length_are_refused():
    result = AbsorbHighBias({"h": np.ones(3)}).apply(zoo.model(CHAIN, HIGH))
    assert "3" in result.refusals[0].why
