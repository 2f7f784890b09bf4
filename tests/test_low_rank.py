"""Low rank: the factors against closed forms, the chains against the weights that they stand for, and the compile."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler import model as model_io
from edgec.compiler.fitting import layout
from edgec.compiler.low_rank import allocation, menu, repair
from edgec.compiler.low_rank.menu import Item
from edgec.passes import chain_noise, factorize, low_rank, metric
from edgec.passes.factorize import Choice
from equivalence import sample, session
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning_compiler import error, feeds

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
    """To the ridge of the normal equations."""
    weight, h = layer()
    chain = fit(Choice(form, ranks_of(form, None, weight[None].shape)), weight, h)
    assert chain.error < 1e-6
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
    found = low_rank.svd(weight, low_rank.spectrum(weight, h), rank)
    assert found.error == pytest.approx(float((values[rank:] ** 2).sum() / (values**2).sum()), rel=1e-6)
    made = np.tensordot(*found.arrays, 1)
    assert metric.error_of(weight, made, h) == pytest.approx(found.error, rel=1e-6)


def test_alternating_never_makes_it_worse():
    weight, h = layer(out=8, ins=6, spread=0.01)
    for form, parts in (("channels", (8, 6, 9)), ("spatial", (8, 18, 3))):
        errors = [
            low_rank.reduced(low_rank.Parted(weight.reshape(parts), h), 3, sweeps).error for sweeps in (0, 1, 2, 4, 8)
        ]
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


# ------------------------------------------------------------------------------------------- what a layer reads


def test_many_rows_speak_for_themselves_and_one_for_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 6)) * np.geomspace(1, 0.1, 6)
    gram = x.T @ x
    assert np.abs(metric.shrunk(gram, len(x)) - gram).max() < 1e-2 * np.trace(gram) / 6
    one = metric.shrunk(np.outer(x[0], x[0]), 1)
    assert np.linalg.cond(one) < 10, "nothing is free that one row does not show"


def test_shrinking_comes_closer_to_what_other_images_say():
    """The point of it: with 12 rows of 30 inputs, the covariance that they show is less right than the shrunk one."""
    rng = np.random.default_rng(0)
    spread = np.diag(np.geomspace(1, 0.2, 30))
    x = rng.normal(size=(12, 30)) @ spread
    truth, gram = 12 * spread @ spread, x.T @ x
    assert np.linalg.norm(metric.shrunk(gram, 12) - truth) < 0.7 * np.linalg.norm(gram - truth)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(10, 20), st.integers(0, 1000))
def test_few_rows_stand_for_the_matrix_that_is_not_made(rows, inputs, seed):
    rng = np.random.default_rng(seed)
    x, d = rng.normal(size=(rows, inputs)), rng.normal(size=(3, inputs))
    few, dense = metric.shrunk_rows(x), metric.shrunk(x.T @ x, rows)
    assert len(few) == len(dense)
    np.testing.assert_allclose(d @ few, d @ dense, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(metric.solved(few, d.T), metric.solved(dense, d.T), rtol=1e-6, atol=1e-9)
    both = [metric.pulled(h, 0.5) for h in (few, dense)]
    np.testing.assert_allclose(d @ both[0], d @ both[1], rtol=1e-6)
    assert metric.energy_of(d, few) == pytest.approx(metric.energy_of(d, dense))


def test_layers_with_too_many_inputs_keep_their_rows_and_come_to_the_same(monkeypatch):
    model = chained()
    forms = {"Conv_b": Choice("svd", (8,)), "Gemm_y": Choice("svd", (4,))}
    dense = repair.fitted(model, forms, feeds(model), threads=1)[0]
    wide = [s.wide for s in layouts(model)]
    monkeypatch.setattr(layout, "MOST_INPUTS", 20)
    monkeypatch.setattr(menu, "MOST_INPUTS", 20)
    assert not any(wide) and all(s.wide for s in layouts(model))
    fitted = repair.fitted(model, forms, feeds(model), threads=1)[0]
    for name in forms:
        np.testing.assert_allclose(by_name(fitted, name), by_name(dense, name), rtol=1e-3, atol=1e-4)
    offered = menu.menu(model, feeds(model), threads=1)
    assert {item.choice.form for items in offered.values() for item in items[1:]} == {"svd"}


def layouts(model):
    nodes = (node for node in model.graph if node.op_type in ("Conv", "Gemm"))
    return [layout.layout_of(node, tuple(node.inputs[1].shape.numpy()), wide=True) for node in nodes]


# ------------------------------------------------------------------------------------------- integers


@pytest.mark.parametrize("form", FORMS)
def test_the_noise_of_integers_is_about_what_rounding_does(form):
    """Against rounding done by hand: weights per output channel of each link, what stands between them per tensor."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 6, 3, 3))
    x = rng.normal(size=(4000, 54)) @ np.diag(np.geomspace(1, 0.3, 54))
    chain = fit(Choice(form, (4, 4) if form == "tucker" else (3,)), weight, x.T @ x)
    expected = chain_noise.energy(chain, weight[None], [x.T @ x], len(x))
    alone = chain.error * metric.energy_of(weight, x.T @ x)
    coarse = chain_noise.energy(chain, weight[None], [x.T @ x], len(x), most=7)
    assert alone < expected < 1.5 * alone and coarse > expected, "8 bits cost little, 4 more"


def test_between_the_factors_of_an_svd_the_noise_is_that_of_rounding():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(8, 20)), rng.normal(size=(50_000, 20))
    chain = fit(Choice("svd", (8,)), weight, x.T @ x)
    left, right = (chain_noise.rounded(a) for a in chain.groups[0].arrays)
    between = x @ chain.groups[0].arrays[1].T
    step = 2 * 5 * between.std(axis=0).max() / 255
    made = (np.rint(between / step) * step) @ chain.groups[0].arrays[0].T
    noise = np.square(made - x @ weight.T).sum() + metric.energy_of(weight - left @ right, x.T @ x)
    found = chain_noise.energy(chain, weight[None], [x.T @ x], len(x))
    assert found == pytest.approx(noise, rel=0.1)


def test_where_integers_will_run_the_menu_knows():
    model = chained()
    floats, integers = (menu.menu(model, feeds(model), integers=most, threads=1) for most in (None, 127))
    for name, items in integers.items():
        assert items[0].error > 0 == floats[name][0].error
        assert all(a.error >= 0.98 * b.error for a, b in zip(items, floats[name], strict=True))


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


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_chain_of_full_rank_is_the_layer(name, form):
    """To float32's sums; cp, which is iterated, to a thousandth of the largest output."""
    model, node = built(name)
    found = factorize.factorized(model, {node.name: chain_of(node, form, None)})
    for y, z in zip(outputs_of(found), outputs_of(model), strict=True):
        assert np.abs(y - z).max() <= (1e-3 if form == "cp" else 1e-4) * np.abs(z).max()


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
