"""The frontier of error against latency for one quantizer: what it may choose, what it promises, what it gives up."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from edgec.backends import ort
from edgec.compiler import memory
from edgec.compiler import model as model_io
from edgec.compiler.mixed_precision import contributions, costs, sampling
from edgec.compiler.mixed_precision import weighing as mixed_precision
from edgec.compiler.mixed_precision.mixed import FLOAT, INTEGER, NARROW
from edgec.compiler.mixed_precision.weighing import LEAST_INTEGER, Narrow, explore, unit_bytes, weigh
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.types import Range, silent
from edgec.passes.raise_opset import RaiseOpset
from test_quantize import VNNI, build, ranges_of, run, sqnr
from test_quantizer import Images

#: Convs of 1, 9, 4 and 2 times as many multiply-accumulates, an Add, and a Gemm of next to none.
NET = """
g (float[N, 8, 6, 6] x) => (float[N, 5] y) {
  a0 = Conv (x, w1, b1)
  a = Relu (a0)
  b0 = Conv <pads = [1, 1, 1, 1]> (a, w2, b2)
  s = Add (b0, a)
  b = Relu (s)
  c0 = Conv <pads = [0, 0, 1, 1]> (b, w3)
  c = Relu (c0)
  d0 = Conv (c, w4)
  d = Relu (d0)
  p = GlobalAveragePool (d)
  f = Flatten (p)
  y = Gemm <transB = 1> (f, w5, b5)
}
"""
MACS = {"Conv_0": 64 * 36, "Conv_2": 576 * 36, "Conv_5": 256 * 36, "Conv_7": 128 * 36, "Gemm_11": 80}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """Each test measures for itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def net() -> ir.Model:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) / 2)).astype(np.float32)

    return build(
        NET, w1=draw(8, 8, 1, 1), b1=draw(8), w2=draw(8, 8, 3, 3), b2=draw(8), w3=draw(8, 8, 2, 2),
        w4=draw(16, 8, 1, 1), w5=draw(5, 16), b5=draw(5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def images() -> Images:
    return Images({"x": np.random.default_rng(1).normal(size=(4, 8, 6, 6)).astype(np.float32)})


@pytest.fixture
def quantizer(net, images) -> Quantizer:
    return Quantizer(net, ort.SUPPORTS, VNNI, ranges_of(net, ort.SUPPORTS, images.feed))


@pytest.fixture(scope="module")
def found(net, images) -> mixed_precision.Exploration:
    """Nothing is timed: multiply-accumulates in float stand for the latency."""
    made = Quantizer(net, ort.SUPPORTS, VNNI, ranges_of(net, ort.SUPPORTS, images.feed))
    return explore(made, images, None, threads=1, progress=silent)


def integer_share(keep: set[str]) -> float:
    return sum(n for name, n in MACS.items() if name not in keep) / sum(MACS.values())


def test_at_least_half_of_the_work_stays_on_integers(found):
    assert len(found.points) >= 2
    for point in (*found.points, found.plain):
        assert point.integer_macs == pytest.approx(integer_share(set(point.keep_float)), abs=1e-6)
        assert point.integer_macs >= LEAST_INTEGER
    assert found.plain.integer_macs == pytest.approx(1)
    assert min(p.integer_macs for p in found.points) < 0.9, "and what may be in float is used"


def test_another_share_may_be_asked_for(quantizer, images):
    one = explore(quantizer, images, None, threads=1, least_integer=0.9, progress=silent)
    assert one.points
    assert all(integer_share(set(p.keep_float)) >= 0.9 for p in one.points)


def test_what_stays_in_float_are_nodes_of_the_model_with_a_reason(found, net, quantizer):
    names = {node.name for node in net.graph}
    for point in found.points:
        assert point.keep_float and set(point.keep_float) <= names
        assert all("mixed precision" in why for why in point.keep_float.values())
        built = quantizer.build(point.keep_float)
        told = {r.node for r in built.records[0].refusals if r.rule == "kept-float"}
        assert told == set(point.keep_float), "the pass knows each of them, and nothing else stays"
    assert found.plain.keep_float == {}


def test_more_in_float_is_closer(found):
    ordered = sorted((found.plain, *found.points), key=lambda p: -p.integer_macs)
    assert [p.db for p in ordered] == sorted(p.db for p in ordered)
    assert ordered[-1].db > found.plain.db + 1


def test_predictions_hold_when_the_models_are_built(found, quantizer, net, images):
    """Within 3 dB: the additive model is off by less than 1 dB on its own subsets here."""
    exact = run(net, images.feed)[0]
    for point in (found.plain, *found.points):
        measured = sqnr(exact, run(quantizer.build(point.keep_float).model, images.feed)[0])
        assert point.db == pytest.approx(measured, abs=3)
    assert 0 <= found.tradeoff.errors.misfit_db < 3
    assert found.tradeoff.errors.images == 4


def test_without_a_target_nothing_is_said_of_time(found):
    assert found.tradeoff.misfit is None
    assert {point.speedup for point in (found.plain, *found.points)} == {None}


def test_latencies_are_measured_where_there_is_an_input_to_time(quantizer, images, monkeypatch):
    monkeypatch.setattr(mixed_precision, "_SECONDS", 0.2)
    monkeypatch.setattr(mixed_precision, "_MIXTURES", 2)
    one = {"x": images.feed["x"][:1]}
    timed = explore(quantizer, images, one, threads=1, reach=None, progress=silent)
    assert timed.plain.speedup > 0 and timed.tradeoff.misfit >= 0
    speedups = [p.speedup for p in timed.points]
    assert speedups == sorted(speedups, reverse=True), "from the fastest to the closest"
    assert [p.db for p in timed.points] == sorted(p.db for p in timed.points)
    assert all(integer_share(set(p.keep_float)) >= LEAST_INTEGER for p in timed.points)


class Priced:
    """Prices in place of measurements: floats take `slow` times as long as integers, and nothing else costs."""

    misfit = 0.0

    def __init__(self, slow):
        self.slow = slow

    def __call__(self, build, wiring, feed, **options):
        nothing = {link.tensor: 0.0 for link in wiring.links}
        own = {link.tensor: 1.0 if link.producer else 0.0 for link in wiring.links}
        return costs.Costs({k: self.slow * v for k, v in own.items()}, own, nothing, nothing)


@pytest.mark.parametrize(("slow", "reach"), [(1.05, 1.06), (2.0, 1.06), (2.0, 1.4), (0.5, 1.06)])
def test_nothing_slower_than_the_reach_is_looked_for(quantizer, images, monkeypatch, slow, reach):
    monkeypatch.setattr(costs, "measure", Priced(slow))
    one = explore(quantizer, images, images.feed, threads=1, reach=reach, progress=silent)
    assert one.plain.speedup == pytest.approx(slow)  # seven units of 1 ms: five layers, Add and GlobalAveragePool
    within = [p for p in one.points if p.speedup >= max(slow, 1) / reach - 1e-6]
    assert all(integer_share(set(p.keep_float)) >= LEAST_INTEGER for p in one.points)
    if slow == 0.5:  # floats are faster, and half of the work must stay on integers: nothing is within reach
        assert one.points and not within
    else:
        assert within == list(one.points)
        assert bool(one.points) == (slow < reach or 7 * (reach - 1) >= 1)


def test_what_cannot_run_on_integers_counts_as_float(quantizer, images):
    one = explore(replace(quantizer, kept={"Conv_5": "it collapses"}), images, None, threads=1, progress=silent)
    assert one.plain.integer_macs == pytest.approx(integer_share({"Conv_5"}), abs=1e-6)
    for point in one.points:
        assert point.integer_macs == pytest.approx(integer_share({"Conv_5", *point.keep_float}), abs=1e-6)
        assert point.integer_macs >= LEAST_INTEGER


def test_where_less_than_half_can_run_on_integers_all_of_that_does(quantizer, images):
    one = explore(replace(quantizer, kept={"Conv_2": "it collapses"}), images, None, threads=1, progress=silent)
    assert one.plain.integer_macs == pytest.approx(integer_share({"Conv_2"}), abs=1e-6)
    assert one.plain.integer_macs < LEAST_INTEGER
    assert all(MACS.keys().isdisjoint(point.keep_float) for point in one.points)


def test_where_there_is_nothing_to_choose_there_is_no_frontier(quantizer, images, net):
    but_one = {node.name: "a test" for node in net.graph if node.name != "Conv_2"}
    for kept in (but_one, but_one | {"Conv_2": "a test"}):
        assert explore(replace(quantizer, kept=kept), images, None, threads=1, progress=silent) is None


def test_no_time_still_gives_a_frontier(quantizer, images):
    one = explore(quantizer, images, None, threads=1, seconds=0.0, progress=silent)
    assert one.tradeoff.errors.images == 4 and one.points, "one batch is always finished"


def test_few_images_of_many_numbers_or_much_work_and_more_of_few(quantizer, images):
    taken = []

    class Many(Images):
        def __len__(self):
            return 500

        def subset(self, indices):
            taken.append(len(list(indices)))
            return self

    for shape in ((8, 6, 6), (3, 352, 352), (3, 1024, 1024)):
        many = Many(specs=(replace(images.specs[0], shape=(None, *shape)),))
        sampling._images(many, quantizer.model, 12)
    sampling._images(Many(specs=images.specs), quantizer.model, 10**9)
    assert taken[1::2] == [32, 6, 2, 2]


def test_a_layer_that_ruins_all_is_the_first_in_float(quantizer, images, monkeypatch):
    """Conv_7's output gets a range two hundred times too wide: whatever else is chosen, it must not be rounded."""
    broken = replace(quantizer, ranges={**quantizer.ranges, "d": Range(0.0, 200 * quantizer.ranges["d"].max)})
    one = explore(broken, images, None, threads=1, progress=silent)
    saved = [p for p in one.points if p.db > one.plain.db + 10]
    assert saved and saved == [p for p in one.points if "Conv_7" in p.keep_float]


def test_the_same_seed_gives_the_same_frontier(quantizer, images, found, monkeypatch):
    again = explore(quantizer, images, None, threads=1, progress=silent)
    assert [p.keep_float for p in again.points] == [p.keep_float for p in found.points]
    seen = []
    measure = contributions.measure
    monkeypatch.setattr(contributions, "measure", lambda *a, **k: seen.append(k["seed"]) or measure(*a, **k))
    explore(quantizer, images, None, threads=1, seed=7, progress=silent)
    assert seen == [7]


# ------------------------------------------------------------------------------------------ kept measurements


@pytest.fixture
def runs(monkeypatch):
    """Count the runs of switchboards; a number in `stop` ends the next search with Ctrl-C after so many."""

    class Runs:
        count = 0
        stop = None

    seen, run_board = Runs(), mixed_precision.Switchboard.run

    def counted(board, feed, active):
        seen.count += 1
        if seen.stop is not None and seen.count > seen.stop:
            raise KeyboardInterrupt
        return run_board(board, feed, active)

    monkeypatch.setattr(mixed_precision.Switchboard, "run", counted)
    return seen


def test_the_second_search_measures_nothing_and_finds_the_same(quantizer, images, found, runs):
    first = explore(quantizer, images, None, threads=1, progress=silent)
    assert not first.tradeoff.cached
    runs.count = 0
    second = explore(quantizer, images, None, threads=1, progress=silent)
    assert second.tradeoff.cached
    assert runs.count == 1, "the float model, once a batch"
    assert second.points == first.points == found.points
    np.testing.assert_array_equal(second.tradeoff.errors.alone, first.tradeoff.errors.alone)


def test_a_search_that_is_interrupted_goes_on_where_it_was(quantizer, images, runs, monkeypatch, tmp_path):
    """Ctrl-C between two sources keeps those before it, and what comes out is what would have come out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    whole = explore(quantizer, images, None, threads=1, progress=silent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    every, runs.count, runs.stop = runs.count, 0, 8
    with pytest.raises(KeyboardInterrupt):
        explore(quantizer, images, None, threads=1, progress=silent)
    runs.count, runs.stop = 0, None
    resumed = explore(quantizer, images, None, threads=1, progress=silent)
    assert runs.count == every - 7, "the float model's was one of the eight"
    assert resumed.points == whole.points and not resumed.tradeoff.cached
    np.testing.assert_array_equal(resumed.tradeoff.errors.alone, whole.tradeoff.errors.alone)


def test_other_images_ranges_or_weights_are_measured_anew(quantizer, images, runs):
    explore(quantizer, images, None, threads=1, progress=silent)
    others = Images({"x": images.feed["x"] + 1})
    coarse = replace(quantizer, ranges={**quantizer.ranges, "a": Range(0.0, 100.0)})
    for one, some in ((quantizer, others), (coarse, images)):
        assert not explore(one, some, None, threads=1, progress=silent).tradeoff.cached


def test_latencies_are_kept_for_this_machine_and_these_threads(quantizer, images, monkeypatch):
    asked = []

    def priced(build, wiring, feed, **options):
        asked.append(options["threads"])
        return Priced(1.05)(build, wiring, feed)

    monkeypatch.setattr(costs, "measure", priced)
    for threads in (1, 1, 2):
        explore(quantizer, images, images.feed, threads=threads, progress=silent)
    assert asked == [1, 2]
    monkeypatch.setattr(memory.platform, "node", lambda: "another machine")
    explore(quantizer, images, images.feed, threads=1, progress=silent)
    assert asked == [1, 2, 1]


def test_latencies_that_did_not_fit_are_not_believed_twice(quantizer, images, monkeypatch):
    asked = []

    def busy(build, wiring, feed, **options):
        asked.append(1)
        return replace(Priced(1.05)(build, wiring, feed), misfit=0.2)

    monkeypatch.setattr(costs, "measure", busy)
    for _ in range(2):
        explore(quantizer, images, images.feed, threads=1, progress=silent)
    assert len(asked) == 2


# ------------------------------------------------------------------------------------------ sizes and 4 bits


SIZES = {FLOAT: 9000.0, INTEGER: 4000.0, NARROW: 3000.0}


def test_uniform_choices_are_as_large_as_their_files(quantizer, images):
    one = weigh(quantizer, images, None, threads=1, sizes={k: SIZES[k] for k in (FLOAT, INTEGER)}, progress=silent)
    for precision in (FLOAT, INTEGER):
        assert one.uniform(precision).predicted["bytes"] == pytest.approx(SIZES[precision], rel=1e-9)
    weights = {"Conv_0": 64, "Conv_2": 576, "Conv_5": 256, "Conv_7": 128, "Gemm_11": 80}
    found = unit_bytes(quantizer.model, one.wiring, SIZES)
    for name in ("Conv_0", "Conv_2"):
        assert found[name][FLOAT] - found["Conv_5"][FLOAT] == pytest.approx(4 * (weights[name] - 256))
        assert found[name][NARROW] - found["Conv_5"][NARROW] == pytest.approx((weights[name] - 256) / 2)


def test_a_size_is_a_limit_of_the_program(quantizer, images):
    one = weigh(quantizer, images, None, threads=1, sizes={k: SIZES[k] for k in (FLOAT, INTEGER)}, progress=silent)
    free, tight = one.closest(), one.closest({"bytes": 4500.0})
    assert free.predicted["bytes"] > 4500 >= tight.predicted["bytes"]
    assert tight.predicted["error"] > free.predicted["error"]
    assert [a.predicted["bytes"] <= 4500 for a in one.frontier({"bytes": 4500.0})].count(False) == 0


def test_a_latency_is_a_limit_of_the_program_and_takes_the_place_of_the_reach(quantizer, images, monkeypatch):
    """Seven units of 1 ms on integers and 2 ms in float: 9 ms are two in float."""
    monkeypatch.setattr(costs, "measure", Priced(2.0))
    one = weigh(quantizer, images, images.feed, threads=1, progress=silent)
    assert one.float_ms == pytest.approx(14)
    assert one.ms_for(4.5, 7.0) == pytest.approx(9), "on a day when the float model takes half as long"
    points = [one.point(a) for a in one.frontier({"ms": 9.0})]
    assert max(len(p.keep_float) for p in points) == 2
    assert max(14 / p.speedup for p in points) == pytest.approx(9)


def test_weights_of_four_bits_are_a_third_choice(quantizer, images):
    narrow = replace(
        quantizer, scheme=replace(VNNI, weight="int4", weight_max=7, cast_weights=True), model=raised(quantizer)
    )
    wide = replace(quantizer, model=narrow.model)
    found = weigh(wide, images, None, threads=1, narrow=Narrow(narrow), sizes=SIZES, progress=silent)
    small = found.point(found.closest({"bytes": 3500.0}))
    assert small.narrow and small.size_bytes <= 3500
    layers = {n for n, ks in found.problem.choices.items() if NARROW in ks}
    assert layers == set(MACS)
    everything = found.uniform(NARROW).predicted["error"]
    assert everything > found.uniform(INTEGER).predicted["error"] * 10, "four bits less are 24 dB at most"
    two = weigh(wide, images, None, threads=1, narrow=Narrow(narrow, floats=False), progress=silent)
    kept = two.closest({"wide": 2})
    assert len(kept.having(INTEGER) & layers) == 2 and not kept.having(FLOAT)
    gains = {u: two.uniform(NARROW).predicted["error"] - error(two, u) for u in layers}
    assert kept.having(INTEGER) & layers == set(sorted(gains, key=gains.get)[-2:]), "those that lose most at 4 bits"


def error(tradeoff, unit):
    """Return the error of all layers at 4 bits but one."""
    choice = {u: NARROW if NARROW in ks else INTEGER for u, ks in tradeoff.problem.choices.items()} | {unit: INTEGER}
    return tradeoff.problem.amounts(choice)["error"]


def raised(quantizer):
    model = model_io.copy(quantizer.model)
    RaiseOpset(target=21)(model)
    return model
