"""The quantize pass: the rules of placement, the written graph, and its numbers against a numpy simulation."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from edgec.backends import ort as ort_backend
from edgec.backends import tensorrt
from edgec.compiler.types import Range
from edgec.passes.placement import observed_tensors, place
from edgec.passes.quantize import Quantize

VNNI = ort_backend.SCHEMES[0][1]
RNG = np.random.default_rng(0)


def weight(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def build(text: str, **constants: np.ndarray) -> ir.Model:
    """Parse a graph in ONNX's text form at opset 13 and give it the named initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13]>\n{text}')
    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


RESIDUAL = """
g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  ra = Relu (a)
  b = Conv <pads = [1, 1, 1, 1]> (ra, w2, b2)
  s = Add (b, ra)
  rs = Relu (s)
  y = Conv <pads = [1, 1, 1, 1]> (rs, w3, b3)
}
"""


def residual(channels: int = 8) -> ir.Model:
    shapes = {f"w{i}": (channels, channels, 3, 3) for i in (1, 2, 3)} | {f"b{i}": (channels,) for i in (1, 2, 3)}
    text = RESIDUAL.replace("[N, 8,", f"[N, {channels},")
    return build(text, **{name: weight(*shape) for name, shape in shapes.items()})


def ranges_of(model: ir.Model, supports, feed) -> dict[str, Range]:
    """Exact minima and maxima of every tensor that placement asks for."""
    proto = ir.to_proto(model)
    names = observed_tensors(model, supports)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    values = run(proto, feed, names)
    return {n: Range(float(v.min()), float(v.max())) for n, v in zip(names, values, strict=True)}


def run(model, feed, names=None, optimise=False):
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, feed)


def optimised_ops(model, tmp_path) -> Counter:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)


def quantized(model, supports=ort_backend.SUPPORTS, scheme=VNNI, shape=(2, 8, 6, 6), **options):
    feed = {"x": RNG.normal(size=shape).astype(np.float32)}
    found = ranges_of(model, supports, feed)
    before = run(model, feed)[0]
    result = Quantize(found, supports, scheme, **options)(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return result, feed, before


def sqnr(before, after):
    return 10 * np.log10((before**2).sum() / ((before - after) ** 2).sum())


# ------------------------------------------------------------------------------------------ onnx runtime


def test_every_layer_becomes_an_integer_kernel(tmp_path):
    model = residual()
    result, feed, before = quantized(model)
    assert (result.modified, result.rewrites, result.refusals) == (True, 4, ())
    ops = optimised_ops(model, tmp_path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["Conv"], ops["Relu"]) == (3, 1, 0, 0)
    assert sqnr(before, run(model, feed)[0]) > 30


def test_one_q_and_one_dq_for_a_tensor_read_twice():
    model = residual()
    quantized(model)
    counts = Counter(n.op_type for n in model.graph)
    assert counts["QuantizeLinear"] == 5  # x, ra, b, rs, y: `a` and `s` are absorbed into the ReLUs behind them
    assert counts["DequantizeLinear"] == 5 + 3 + 3  # and a weight and a bias of each layer


def test_float_weights_are_gone():
    model = residual()
    quantized(model)
    floats = [v for v in model.graph.initializers.values() if v.const_value.dtype == ir.DataType.FLOAT]
    assert max(v.const_value.size for v in floats) == 8  # scales only


def test_the_graph_output_keeps_its_name_and_type():
    model = residual()
    quantized(model)
    (out,) = model.graph.outputs
    assert (out.name, out.dtype) == ("y", ir.DataType.FLOAT)


def test_depthwise_and_grouped_layers(tmp_path):
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
      a = Conv <group = 8, pads = [1, 1, 1, 1]> (x, w1)
      y = Conv <group = 2, pads = [1, 1, 1, 1]> (a, w2) }"""
    model = build(text, w1=weight(8, 1, 3, 3), w2=weight(8, 4, 3, 3))
    _, feed, before = quantized(model)
    assert optimised_ops(model, tmp_path)["QLinearConv"] == 2
    assert sqnr(before, run(model, feed)[0]) > 30


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_keeps_a_float_output(trans, tmp_path):
    text = f"g (float[N, 16] x) => (float[N, 4] y) {{ y = Gemm <transB = {trans}> (x, w, b) }}"
    model = build(text, w=weight(4, 16) if trans else weight(16, 4), b=weight(4))
    _, feed, before = quantized(model, shape=(8, 16))
    ops = optimised_ops(model, tmp_path)
    assert (ops["QGemm"], ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1, 0)
    assert sqnr(before, run(model, feed)[0]) > 35


def test_gemm_with_beta_and_matmul():
    model = build(
        "g (float[N, 16] x) => (float[N, 4] y) { h = Gemm <beta = 0.5> (x, w, b)\n y = MatMul (h, v) }",
        w=weight(16, 16), b=weight(16), v=weight(16, 4),
    )  # fmt: skip
    _, feed, before = quantized(model, shape=(8, 16))
    assert sqnr(before, run(model, feed)[0]) > 30


def test_data_movement_works_on_integers(tmp_path):
    text = """g (float[N, 8, 6, 6] x) => (float[N, 16, 3, 3] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w1)
      r = Relu (a)
      p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
      q = Pad (p, pads)
      y = Conv <pads = [1, 1, 1, 1]> (q, w2) }"""
    pads = np.array([0, 4, 0, 0, 0, 4, 0, 0], np.int64)
    model = build(text, w1=weight(8, 8, 3, 3), w2=weight(16, 16, 3, 3), pads=pads)
    _, feed, before = quantized(model)
    pad = next(n for n in model.graph if n.op_type == "Pad")
    assert pad.inputs[0].dtype == ir.DataType.UINT8
    assert optimised_ops(model, tmp_path)["QLinearConv"] == 2
    assert sqnr(before, run(model, feed)[0]) > 30


def test_pad_with_another_value_stays_float():
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 8, 8] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w1)
      y = Pad (a, pads, one) }"""
    pads, one = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), np.array(1.0, np.float32)
    model = build(text, w1=weight(8, 8, 3, 3), pads=pads, one=one)
    _, feed, before = quantized(model)
    assert next(n for n in model.graph if n.op_type == "Pad").inputs[0].dtype == ir.DataType.FLOAT
    assert run(model, feed)[0][0, 0, 0, 0] == 1.0
    assert sqnr(before, run(model, feed)[0]) > 30


def test_a_layer_kept_in_float_is_shielded(tmp_path):
    model = residual()
    result, feed, before = quantized(model, keep_float={"Conv_2": "because"})
    assert [(r.node, r.rule, r.why) for r in result.refusals] == [("Conv_2", "kept-float", "because")]
    ops = optimised_ops(model, tmp_path)
    assert ops["QLinearConv"] == 2, ops  # without the shield ONNX Runtime quantizes the third one by itself
    np.testing.assert_allclose(run(model, feed)[0], run(model, feed, optimise=True)[0], atol=0.05 * before.std())


POOLED = """
g (float[N, 8, 6, 6] x) => (float[N, 8, 3, 3] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1)
  r = Relu (a)
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
  y = Conv (p, w2)
}
"""


def pooled() -> ir.Model:
    return build(POOLED, w1=weight(8, 8, 3, 3), w2=weight(8, 8, 1, 1))


def pools(model, tmp_path) -> set[int]:
    """Return the types of what MaxPools read after ONNX Runtime's optimisations."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    made_by = {name: node for node in graph.node for name in node.output}
    read = [made_by[n.input[0]].op_type for n in graph.node if "MaxPool" in n.op_type]
    return set(read)


def test_a_pool_of_floats_is_not_done_on_bytes(tmp_path):
    """ONNX Runtime would move the rounding in front of it, into NCHW, where its MaxPool of bytes is slow."""
    model = pooled()
    _, feed, before = quantized(model, keep_float={"Conv_0": "because"})
    assert "QuantizeLinear" not in pools(model, tmp_path)
    assert sqnr(before, run(model, feed)[0]) > 30
    np.testing.assert_allclose(run(model, feed)[0], run(model, feed, optimise=True)[0], atol=0.05 * before.std())
    shields = [n for n in model.graph if n.op_type == "LeakyRelu"]
    assert [n.attributes["alpha"].value for n in shields] == [1.0]
    bare = pooled()
    quantized(bare, scheme=replace(VNNI, shield_float=False), keep_float={"Conv_0": "because"})
    assert pools(bare, tmp_path) == {"QuantizeLinear"}, "there is something to shield from"


def test_a_pool_of_integers_needs_no_shield(tmp_path):
    model = pooled()
    quantized(model)
    assert "LeakyRelu" not in {n.op_type for n in model.graph}
    assert optimised_ops(model, tmp_path)["QLinearConv"] == 2


def test_a_pool_whose_output_is_read_by_floats_as_well(tmp_path):
    """Only the rounding reads the shield; the graph output is the pool's own."""
    text = POOLED.replace("(float[N, 8, 3, 3] y)", "(float[N, 8, 3, 3] y, float[N, 8, 3, 3] p)")
    model = build(text, w1=weight(8, 8, 3, 3), w2=weight(8, 8, 1, 1))
    _, feed, _ = quantized(model, keep_float={"Conv_0": "because"})
    (shield,) = [n for n in model.graph if n.op_type == "LeakyRelu"]
    assert {use.node.op_type for use in shield.outputs[0].uses()} == {"QuantizeLinear"}
    assert [v.name for v in model.graph.outputs] == ["y", "p"]
    assert model.graph.outputs[1].producer().op_type == "MaxPool"


def test_nothing_to_quantize_changes_nothing():
    model = build("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }")
    before = ir.to_proto(model).SerializeToString()
    result = Quantize({}, ort_backend.SUPPORTS, VNNI)(model)
    assert (result.modified, result.rewrites) == (False, 0)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_second_run_changes_nothing():
    model = residual()
    result, feed, _ = quantized(model)
    assert result.modified
    again = Quantize(ranges_of(residual(), ort_backend.SUPPORTS, feed), ort_backend.SUPPORTS, VNNI)(model)
    assert not again.modified


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("y = Conv (x, v)", "constant-weight"),
        ("y = Conv (x, w, c)", "constant-bias"),
    ],
)
def test_refusals_have_their_reason(text, rule):
    model = build(
        f"g (float[N, 8, 6, 6] x, float[8, 8, 1, 1] v, float[8] c) => (float[N, 8, 6, 6] y) {{ {text} }}",
        w=weight(8, 8, 1, 1),
    )
    placement = place(model, {"x": Range(-1, 1), "y": Range(-1, 1)}, ort_backend.SUPPORTS, VNNI, {})
    assert [r.rule for r in placement.refusals] == [rule]
    assert not placement.nodes


def test_missing_range_is_said():
    placement = place(residual(), {}, ort_backend.SUPPORTS, VNNI, {})
    assert {r.rule for r in placement.refusals} == {"no-range"}


def test_integers_equal_a_numpy_simulation():
    """One Conv 1x1: q(x), q(w), q(b) by hand in float64, against the written graph, within one output step."""
    model = build(
        "g (float[N, 8, 6, 6] x) => (float[N, 4, 6, 6] y) { y = Conv (x, w, b) }", w=weight(4, 8, 1, 1), b=weight(4)
    )
    w = model.graph.initializers["w"].const_value.numpy().astype(np.float64)
    b = model.graph.initializers["b"].const_value.numpy().astype(np.float64)
    found = {"x": Range(-2.0, 3.0), "y": Range(-4.0, 5.0)}
    Quantize(found, ort_backend.SUPPORTS, VNNI)(model)
    x = RNG.uniform(-2, 3, size=(1, 8, 6, 6)).astype(np.float32)

    def fake(v, low, high):
        scale = (high - low) / 255
        zero = np.rint(-low / scale)
        return (np.clip(np.rint(v / scale) + zero, 0, 255) - zero) * scale

    scale = np.abs(w).max(axis=(1, 2, 3), keepdims=True) / 127
    y = np.einsum("nchw,oc->nohw", fake(x.astype(np.float64), -2, 3), (np.rint(w / scale) * scale)[:, :, 0, 0])
    expected = fake(y + b[None, :, None, None], -4, 5)
    for optimise in (False, True):
        got = run(model, {"x": x}, optimise=optimise)[0]
        assert np.abs(got - expected).max() <= 9 / 255 * 1.01  # ties may round either way: one step of the output


# ------------------------------------------------------------------------------------------ tensorrt


def tensorrt_model() -> ir.Model:
    model = residual(16)  # TensorRT's kernels want as many channels
    quantized(model, tensorrt.SUPPORTS, tensorrt.INT8, shape=(2, 16, 6, 6))
    return model


def test_tensorrt_zero_points_are_int8_and_zero():
    model = tensorrt_model()
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2].const_value
            assert zero.dtype == ir.DataType.INT8
            assert not zero.numpy().any()
            assert (node.inputs[1].const_value.numpy() > 0).all()


def test_tensorrt_weights_stay_float_behind_a_pair_and_biases_are_float():
    for node in tensorrt_model().graph:
        if node.op_type == "Conv":
            dq = node.inputs[1].producer()
            q = dq.inputs[0].producer()
            assert (q.op_type, dq.op_type) == ("QuantizeLinear", "DequantizeLinear")
            assert q.inputs[0].const_value.dtype == ir.DataType.FLOAT
            assert q.inputs[1].const_value.size == 16  # one scale per output channel
            assert node.inputs[2].const_value.dtype == ir.DataType.FLOAT


def test_tensorrt_add_reads_its_skip_branch_quantized_and_the_layer_bare():
    (add,) = [n for n in tensorrt_model().graph if n.op_type == "Add"]
    producers = [v.producer().op_type for v in add.inputs]
    assert producers == ["Conv", "DequantizeLinear"]


def test_tensorrt_has_nothing_behind_its_layers():
    for node in tensorrt_model().graph:
        if node.op_type == "Conv":
            assert all(u.node.op_type != "QuantizeLinear" for u in node.outputs[0].uses())
