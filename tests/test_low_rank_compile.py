"""`compile --low-rank`: what is asked for, what is handed over, and what the report says of it.

Nothing is measured but where a test is about that: the device is another one than this machine (twofold.py).
"""

import json

import numpy as np
import onnx_ir as ir
import pytest
from edgec.compiler import delivery, layers, trials
from edgec.compiler import model as model_io
from edgec.compiler.errors import BudgetError, UserError
from edgec.compiler.latency.shapes import shapes
from edgec.compiler.latency.table import Timed
from edgec.compiler.low_rank.menu import Item
from edgec.compiler.low_rank.prices import plans
from edgec.compiler.options import Saving, parse_low_rank
from edgec.compiler.report import html, serial, tables, terminal
from edgec.passes.cast_fp16 import CastFloat16
from edgec.passes.factorize import Choice
from test_prune import timing
from test_report import lines
from twofold import alone, compiled, furnished, twofold


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("auto", Saving("auto", "params")),
        ("30%", Saving("30% of the parameters", "params", (0.3,))),
        ("macs:12.5%", Saving("12.5% of the MACs", "macs", (0.125,))),
        ("latency:20%", Saving("20% of the latency", "latency", (0.2,))),
    ],
)
def test_what_can_be_asked(given, asked):
    assert parse_low_rank(given) == asked


@pytest.mark.parametrize("given", ["", "30", "0%", "macs:auto", "rank:3"])
def test_what_cannot_be_asked_says_what_can(given):
    with pytest.raises(UserError) as caught:
        parse_low_rank(given)
    assert "--low-rank" in caught.value.where


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp("low_rank"))


@pytest.fixture(scope="module")
def smaller(place):
    return compiled(place, place / "small.edgec", low_rank="40%"), place / "small.edgec"


def test_a_named_part_of_the_parameters_goes(smaller):
    report, bundle = smaller
    found = report.low_rank
    assert found.kept and found.why == "factorized as asked" and found.candidate == "low rank 40%"
    assert [a.name for a in report.attempts] == ["fp32", "low rank 40%"] and report.attempts[1].chosen
    assert found.parameters_after <= 0.6 * found.parameters_before
    model = model_io.load(bundle / "model.onnx")
    assert model_io.parameters(model) == found.parameters_after
    assert report.headline.startswith("Low-rank FP32") and "% fewer parameters" in report.headline
    record = next(r for r in report.passes if r.name == "factorize")
    assert record.modified and not record.exact and record.proof.error <= record.proof.tolerance
    assert report.fidelity.outputs[0].sqnr_db > 10, "of 16 channels 8 differ"


def test_the_report_shows_each_layer_and_comes_back(smaller):
    report, _ = smaller
    assert serial.from_json(json.loads(json.dumps(serial.to_json(report)))).low_rank == report.low_rank
    changed = [x for x in report.low_rank.layers if x.form is not None]
    assert changed and all(x.parameters_left < x.parameters for x in changed)
    for shown in ("\n".join(lines(terminal.render, report, width=100)), html.render(report)):
        assert "Low rank, asked for: 40% of the parameters" in " ".join(shown.split())
        assert all(x.node in shown for x in changed)


def test_integers_and_pruning_go_with_it(place, tmp_path):
    report = compiled(place, tmp_path / "out", low_rank="30%", prune="30%", precision="int8")
    assert report.low_rank.kept and report.pruning.kept and report.precision == "int8"
    assert report.headline.startswith("Pruned low-rank INT8")
    assert [r.name for r in report.passes if r.name in ("prune", "factorize", "quantize")] == [
        "prune", "factorize", "quantize",
    ]  # fmt: skip


def test_for_size_the_smallest_that_holds_is_kept(place, tmp_path):
    report = compiled(place, tmp_path / "out", low_rank="auto", goal="size", max_drop=20.0)
    assert report.low_rank.kept and report.low_rank.why == "the smallest that holds the budget"
    assert report.size_after_bytes < report.size_before_bytes


def test_auto_says_why_nothing_pays_where_nothing_is_measured(place, tmp_path):
    report = compiled(place, tmp_path / "out", low_rank="auto")
    assert not report.low_rank.kept and "nothing is measured" in report.low_rank.why
    assert [a.name for a in report.attempts] == ["fp32"] and "ow-rank" not in report.headline


def test_where_no_chain_is_faster_nothing_is_done_and_both_times_are_shown(place, tmp_path, monkeypatch, by_shape):
    """With times of reads times writes, chains of these small layers take longer than the layers."""
    report = compiled(place, tmp_path / "out", low_rank="auto", device="local")
    found = report.low_rank
    assert not found.kept and "nothing was factorized" in found.why
    timed = [x for x in found.layers if x.predicted_ms_chain is not None]
    assert timed and all(x.form is None for x in found.layers)
    assert "predicted ms" in "\n".join(lines(terminal.render, report, width=120))


def test_without_images_or_a_target_it_says_what_to_do(place, tmp_path):
    with pytest.raises(UserError, match="repaired on images"):
        compiled(place, tmp_path / "out", low_rank="30%", calib=None)
    with pytest.raises(UserError, match="latency is not measured"):
        compiled(place, tmp_path / "out", low_rank="latency:20%")


def test_a_network_without_such_layers(tmp_path):
    alone(tmp_path, "g (float[N,6] x) => (float[N,6] y) { y = Relu (x) }", (40, 6))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", low_rank="30%")
    assert not report.low_rank.kept and report.low_rank.layers == ()
    assert layers.describe(model_io.load(tmp_path / "out" / "model.onnx")) == ()


def test_the_other_way_round_a_factorized_network_is_pruned(place, smaller, tmp_path):
    """Ranks are channels like others; each pass stays exact to what it is judged by."""
    (tmp_path / "images").symlink_to(place / "images")
    _, bundle = smaller
    model_io.save(model_io.load(bundle / "model.onnx"), tmp_path / "model.onnx")
    for extra in place.glob("model.preprocess*"):
        (tmp_path / extra.name).write_text(extra.read_text())
    report = compiled(tmp_path, tmp_path / "out", prune="30%")
    assert report.pruning.kept and report.pruning.groups > 2, "ranks are groups of their own"
    record = next(r for r in report.passes if r.name == "prune")
    assert record.proof.error <= record.proof.tolerance
    assert report.fidelity.outputs[0].sqnr_db > 5


# ------------------------------------------------------------------------------------------- by time and size


@pytest.fixture
def by_weights(monkeypatch, tmp_path):
    """Stand in for the stop-watch of layers: a layer takes what it reads times what it writes, all else nothing."""

    def timed(models, feed, axes, **_):
        found = []
        for model in models:
            rows = [
                (s.family, *s.amounts({}), 1e-3 * np.prod(s.amounts({})) * s.family.startswith(("Conv", "Gemm")), 1)
                for s in shapes(model, feed, axes)
            ]
            found.append(Timed(rows, sum(row[3] for row in rows)))
        return found

    monkeypatch.setattr(delivery, "time_networks", timed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # what other stop-watches said is kept


def test_auto_keeps_the_fastest_choice_of_ranks_that_holds_the_budget(place, tmp_path, monkeypatch, by_weights):
    speeds = {"low rank 20%": 1.2, "low rank": 1.4, "cut": 1.4}
    monkeypatch.setattr(trials, "measure", timing(speeds))
    report = compiled(place, tmp_path / "out", low_rank="auto", device="local", max_drop=50.0)
    found = report.low_rank
    assert found.kept and found.why.startswith("the fastest that holds the budget, of the choices of ranks")
    assert found.candidate == report.attempts[1].name != "low rank 20% of the time"
    assert all(t.predicted_speedup > 1 for t in found.tried) and len(found.tried) > 1
    chosen = [x for x in found.layers if x.form is not None]
    assert chosen and all(x.predicted_ms_chain < x.predicted_ms for x in chosen)
    shown = " ".join("\n".join(lines(terminal.render, report, width=100)).split())
    assert "Choices of ranks that were tried" in shown and "timed shapes" in shown
    assert serial.from_json(json.loads(json.dumps(serial.to_json(report)))).low_rank == found


def test_auto_factorizes_nothing_where_that_is_not_faster(place, tmp_path, monkeypatch, by_shape):
    monkeypatch.setattr(trials, "measure", timing({"low rank": 0.9}))
    report = compiled(place, tmp_path / "out", low_rank="auto", device="local", max_drop=50.0)
    assert not report.low_rank.kept and [a.name for a in report.attempts] == ["fp32"]
    assert report.low_rank.why.startswith("factorization does not pay here, and nothing was factorized (low rank")


def test_a_part_of_the_latency_is_saved_until_it_is_measured(place, tmp_path, monkeypatch, by_shape):
    """Ranks that are timed are of random numbers; what is handed over is fitted."""
    monkeypatch.setattr(trials, "measure", timing({"low rank": 1.45}))
    report = compiled(place, tmp_path / "out", low_rank="latency:30%", device="local", max_drop=50.0)
    assert report.low_rank.kept and report.low_rank.why == "factorized as asked, by measured time"
    assert report.low_rank.candidate == next(a.name for a in report.attempts if a.chosen)
    assert report.low_rank.fitted.outputs[0].sqnr_db > 3


def test_a_stated_latency_leads_the_ranks(place, tmp_path, monkeypatch, by_shape):
    monkeypatch.setattr(trials, "measure", timing({"low rank": 2.0}))
    given = {"low_rank": "auto", "device": "local", "max_drop": 50.0}
    report = compiled(place, tmp_path / "as it is", max_latency_ms=1.0, **given)
    assert "holds 1 ms as it is" in report.low_rank.why and [a.name for a in report.attempts] == ["fp32"]
    report = compiled(place, tmp_path / "smaller", max_latency_ms=0.6, **given)
    assert report.low_rank.kept and report.low_rank.why.endswith("for 0.6 ms in place of 1 ms")


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_stated_size_leads_the_ranks(place, tmp_path, asked):
    """Asked for or not, where nothing else is as small."""
    whole = compiled(place, tmp_path / "whole")
    size, given = whole.size_after_bytes, {"low_rank": asked, "max_drop": 50.0}
    report = compiled(place, tmp_path / "as it is", max_size_bytes=size, **given)
    assert not (report.low_rank and report.low_rank.kept) and [a.name for a in report.attempts] == ["fp32"]
    report = compiled(place, tmp_path / "smaller", max_size_bytes=int(0.8 * size), **given)
    assert report.low_rank.kept and report.size_after_bytes <= 0.8 * size
    assert report.low_rank.why.startswith("factorized to")
    with pytest.raises(BudgetError, match="more than"):
        compiled(place, tmp_path / "too small", max_size_bytes=1000, **given)


# ------------------------------------------------------------------------------------------- other weights


def test_float16_networks_stay_so(place, tmp_path):
    model = compiled_model(place, tmp_path, CastFloat16({}))
    report = compiled(tmp_path, tmp_path / "out", low_rank="30%")
    assert report.low_rank.kept and report.fidelity.outputs[0].sqnr_db > 10
    made = model_io.load(tmp_path / "out" / "model.onnx")
    kinds = {node.inputs[1].const_value.dtype for node in made.graph if node.op_type in layers.LINEAR}
    assert kinds == {ir.DataType.FLOAT16} and len(made.graph) > len(model.graph)


def compiled_model(place, folder, *passes):
    """The network of `place` after the exact passes and others, as a file in `folder` with the same images."""
    from edgec.compiler import pipeline

    model, _ = pipeline.run(twofold(), pipeline.exact_passes(), None)
    model, _ = pipeline.run(model, list(passes), None)
    model_io.save(model, folder / "model.onnx")
    (folder / "images").symlink_to(place / "images")
    for extra in place.glob("model.preprocess*"):
        (folder / extra.name).write_text(extra.read_text())
    return model


def test_channels_and_ranks_are_tried_alone_and_together(place, tmp_path, monkeypatch, by_weights):
    """Each with half of the budget where both are left to auto; the fastest of all is handed over."""
    monkeypatch.setattr(trials, "measure", timing({"pruned 20%": 1.2, "pruned": 1.3, "low rank": 1.1, "cut": 1.5}))
    report = compiled(place, tmp_path / "out", prune="auto", low_rank="auto", device="local", max_drop=50.0)
    assert report.pruning is not None and report.low_rank is not None
    assert report.pruning.kept and report.low_rank.kept and report.low_rank.candidate.startswith("pruned")
    assert report.headline.startswith("Pruned low-rank FP32")


def test_what_is_not_handed_over_says_so(place, tmp_path, monkeypatch, by_weights):
    monkeypatch.setattr(trials, "measure", timing({"low rank": 0.9, "pruned": 1.3, "cut": 1.5}))
    report = compiled(place, tmp_path / "out", prune="auto", low_rank="auto", device="local", max_drop=50.0)
    assert report.pruning.kept and not report.low_rank.kept
    assert "nothing was factorized" in report.low_rank.why and report.headline.startswith("Pruned FP32")


# ------------------------------------------------------------------------------------------- unusual networks


def test_what_was_factorized_is_factorized_again(place, smaller, tmp_path):
    """The names of the first chains are taken."""
    _, bundle = smaller
    (tmp_path / "images").symlink_to(place / "images")
    model_io.save(model_io.load(bundle / "model.onnx"), tmp_path / "model.onnx")
    report = compiled(tmp_path, tmp_path / "out", low_rank="20%")
    assert report.low_rank.kept and report.low_rank.parameters_after <= 0.8 * report.low_rank.parameters_before


def test_a_bias_that_is_computed_stays(tmp_path):
    text = """g (float[N,12] x) => (float[N,16] y) <float[12,16] w, float[12,16] v> {
        h = MatMul (x, v)
        t = Tanh (h)
        y = Gemm (x, w, t)
    }"""
    alone(tmp_path, text, (80, 12))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", low_rank="15%")
    made = model_io.load(tmp_path / "out" / "model.onnx")
    assert report.low_rank.kept and any(node.op_type == "Tanh" and node.outputs[0].uses() for node in made.graph)
    assert report.fidelity.outputs[0].sqnr_db > 5


@pytest.mark.parametrize("count", [4, 6, 9])
def test_few_images_do_not_make_everything_look_free(tmp_path, count):
    """One row that is held out, about its own mean, is nothing."""
    alone(tmp_path, TWO_LAYERS, (count, 24))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", low_rank="30%")
    found = report.low_rank
    assert found.kept and 0.3 <= 1 - found.parameters_after / found.parameters_before < 0.5


def test_what_no_float_output_shows_counts_alike(tmp_path):
    text = TWO_LAYERS.replace("float[N,12] y", "int64[N,1] y").replace("y = Gemm", "z = Gemm")
    alone(tmp_path, text.replace("}", "y = ArgMax <axis = 1> (z) }"), (60, 24))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", low_rank="30%")
    found = report.low_rank
    assert found.kept and 0.3 <= 1 - found.parameters_after / found.parameters_before < 0.5


def test_a_layer_called_like_a_link_of_another_keeps_its_own_costs(tmp_path):
    """Chains' nodes are found in the graph, not by the names that they would have had."""
    alone(tmp_path, TWO_LAYERS, (60, 24))
    model = model_io.load(tmp_path / "model.onnx")
    first, second = (node for node in model.graph if node.op_type == "Gemm")
    first.name, second.name = "fc", "fc_svd0"
    model_io.save(model, tmp_path / "model.onnx")
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", low_rank="60%")
    found = {x.node: x for x in report.low_rank.layers}
    for x in found.values():
        assert x.form is None or x.macs_left == x.parameters_left, "a Gemm has a MAC a weight"


def test_a_fixed_batch_stays_whole(tmp_path):
    text = """g (float[8,24] x) => (float[8,4,12] y) <float[24,48] w> {
        h = MatMul (x, w)
        r = Relu (h)
        s = Constant <value_ints = [8, 4, 12]> ()
        y = Reshape (r, s)
    }"""
    alone(tmp_path, text, (64, 24))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", low_rank="30%")
    assert report.low_rank.kept


def test_macs_are_those_of_the_whole_network(tmp_path):
    """Also of what can be no chain: a ConvTranspose."""
    text = """g (float[N,4,10,10] x) => (float[N,a,b,c] y) <float[8,4,3,3] w, float[8,4,4,4] v> {
        h = Conv <pads = [1,1,1,1]> (x, w)
        y = ConvTranspose <strides = [2,2]> (h, v)
    }"""
    alone(tmp_path, text, (40, 4, 10, 10))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", low_rank="macs:10%")
    found = report.low_rank
    assert found.macs_before == 100 * 8 * 4 * 9 + 100 * 8 * 4 * 16
    assert found.kept and found.macs_after <= 0.9 * found.macs_before
    assert any("ConvTranspose" in refusal.why for refusal in tables.left_alone(report))
    report = compiled(tmp_path, tmp_path / "too much", calib=tmp_path / "samples", low_rank="macs:40%")
    assert not report.low_rank.kept and report.low_rank.why == "no choice of ranks saves that much"


TWO_LAYERS = """g (float[N,24] x) => (float[N,12] y) <float[40,24] w, float[40] b, float[12,40] v, float[12] c> {
    h = Gemm <transB = 1> (x, w, b)
    r = Relu (h)
    y = Gemm <transB = 1> (r, v, c)
}"""


# ------------------------------------------------------------------------------------------- several budgets


@pytest.mark.parametrize("part", [0.9, 0.75, 0.6])
def test_a_size_is_met(place, tmp_path, part):
    limit = int(part * compiled(place, tmp_path / "whole").size_after_bytes)
    report = compiled(place, tmp_path / "out", low_rank="auto", max_size_bytes=limit, max_drop=100.0)
    assert report.low_rank.kept and report.size_after_bytes <= limit


def test_a_latency_is_raced_for_though_a_size_holds(place, tmp_path, monkeypatch, by_shape):
    monkeypatch.setattr(trials, "measure", timing({"low rank": 2.0}))
    given = {"low_rank": "auto", "device": "local", "max_drop": 100.0, "max_size_bytes": 10**6}
    report = compiled(place, tmp_path / "out", max_latency_ms=0.6, **given)
    assert report.low_rank.kept and "in place of 1 ms" in report.low_rank.why


def test_where_the_whole_network_holds_a_size_nothing_is_made_smaller(place, tmp_path):
    """In the precision that it is handed over in: weights of 4 bits, here."""
    given = {"precision": "int4", "max_drop": 100.0}
    size = compiled(place, tmp_path / "whole", **given).size_after_bytes
    report = compiled(place, tmp_path / "out", low_rank="auto", max_size_bytes=size + 100, **given)
    assert not report.low_rank.kept and report.size_after_bytes == size


def test_a_part_of_the_latency_that_makes_it_slower_is_not_handed_over(place, tmp_path, monkeypatch, by_shape):
    monkeypatch.setattr(trials, "measure", timing({"low rank": 0.8}))
    report = compiled(place, tmp_path / "out", low_rank="latency:50%", device="local", max_drop=100.0)
    assert not report.low_rank.kept and "measured to be faster" in report.low_rank.why
    assert [a.name for a in report.attempts] == ["fp32"]


def test_each_form_of_each_layer_is_timed_at_both_ends():
    narrow = [Item(None, 0, 9, 9), *(Item(Choice("svd", (r,)), 0, r, r) for r in (8, 4, 2)),
              *(Item(Choice("spatial", (r,)), 0, r, r) for r in (6, 3))]  # fmt: skip
    wide = [Item(None, 0, 9, 9), Item(Choice("svd", (8,)), 0, 8, 8), Item(Choice("svd", (4,)), 0, 4, 4)]
    found = plans({"a": narrow, "b": wide, "c": wide[:1]})
    assert [plan["a"] for plan in found] == [1, 3, 4, 5, 2] and {plan["b"] for plan in found} == {1, 2}
    twins = plans({"a": narrow, "b": narrow})
    assert {plan["b"] for plan in twins} == {1, 2, 3, 4, 5} and any(plan["a"] != plan["b"] for plan in twins)
    assert all("c" not in plan for plan in found)
