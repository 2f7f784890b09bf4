"""Ranking, allocation and repair on small networks; costs against the MACs of the cut model."""

import functools
import time

import numpy as np
import onnx_ir as ir
import prune_zoo
import pytest
import zoo
from edgec.backends.ort import Session
from edgec.compiler import layers, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.fitting import probe
from edgec.compiler.fitting.images import split
from edgec.compiler.pruning import allocation, importance, repair, swaps
from edgec.compiler.pruning import costs as pruning_costs
from edgec.compiler.pruning.branch_ranking import rank_branches
from edgec.passes import channel_cuts, pruning
from edgec.passes.branches import branches as find_branches
from edgec.passes.cut_moves import JoinMoves
from hypothesis import given, settings
from hypothesis import strategies as st

ANIMALS = ("resnet-a", "resnet-b", "densenet", "shufflenet-v1", "mobilenet-v2", "mobilenet-v3", "unet", "vit")


def prepared(model):
    """The model as prune() has it: named, folded, its shuffles joined."""
    return pipeline.run(model, [*pipeline.exact_passes(), JoinMoves()], None)[0]


@functools.cache
def animal(name):
    model = prepared(prune_zoo.BUILDERS[name]())
    return model, channel_cuts.groups(model)


def feeds(model, batches=3, batch=24, seed=0):
    rng = np.random.default_rng(seed)
    specs = model_io.input_specs(model)
    if any(spec.shape[0] is not None for spec in specs):
        batches, batch = batches * batch, 1
    shapes = {spec.name: [batch if d is None else d for d in spec.shape] for spec in specs}
    return [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(batches)]


def outputs(model, data):
    session = Session(model_io.serialize(model), threads=1, optimise=False)
    return [session.run(feed) for feed in data]


def error(model, other, data):
    """Return the error energy of the worst output over its signal's."""
    pairs = list(zip(outputs(model, data), outputs(other, data), strict=True))
    return max(
        sum(np.square(y[n] - z[n], dtype=np.float64).sum() for y, z in pairs)
        / sum(np.square(y[n], dtype=np.float64).sum() for y, _ in pairs)
        for n in pairs[0][0]
    )


def random_cut(groups, seed, least=0, most=1.0):
    rng = np.random.default_rng(seed)
    counts = {g.name: rng.integers(least, max(int(most * g.units), least + 1)) for g in groups}
    return groups.feasible({g.name: rng.permutation(g.units)[: counts[g.name]].tolist() for g in groups})


def weight_of(model, name):
    return next(node for node in model.graph if node.name == name).inputs[1].const_value.numpy()


# ------------------------------------------------------------------------------------------- repair


@pytest.mark.parametrize("name", ANIMALS)
def test_where_nothing_was_cut_repair_changes_nothing(name):
    """Y is the layer's own output, so what is owed, Y'X - W X'X, is float32's rounding of sums over a few hundred
    terms, about 1e-7; a dozen layers pass it on."""
    model, _ = animal(name)
    data = feeds(model)
    whole = repair.repaired(model, {}, data, threads=1)
    for y, z in zip(outputs(model, data), outputs(whole, data), strict=True):
        for key in y:
            assert np.abs(y[key] - z[key]).max() <= 2e-6 * np.abs(y[key]).max()


@pytest.mark.parametrize("name", ANIMALS)
def test_a_repaired_network_is_closer_on_the_images_and_on_others(name):
    model, groups = animal(name)
    data = feeds(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    gone = random_cut(groups, seed=1, least=1, most=0.6)
    cut, mended = channel_cuts.cut(model, gone), repair.repaired(model, gone, data, pruning.RIDGE, threads=1)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before, "the model is the caller's"
    assert error(model, mended, data) <= error(model, cut, data)
    others = feeds(model, seed=9)
    assert error(model, mended, others) < error(model, cut, others)
    assert [tuple(n.inputs[1].shape) for n in cut.graph if n.op_type == "Conv"] == [
        tuple(n.inputs[1].shape) for n in mended.graph if n.op_type == "Conv"
    ]


def test_the_ridge_is_the_best_of_those_on_held_out_images(monkeypatch):
    """Whichever is chosen at a layer, no other errs less on the sums of the fifth of the images that is held out."""
    model, groups = animal("resnet-b")
    seen, real = [], repair._chosen

    def chosen(every, apart, weight, read):
        ridge = real(every, apart, weight, read)
        rest = every.less(apart)
        errors = dict.fromkeys(pruning.RIDGES, 0.0)
        for g, kept in enumerate(read):
            for other in pruning.RIDGES if len(kept) else ():
                fitted = pruning.refit(rest.gram()[g], rest.cross()[g], kept, other, weight[g])
                gram, cross = apart.gram()[g][np.ix_(kept, kept)], apart.cross()[g][:, kept]
                errors[other] += pruning.squared_error(gram, cross, fitted)
        assert errors[ridge] == min(errors.values())
        assert 4 * apart.rows == pytest.approx(rest.rows, rel=0.3)
        seen.append(ridge)
        return ridge

    monkeypatch.setattr(repair, "_chosen", chosen)
    gone = random_cut(groups, seed=1, least=1, most=0.6)
    repair.repaired(model, gone, feeds(model), threads=1)
    assert len(seen) > 3


@pytest.mark.parametrize(("count", "batch"), [(3, 24), (15, 1), (2, 3)])
def test_each_image_is_fitted_to_or_held_out_once(count, batch):
    data = [{"x": np.arange(i * batch, (i + 1) * batch)[:, None]} for i in range(count)]
    model = zoo.model("g (float[N,1] x) => (float[N,1] y) { y = Relu (x) }")
    pieces, flags = split(model, data, seed=0)
    assert sorted(np.concatenate([piece["x"][:, 0] for piece in pieces])) == list(range(count * batch))
    assert sum(len(p["x"]) for p, flag in zip(pieces, flags, strict=True) if flag) == count * (batch // 5) or batch == 1
    assert batch > 1 or sum(flags) == count // 5
    again, _ = split(model, data, seed=0)
    assert all((a["x"] == b["x"]).all() for a, b in zip(pieces, again, strict=True))


@pytest.mark.parametrize("skip", [False, True])
def test_what_a_relu_takes_away_is_forgiven(monkeypatch, skip):
    """Behind the Relu the error of the fitted images falls, whether an Add stands in front of it or not."""
    end = "s = Add (d, r2)\n y = Relu (s)" if skip else "y = Relu (d)"
    text = f"""g (float[N,3,8,8] x) => (float[N,6,8,8] y)
    <float[6,3,3,3] w1, float[6,3,1,1] w2, float[6,6,3,3] w3> {{
        c = Conv <pads = [1,1,1,1]> (x, w1)
        r = Relu (c)
        c2 = Conv (x, w2)
        r2 = Relu (c2)
        d = Conv <pads = [1,1,1,1]> (r, w3)
        {end}
    }}"""
    model = prepared(zoo.model(text))
    groups, data = channel_cuts.groups(model), feeds(model)
    cut = next(group.name for group in groups if "d" in layer_outputs(model, group.consumers))
    errors = {}
    for work in (1e10, 0):
        monkeypatch.setattr("edgec.compiler.fitting.layerwise.FORGIVEN_WORK", work)
        errors[work] = error(model, repair.repaired(model, {cut: [1, 4]}, data, 1e-3, threads=1), data)
    assert errors[1e10] < 0.97 * errors[0]


def duplicated(seed=0, bias="", shared=False):
    """Two convolutions; every channel between them is there twice, so half of them can go without a loss."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(4, 3, 3, 3)) / 5
    values = {"w1": np.concatenate([first, first]), "w2": rng.normal(size=(4, 8, 3, 3)) / 8, "b": rng.normal(size=8)}
    text = f"""g (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[8,3,3,3] w1, float[4,8,3,3] w2, float[8] b> {{
        c1 = Conv <pads = [1,1,1,1]> (x, w1{bias})
        r = Relu (c1)
        y = Conv <pads = [1,1,1,1]> (r, w2)
    }}"""
    return prepared(zoo.model(text, values))


def test_copies_go_first_and_their_readers_make_up_for_them():
    """Exactly but for the ridge, which pulls the sum of two weights towards one: 1 % of the mean energy."""
    model = duplicated()
    groups, data = channel_cuts.groups(model), feeds(model)
    (ranking,) = importance.rank(model, groups.groups, data, threads=1).values()
    gone = ranking.order[:4]
    assert sorted(unit % 4 for unit in gone) == [0, 1, 2, 3], "one of each pair"
    assert ranking.curve[4] < 1e-3 < 1e-2 < ranking.curve[5]
    mended = repair.repaired(model, {groups[0].name: gone}, data, pruning.RIDGE, threads=1)
    assert error(model, mended, feeds(model, seed=5)) < 1e-3
    assert error(model, channel_cuts.cut(model, {groups[0].name: gone}), data) > 0.1


def test_a_layer_without_bias_is_given_one():
    """The channels that go are of mean 1: without a bias behind them the output would be off by a constant."""
    text = """g (float[N,3,6,6] x) => (float[N,2,6,6] y)
    <float[4,3,1,1] w1, float[4] b1, float[2,4,1,1] w2> { h = Conv (x, w1, b1)
        y = Conv (h, w2) }"""
    values = {"w1": np.eye(4, 3).reshape(4, 3, 1, 1) * 0.01, "b1": np.ones(4), "w2": np.full((2, 4, 1, 1), 0.5)}
    model = prepared(zoo.model(text, values))
    groups, data = channel_cuts.groups(model), feeds(model)
    mended = repair.repaired(model, {groups[0].name: [0, 3]}, data, pruning.RIDGE, threads=1)
    last = [node for node in mended.graph if node.op_type == "Conv"][-1]
    assert len(last.inputs) == 3 and last.inputs[2] is not None
    np.testing.assert_allclose(last.inputs[2].const_value.numpy(), 1.0, atol=0.02)  # half of 4 x 1 x 0.5
    assert error(model, mended, data) < 1e-3


def test_what_one_branch_of_a_sum_loses_the_other_makes_up_for():
    """Both branches see the same features; one has lost half of them. It is too late for a layer that comes before.

    `makers` would fit the features that are left to the one branch, and the other could not make up for it exactly.
    """
    branches = {
        "s": "h = Conv (x, w)\n r = Relu (h)\n s = Conv (r, v)",
        "t": "k = Conv (x, w2)\n q = Relu (k)\n t = Conv (q, u)",
    }
    feature = np.random.default_rng(3).normal(size=(8, 3, 1, 1))
    errors = {}
    for order in ("st", "ts"):
        body = "\n".join(branches[name] for name in order)
        text = f"""g (float[N,3,6,6] x) => (float[N,4,6,6] y)
        <float[8,3,1,1] w, float[8,3,1,1] w2, float[4,8,1,1] v, float[4,8,1,1] u> {{ {body}
            y = Add (s, t) }}"""
        model = prepared(zoo.model(text, {"w": feature, "w2": feature}))
        groups, data = channel_cuts.groups(model), feeds(model)
        cut = next(group.name for group in groups if "s" in layer_outputs(model, group.consumers))
        mended = repair.repaired(model, {cut: range(4)}, data, 1e-6, makers=False, threads=1)
        errors[order] = error(model, mended, data)
    assert errors["st"] < 1e-6 < 1e-3 < errors["ts"]


def layer_outputs(model, names):
    return [node.outputs[0].name for node in model.graph if node.name in names]


def test_depthwise_and_flattened_channels():
    """Conv, depthwise, Flatten of 2 x 2 positions, Gemm: a unit is one channel, a row of the kernel, four columns."""
    net = prune_zoo.Net("N", 3, 4, 4)
    x = net.op(f"Relu ({net.conv('x', 3, 6, 3)})")
    x = net.op(f"Relu ({net.conv(x, 6, 6, 3, group=6, stride=2)})")
    x = net.op(f"Gemm <transB = 1> ({net.op(f'Flatten ({x})')}, {net.weight(5, 24)}, {net.weight(5)})")
    model = prepared(net.model((x, ("N", 5))))
    groups, data = channel_cuts.groups(model), feeds(model)
    (ranking,) = importance.rank(model, groups.groups, data, threads=1).values()
    assert len(ranking.order) == 5 and len(ranking.curve) == 6
    gone = {groups[0].name: list(ranking.order[:2])}
    mended = repair.repaired(model, gone, data, pruning.RIDGE, threads=1)
    assert [tuple(n.inputs[1].shape) for n in mended.graph if n.op_type in layers.LINEAR] == [
        (4, 3, 3, 3),
        (4, 1, 3, 3),
        (5, 16),
    ]
    assert error(model, mended, data) < error(model, channel_cuts.cut(model, gone), data)
    costs = pruning_costs.counted(model, groups.groups, "macs")
    assert costs.of(gone) == pytest.approx(4 * 27 * 16 + 4 * 9 * 4 + 5 * 16)


def test_layers_that_share_a_weight_keep_it():
    text = """g (float[N,4,6,6] x) => (float[N,4,6,6] y) <float[4,4,3,3] w, float[4,4,1,1] v> {
        a = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu (a)
        s = Conv (r, v)
        b = Conv <pads = [1,1,1,1]> (s, w)
        y = Conv (b, v)
    }"""
    model = prepared(zoo.model(text))
    groups, data = channel_cuts.groups(model), feeds(model)
    rankings = importance.rank(model, groups.groups, data, threads=1)
    gone = {name: list(ranking.order[:1]) for name, ranking in rankings.items()}
    assert gone
    mended = repair.repaired(model, gone, data, pruning.RIDGE, threads=1)
    assert np.isfinite(error(model, mended, data))
    first, cut = mended.graph[0].inputs[1], channel_cuts.cut(model, gone).graph[0].inputs[1]
    np.testing.assert_array_equal(first.const_value.numpy(), cut.const_value.numpy())


@pytest.mark.parametrize("kind", ["in groups", "transposed"])
def test_groups_that_only_such_convolutions_read_are_ranked_and_repaired(kind):
    """Half of the channels are multiples of the others: the elimination takes them, and nothing is lost."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(2, 2, 3, 3, 3))  # two groups of four channels, of which two say it all
    first = np.concatenate([half, 2 * half], axis=1).reshape(8, 3, 3, 3)
    if kind == "in groups":
        reader, weight = "Conv <group = 2, pads = [1,1,1,1]>", rng.normal(size=(6, 4, 3, 3))
    else:
        reader, weight = "ConvTranspose <strides = [2,2]>", rng.normal(size=(8, 6, 2, 2))
    shape = ",".join(map(str, weight.shape))
    text = f"""g (float[N,3,8,8] x) => (float[N,6,h,w] y) <float[8,3,3,3] u, float[{shape}] v> {{
        a = Conv <pads = [1,1,1,1]> (x, u)
        r = Relu (a)
        y = {reader} (r, v)
    }}"""
    model = prepared(zoo.model(text, {"u": first, "v": weight}))
    (group,), data = channel_cuts.groups(model), feeds(model)
    (ranking,) = importance.rank(model, [group], data, threads=1).values()
    count = group.units // 2
    gone = {group.name: list(ranking.order[:count])}
    assert ranking.curve[count] < 1e-3 < ranking.curve[count + 1]
    mended = repair.repaired(model, gone, data, threads=1)
    assert error(model, mended, data) < 1e-3 < error(model, channel_cuts.cut(model, gone), data)


def test_what_was_not_ranked_in_time_stays():
    model, groups = animal("resnet-b")
    assert importance.rank(model, groups.groups, feeds(model, 1), threads=1, deadline=time.monotonic()) == {}
    branches = find_branches(model).branches
    assert rank_branches(model, branches, feeds(model, 1), threads=1, deadline=time.monotonic()) == {}


def test_half_floats_are_left_alone():
    """What has no float32 weight has no Gram matrix, so nothing is ranked, and nothing will be cut."""
    model = prepared(prune_zoo.resnet("B", dtype="float16"))
    groups = channel_cuts.groups(model)
    data = [{"x": np.zeros((2, 3, 8, 8), np.float16)}]
    assert importance.rank(model, groups.groups, data, threads=1) == {}


def test_beta_of_a_gemm_goes_into_its_bias():
    for beta in (0.0, 0.5):
        text = f"""g (float[N,3] x) => (float[N,2] y) <float[3,2] w, float[2] c> {{
            y = Gemm <beta = {beta}> (x, w, c)
        }}"""
        model = zoo.model(text, {"w": np.zeros((3, 2)), "c": np.array([2.0, 4.0])})
        (node,) = model.graph
        repair.shift_bias(model.graph, node, np.array([1.0, -1.0]), repair.Names.of(model))
        (found,) = outputs(model, [{"x": np.ones((1, 3), np.float32)}])
        np.testing.assert_allclose(found["y"], [[2 * beta + 1, 4 * beta - 1]], rtol=1e-6)


# ------------------------------------------------------------------------------------------- exchanges


@pytest.mark.parametrize("name", ["resnet-b", "shufflenet-v2"])
def test_of_the_exchanges_the_one_stands_whose_outputs_err_least(name):
    model, groups = animal(name)
    rankings, data = rankings_of(name), feeds(model, batches=1)
    removed = groups.feasible({n: list(ranking.order[: len(ranking.order) // 2]) for n, ranking in rankings.items()})
    chosen = swaps.swapped(model, groups, removed, rankings, data, tries=4, threads=1)
    first = next(g.name for g in groups if removed.get(g.name) and len(g.consumers) > 1)
    tried = [removed, *swaps._exchanges(groups, removed, first, rankings[first].order, 4)]
    assert len(tried) > 2 and chosen in tried
    for other in tried:
        assert {n: len(units) for n, units in other.items()} == {n: len(units) for n, units in removed.items()}
        assert {n for n in removed if set(other[n]) != set(removed[n])} <= {first}
    errors = [error(model, repair.repaired(model, one, data, threads=1), data) for one in tried]
    assert errors[tried.index(chosen)] == pytest.approx(min(errors), rel=1e-3)


def test_the_closest_calls_are_tried_first():
    _, groups = animal("resnet-b")
    group = max(groups, key=lambda group: group.units)
    order = list(np.random.default_rng(0).permutation(group.units))
    found = swaps._exchanges(groups, {group.name: order[:3]}, group.name, order, 3)
    assert [set(one[group.name]) for one in found] == [
        {order[0], order[1], order[3]},
        {order[0], order[1], order[4]},
        {order[0], order[2], order[3]},
    ]


def test_nothing_is_exchanged_where_nothing_is_cut_or_the_network_is_large(monkeypatch):
    model, groups = animal("resnet-b")
    assert swaps.swapped(model, groups, {}, rankings_of("resnet-b"), feeds(model), threads=1) == {}
    monkeypatch.setattr(probe, "LARGE", 10)
    removed = random_cut(groups, seed=1, least=1, most=0.6)
    assert swaps.swapped(model, groups, removed, rankings_of("resnet-b"), feeds(model), threads=1) is removed


# ------------------------------------------------------------------------------------------- ranking


def by_hand():
    """Four channels: their weights' L1 and L2 norms, BatchNormalization's scale and their energy all order otherwise.

    channel   weights of x1, x2     L1     L2^2    scale   energy (x1 of size 1, x2 of size 0.1)
    0         0.6, 0.6             1.2     0.72    4       about 0.36
    1         1.0, 0.0             1.0     1.00    3       1
    2         0.0, 1.1             1.1     1.21    1       about 0.01
    3         1.5, 0.0             1.5     2.25    2       2.25
    """
    text = """g (float[N,2,1,1] x) => (float[N,1,1,1] y) <float[4,2,1,1] w, float[1,4,1,1] v> {
        h = Conv (x, w)
        y = Conv (h, v)
    }"""
    w = np.array([[0.6, 0.6], [1.0, 0.0], [0.0, 1.1], [1.5, 0.0]]).reshape(4, 2, 1, 1)
    model = prepared(zoo.model(text, {"w": w, "v": np.ones((1, 4, 1, 1))}))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2, 1, 1)) * np.array([1.0, 0.1]).reshape(1, 2, 1, 1)
    return model, [{"x": x.astype(np.float32)}]


@pytest.mark.parametrize(
    ("criterion", "order"),
    [("l1", (1, 2, 0)), ("l2", (0, 1, 2)), ("bn", (2, 3, 1)), ("energy", (2, 0, 1))],
)
def test_each_criterion_orders_by_its_own_measure(criterion, order):
    model, data = by_hand()
    groups = channel_cuts.groups(model)
    scales = {groups[0].name: np.array([4.0, -3.0, 1.0, 2.0])}
    (ranking,) = importance.rank(model, groups.groups, data, criterion, scales=scales, threads=1).values()
    assert ranking.order == order
    assert len(ranking.curve) == 4 and ranking.curve[0] == 0 and (np.diff(ranking.curve) >= 0).all()


def test_elimination_loses_nothing_where_channels_are_dependent():
    """The channels span two dimensions: any two that differ in direction make up for the others."""
    model, data = by_hand()
    groups = channel_cuts.groups(model)
    curves = {
        criterion: next(
            iter(importance.rank(model, groups.groups, data, criterion, ridge=1e-9, threads=1).values())
        ).curve
        for criterion in ("obs", "l1")
    }
    assert curves["obs"][2] < 1e-6 * curves["obs"][3]
    assert curves["obs"][3] <= curves["l1"][3] + 1e-12


def test_without_scales_the_norm_takes_their_place():
    model, data = by_hand()
    groups = channel_cuts.groups(model)
    orders = [
        next(iter(importance.rank(model, groups.groups, data, criterion, threads=1).values())).order
        for criterion in ("bn", "l1")
    ]
    assert orders[0] == orders[1]


# ------------------------------------------------------------------------------------------- allocation


def counted(model, kind):
    """What the layers of a model cost, counted anew."""
    nodes = [n for n in model.graph if n.op_type in layers.LINEAR and n.inputs[1].const_value is not None]
    return {n.name: n.inputs[1].const_value.size if kind == "params" else layers.macs(n) for n in nodes}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(ANIMALS), st.integers(0, 10_000), st.sampled_from(["macs", "params"]))
def test_the_cost_is_that_of_the_cut_model(name, seed, kind):
    model, groups = animal(name)
    gone, costs = random_cut(groups, seed), pruning_costs.counted(model, groups.groups, kind)
    found = counted(channel_cuts.cut(model, gone), kind)
    assert {layer: costs.of_layer(layer, gone) for layer in found} == pytest.approx(found, rel=1e-9)
    assert costs.of(gone) == pytest.approx(sum(found.values()), rel=1e-9)


@pytest.mark.parametrize("name", ["resnet-b", "shufflenet-v2", "yolo", "mobilenet-v2"])
@pytest.mark.parametrize("saved", [0.15, 0.4])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_part_asked_for_goes_and_little_more(name, saved, kind):
    model, groups = animal(name)
    rankings = rankings_of(name)
    costs = pruning_costs.counted(model, groups.groups, kind)
    gone = allocation.allocate(costs, rankings, saved)
    budget = (1 - saved) * costs.of({})
    assert costs.of(gone) <= budget
    for group, units in gone.items():  # what costs error cannot come back
        curve = rankings[group].curve
        if curve[len(units)] > curve[len(units) - 1]:
            assert costs.of({**gone, group: units[:-1]}) > budget


@functools.cache
def rankings_of(name):
    model, groups = animal(name)
    return importance.rank(model, groups.groups, feeds(model, batches=1), probes=(0.5,), threads=1)


def test_units_go_in_steps_and_one_always_stays():
    model, groups = animal("yolo")
    rankings = rankings_of("yolo")
    costs = pruning_costs.counted(model, groups.groups, "macs")
    steps = {group.name: 4 for group in groups if group.units % 4 == 0}
    gone = allocation.allocate(costs, rankings, 0.3, steps)
    assert all(len(units) % 4 == 0 for name, units in gone.items() if name in steps)
    every = groups.feasible(allocation.allocate(costs, rankings, 0.9999))
    assert all(len(units) < group.units for group in groups for units in [every.get(group.name, [])])
    channel_cuts.cut(model, every)


def test_what_is_already_small_enough_is_left_alone():
    model, groups = animal("resnet-b")
    costs = pruning_costs.counted(model, groups.groups, "macs")
    assert allocation.allocate(costs, rankings_of("resnet-b"), 0.0) == {}
    assert allocation.allocate(costs, {}, 0.5) == {}
