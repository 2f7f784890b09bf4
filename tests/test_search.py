"""The steps of quantization: each can be left out, is kept only where it gains, and does gain where it should."""

import time
from dataclasses import replace

import lab
import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.backends.ort import OnnxRuntime
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.errors import DataError
from edgec.compiler.options import STEPS
from edgec.compiler.proof import Prover
from edgec.compiler.quantization import search as searching
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.quantization.search import Found, search

RNG = np.random.default_rng(5)

CHAIN = """
g (float[N,4,8,8] x) => (float[N,6] y)
<float[8,4,3,3] w1, float[8] b1, float[8,8,3,3] w2, float[8] b2, float[6,8] w3, float[6] b3> {
    c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
    r2 = Relu (c2)
    p = GlobalAveragePool (r2)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w3, b3)
}
"""

NORMALISED = """
g (float[N,4,16] x) => (float[N,4,8] y)
<float[16] gain, float[16] offset, float[16,24] w1, float[24,8] w2> {
    n = LayerNormalization (x, gain, offset)
    m = MatMul (n, w1)
    r = Relu (m)
    y = MatMul (r, w2)
}
"""


def named(model: ir.Model) -> ir.Model:
    """Name the nodes, and run what runs before quantization: shapes are known then."""
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
    return pipeline.run(model, pipeline.exact_passes(), None)[0]


def chain(gains: np.ndarray | None = None) -> ir.Model:
    """Two Convs and a Gemm; `gains` scale the first Conv's channels, and the second one takes them back."""
    w1, w2 = RNG.normal(size=(8, 4, 3, 3)) * 0.3, RNG.normal(size=(8, 8, 3, 3)) * 0.2
    g = np.ones(8) if gains is None else gains
    weights = {"w1": w1 * g[:, None, None, None], "b1": 0.1 * g, "w2": w2 / g[None, :, None, None]}
    return named(zoo.model(CHAIN, weights, opset=21))


def smooth_images(count: int = 24) -> np.ndarray:
    """Patches rather than noise: neighbours are alike, so that the inputs of a Conv are correlated."""
    return RNG.normal(size=(count, 4, 4, 4)).repeat(2, 2).repeat(2, 3)


def found(path, model, samples, precision="int8", *, deadline=None, **options) -> Found:
    this = replace(lab.job(path, model, samples, precision=precision, **options), deadline=deadline)
    scheme = OnnxRuntime().schemes(this.profile)[precision]
    return search(this, model, scheme, Prover(model))


def steps(one: Found) -> list[str]:
    return [step.name for step in one.steps]


CASES = [
    ("equalize", "int8", chain),
    ("ranges", "int8", chain),
    ("bias-correction", "int8", chain),
    ("rounding", "int8", chain),
    ("rounding", "w4a8", chain),
    ("rounding", "int4", chain),
    ("smooth", "int8", lambda: named(zoo.model(NORMALISED, opset=21))),
]


@pytest.mark.parametrize(("name", "precision", "make"), CASES, ids=[f"{n}-{p}" for n, p, _ in CASES])
def test_every_step_can_be_left_out_alone(tmp_path, name, precision, make):
    model = make()
    samples = smooth_images() if make is chain else RNG.normal(size=(24, 4, 16)) * np.r_[np.ones(15), 30]
    every = found(tmp_path / "all", model, samples, precision)
    assert name in steps(every)
    assert steps(every) == sorted(steps(every), key=STEPS.index), "in the order that --help states"
    assert all(step.seconds >= 0 and step.detail for step in every.steps)
    but_one = found(tmp_path / "one", model, samples, precision, without=(name,))
    assert set(steps(but_one)) == set(steps(every)) - {name}


def test_without_any_step_it_is_plain_quantization(tmp_path):
    model = chain()
    bare = found(tmp_path, model, smooth_images(), without=STEPS)
    assert bare.steps == () and bare.records == ()
    assert bare.quantizer.method == "minmax" and not bare.quantizer.bias_shift and not bare.quantizer.weights
    assert model_io.serialize(bare.quantizer.model) == model_io.serialize(model)


def test_the_result_is_never_further_off_than_plain_quantization(tmp_path):
    """On the images that were judged by: every step is kept only if it comes closer there."""
    model, samples = chain(np.geomspace(1, 0.05, 8)), smooth_images()
    exact = lab.outputs(model, {"x": samples.astype(np.float32)})
    closest, plain = (
        lab.sqnr(exact, lab.outputs(one.quantizer.build().model, {"x": samples.astype(np.float32)}))
        for one in (found(tmp_path / "all", model, samples), found(tmp_path / "none", model, samples, without=STEPS))
    )
    assert closest > plain + 1


class Constant:
    """A judge that finds all candidates equally close."""

    def __init__(self, *args):
        pass

    def decibels(self, model, *, simulated=False):
        return 20.0


class Rising(Constant):
    """A judge that finds each candidate closer than the one before, and all of them close."""

    def __init__(self, *args):
        self.calls = 25

    def decibels(self, model, *, simulated=False):
        self.calls += 1
        return float(self.calls)


@pytest.mark.parametrize("precision", ["int8", "w4a8"])
def test_a_step_that_gains_nothing_is_taken_back(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(searching, "Closeness", Constant)
    model = chain(np.geomspace(1, 0.01, 8))
    one = found(tmp_path, model, smooth_images(), precision)
    judged = [step for step in one.steps if step.name != "ranges"]  # some method must be taken
    assert len(judged) >= 2 and not any(step.kept for step in judged)
    assert all(step.sqnr_before_db == step.sqnr_after_db == 20.0 for step in one.steps)
    assert one.records == () and not one.quantizer.bias_shift and not one.quantizer.weights
    assert model_io.serialize(one.quantizer.model) == model_io.serialize(model)
    assert one.quantizer.method == "minmax", "the first of equals"


@pytest.mark.parametrize("precision", ["int8", "w4a8"])
def test_a_step_that_gains_is_kept(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(searching, "Closeness", Rising)
    model = chain(np.geomspace(1, 0.01, 8))
    one = found(tmp_path, model, smooth_images(), precision)
    assert all(step.kept for step in one.steps)
    assert one.steps[0].detail.endswith("strength 1"), "the strongest is judged last, and so found closest"
    assert [record.name for record in one.records] == ["equalize"]
    assert one.records[0].proof.error <= one.records[0].proof.tolerance
    assert one.quantizer.bias_shift and one.quantizer.weights
    assert one.quantizer.method == "entropy", "of the best two, mse and entropy, the one that is corrected last"


@pytest.mark.parametrize("rounds", [True, False])
def test_a_correction_that_is_taken_back_leaves_the_closest_ranges(tmp_path, monkeypatch, rounds):
    """Two methods are corrected; the second becomes the closer one, but both stay behind the first uncorrected."""
    monkeypatch.setattr(searching, "Closeness", Constant)
    # four methods; the best two corrected, each on exact inputs; the better of those on the quantized prefix
    answers = [40.0, 30.0, 20.0, 10.0, 15.0, 19.0, *([] if rounds else [18.0])]
    monkeypatch.setattr(Constant, "decibels", lambda self, model, simulated=False: answers.pop(0) if answers else 40.0)
    corrected = Quantizer.corrected

    def collapsing(self, *args):
        return replace(corrected(self, *args), kept={"Conv_0": f"collapsed by {self.method}"})

    monkeypatch.setattr(Quantizer, "corrected", collapsing)
    without = ("equalize",) if rounds else ("equalize", "rounding")
    one = found(tmp_path, chain(), smooth_images(), without=without)
    (correction,) = [step for step in one.steps if step.name == "bias-correction"]
    assert (correction.kept, correction.sqnr_before_db, correction.sqnr_after_db) == (False, 40.0, 19.0)
    assert not answers
    assert one.quantizer.method == "minmax" and not one.quantizer.bias_shift
    assert one.quantizer.kept == {"Conv_0": "collapsed by minmax"}, "found with the ranges that are taken"


def test_biases_are_corrected_behind_what_is_quantized_already_where_that_is_closer(tmp_path):
    """Outputs are then right on average although all that they read is shifted; without rounding, which would do it."""
    model = chain(np.geomspace(1, 1e-3, 8))
    one = found(tmp_path, model, smooth_images(64), without=("equalize", "rounding"))
    (correction,) = [step for step in one.steps if step.name == "bias-correction"]
    assert correction.kept and "on the quantized prefix" in correction.detail
    fresh = {"x": smooth_images(200).astype(np.float32)}
    exact, shifted, bare = (
        lab.outputs(m, fresh)["y"].mean(0)
        for m in (model, one.quantizer.build().model, replace(one.quantizer, bias_shift={}).build().model)
    )
    assert np.linalg.norm(shifted - exact) < 0.5 * np.linalg.norm(bare - exact)


def test_channels_of_very_different_ranges_gain_by_equalization(tmp_path):
    """All channels of r1 share one step: the smallest is a thousandth of the largest, and counts as much behind w2."""
    model, samples = chain(np.geomspace(1, 1e-3, 8)), smooth_images()
    one = found(tmp_path, model, samples, without=("rounding",))
    (equalized,) = [step for step in one.steps if step.name == "equalize"]
    assert equalized.kept
    assert equalized.sqnr_after_db > equalized.sqnr_before_db + 10
    assert "channel variables" in equalized.detail
    fresh = {"x": smooth_images().astype(np.float32)}
    exact = lab.outputs(model, fresh)
    np.testing.assert_allclose(lab.outputs(one.quantizer.model, fresh)["y"], exact["y"], rtol=0, atol=1e-4)
    without = found(tmp_path, model, samples, without=("equalize", "rounding"))
    gained = [lab.sqnr(exact, lab.outputs(f.quantizer.build().model, fresh)) for f in (one, without)]
    assert gained[0] > gained[1] + 10  # on images that were not seen, too


@pytest.mark.parametrize("precision", ["int4", "w4a8"])
def test_weights_of_four_bits_are_rounded_better_than_to_nearest(tmp_path, precision):
    model, samples = chain(), smooth_images(64)
    one = found(tmp_path, model, samples, precision)
    (rounding,) = [step for step in one.steps if step.name == "rounding"]
    assert rounding.kept and rounding.sqnr_after_db > rounding.sqnr_before_db
    assert set(one.quantizer.weights) == {"Conv_0", "Conv_2", "Gemm_6"}
    assert all(np.abs(stored.integers).max() <= 7 for stored in one.quantizer.weights.values())
    fresh = {"x": smooth_images(64).astype(np.float32)}
    nearest = replace(one.quantizer, weights={}, bias_shift={})
    exact, (best, plain) = (
        lab.outputs(model, fresh),
        (lab.outputs(q.build().model, fresh) for q in (one.quantizer, nearest)),
    )
    assert lab.sqnr(exact, best) > lab.sqnr(exact, plain) + 1


def test_the_summary_says_what_was_calibrated_on(tmp_path):
    model, samples = chain(), smooth_images(10)
    one = found(tmp_path, model, samples, without=("equalize",))
    summary = one.calibration
    assert (summary.images, summary.held_out, summary.method) == (10, 0, one.quantizer.method)
    assert summary.key and not summary.cached and summary.images_per_second > 0
    assert set(one.statistics) == set(one.quantizer.ranges) > {"x", "r1"}
    again = found(tmp_path, model, samples, without=("equalize",)).calibration
    assert (again.key, again.cached, again.images_per_second) == (summary.key, True, None)


def test_a_method_that_is_named_is_the_only_one_tried(tmp_path):
    one = found(tmp_path, chain(), smooth_images(), method="mse")
    assert one.quantizer.method == one.calibration.method == "mse"
    assert "ranges" not in steps(one)


def test_weights_of_eight_bits_are_rounded_in_small_networks(tmp_path, monkeypatch):
    model, samples = chain(np.geomspace(1, 1e-3, 8)), smooth_images()
    small = found(tmp_path / "small", model, samples, without=("equalize",))
    (rounding,) = [step for step in small.steps if step.name == "rounding"]
    assert rounding.kept and rounding.sqnr_after_db > rounding.sqnr_before_db + 1
    assert {stored.dtype for stored in small.quantizer.weights.values()} == {"int8"}
    monkeypatch.setattr(searching, "_SMALL", 0)
    large = found(tmp_path / "large", model, samples, without=("equalize",))
    assert "rounding" not in steps(large), "too much work for what it gains"


def test_what_there_is_no_time_for_is_said(tmp_path):
    late = found(tmp_path, chain(), smooth_images(), deadline=time.monotonic())
    assert late.quantizer.method == "minmax" and not late.quantizer.bias_shift and not late.quantizer.weights
    assert steps(late) == ["smooth", "absorb", "equalize", "ranges", "bias-correction", "rounding"]
    assert all(not step.kept and "time budget" in step.detail for step in late.steps)


LIMITED = CHAIN.replace("r1 = Relu (c1)", "r1 = Clip (c1, low, high)").replace(
    "float[6] b3>", "float[6] b3, float low = {0.0}, float high = {6.0}>"
)


@pytest.mark.parametrize(("size", "kept"), [(0.1, True), (30.0, False)])
def test_channels_behind_a_relu6_are_equalized_where_nothing_reaches_its_limit(tmp_path, size, kept):
    gains = np.geomspace(1, 1e-3, 8)
    w1, w2 = RNG.normal(size=(8, 4, 3, 3)) * 0.3 * size, RNG.normal(size=(8, 8, 3, 3)) * 0.2
    weights = {"w1": w1 * gains[:, None, None, None], "b1": 0.1 * gains, "w2": w2 / gains[None, :, None, None]}
    model, samples = named(zoo.model(LIMITED, weights, opset=21)), smooth_images()
    one = found(tmp_path, model, samples, without=("rounding",))
    rows = np.abs(one.quantizer.model.graph.node("Conv_0").inputs[1].const_value.numpy()).max(axis=(1, 2, 3))
    assert (rows.min() > 0.01 * rows.max()) == kept, "a thousandth before"
    data = {"x": samples.astype(np.float32)}
    np.testing.assert_allclose(
        lab.outputs(one.quantizer.model, data)["y"], lab.outputs(model, data)["y"], rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("precision", ["int8", "int4", "w4a8"])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_model_that_gives_no_numbers_is_refused_by_the_tensors_name(tmp_path, precision, broken):
    weights = {"b1": np.r_[np.zeros(7), broken]}
    model = named(zoo.model(CHAIN.replace("Relu (c1)", "Sub (c1, c1)"), weights, opset=21))
    with pytest.raises(DataError, match="'c1' holds (NaN|infinite)"):
        found(tmp_path, model, smooth_images(), precision)


def test_infinities_that_do_not_reach_an_output_are_refused_too(tmp_path):
    """They would make a range infinite: here a Sigmoid hides them."""
    text = CHAIN.replace("r1 = Relu (c1)", "s = Conv <pads = [1,1,1,1]> (c1, w2, b2)\n    r1 = Sigmoid (s)")
    model = named(zoo.model(text, {"w2": np.abs(RNG.normal(size=(8, 8, 3, 3))), "b1": np.full(8, np.inf)}, opset=21))
    with pytest.raises(DataError, match="'c1' holds infinite"):
        found(tmp_path, model, smooth_images())
