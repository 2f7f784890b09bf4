"""Scales, zero points and integer weights against hand-checked numbers and brute force."""

import numpy as np
import pytest
from edgec.compiler.types import Range
from edgec.passes.quant_params import (
    SMALLEST_SCALE,
    QParams,
    activation_params,
    quantize_bias,
    quantize_weight,
    weight_scales,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def test_asymmetric_by_hand():
    params = activation_params(Range(-1.0, 1.55), "uint8", symmetric=False)
    assert params.scale == pytest.approx(0.01, rel=1e-6)  # 2.55 / 255
    assert params.zero_point == 100


def test_relu_range_has_zero_point_zero():
    assert activation_params(Range(0.0, 6.0), "uint8", symmetric=False).zero_point == 0
    assert activation_params(Range(0.0, 6.0), "int8", symmetric=False).zero_point == -128


def test_positive_range_is_widened_to_hold_zero():
    params = activation_params(Range(2.0, 4.0), "uint8", symmetric=False)
    assert params.low == 0.0
    assert params.high == pytest.approx(4.0, rel=1e-6)


def test_symmetric_by_hand():
    params = activation_params(Range(-1.0, 2.54), "int8", symmetric=True)
    assert (params.scale, params.zero_point) == (pytest.approx(0.02, rel=1e-6), 0)


@pytest.mark.parametrize(("dtype", "largest"), [("float8e4m3fn", 448), ("float8e5m2", 57344)])
def test_small_floats_by_hand(dtype, largest):
    params = activation_params(Range(-1.0, 2.0), dtype, symmetric=True)
    assert (params.scale, params.zero_point) == (pytest.approx(2 / largest, rel=1e-6), 0)
    assert (params.low, params.high) == (pytest.approx(-2, rel=1e-6), pytest.approx(2, rel=1e-6))
    assert params == activation_params(Range(-1.0, 2.0), dtype, symmetric=False)  # they have no zero point


def test_sixteen_bits_by_hand():
    params = activation_params(Range(-1.0, 1.6767), "int16", symmetric=True)
    assert (params.scale, params.zero_point) == (pytest.approx(1.6767 / 32767, rel=1e-6), 0)
    params = activation_params(Range(0.0, 6.5535), "uint16", symmetric=False)
    assert (params.scale, params.zero_point) == (pytest.approx(1e-4, rel=1e-6), 0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_symmetric_unsigned_is_a_bug(dtype):
    with pytest.raises(ValueError, match="no negative number"):
        activation_params(Range(-1.0, 1.0), dtype, symmetric=True)


@pytest.mark.parametrize("span", [Range(0.0, 0.0), Range(0.0, 1e-45), Range(-1e-44, 0.0)])
def test_dead_tensor_keeps_a_usable_scale(span):
    assert activation_params(span, "uint8", symmetric=False).scale >= SMALLEST_SCALE


def test_impossible_parameters_are_a_bug():
    with pytest.raises(ValueError, match="no valid"):
        QParams(0.0, 0, "uint8")
    with pytest.raises(ValueError, match="no valid"):
        QParams(1.0, 256, "uint8")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from([("uint8", False), ("int8", False), ("int8", True)]))
def test_every_number_in_the_range_is_represented_within_half_a_step(a, b, kind):
    dtype, symmetric = kind
    low, high = sorted((a, b))
    params = activation_params(Range(low, high), dtype, symmetric)
    # asymmetric: rounding the zero point may shift an end by up to half a step, on top of the rounding itself
    assert params.low <= min(low, 0) + 0.51 * params.scale
    assert params.high >= max(high, 0) - 0.51 * params.scale


def test_weight_scales_per_channel_and_per_tensor():
    weight = np.array([[1.27, -0.1], [0.0, 2.54]], dtype=np.float32)
    assert weight_scales(weight, 0, 127, None, 1.0) == pytest.approx([0.01, 0.02], rel=1e-6)
    assert weight_scales(weight, 1, 127, None, 1.0) == pytest.approx([0.01, 0.02], rel=1e-6)
    assert weight_scales(weight, None, 127, None, 1.0) == pytest.approx([0.02], rel=1e-6)


def test_weight_scales_in_blocks():
    weight = np.array([[0.7, -0.1, 0.2, 1.4], [0.0, 0.0, -2.1, 0.3]], dtype=np.float32)
    np.testing.assert_allclose(weight_scales(weight, 1, 7, None, 1.0, 2), [[0.1, 0.2], [0.3, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(weight_scales(weight, 0, 7, None, 1.0, 2), [[0.1, 0.1 / 7, 0.3, 0.2]], rtol=1e-6)
    scales = np.array([[0.1, 0.2], [0.3, 0.3]], np.float32)
    assert quantize_weight(weight, scales, 1, 7, 2).tolist() == [[7, -1, 1, 7], [0, 0, -7, 1]]


def test_reduced_range_halves_the_integers():
    weight = np.array([[1.0, -1.0]], dtype=np.float32)
    scales = weight_scales(weight, 0, 63, None, 1.0)
    assert quantize_weight(weight, scales, 0, 63).tolist() == [[63, -63]]


def test_zero_channel_gets_a_positive_scale():
    weight = np.array([[0.0, 0.0], [1.27, 0.0]], dtype=np.float32)
    scales = weight_scales(weight, 0, 127, None, 1.0)
    assert (scales > 0).all()
    assert quantize_weight(weight, scales, 0, 127)[0].tolist() == [0, 0]


def test_large_bias_over_tiny_weights_still_fits_into_int32():
    weight, bias = np.full((1, 4), 1e-12, np.float32), np.array([5.0], np.float32)
    scales = weight_scales(weight, 0, 127, bias, 0.01)
    integers, bias_scales = quantize_bias(bias, scales, 0.01)
    assert abs(int(integers[0])) < 2**31
    # the scale is just large enough, so the bias keeps nearly 31 bits
    assert float(integers[0]) * float(bias_scales[0]) == pytest.approx(5.0, rel=1e-6)


def test_rounding_is_half_to_even_as_in_onnx():
    scales = np.array([1.0], np.float32)
    weight = np.array([[0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    assert quantize_weight(weight, scales, 0, 127).tolist() == [[0, 2, 2, 0, -2]]
