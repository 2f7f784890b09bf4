"""Cut networks against the same networks with the channels masked, for every group; and what cannot be cut."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import prune_zoo
import pytest
import zoo
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.proof import Prover
from edgec.passes.channel_cuts import cut, groups, mask
from edgec.passes.cut_moves import JoinMoves
from equivalence import assert_equivalent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

#: Sums over fewer terms are rounded otherwise; the networks are a dozen layers deep.
RTOL = 2e-5

#: The units of each group, by hand.
UNITS = {
    "resnet-a": [8, 5, 6, 8],  # four of the first go through both stages
    "resnet-b": [4, 5, 6, 8, 8],
    "densenet": [4, 6, 3, 6, 3, 5],
    "shufflenet-v1": [2, 2],  # 12 channels that meet convolutions in 3, 12 and 2 groups, and a shuffle
    "shufflenet-v2": [8, 6, 6],
    "shufflenet-v2-gather": [2, 6, 2, 6, 4],
    "mobilenet-v2": [4, 12, 8, 6],
    "mobilenet-v3": [4, 10, 4],
    "yolo": [4, 8, 8, 4, 8, 8, 6, 6, 5, 5],
    "unet": [4, 6, 8, 5, 3, 2, 4],
    "convnext": [10, 5],
    "inception": [6, 3, 4, 2, 3, 4, 2, 7],
    "vit": [3, 8],
    "vit-joined": [3, 8],
}


def removed(found, share, seed=0, only=None):
    """Choose a share of the units of each group, or of one, at random; at least one stays everywhere."""
    rng = np.random.default_rng(seed)
    chosen = {
        group.name: rng.permutation(group.units)[: math.ceil(share * group.units)].tolist()
        for group in found
        if only in (None, group.name)
    }
    return found.feasible(chosen)


def check(model, gone, rtol=RTOL):
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = cut(model, gone)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    onnx.checker.check_model(model_io.serialize(result), full_check=True)
    assert_equivalent(mask(model, gone), result, rtol=rtol)
    return result


def weights(model):
    return model_io.weights_bytes(model)


# ------------------------------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("animal", prune_zoo.BUILDERS)
def test_every_group_of_the_zoo_is_found_and_cut_as_if_masked(animal):
    model = prune_zoo.BUILDERS[animal]()
    found = groups(model)
    assert [group.units for group in found] == UNITS[animal]
    for group in found:
        for share in (0.3, 1.0):
            gone = removed(found, share, only=group.name)
            assert weights(check(model, gone)) < weights(model)


@pytest.mark.parametrize("animal", prune_zoo.BUILDERS)
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_all_groups_at_once(animal, share):
    model = prune_zoo.BUILDERS[animal]()
    check(model, removed(groups(model), share, seed=1))


@pytest.mark.parametrize("animal", ["resnet-a", "densenet", "mobilenet-v3", "yolo", "unet"])
def test_with_batch_norm_folded(animal):
    model = pipeline.run(prune_zoo.BUILDERS[animal](), pipeline.exact_passes(), None)[0]
    found = groups(model)
    assert [group.units for group in found] == UNITS[animal]
    check(model, removed(found, 0.4))


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 21])
def test_all_opsets(opset):
    model = prune_zoo.mobilenet_v2(opset=opset)
    found = groups(model)
    assert [group.units for group in found] == UNITS["mobilenet-v2"]
    check(model, removed(found, 0.4))


def test_float16():
    model = prune_zoo.mobilenet_v2(dtype="float16")
    assert [group.units for group in groups(model)] == UNITS["mobilenet-v2"]
    result = check(model, removed(groups(model), 0.4), rtol=1e-2)  # float16 has 11 bits
    kinds = {value.const_value.dtype for value in result.graph.initializers.values()}
    assert kinds == {ir.DataType.FLOAT16}


def test_masking_is_not_the_original_and_the_proof_tells_them_apart():
    model = prune_zoo.resnet("A")
    gone = removed(groups(model), 0.3)
    result = cut(model, gone)
    assert Prover(mask(model, gone)).prove(result, RTOL).error <= RTOL
    assert Prover(model).prove(result, RTOL).error > 1e-2
    other = {name: [(unit + 1) % 4 for unit in units] for name, units in gone.items()}
    assert Prover(mask(model, other)).prove(result, RTOL).error > 1e-2


def test_to_cut_twice_is_to_cut_once():
    model = prune_zoo.densenet()
    name = groups(model)[1].name
    twice = cut(cut(model, {name: [1, 4]}), {name: [0]})  # of 0, 2, 3, 5 that are left the first
    assert_equivalent(cut(model, {name: [0, 1, 4]}), twice, rtol=0)


def test_weights_outside_the_file_are_cut_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("edgec.passes.channel_cuts.LAZY_BYTES", 100)
    model = prune_zoo.resnet("B")
    onnx.save(
        onnx.load_from_string(model_io.serialize(model)), tmp_path / "m.onnx", save_as_external_data=True,
        location="w.bin", size_threshold=0,
    )  # fmt: skip
    loaded = model_io.load(tmp_path / "m.onnx")
    gone = removed(groups(loaded), 0.4)
    result = cut(loaded, gone)
    assert any(isinstance(v.const_value, ir.LazyTensor) for v in result.graph.initializers.values())
    assert_equivalent(cut(model, gone), result, rtol=0)


# ------------------------------------------------------------------------------------------- groups


def test_a_group_says_who_makes_it_who_reads_it_and_where_its_units_are():
    found = groups(prune_zoo.resnet("A"))
    stream = found[0]
    assert (stream.producers, stream.consumers) == (
        ("t0_0", "t6_0", "t13_0", "t22_0"),
        ("t3_0", "t10_0", "t19_0", "t28_0"),
    )
    where = {(m.tensor, m.node): m for m in stream.members}
    narrow, wide = where["t2_0", ""], where["t16_0", ""]  # after the first convolution, and after the Pad
    assert narrow.axis == wide.axis == 1 and len(narrow.units) == 4 and len(wide.units) == 8
    np.testing.assert_array_equal(wide.units[2:6], narrow.units)
    assert sorted(wide.units) == list(range(8))
    np.testing.assert_array_equal(wide.indices([wide.units[3]]), [3])
    first = next(m for m in stream.members if m.node == "t0_0")  # its weight
    assert first.axis == 0
    np.testing.assert_array_equal(first.units, narrow.units)


def test_a_group_that_would_be_emptied_is_refused_and_one_unit_can_be_given_back():
    model = prune_zoo.resnet("B")
    found = groups(model)
    everything = {group.name: list(range(group.units)) for group in found}
    with pytest.raises(ValueError, match="nothing would be left of"):
        cut(model, everything)
    left = found.feasible(everything)
    assert [group.units - len(left[group.name]) for group in found] == [1] * len(found)
    assert all(group.units - 1 not in left[group.name] for group in found)  # the last one listed
    check(model, left)


def test_half_a_tensor_that_is_split_off_keeps_a_unit_of_its_own():
    model = prune_zoo.yolo()
    found = groups(model)
    assert found[2].units == 8
    with pytest.raises(ValueError, match="nothing would be left of"):
        cut(model, {found[2].name: [0, 1, 2, 3]})
    left = found.feasible({found[2].name: [3, 2, 1, 0]})
    assert left == {found[2].name: [3, 2, 1]}
    check(model, left)


@pytest.mark.parametrize("gone", [{"nothing": [0]}, {"t0_0": [4]}, {"t0_0": [-1]}])
def test_what_there_is_not_cannot_be_cut(gone):
    with pytest.raises(ValueError, match="there is no group|hence no unit"):
        cut(prune_zoo.resnet("B"), gone)


def test_nothing_to_cut():
    model = zoo.model("""
    g (float[N,3,4,4] x) => (float[N,2,4,4] y) <float[2,3,1,1] w> {
        r = Relu (x)
        y = Conv (r, w)
    }""")
    found = groups(model)
    assert len(found) == 0 and found.refusals == ()
    assert_equivalent(model, cut(model, {}), rtol=0)


@pytest.mark.parametrize("animal", zoo.ZOO)
def test_whatever_the_graph_it_is_cut_right_or_not_at_all(animal):
    if animal in zoo.NONDETERMINISTIC:
        pytest.skip("it gives other outputs at each run")
    model = zoo.build(animal)
    found = groups(model)
    if len(found):
        check(model, removed(found, 0.5))


# ------------------------------------------------------------------------------------------- chains of moves


@pytest.mark.parametrize("split", ["Split", "Gather"])
def test_shuffles_as_gathers_leave_every_channel_free(split):
    model = prune_zoo.shufflenet_v2(split)
    before = model.clone()
    result = JoinMoves()(model)
    assert result.modified and "Transpose" not in {node.op_type for node in model.graph}
    assert_equivalent(before, model, rtol=0)
    found = groups(model)
    assert [group.units for group in found] == [8, 6, 4, 6, 4]
    for group in found:
        check(model, removed(found, 0.4, only=group.name))
    check(model, removed(found, 0.6))
    assert not JoinMoves()(model).modified


def test_a_transpose_through_a_batch_of_unknown_length_is_a_transpose():
    model = zoo.model(
        """
    g (float[N,3,5,6] x) => (float[N,3,6,5] y, float[N,3,5,6] z) <int64[3] flat = {-1,5,6}, int64[4] back = {-1,3,6,5},
      int64[4] wrong = {-1,3,5,6}> {
        a = Reshape (x, flat)
        b = Transpose <perm = [0,2,1]> (a)
        c = Reshape (b, back)
        y = Relu (c)
        d = Reshape (b, wrong)
        z = Relu (d)
    }""",
        {"flat": np.array([-1, 5, 6]), "back": np.array([-1, 3, 6, 5]), "wrong": np.array([-1, 3, 5, 6])},
    )
    before = model.clone()
    assert JoinMoves()(model).rewrites == 1
    assert [n.attributes["perm"].as_ints() for n in model.graph if n.op_type == "Transpose"] == [
        (0, 2, 1),
        (0, 1, 3, 2),
    ]
    assert_equivalent(before, model, rtol=0)


# ------------------------------------------------------------------------------------------- random networks


class Sketch(prune_zoo.Net):
    """A random network: tensors of (name, channels), 4 x 4 pixels each."""

    def __init__(self, draw):
        super().__init__("N", 4, 4, 4)
        self.draw, self.tensors = draw, [("x", 4)]

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def some(self):
        return self.pick(*self.tensors[-4:])

    def add(self, name, channels):
        if channels <= 24:
            self.tensors.append((name, channels))

    def any_conv(self):
        (x, ins), k = self.some(), self.pick(1, 3)
        outs = ins if self.pick(True, False) else self.pick(2, 4, 6, 12)
        group = self.pick(*(g for g in (1, 2, 3, ins) if ins % g == 0 and outs % g == 0))
        weight = f"shared_{outs}_{ins // group}_{k}" if self.pick(*[False] * 5, True) else None
        if weight is not None and weight not in self.values:
            self.weight(outs, ins // group, k, k, name=weight)
        self.add(self.conv(x, ins, outs, k, group=group, bias=self.pick(True, False), weight=weight), outs)

    def transposed(self):
        (x, ins), each = self.some(), self.pick(1, 2, 3)
        group = self.pick(*(g for g in (1, 2, ins) if ins % g == 0))
        w = self.weight(ins, each, 3, 3)
        self.add(self.op(f"ConvTranspose <group = {group}, pads = [1,1,1,1]> ({x}, {w})"), each * group)

    def unary(self):
        x, channels = self.some()
        self.add(self.op(f"{self.pick('Relu', 'Sigmoid', 'Tanh', 'Erf', 'HardSwish')} ({x})"), channels)

    def normalised(self):
        x, channels = self.some()
        self.add(self.norm(x, channels), channels)

    def binary(self):
        x, channels = self.some()
        other = self.pick(*(name for name, c in self.tensors if c in (channels, 1)))
        if self.pick(*[False] * 3, True):
            other = self.weight(*self.pick((channels, 1, 1), (1, 1, 1), (channels, 4, 4)))
        self.add(
            self.op(f"{self.pick('Add', 'Mul', 'Max')} ({', '.join(self.pick((x, other), (other, x)))})"), channels
        )

    def concat(self):
        (x, a), (y, b) = self.some(), self.some()
        self.add(self.op(f"Concat <axis = 1> ({x}, {y})"), a + b)

    def split(self):
        x, channels = self.some()
        if channels > 2:
            left = self.draw(st.integers(1, channels - 1))
            parts = self.op(f"Split <axis = 1> ({x}, {self.ints(left, channels - left)})", 2)
            for part, length in zip(parts, (left, channels - left), strict=True):
                self.add(part, length)

    def slice(self):
        x, channels = self.some()
        start, step = self.draw(st.integers(0, channels - 1)), self.pick(1, 2, -1, -2)
        length = len(range(channels)[start::step])
        end = 99 if step > 0 else -99
        bounds = (self.ints(number) for number in (start, end, 1, step))
        self.add(self.op(f"Slice ({', '.join([x, *bounds])})"), length)

    def gather(self):
        x, channels = self.some()
        which = self.draw(st.lists(st.integers(-channels, channels - 1), min_size=1, max_size=8))
        self.add(self.op(f"Gather <axis = 1> ({x}, {self.ints(*which)})"), len(which))

    def pad(self):
        x, channels = self.some()
        a, b = self.draw(st.integers(-1, 2)), self.draw(st.integers(-1, 2))
        if channels + a + b > 0 and channels > 2:
            self.add(self.op(f"Pad ({x}, {self.ints(0, a, 0, 0, 0, b, 0, 0)})"), channels + a + b)

    def shuffle(self):
        x, channels = self.some()
        g = self.pick(*(g for g in (1, 2, 3) if channels % g == 0))
        y = self.op(f"Reshape ({x}, {self.ints(0, g, channels // g, 4, 4)})")
        y = self.op(f"Transpose <perm = [0,2,1,3,4]> ({y})")
        self.add(self.op(f"Reshape ({y}, {self.ints(0, -1, 4, 4)})"), channels)

    def gated(self):
        x, channels = self.some()
        axes = self.pick((2, 3), (1,), (1, 2, 3))
        gate = self.op(f"ReduceMean <axes = [{','.join(map(str, axes))}]> ({x})")
        self.add(self.op(f"Mul ({x}, {gate})"), channels)

    def softmax(self):
        x, channels = self.some()
        self.add(self.op(f"Softmax <axis = {self.pick(1, 2, 3)}> ({x})"), channels)

    def spread(self):
        x, channels = self.some()
        if channels % 4 == 0:
            y = self.op(f'DepthToSpace <blocksize = 2, mode = "{self.pick("DCR", "CRD")}"> ({x})')
            self.add(self.op(f"AveragePool <kernel_shape = [2,2], strides = [2,2]> ({y})"), channels // 4)

    def attended(self):
        x, channels = self.some()
        q, k = (self.op(f"Reshape ({self.conv(x, channels, 4)}, {self.ints(0, 2, 2, 16)})") for _ in "qk")
        s = self.op(f"MatMul ({self.op(f'Transpose <perm = [0,1,3,2]> ({q})')}, {k})")
        v = self.op(f"Reshape ({self.conv(x, channels, 6)}, {self.ints(0, 2, 3, 16)})")
        y = self.op(f"MatMul ({v}, {self.op(f'Softmax <axis = -2> ({s})')})")
        self.add(self.op(f"Reshape ({y}, {self.ints(0, 6, 4, 4)})"), 6)

    def head(self):
        x, channels = self.tensors[-1]
        if self.pick(True, False):
            return self.classify(x, channels, 3)
        return self.linear(self.op(f"Flatten ({x})"), channels * 16, 3)


STEPS = [
    Sketch.any_conv, Sketch.any_conv, Sketch.any_conv, Sketch.transposed, Sketch.unary, Sketch.normalised,
    Sketch.binary, Sketch.binary, Sketch.concat, Sketch.split, Sketch.slice, Sketch.gather, Sketch.pad, Sketch.shuffle,
    Sketch.gated, Sketch.softmax, Sketch.spread, Sketch.attended,
]  # fmt: skip


@st.composite
def networks(draw):
    sketch = Sketch(draw)
    sketch.any_conv()
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=10)):
        step(sketch)
    outputs = [(sketch.head(), ("N", 3))]
    if draw(st.booleans()):
        name, channels = draw(st.sampled_from(sketch.tensors))
        outputs.append((name, ("N", channels, 4, 4)))
    return sketch.model(*outputs), draw(st.sampled_from([0.3, 0.7])), draw(st.booleans())


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_random_networks_are_cut_as_if_masked(network):
    model, share, joined = network
    if joined:
        before = model.clone()
        JoinMoves()(model)
        assert_equivalent(before, model, rtol=0)
    found = groups(model)
    if len(found):
        check(model, removed(found, share), rtol=1e-4)  # sums may cancel in what is left
