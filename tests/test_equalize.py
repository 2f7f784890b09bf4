"""Any positive factors leave the outputs as they are: on the usual architectures, and on random graphs."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler import model as model_io
from edgec.passes.channel_groups import PINNED, analyse
from edgec.passes.equalize import Equalize
from equivalence import assert_equivalent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RTOL = 1e-4  # what the pass promises; a factor rounds each weight once, to 6e-8 of itself

CASES = {
    "residual": """
g (float[N,3,8,8] x) => (float[N,5] y) <float[4,3,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4] b2,
  float[8,4,3,3] w3, float[8,4,1,1] w4, float[8] b4, float[5,8] w5, float[5] b5> {
    a = Conv <pads = [1,1,1,1]> (x, w1, b1)
    r = Relu (a)
    c = Conv <pads = [1,1,1,1]> (r, w2, b2)
    d = Add (c, r)
    e = LeakyRelu (d)
    f = Conv <pads = [1,1,1,1], strides = [2,2]> (e, w3)
    s = Conv <strides = [2,2]> (e, w4, b4)
    h = Add (f, s)
    i = Relu (h)
    p = GlobalAveragePool (i)
    q = Flatten (p)
    y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (q, w5, b5)
}""",
    "option-a": """
g (float[N,2,8,8] x) => (float[N,3] y) <float[2,2,3,3] w1, float[4,2,3,3] w2, float[4] b2, float[4,3] w3,
  int64[2] from = {0,0}, int64[2] to = {9,9}, int64[2] axes = {2,3}, int64[2] steps = {2,2},
  int64[8] pads = {0,1,0,0,0,1,0,0}> {
    a = Conv <pads = [1,1,1,1]> (x, w1)
    r = Relu (a)
    s = Slice (r, from, to, axes, steps)
    p = Pad (s, pads)
    b = Conv <pads = [1,1,1,1], strides = [2,2]> (r, w2, b2)
    c = Add (b, p)
    d = Relu (c)
    m = ReduceMean <axes = [2,3], keepdims = 0> (d)
    y = MatMul (m, w3)
}""",
    "shuffle": """
g (float[N,3,6,6] x) => (float[N,2,3,3] y) <float[8,3,3,3] w1, float[4,4,1,1] w2, float[4,1,3,3] w3, float[4] b3,
  float[2,8,1,1] w4, int64[5] split = {0,2,4,6,6}, int64[4] join = {0,8,6,6}> {
    a0 = Conv <pads = [1,1,1,1]> (x, w1)
    a = Relu (a0)
    p, q = Split <axis = 1> (a)
    b = Conv (q, w2)
    c = Conv <group = 4, pads = [1,1,1,1]> (b, w3, b3)
    d = Relu (c)
    e = Concat <axis = 1> (p, d)
    f = Reshape (e, split)
    g = Transpose <perm = [0,2,1,3,4]> (f)
    h = Reshape (g, join)
    k = AveragePool <kernel_shape = [2,2], strides = [2,2]> (h)
    y = Conv (k, w4)
}""",
    "squeeze-and-excite": """
g (float[N,3,6,6] x) => (float[N,2,6,6] y) <float[6,3,1,1] w1, float[12,1,3,3] w2, float[12] b2, float[3,12,1,1] w3,
  float[3] b3, float[12,3,1,1] w4, float[2,12,1,1] w5, float[12] slope> {
    a = Conv (x, w1)
    b = Conv <group = 6, pads = [1,1,1,1]> (a, w2, b2)
    slopes = Unsqueeze (slope, axes)
    c = PRelu (b, slopes)
    p = GlobalAveragePool (c)
    s = Conv (p, w3, b3)
    t = Relu (s)
    u = Conv (t, w4)
    v = HardSigmoid (u)
    m = Mul (c, v)
    y = Conv (m, w5)
}""".replace("float[12] slope>", "float[12] slope, int64[2] axes = {1,2}>"),
    "grouped": """
g (float[N,4,6,6] x) => (float[N,3,6,6] y) <float[6,2,1,1] w1, float[6] b1, float[4,3,3,3] w2, float[3,4,1,1] w3> {
    a = Conv <group = 2> (x, w1, b1)
    r = Relu (a)
    b = Conv <group = 2, pads = [1,1,1,1]> (r, w2)
    y = Conv (b, w3)
}""",
    "transposed": """
g (float[N,3,4,4] x) => (float[N,2,16,16] y) <float[4,3,1,1] w1, float[4,3,2,2] w2, float[6] b2, float[2,10,3,3] w3,
  float[4] scales = {1.0, 1.0, 4.0, 4.0}, float[4] twice = {1.0, 1.0, 2.0, 2.0}> {
    a0 = Conv (x, w1)
    a = Relu (a0)
    b = ConvTranspose <group = 2, strides = [2,2]> (a, w2, b2)
    c = Resize <mode = "linear"> (b, , twice)
    s = Resize <mode = "nearest"> (a, , scales)
    d = Concat <axis = 1> (c, s)
    e = Relu (d)
    y = Conv <pads = [1,1,1,1]> (e, w3)
}""",
    "heads": """
g (float[N,3,4,4] x) => (float[N,16,5] y, float[N,4,4,4] z) <float[4,3,1,1] w1, float[2,4,1,1] w2, float[3,4,1,1] w3,
  float[4,4,1,1] w4, int64[3] flat = {0,5,-1}> {
    a0 = Conv (x, w1)
    a = Relu (a0)
    b = Conv (a, w2)
    s = Sigmoid (b)
    c = Conv (a, w3)
    d = Concat <axis = 1> (s, c)
    e = Reshape (d, flat)
    y = Transpose <perm = [0,2,1]> (e)
    z = Conv (a, w4)
}""",
    "flattened": """
g (float[N,3,4,4] x) => (float[N,3] y) <float[4,3,3,3] w1, float[4] b1, float[16,6] w2, float[6] b2, float[6,3] w3,
  float[3] b3> {
    a0 = Conv (x, w1, b1)
    a = Relu (a0)
    f = Flatten (a)
    h = Gemm (f, w2, b2)
    r = Relu (h)
    m = MatMul (r, w3)
    y = Add (m, b3)
}""",
    "norms": """
g (float[N,3,4,4] x) => (float[N,2,4,4] y) <float[4,3,1,1] w1, float[4] scale, float[4] bias, float[4] mean,
  float[4] var, float[4,4,1,1] w2, float[4] scale2, float[4] bias2, float[2,4,1,1] w3, float[4,1,1] times,
  float[4,1,1] plus, float[4,1,1] over> {
    a = Conv (x, w1)
    n = BatchNormalization (a, scale, bias, mean, var)
    r = Relu (n)
    t = Mul (times, r)
    u = Add (t, plus)
    o = Div (u, over)
    b = Conv (o, w2)
    i = InstanceNormalization (b, scale2, bias2)
    s = Max (i, plus)
    y = Conv (s, w3)
}""",
    "transformer": """
g (float[N,5,6] x) => (float[N,5,6] y) <float[6] g1, float[6] b1, float[6,6] wq, float[6,6] wk, float[6,6] wv,
  float[6] bv, float[6,6] wo, int64[4] heads = {0,5,2,3}, int64[3] joined = {0,5,6}> {
    n = LayerNormalization (x, g1, b1)
    q = MatMul (n, wq)
    k = MatMul (n, wk)
    v0 = MatMul (n, wv)
    v = Add (v0, bv)
    v1 = Reshape (v, heads)
    v2 = Transpose <perm = [0,2,1,3]> (v1)
    q1 = Reshape (q, heads)
    q2 = Transpose <perm = [0,2,1,3]> (q1)
    k1 = Reshape (k, heads)
    k2 = Transpose <perm = [0,2,3,1]> (k1)
    s = MatMul (q2, k2)
    p = Softmax <axis = -1> (s)
    o = MatMul (p, v2)
    o1 = Transpose <perm = [0,2,1,3]> (o)
    o2 = Reshape (o1, joined)
    o3 = MatMul (o2, wo)
    y = Add (o3, x)
}""",
    "depth-to-space": """
g (float[N,2,4,4] x) => (float[N,1,4,4] y) <float[8,2,1,1] w1, float[3,2,3,3] w2, float[1,12,1,1] w3> {
    a = Conv (x, w1)
    d = DepthToSpace <blocksize = 2, mode = "CRD"> (a)
    r = Relu (d)
    b = Conv <pads = [1,1,1,1]> (r, w2)
    s = SpaceToDepth <blocksize = 2> (b)
    y = Conv (s, w3)
}""",
    "scalar-constants": """
g (float[N,2,4,4] x) => (float[N,1,4,4] y) <float[3,2,1,1] w1, float[1,3,1,1] w2, float half = {0.5}, float two = {2.0},
  float[4] row> {
    a = Conv (x, w1)
    b = Add (a, half)
    c = Mul (b, two)
    d = Sub (row, c)
    y = Conv (d, w2)
}""",
}


def random_factors(model, seed):
    found = analyse(model)
    factors = 2.0 ** np.random.default_rng(seed).uniform(-2, 2, found.count)
    factors[PINNED] = 1
    return factors, found


@pytest.mark.parametrize("name", CASES)
def test_random_factors_leave_the_outputs_equal(name):
    before = zoo.model(CASES[name])
    factors, found = random_factors(before, seed=0)
    assert found.count > 3, "a case in which nothing is free tests nothing"
    after = model_io.copy(before)
    result = Equalize(factors).apply(after)
    assert result.modified and result.rewrites == len(after_differs(before, after))
    onnx.checker.check_model(model_io.serialize(after), full_check=True)
    assert_equivalent(before, after, rtol=RTOL)


def after_differs(before, after):
    olds, news = before.graph.initializers, after.graph.initializers
    return [n for n in news if olds[n].const_value.tobytes() != news[n].const_value.tobytes()]


@pytest.mark.parametrize("animal", zoo.ZOO)
def test_random_factors_on_the_zoo(animal):
    before = zoo.build(animal)
    if animal in zoo.NONDETERMINISTIC:
        pytest.skip("gives other outputs at each run")
    factors, _ = random_factors(before, seed=1)
    after = model_io.copy(before)
    result = Equalize(factors).apply(after)
    assert result.modified == (raw(after) != raw(before))
    assert_equivalent(before, after, rtol=RTOL)


def raw(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_every_channel_is_multiplied_by_its_factor():
    before = zoo.model(CASES["residual"])
    factors, found = random_factors(before, seed=2)
    after = model_io.copy(before)
    Equalize(factors).apply(after)
    for name in ("r", "e", "i"):
        scaled = before.clone()
        ids = found.of(name)
        tensors = [tap(model, name) for model in (scaled, after)]
        np.testing.assert_allclose(tensors[1], tensors[0] * factors[ids], rtol=1e-4, atol=1e-5)


def tap(model, name):
    """Run the model and return an inner tensor."""
    from equivalence import sample, session

    model = model.clone()
    value = next(v for n in model.graph for v in n.outputs if v.name == name)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * 4)
    model.graph.outputs.append(value)
    opened = session(model)
    return opened.run([name], sample(opened, 0))[0]


def test_without_factors_or_with_ones_nothing_changes():
    model = zoo.model(CASES["residual"])
    before = raw(model)
    ones = np.ones(analyse(model).count)
    assert not Equalize().apply(model).modified and not Equalize(ones).apply(model).modified
    assert raw(model) == before


def test_weights_of_zeros_are_not_called_modified():
    weights = {"w1": np.zeros((4, 3, 1, 1)), "w2": np.zeros((1, 4, 1, 1))}
    text = "g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[4,3,1,1] w1, float[1,4,1,1] w2>"
    model = zoo.model(text + "{ a = Conv (x, w1)\ny = Conv (a, w2) }", weights)
    assert not Equalize(np.array([1.0, 2, 2, 2, 2])).apply(model).modified


@pytest.mark.parametrize("wrong", [np.ones(3), np.full(13, 2.0), np.r_[1, np.zeros(12)], np.r_[1, np.full(12, np.inf)]])
def test_factors_that_do_not_fit_are_an_error(wrong):
    model = zoo.model(CASES["residual"])
    assert analyse(model).count == 13
    with pytest.raises(ValueError, match="factors|variables"):
        Equalize(wrong).apply(model)


def test_factors_and_their_inverse_give_the_old_weights():
    model = zoo.model(CASES["shuffle"])
    factors, _ = random_factors(model, seed=3)
    after = model_io.copy(model)
    Equalize(factors).apply(after)
    Equalize(1 / factors).apply(after)
    for name, value in model.graph.initializers.items():
        np.testing.assert_allclose(after.graph.initializers[name].const_value.numpy(), value.const_value.numpy(), 1e-6)


@pytest.mark.parametrize(
    ("opset", "clip"), [(17, "b = Clip (a, lo, hi)"), (9, "b = Clip <min = 0.0, max = 1000.0> (a)")]
)
def test_a_clip_never_reached_loses_its_limit_where_channels_are_rescaled(opset, clip):
    declared = ", float lo = {0.0}, float hi = {1000.0}" if "lo" in clip else ""
    before = zoo.model(
        f"""g (float[N,3,4,4] x) => (float[N,1,4,4] y) <float[4,3,1,1] w1, float[1,4,1,1] w2{declared}> {{
        a = Conv (x, w1)
        {clip}
        y = Conv (b, w2)
    }}""",
        opset=opset,
    )
    factors = np.array([1.0, 1e4, 1, 1, 1])
    after = model_io.copy(before)
    assert Equalize(factors, frozenset({"b"})).apply(after).modified
    assert_equivalent(before, after, rtol=RTOL)
    with pytest.raises(ValueError, match="variables"):
        Equalize(factors).apply(before)


# ------------------------------------------------------------------------------------------- random graphs


@dataclass
class Sketch:
    """A network in the making: lines, weights to declare, and its tensors (name, channels, pixels a side)."""

    draw: object
    lines: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    tensors: list[tuple[str, int, int]] = field(default_factory=lambda: [("x", 4, 6)])

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def tensor(self):
        return self.pick(*self.tensors[-3:])

    def weight(self, *shape, values=""):
        name = f"w{len(self.weights)}"
        kind = "int64" if values else "float"
        self.weights.append(f"{kind}[{','.join(map(str, shape))}] {name}{values}")
        return name

    def emit(self, expression, channels, pixels):
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self.tensors.append((name, channels, pixels))

    def conv(self):
        x, c, p = self.tensor()
        group, out = self.pick(1, 2, c), self.pick(c, 2 * c if c < 16 else c)
        bias = f", {self.weight(out)}" if self.pick(True, False) else ""
        w = self.weight(out, c // group, 3, 3)
        self.emit(f"Conv <group = {group}, pads = [1,1,1,1]> ({x}, {w}{bias})", out, p)

    def transposed(self):
        x, c, p = self.tensor()
        group = self.pick(1, 2)
        w = self.weight(c, 4, 1, 1)
        self.emit(f"ConvTranspose <group = {group}> ({x}, {w})", 4 * group, p)

    def activation(self):
        x, c, p = self.tensor()
        op = self.pick("Relu", "Relu", "Abs", "Sigmoid", "LeakyRelu", "Identity")
        self.emit(f"{op} ({x})", c, p)

    def combine(self):
        x, c, p = self.tensor()
        same = [name for name, cc, pp in self.tensors if (cc, pp) == (c, p)]
        op = self.pick("Add", "Sub", "Mul", "Max", "Where") if len(same) > 1 else "Add"
        other = self.pick(*same)
        if op == "Where":
            self.lines.append(f"m{len(self.lines)} = Less ({x}, {other})")
            self.emit(f"Where ({self.lines[-1].split(' ')[0]}, {x}, {other})", c, p)
        else:
            self.emit(f"{op} ({x}, {other})", c, p)

    def constant(self):
        x, c, p = self.tensor()
        w = self.weight(*self.pick((c, 1, 1), (1,), (1, c, 1, 1), (p,), (c, p, p)))
        op = self.pick("Add", "Mul", "Sub", "Div", "Min")
        left, right = self.pick((x, w), (w, x)) if op != "Div" else (x, w)
        self.emit(f"{op} ({left}, {right})", c, p)

    def concat(self):
        x, c, p = self.tensor()
        same = [(name, cc) for name, cc, pp in self.tensors if pp == p and cc <= 8]
        other, more = self.pick(*same) if same else (x, c)
        self.emit(f"Concat <axis = 1> ({x}, {other})", c + more, p)

    def shuffle(self):
        x, c, p = self.tensor()
        g = 2
        a = self.weight(5, values=f" = {{0,{g},{c // g},{p},{p}}}")
        b = self.weight(4, values=f" = {{0,{c},{p},{p}}}")
        perm = self.pick("0,2,1,3,4", "0,1,2,4,3", "0,2,1,4,3")
        n = len(self.lines)
        self.lines += [f"r{n} = Reshape ({x}, {a})", f"s{n} = Transpose <perm = [{perm}]> (r{n})"]
        self.emit(f"Reshape (s{n}, {b})", c, p)

    def swap(self):
        x, c, p = self.tensor()
        if c == p:  # channels become rows: all kinds of axes
            self.emit(f"Transpose <perm = [0,{self.pick('2,1,3', '3,2,1', '1,3,2')}]> ({x})", c, p)

    def part(self):
        x, c, p = self.tensor()
        start, stop = (0, c // 2) if self.pick(True, False) else (c // 2, c)
        names = [self.weight(1, values=f" = {{{v}}}") for v in (start, stop, 1)]
        self.emit(f"Slice ({x}, {', '.join(names)})", stop - start, p)
        if (stop - start) % 2:
            self.tensors.pop()

    def pad(self):
        x, c, p = self.tensor()
        w = self.weight(8, values=" = {0,1,0,0,0,1,0,0}")
        if c <= 16:
            self.emit(f"Pad ({x}, {w})", c + 2, p)

    def gate(self):
        x, c, p = self.tensor()
        n = len(self.lines)
        self.lines += [f"g{n} = GlobalAveragePool ({x})", f"h{n} = {self.pick('Sigmoid', 'Relu')} (g{n})"]
        self.emit(f"{self.pick('Mul', 'Add')} (h{n}, {x})", c, p)

    def text(self):
        x, c, _ = self.tensors[-1]
        w = self.weight(2, c, 1, 1)
        body = "\n".join([*self.lines, f"y = Conv ({x}, {w})"])
        return f"g (float[N,4,6,6] x) => (float[N,2,p,p] y) <{', '.join(self.weights)}> {{\n{body}\n}}"


KINDS = ("conv", "conv", "conv", "transposed", "activation", "combine", "constant", "concat", "shuffle", "swap", "part")


@st.composite
def networks(draw):
    sketch = Sketch(draw)
    sketch.conv()
    for kind in draw(st.lists(st.sampled_from((*KINDS, "pad", "gate")), min_size=3, max_size=10)):
        getattr(sketch, kind)()
    return sketch.text()


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(0, 2**32 - 1))
def test_random_factors_on_random_graphs(text, seed):
    before = zoo.model(text)
    factors, found = random_factors(before, seed)
    after = model_io.copy(before)
    Equalize(factors).apply(after)
    # divisions by random numbers and products of activations make outputs of any size: one float32 rounding of a
    # large term that cancels counts for more, hence ten times the pass's tolerance
    assert_equivalent(before, after, rtol=10 * RTOL)
