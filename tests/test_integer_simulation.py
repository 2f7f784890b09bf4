"""ONNX Runtime's numbers of a Q/DQ artifact, optimisations off, are those of integer arithmetic: within one step.

One step and not none: ONNX Runtime multiplies the dequantized numbers and sums them in float32, in an order of its own,
while the integers' sum is exact. Where a result lies within that rounding error (some 1e-6 of it) of the middle between
two integers, it may fall to either side; everywhere else they are equal.

Each stretch from pair to pair is judged by itself, on the integers that ONNX Runtime read (`given`): one number that
fell to the other side shifts the sums behind it a little, which takes further numbers to the other side. In a trained
ResNet-20 that grows from one number in the sixth layer to some thousands, up to four steps apart; no arithmetic is to
blame for that. In the small networks here it does not come to it: they agree from end to end as well.
"""

from dataclasses import replace

import equivalence
import numpy as np
import onnx
import pytest
import trt_artifacts as artifacts
import wide_zoo
import zoo
from edgec.compiler import devices
from integer_simulation import simulate
from qdq_graph import Graph

PROFILE = replace(devices.find("jetson-orin-nano-8gb"), toolchain={"tensorrt": "8.6.2"})


def made(model, folder):
    return artifacts.make(model, folder, PROFILE, "int8").model


def feed_of(path, seed):
    return equivalence.sample(equivalence.session(path.read_bytes()), seed)


SMALL = {
    "conv": "y = Conv <pads = [1,1,1,1], dilations = [1,1], strides = [2,2]> (x, w, b)",
    "conv, dilated": "y = Conv <dilations = [2,1], pads = [2,0,2,0]> (x, w, b)",
    "conv, uneven pads": "y = Conv <pads = [1,0,2,1]> (x, w)",
    "conv, grouped": "y = Conv <group = 2> (x, wg)",
    "conv, depthwise": "y = Conv <group = 16, pads = [1,1,1,1]> (x, wd, b16)",
    "transposed": "y = ConvTranspose <strides = [2,2], pads = [1,0,0,1]> (x, wt, b)",
    "transposed, dilated": "y = ConvTranspose <dilations = [2,2]> (x, wt)",
    "transposed, grouped": "y = ConvTranspose <group = 4, strides = [2,1]> (x, wtg)",
    "average pool": """a = Relu (x)
        p = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], strides = [2,2]> (a)
        y = Conv (p, v)""",
    "average pool with its padding": """
        p = AveragePool <kernel_shape = [2,3], pads = [0,1,1,1], count_include_pad = 1> (x)
        y = Conv (p, v)""",
    "global average pool": "p = GlobalAveragePool (x)\ny = Conv (p, v)",
    "max pool": "c = Conv (x, v)\np = MaxPool <kernel_shape = [2,2]> (c)\ny = Conv (p, u)",
    "residual": "c = Conv <pads = [1,1,1,1]> (x, w16, b16)\ns = Add (c, x)\nr = Relu (s)\ny = Conv (r, v)",
}
WEIGHTS = """<float[24,16,3,3] w, float[24] b, float[24,8,3,3] wg, float[16,1,3,3] wd, float[16] b16,
    float[16,24,3,3] wt, float[16,8,3,3] wtg, float[24,16,1,1] v, float[16,24,1,1] u, float[16,16,3,3] w16>"""


#: At most so large a share of a file's numbers may differ at all: stretch by stretch, and from end to end.
SHARE, SHARE_AT_THE_END = 1e-3, 1e-2


def agrees(path, simulated=None, seeds=(1, 2, 3)) -> bool:
    """Say whether no number is more than a step apart, and next to none is at all.

    Inputs are others than those that the ranges were made from, and larger, so that numbers saturate too.
    """
    return all(_agree(path, simulated or path, seed) for seed in seeds)


def _agree(path, simulated, seed) -> bool:
    feed = {name: (1.2 * array).astype(np.float32) for name, array in feed_of(path, seed).items()}
    seen = artifacts.observed(path, feed)
    stretches, whole = (
        np.concatenate([apart.ravel() for apart in artifacts.steps(exact, seen).values()])
        for exact in (simulate(simulated, feed, given=seen), simulate(simulated, feed))
    )
    return stretches.max() <= 1 and (stretches > 0.5).mean() <= SHARE and (whole > 0.5).mean() <= SHARE_AT_THE_END


@pytest.mark.parametrize("name", SMALL)
def test_single_operators(name, tmp_path):
    text = f"g (float[N,16,9,8] x) => (float[N,C,H,W] y) {WEIGHTS} {{ {SMALL[name]} }}"
    path = made(zoo.model(text), tmp_path / "m")
    assert any(node.op == "QuantizeLinear" for node in Graph(path).nodes)
    assert agrees(path)


@pytest.mark.parametrize("name", sorted(wide_zoo.WIDE.keys() - {"mlp-one-row"}))
def test_networks(name, tmp_path):
    path = made(wide_zoo.WIDE[name](), tmp_path / "m")
    assert agrees(path)


# ------------------------------------------------------------------------------------------ it can fail


def changed(path, out, change):
    """Write a copy of a file in which `change(graph proto)` has been at work."""
    proto = onnx.load(path)
    change(proto.graph)
    onnx.save(proto, out)
    return out


@pytest.mark.parametrize("name", ["resnet-b", "unet"])
def test_a_scale_that_is_two_percent_off_is_found(name, tmp_path):
    """Each scale of a network in turn: of activations, and that of one channel of a weight."""
    path = made(wide_zoo.WIDE[name](), tmp_path / "m")
    scales = sorted({node.input(1) for node in Graph(path).pairs()})
    assert len(scales) > 15
    for scale in scales:

        def change(graph, scale=scale):
            tensor = next(t for t in graph.initializer if t.name == scale)
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[0] *= 1.02
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, scale))

        assert not agrees(path, changed(path, tmp_path / "changed.onnx", change), seeds=(1,)), scale


def test_a_dequantizers_own_scale_is_found(tmp_path):
    """The integers are right and what they stand for is not: it shows behind the layer."""
    path = made(wide_zoo.WIDE["resnet-b"](), tmp_path / "m")
    nodes = [i for i, node in enumerate(onnx.load(path).graph.node) if node.op_type == "DequantizeLinear"]
    for index in nodes:

        def change(graph, index=index):
            node = graph.node[index]
            tensor = next(t for t in graph.initializer if t.name == node.input[1])
            array = (onnx.numpy_helper.to_array(tensor) * np.float32(1.02)).astype(np.float32)
            graph.initializer.append(onnx.numpy_helper.from_array(array, "another_scale"))
            node.input[1] = "another_scale"

        assert not agrees(path, changed(path, tmp_path / "changed.onnx", change), seeds=(1,)), index


def test_a_bias_and_swapped_channels_are_found(tmp_path):
    path = made(wide_zoo.WIDE["plain"](), tmp_path / "m")
    biases = [node.input(2) for node in Graph(path).nodes if node.op == "Conv"]
    assert all(biases)
    for bias in biases:

        def change(graph, bias=bias):
            tensor = next(t for t in graph.initializer if t.name == bias)
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array[np.r_[1, 0, 2 : len(array)]], bias))

        assert not agrees(path, changed(path, tmp_path / "changed.onnx", change), seeds=(1,)), bias


# ------------------------------------------------------------------------------------------ the float16 artifact


@pytest.mark.parametrize("name", ["resnet-b", "yolo", "unet", "mobilenet-v3"])
def test_the_float16_artifact_is_near(name, tmp_path):
    """Sums of float16 numbers are no sums of integers: one number in ten may differ, and by more than a step."""
    result = artifacts.make(wide_zoo.WIDE[name](), tmp_path / "m", PROFILE, "int8")
    (copy,) = artifacts.lower(result, PROFILE, "int8", "10.13.3")
    feed = feed_of(result.model, 1)
    found = artifacts.steps(simulate(result.model, feed), artifacts.observed(copy, feed))
    everything = np.concatenate([apart.ravel() for apart in found.values()])
    assert everything.max() <= 4 and (everything > 0.5).mean() <= 0.1
