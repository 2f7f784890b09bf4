"""Latency by shape: what a node's shape is, which node a kernel belongs to, the table, and costs of cuts from it."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import zoo
from edgec.compiler import delivery
from edgec.compiler import model as model_io
from edgec.compiler.delivery import Delivery
from edgec.compiler.latency import table as tables
from edgec.compiler.latency.attribution import by_node, longest_known
from edgec.compiler.latency.kernel_times import Kernel
from edgec.compiler.latency.networks import time_networks
from edgec.compiler.latency.shapes import shapes
from edgec.compiler.latency.table import CALL, LatencyTable, Timed, from_timed
from edgec.compiler.memory import Memory, context
from edgec.compiler.pruning import costs as pruning_costs
from edgec.compiler.pruning import latencies
from edgec.compiler.pruning.cutting import steps_of
from edgec.compiler.pruning.latencies import Pricing, variants
from edgec.compiler.pruning.structure import Structure
from edgec.passes import channel_cuts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pruning_compiler import ANIMALS, animal, random_cut

# ------------------------------------------------------------------------------------------- shapes

NET = """g (float[N,3,H,W] x) => (float[N,8,h,w] y)
<float[8,3,3,3] u, float[8,1,3,3] v, float[8,8,1,1] w, float[8,8,1,1] z> {
    a = Conv <pads = [1,1,1,1]> (x, u)
    r = Relu (a)
    d = Conv <pads = [1,1,1,1], group = 8> (r, v)
    p = Conv (d, w)
    q = Conv (p, z)
    y = Add (q, r)
}"""


def named(model):
    for node in model.graph:
        node.name = node.name or f"{node.op_type}_{node.outputs[0].name}"
    return model


def feed_of(model, size=6):
    rng = np.random.default_rng(0)
    lengths = {
        s.name: [d or (1 if i == 0 else size) for i, d in enumerate(s.shape)] for s in model_io.input_specs(model)
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in lengths.items()}


def test_a_shape_is_fixed_by_what_is_fed_not_by_what_the_file_says():
    model = named(zoo.model(NET))
    found = {s.node: s for s in shapes(model, feed_of(model))}
    assert found["Conv_a"].amounts({}) == (3, 8) and found["Conv_d"].amounts({}) == (8, 8)
    assert found["Add_y"].amounts({}) == (16, 8), "elements per position, of both operands"
    assert "at=(6, 6)" in found["Conv_a"].family
    assert found["Conv_p"].family != found["Conv_q"].family, (
        "an Add reads one of them: it is fused, or reordered for it"
    )
    assert {s.node: s.family for s in shapes(model, feed_of(model, 9))}["Conv_a"] != found["Conv_a"].family
    assert model.graph.outputs[0].shape is not None, "the model is as it was"


def test_layers_of_one_shape_are_one_family():
    model = named(zoo.model(NET.replace("y = Add (q, r)", "s = Conv (q, z)\n    y = Relu (s)").replace("d, w", "d, z")))
    found = {s.node: s for s in shapes(model, feed_of(model))}
    assert found["Conv_p"].family == found["Conv_q"].family
    assert found["Conv_d"].family != found["Conv_p"].family, "one of them works channel by channel"


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(ANIMALS), st.integers(0, 10_000))
def test_what_a_cut_network_reads_and_writes_is_foretold(name, seed):
    """The costs of a cut are those of the network that is really cut, whatever the table says."""
    model, groups = animal(name)
    gone, feed = random_cut(groups, seed), feed_of(model)
    network = channel_cuts.cut(model, gone)
    table = SimpleNamespace(call_ms=0.25, ms=lambda family, i, o: 1.0 + i + 2 * o + 3 * i * o)
    axes = Structure.of(model).axes
    found = pruning_costs.timed(groups.groups, shapes(model, feed, axes), table)
    kept = {node.name for node in network.graph}
    real = {s.node: table.ms(s.family, *s.amounts({})) for s in shapes(network, feed, axes)}
    same = [node for node in found.layers if node in kept & set(real)]  # a cut may bring Gathers of its own
    assert same and {n: found.of_layer(n, gone) for n in same} == pytest.approx({n: real[n] for n in same}, rel=1e-9)
    whole = sum(table.ms("", *s.amounts({})) for s in shapes(model, feed, axes))
    assert found.of({}) == pytest.approx(0.25 + whole)


def test_what_is_switched_off_costs_nothing():
    axis = pruning_costs.Axis(1, {"branch": np.array([0])})
    layer = pruning_costs.LayerCost((pruning_costs.Axis(4, {"g": np.arange(4)}),), lambda left: 8 * left[0])
    found = pruning_costs.Costs({"conv": layer, "other": layer}, "ms", 1.0).also({"conv": [axis], "unknown": [axis]})
    assert found.of({}) == 17 and found.of({"g": [0]}) == 13
    assert found.of({"branch": [0]}) == 9 and found.of({"branch": [0], "g": [0, 1]}) == 5


# ------------------------------------------------------------------------------------------- attribution


def test_kernels_find_their_nodes():
    """Names as ONNX Runtime makes them: fused, renamed, reordered, and its own inventions."""
    model = named(zoo.model(NET))
    kernels = [
        Kernel("ReorderInput", "ReorderInput", ("x",), ("x_nchwc",), 1.0),
        Kernel("r_nchwc", "Conv", ("x_nchwc", "u"), ("r_nchwc",), 2.0),  # with the Relu, whose output it has
        Kernel("d_nchwc", "Conv", ("r_nchwc", "v"), ("d_nchwc",), 4.0),
        Kernel("p_nchwc", "Conv", ("d_nchwc", "w"), ("p_nchwc",), 8.0),
        Kernel("y_nchwc", "Conv", ("p_nchwc", "z", "r_nchwc"), ("y_nchwc",), 16.0),  # with the Add
        Kernel("ReorderOutput_token_7", "ReorderOutput", ("y_nchwc",), ("y",), 32.0),
    ]
    assert by_node(kernels, model) == {
        "Conv_a": (3.0, 2), "Conv_d": (4.0, 1), "Conv_p": (8.0, 1), "Conv_q": (48.0, 2),
    }  # fmt: skip


def test_the_longest_known_name_counts():
    known = {"conv": 1, "conv_1": 2}
    assert longest_known("conv_1_nchwc", known) == "conv_1" and longest_known("conv_11", known) == "conv"
    assert longest_known("other", known) == ""


@pytest.mark.parametrize("name", ["resnet-a", "shufflenet-v2", "mobilenet-v3", "vit"])
def test_every_kernel_that_really_runs_belongs_to_a_node(name):
    model = animal(name)[0]
    (timed,) = time_networks([model], feed_of(model), threads=1, seconds=0.1)
    assert timed.whole_ms > 0
    lost = [row for row in timed.nodes if row[0].startswith("unknown")]
    assert sum(row[3] for row in lost) <= 0.1 * sum(row[3] for row in timed.nodes), lost


# ------------------------------------------------------------------------------------------- the table


def truth(i, o, block=16):
    """A kernel that works on blocks of channels."""
    up = [-(-n // block) * block for n in (i, o)]
    return 0.01 + 2e-4 * up[0] * up[1] + 1e-4 * up[1]


def drawn(count, seed=0):
    rng = np.random.default_rng(seed)
    return [(float(4 * rng.integers(1, 25)), float(4 * rng.integers(1, 25))) for _ in range(count)]


def test_the_block_that_kernels_work_on_is_found_and_what_lies_between_is_foretold():
    found = LatencyTable({"f": {at: truth(*at) for at in drawn(40)}})
    assert found.block == 16
    for at in drawn(60, seed=1):
        assert found.ms("f", *at) == pytest.approx(truth(*at), rel=0.03)
    assert found.ms("f", 64, 60) == pytest.approx(found.ms("f", 64, 64), rel=0.03), "inside a block nothing is saved"


def test_what_was_timed_is_believed_as_it_is_and_what_is_unknown_is_none():
    found = LatencyTable({"f": {(8.0, 8.0): 5.0, (16.0, 16.0): 1.0}})
    assert found.ms("f", 8, 8) == 5.0 and found.ms("f", 16, 16) == 1.0
    assert found.ms("g", 8, 8) is None and found.ms("f", 0, 8) == 0.0
    assert found.knows("f", 8, 8) and not found.knows("f", 8, 16)


@pytest.mark.parametrize(("slower", "per_kernel", "call"), [(1.0, 0.0, 0.0), (1.04, 0.002, 0.02), (1.05, 0.004, 0.0)])
def test_the_profilers_own_time_is_taken_out(slower, per_kernel, call):
    """What it reports is distorted by a factor and an addend; whole latencies, measured without it, tell."""
    networks = []
    for seed in range(8):
        points = drawn(3 + 2 * seed, seed)
        whole = call + sum(truth(*at) for at in points)
        networks.append(Timed([("f", *at, truth(*at) * slower + per_kernel, 1) for at in points], whole))
    found = from_timed(networks)
    assert found.misfit < 0.01 and found.call_ms == pytest.approx(call, abs=0.01)
    for at in drawn(3):
        assert found.ms("f", *at) == pytest.approx(truth(*at), rel=0.02)


def test_a_network_that_is_learned_is_foretold_as_it_was_timed():
    """Whatever the machine's speed was in between: the whole network, timed beside it, tells."""
    table = LatencyTable({"f": {(8.0, 8.0): 1.0, (16.0, 16.0): 4.0}, CALL: {(0.0, 0.0): 0.5}})
    whole = Timed([("f", 16.0, 16.0, 4.0, 1)], 2 * 4.5)
    other = Timed([("f", 12.0, 12.0, 2.4, 1), ("f", 8.0, 12.0, 0.8, 1)], 2 * 3.5)
    found = table.learned(whole, 4.5, other)
    assert found.call_ms + found.ms("f", 12, 12) + found.ms("f", 8, 12) == pytest.approx(3.5)
    assert found.ms("f", 12, 12) == pytest.approx(3 * found.ms("f", 8, 12))
    assert found.ms("f", 8, 8) == 1.0 and not table.knows("f", 12, 12)
    disturbed = Timed(other.nodes, 4 * 3.5)  # the kernels do not say why it took so long: somebody else did
    assert table.learned(whole, 4.5, disturbed) is table


def test_what_two_networks_share_keeps_its_time_and_the_rest_takes_what_is_left():
    """So the ratio of the two comes out as it was timed, whatever noise there was in one shared kernel."""
    table = LatencyTable({"f": {(8.0, 8.0): 1.0, (16.0, 16.0): 4.0}, CALL: {(0.0, 0.0): 0.5}})
    whole = Timed([("f", 16.0, 16.0, 4.0, 1), ("f", 8.0, 8.0, 1.0, 1)], 5.5)
    other = Timed([("f", 12.0, 12.0, 3.0, 1), ("f", 8.0, 8.0, 1.2, 1)], 4.3)
    found = table.learned(whole, 5.5, other)
    assert found.ms("f", 16, 16) == 4.0 and found.ms("f", 8, 8) == 1.0
    assert found.call_ms + found.ms("f", 12, 12) + found.ms("f", 8, 8) == pytest.approx(4.3)


def test_timed_shapes_are_kept_for_other_networks(tmp_path):
    def memory():
        return Memory(context("layers", precision="fp32"), tmp_path / "measured.sqlite")

    first = LatencyTable({"f": {(8.0, 8.0): 1.0}, CALL: {(0.0, 0.0): 0.1}}, 0.03, (1.1, 0.002))
    assert tables.recall(memory(), {"f": [(8.0, 8.0)]}) is None
    tables.remember(memory(), first)
    again = tables.recall(memory(), {"f": [(8.0, 8.0)]})
    assert again.known == first.known and (again.misfit, again.profiler) == (0.03, (1.1, 0.002))
    assert tables.recall(memory(), {"f": [(8.0, 16.0)]}) is None, "a shape that was not timed"
    assert tables.recall(memory(), {"g": [(8.0, 8.0)]}) is None
    more = tables.remember(memory(), LatencyTable({"f": {(8.0, 16.0): 2.0}, CALL: {(0.0, 0.0): 0.1}}))
    assert more.known["f"] == {(8.0, 8.0): 1.0, (8.0, 16.0): 2.0}
    assert tables.recall(memory(), {"f": [(8.0, 16.0), (8.0, 8.0)]}) is not None


# ------------------------------------------------------------------------------------------- cuts that are timed


@pytest.mark.parametrize(
    ("kind", "multiple", "units", "step"),
    [
        ("cpu", 16, 64, 4), ("cpu", 16, 12, 1), ("gpu", 32, 256, 32), ("gpu", 32, 64, 16), ("gpu", 32, 20, 4),
        ("soc", 8, 96, 8), ("soc", 8, 6, 1), ("gpu", 2, 64, 2), ("gpu", 1, 64, 1),
    ],
)  # fmt: skip
def test_channels_go_in_multiples_of_the_device(kind, multiple, units, step):
    """At most a quarter of a group at a time."""
    groups = [SimpleNamespace(name="g", units=units)]
    found = steps_of(SimpleNamespace(groups=groups), SimpleNamespace(kind=kind, channel_multiple=multiple))
    assert found == ({"g": step} if step > 1 else {})


def test_the_networks_that_are_timed_show_every_size_of_every_group():
    _, groups = animal("resnet-b")
    steps = {group.name: 4 for group in groups if group.units % 4 == 0 and group.units >= 8}
    first, *others = variants(groups, steps, 17, seed=3)
    assert first == {} and len(others) == 16
    for group in groups:
        left = [group.units - len(cut.get(group.name, ())) for cut in others]
        assert all((group.units - n) % steps.get(group.name, 1) == 0 and n >= 1 for n in left)
        assert max(left) == group.units and min(left) <= max(group.units // 4, 1) + steps.get(group.name, 1)
    assert variants(groups, steps, 17, seed=3) == [first, *others], "the same for the same seed"


def by_shape(models, feed, axes, price):
    """Stand in for the stop-watch: a network takes what its layers' shapes say."""
    found = []
    for model in models:
        rows = [(s.family, *s.amounts({}), price(*s.amounts({})), 1) for s in shapes(model, feed, axes)]
        found.append(Timed(rows, sum(row[3] for row in rows)))
    return found


@functools.cache
def prepared():
    return animal("resnet-b")


def priced(monkeypatch, price=truth):
    calls = []

    def stand_in(models, feed, axes, **options):
        calls.append(len(models))
        return by_shape(models, feed, axes, price)

    monkeypatch.setattr(delivery, "time_networks", stand_in)
    model, groups = prepared()
    this = SimpleNamespace(
        images=None, judged=None, path=None, options=SimpleNamespace(seed=0), threads=1, progress=None,
        backend=SimpleNamespace(name="ort"),
    )  # fmt: skip
    monkeypatch.setattr(latencies.job, "one_input", lambda this: feed_of(model))
    return Pricing.of(this, model, Structure.of(model), {}, Delivery("fp32", lambda m: m)), calls, groups


def test_what_was_timed_once_is_not_timed_again(monkeypatch):
    first, calls, _ = priced(monkeypatch)
    second, again, _ = priced(monkeypatch)
    assert calls and not again, "the shapes are all known"
    assert second.costs().of({}) == pytest.approx(first.costs().of({}))


def test_a_proposal_is_timed_until_what_is_foretold_of_it_holds(monkeypatch):
    """A table that knows nothing of a cliff at few channels foretells too much; one look at the proposal tells."""

    def cliff(i, o):
        return truth(i, o, 1) + (1.0 if min(i, o) < 5 else 0.0)

    monkeypatch.setattr(latencies, "_LEAST", 0.75)  # the networks that are timed stay above it
    prices, calls, groups = priced(monkeypatch, cliff)
    few = {group.name: list(range(group.units - 4)) for group in groups if group.units > 6}
    offered = []

    def propose(costs):
        offered.append(costs.of(few) / costs.of({}))
        return few if costs.of(few) < costs.of({}) else {}

    timed = len(calls)
    assert prices.settled(propose) == {}, "it is slower, as one look has shown"
    assert offered[0] < 1 < offered[1] and len(calls) == timed + 1


def test_a_real_network_is_foretold():
    """Cuts that were not timed, of kernels large enough to time: within 30 % on a machine with neighbours."""
    model = wide()
    groups = channel_cuts.groups(model)
    feed = feed_of(model, 48)
    cuts = [channel_cuts.cut(model, gone) for gone in variants(groups, {}, 10, seed=0)]
    table = from_timed(time_networks(cuts, feed, threads=1, seconds=2.0))
    costs = pruning_costs.timed(groups.groups, shapes(model, feed), table)
    other = variants(groups, {}, 4, seed=9)[1:]
    found = time_networks([model, *(channel_cuts.cut(model, gone) for gone in other)], feed, threads=1, seconds=1.0)
    for gone, timed in zip(other, found[1:], strict=True):
        ratio = costs.of(gone) / costs.of({})
        assert ratio == pytest.approx(timed.whole_ms / found[0].whole_ms, rel=0.3)


def wide():
    """Three wide convolutions, whose kernels take tens of microseconds each."""
    shown = """g (float[1,3,48,48] x) => (float[1,32,48,48] y)
    <float[64,3,3,3] u, float[64,64,3,3] v, float[32,64,3,3] w> {
        a = Conv <pads = [1,1,1,1]> (x, u)
        r = Relu (a)
        b = Conv <pads = [1,1,1,1]> (r, v)
        s = Relu (b)
        y = Conv <pads = [1,1,1,1]> (s, w)
    }"""
    return named(zoo.model(shown))
