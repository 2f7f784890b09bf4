"""Switches for every rounding: all on is the quantized model, one on is a dense computation; and the additive model."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import pytest
from edgec.backends import ort as ort_backend
from edgec.compiler.mixed_precision.contributions import Contributions, _fit, measure
from edgec.compiler.mixed_precision.costs import Costs
from edgec.compiler.mixed_precision.mixed import FLOAT, INTEGER, mixed_problem
from edgec.compiler.mixed_precision.sampling import sample
from edgec.compiler.mixed_precision.switchboard import Source, Switchboard
from edgec.compiler.mixed_precision.units import wire
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.passes.placement import place
from test_quantize import build, ranges_of, residual, run, weight

SCHEME = replace(ort_backend.SCHEMES[0][1], shield_float=False)
TAIL = """g (float[N, 8, 6, 6] x) => (float[N, 8, 1, 1] y, float[N, 5] z) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
  r = Relu (a)
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
  c = Conv (p, w2)
  y = GlobalAveragePool (c)
  f = Flatten (y)
  z = Gemm <transB = 1> (f, w3, b3) }"""


@dataclass
class Batch:
    feed: dict
    count: int
    labels: None = None


class Lab:
    """A float model with its full quantization and its switchboard."""

    def __init__(self, model: ir.Model, feed):
        self.model, self.feed = model, feed
        ranges = ranges_of(model, ort_backend.SUPPORTS, feed)
        self.quantizer = Quantizer(model, ort_backend.SUPPORTS, SCHEME, ranges)
        self.wiring = wire(model, place(model, ranges, ort_backend.SUPPORTS, SCHEME, {}))
        self.quantized = self.quantizer.build().model
        self.board = Switchboard(model, self.quantized, self.wiring, threads=1)
        self.units = [unit.name for unit in self.wiring.units]

    def on(self, *units):
        return self.board.run(self.feed, self.board.indices(units))

    def built(self, *units):
        """The outputs of the model in which these units are quantized, as the pass writes it."""
        return run(self.quantizer.build({u: "float" for u in self.units if u not in units}).model, self.feed)


@pytest.fixture(scope="module")
def lab():
    return Lab(residual(), {"x": weight(4, 8, 6, 6)})


@pytest.fixture(scope="module")
def tail():
    shapes = {"w1": (8, 8, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1), "w3": (5, 8), "b3": (5,)}
    return Lab(build(TAIL, **{n: weight(*s) for n, s in shapes.items()}), {"x": weight(4, 8, 6, 6)})


@pytest.fixture(scope="module")
def joined():
    """A Concat on integers that rounds `t`, which nothing else does."""
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w1)
      b = Conv (a, w2)
      t = Tanh (b)
      c = Concat <axis = 1> (a, t)
      y = Conv (c, w3) }"""
    parts = {"w1": 0.1 * weight(8, 8, 3, 3), "w2": weight(8, 8, 1, 1), "w3": weight(8, 16, 1, 1)}
    return Lab(build(text, **parts), {"x": weight(4, 8, 6, 6)})


@pytest.fixture(scope="module")
def forked():
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 3, 3] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w1)
      r = Relu (a)
      p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
      c = Conv (p, w2)
      t = Tanh (p)
      y = Sub (c, t) }"""
    return Lab(build(text, w1=weight(8, 8, 3, 3), w2=weight(8, 8, 1, 1)), {"x": weight(4, 8, 6, 6)})


def test_what_a_concat_of_integers_rounds_is_its_doing(joined):
    assert [n.op_type for n in place(joined.model, joined.quantizer.ranges, ort_backend.SUPPORTS, SCHEME, {}).joined]
    found = {(s.name, s.units, s.unless) for s in joined.board.sources if s.kind == "tensor"}
    assert found == {
        ("x", ("Conv_0",), None),
        ("a", ("Conv_0",), None),
        ("a", ("Conv_1",), "Conv_0"),
        ("a", ("Concat_3",), "Conv_0"),
        ("b", ("Conv_1",), None),
        ("t", ("Concat_3",), None),
        ("y", ("Conv_4",), None),
    }


@pytest.mark.parametrize("which", ["lab", "tail", "joined"])
def test_nothing_on_is_the_float_model_and_all_on_the_quantized_one(which, request):
    lab = request.getfixturevalue(which)
    for ours, theirs in zip(lab.on(), run(lab.model, lab.feed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())  # fused kernels differ
    for ours, theirs, exact in zip(lab.on(*lab.units), run(lab.quantized, lab.feed), lab.on(), strict=True):
        # a sum that falls on the edge between two integers may go either way: few do, by one step
        assert np.abs(ours - theirs).mean() < 0.02 * np.abs(exact - theirs).mean()
        assert np.abs(exact - theirs).mean() > 0


@pytest.mark.parametrize(
    "units",
    [
        ("Conv_0",),
        ("Conv_2",),  # rounds what the Add behind it still reads as a float
        ("Conv_5",),
        ("Conv_2", "Conv_5"),
        ("Conv_2", "Add_3", "Conv_5"),  # both round it, as if its producer did
        ("Conv_0", "Add_3", "Conv_5"),
    ],
)
def test_some_on_is_the_model_with_only_these_quantized(lab, units):
    (ours,), (theirs,), (exact,) = lab.on(*units), lab.built(*units), lab.on()
    assert np.abs(exact - theirs).mean() > 0
    assert np.abs(ours - theirs).mean() < 0.02 * np.abs(exact - theirs).mean()


def test_a_moved_tensor_that_one_reader_rounds(forked):
    """The Conv behind the MaxPool rounds what it reads; the Tanh reads the same as floats."""
    units = [u for u in forked.units if u != forked.units[0]]
    (ours,), (theirs,), (exact,) = forked.on(*units), forked.built(*units), forked.on()
    assert np.abs(ours - theirs).mean() < 0.02 * np.abs(exact - theirs).mean()
    assert ("r", (units[0],), forked.units[0]) in {(s.name, s.units, s.unless) for s in forked.board.sources}


def test_one_weight_alone_is_its_dense_computation(lab):
    """Conv_5 is 3x3 and last: its error is the convolution of its exact input with the error of its weights."""
    index = next(i for i, s in enumerate(lab.board.sources) if (s.kind, s.name) == ("weight", "Conv_5"))
    w = lab.model.graph.initializers["w3"].const_value.numpy().astype(np.float64)
    step = np.abs(w).reshape(8, -1).max(1).reshape(8, 1, 1, 1) / 127
    proto = ir.to_proto(lab.model)
    proto.graph.output.append(next(v for v in proto.graph.value_info if v.name == "rs"))
    exact_y, rs = (v.astype(np.float64) for v in run(proto, lab.feed, ["y", "rs"]))
    padded = np.pad(rs, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    error = np.einsum("nchwij,ocij->nohw", windows, np.rint(w / step) * step - w)
    (ours,) = lab.board.run(lab.feed, [index])
    # the bias is rounded too, to a step some hundred times finer
    np.testing.assert_allclose(ours - exact_y, error, atol=0.02 * np.abs(error).max())


def test_sources_say_which_units_set_them_to_work(lab):
    assert lab.board.sources == (
        Source("weight", "Conv_0", ("Conv_0",)),
        Source("weight", "Conv_2", ("Conv_2",)),
        Source("weight", "Conv_5", ("Conv_5",)),
        Source("tensor", "x", ("Conv_0",)),
        Source("tensor", "ra", ("Conv_0",)),
        Source("tensor", "ra", ("Conv_2",), unless="Conv_0"),
        Source("tensor", "ra", ("Add_3",), unless="Conv_0"),
        Source("tensor", "b", ("Conv_2", "Add_3")),
        Source("tensor", "rs", ("Add_3", "Conv_5")),
        Source("tensor", "y", ("Conv_5",)),
    )


def test_a_moved_tensor_is_rounded_once(tail):
    """The MaxPool moves integers: the tensor behind it is no source of its own."""
    names = [s.name for s in tail.board.sources if s.kind == "tensor"]
    assert "r" in names and "p" not in names
    assert not any(s.name == "z" for s in tail.board.sources if s.kind == "tensor"), "Gemm gives floats"


def test_measured_contributions_add_up(lab):
    seen = []
    found = measure(lab.board, lab.wiring, [Batch(lab.feed, 4)], images=4, progress=lambda *told: seen.append(told))
    assert (found.alone > 0).all()
    assert found.cumulative[lab.units[-1]] == pytest.approx(found.full, rel=1e-9)
    assert list(found.cumulative) == lab.units
    (exact,), (rounded,) = lab.on(), lab.on(*lab.units)
    energy = ((rounded - exact).astype(np.float64) ** 2).sum() / (exact.astype(np.float64) ** 2).sum()
    assert found.full == pytest.approx(energy, rel=1e-6)
    assert abs(10 * np.log10(found.predict(lab.units) / found.full)) < 1.5  # dB: what the issue asks of the model
    assert sum(found.by_unit().values()) == pytest.approx(found.added(lab.units), rel=1e-12)
    assert found.images == 4
    assert seen[-1][1] == seen[-1][2]


def test_the_error_is_relative_to_each_output_and_averaged(tail):
    found = measure(tail.board, tail.wiring, [Batch(tail.feed, 4)], images=4, subsets=0, cumulative=False)
    exact, rounded = tail.on(), tail.on(*tail.units)
    shares = [
        ((b - a).astype(np.float64) ** 2).sum() / (a.astype(np.float64) ** 2).sum()
        for a, b in zip(exact, rounded, strict=True)
    ]
    assert found.full == pytest.approx(np.mean(shares), rel=1e-6)
    assert found.saturation == 0.0 and not found.cumulative


def test_a_deadline_ends_after_the_first_batch(lab):
    batches = [Batch(lab.feed, 4)] * 3
    found = measure(lab.board, lab.wiring, batches, images=12, deadline=0.0, subsets=2, cumulative=False)
    whole = measure(lab.board, lab.wiring, batches[:1], images=4, subsets=2, cumulative=False)
    assert found.images == 4
    np.testing.assert_allclose(found.alone, whole.alone, rtol=1e-12)


def test_weights_make_one_image_count_as_several(lab):
    """An image of weight 3 is an image that is there three times; rows that pad a batch count for nothing."""
    x = lab.feed["x"]
    three = Batch({"x": x[[0, 1, 1, 1]]}, 4)
    options = {"images": 4, "subsets": 2, "cumulative": False}
    alike = measure(lab.board, lab.wiring, [three], **options)
    padded = Batch({"x": x[[0, 1, 1, 1]]}, 2)
    weighted = measure(lab.board, lab.wiring, [padded], weights=np.array([1.0, 3.0]), **options)
    np.testing.assert_allclose(weighted.alone, alike.alone, rtol=1e-9)
    apart = measure(
        lab.board, lab.wiring, [Batch({"x": x[[i]]}, 1) for i in (0, 1)], weights=np.array([1.0, 3.0]), **options
    )
    np.testing.assert_allclose(apart.alone, alike.alone, rtol=1e-4)  # kernels may add in another order


def test_images_are_drawn_by_their_errors():
    """Whatever goes with the error is summed exactly, whichever images are drawn; what is even, on average."""
    rng = np.random.default_rng(0)
    parts = rng.lognormal(0, 1, 200)
    parts /= parts.sum()
    drawn, weights = sample(parts, 16)
    p = 0.7 * parts + 0.3 / 200
    assert (weights * p[drawn]).sum() == pytest.approx(1.0, rel=1e-12)
    assert weights.sum() == pytest.approx(200, rel=0.1), "they stand for all images"
    assert (np.diff(drawn) > 0).all() and len(drawn) <= 16
    spread, even = sample(np.full(12, 1 / 12), 4)
    assert len(spread) == 4
    np.testing.assert_allclose(even, 3.0)


def test_an_image_that_makes_nearly_all_of_the_error_is_drawn_and_counts_once():
    parts = np.full(100, 0.01 / 99)
    parts[41] = 0.99
    drawn, weights = sample(parts, 5)
    assert 41 in drawn
    assert weights[list(drawn).index(41)] == pytest.approx(1.0, rel=0.2)


def test_the_sum_over_a_sample_is_right_on_average():
    """Systematic draws at every offset; here by every rotation of what is at stake among images of equal parts."""
    rng = np.random.default_rng(1)
    values = rng.lognormal(0, 2, 60)
    sums = []
    for shift in range(60):
        drawn, weights = sample(np.full(60, 1 / 60), 6)
        sums.append(weights @ np.roll(values, shift)[drawn])
    assert np.mean(sums) == pytest.approx(values.sum(), rel=1e-9)


def test_the_saturation_behind_measured_errors_is_found():
    alone, subsets = np.array([1.0, 3.0, 0.1]), [[0], [1], [0, 1], [2], [0, 2]]
    sums = np.array([alone[s].sum() for s in subsets])
    saturation, misfit = _fit(alone, subsets, sums / (1 + 0.25 * sums))
    assert saturation == pytest.approx(0.25, rel=1e-3)
    assert misfit < 0.01
    assert _fit(alone, subsets, sums)[0] == pytest.approx(0.0, abs=1e-4), "errors that simply add up"
    assert _fit(alone, [], np.array([])) == (0.0, 0.0)


def test_predictions_go_through_what_was_measured():
    found = Contributions((), np.array([]), 0.5, 0.0, 1.0, {}, 1)
    law = {a: a / (1 + 0.5 * a) for a in (0.5, 1.0, 2.0, 4.0, 8.0)}
    assert {a: found.expected(a) for a in law} == pytest.approx(law)
    fitted = found.through([(4.0, 2 * law[4.0]), (1.0, 0.5 * law[1.0])])
    factors = {0.5: 0.5, 1.0: 0.5, 2.0: 1.0, 4.0: 2.0, 8.0: 2.0}  # 2 is half-way from 1 to 4 on a logarithmic scale
    assert {a: fitted.expected(a) for a in law} == pytest.approx({a: factors[a] * law[a] for a in law})
    assert fitted.expected(0.0) == 0.0
    assert fitted.through([(2.0, 3.0)]).measured == ((1.0, 0.5 * law[1.0]), (2.0, 3.0), (4.0, 2 * law[4.0]))


@pytest.mark.parametrize("point", [(0.0, 1.0), (1.0, 0.0), (1.0, np.inf), (1.0, np.nan), (np.inf, 1.0)])
def test_points_that_say_nothing_are_left_out(point):
    found = Contributions((), np.array([]), 0.5, 0.0, 1.0, {}, 1)
    assert found.through([point]).measured == ()


def test_a_lighter_assignment_leaves_out_what_errs_most(lab):
    found = measure(lab.board, lab.wiring, [Batch(lab.feed, 4)], images=4, subsets=0, cumulative=False)
    assert found.lighter(lab.wiring, 1.0) == set(lab.units)
    left = found.lighter(lab.wiring, 0.5)
    assert left < set(lab.units) and left == lab.wiring.realised(set(left))
    assert found.added(left) <= 0.5 * found.added(lab.units)
    own = found.by_unit()
    worst = max(lab.units, key=own.__getitem__)
    assert worst not in left
    assert found.lighter(lab.wiring, 0.0) == set()


def test_prediction_counts_a_shared_tensor_once():
    sources = (Source("tensor", "t", ("a", "b")), Source("weight", "b", ("b",)))
    found = Contributions(sources, np.array([1.0, 2.0]), 0.5, 0.0, 1.0, {}, 1)
    assert found.predict(["a"]) == pytest.approx(1 / 1.5)
    assert found.predict(["a", "b"]) == pytest.approx(3 / 2.5)
    assert found.predict([]) == 0.0


def test_a_reader_does_not_round_again_what_comes_rounded():
    sources = (Source("tensor", "t", ("a",)), Source("tensor", "t", ("b",), unless="a"))
    found = Contributions(sources, np.array([1.0, 0.5]), 0.0, 0.0, 1.0, {}, 1)
    assert [found.predict(units) for units in (["a"], ["b"], ["a", "b"])] == [1.0, 0.5, 1.0]
    assert found.by_unit() == {"a": 1.0}, "what b does only where a does not is not its part of the whole"


def test_the_integer_program_counts_the_same_sources(lab):
    """Every choice of the units, those that cannot join left out."""
    found = measure(lab.board, lab.wiring, [Batch(lab.feed, 4)], images=4, subsets=0, cumulative=False)
    nothing = {link.tensor: 0.0 for link in lab.wiring.links}
    problem = mixed_problem(lab.wiring, Costs(nothing, nothing, nothing, nothing), found)
    for flags in itertools.product([False, True], repeat=len(lab.units)):
        wanted = {unit for unit, on in zip(lab.units, flags, strict=True) if on}
        choice = {unit: INTEGER if unit in wanted else FLOAT for unit in lab.units}
        if problem.allows(choice):
            assert wanted == lab.wiring.realised(wanted)
            assert problem.amounts(choice).get("error", 0.0) == pytest.approx(found.added(wanted), rel=1e-12)
