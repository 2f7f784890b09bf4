"""Each layer's own error, against a dense computation; and the correction of biases by it."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from edgec.backends import ort as ort_backend
from edgec.compiler.quantization.sensitivity import layer_errors
from edgec.passes.quantize import Quantize
from test_quantize import build, ranges_of, run, weight

SCHEME = ort_backend.SCHEMES[0][1]
TEXT = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  r = Relu (a)
  y = Conv (r, w2) }"""


@dataclass
class Batch:
    feed: dict
    count: int
    labels: None = None


@pytest.fixture
def pair():
    parts = {"w1": weight(8, 8, 3, 3), "b1": weight(8), "w2": weight(8, 8, 1, 1)}
    model, feed = build(TEXT, **parts), {"x": weight(4, 8, 6, 6)}
    found = ranges_of(model, ort_backend.SUPPORTS, feed)
    quantized = build(TEXT, **parts)
    Quantize(found, ort_backend.SUPPORTS, SCHEME)(quantized)
    return model, quantized, feed, found


def fake(value, span):
    scale = np.float32((span.max - min(span.min, 0)) / 255)
    zero = np.rint(-min(span.min, 0) / scale)
    return (np.clip(np.rint(value / scale) + zero, 0, 255) - zero) * scale


def test_the_second_layer_is_judged_on_the_exact_first(pair):
    """Its own error is that of its rounded input and weights, whatever the first layer did."""
    model, quantized, feed, found = pair
    errors = layer_errors(model, quantized, [Batch(feed, 4)], images=4)
    w2 = model.graph.initializers["w2"].const_value.numpy().astype(np.float64)[:, :, 0, 0]
    scale = np.abs(w2).max(1, keepdims=True) / 127
    proto = ir.to_proto(model)
    proto.graph.output.append(next(v for v in proto.graph.value_info if v.name == "r"))
    exact_y, exact_r = run(proto, feed, ["y", "r"])
    y = np.einsum("nchw,oc->nohw", fake(exact_r.astype(np.float64), found["r"]), np.rint(w2 / scale) * scale)
    expected = 10 * np.log10((exact_y.astype(np.float64) ** 2).sum() / ((exact_y - y) ** 2).sum())
    (last,) = [e for name, e in errors.items() if name.endswith("_2")]
    assert last.sqnr_db == pytest.approx(expected, abs=0.05)  # float32 sums in the graph against float64 here
    np.testing.assert_allclose(last.shift, (exact_y - y).mean((0, 2, 3)), atol=1e-4 * np.abs(exact_y).max())


def test_correcting_the_biases_removes_the_shift(pair):
    model, quantized, feed, found = pair
    errors = layer_errors(model, quantized, [Batch(feed, 4)], images=4)
    again = model.clone()
    Quantize(found, ort_backend.SUPPORTS, SCHEME, bias_shift={n: e.shift for n, e in errors.items()})(again)
    after = layer_errors(model, again, [Batch(feed, 4)], images=4)
    scales = [v.const_value.numpy().max() for n, v in again.graph.initializers.items() if "_bias_scale" in n]
    for name, e in after.items():
        assert np.abs(e.shift).max() <= 0.51 * max(scales)  # the bias is an integer: half a step of it is left
        assert e.sqnr_db >= errors[name].sqnr_db  # a mean taken away never adds energy


def test_the_float_model_is_left_as_it_was(pair):
    model, quantized, feed, _ = pair
    before = ir.to_proto(model).SerializeToString(), ir.to_proto(quantized).SerializeToString()
    layer_errors(model, quantized, [Batch(feed, 4)], images=4)
    assert before == (ir.to_proto(model).SerializeToString(), ir.to_proto(quantized).SerializeToString())


def test_nothing_quantized_gives_nothing(pair):
    model, _, feed, _ = pair
    assert layer_errors(model, model, [Batch(feed, 4)], images=4) == {}
