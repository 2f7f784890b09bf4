"""Measured costs: kernels find their links, the fit finds known costs, and a real model is predicted."""

import numpy as np
import pytest
from edgec.backends import ort as ort_backend
from edgec.compiler import model as model_io
from edgec.compiler.latency.kernel_times import Kernel, profile, undisturbed
from edgec.compiler.mixed_precision.costs import Costs, Sample, by_link, fit, measure, mixed
from edgec.compiler.mixed_precision.units import wire
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.passes.placement import place
from test_mixed import WIRING
from test_quantize import ranges_of, residual, weight

SCHEME = ort_backend.SCHEMES[0][1]


@pytest.fixture(scope="module")
def network():
    """The residual block (3 Convs, an Add), its quantizer, wiring and an input."""
    model, feed = residual(16), {"x": weight(1, 16, 6, 6)}
    quantizer = Quantizer(model, ort_backend.SUPPORTS, SCHEME, ranges_of(model, ort_backend.SUPPORTS, feed))
    placement = place(model, quantizer.ranges, quantizer.supports, quantizer.scheme, {})
    return quantizer, wire(model, placement), feed


def builder(quantizer, wiring):
    def build(integer):
        return quantizer.build({u.name: "float" for u in wiring.units if u.name not in integer}).model

    return build


# ------------------------------------------------------------------------------------------ wiring


def test_the_wiring_of_a_residual_block(network):
    _, wiring, _ = network
    assert [(u.name, u.role, u.members) for u in wiring.units] == [
        ("Conv_0", "linear", ("Conv_0", "Relu_1")),
        ("Conv_2", "linear", ("Conv_2",)),
        ("Add_3", "combine", ("Add_3", "Relu_4")),
        ("Conv_5", "linear", ("Conv_5",)),
    ]
    assert [(link.tensor, link.producer, set(link.readers), set(link.rounded_by)) for link in wiring.links] == [
        ("x", None, {"Conv_0"}, {"Conv_0"}),
        ("ra", "Conv_0", {"Conv_2", "Add_3"}, {"Conv_0", "Conv_2", "Add_3"}),
        ("b", "Conv_2", {"Add_3"}, {"Conv_2", "Add_3"}),
        ("rs", "Add_3", {"Conv_5"}, {"Add_3", "Conv_5"}),
        ("y", "Conv_5", {None}, {"Conv_5"}),
    ]
    assert {link.elements for link in wiring.links} == {16 * 36}
    assert wiring.link_of["a"] == "ra" and wiring.link_of["s"] == "rs", "an absorbed activation's input has no link"


@pytest.mark.parametrize(
    ("wanted", "real"),
    [
        ({"Add_3"}, set()),
        ({"Add_3", "Conv_5"}, {"Conv_5"}),
        ({"Add_3", "Conv_0"}, {"Conv_0"}),
        ({"Add_3", "Conv_0", "Conv_5"}, {"Add_3", "Conv_0", "Conv_5"}),
    ],
)
def test_what_is_realised_is_what_the_pass_quantizes(network, wanted, real):
    quantizer, wiring, _ = network
    assert wiring.realised(wanted) == real
    keep = {u.name: "float" for u in wiring.units if u.name not in wanted}
    placement = place(quantizer.model, quantizer.ranges, quantizer.supports, quantizer.scheme, keep)
    assert {node.name for node in placement.nodes} == real


# ------------------------------------------------------------------------------------------ attribution


def test_kernels_find_their_links(network):
    """Names as ONNX Runtime makes them: fused, renamed, reordered, and its own inventions."""
    quantizer, wiring, _ = network
    kernels = [
        Kernel("x_QuantizeLinear", "QuantizeLinear", ("x", "x_scale"), ("x_quantized",), 1.0),
        Kernel("Transpose_token_7", "Transpose", ("x_quantized",), ("Transpose_token_7_out0",), 2.0),
        Kernel("Conv_0_token_9", "QLinearConv", ("Transpose_token_7_out0",), ("Conv_0",), 4.0),
        Kernel("ra_nchwc", "Conv", ("reorder_0",), ("reorder_1",), 8.0),
        Kernel("ReorderOutput", "ReorderOutput", ("reorder_1",), ("ra",), 16.0),
        Kernel("Add_3", "QLinearAdd", ("Conv_0", "reorder_9"), ("whatever",), 32.0),
        Kernel("y_DequantizeLinear", "DequantizeLinear", ("y_quantized",), ("y",), 64.0),
        Kernel("stranger", "Mystery", ("nothing known",), ("nowhere",), 128.0),
    ]
    assert by_link(kernels, quantizer.model, wiring) == {
        "x": (3.0, 2),
        "ra": (28.0, 3),
        "rs": (32.0, 1),
        "y": (64.0, 1),
        "": (128.0, 1),
    }


def test_the_profiler_sees_every_kernel_and_they_are_all_attributed(network, tmp_path):
    quantizer, wiring, feed = network
    model_io.save(quantizer.model, tmp_path / "float.onnx")
    model_io.save(quantizer.build().model, tmp_path / "integer.onnx")
    paths = {"float": tmp_path / "float.onnx", "integer": tmp_path / "integer.onnx"}
    found = profile(paths, feed, threads=1, rounds=6)
    assert sum(k.op == "Conv" for k in found["float"]) == 3
    assert sum(k.op == "QLinearConv" for k in found["integer"]) == 3
    for kernels in found.values():
        assert all(k.ms >= 0 for k in kernels)
        assert "" not in by_link(kernels, quantizer.model, wiring)


# ------------------------------------------------------------------------------------------ fit


def samples_of(truth: Costs, assignments, slower: float, per_kernel: float) -> list[Sample]:
    """What a profiler that distorts each kernel would have seen: each link is one kernel, a crossing another."""
    found = []
    for integer in assignments:
        links = {"softmax": (truth.float_ms["softmax"], 1)}
        for link in WIRING.links:
            inside = link.producer in integer
            ms, count = (truth.integer_ms if inside else truth.float_ms)[link.tensor], 1
            if any((r in integer) != inside for r in link.readers):
                ms, count = ms + (truth.leave_ms if inside else truth.enter_ms)[link.tensor], 2
            links[link.tensor] = (ms, count)
        seen = {home: (slower * ms + per_kernel * n, n) for home, (ms, n) in links.items()}
        found.append(Sample(integer, seen, truth.predict(WIRING, integer)))
    return found


@pytest.mark.parametrize(("slower", "per_kernel"), [(1.0, 0.0), (1.3, 0.05)])
def test_the_fit_finds_the_costs_behind_distorted_kernel_times(slower, per_kernel):
    rng = np.random.default_rng(0)
    tensors = [*(link.tensor for link in WIRING.links), "softmax"]
    truth = Costs(*({t: float(rng.uniform(0.2, 1)) for t in tensors} for _ in range(4)))
    assignments = [frozenset(WIRING.realised(set(a))) for a in mixed(WIRING, 12, seed=1)]
    found = fit(samples_of(truth, assignments, slower, per_kernel), WIRING)
    assert found.misfit < 1e-6
    for integer in (frozenset("a"), frozenset("bc"), frozenset("asc"), frozenset("absc")):
        assert found.predict(WIRING, integer) == pytest.approx(truth.predict(WIRING, integer), rel=1e-6)


def test_a_step_that_no_sample_showed_gets_the_typical_price_per_element():
    truth = Costs(*({t: 1.0 for t in ("x", "ta", "tb", "ts", "tc", "softmax")} for _ in range(4)))
    ends = [frozenset[str](), frozenset("absc")]
    found = fit(samples_of(truth, [*ends, frozenset("b")], 1.0, 0.0), WIRING)
    assert found.enter_ms["ts"] == pytest.approx(1.0, rel=1e-6), "as x and ta, which have as many elements"


def test_mixtures_come_with_their_complements():
    found = mixed(WIRING, 6, seed=0)
    assert found[:2] == [frozenset(), frozenset("absc")]
    assert all(a | b == frozenset("absc") and not a & b for a, b in zip(found[2::2], found[3::2], strict=True))


def test_a_real_model_is_measured(network):
    """Timings of so small a model are noise; that the parts add up to the whole is not."""
    quantizer, wiring, feed = network
    seen = []
    found = measure(
        builder(quantizer, wiring), wiring, feed, threads=1, mixtures=4, seconds=0.6,
        progress=lambda what, done, total: seen.append(what),
    )  # fmt: skip
    assert set(found.integer_ms) == {"ra", "b", "rs", "y"}
    assert all(ms >= 0 for table in (found.float_ms, found.integer_ms, found.enter_ms) for ms in table.values())
    assert 0 < found.predict(wiring, ()) < 50
    assert set(seen) == {"measuring latency", "timing the layers"}


def test_the_undisturbed_time_ignores_interruptions():
    times = [10.0] * 40 + [500.0] * 60
    assert undisturbed(times) == 10.0
