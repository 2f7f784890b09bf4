"""The sweep: statistics against NumPy on all activations, and what it must cope with."""

import numpy as np
import onnxruntime as ort
import pytest
from edgec.calib import augment, tally
from edgec.calib.derive import covering_pool, nonnegative, values
from edgec.calib.folder import open_folder
from edgec.calib.histogram import BINS, Histogram
from edgec.calib.observe import collect
from edgec.compiler import model as model_io
from edgec.compiler.errors import DataError
from zoo import model as parse

#: float32 sums of a different order: relative to the largest value, which is what a range is made of.
CLOSE = 1e-5

NET = """
g (float[N,3,12,12] x) => (float[N,5] y)
<float[16,3,3,3] w1, float[16] b1, float[16,1,3,3] w2, float[16,16,1,1] w3, float[5,32] w4> {
    c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
    r1 = Relu (c1)
    p1 = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (r1)
    d = Conv <group = 16, pads = [1,1,1,1]> (p1, w2)
    e = Conv (p1, w3)
    j = Concat <axis = 1> (d, e)
    t = Transpose <perm = [0,2,3,1]> (j)
    k = Clip (d)
    s, u = Split <axis = 1> (j)
    a = Add (s, u)
    m = Concat <axis = 1> (r1, r1)
    f = GlobalAveragePool (j)
    g1 = Flatten (f)
    y = Gemm <transB = 1> (g1, w4)
}
"""
TENSORS = ("x", "c1", "r1", "p1", "d", "e", "j", "t", "k", "s", "u", "a", "m", "f", "g1", "y")


def arrays(folder, count, shape=(3, 12, 12), name="x", seed=0, scale=1.0):
    """Write `count` samples, a file each, with outliers in some."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    data = (rng.standard_normal((count, *shape)) * scale).astype(np.float32)
    data[:: max(1, count // 3)] *= 3
    for i, sample in enumerate(data):
        np.savez(folder / f"{i:04}.npz", **{name: sample[None]})
    return data


def activations(model, names, feeds):
    """Return all values of the named tensors, ONNX Runtime's optimisations off."""
    twin = model_io.copy(model)
    known = values(twin.graph)
    twin.graph.outputs.clear()
    twin.graph.outputs.extend(known[n] for n in names if known[n] not in twin.graph.inputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model_io.serialize(twin), options, providers=["CPUExecutionProvider"])
    out = {n: [] for n in names}
    for feed in feeds:
        run = dict(feed) | dict(zip([v.name for v in twin.graph.outputs], session.run(None, feed), strict=True))
        for n in names:
            out[n].append(run[n].ravel())
    return {n: np.concatenate(v) for n, v in out.items()}


def opened(folder, model):
    return open_folder(folder, None, model_io.input_specs(model))


def check(found, expected, floor=()):
    """Compare extremes with all activations; `floor` names the tensors whose minimum is given as 0."""
    assert set(found) == set(expected)
    for name, every in expected.items():
        size = CLOSE * float(np.abs(every).max())
        assert found[name].max == pytest.approx(every.max(), abs=size, rel=0), name
        lowest = 0.0 if name in floor else every.min()
        assert found[name].min == pytest.approx(lowest, abs=size, rel=0), name


# ------------------------------------------------------------------------------------------ against NumPy


@pytest.mark.parametrize("histogram", [False, True])
@pytest.mark.parametrize(("count", "batch"), [(7, 1), (7, 4), (20, None)])
@pytest.mark.parametrize("opset", [13, 18])
def test_extremes_are_those_of_all_activations(tmp_path, histogram, count, batch, opset):
    text = NET.replace("Split <axis = 1>", "Split <axis = 1, num_outputs = 2>") if opset >= 18 else NET
    model = parse(text, opset=opset)
    data = arrays(tmp_path, count)
    found = collect(model, TENSORS, opened(tmp_path, model), histogram=histogram, batch=batch)
    expected = activations(model, TENSORS, [{"x": data[i : i + 1]} for i in range(count)])
    check(found, expected, floor=("r1", "p1", "m"))
    assert all(s.images == count for s in found.values())
    assert all((s.histogram is not None) == histogram for s in found.values())


def test_histograms_look_like_all_activations(tmp_path):
    model = parse(NET)
    data = arrays(tmp_path, 40)
    found = collect(model, TENSORS, opened(tmp_path, model), histogram=True)
    expected = activations(model, TENSORS, [{"x": data}])
    for name, stats in found.items():
        every, edges = expected[name], np.linspace(stats.low, stats.high, BINS + 1)
        assert stats.low <= stats.min and stats.max <= stats.high
        assert stats.histogram.dtype == np.int64 and stats.histogram.shape == (BINS,)
        assert stats.histogram.sum() == pytest.approx(every.size, rel=0.5)
        share = np.cumsum(stats.histogram) / stats.histogram.sum()
        truth = np.searchsorted(np.sort(every), edges[1:], side="right") / every.size
        # a few thousand correlated samples of a smooth distribution: Kolmogorov distances seen are below 0.03
        assert np.abs(share - truth).max() < 0.06, name


def test_few_images_are_sampled_completely(tmp_path):
    model = parse(NET)
    data = arrays(tmp_path, 2)
    found = collect(model, ("x", "c1", "j"), opened(tmp_path, model), histogram=True)
    expected = activations(model, ("x", "c1", "j"), [{"x": data}])
    for name, stats in found.items():
        truth = np.histogram(expected[name], np.linspace(stats.low, stats.high, BINS + 1))[0]
        # values on an edge may fall into the bin beside it
        assert np.abs(np.cumsum(stats.histogram) - np.cumsum(truth)).max() <= 2, name


def test_known_extremes_are_in_the_histogram(tmp_path):
    model = parse(NET)
    arrays(tmp_path, 300)
    found = collect(model, TENSORS, opened(tmp_path, model), histogram=True)
    for name, stats in found.items():
        width = (stats.high - stats.low) / BINS
        last = np.flatnonzero(stats.histogram)[-1]
        assert stats.low + (last + 1.01) * width >= stats.max, name


def test_the_model_is_not_changed(tmp_path):
    model = parse(NET)
    before = model_io.serialize(model)
    arrays(tmp_path, 2)
    collect(model, TENSORS, opened(tmp_path, model), histogram=True)
    assert model_io.serialize(model) == before


def test_threads_change_nothing_and_seeds_only_samples(tmp_path):
    model = parse(NET.replace("12", "40"))  # large enough for a part of the input to be picked
    arrays(tmp_path, 40, (3, 40, 40))
    data = opened(tmp_path, model)
    one, four = (collect(model, TENSORS, data, histogram=True, batch=2, threads=n) for n in (1, 4))
    other = collect(model, TENSORS, data, histogram=True, batch=2, threads=1, seed=1)
    for name in TENSORS:
        assert (one[name].min, one[name].max) == (four[name].min, four[name].max)
        np.testing.assert_array_equal(one[name].histogram, four[name].histogram)
        assert (one[name].min, one[name].max) == (other[name].min, other[name].max)
    assert any((one[n].histogram != other[n].histogram).any() for n in TENSORS)


def test_statistics_do_not_grow_with_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "_BUFFER_BYTES", 1 << 16)
    model = parse(NET)
    arrays(tmp_path, 120)
    held = []
    settle = tally.Tally.settle

    def watched(this):
        held.append(sum(a.nbytes for a in this._buffer))
        settle(this)

    monkeypatch.setattr(tally.Tally, "settle", watched)
    collect(model, TENSORS, opened(tmp_path, model), histogram=True, batch=1)
    assert len(held) > 5 and max(held) < 2 << 16


# ------------------------------------------------------------------------------------------ odd tensors


def test_fixed_batch_padding_does_not_count_twice(tmp_path):
    model = parse(NET.replace("[N,", "[4,"))
    data = arrays(tmp_path, 6)
    found = collect(model, ("x", "r1"), opened(tmp_path, model), histogram=True)
    assert found["x"].images == 6
    check(found, activations(model, ("x", "r1"), [{"x": data[:4]}, {"x": data[[4, 5, 5, 5]]}]), floor=("r1",))
    assert found["x"].histogram.sum() == 6 * 3 * 12 * 12


def test_dynamic_size_follows_the_arrays(tmp_path):
    model = parse("g (float[N,1,H,W] x) => (float[N,1,H,W] y) { a = Neg (x)  y = Relu (a) }")
    one, two = np.random.default_rng(0).standard_normal((2, 1, 1, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "0.npz", x=one)
    np.savez(tmp_path / "1.npz", x=two[:, :, :9])
    found = collect(model, ("a", "y"), opened(tmp_path, model), histogram=True)
    expected = np.concatenate([-one.ravel(), -two[:, :, :9].ravel()])
    assert (found["a"].min, found["a"].max) == (expected.min(), expected.max())
    assert found["a"].histogram.sum() == expected.size and found["a"].images == 2


def test_a_shape_known_only_at_run_time_leaves_whole(tmp_path):
    model = parse(
        """g (float[N,8] x) => (float[M] y) {
        c = Greater (x, zero)  n = NonZero (c)  t = Transpose (n)  v = GatherND (x, t)  y = Neg (v) }
        """.replace(" {", " <float[1] zero> {", 1),
        {"zero": np.zeros(1, np.float32)},
    )
    data = arrays(tmp_path, 5, (8,))
    found = collect(model, ("v", "y", "n", "c"), opened(tmp_path, model), histogram=True)
    assert set(found) == {"v", "y"}
    positive = data[data > 0]
    assert (found["v"].min, found["v"].max) == (positive.min(), positive.max())
    assert found["v"].histogram.sum() == positive.size


@pytest.mark.parametrize("shape", ["", "[6]", "[N,6]", "[N,7,5]", "[N,2,3,5,4]", "[N,3,70]"])
def test_any_rank(tmp_path, shape):
    dims = [int(d) for d in shape.strip("[]").split(",") if d and d != "N"]
    model = parse(f"g (float{shape} x) => (float{shape} y) {{ a = Neg (x)  y = Tanh (a) }}")
    data = np.random.default_rng(0).standard_normal((5, *dims)).astype(np.float32)
    for i, sample in enumerate(data):
        np.savez(tmp_path / f"{i}.npz", x=sample[None] if "N" in shape else sample)
    found = collect(model, ("x", "a", "y"), opened(tmp_path, model), histogram=True)
    every = {"x": data, "a": -data, "y": np.tanh(-data)}
    check(found, {name: array.ravel() for name, array in every.items()})


def test_a_batch_folded_into_another_dimension(tmp_path):
    text = """g (float[N,4,6] x) => (float[N,4,6] y) <int64[2] s, int64[3] b> {
        r = Reshape (x, s)  q = Exp (r)  y = Reshape (q, b) }"""
    model = parse(text, {"s": np.array([-1, 3]), "b": np.array([-1, 4, 6])})
    data = arrays(tmp_path, 5, (4, 6))
    found = collect(model, ("q", "y"), opened(tmp_path, model), histogram=True, batch=2)
    check(found, {"q": np.exp(data).ravel(), "y": np.exp(data).ravel()})
    assert found["q"].histogram.sum() == data.size


def test_float16(tmp_path):
    model = parse("g (float16[N,3,12,12] x) => (float16[N,3,12,12] y) { a = Neg (x)  y = Tanh (a) }")
    data = arrays(tmp_path, 4).astype(np.float16)
    found = collect(model, ("a", "y"), opened(tmp_path, model), histogram=True)
    assert (found["a"].min, found["a"].max) == ((-data).min(), (-data).max())


def test_integers_empties_constants_and_subgraphs_are_left_out(tmp_path):
    model = parse("""g (float[N,4] x) => (float[N,4] y, int64[N,4] i) <float[4] w, bool c, float[0,4] none> {
        i = Cast <to = 7> (x)
        e = Neg (none)
        t = If (c) <then_branch = a () => (float[N,4] p) { inner = Mul (x, w)  p = Neg (inner) },
                    else_branch = b () => (float[N,4] q) { q = Identity (x) }>
        y = Add (t, w)
    }""", {"c": np.array(True), "none": np.zeros((0, 4), np.float32)})  # fmt: skip
    arrays(tmp_path, 3, (4,))
    found = collect(model, ("x", "i", "e", "w", "inner", "t", "y"), opened(tmp_path, model), histogram=True)
    assert set(found) == {"x", "t", "y"}
    with pytest.raises(KeyError):
        collect(model, ("nowhere",), opened(tmp_path, model), histogram=False)


def test_all_zero_and_constant_tensors(tmp_path):
    model = parse("g (float[N,3,12,12] x) => (float[N,3,12,12] y) { a = Sub (x, x)  b = Neg (a)  y = Exp (a) }")
    arrays(tmp_path, 3)
    found = collect(model, ("a", "y"), opened(tmp_path, model), histogram=True)
    assert (found["a"].min, found["a"].max) == (0, 0)
    assert (found["y"].min, found["y"].max) == (1, 1)


# ------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("l = Log (x)  y = Relu (l)", "l", "NaN"),
        ("l = Exp (x)  y = Neg (l)", "l", "infinite"),
        ("n = Neg (x)  l = Sqrt (n)  m = Sqrt (x)  y = Add (l, m)", "l", "NaN"),
    ],
)
@pytest.mark.parametrize("histogram", [False, True])
def test_what_is_not_finite_is_named(tmp_path, text, name, kind, histogram):
    model = parse(f"g (float[N,3,12,12] x) => (float[N,3,12,12] y) {{ {text} }}")
    data = np.ones((4, 3, 12, 12), np.float32)
    data[2, 1, 5, 7] = {"infinite": 200.0, "NaN": -1.0}[kind]
    if "Neg (x)" in text:
        data *= -1
        data[2, 1, 5, 7] = 1.0
    for i, sample in enumerate(data):
        np.savez(tmp_path / f"{i}.npz", x=sample[None])
    with pytest.raises(DataError) as caught:
        if "Neg (x)" in text:  # m is NaN everywhere: keep to what l says
            model = parse("g (float[N,3,12,12] x) => (float[N,3,12,12] y) { n = Neg (x)  l = Sqrt (n)  y = Neg (l) }")
        collect(model, ("y",), opened(tmp_path, model), histogram=histogram, batch=1)
    assert f"tensor {name!r} holds {kind}" in str(caught.value) and "2.npz" in str(caught.value)


def test_an_input_that_is_not_finite(tmp_path):
    model = parse("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }")
    np.savez(tmp_path / "0.npz", x=np.array([[1, np.nan, 2, 3]], np.float32))
    with pytest.raises(DataError, match="tensor 'x' holds NaN"):
        collect(model, ("x",), opened(tmp_path, model), histogram=False)


# ------------------------------------------------------------------------------------------ what the graph tells


def test_nothing_is_looked_at_twice(tmp_path):
    model = parse(NET)
    sources = augment.sources(model, TENSORS)
    assert sources["t"] == "j" and sources["g1"] == "f" and sources["r1"] == "r1"
    shapes = {"x": (2, 3, 12, 12)}
    built = augment.augment(model, tuple(set(sources.values())), shapes, 2, 0)
    reads = [(n.op_type, n.inputs[0].name) for n in built.model.graph if n.op_type in ("ReduceMax", "ReduceMin")]
    assert len(reads) == len(set(reads))
    names = {name for _, name in reads}
    assert ("ReduceMin", "r1") not in reads and "j" not in names and "m" not in names
    assert ("ReduceMax", "p1") in reads and ("ReduceMax", "r1") not in reads
    assert [o.name for o in built.model.graph.outputs] == [augment.STATISTICS]


def test_observers_stand_from_the_last_tensor_to_the_first():
    # this is what makes ONNX Runtime run each of them right behind its tensor (augment.py's head)
    model = parse(NET)
    built = augment.augment(model, ("c1", "d", "a", "y"), {"x": (2, 3, 12, 12)}, 2, 64)
    order = [n.inputs[0].name for n in built.model.graph if n.op_type == "ReduceMax"]
    assert order == ["a", "d", "c1"]


def test_a_concat_is_sampled_in_proportion_and_all_over(tmp_path):
    text = """g (float[N,8,16,16] x) => (float[N,32,16,16] y) <float[8,1,1] p, float[24,1,1] q> {
        z = Sub (x, x)  a = Add (z, p)  w = Concat <axis = 1> (z, z, z)  b = Add (w, q)
        j = Concat <axis = 1> (a, b)  y = Neg (j) }"""
    weights = {"p": 100 + np.arange(8.0), "q": 200 + np.arange(24.0)}
    model = parse(text, {name: array.reshape(-1, 1, 1) for name, array in weights.items()})
    arrays(tmp_path, 300, (8, 16, 16))
    found = collect(model, ("a", "b", "j"), opened(tmp_path, model), histogram=True)["j"]
    centres = found.low + (np.arange(BINS) + 0.5) * (found.high - found.low) / BINS
    share = found.histogram / found.histogram.sum()
    # each channel is a constant of its own: 1 of 4 elements from a, and all channels alike
    assert share[centres < 150].sum() == pytest.approx(0.25, abs=0.02)
    assert (share * centres).sum() == pytest.approx(0.25 * 103.5 + 0.75 * 211.5, abs=3)
    first_half = share[(centres > 199) & (centres < 211.5)].sum()
    assert first_half == pytest.approx(0.375, abs=0.03)


def test_nonnegative():
    model = parse("""g (float[N,4] x) => (float[N,4] y) <float lo, float hi> {
        r = Relu (x)  s = Sigmoid (x)  a = Add (r, s)  b = Add (r, x)  c = Clip (x, lo, hi)  n = Neg (r)
        j = Concat <axis = 0> (r, s)  k = Concat <axis = 0> (r, x)  f = Flatten (r)  y = Add (n, b) }
        """, {"lo": np.float32(0), "hi": np.float32(6)})  # fmt: skip
    assert {v.name for v in nonnegative(model.graph)} == {"r", "s", "a", "c", "j", "f"}


@pytest.mark.parametrize(
    ("size", "attributes", "covers"),
    [
        (12, "kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]", True),
        (12, "kernel_shape = [2,2], strides = [2,2]", True),
        (13, "kernel_shape = [2,2], strides = [2,2]", False),
        (13, "kernel_shape = [2,2], strides = [2,2], ceil_mode = 1", True),
        (12, "kernel_shape = [1,1], strides = [2,2]", False),
        (11, "kernel_shape = [2,2], strides = [3,3]", False),
        (12, "kernel_shape = [3,3], dilations = [2,2]", False),
        (12, 'kernel_shape = [2,2], strides = [2,2], auto_pad = "SAME_UPPER"', False),
    ],
)
def test_a_pool_covers_its_input(size, attributes, covers):
    model = parse(f"g (float[1,1,{size},{size}] x) => (float[1,1,A,B] y) {{ y = MaxPool <{attributes}> (x) }}")
    augment._infer(model, {})
    assert (covering_pool(model.graph.inputs[0]) is not None) == covers


# ------------------------------------------------------------------------------------------ the histogram

NONE = np.zeros(0, np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_growing_is_counting_from_the_start(seed):
    rng = np.random.default_rng(seed)
    chunks = [(rng.standard_normal(500) * 10 ** rng.uniform(-2, 2)).astype(np.float32) for _ in range(12)]
    grown, low, high = Histogram(), 0.0, 0.0
    for chunk in chunks:
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
        grown.cover(low, high)
        grown.add(chunk, NONE)
    whole = Histogram(grown.low, grown.high)
    whole.add(np.concatenate(chunks), NONE)
    assert grown.counts[0].sum() == 6000
    # float32 positions: a value on an edge may be counted in the bin beside it
    assert np.abs(np.cumsum(grown.counts[0]) - np.cumsum(whole.counts[0])).max() <= 3
    assert grown.high - grown.low <= 4 * (high - low)


def test_merging_keeps_the_counts_of_pairs():
    h = Histogram()
    h.cover(0.0, 1.0)
    h.add(np.random.default_rng(0).random(1000, np.float32), NONE)
    pairs = h.counts[0].reshape(-1, 2).sum(axis=1)
    h.cover(-0.5, 1.0)
    assert (h.low, h.high) == (-1.0, 1.0)
    np.testing.assert_array_equal(h.counts[0], np.concatenate([np.zeros(BINS // 2, int), pairs]))
    h.cover(-0.5, 2.5)
    assert (h.low, h.high) == (-1.0, 3.0)


def test_zeros_first():
    h = Histogram()
    h.cover(0.0, 0.0)
    h.add(np.zeros(10, np.float32), NONE)
    h.cover(-1.0, 3.0)
    h.add(np.full(5, 3.0, np.float32), NONE)
    assert h.counts[0, BINS // 4] == 10 and h.counts[0, -1] == 5


def test_estimate_scales_samples_and_keeps_known_extremes():
    h = Histogram()
    h.cover(0.0, 4.0)
    h.add(np.array([0.0, 0.0, 1.0], np.float32), np.array([4.0, 1.0], np.float32))
    counts = h.estimate(300)
    assert (counts[0], counts[BINS // 4], counts[-1]) == (200, 100, 1)
