"""What explain() says of each layer, and why: causes planted in models, and each row of their table by its facts."""

from dataclasses import fields, replace

import numpy as np
import pytest
from edgec.backends import ort as ort_backend
from edgec.backends import tensorrt
from edgec.calib.channels import ChannelExtremes
from edgec.compiler.explanation import causes
from edgec.compiler.explanation.causes import Context, Facts
from edgec.compiler.explanation.explain import annotate, explain, largest_pair
from edgec.compiler.mixed_precision import contributions
from edgec.compiler.mixed_precision.switchboard import Switchboard
from edgec.compiler.mixed_precision.units import wire
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.types import FloatScheme, Layer, QuantScheme, Range, Refusal, StepRecord, TensorStatistics
from edgec.passes.placement import place
from test_quantize import ranges_of, residual, run, weight
from test_quantizer import Images

SCHEME = ort_backend.SCHEMES[0][1]
CONTEXT = Context(SCHEME, "mse")


def statistics(values: np.ndarray) -> TensorStatistics:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    counts, _ = np.histogram(values, 4096, (low, high))
    return TensorStatistics(float(values.min()), float(values.max()), 4, counts, low, high)


def of_all(model, feed) -> dict[str, TensorStatistics]:
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    names = [v.name for n in model.graph for v in n.outputs]
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    found = dict(zip(names, run(proto, feed, names), strict=True)) | feed
    return {name: statistics(values) for name, values in found.items()}


@pytest.fixture
def subject():
    model, images = residual(), Images()
    ranges = ranges_of(model, ort_backend.SUPPORTS, images.feed)
    return Quantizer(model, ort_backend.SUPPORTS, SCHEME, ranges, "minmax"), images


def rows(quantizer, images, **options) -> dict[str, Layer]:
    found = explain(quantizer, images, statistics=of_all(quantizer.model, images.feed), threads=1, **options)
    return {row.node: row for row in found}


def test_every_layer_join_and_input_has_its_figures(subject):
    found = rows(*subject)
    assert list(found) == ["x", "Conv_0", "Conv_2", "Add_3", "Conv_5"]
    assert [x.op for x in found.values()] == ["input", "Conv", "Conv", "Add", "Conv"]
    assert sum(x.share_percent for x in found.values()) == pytest.approx(100)
    assert all(0 <= x.weights_percent <= x.share_percent for x in found.values())
    assert found["x"].weights_percent == 0 and found["Add_3"].macs == 0
    assert all(x.cause for x in found.values())
    for name in ("Conv_2", "Add_3", "Conv_5"):
        assert 20 < found[name].sqnr_out_db < 60 and 20 < found[name].sqnr_in_db < 60 and found[name].sqnr_db > 20
    assert found["Conv_0"].clipped_percent == 0  # minmax clips nothing


def test_what_is_known_of_the_errors_is_not_measured_again(subject):
    quantizer, images = subject
    plain = replace(quantizer, scheme=replace(SCHEME, shield_float=False, nhwc_kernels=False))
    model = quantizer.model
    wiring = wire(model, place(model, quantizer.ranges, quantizer.supports, plain.scheme, {}))
    board = Switchboard(model, plain.build().model, wiring, threads=1)
    known = contributions.measure(board, wiring, images.batches(4), images=4)
    found, again = rows(quantizer, images), rows(quantizer, images, contributions=known)
    assert {n: x.share_percent for n, x in again.items()} == pytest.approx(
        {n: x.share_percent for n, x in found.items()}, rel=1e-3
    )
    kept = rows(replace(quantizer, kept={"Conv_2": "for the test"}), images, contributions=known)
    assert kept["Conv_2"].share_percent is None
    assert sum(x.share_percent or 0 for x in kept.values()) == pytest.approx(100)


def test_a_kept_layer_has_its_reason_and_what_reads_it_is_charged_for_rounding_it(subject):
    quantizer, images = subject
    kept = replace(quantizer, kept={"Conv_0": "first layer"})
    found = rows(kept, images, refusals=(Refusal("Conv_0", "kept-float", "first layer"),))
    assert found["Conv_0"].precision == "float32" and found["Conv_0"].reason == "first layer"
    assert found["Conv_0"].share_percent is None and found["Conv_0"].cause is None
    assert "x" not in found  # a float layer reads the image as it is
    assert sum(x.share_percent or 0 for x in found.values()) == pytest.approx(100)
    loud = {**quantizer.ranges, "ra": Range(0.0, quantizer.ranges["ra"].max / 2)}
    charged = rows(replace(kept, ranges=loud), images)["Conv_2"]
    assert charged.cause.startswith("saturation in its input") and charged.share_percent > 80


def test_a_model_whose_opset_lacks_the_types_is_listed_in_float():
    found = explain(Quantizer(residual(), ort_backend.SUPPORTS, ort_backend.INT4), Images())
    assert [x.node for x in found] == ["Conv_0", "Conv_2", "Conv_5"]
    assert all(x.precision == "float32" and x.share_percent is None for x in found)


def test_without_images_the_layers_are_listed_all_the_same(subject):
    found = explain(subject[0], None)
    assert [x.node for x in found] == ["x", "Conv_0", "Conv_2", "Add_3", "Conv_5"]
    assert found[1].precision == "uint8 x int8" and found[1].scale and found[1].share_percent is None


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_every_scheme_can_be_explained(precision):
    """Among them one whose Q/DQ stand in front of layers only, where a residual Add is no unit of the placement."""
    model, images = residual(32), Images()
    model.opset_imports[""] = 21
    images = replace(images, feed={"x": weight(4, 32, 6, 6)})
    if precision == "int4":
        supports, scheme = ort_backend.SUPPORTS, ort_backend.INT4
    else:
        thor = next(p for p in __import__("edgec").devices() if p.name == "jetson-agx-thor")
        backend = tensorrt.TensorRT()
        supports, scheme = backend.supports, backend.schemes(thor)[precision]
        assert isinstance(scheme, QuantScheme) and not isinstance(scheme, FloatScheme)
    found = rows(Quantizer(model, supports, scheme, ranges_of(model, supports, images.feed), "minmax"), images)
    assert sum(x.share_percent or 0 for x in found.values()) == pytest.approx(100)
    assert "Conv_5" in found and found["Conv_5"].sqnr_db > 5


# ------------------------------------------------------------------------------------------ causes, planted


def cause_of(quantizer, images, name, **options):
    return rows(quantizer, images, **options)[name]


def test_an_outlier_channel_is_named_with_its_number(subject):
    quantizer, images = subject
    bias = quantizer.model.graph.initializers["b1"]
    values = bias.const_value.numpy().copy()
    values[5] = 3000.0
    import onnx_ir as ir

    bias.const_value = ir.Tensor(values, name="b1")
    ranges = ranges_of(quantizer.model, quantizer.supports, images.feed)
    steps = (StepRecord("equalize", False, 20.0, 19.0, 1.0, ""),)
    found = cause_of(replace(quantizer, ranges=ranges), images, "Conv_0", steps=steps)
    assert found.cause.startswith("outlier channel in its output: channel 5 reaches 3")
    assert found.remedy.startswith("equalize was tried and taken back")
    left_out = cause_of(replace(quantizer, ranges=ranges), images, "Conv_0", without=("equalize",))
    assert left_out.remedy == "leave --without equalize out"


def test_clipping_and_a_dead_range_are_named(subject):
    quantizer, images = subject
    ra = quantizer.ranges["ra"]
    narrow = replace(quantizer, ranges={**quantizer.ranges, "ra": Range(0.0, ra.max / 3)})
    found = cause_of(narrow, images, "Conv_0")
    values = run(quantizer.model, images.feed)  # the model still runs
    assert values and found.clipped_percent > 1
    assert found.cause.startswith("saturation in its output")
    wide = replace(quantizer, ranges={**quantizer.ranges, "ra": Range(0.0, ra.max * 4)}, method="")
    found = cause_of(wide, images, "Conv_0")
    assert found.cause == "dead range in its output: 75 % of the integers never occur"
    assert "--calib" in found.remedy


def test_the_clipped_share_is_that_of_the_elements(subject):
    quantizer, images = subject
    half = Range(0.0, quantizer.ranges["ra"].max / 2)
    found = cause_of(replace(quantizer, ranges={**quantizer.ranges, "ra": half}), images, "Conv_0")
    known = of_all(quantizer.model, images.feed)["ra"]
    edges = np.linspace(known.low, known.high, len(known.histogram) + 1)
    above = edges[:-1] > half.max * (1 + 0.5 / 255)  # within half a step of the end nothing is lost
    assert found.clipped_percent == pytest.approx(100 * known.histogram[above].sum() / known.histogram.sum(), abs=0.01)


# ------------------------------------------------------------------------------------------ causes, row by row


@pytest.mark.parametrize(
    ("what", "facts", "starts"),
    [
        (
            "output",
            Facts(outlier=9.0, channel=3, channel_largest=9.0, channel_median=1.0),
            "outlier channel in its out",
        ),
        ("weights", Facts(outlier=9.0, channel=3, channel_largest=9.0, channel_median=1.0), "outlier channel in its w"),
        ("input", Facts(clipped_percent=2.0), "saturation in its input: 2.0 %"),
        ("output", Facts(clipped_percent=0.1, clip_error_percent=60.0), "clipping in its output: 0.1 %"),
        ("output", Facts(explosion=6.0, largest=60.0, bulk=10.0), "range explosion in its output: the largest"),
        ("output", Facts(unused_percent=50.0), "dead range in its output: 50 %"),
        ("weights", Facts(pair=64770.0), "saturation in its weights: two products"),
        ("weights", Facts(levels=7), "few bits: weights of 15 levels"),
        ("weights", Facts(levels=127), "plain rounding of its weights"),
        ("weights", Facts(clipped_percent=50.0), "plain rounding of its weights"),
        ("output", Facts(outlier=7.9, clipped_percent=0.9, explosion=3.9, unused_percent=39.0), "plain rounding"),
        ("output", Facts(), "plain rounding of its output"),
    ],
)
def test_each_cause_has_its_test(what, facts, starts):
    cause, remedy = causes.likely(what, facts, CONTEXT)
    assert cause.startswith(starts)
    assert (remedy is None) == cause.startswith("plain rounding")


def test_each_row_of_the_table_reads_a_fact_that_there_is():
    known = {f.name for f in fields(Facts)}
    assert {c.fact for c in causes.CAUSES} <= known


def test_facts_of_a_tensor_on_a_hand_made_histogram():
    """100 elements at 0.5 and one at 100: it is 200 times the bulk, and clipped where the range ends at 1."""
    counts = np.zeros(1000, np.int64)
    counts[4], counts[999] = 2000, 1
    known = TensorStatistics(0.45, 100.0, 4, counts, 0.0, 100.0)
    found = causes.of_tensor(Range(0.0, 1.0), 1 / 255, known, None)
    assert found.clipped_percent == pytest.approx(100 / 2001)
    assert found.explosion == pytest.approx(100 / 0.45, rel=0.1)
    assert found.clip_error_percent > 99.9
    whole = causes.of_tensor(Range(0.0, 200.0), 200 / 255, known, None)
    assert whole.clipped_percent == 0 and whole.unused_percent == pytest.approx(50)


def test_facts_of_a_dead_and_of_a_constant_tensor():
    dead = causes.of_tensor(Range(0.0, 1.0), 1 / 255, TensorStatistics(0.0, 0.0, 4, np.zeros(8, np.int64)), None)
    assert dead.unused_percent == 100 and dead.explosion is None
    zeros = ChannelExtremes(np.zeros(4), np.zeros(4))
    assert causes.of_tensor(Range(0.0, 1.0), None, None, zeros).outlier is None


def test_facts_of_a_weight_go_by_the_channels_that_share_a_scale():
    w = np.ones((4, 3, 1, 1), np.float32)
    w[:, 2] = 20.0
    found = causes.of_weight(w, 1, 127)
    assert (found.channel, found.outlier) == (2, 20.0)
    assert causes.of_weight(w, 0, 127).outlier == 1.0
    assert causes.of_weight(w, None, 127).outlier is None


def test_products_saturate_only_where_the_cpu_adds_them_in_16_bits():
    assert largest_pair(SCHEME, ("avx2",)) == 2 * 255 * 127
    assert largest_pair(replace(SCHEME, weight_max=63), ("avx2",)) < causes.INT16
    assert largest_pair(SCHEME, ("avx2", "avx512_vnni")) is None
    assert largest_pair(SCHEME, ("neon",)) is None


def test_a_result_in_float_is_told_what_the_rejected_one_suffered_from():
    described = (Layer("a", "Conv", "float32", macs=9), Layer("b", "Conv", "float32", macs=9))
    explained = (Layer("a", "Conv", "uint8 x int8", share_percent=80.0, cause="clipping", sqnr_db=20.0),)
    first, second = annotate(described, explained)
    assert (first.precision, first.share_percent, first.cause) == ("float32", 80.0, "clipping")
    assert second == described[1]
