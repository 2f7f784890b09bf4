"""SQNR in, out and own of each layer, against tensors read out of both models; subgraphs come along."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import test_quantize
from edgec.backends import ort as ort_backend
from edgec.compiler.explanation.layer_sqnr import measure
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.quantization.sensitivity import layer_errors
from test_quantize import build, ranges_of, residual, run, weight
from test_quantizer import Batch

SCHEME = replace(ort_backend.SCHEMES[0][1], shield_float=False, nhwc_kernels=False)
NAMES = ("Conv_0", "Conv_2", "Add_3", "Conv_5")


def db(exact, other):
    exact, other = exact.astype(np.float64), other.astype(np.float64)
    return 10 * np.log10((exact**2).sum() / ((exact - other) ** 2).sum())


def tensors(model: ir.Model, feed, *names):
    """Read inner tensors of a model, all optimisations off."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return run(proto, feed, list(names))


def node(model, name):
    return next(n for n in model.graph if n.name == name)


@pytest.fixture(scope="module")
def pair():
    test_quantize.RNG = np.random.default_rng(0)  # the same numbers, whichever tests ran before
    model, feed = residual(), {"x": weight(4, 8, 6, 6)}
    quantizer = Quantizer(model, ort_backend.SUPPORTS, SCHEME, ranges_of(model, ort_backend.SUPPORTS, feed))
    return model, quantizer.build({"Conv_0": "for the test"}).model, feed


def test_in_and_out_are_those_of_the_two_models_run_side_by_side(pair):
    model, quantized, feed = pair
    found = measure(model, quantized, NAMES, [Batch(feed, 4, 4)], images=4)
    assert list(found) == [n.name for n in quantized.graph if n.name in NAMES]
    for name in ("Conv_2", "Conv_5"):
        twin = node(quantized, name)
        x, y = tensors(model, feed, node(model, name).inputs[0].name, node(model, name).outputs[0].name)
        coarse_x, coarse_y = tensors(quantized, feed, twin.inputs[0].name, twin.outputs[0].name)
        assert found[name].in_db == pytest.approx(db(x, coarse_x), abs=0.05)  # float32 sums in the graph
        assert found[name].out_db == pytest.approx(db(y, coarse_y), abs=0.05)


def test_the_inputs_of_a_join_count_together(pair):
    model, quantized, feed = pair
    found = measure(model, quantized, NAMES, [Batch(feed, 4, 4)], images=4)["Add_3"]
    exact = tensors(model, feed, *(v.name for v in node(model, "Add_3").inputs))
    coarse = tensors(quantized, feed, *(v.name for v in node(quantized, "Add_3").inputs))
    both = [np.concatenate([a.ravel() for a in arrays]) for arrays in (exact, coarse)]
    assert found.in_db == pytest.approx(db(*both), abs=0.05)


def test_own_is_the_teacher_forced_error(pair):
    """The same figure from compiler/quantization/sensitivity.py, which builds another graph."""
    model, quantized, feed = pair
    found = measure(model, quantized, NAMES, [Batch(feed, 4, 4)], images=4)
    forced = layer_errors(model, quantized, [Batch(feed, 4, 4)], images=4)
    for name in ("Conv_2", "Add_3", "Conv_5"):
        assert found[name].own_db == pytest.approx(forced[name].sqnr_db, abs=0.05)


def test_a_float_layer_on_exact_inputs_has_no_error_to_state(pair):
    model, quantized, feed = pair
    found = measure(model, quantized, NAMES, [Batch(feed, 4, 4)], images=4)["Conv_0"]
    assert (found.in_db, found.out_db, found.own_db) == (None, None, None)


def test_weights_alone_have_an_own_error_too():
    model, feed = residual(), {"x": weight(4, 8, 6, 6)}
    model.opset_imports[""] = 21  # int4
    quantized = Quantizer(model, ort_backend.SUPPORTS, ort_backend.INT4).build().model
    found = measure(model, quantized, NAMES, [Batch(feed, 4, 4)], images=4)
    assert found["Conv_0"].own_db == pytest.approx(found["Conv_0"].out_db, abs=1e-6)
    assert 5 < found["Conv_0"].own_db < 30
    assert found["Conv_5"].own_db > found["Conv_5"].out_db  # without what the layers before it add


def test_batches_are_added_up(pair):
    model, quantized, feed = pair
    halves = [Batch({"x": feed["x"][:2]}, 2, 2), Batch({"x": feed["x"][2:]}, 2, 2)]
    whole = measure(model, quantized, NAMES, [Batch(feed, 4, 4)], images=4)
    parts = measure(model, quantized, NAMES, halves, images=4)
    for name in NAMES[1:]:
        assert parts[name].out_db == pytest.approx(whole[name].out_db, abs=0.02)


def test_a_subgraph_reads_the_copy_that_it_stands_in():
    text = """g (float[N, 8, 6, 6] x, bool c) => (float[N, 8, 6, 6] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w1)
      r = Relu (a)
      s = If (c) <then_branch = yes () => (float[N, 8, 6, 6] t) { t = Neg (r) },
                  else_branch = no () => (float[N, 8, 6, 6] e) { e = Identity (r) }>
      y = Conv <pads = [1, 1, 1, 1]> (s, w2) }"""
    model = build(text, w1=weight(8, 8, 3, 3), w2=weight(8, 8, 3, 3))
    feed = {"x": weight(4, 8, 6, 6), "c": np.array(True)}
    ranges = ranges_of(model, ort_backend.SUPPORTS, feed)
    quantized = Quantizer(model, ort_backend.SUPPORTS, SCHEME, ranges).build().model
    last = next(n.name for n in reversed(model.graph) if n.op_type == "Conv")
    found = measure(model, quantized, [last], [Batch(feed, 4, 4)], images=4)[last]
    (y,) = run(model, feed)
    (coarse,) = tensors(quantized, feed, node(quantized, last).outputs[0].name)
    assert found.out_db == pytest.approx(db(y, coarse), abs=0.05)
