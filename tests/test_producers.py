"""Layers that make channels, fitted to what their readers lose: derivatives, tiles, what is taken and what is not."""

import numpy as np
import pytest
import zoo
from edgec.compiler.fitting import probe
from edgec.compiler.fitting.layerwise import Ahead
from edgec.compiler.fitting.targets import Beside
from edgec.compiler.pruning import chain_links, producers, repair, tiles
from edgec.compiler.pruning.tiles import Drawing
from edgec.passes import channel_cuts, making, reading
from edgec.passes.chains import Clip, Depthwise, MaxPool, Taps
from test_pruning_compiler import error, feeds, outputs, prepared, weight_of

GEOMETRIES = (Taps((3, 3)), Taps((3, 2), (2, 1)), Taps((2, 2), (1, 2), (2, 1)))


def steps():
    rng = np.random.default_rng(3)
    for taps in GEOMETRIES:
        yield MaxPool(taps)
        yield Depthwise(taps, rng.normal(size=(taps.count, 5)).astype(np.float32), np.ones(5, np.float32))
    yield Clip()
    yield Clip(-0.5, 0.5)


@pytest.mark.parametrize("step", steps(), ids=lambda step: type(step).__name__)
@pytest.mark.parametrize("edge", [False, True])
def test_a_step_is_linear_about_where_it_ran_and_back_is_its_transpose(step, edge):
    """Changes of 1e-3 turn no gate but by chance; float32 keeps 7 digits of sums of a few numbers of about 1."""
    rng = np.random.default_rng(0)
    given = rng.normal(size=(4, 7, 8, 5)).astype(np.float32)
    inside = None
    if edge:
        inside = np.ones((4, 7, 8, 1), bool)
        inside[:2, :1] = False
    given[np.abs(np.abs(given) - 0.5) < 0.02] = 0.3
    given[np.abs(given) < 0.02] = 0.1
    made, state = step.run(given, inside)
    e = rng.normal(size=given.shape).astype(np.float32)
    forth = step.forth(e, state, inside)
    moved = (step.run(given + 1e-3 * e, inside)[0] - made) / 1e-3
    assert np.median(np.abs(moved - forth)) < 1e-3
    assert np.mean(np.abs(moved - forth) > 1e-2) < 0.02, "a tap of a pooling now and then"
    g = rng.normal(size=made.shape).astype(np.float32)
    back = step.back(g, state, inside, given.shape)
    assert np.vdot(forth, g) == pytest.approx(np.vdot(e, back), abs=1e-3)


@pytest.mark.parametrize("taps", GEOMETRIES)
def test_scattering_is_the_transpose_of_gathering(taps):
    rng = np.random.default_rng(0)
    given = rng.normal(size=(2, 7, 8, 3))
    read = taps.gathered(given)
    assert taps.outputs((2, *taps.spans(taps.outputs(given.shape)), 3)) == read.shape[1:3] == taps.outputs(given.shape)
    other = rng.normal(size=read.shape)
    assert np.vdot(read, other) == pytest.approx(np.vdot(given, taps.scattered(other, given.shape)), abs=1e-9)


# ------------------------------------------------------------------------------------------- networks

STEM = """g (float[N,3,16,16] x) => (float[N,4,{end}] y, float[N,4,{end}] z)
<float[8,3,3,3] w1, float[8] b1, float[8,1,3,3] d, float[8] bd, float[4,8,1,1] w2, float[4,8,3,3] w3> {{
    c = Conv <pads = [1,1,1,1]> (x, w1, b1)
    {middle}
    e = Conv <pads = [1,1,1,1], group = 8> (r, d, bd)
    y = Conv (e, w2)
    z = Conv <pads = [1,1,1,1]> (r, w3)
}}"""
MIDDLES = {
    "relu": "r = Relu (c)",
    "pool": "q = Relu (c)\n r = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (q)",
}


#: Part of the error that is left at most: of white noise the pooling leaves little that filters could be fitted to.
BETTER = {"relu": 0.95, "pool": 0.995}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """2,048 outputs do for filters of 28 weights."""
    monkeypatch.setattr(tiles, "ROWS", 2048)


def stem(middle="relu", seed=0):
    """A convolution that two layers read, one of them behind a depthwise one. Half of its channels mix the others."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(4, 3, 3, 3)) / 5
    mixed = np.einsum("oc,cikl->oikl", rng.normal(size=(4, 4)), first)
    values = {"w1": np.concatenate([first, mixed]), "d": rng.normal(size=(8, 1, 3, 3)) / 3}
    end = "8,8" if middle == "pool" else "16,16"
    return prepared(zoo.model(STEM.format(middle=MIDDLES[middle], end=end), values))


def linear(seed=0):
    """Two convolutions with nothing between them: half of the channels are linear combinations of the others."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(4, 3, 3, 3)) / 5
    mixed = np.einsum("oc,cikl->oikl", rng.normal(size=(4, 4)), first)
    values = {"w1": np.concatenate([first, mixed]), "w2": rng.normal(size=(4, 8, 1, 1))}
    text = """g (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[8,3,3,3] w1, float[4,8,1,1] w2> {
        c = Conv <pads = [1,1,1,1]> (x, w1)
        y = Conv (c, w2)
    }"""
    return prepared(zoo.model(text, values))


def cut_of(model, count=3):
    group = channel_cuts.groups(model)[0]
    return {group.name: list(range(count))}


def problem(model, gone, monkeypatch):
    """The filters and the readers that repair makes of the first convolution."""
    seen, real = [], producers.refitted_filters
    monkeypatch.setattr(producers, "refitted_filters", lambda f, r: seen.append((f, r)) or real(f, r))
    repair.repaired(model, gone, feeds(model), threads=1)
    return seen


@pytest.mark.parametrize("middle", MIDDLES)
def test_a_step_never_raises_the_error_on_the_images_held_out(middle, monkeypatch):
    model = stem(middle)
    ((filters, readers),) = problem(model, cut_of(model), monkeypatch)
    assert len(readers) == 2 and filters.shape == (5, 28)
    seats = [reading.Seat(reader, reader.weight) for reader in readers]
    errors = [making._Point.at(filters, seats).error]
    for count in (1, 2, 3):
        found = making.refitted_filters(filters, readers, count)
        errors.append(making._Point.at(filters if found is None else found, seats).error)
    assert errors == sorted(errors, reverse=True) and errors[1] < BETTER[middle] * errors[0]
    assert making.refitted_filters(filters, readers, 0) is None
    again = making.refitted_filters(filters, readers, 3)
    assert np.array_equal(found, again)


@pytest.mark.parametrize("middle", MIDDLES)
def test_the_tangent_and_its_transpose_are_that(middle, monkeypatch):
    """Against differences of 1e-3 of the white coordinates; the readers' own change is linear as it is."""
    model = stem(middle)
    ((filters, readers),) = problem(model, cut_of(model), monkeypatch)
    point = making._Point.at(filters, [reading.Seat(reader, reader.weight) for reader in readers])
    tangent, rng = making._Tangent(point), np.random.default_rng(0)
    change = [rng.normal(size=filters.shape), *(rng.normal(size=seat.weight.shape) for seat in point.seats)]
    forth = tangent._forth(change)
    rest = [[rng.normal(size=piece.shape).astype(np.float32) for piece in pieces] for pieces in forth]
    flat = [np.concatenate([piece.ravel() for pieces in each for piece in pieces]) for each in (forth, rest)]
    assert np.vdot(*flat) == pytest.approx(reading.dot(change, tangent._back(rest)), rel=1e-4)


def test_the_targets_of_tiles_are_what_the_network_gives():
    """Also at the edges of the image: padding in front of the reader, the pooling and the depthwise one."""
    model = stem("pool")
    data = feeds(model, batches=1, batch=6)
    x, made = data[0]["x"], outputs(model, data)[0]
    node = next(iter(model.graph))
    ahead = Ahead([x], [x], [False], {}, lambda node: Beside())
    for end in chain_links.ends(node.outputs[0]):
        reader = Drawing(node, np.arange(8), ahead, np.random.default_rng(1)).reader(end)
        array = made[end.reader.node.outputs[0].name]
        wide = np.moveaxis(array, 1, 3).reshape(-1, 4)
        for piece in reader.fitted:
            for row in piece.target[:: max(1, len(piece.target) // 50)]:
                assert np.abs(wide - row).max(axis=1).min() < 1e-4
        weight = node.inputs[1].const_value.numpy()
        filters = np.concatenate([chain_links.matrix(weight), node.inputs[2].const_value.numpy()[:, None]], axis=1)
        seat = reading.Seat(reader, reader.weight)
        read = seat.read(filters, reader.fitted)
        lost = reading.squares(seat.refitted(read).missing(read))
        assert lost < 1e-6 * reading.energy([piece.target for piece in reader.fitted])


def test_what_the_lost_channels_mixed_is_made_by_those_that_are_left():
    """The readers want 4 outputs of rank 4 of 27 inputs, so 4 channels do; after a ridge of 1 % of the energy."""
    model = linear()
    data, others = feeds(model), feeds(model, seed=5)
    gone = {channel_cuts.groups(model)[0].name: [0, 1, 4, 5]}
    assert error(model, repair.repaired(model, gone, data, makers=False, threads=1), others) < 1e-3
    # 3 channels for 4 outputs: the best is what the three largest directions give
    gone = {channel_cuts.groups(model)[0].name: [0, 1, 4, 5, 6]}
    plain, better = (
        error(model, repair.repaired(model, gone, data, makers=m, threads=1), others) for m in (False, True)
    )
    assert better < 0.7 * plain


@pytest.mark.parametrize("middle", MIDDLES)
def test_the_network_errs_less_on_other_images(middle):
    model = stem(middle)
    data, others, gone = feeds(model), feeds(model, seed=5), cut_of(model)
    plain, better, again = (repair.repaired(model, gone, data, makers=m, threads=1) for m in (False, True, True))
    assert error(model, better, others) < BETTER[middle] * error(model, plain, others)
    assert all(
        np.array_equal(weight_of(better, n.name), weight_of(again, n.name)) for n in better.graph if n.op_type == "Conv"
    )


# ------------------------------------------------------------------------------------------- what is not taken


def taken(model, gone, monkeypatch):
    """The number of layers that were fitted to their readers."""
    return len(problem(model, gone, monkeypatch))


def test_where_nothing_was_cut_nothing_is_taken(monkeypatch):
    assert taken(stem(), {}, monkeypatch) == 0


BEHIND = {
    "r = Relu (c)": 1,
    "r = Identity (c)": 1,
    "lo = Constant <value_float = 0.0> ()\n hi = Constant <value_float = 1.0> ()\n r = Clip (c, lo, hi)": 1,
    "r = Sigmoid (c)": 0,
    "q = Conv <pads = [1,1,1,1]> (x, w3)\n s = Add (c, q)\n r = Relu (s)": 0,
    "r = AveragePool <kernel_shape = [1,1]> (c)": 0,
    'r = MaxPool <kernel_shape = [2,2], auto_pad = "SAME_UPPER"> (c)': 0,
}


@pytest.mark.parametrize("behind", BEHIND)
def test_a_layer_is_taken_only_where_each_step_keeps_to_its_channel(behind, monkeypatch):
    text = f"""g (float[N,3,8,8] x) => (float[N,4,8,8] y) <float[8,3,3,3] w1, float[8,3,3,3] w3, float[4,8,1,1] w2> {{
        c = Conv <pads = [1,1,1,1]> (x, w1)
        {behind}
        y = Conv (r, w2)
    }}"""
    model = prepared(zoo.model(text))
    assert taken(model, cut_of(model), monkeypatch) == BEHIND[behind]


def test_a_layer_is_not_taken_where_its_reader_is_shared_or_it_is_wide_or_the_network_large(monkeypatch):
    text = """g (float[N,3,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] z) <float[8,3,3,3] w1, float[4,8,1,1] w2> {
        c = Conv <pads = [1,1,1,1]> (x, w1)
        y = Conv (c, w2)
        z = Conv (c, w2)
    }"""
    model = prepared(zoo.model(text))
    assert taken(model, cut_of(model), monkeypatch) == 0
    model = stem()
    for name, value in (("_WIDEST", 26), ("_WEIGHTS", 5 * 27 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(producers, name, value)
            assert taken(model, cut_of(model), patch) == 0
    monkeypatch.setattr(probe, "LARGE", 10)
    assert taken(model, cut_of(model), monkeypatch) == 0


def test_a_single_image_has_none_to_hold_out(monkeypatch):
    model = stem()
    gone, data = cut_of(model), feeds(model, batches=1, batch=1)
    monkeypatch.setattr(producers, "refitted_filters", None)
    repair.repaired(model, gone, data, threads=1)
