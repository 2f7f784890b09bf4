"""A MatMul's bias is the constant that an Add behind it adds: found, shifted exactly, and nothing else touched."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgec.backends import ort as ort_backend
from edgec.compiler.fitting.layerwise import walk
from edgec.compiler.quantization.sensitivity import layer_errors
from edgec.compiler.types import QuantScheme
from edgec.passes.bias import added_bias, takes_shift
from edgec.passes.quantize import Quantize
from test_quantize import build, ranges_of, run
from test_sensitivity import Batch

INT8 = ort_backend.SCHEMES[0][1]
W4 = QuantScheme("w4", None, True, weight="int4", weight_max=7, bias="float32", cast_weights=True)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def net(
    body="m = MatMul (x, w)\n y = Add (m, c)", bias=(6,), head="g (float[N, 5, 8] x) => (float[N, 5, 6] y)", **more
):
    return build(f"{head} {{ {body} }}", w=numbers(8, 6), c=numbers(*bias, seed=1), **more)


def matmul(model):
    return next(n for n in model.graph if n.op_type == "MatMul")


def quantized(model, feed, scheme=INT8, **options):
    model = model.clone()
    ranges = ranges_of(model, ort_backend.SUPPORTS, feed)
    if scheme is W4:
        model.opset_imports[""] = 21
    result = Quantize(ranges, ort_backend.SUPPORTS, scheme, **options)(model)
    assert result.modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


# ------------------------------------------------------------------------------------------ finding it


def test_the_add_of_a_constant_is_found_on_either_side():
    for body, place in (("m = MatMul (x, w)\n y = Add (m, c)", 1), ("m = MatMul (x, w)\n y = Add (c, m)", 0)):
        node = matmul(net(body))
        add, index = added_bias(node)
        assert (add.op_type, index) == ("Add", place)
        assert takes_shift(node)


@pytest.mark.parametrize("body, head", [
    ("m = MatMul (x, w)\n y = Sub (m, c)", None),
    ("m = MatMul (x, w)\n r = Relu (m)\n y = Add (r, c)", None),
    ("m = MatMul (x, w)\n a = Add (m, c)\n y = Mul (a, m)", None),
    ("m = MatMul (x, w)\n a = Add (m, c)\n y = Add (a, m)", None),
    ("m = MatMul (x, w)\n y = Add (m, m)\n z = Relu (c)", None),
    ("m = MatMul (x, w)\n k = Relu (c)\n y = Add (m, k)", None),
    ("m = MatMul (x, w)\n y = Add (m, c)", "g (float[N, 5, 8] x) => (float[N, 5, 6] m, float[N, 5, 6] y)"),
    ("m = MatMul (x, w)\n y = Add (m, c)", "g (float[N, 5, 8] x, float[6] c) => (float[N, 5, 6] y)"),
])  # fmt: skip
def test_what_is_no_bias_is_left_alone(body, head):
    model = net(body) if head is None else net(body, head=head)
    assert added_bias(matmul(model)) is None and not takes_shift(matmul(model))


def test_other_layers_have_a_bias_of_their_own():
    model = build("g (float[N, 8] x) => (float[N, 6] y) { y = Gemm (x, w) }", w=numbers(8, 6))
    node = next(iter(model.graph))
    assert added_bias(node) is None and takes_shift(node)


# ------------------------------------------------------------------------------------------ shifting it


@pytest.mark.parametrize("bias", [(6,), (1,), (), (5, 6), (5, 1), (1, 1, 6)])
@pytest.mark.parametrize("scheme", [INT8, W4])
def test_the_output_moves_by_the_shift_and_by_nothing_else(bias, scheme):
    model, feed = net(bias=bias), {"x": numbers(3, 5, 8, seed=2)}
    shift = numbers(6, seed=3).astype(np.float64)
    (before,) = run(quantized(model, feed, scheme), feed)
    moved = quantized(model, feed, scheme, bias_shift={"MatMul_0": shift})
    (after,) = run(moved, feed)
    np.testing.assert_allclose(after - before, np.broadcast_to(shift, after.shape), rtol=0, atol=2e-6)  # float32 sums
    assert after.shape == before.shape
    assert sum(n.op_type == "Add" for n in moved.graph) == 1, "no operator more"


def test_others_who_read_the_constant_read_what_they_did():
    model = net("m = MatMul (x, w)\n y = Add (m, c)\n z = Mul (x2, c)",
                head="g (float[N, 5, 8] x, float[N, 6] x2) => (float[N, 5, 6] y, float[N, 6] z)")  # fmt: skip
    feed = {"x": numbers(3, 5, 8), "x2": numbers(3, 6, seed=5)}
    shift = numbers(6, seed=3)
    y, z = run(quantized(model, feed), feed)
    shifted_y, same_z = run(quantized(model, feed, bias_shift={"MatMul_0": shift}), feed)
    np.testing.assert_allclose(shifted_y - y, np.broadcast_to(shift, y.shape), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(same_z, z)


def test_a_shift_of_a_matmul_without_a_bias_goes_nowhere():
    model, feed = net("y = MatMul (x, w)\n z = Relu (c)"), {"x": numbers(3, 5, 8)}
    plain, shifted = (quantized(model, feed, bias_shift=s) for s in ({}, {"MatMul_0": numbers(6)}))
    assert ir.to_proto(plain).SerializeToString() == ir.to_proto(shifted).SerializeToString()


# ------------------------------------------------------------------------------------------ measuring it


@pytest.mark.parametrize("head", [
    "g (float[N, 5, 8] x) => (float[N, 5, 6] y)", "g (float[N, 8] x) => (float[N, 6] y)",
    "g (float[N, 2, 5, 8] x) => (float[N, 2, 5, 6] y)",
])  # fmt: skip
def test_the_measured_shift_is_the_mean_error_per_channel(head):
    model = net(head=head)
    shape = [4, *(d for d in model.graph.inputs[0].shape[1:])]
    feeds = [{"x": numbers(*shape, seed=i)} for i in (1, 2)] + [{"x": numbers(1, *shape[1:], seed=3)}]
    whole = {"x": np.concatenate([f["x"] for f in feeds])}
    small = replace(INT8, weight_max=7)  # errors far above those of float32 sums
    coarse = quantized(model, whole, small)
    errors = layer_errors(model, coarse, [Batch(f, len(f["x"])) for f in feeds], images=9)
    (exact,), (got,) = run(model, whole), run(coarse, whole)
    lost = (exact - got).astype(np.float64)
    (found,) = errors.values()
    axes = tuple(range(lost.ndim - 1))
    np.testing.assert_allclose(found.shift, lost.mean(axes), rtol=0, atol=1e-5 * np.abs(lost).max())
    energies = (exact.astype(np.float64) ** 2).sum(), (lost**2).sum()
    assert found.sqnr_db == pytest.approx(10 * np.log10(energies[0] / energies[1]), abs=1e-3)
    corrected = quantized(model, whole, small, bias_shift={"MatMul_0": found.shift})
    (after,) = run(corrected, whole)
    np.testing.assert_allclose((exact - after).astype(np.float64).mean(axes), 0, atol=1e-5 * np.abs(lost).max())
    again = layer_errors(model, corrected, [Batch(f, len(f["x"])) for f in feeds], images=9)
    assert again["MatMul_0"].sqnr_db > found.sqnr_db


def test_the_walk_shifts_it_too():
    model, feed = net(), {"x": numbers(4, 5, 8)}
    coarse = quantized(model, feed, replace(INT8, weight_max=7))
    (step,) = walk(model, coarse, [feed], None)
    (exact,), (got,) = run(model, feed), run(coarse, feed)
    np.testing.assert_allclose(step.shift, (exact - got).astype(np.float64).mean((0, 1)), rtol=0, atol=1e-5)


def test_the_walk_makes_up_for_the_skip_branch_behind_the_bias():
    """What the residual Add adds is off by a known amount: the bias takes that, too."""
    body = "r = MatMul (x, w0)\n m = MatMul (x, w)\n b = Add (m, c)\n y = Add (b, r)"
    model, feed = net(body, w0=numbers(8, 6, seed=7)), {"x": numbers(4, 5, 8)}
    coarse = quantized(model, feed, replace(INT8, weight_max=7))
    steps = {s.node: s for s in walk(model, coarse, [feed], None)}
    (exact,), (got,) = run(model, feed), run(coarse, feed)
    assert steps["MatMul_0"].shift is None
    np.testing.assert_allclose(steps["MatMul_1"].shift, (exact - got).astype(np.float64).mean((0, 1)), atol=1e-5)


def test_a_shape_of_a_rounded_tensor_is_no_layer():
    """It is there in both networks, reads a dequantized tensor, and gives no numbers that could be off."""
    body = "m = MatMul (x, w)\n r = Relu (m)\n n = MatMul (r, v)\n d = Shape (r)\n y = Add (n, c)\n z = Identity (d)"
    head = "g (float[N, 5, 8] x) => (float[N, 5, 6] y, int64[3] z)"
    model, feed = net(body, head=head, v=numbers(6, 6)), {"x": numbers(4, 5, 8)}
    coarse = quantized(model, feed)
    shape = next(n for n in coarse.graph if n.op_type == "Shape")
    source = next(n for n in coarse.graph if n.op_type == "DequantizeLinear" and n.outputs[0].name.startswith("r"))
    shape.replace_input_with(0, source.outputs[0])
    assert set(layer_errors(model, coarse, [Batch(feed, 4)], images=4)) == {"MatMul_0", "MatMul_2"}
