"""The walk over both networks, what it measures on the way, and the weights that are chosen along it."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgec.backends import ort as ort_backend
from edgec.compiler import model as model_io
from edgec.compiler.fitting import gram
from edgec.compiler.fitting.feeds import calibration_feeds
from edgec.compiler.fitting.layerwise import peak_bytes, walk
from edgec.compiler.fitting.layout import Layout, layout_of
from edgec.compiler.fitting.stream import Stream
from edgec.compiler.quantization.rounder import round_weights
from edgec.compiler.types import QuantScheme
from edgec.passes.quantize import Quantize
from edgec.passes.weight_writer import dequantize
from test_quantize import build, ranges_of, run

INT8 = ort_backend.SCHEMES[0][1]
#: Weights only, 3 bits in an int8.
W3 = QuantScheme("w3", None, True, weight="int8", weight_max=3, bias="float32", simulated=True)
TEXT = """g (float[N, 8, 8, 8] x) => (float[N, 5] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  ra = Relu (a)
  b = Conv <pads = [1, 1, 1, 1], group = 4> (ra, w2)
  s = Add (b, x)
  rs = Relu (s)
  p = GlobalAveragePool (rs)
  f = Flatten (p)
  y = Gemm <transB = 1> (f, w3, b3) }"""


def parts(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w1": (8, 8, 3, 3), "b1": (8,), "w2": (8, 2, 3, 3), "w3": (5, 8), "b3": (5,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def net():
    """The model, and feeds of images whose neighbouring pixels and channels resemble each other."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(8, 8)) / 3
    images = np.einsum("oc,nchw->nohw", mix, np.cumsum(rng.normal(size=(48, 8, 8, 8)), axis=3)).astype(np.float32)
    return build(TEXT, **parts()), [{"x": images[i : i + 16]} for i in range(0, 48, 16)]


def sqnr(exact, got):
    exact, got = (np.concatenate(a).astype(np.float64) for a in (exact, got))
    return 10 * np.log10((exact**2).sum() / ((exact - got) ** 2).sum())


def outputs(model, feeds):
    return [run(model, feed)[0] for feed in feeds]


# ------------------------------------------------------------------------------------------- a network in pieces


def test_pieces_give_what_the_whole_network_gives(net):
    model, feeds = net
    stream, nodes = Stream(model, feeds), {n.name: n for n in model.graph}
    for name in ("Conv_0", "Conv_2", "Gemm_7"):
        got = stream.pull(nodes[name].outputs[0])
    for one, whole in zip(got, outputs(model, feeds), strict=True):
        np.testing.assert_array_equal(one, whole)
    assert stream.bytes == 0  # everything was read, so nothing is held


def test_only_what_is_still_read_is_held(net):
    model, feeds = net
    stream, nodes = Stream(model, feeds), {n.name: n for n in model.graph}
    size = sum(f["x"].nbytes for f in feeds)
    stream.pull(nodes["Conv_2"].inputs[0])
    assert stream.bytes == 2 * size  # x for the Add, ra for the Conv
    stream.pull(nodes["Conv_2"].outputs[0])
    assert stream.bytes == 2 * size  # x and b for the Add
    stream.pull(nodes["Relu_4"].outputs[0])
    assert stream.bytes == size


def test_a_fixed_tensor_takes_the_place_of_what_makes_it(net):
    model, feeds = net
    stream, conv = Stream(model, feeds), next(iter(model.graph))
    stream.fix(conv.inputs[1], np.zeros((8, 8, 3, 3), np.float32))
    for got in stream.pull(conv.outputs[0]):
        np.testing.assert_array_equal(got, np.broadcast_to(parts()["b1"].reshape(1, 8, 1, 1), got.shape))


def test_subgraphs_read_from_outside():
    model = build("""g (float[2, 3] x, bool c) => (float[2, 4] y) {
      k = Relu (x)
      b = If (c) <then_branch = yes () => (float[2, 3] s) { s = Mul (k, k) },
                  else_branch = no () => (float[2, 3] t) { t = Neg (k) }>
      y = MatMul (b, w) }""", w=np.ones((3, 4), np.float32))  # fmt: skip
    feed = {"x": np.arange(-2, 4, dtype=np.float32).reshape(2, 3), "c": np.array(True)}
    stream, matmul = Stream(model, [feed]), [n for n in model.graph][-1]
    np.testing.assert_array_equal(stream.pull(matmul.inputs[0])[0], np.maximum(feed["x"], 0) ** 2)
    np.testing.assert_array_equal(stream.pull(matmul.outputs[0])[0], run(model, feed)[0])


# ------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("op, x, w", [
    ("Conv <pads = [1, 2, 0, 1], strides = [2, 1]>", (3, 4, 7, 6), (6, 4, 3, 2)),
    ("Conv <pads = [2, 2, 2, 2], dilations = [2, 2], group = 2>", (3, 4, 7, 6), (6, 2, 3, 3)),
    ("Conv <pads = [1, 1, 1, 1], group = 4>", (3, 4, 5, 5), (4, 1, 3, 3)),
    ("Conv <strides = [3], pads = [1, 1]>", (3, 4, 11), (5, 4, 3)),
    ("Conv <auto_pad = \"VALID\">", (2, 3, 5, 5), (4, 3, 2, 2)),
    ("ConvTranspose", (2, 4, 5, 6), (4, 3, 2, 2)),
    ("ConvTranspose <strides = [2, 2]>", (2, 4, 5, 6), (4, 3, 2, 2)),
    ("ConvTranspose <strides = [2, 3], pads = [1, 0, 0, 2], output_padding = [1, 0]>", (2, 4, 5, 6), (4, 3, 3, 4)),
    ("ConvTranspose <strides = [2], dilations = [2], pads = [1, 1]>", (2, 4, 7), (4, 3, 3)),
    ("Gemm <transB = 1>", (9, 6), (4, 6)),
    ("Gemm", (9, 6), (6, 4)),
    ("MatMul", (2, 5, 6), (6, 4)),
])  # fmt: skip
def test_rows_times_the_weight_are_the_layers_output(op, x, w):
    """So rows, weight and output agree in the order of their entries, for all positions."""
    rng = np.random.default_rng(0)
    source, weight = rng.normal(size=x).astype(np.float32), rng.normal(size=w).astype(np.float32)
    dims = ", ".join(map(str, x))
    unknown = ", ".join("abcd"[: len(x)])
    model = build(f"g (float[{dims}] x) => (float[{unknown}] y) {{ y = {op} (x, w) }}", w=weight)
    (y,) = run(model, {"x": source})
    layout = layout_of(next(iter(model.graph)), w)
    rows, values = layout.rows(source, y, 10**9, rng)
    matrix = layout.matrix(weight)
    np.testing.assert_allclose(rows @ matrix.swapaxes(1, 2), values, atol=1e-5)  # float32 kernels
    np.testing.assert_array_equal(layout.unmatrix(matrix), weight)
    few, _ = layout.rows(source, y, 4, rng)
    assert few.shape == (rows.shape[0], 4, rows.shape[2])


@pytest.mark.parametrize("op, w, why", [
    ("ConvTranspose <group = 2>", (4, 3, 2, 2), "ConvTranspose"),
    ("ConvTranspose <pads = [2, 0, 0, 0]>", (4, 3, 2, 2), "cropped"),
    ("ConvTranspose <auto_pad = \"SAME_UPPER\">", (4, 3, 2, 2), "auto_pad"),
    ("Conv <auto_pad = \"SAME_UPPER\">", (4, 3, 2, 2), "auto_pad"),
    ("Gemm <alpha = 2.0>", (3, 4), "alpha"),
])  # fmt: skip
def test_layers_without_rows_say_why(op, w, why):
    model = build(f"g (float[a, b, c, d] x) => (float[e, f, g, h] y) {{ y = {op} (x, w) }}", w=np.zeros(w, np.float32))
    assert why in layout_of(next(iter(model.graph)), w)


@pytest.mark.parametrize("biased", [True, False])
def test_sums_are_about_the_mean_where_a_bias_takes_it(biased):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 1, size=(2, 50, 4)), rng.normal(-2, 1, size=(2, 50, 3))
    moments = gram.Moments(Layout((6, 4), groups=2, biased=biased))
    for part in (slice(20), slice(20, 50)):
        moments.add(x[:, part], y[:, part])
    dx, dy = (a - a.mean(1, keepdims=True) if biased else a for a in (x, y))
    np.testing.assert_allclose(moments.gram(), dx.swapaxes(1, 2) @ dx, rtol=1e-9)
    np.testing.assert_allclose(moments.cross(), dy.swapaxes(1, 2) @ dx, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------- the walk


def test_measuring_a_quantized_model_changes_nothing(net):
    """Errors add up behind the quantized prefix: the last layer's is the whole model's."""
    model, feeds = net
    x = np.concatenate([f["x"] for f in feeds])
    twin = model_io.copy(model)
    Quantize(ranges_of(model, ort_backend.SUPPORTS, {"x": x}), ort_backend.SUPPORTS, INT8)(twin)
    before = model_io.serialize(model), model_io.serialize(twin)
    steps = walk(model, twin, feeds, correct=False)
    assert before == (model_io.serialize(model), model_io.serialize(twin))
    assert [s.node for s in steps] == ["Conv_0", "Conv_2", "Gemm_7"]
    gemm = next(n for n in twin.graph if n.op_type == "Gemm")
    proto = ir.to_proto(twin)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(gemm.outputs[0].name, 1, None))
    got = [run(proto, feed, [gemm.outputs[0].name])[0] for feed in feeds]
    assert steps[-1].sqnr_out_db == pytest.approx(sqnr(outputs(model, feeds), got), abs=1e-6)
    assert all(s.stored is None and s.shift is None and s.reason == "measured only" for s in steps)


def test_float_and_float_do_not_differ(net):
    model, feeds = net
    for step in walk(model, model, feeds):
        assert step.sqnr_in_db > 200 and step.sqnr_out_db > 200 and step.reason == "left in float"


def applied(model, roundings, quantize=None):
    twin = model_io.copy(model)
    replace(quantize or weights_only(), weights=roundings.weights, bias_shift=roundings.bias_shift)(twin)
    return twin


def weights_only(scheme=W3, **options):
    return Quantize(supports=ort_backend.SUPPORTS, scheme=scheme, **options)


def test_what_is_chosen_is_what_quantize_writes(net):
    """The walk's last SQNR is that of the model written with its weights and shifts."""
    model, feeds = net
    found = round_weights(model, weights_only(), feeds)
    assert set(found.weights) == {"Conv_0", "Conv_2", "Gemm_7"} == set(found.bias_shift)
    written = outputs(applied(model, found), feeds)
    # float32 sums in another order: far below the rounding itself
    assert found.steps[-1].sqnr_out_db == pytest.approx(sqnr(outputs(model, feeds), written), abs=0.01)
    for step in found.steps:
        assert step.objective_chosen <= step.objective_nearest
        assert np.abs(step.stored.integers).max() <= 3 and step.stored.integers.dtype == np.int8


def test_each_part_of_the_method_helps(net):
    """In dB at the output, on the calibration images: bias correction and rounding, each alone and both."""
    model, feeds = net

    def result(method, **options):
        return round_weights(model, weights_only(), feeds, method, **options).steps[-1].sqnr_out_db

    plain, chosen = result("nearest", correct=False), result("auto", correct=False)
    mended, best = result("nearest"), result("auto")
    assert plain < mended < best
    assert best > mended + 3
    assert plain < chosen < best


def test_plain_rounding_is_what_quantize_does_itself(net):
    model, feeds = net
    found = round_weights(model, weights_only(), feeds, "nearest", correct=False)
    twin = model_io.copy(model)
    weights_only()(twin)
    for one, other in zip(outputs(applied(model, found), feeds), outputs(twin, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


def test_shifts_leave_no_mean_error(net):
    model, feeds = net
    written = applied(model, round_weights(model, weights_only(), feeds, follow_skips=False))
    exact, got = (np.concatenate(outputs(m, feeds)) for m in (model, written))
    np.testing.assert_allclose(got.mean(0), exact.mean(0), atol=1e-4 * np.abs(exact).max())  # float32


def test_a_layer_makes_up_for_the_skip_branch_beside_it():
    """The skip carries an error of 1; the layer that is added to it takes it back by its bias."""
    text = """g (float[N, 4] x) => (float[N, 4] y) {
      a = Gemm (x, w1, b1)
      r = Relu (a)
      b = Gemm (r, w2, b2)
      s = Add (b, r)
      y = Relu (s) }"""
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    model = build(text, w1=eye, b1=zero + 5, w2=-eye, b2=zero)
    twin = build(text, w1=eye, b1=zero + 6, w2=-eye, b2=zero)
    weights_only(replace(W3, weight_max=127))(twin)
    feeds = [{"x": np.random.default_rng(0).uniform(-1, 1, size=(64, 4)).astype(np.float32)}]
    first, second = walk(model, twin, feeds, correct=True)
    np.testing.assert_allclose(first.shift, -1, atol=0.01)
    np.testing.assert_allclose(second.shift, 0, atol=0.01)  # the skip is right again

    next(n for n in twin.graph if n.name == "Gemm_0").name = "unknown"  # so that its error stays
    (only,) = walk(model, twin, feeds)
    np.testing.assert_allclose(only.shift, 0, atol=0.02)  # r is 1 too large, -r 1 too small: they cancel
    (alone,) = walk(model, twin, feeds, follow_skips=False)
    np.testing.assert_allclose(alone.shift, 1, atol=0.02)


def test_int8_activations_and_int4_weights(net):
    model, feeds = net
    x = np.concatenate([f["x"] for f in feeds])
    model = model_io.copy(model)
    model.opset_imports[""] = 21
    scheme = replace(INT8, weight="int4", weight_max=7)
    quantize = Quantize(ranges_of(model, ort_backend.SUPPORTS, {"x": x}), ort_backend.SUPPORTS, scheme)
    exact = outputs(model, feeds)
    plain, chosen = (round_weights(model, quantize, feeds, method) for method in ("nearest", "auto"))
    assert {w.dtype for w in chosen.weights.values()} == {"int4"}
    quality = [sqnr(exact, outputs(applied(model, r, quantize), feeds)) for r in (plain, chosen)]
    assert quality[1] > quality[0] + 2


def test_blocks(net):
    model, feeds = net
    model = model_io.copy(model)
    model.opset_imports[""] = 21
    scheme = replace(W3, weight="int4", weight_max=7, block=4)
    found = round_weights(model, weights_only(scheme), feeds)
    gemm = found.weights["Gemm_7"]
    assert (gemm.block, gemm.axis, gemm.scales.shape) == (4, 1, (5, 2))
    assert found.weights["Conv_0"].block is None  # convs have a scale per channel
    written = outputs(applied(model, found, weights_only(scheme)), feeds)
    assert found.steps[-1].sqnr_out_db == pytest.approx(sqnr(outputs(model, feeds), written), abs=0.01)


def test_some_layers_at_8_bits_and_some_in_float(net):
    model, feeds = net
    scheme = replace(W3, weight="int4", weight_max=7)
    model = model_io.copy(model)
    model.opset_imports[""] = 21
    quantize = weights_only(scheme, weight_types={"Conv_2": "int8"}, keep_float={"Gemm_7": "asked for"})
    found = round_weights(model, quantize, feeds)
    assert found.weights["Conv_2"].dtype == "int8" and np.abs(found.weights["Conv_2"].integers).max() > 7
    assert set(found.weights) == {"Conv_0", "Conv_2"} == set(found.bias_shift)
    assert found.steps[-1].reason == "left in float"


def test_one_scale_for_a_whole_weight(net):
    model, feeds = net
    found = round_weights(model, weights_only(replace(W3, per_channel=False)), feeds)
    for stored in found.weights.values():
        assert stored.axis is None and stored.scales.size == 1


def test_nan_is_said_and_left_alone(net):
    model, feeds = net
    bad = [{"x": feeds[0]["x"].copy()}]
    bad[0]["x"][3, 2] = np.nan
    found = round_weights(model, weights_only(), bad)
    assert not found.weights and "NaN" in found.steps[0].reason


def test_float8_weights_are_left_to_quantize(net):
    model, feeds = net
    model = model_io.copy(model)
    model.opset_imports[""] = 19
    scheme = QuantScheme("e4m3", None, True, weight="float8e4m3fn", weight_max=448, bias="float32", simulated=True)
    found = round_weights(model, Quantize(supports=ort_backend.SIMULATED, scheme=scheme), feeds)
    assert not found.weights and "no integer" in found.steps[0].reason


def test_the_same_seed_gives_the_same_weights(net, monkeypatch):
    monkeypatch.setattr("edgec.compiler.fitting.layout.ROWS", 300)  # so that rows are drawn
    model, feeds = net
    one, two = (round_weights(model, weights_only(), feeds, seed=3) for _ in range(2))
    for name, stored in one.weights.items():
        np.testing.assert_array_equal(stored.integers, two.weights[name].integers)
        np.testing.assert_array_equal(dequantize(stored), dequantize(two.weights[name]))


def test_as_many_images_as_memory_holds(net):
    model, feeds = net
    x = np.concatenate([f["x"] for f in feeds])
    peak = peak_bytes(model, {"x": x[:1]})
    assert peak == 3 * x[:1].nbytes  # at the second Conv: x for the Add, what it reads, what it gives

    class Images:
        def __init__(self, indices):
            self.indices = list(indices)

        def __len__(self):
            return len(self.indices)

        def subset(self, chosen):
            return Images(self.indices[i] for i in chosen)

        def batches(self, size):
            for i in range(0, len(self), size):
                rows = x[self.indices[i : i + size]]
                yield type("Batch", (), {"feed": {"x": rows}, "count": len(rows), "rows": len(rows)})

    def count(memory):
        return sum(len(f["x"]) for f in calibration_feeds(model, Images(range(48)), memory=memory))

    assert count(10**9) == 48
    assert count(3 * peak * 20) == 20
    assert count(1) == 16
