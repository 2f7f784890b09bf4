"""Random small networks through each exact pass, and through the passes in random orders."""

from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
import zoo
from edgec.compiler import model as model_io
from edgec.passes import registry
from equivalence import assert_equivalent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXACT = [name for name in registry.PASSES if registry.load(name).exact]
RTOL = 1e-4  # what an exact pass promises; each network is a dozen layers deep

run = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@dataclass
class Sketch:
    """A network in the making: lines of text, weights to declare, and tensors (name, channels, pixels a side)."""

    draw: object
    lines: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    tensors: list[tuple[str, int, int]] = field(default_factory=lambda: [("x", 4, 6)])

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def tensor(self):
        return self.pick(*self.tensors[-3:])  # mostly deep, sometimes branched

    def weight(self, name, *shape):
        # some are shared, and some constants come from nodes
        label = f"{name}_{'_'.join(map(str, shape))}_{self.pick('a', 'b', len(self.weights))}"
        declared = f"float[{','.join(map(str, shape))}] {label}"
        if declared not in self.weights:
            self.weights.append(declared)
        if not self.draw(st.integers(0, 9)):
            self.lines.append(f"{label}_{len(self.lines)} = Identity ({label})")
            return self.lines[-1].split(" ")[0]
        return label

    def emit(self, expression, channels, pixels):
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self.tensors.append((name, channels, pixels))

    def conv(self):
        x, channels, pixels = self.tensor()
        group, pad = self.pick(1, 2, channels), self.pick(0, 1) if pixels > 3 else 1
        out = channels * self.pick(1, 2) if channels < 16 else channels
        bias = f", {self.weight('b', out)}" if self.pick(True, False) else ""
        w = self.weight("w", out, channels // group, 3, 3)
        pads = ",".join([str(pad)] * 4)
        self.emit(f"Conv <group = {group}, pads = [{pads}]> ({x}, {w}{bias})", out, pixels - 2 + 2 * pad)

    def conv_transpose(self):
        x, channels, pixels = self.tensor()
        group = self.pick(1, 2)
        w = self.weight("wt", channels, 4 // group, 3, 3)
        self.emit(f"ConvTranspose <group = {group}, pads = [1,1,1,1]> ({x}, {w})", 4, pixels)

    def norm(self):
        x, channels, pixels = self.tensor()
        self.emit(f"BatchNormalization ({x}, {self.parameters(channels)})", channels, pixels)

    def parameters(self, channels):
        return ", ".join(self.weight(name, channels) for name in ("scale", "bias", "mean", "var"))

    def unary(self):
        x, channels, pixels = self.tensor()
        self.emit(self.pick("Relu", "Identity", "Sigmoid", "Dropout", "Neg") + f" ({x})", channels, pixels)

    def pool(self):
        x, channels, pixels = self.tensor()
        op = self.pick("MaxPool", "AveragePool")
        self.emit(f"{op} <kernel_shape = [3,3], pads = [1,1,1,1], strides = [1,1]> ({x})", channels, pixels)

    def binary(self):
        x, channels, pixels = self.tensor()
        same = [name for name, c, p in self.tensors if (c, p) == (channels, pixels)]
        op = self.pick("Add", "Mul", "Concat <axis = 1>")
        other = self.pick(*same)
        self.emit(f"{op} ({x}, {other})", channels * (2 if op.startswith("Concat") else 1), pixels)

    def scale(self):
        x, channels, pixels = self.tensor()
        self.emit(f"Mul ({x}, {self.weight('k', channels, 1, 1)})", channels, pixels)

    def head(self):
        x, channels, _ = self.tensor()
        n = len(self.lines)
        self.lines += [f"p{n} = GlobalAveragePool ({x})", f"f{n} = Flatten (p{n})"]
        if self.pick(True, False):
            trans = self.pick(0, 1)
            w = self.weight("g", 5, channels) if trans else self.weight("g", channels, 5)
            self.lines.append(f"h{n} = Gemm <transB = {trans}> (f{n}, {w}, {self.weight('b', 5)})")
        else:
            w, b = self.weight("g", channels, 5), self.weight("b", 5)
            self.lines += [f"m{n} = MatMul (f{n}, {w})", f"h{n} = Add (m{n}, {b})"]
        self.lines.append(f"y = BatchNormalization (h{n}, {self.parameters(5)})")


STEPS = [
    Sketch.conv, Sketch.conv, Sketch.norm, Sketch.norm, Sketch.norm, Sketch.conv_transpose, Sketch.unary,
    Sketch.pool, Sketch.binary, Sketch.scale,
]  # fmt: skip


@st.composite
def networks(draw):
    sketch = Sketch(draw)
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=10)):
        if sketch.tensors[-1][1] <= 32:  # Concat must not double the channels for ever
            step(sketch)
    sketch.head()
    outputs = ["float[N,5] y"]
    inner = [tensor for tensor in sketch.tensors[1:] if tensor[0] != "x"]
    if inner and draw(st.booleans()):
        name, channels, pixels = draw(st.sampled_from(inner))
        outputs.append(f"float[N,{channels},{pixels},{pixels}] {name}")
    body = "\n".join(sketch.lines)
    text = f"g (float[N,4,6,6] x) => ({', '.join(outputs)}) <{', '.join(sketch.weights)}> {{ {body} }}"
    return text, draw(st.sampled_from([9, 11, 13, 15, 18]))


def check(step, model, original):
    before = raw(model)
    result = step(model)
    assert result.modified == (raw(model) != before)
    onnx.checker.check_model(model_io.serialize(model), full_check=True)
    assert_equivalent(original, model, rtol=RTOL)


def raw(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


@run
@given(networks(), st.sampled_from(EXACT))
def test_each_exact_pass_keeps_the_numbers_and_settles_at_once(network, name):
    text, opset = network
    step, model = registry.load(name)(), zoo.model(text, opset=opset)
    check(step, model, zoo.model(text, opset=opset))
    settled = raw(model)
    assert not step(model).modified and raw(model) == settled


@run
@given(networks(), st.lists(st.sampled_from(EXACT), min_size=2, max_size=5))
def test_exact_passes_keep_the_numbers_in_any_order(network, names):
    text, opset = network
    original, model = zoo.model(text, opset=opset), zoo.model(text, opset=opset)
    for name in names:
        check(registry.load(name)(), model, original)
