"""The judge of every step of quantization, against a dense computation."""

import math
from dataclasses import replace

import lab
import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler.errors import DataError
from edgec.compiler.quantization import closeness
from edgec.compiler.quantization.closeness import Closeness, few
from edgec.compiler.types import InputSpec

RNG = np.random.default_rng(2)

#: Two float outputs of very different sizes, and one that holds no floats.
THREE = """
g (float[N,6] x) => (float[N,3] a, float[N,2] b, int64[N] c)
<float[6,3] w, float[6,2] v> {
    a = MatMul (x, w)
    b = MatMul (x, v)
    c = ArgMax <axis = 1, keepdims = 0> (a)
}
"""
W, V = RNG.normal(size=(6, 3)), 100 * RNG.normal(size=(6, 2))


def three(w: np.ndarray = W, v: np.ndarray = V, text: str = THREE) -> ir.Model:
    return zoo.model(text, {"w": w, "v": v})


def dense(x, exact, got) -> float:
    y, z = x @ exact.astype(np.float32).astype(np.float64), x @ got.astype(np.float32).astype(np.float64)
    return 10 * math.log10((y**2).sum() / ((y - z) ** 2).sum())


@pytest.fixture
def x() -> np.ndarray:
    return RNG.normal(size=(20, 6)).astype(np.float32)


def test_it_is_the_sqnr_of_the_worst_output_over_all_images(tmp_path, x):
    judge = Closeness(three(), lab.folder(tmp_path, three(), x), 1)
    w, v = W + 0.01 * RNG.normal(size=W.shape), V + 0.1 * RNG.normal(size=V.shape)
    each = [dense(x.astype(np.float64), W, w), dense(x.astype(np.float64), V, v)]
    assert each[0] < each[1]  # by the size of the errors alone it would be the other one
    assert judge.decibels(three(w, v)) == pytest.approx(each[0], abs=1e-3)  # float32 sums
    assert judge.decibels(three(W, v)) == pytest.approx(each[1], abs=1e-3)


def test_outputs_that_hold_no_floats_do_not_count(tmp_path, x):
    """The first two columns are all but equal: the slightest change swaps the largest of them."""
    w, v = W.copy(), W.copy()
    w[:, 1], v[:, 1], w[:, 2], v[:, 2] = 0.9999 * W[:, 0], 1.0001 * W[:, 0], -W[:, 0], -W[:, 0]
    exact, got = (lab.outputs(three(one), {"x": x})["c"] for one in (w, v))
    assert (exact != got).mean() > 0.2
    assert Closeness(three(w), lab.folder(tmp_path, three(), x), 1).decibels(three(v)) > 70


def test_the_ends(tmp_path, x):
    judge = Closeness(three(), lab.folder(tmp_path, three(), x), 1)
    assert judge.decibels(three()) == math.inf
    assert judge.decibels(three(W * np.nan)) == -math.inf
    assert judge.decibels(three(W * np.inf)) == -math.inf
    assert judge.decibels(three(W * 0)) == pytest.approx(0, abs=1e-6)
    silent = Closeness(three(0 * W), lab.folder(tmp_path, three(), x), 1)
    assert silent.decibels(three(0 * W)) == math.inf
    assert silent.decibels(three(W)) == -math.inf


def test_rows_that_only_pad_a_fixed_batch_do_not_count(tmp_path, x):
    """11 samples in batches of 4: the last one is repeated, and would count twice."""
    text = THREE.replace("[N", "[4")
    x = x[:11] * np.r_[np.ones(10), 50][:, None].astype(np.float32)  # the last sample has most of the energy
    w = W.copy()
    w[0] += 0.1
    judge = Closeness(three(text=text), lab.folder(tmp_path, three(text=text), x), 1)
    assert judge.decibels(three(w, text=text)) == pytest.approx(dense(x.astype(np.float64), W, w), abs=1e-3)
    padded = np.concatenate([x, x[-1:]]).astype(np.float64)
    assert dense(padded, W, w) != pytest.approx(dense(x.astype(np.float64), W, w), abs=0.1)


@pytest.mark.parametrize("simulated", [False, True])
def test_simulated_types_are_never_fused_into_kernels(tmp_path, x, monkeypatch, simulated):
    judge = Closeness(three(), lab.folder(tmp_path, three(), x), 1)
    seen = []

    class Spy(closeness.Session):
        def __init__(self, source, **options):
            seen.append(options["fuse_quantized"])
            super().__init__(source, **options)

    monkeypatch.setattr(closeness, "Session", Spy)
    judge.decibels(three(), simulated=simulated)
    assert seen == [not simulated]


def test_a_float_model_that_gives_nan_is_refused_by_the_first_such_tensor(tmp_path, x):
    text = THREE.replace("b = MatMul (x, v)", "r = Sqrt (x)\n    s = Add (r, r)\n    b = MatMul (s, v)")
    with pytest.raises(DataError, match="'r' holds NaN"):
        Closeness(three(text=text), lab.folder(tmp_path, three(), x), 1)


@pytest.mark.parametrize(
    ("shape", "count"), [((6,), 130), ((3, 160, 160), 125), ((3, 224, 224), 64), ((3, 999, 999), 64)]
)
def test_so_many_numbers_are_enough_but_at_least_64_images_spread_over_the_folder(tmp_path, shape, count):
    samples = lab.folder(tmp_path, three(), np.zeros((130, 6)))
    some = few(replace(samples, specs=(InputSpec("x", "float32", (None, *shape)),)))
    assert [item.row for item in some.items] == [i * 130 // count for i in range(count)]
    assert len(few(samples.subset(range(5)))) == 5


def test_each_images_part_of_the_error(tmp_path, x):
    """Relative to each output's energy, so that large numbers do not outvote small ones."""
    judge = Closeness(three(), lab.folder(tmp_path, three(), x), 1)
    w, v = W + 0.01 * RNG.normal(size=W.shape), V + 0.1 * RNG.normal(size=V.shape)
    found = judge.parts(three(w, v))
    each = [
        ((x @ (exact - got)) ** 2).sum(1) / ((x @ exact) ** 2).sum() for exact, got in ((W, w), (V, v))
    ]  # (images,) for each output
    np.testing.assert_allclose(found, sum(each) / sum(e.sum() for e in each), rtol=2e-3)  # float32 sums
    assert len(judge.images) == len(found) == 20


def test_parts_are_alike_where_there_is_nothing_to_tell(tmp_path, x):
    judge = Closeness(three(), lab.folder(tmp_path, three(), x), 1)
    for model in (three(), three(W * np.nan), three(W * np.inf)):
        np.testing.assert_array_equal(judge.parts(model), np.full(20, 1 / 20))
