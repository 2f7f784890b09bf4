"""`compile --prune`: what is asked for, what is handed over, and what the report says of it.

Nothing is measured but where a test is about that: the device is another one than this machine (twofold.py).
"""

import dataclasses
import io
import json
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import onnx
import pytest
import zoo
from conftest import document
from edgec.compiler import guard, layers, trials
from edgec.compiler import model as model_io
from edgec.compiler.errors import BudgetError, UserError
from edgec.compiler.options import Saving, parse_prune
from edgec.compiler.report import html, serial, tables, terminal, text
from edgec.compiler.types import Budget, Measurement, PrunedLayer
from equivalence import sample, session
from test_guard import FP32, attempt
from test_report import full, lines
from twofold import alone, compiled, furnished


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp("prune"))


@pytest.fixture(scope="module")
def cut(place):
    """The report of a named cut, and its bundle."""
    return compiled(place, place / "cut.edgec", prune="60%"), place / "cut.edgec"


# ------------------------------------------------------------------------------------------- asking


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("auto", Saving("auto")),
        ("30%", Saving("30% of the MACs", "macs", (0.3,))),
        ("macs:12.5%", Saving("12.5% of the MACs", "macs", (0.125,))),
        (" params:50% ", Saving("50% of the parameters", "params", (0.5,))),
        ("latency:20%", Saving("20% of the latency", "latency", (0.2,))),
    ],
)
def test_what_can_be_asked(given, asked):
    assert parse_prune(given) == asked


@pytest.mark.parametrize("given", ["", "half", "30", "0%", "100%", "-5%", "params:auto", "weights:30%", "30 points"])
def test_what_cannot_be_asked_says_what_can(given):
    with pytest.raises(UserError) as caught:
        parse_prune(given)
    assert "--prune" in caught.value.where and "%" in caught.value.fix


@pytest.mark.parametrize("asked", ["auto", "30%"])
def test_without_images_nothing_is_cut(place, tmp_path, asked):
    with pytest.raises(UserError, match="repaired on images, and there are none") as caught:
        compiled(place, tmp_path / "out", calib=None, prune=asked)
    assert "--calib" in caught.value.fix and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- the guard


CUT = attempt("pruned 50%", "fp32", 0.9, 1.1)


def test_a_named_cut_is_obeyed_though_it_is_slower():
    slow = attempt("pruned 50%", "fp32", 1.2, 0.8, drop=0.5)
    found = guard.choose([FP32, slow], Budget(), named="fp32", unasked=1)
    assert [a.chosen for a in found] == [False, True]
    assert [a.verdict for a in found] == ["the baseline: not what was asked for", "asked for"]


def test_a_named_cut_that_loses_too_much_is_handed_over_and_says_so():
    found = guard.choose([FP32, attempt("pruned 50%", "fp32", 0.5, 2.0, drop=3.0)], Budget(), named=None, unasked=1)
    assert found[1].chosen and found[1].verdict == "asked for, but loses 3.00 points of top1, more than 1"


def test_what_is_made_of_a_named_cut_is_tried_beside_it():
    fast, lossy = attempt("int8", "int8", 0.5, 2.0), attempt("int8", "int8", 0.5, 2.0, drop=3.0)
    first = guard.choose([FP32, CUT, fast], Budget(), named=None, unasked=1)
    assert [a.chosen for a in first] == [False, False, True]
    assert [a.verdict for a in first[1:]] == [
        "inside the budget",
        "the fastest of what was asked for, inside the budget",
    ]
    assert guard.choose([FP32, CUT, lossy], Budget(), named=None, unasked=1)[1].chosen


def test_of_a_named_cut_and_a_named_precision_both_are_kept():
    found = guard.choose([FP32, CUT, attempt("int8", "int8", 1.5, 0.7)], Budget(), named="int8", unasked=1)
    assert [a.chosen for a in found] == [False, False, True]
    assert [a.verdict for a in found[1:]] == ["inside the budget", "asked for"], "there is one baseline"


# ------------------------------------------------------------------------------------------- a named cut


def test_a_named_cut_is_made_repaired_and_handed_over(cut):
    report, bundle = cut
    p = report.pruning
    assert p.kept and p.why == "pruned as asked" and p.candidate == "pruned 60%" and p.asked == "60% of the MACs"
    assert [a.name for a in report.attempts] == ["fp32", "pruned 60%"] and report.attempts[1].chosen
    model = model_io.load(bundle / "model.onnx")
    counted = {layer.node: layer.macs for layer in layers.describe(model)}
    assert counted == {x.node: x.macs_left for x in p.layers}
    assert sum(counted.values()) <= 0.4 * sum(x.macs for x in p.layers)
    assert model_io.parameters(model) == p.parameters_after < p.parameters_before
    for x in p.layers:
        weight = next(n for n in model.graph if n.name == x.node).inputs[1].const_value.shape.numpy()
        assert tuple(weight[:2]) == (x.outputs_left, x.inputs_left)
    assert [(x.inputs, x.outputs) for x in p.layers] == [(3, 16), (16, 16), (16, 5)]
    assert (p.layers[0].inputs_left, p.layers[-1].outputs_left) == (3, 5), "what goes in and comes out stays"


def test_the_cut_network_gives_nearly_the_same(place, cut):
    """Half of the channels are copies: what is lost is the ridge's pull and, where 8 do not suffice, a little more."""
    report, bundle = cut
    before, after = (session((p / "model.onnx").read_bytes()) for p in (place, bundle))
    assert [(v.name, v.shape) for v in after.get_outputs()] == [(v.name, v.shape) for v in before.get_outputs()]
    assert report.fidelity.drop <= 10 and report.pruning.repaired == report.fidelity
    (repaired,), (broken,) = report.pruning.repaired.outputs, report.pruning.unrepaired.outputs
    assert repaired.sqnr_db > broken.sqnr_db + 10 and repaired.sqnr_db > 20
    feed = sample(before, 0)
    assert before.run(None, feed)[0].shape == after.run(None, feed)[0].shape


def test_the_pass_is_proven_and_its_refusals_are_listed(cut):
    report, _ = cut
    record = next(r for r in report.passes if r.name == "prune")
    assert not record.exact and record.modified and record.rewrites > 0
    assert record.proof.error <= record.proof.tolerance
    assert report.refusals == report.pruning.refusals or set(record.refusals) <= set(report.refusals)


def test_through_the_command_line_it_is_measured_judged_and_opened_again(place, tmp_path, edgec):
    out = tmp_path / "cut.edgec"
    options = ("--calib", place / "images", "--prune", "60%", "--precision", "fp32", "--threads", 1)
    done = edgec("compile", place / "model.onnx", "-o", out, *options)
    assert done.returncode == 0, done.stderr
    assert "Pruned FP32 for this CPU" in done.stdout and "Pruning, asked for: 60% of the MACs" in done.stdout
    report = json.loads((out / "report.json").read_text())
    timed = next(a for a in report["attempts"] if a["name"] == report["pruning"]["candidate"])
    assert timed["measurement"]["median_ms"] > 0 and timed["measurement"]["speedup"] is not None
    assert document(edgec("eval", out, place / "images", "--threads", 1, "--json"))["conditions"]["clean"]["value"] > 90
    bench = edgec("bench", out, "--against", place / "model.onnx", "--seconds", 0.2, "--threads", 1)
    assert bench.returncode == 0, bench.stderr


def test_parameters_can_be_asked_for(place, tmp_path):
    p = compiled(place, tmp_path / "out", prune="params:50%").pruning
    assert p.kept and p.parameters_after <= 0.5 * p.parameters_before


def test_more_than_there_is_cuts_what_there_is_and_says_so(place, tmp_path):
    report = compiled(place, tmp_path / "out", prune="99%")
    assert report.pruning.kept and "% is what can be cut in whole units" in report.pruning.why
    assert all(min(x.inputs_left, x.outputs_left) > 0 for x in report.pruning.layers)


def test_a_stated_budget_that_a_named_cut_breaks_is_an_error_with_the_best_attempt(place, tmp_path):
    with pytest.raises(BudgetError, match="loses"):
        compiled(place, tmp_path / "out", prune="99%", max_drop=0.5)
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_a_precision_beside_it_quantizes_the_cut_network(place, tmp_path):
    report = compiled(place, tmp_path / "out", prune="60%", precision="int8")
    assert report.precision == "int8" and report.pruning.kept
    assert report.headline.startswith("Pruned INT8 for Raspberry Pi 5")
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    assert {node.op_type for node in proto.graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    sizes = {t.dims[0] for t in proto.graph.initializer if len(t.dims) == 4}
    assert sizes == {x.outputs_left for x in report.pruning.layers[:2]}
    assert [record.name for record in report.passes].index("prune") < [r.name for r in report.passes].index("quantize")


# ------------------------------------------------------------------------------------------- auto


def timing(speeds):
    """Stand in for the stop-watch: the speed-up of each candidate by the first letters of its name; else 1."""

    def measure(this, candidates, *, seconds=0.0):
        found = {"original": Measurement("original", "local", 1.0)}
        for i, one in enumerate(candidates):
            speed = next((s for name, s in speeds.items() if name in one.name), 1.0)
            ends = {} if i == 0 else {"speedup": speed, "speedup_low": 0.99 * speed, "speedup_high": 1.01 * speed}
            found[one.name] = Measurement(one.name, "local", 1.0 / speed, **ends)
        return found

    return measure


def test_auto_prunes_nothing_where_no_cut_is_shown_to_be_faster(place, tmp_path, monkeypatch, by_shape):
    monkeypatch.setattr(trials, "measure", timing({"pruned": 0.9}))
    report = compiled(place, tmp_path / "out", prune="auto", device="local")
    p = report.pruning
    assert not p.kept and p.candidate is None and p.layers == ()
    assert p.why.startswith("pruning does not pay here, and nothing was pruned (pruned 20% of the time: 0.90x,")
    assert [t.measured_speedup for t in p.tried] == [0.9] * len(p.tried) and all(
        t.predicted_speedup > 1 for t in p.tried
    )
    assert [a.name for a in report.attempts] == ["fp32"], "a later measurement cannot turn to what was turned down"
    whole, kept = (model_io.parameters(model_io.load(f / "model.onnx")) for f in (place, tmp_path / "out"))
    assert kept == whole - 6 * 16 + 16 * 2 - 2 * 16  # BatchNormalization folded: 8 x 16 numbers become 2 biases
    assert "Pruned" not in report.headline
    for shown in ("\n".join(lines(terminal.render, report)), html.render(report)):
        assert "pruning does not pay here" in " ".join(shown.split())


def test_auto_keeps_the_fastest_cut_that_holds_the_budget(place, tmp_path, monkeypatch, by_shape):
    monkeypatch.setattr(trials, "measure", timing({"pruned 20%": 1.2, "pruned 55%": 1.5, "pruned": 1.1, "cut": 1.5}))
    report = compiled(place, tmp_path / "out", prune="auto", device="local", max_drop=20.0)
    name = "pruned 55% of the time"
    assert report.pruning.candidate == name and text.is_pruned(report)
    assert [a.name for a in report.attempts] == ["fp32", name]
    assert {t.name for t in report.pruning.tried if t.verdict.startswith("the fastest")} == {name}
    assert any("timed shapes of layers" in note for note in report.pruning.notes)
    for shown in (shown_at(report, 100), html.render(report)):
        assert "Cuts that were tried" in shown and "timed shapes of layers" in " ".join(shown.split())


def test_what_is_made_of_a_cut_must_beat_what_is_made_of_the_whole(place, tmp_path, monkeypatch, by_shape):
    """The cut is faster than the whole network, but the best of each, raced at the end, are alike."""
    monkeypatch.setattr(trials, "measure", timing({"pruned": 1.5, "cut": 1.01}))
    report = compiled(place, tmp_path / "out", prune="auto", device="local", max_drop=20.0)
    assert not report.pruning.kept and [a.name for a in report.attempts] == ["fp32"]
    assert report.pruning.why.startswith("it does not pay here: the best of the smaller network is 1.01x as fast")


def test_what_is_made_of_the_whole_network_is_still_there_when_the_two_race(place, tmp_path, monkeypatch, by_shape):
    """Both have an int8 candidate: the files must not be the same."""
    raced, stop_watch = [], timing({"pruned": 1.5, "int8": 3.0, "cut": 1.5})

    def numbers(model):
        return sum(value.const_value.size for value in model.graph.initializers.values())

    def measure(this, candidates, *, seconds=0.0):
        if [one.name for one in candidates] == ["whole", "cut"]:
            raced.extend((numbers(one.model), numbers(model_io.load(one.path))) for one in candidates)
        return stop_watch(this, candidates, seconds=seconds)

    monkeypatch.setattr(trials, "measure", measure)
    report = compiled(
        place, tmp_path / "out", prune="auto", device="local", precision="auto", max_drop=50.0,
        without="mixed-precision",
    )  # fmt: skip
    assert report.pruning.kept and report.precision == "int8"
    assert len(raced) == 2 and all(meant == found for meant, found in raced) and raced[1] < raced[0]


def test_a_part_of_the_latency_is_cut_until_it_is_measured_to_be_saved(place, tmp_path, monkeypatch, by_shape):
    """What is foretold is too much, by a tenth: the next cut aims at what the last one missed."""

    def slower(this, candidates, *, seconds=0.0):
        found = {"original": Measurement("original", "local", 1.0)}
        for i, one in enumerate(candidates):
            speed = 1 / (0.1 + 0.9 * sum(x.macs for x in layers.describe(one.model)) / whole)
            found[one.name] = Measurement(
                one.name, "local", 1 / speed, **({"speedup": speed, "speedup_low": speed} if i else {})
            )
        return found

    whole = 144 * 16 * (3 * 9 + 16 * 9) + 16 * 5
    monkeypatch.setattr(trials, "measure", slower)
    report = compiled(place, tmp_path / "out", prune="latency:30%", device="local")
    p = report.pruning
    assert p.kept and p.why == "pruned as asked, by measured time" and p.asked == "30% of the latency"
    chosen = next(a for a in report.attempts if a.chosen)
    assert chosen.name == p.candidate and chosen.measurement.speedup >= 1 / 0.7
    assert all(t.verdict in ("fast enough", "not fast enough") for t in p.tried)


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_stated_latency_is_cut_for_only_where_it_does_not_hold(place, tmp_path, monkeypatch, by_shape, asked):
    monkeypatch.setattr(trials, "measure", timing({"pruned": 2.0}))
    given = {"prune": asked, "device": "local", "max_drop": 50.0}
    report = compiled(place, tmp_path / "as it is", max_latency_ms=1.0, **given)
    assert asked is None and report.pruning is None or "holds 1 ms as it is" in report.pruning.why
    assert [a.name for a in report.attempts] == ["fp32"]
    report = compiled(place, tmp_path / "cut", max_latency_ms=0.6, **given)
    assert report.pruning.kept and text.is_pruned(report)
    assert report.pruning.why == "pruned as asked, by measured time, for 0.6 ms in place of 1 ms"
    with pytest.raises(BudgetError, match="takes 0.5 ms, more than 0.2 ms"):
        compiled(place, tmp_path / "too slow", max_latency_ms=0.2, **given)


def test_a_part_of_the_latency_needs_a_target(place, tmp_path):
    with pytest.raises(UserError, match="latency is not measured") as caught:
        compiled(place, tmp_path / "out", prune="latency:20%")
    assert "--prune macs:30%" in caught.value.fix and not (tmp_path / "out").exists()


def test_auto_does_not_take_a_fast_cut_that_loses_too_much(place, tmp_path, monkeypatch, by_shape):
    monkeypatch.setattr(trials, "measure", timing({"pruned": 3.0}))
    judge = trials.judge

    def harsh(this, candidates, *, as_built=False):
        found = judge(this, candidates, as_built=as_built)
        return {n: dataclasses.replace(f, drop=9.0) if "pruned" in n else f for n, f in found.items()}

    monkeypatch.setattr(trials, "judge", harsh)
    report = compiled(place, tmp_path / "out", prune="auto", device="local")
    assert not report.pruning.kept and "loses 9.00 points" in report.pruning.why


def test_auto_cannot_say_what_pays_where_nothing_is_measured(place, tmp_path):
    report = compiled(place, tmp_path / "out", prune="auto")
    assert (
        not report.pruning.kept and "nothing is measured" in report.pruning.why and "--prune 30%" in report.pruning.why
    )


def test_for_size_the_smallest_that_holds_is_kept_without_a_measurement(place, tmp_path):
    report = compiled(place, tmp_path / "out", prune="auto", goal="size", max_drop=20.0)
    p = report.pruning
    assert p.kept and p.why == "the smallest that holds the budget"
    assert p.parameters_after <= 0.55 * p.parameters_before
    assert report.size_after_bytes < report.size_before_bytes and text.is_pruned(report)


# ------------------------------------------------------------------------------------------- nothing to prune


@pytest.mark.parametrize("asked", ["auto", "30%"])
def test_a_single_layer_has_nothing_to_cut(tmp_path, asked):
    alone(tmp_path, "g (float[N,6] x) => (float[N,4] y) <float[6,4] w> { y = Gemm (x, w) }", (40, 6))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", prune=asked)
    assert not report.pruning.kept and report.pruning.why == "no channel of the model can be cut"
    assert report.pruning.groups == 0 and report.fidelity.drop == 0


def test_what_is_not_understood_is_refused_by_name_and_listed(tmp_path):
    """A CumSum over the channels: what stands before it cannot be cut; what stands behind it can."""
    shown = """g (float[N,3,4,4] x) => (float[N,5] y)
    <float[4,3,1,1] u, float[8,4,1,1] v, float[5,8] w, int64 axis = {1}> {
        a = Conv (x, u)
        b = CumSum (a, axis)
        c = Conv (b, v)
        r = Relu (c)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w)
    }"""
    alone(tmp_path, shown, (40, 3, 4, 4))
    report = compiled(tmp_path, tmp_path / "out", calib=tmp_path / "samples", prune="30%")
    p = report.pruning
    assert p.kept and p.groups == 1 and p.layers[0].outputs_left == 4
    assert any("CumSum" in r.node or "CumSum" in r.why for r in p.refusals), p.refusals
    assert set(p.refusals) <= set(tables.left_alone(report))
    unkept = dataclasses.replace(report, pruning=dataclasses.replace(p, kept=False), refusals=(), passes=())
    assert set(p.refusals) <= set(tables.left_alone(unkept)), "also where nothing was cut in the end"


def test_macs_that_are_unknown_are_not_counted(tmp_path):
    """Of a network for images of any size only the weights can be counted."""
    shown = """g (float[N,3,H,W] x) => (float[N,4] y) <float[8,3,3,3] u, float[8,8,3,3] v, float[4,8,3,3] w> {
        a = Conv (x, u)
        r = Relu (a)
        c = Conv (r, v)
        q = Relu (c)
        d = Conv (q, w)
        p = GlobalAveragePool (d)
        y = Flatten (p)
    }"""
    alone(tmp_path, shown, (40, 3, 12, 12))
    options = {"calib": tmp_path / "samples", "precision": "fp32"}
    report = compiled(tmp_path, tmp_path / "out", prune="30%", **options)
    assert not report.pruning.kept and "--prune params:30%" in report.pruning.why
    report = compiled(tmp_path, tmp_path / "again", prune="params:30%", **options)
    biases = sum(x.outputs_left for x in report.pruning.layers)  # which repair gave to layers that had none
    assert report.pruning.kept and report.pruning.parameters_after - biases <= 0.7 * report.pruning.parameters_before
    assert all(x.macs is None for x in report.pruning.layers)
    assert "% of the parameters cut" in report.headline


# ------------------------------------------------------------------------------------------- the report


def shown_at(report, width):
    return "\n".join(lines(terminal.render, report, width=width))


def test_json_gives_the_same_pruning_back(cut):
    report, _ = cut
    assert serial.from_json(json.loads(json.dumps(serial.to_json(report)))).pruning == report.pruning


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_what_was_cut(cut, width):
    report, _ = cut
    shown = shown_at(report, width)
    assert max(map(len, shown.splitlines())) <= width
    flat = " ".join(shown.split())
    first, second, last = report.pruning.layers
    assert f"{first.node} 3 16 -> {first.outputs_left} " in flat
    assert f"{second.node} 16 -> {second.inputs_left} 16 -> {second.outputs_left} " in flat
    assert f"{last.node} 16 -> {last.inputs_left} 5 " in flat
    assert "pruned as asked" in flat and "cut, not repaired" in flat and "cut and repaired" in flat
    assert f"parameters {text.si(report.pruning.parameters_before)} " in flat
    assert "pruned 60%: latency not measured" in flat


def test_the_page_draws_each_layer(cut):
    report, _ = cut
    page = html.render(report)
    root = ET.fromstring(page.replace("<!DOCTYPE html>\n", ""))
    said = " ".join(root.itertext())
    for x in report.pruning.layers:
        assert f"{x.node}: {x.outputs_left} of {x.outputs} outputs kept" in said
    kept, every = sum(x.outputs_left for x in report.pruning.layers), 16 + 16 + 5
    assert f"Channels kept in each of 3 layers: {kept} of {every}" in said


def test_the_headline_says_how_much_is_gone(cut):
    report, _ = cut
    gone = 100 * (1 - sum(x.macs_left for x in report.pruning.layers) / sum(x.macs for x in report.pruning.layers))
    assert (
        report.headline.startswith("Pruned FP32 for Raspberry Pi 5")
        and f"{gone:.0f} % of the MACs cut" in report.headline
    )


def test_a_cut_that_the_last_measurement_turned_down_is_not_claimed(cut):
    report, _ = cut
    whole, pruned = report.attempts
    turned = (dataclasses.replace(whole, chosen=True), dataclasses.replace(pruned, chosen=False))
    other = dataclasses.replace(report, attempts=turned, headline="")
    assert "runed" not in text.headline(other) and "cut" not in text.headline(other)
    assert "what you got is not the cut network" in " ".join(shown_at(other, 80).split())


def test_many_layers_are_shortened_on_the_terminal_and_names_are_escaped(cut):
    report, _ = cut
    long = "/model/very/long/names/of/an/exporter/<b>[red]"
    rows = tuple(PrunedLayer(f"{long}{i}", 64, 64, 32, 64, 1000 + i, 500) for i in range(40))
    same = (PrunedLayer("untouched", 8, 8, 8, 8, 10, 10),)
    other = dataclasses.replace(report, pruning=dataclasses.replace(report.pruning, layers=(*rows, *same)))
    shown = shown_at(other, 80)
    assert max(map(len, shown.splitlines())) <= 80
    flat = " ".join(shown.split())
    assert "not listed: 16 layers that save less, 1 layer untouched (report.html has them)" in flat
    page = html.render(other)
    ET.fromstring(page.replace("<!DOCTYPE html>\n", ""))
    assert "All 41 layers" in page and "<b>[red]" not in page


def test_a_report_without_pruning_says_nothing_of_it():
    report = full()
    assert "Pruning" not in shown_at(report, 80) and "Pruning" not in html.render(report)
    assert io.StringIO(text.headline(report)).read().startswith("INT8 for")


def test_what_is_foretold_is_a_ratio_to_the_cut_network(tmp_path):
    """Mixed precision times its choices beside the network that they were made from."""
    point = SimpleNamespace(speedup=2.0, db=40.0, integer_macs=1.0)
    path = tmp_path / "model.onnx"
    model_io.save(zoo.model("g (float[1] x) => (float[1] y) { y = Relu (x) }"), path)
    made = SimpleNamespace(name="int8", precision="int8", predicted=point, calibration_db=None, path=path)
    measured = {n: Measurement(n, "local", ms) for n, ms in (("fp32", 10.0), ("pruned 30%", 8.0), ("int8", 4.1))}
    assert trials.attempt(made, measured, {}, "pruned 30%").predicted_ms == pytest.approx(4.0)
    assert trials.attempt(made, measured, {}).predicted_ms == pytest.approx(5.0)
