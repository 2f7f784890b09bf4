"""Own rounding to 8-bit floats, and the packing of INT4, against ml_dtypes, ONNX and ONNX Runtime."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from edgec.passes.float8 import FLOAT8, round_to_float8
from edgec.passes.graph_builder import GraphBuilder, onnx_type

TYPES = {"float8e4m3fn": ml_dtypes.float8_e4m3fn, "float8e5m2": ml_dtypes.float8_e5m2}


def finite_codes(dtype: str) -> np.ndarray:
    """All finite numbers of the type, from its 256 codes, in order, each once."""
    values = np.arange(256, dtype=np.uint8).view(TYPES[dtype]).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_is_its_own_rounding(dtype):
    codes = finite_codes(dtype)
    np.testing.assert_array_equal(round_to_float8(codes, dtype), codes)
    assert codes.max() == FLOAT8[dtype].max
    assert len(codes) == {"float8e4m3fn": 253, "float8e5m2": 247}[dtype]  # +0 and -0 count once


@pytest.mark.parametrize("dtype", TYPES)
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearest(dtype):
    codes = finite_codes(dtype)
    low, high = codes[:-1], codes[1:]
    middle = (low + high) / 2
    even = low.astype(TYPES[dtype]).view(np.uint8) % 2 == 0
    np.testing.assert_array_equal(round_to_float8(middle, dtype), np.where(even, low, high))
    np.testing.assert_array_equal(round_to_float8(np.nextafter(middle, np.inf), dtype), high)
    np.testing.assert_array_equal(round_to_float8(np.nextafter(middle, -np.inf), dtype), low)


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_equals_ml_dtypes_and_onnx(dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=20000) * np.exp2(rng.integers(-20, 20, 20000))).astype(np.float32)
    clamped = np.clip(x, -FLOAT8[dtype].max, FLOAT8[dtype].max)
    np.testing.assert_array_equal(round_to_float8(x, dtype), clamped.astype(TYPES[dtype]).astype(np.float64))
    np.testing.assert_array_equal(
        round_to_float8(x, dtype), onnx.numpy_helper.saturate_cast(x, TYPES[dtype]).astype(np.float64)
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_equals_onnxruntime(dtype):
    x = np.random.default_rng(1).normal(size=4000).astype(np.float32) * 300
    text = f"g (float[N] x) => (float[N] y) {{ q = Cast <to = {int(onnx_type(dtype))}> (x)\n y = Cast <to = 1> (q) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 19]>\n{text}')
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(round_to_float8(x, dtype), session.run(None, {"x": x})[0])


def test_special_values():
    special = np.array([np.inf, -np.inf, np.nan, 0.0, 1e30, -1e-30])
    np.testing.assert_array_equal(round_to_float8(special, "float8e4m3fn"), [448.0, -448.0, np.nan, 0.0, 448.0, 0.0])
    # the smallest denormal is 2^-9; half of it is a tie, which goes to 0
    np.testing.assert_array_equal(round_to_float8(np.array([2**-10, 2**-9.99]), "float8e4m3fn"), [0.0, 2**-9])


def test_an_unknown_type_is_a_bug():
    with pytest.raises(KeyError):
        round_to_float8(np.zeros(1), "float8e8m0")


@pytest.mark.parametrize(
    ("numbers", "packed"),
    [([1, -2], "e1"), ([7, -8, 3], "8703"), ([0, 0, 0, -1], "00f0"), ([-7, 7, -1, 0, 5], "790f05")],
)
def test_int4_is_packed_low_nibble_first(numbers, packed):
    array = np.array(numbers, np.int8)
    assert GraphBuilder(ir.Graph([], [], nodes=[])).constant(
        "w", array.astype(ml_dtypes.int4)
    ).const_value.tobytes() == (bytes.fromhex(packed))


@pytest.mark.parametrize("count", [16, 15, 1])
def test_int4_is_unpacked_by_onnxruntime_as_it_was_packed(count):
    numbers = np.arange(-8, 8, dtype=np.int8)[:count]
    graph = onnx.parser.parse_graph(f"g () => (int8[{count}] y) {{ y = Cast <to = 3> (w) }}")
    stored = ir.Tensor(numbers.astype(ml_dtypes.int4), name="w")
    graph.initializer.append(ir.serde.serialize_tensor(stored))
    assert len(graph.initializer[0].raw_data) == (count + 1) // 2
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], numbers)
