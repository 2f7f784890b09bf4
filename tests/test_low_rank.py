"""Low rank: the factors against closed forms, the chains against the weights that they stand for, and the compile."""

import itertools
import json

import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler import layers
from edgec.compiler import model as model_io
from edgec.compiler.errors import UserError
from edgec.compiler.low_rank import allocation, menu, repair
from edgec.compiler.low_rank.menu import Item
from edgec.compiler.options import Saving, parse_low_rank
from edgec.compiler.report import html, serial, terminal
from edgec.passes import factorize, low_rank, metric
from edgec.passes.factorize import Choice
from equivalence import sample, session
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning_compiler import error, feeds
from test_report import lines
from twofold import alone, compiled, furnished

FORMS = ("svd", "channels", "spatial", "tucker", "cp")


def layer(out=6, ins=4, kernel=(3, 3), seed=0, spread=0.1):
    """A weight, and the sums over correlated rows that it reads."""
    rng = np.random.default_rng(seed)
    size = ins * int(np.prod(kernel))
    rows = rng.normal(size=(20 * size, size)) @ (rng.normal(size=(size, size)) * np.geomspace(1, spread, size))
    return rng.normal(size=(out, ins, *kernel)), metric.ridged(rows.T @ rows)


def fit(choice, weight, h, sweeps=8):
    """A chain for a weight (out, in, k…) of one group."""
    return choice.fitted(weight[None], [h], sweeps)


def ranks_of(form, rank, shape):
    """That rank in a form, of a weight (groups, out, in, k…); all that there is of it for None."""
    _, out, ins, *kernel = shape
    first, last = (kernel[0], kernel[-1]) if kernel else (1, 1)
    most = {"svd": out, "channels": ins, "spatial": min(ins * first, out * last), "cp": 3 * out * ins}
    if form == "tucker":
        return (out, ins) if rank is None else (rank, rank)
    return (most[form] if rank is None else rank,)


# ------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_gives_the_layer_back(form):
    """To the ridge of the normal equations (1e-6); cp, whose factors are pulled to 0, to a thousandth."""
    weight, h = layer()
    chain = fit(Choice(form, ranks_of(form, None, weight[None].shape)), weight, h)
    assert chain.error < (1e-3 if form == "cp" else 1e-6)
    found = factorize.composed(chain, weight[None].shape)[0]
    assert metric.error_of(weight, found, h) == pytest.approx(chain.error, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_more_rank_errs_less_and_the_images_say_where(form):
    """Each form, at each rank, errs less than the one that knows the weight alone."""
    weight, h = layer(out=8, ins=6)
    plain = np.eye(len(h))
    errors = [fit(Choice(form, ranks_of(form, rank, weight[None].shape)), weight, h).error for rank in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    for rank, known in zip((1, 2, 4), errors, strict=False):
        blind = fit(Choice(form, ranks_of(form, rank, weight[None].shape)), weight, plain)
        found = factorize.composed(blind, weight[None].shape)[0]
        assert known <= metric.error_of(weight, found, h) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_the_truncation_is_that_of_the_whitened_weight(rank, seed):
    """Eckart and Young: the error of the best rank is what is left of the singular values of W H^1/2."""
    weight, h = layer(out=6, ins=7, kernel=(), seed=seed)
    values = np.linalg.svd(weight @ np.linalg.cholesky(h), compute_uv=False)
    found = low_rank.svd(weight, known := low_rank.spectrum(weight, h), rank)
    assert found.error == pytest.approx(float((values[rank:] ** 2).sum() / (values**2).sum()), rel=1e-6)
    lost = low_rank.svd_lost(weight, known)
    assert lost[rank] / lost[0] == pytest.approx(found.error, rel=1e-6)
    left = weight - np.tensordot(*found.arrays, 1)
    _, other = layer(out=6, ins=7, kernel=(), seed=seed + 1)
    assert low_rank.svd_lost(weight, known, other)[rank] == pytest.approx(metric.energy_of(left, other), rel=1e-6)


def test_alternating_never_makes_it_worse():
    weight, h = layer(out=8, ins=6, spread=0.01)
    for form, parts in (("channels", (8, 6, 9)), ("spatial", (8, 18, 3))):
        errors = [low_rank.reduced(weight.reshape(parts), h, 3, sweeps).error for sweeps in (0, 1, 2, 4, 8)]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors)), form


def test_both_sides_of_a_chain_are_of_one_strength():
    """What INT8 needs: no channel between two factors that dwarfs the others, nor their weights."""
    weight, h = layer(out=8, ins=8, kernel=())
    weight *= np.geomspace(1, 1e-3, 8)[:, None]
    left, right = low_rank.svd(weight, low_rank.spectrum(weight, h), 6).arrays
    ratio = np.linalg.norm(left, axis=0) / np.sqrt(np.einsum("ri,ij,rj->r", right, h, right))
    np.testing.assert_allclose(ratio, ratio[0] * np.ones(6), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_zeros_and_one_that_reads_zeros(form):
    weight, h = layer()
    for w, g in ((np.zeros_like(weight), h), (weight, metric.ridged(np.zeros_like(h)))):
        chain = fit(Choice(form, ranks_of(form, 2, weight[None].shape)), w, g)
        assert np.isfinite(chain.error) and all(np.isfinite(a).all() for a in chain.groups[0].arrays)


# ------------------------------------------------------------------------------------------- the chains

LAYERS = {
    "conv": ("Conv <pads = [1, 2, 0, 1], strides = [2, 1]>", (2, 4, 7, 6), (6, 4, 3, 2)),
    "dilated": ("Conv <pads = [2, 2, 2, 2], dilations = [2, 2]>", (2, 4, 8, 8), (6, 4, 3, 3)),
    "valid": ('Conv <auto_pad = "VALID">', (2, 4, 6, 6), (6, 4, 3, 3)),
    "same": ('Conv <auto_pad = "SAME_UPPER", strides = [2, 2]>', (2, 4, 7, 7), (6, 4, 3, 3)),
    "1x1": ("Conv", (2, 4, 5, 5), (6, 4, 1, 1)),
    "groups": ("Conv <group = 2, pads = [1, 1, 1, 1], strides = [2, 1]>", (2, 8, 7, 6), (6, 4, 3, 3)),
    "1x1 in groups": ("Conv <group = 3>", (2, 12, 5, 5), (6, 4, 1, 1)),
    "depthwise": ("Conv <group = 6, pads = [2, 2, 2, 2]>", (2, 6, 7, 7), (6, 1, 5, 5)),
    "1-d": ("Conv <pads = [1, 1], strides = [2]>", (2, 4, 9), (6, 4, 3)),
    "3-d": ("Conv <pads = [1, 1, 1, 1, 1, 1]>", (1, 4, 5, 5, 5), (6, 4, 3, 3, 3)),
    "gemm": ("Gemm <beta = 0.5>", (5, 4), (4, 6)),
    "gemm transB": ("Gemm <transB = 1>", (5, 4), (6, 4)),
    "matmul": ("MatMul", (2, 5, 4), (4, 6)),
}
CASES = [
    (name, form)
    for name, (op, _, w) in LAYERS.items()
    for form in factorize.forms((1, *w) if name != "depthwise" else (6, 1, *w[1:]))
]


def built(name, dtype="float", extra=""):
    op, x, w = LAYERS[name]
    dims = ", ".join(map(str, x))
    unknown = ", ".join("abcdef"[: len(x)])
    bias, declared = ("", "") if "MatMul" in op else (", c", f", {dtype}[6] c")
    text = f"""g ({dtype}[{dims}] x) => ({dtype}[{unknown}] y) <{dtype}[{", ".join(map(str, w))}] w{declared}> {{
        y = {op} (x, w{bias})
        {extra}
    }}"""
    model = zoo.model(text)
    for node in model.graph:
        node.name = node.name or f"{node.op_type}_{node.outputs[0].name}"
    return model, model.graph[0]


def chain_of(node, form, rank):
    weight = factorize.as_groups(node, node.inputs[1].const_value.numpy().astype(np.float64))
    plain = [np.eye(weight[0, 0].size)] * len(weight)
    return Choice(form, ranks_of(form, rank, weight.shape)).fitted(weight, plain)


def outputs_of(model):
    found = session(model_io.serialize(model))
    return [found.run(None, sample(found, seed))[0] for seed in (0, 1)]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_chain_gives_what_the_weight_that_it_stands_for_gives(name, form):
    """Float32 sums in another order: 1e-5 of the largest output."""
    model, node = built(name)
    for rank in (1, 2):
        chain = chain_of(node, form, rank)
        shape = factorize.as_groups(node, node.inputs[1].const_value.numpy()).shape
        found = factorize.factorized(model, {node.name: chain})
        want = menu.with_weights(model, {node.name: factorize.composed(chain, shape)})
        for y, z in zip(outputs_of(found), outputs_of(want), strict=True):
            assert y.shape == z.shape and np.abs(y - z).max() <= 1e-5 * np.abs(z).max()
        assert len(found.graph) == {"tucker": 3, "cp": 4}.get(form, 2)
        assert found.graph.outputs[0].name == "y" and found.graph[-1].name == node.name
        weights = sum(n.inputs[1].const_value.size for n in found.graph)
        assert weights == chain.weights == Choice(form, ranks_of(form, rank, shape)).weights(shape)
        assert len(model.graph) == 1, "the model itself stays"


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if case[1] != "cp"])
def test_a_chain_of_full_rank_is_the_layer(name, form):
    model, node = built(name)
    found = factorize.factorized(model, {node.name: chain_of(node, form, None)})
    for y, z in zip(outputs_of(found), outputs_of(model), strict=True):
        assert np.abs(y - z).max() <= 1e-4 * np.abs(z).max()


def test_half_floats_stay_half_floats():
    model, node = built("conv", "float16")
    found = factorize.factorized(model, {node.name: chain_of(node, "channels", 2)})
    assert {n.inputs[1].const_value.dtype for n in found.graph} == {ir.DataType.FLOAT16}
    assert all(np.isfinite(y).all() for y in outputs_of(found))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("y = Conv <group = 4> (x, w)", "one input and one output"),
        ("y = ConvTranspose (x, w)", "ConvTranspose"),
        ("a = Conv (x, w)\n b = Conv (x, w)\n y = Add (a, b)", "shared"),
        ("v = Neg (w)\n y = Conv (x, v)", "computed"),
        ('y = Conv <auto_pad = "SAME_UPPER"> (x, w)', "auto_pad"),
    ],
)
def test_what_cannot_be_a_chain_is_refused_by_name(text, why):
    shape = "4,1,1,1" if "group" in text else "4,4,1,1"
    model = zoo.model(f"g (float[2,4,5,5] x) => (float[a,b,c,d] y) <float[{shape}] w> {{ {text} }}")
    found = menu.refusals(model)
    assert found and all(why in refusal.why and refusal.rule == "factorize" for refusal in found)


# ------------------------------------------------------------------------------------------- which, and how well


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 1.0))
def test_the_choice_is_the_best_of_all(seed, part):
    rng = np.random.default_rng(seed)
    offered = {
        f"l{i}": [Item(None, 0.0, 100, 0), *(Item(None, float(e), int(p), 0) for e, p in zip(
            rng.uniform(0.1, 1, 3), rng.integers(10, 90, 3), strict=True))]
        for i in range(3)
    }  # fmt: skip
    found = allocation.allocate(offered, lambda item: item.params, 300 * part)
    every = [c for c in itertools.product(*offered.values()) if sum(i.params for i in c) <= 300 * part]
    assert (found is None) == (not every)
    if found is not None:
        assert sum(i.params for i in found.values()) <= 300 * part * (1 + 1e-9)
        assert sum(i.error for i in found.values()) <= min(sum(i.error for i in c) for c in every) * (1 + 1e-3) + 1e-9


def chained():
    """Two convolutions and a classifier of nearly low rank."""
    rng = np.random.default_rng(0)

    def few(out, ins, rank):
        return rng.normal(size=(out, rank)) @ rng.normal(size=(rank, ins)) + 0.02 * rng.normal(size=(out, ins))

    values = {"u": few(24, 27, 6).reshape(24, 3, 3, 3) * 0.2, "v": few(24, 216, 6).reshape(24, 24, 3, 3) * 0.1}
    text = """g (float[N,3,10,10] x) => (float[N,6] y) <float[24,3,3,3] u, float[24,24,3,3] v, float[6,24] w> {
        a = Conv <pads = [1,1,1,1]> (x, u)
        r = Relu (a)
        b = Conv <pads = [1,1,1,1]> (r, v)
        s = Relu (b)
        p = GlobalAveragePool (s)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w)
    }"""
    model = zoo.model(text, {**values, "w": rng.normal(size=(6, 24))})
    for node in model.graph:
        node.name = f"{node.op_type}_{node.outputs[0].name}"
    return model


def test_factors_fitted_to_the_images_beat_those_of_the_weights_alone():
    model = chained()
    data, other = feeds(model), feeds(model, seed=7)
    offered = menu.menu(model, data, threads=1)
    assert set(offered) == {"Conv_a", "Conv_b", "Gemm_y"} and all(items[0].choice is None for items in offered.values())
    whole = sum(items[0].params for items in offered.values())
    chosen = allocation.allocate(offered, lambda item: item.params, 0.5 * whole)
    forms = {name: item.choice for name, item in chosen.items() if item.choice is not None}
    assert forms
    fitted, chains = repair.fitted(model, forms, data, threads=1)
    found = factorize.factorized(fitted, chains)
    blind = {
        name: choice.fitted(weight := by_name(model, name), [np.eye(weight[0, 0].size)])
        for name, choice in forms.items()
    }
    plain = factorize.factorized(model, blind)
    assert model_io.parameters(found) <= 0.55 * model_io.parameters(model)
    for images_ in (data, other):
        assert error(model, found, images_) < 0.5 * error(model, plain, images_)


def by_name(model, name):
    node = next(n for n in model.graph if n.name == name)
    return factorize.as_groups(node, node.inputs[1].const_value.numpy().astype(np.float64))


# ------------------------------------------------------------------------------------------- compile


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
