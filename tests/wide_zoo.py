"""Small networks whose layers are wide enough for TensorRT's 8-bit kernels: 16 channels and more.

The other zoos' layers are narrower, so that TensorRT's placement leaves most of them in float. `WIDE` makes these by
name; shapes are static but for the batch, images are tiny.
"""

from __future__ import annotations

import onnx_ir as ir
from prune_zoo import Net


class WideNet(Net):
    """`Net`, with the blocks that these networks repeat."""

    def silu(self, x, ins, outs, k=1, **options):
        y = self.norm(self.conv(x, ins, outs, k, **options), outs)
        return self.op(f"Mul ({y}, {self.op(f'Sigmoid ({y})')})")

    def add(self, a, b, act=None):
        s = self.op(f"Add ({a}, {b})")
        return self.op(f"{act} ({s})") if act else s

    def concat(self, *parts):
        return self.op(f"Concat <axis = 1> ({', '.join(parts)})")

    def max_pool(self, x, k=2, stride=2):
        pad = (k - 1) // 2
        attributes = f"kernel_shape = [{k},{k}], strides = [{stride},{stride}], pads = [{pad},{pad},{pad},{pad}]"
        return self.op(f"MaxPool <{attributes}> ({x})")

    def average_pool(self, x):
        return self.op(f"AveragePool <kernel_shape = [2,2], strides = [2,2]> ({x})")

    def twice(self, x, mode="nearest"):
        name = "scales"
        if not any(name in d for d in self.declared):
            self.declared.append("float[4] scales = {1.0, 1.0, 2.0, 2.0}")
        return self.op(f'Resize <mode = "{mode}"> ({x}, , {name})')

    def layer_norm(self, x, n):
        return self.op(f"LayerNormalization <axis = -1> ({x}, {self.near_one(n)}, {self.weight(n, fan=9)})")


def plain() -> ir.Model:
    """Convolutions in a row, biases and all, without a normalisation; the last one is the output."""
    net = WideNet("N", 3, 8, 8)
    x = net.op(f"Relu ({net.conv('x', 3, 16, 3, bias=True)})")
    x = net.op(f"LeakyRelu <alpha = 0.1> ({net.conv(x, 16, 24, 3, bias=True)})")
    x = net.max_pool(net.op(f"Relu ({net.conv(x, 24, 32, bias=True)})"))
    return net.model((net.conv(x, 32, 16, bias=True), ("N", 16, 4, 4)))


def resnet(shortcut: str = "B", classes: int = 16) -> ir.Model:
    """Two stages of residual blocks; between them a projection (B), or a slice padded with zeros (A)."""
    net = WideNet("N", 3, 8, 8)
    x = net.block("x", 3, 16, 3)
    x = net.add(net.norm(net.conv(net.block(x, 16, 16, 3), 16, 16, 3), 16), x, "Relu")
    y = net.norm(net.conv(net.block(x, 16, 32, 3, stride=2), 32, 32, 3), 32)
    if shortcut == "A":
        bounds = [net.ints(0, 0), net.ints(9, 9), net.ints(2, 3), net.ints(2, 2)]
        part = net.op(f"Slice ({', '.join([x, *bounds])})")
        x = net.op(f"Pad ({part}, {net.ints(0, 8, 0, 0, 0, 8, 0, 0)})")
    else:
        x = net.norm(net.conv(x, 16, 32, stride=2), 32)
    x = net.add(y, x, "Relu")
    x = net.add(net.norm(net.conv(net.block(x, 32, 32, 3), 32, 32, 3), 32), x, "Relu")
    return net.model((net.classify(x, 32, classes), ("N", classes)))


def bottleneck() -> ir.Model:
    """Narrow, convolve, widen, behind a projection, an identity, and a pool in the stem."""
    net = WideNet("N", 3, 16, 16)
    x = net.max_pool(net.block("x", 3, 16, 3, stride=2))
    y = net.norm(net.conv(net.block(net.block(x, 16, 16), 16, 16, 3), 16, 64), 64)
    x = net.add(y, net.norm(net.conv(x, 16, 64), 64), "Relu")
    y = net.norm(net.conv(net.block(net.block(x, 64, 16), 16, 16, 3), 16, 64), 64)
    x = net.add(y, x, "Relu")
    return net.model((net.classify(x, 64, 32), ("N", 32)))


def preactivated() -> ir.Model:
    """Residual blocks that normalise first (He et al. 2016b): both ends of each Add are bare convolutions."""
    net = WideNet("N", 3, 8, 8)
    x = net.conv("x", 3, 16, 3)
    for _ in range(2):
        y = net.block(net.op(f"Relu ({net.norm(x, 16)})"), 16, 16, 3)
        x = net.add(x, net.conv(y, 16, 16, 3))
    return net.model((net.classify(net.op(f"Relu ({net.norm(x, 16)})"), 16, 16), ("N", 16)))


def densenet() -> ir.Model:
    """Normalise, then convolve; everything before is read again."""
    net = WideNet("N", 3, 8, 8)
    x, width = net.conv("x", 3, 16, 3), 16
    for _ in range(2):
        y = net.block(net.op(f"Relu ({net.norm(x, width)})"), width, 32)
        x, width = net.concat(x, net.conv(y, 32, 16, 3)), width + 16
    x = net.average_pool(net.block(x, width, 32))
    return net.model((net.classify(net.block(x, 32, 16), 16, 16), ("N", 16)))


def inception() -> ir.Model:
    """Branches of different kernels, joined."""
    net = WideNet("N", 3, 8, 8)
    x = net.block("x", 3, 16, 3)
    pool = net.op(f"AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], strides = [1,1], count_include_pad = 1> ({x})")
    x = net.concat(
        net.block(x, 16, 16), net.block(net.block(x, 16, 16), 16, 24, 5), net.block(pool, 16, 16),
        net.block(net.max_pool(x, 3, 1), 16, 16),
    )  # fmt: skip
    x = net.op(f"PRelu ({net.conv(x, 72, 16, 3)}, {net.weight(16, 1, 1)})")
    x = net.op(f"Reshape ({x}, {net.ints(0, -1)})")
    return net.model((net.linear(net.op(f"Tanh ({net.linear(x, 1024, 32)})"), 32, 16), ("N", 16)))


def shufflenet_v1() -> ir.Model:
    """Convolutions in groups, a shuffle between them, and a depthwise one."""
    net = WideNet("N", 3, 6, 6)
    x = net.block("x", 3, 48, 3)
    y = net.block(x, 48, 48, group=3)
    y = net.op(f"Reshape ({y}, {net.ints(0, 3, 16, 6, 6)})")
    y = net.op(f"Reshape ({net.op(f'Transpose <perm = [0,2,1,3,4]> ({y})')}, {net.ints(0, -1, 6, 6)})")
    y = net.norm(net.conv(y, 48, 48, 3, group=48), 48)
    x = net.add(x, net.norm(net.conv(y, 48, 48, group=3), 48), "Relu")
    return net.model((net.classify(x, 48, 16), ("N", 16)))


def shufflenet_v2() -> ir.Model:
    """Half of the channels goes through, then all are shuffled: integers are joined, split and joined again."""
    net = WideNet(1, 3, 4, 4)
    x = net.block("x", 3, 32, 3)
    for _ in range(2):
        half, work = net.op(f"Split <axis = 1> ({x}, {net.ints(16, 16)})", 2)
        work = net.block(net.norm(net.conv(net.block(work, 16, 16), 16, 16, 3, group=16), 16), 16, 16)
        y = net.op(f"Reshape ({net.concat(half, work)}, {net.ints(1, 2, 16, 4, 4)})")
        x = net.op(f"Reshape ({net.op(f'Transpose <perm = [0,2,1,3,4]> ({y})')}, {net.ints(1, 32, 4, 4)})")
    return net.model((net.classify(x, 32, 16), (1, 16)))


def mobilenet_v2() -> ir.Model:
    """Widen, convolve by channel, narrow, with Clips at 6; one depthwise layer has no multiple of 8 channels."""
    net = WideNet("N", 3, 8, 8)
    net.declared += ["float lo = {0.0}", "float hi = {6.0}"]

    def six(x, ins, outs, k=1, **options):
        return net.op(f"Clip ({net.norm(net.conv(x, ins, outs, k, **options), outs)}, lo, hi)")

    x = six("x", 3, 16, 3)
    y = six(six(x, 16, 48), 48, 48, 3, group=48)
    x = net.add(x, net.norm(net.conv(y, 48, 16), 16))
    x = six(six(x, 16, 36), 36, 36, 3, group=36, stride=2)
    x = net.norm(net.conv(x, 36, 24), 24)
    return net.model((net.classify(six(x, 24, 64), 64, 16), ("N", 16)))


def mobilenet_v3() -> ir.Model:
    """The same with squeeze-and-excite and HardSwish."""
    net = WideNet("N", 3, 8, 8)
    x = net.block("x", 3, 16, 3, act="HardSwish")
    y = net.block(net.block(x, 16, 32, act="HardSwish"), 32, 32, 3, group=32, act="HardSwish")
    s = net.op(f"Relu ({net.conv(net.op(f'GlobalAveragePool ({y})'), 32, 16, bias=True)})")
    y = net.op(f"Mul ({y}, {net.op(f'HardSigmoid ({net.conv(s, 16, 32, bias=True)})')})")
    x = net.add(net.norm(net.conv(y, 32, 16), 16), x)
    return net.model((net.classify(net.block(x, 16, 64, act="HardSwish"), 64, 16), ("N", 16)))


def yolo() -> ir.Model:
    """SiLU throughout, a C2f block, pools in a row (SPPF), upsampling beside a skip, two heads that are outputs."""
    net = WideNet(1, 3, 16, 16)
    x = net.silu(net.silu("x", 3, 16, 3, stride=2), 16, 32, 3)
    a, b = net.op(f"Split <axis = 1> ({net.silu(x, 32, 32)}, {net.ints(16, 16)})", 2)
    c = net.add(b, net.silu(net.silu(b, 16, 16, 3), 16, 16, 3))
    x = net.silu(net.concat(a, b, c), 48, 32)
    low = net.silu(x, 32, 32, 3, stride=2)
    pools = [net.silu(low, 32, 16)]
    for _ in range(2):
        pools.append(net.max_pool(pools[-1], 3, 1))
    low = net.silu(net.concat(*pools), 48, 32)
    x = net.silu(net.concat(net.twice(low), x), 64, 32)
    boxes = net.conv(net.silu(x, 32, 16, 3), 16, 16, bias=True)
    classes = net.op(f"Sigmoid ({net.conv(net.silu(x, 32, 16, 3), 16, 16, bias=True)})")
    return net.model((net.concat(boxes, classes), (1, 32, 8, 8)), (net.conv(low, 32, 16, bias=True), (1, 16, 4, 4)))


def fpn() -> ir.Model:
    """A top-down path: what was upsampled is added to what comes from the side (Lin et al. 2017)."""
    net = WideNet("N", 3, 16, 16)
    c1 = net.block("x", 3, 16, 3, stride=2)
    c2 = net.block(c1, 16, 32, 3, stride=2)
    top = net.conv(c2, 32, 16, bias=True)
    low = net.add(net.conv(c1, 16, 16, bias=True), net.twice(top))
    return net.model(
        (net.conv(low, 16, 16, 3, bias=True), ("N", 16, 8, 8)), (net.conv(top, 16, 16, 3, bias=True), ("N", 16, 4, 4))
    )


def unet() -> ir.Model:
    """Down, up by ConvTranspose (one in groups) and by Resize, and skips."""
    net = WideNet("N", 3, 8, 8)
    top = net.block("x", 3, 16, 3)
    mid = net.block(net.max_pool(top), 16, 32, 3)
    low = net.block(mid, 32, 32, 3, stride=2)
    up = net.op(f"ConvTranspose <strides = [2,2]> ({low}, {net.weight(32, 16, 2, 2)}, {net.weight(16)})")
    x = net.block(net.concat(up, mid), 48, 32, 3)
    x = net.twice(x, "linear")
    x = net.op(f"ConvTranspose <group = 2, pads = [1,1,1,1]> ({x}, {net.weight(32, 8, 3, 3)})")
    x = net.block(net.concat(top, x), 32, 16, 3)
    return net.model((net.conv(x, 16, 2, bias=True), ("N", 2, 8, 8)))


def convnext() -> ir.Model:
    """A depthwise convolution, LayerNorm over channels, an MLP with GELU, and a scale for each channel."""
    net = WideNet("N", 3, 8, 8)
    x = net.conv("x", 3, 16, 2, stride=2)
    y = net.op(f"Transpose <perm = [0,2,3,1]> ({net.conv(x, 16, 16, 3, group=16, bias=True)})")
    y = net.linear(net.layer_norm(y, 16), 16, 64)
    net.declared += ["float root = {1.4142135}", "float one = {1.0}", "float half = {0.5}"]
    ratio = net.op(f"Div ({y}, root)")
    erf = net.op(f"Add ({net.op(f'Erf ({ratio})')}, one)")
    y = net.linear(net.op(f"Mul ({net.op(f'Mul ({y}, {erf})')}, half)"), 64, 16)
    y = net.op(f"Transpose <perm = [0,3,1,2]> ({net.op(f'Mul ({y}, {net.near_one(16)})')})")
    x = net.add(x, y)
    return net.model((net.classify(net.block(x, 16, 32), 32, 16), ("N", 16)))


def vit(mask: bool = False) -> ir.Model:
    """A block of a vision transformer: two heads of 16, and an MLP; with a computed mask or without."""
    net, tokens, width, heads, each = WideNet("N", 3, 16, 16), 25, 32, 2, 16
    x = net.op(f"Reshape ({net.conv('x', 3, width, 4, stride=4)}, {net.ints(0, width, tokens)})")
    x = net.add(net.op(f"Transpose <perm = [0,2,1]> ({x})"), net.weight(1, tokens, width))
    y = net.layer_norm(x, width)
    parts = [net.op(f"Reshape ({net.linear(y, width, width)}, {net.ints(0, tokens, heads, each)})") for _ in range(3)]
    perms = ("0,2,1,3", "0,2,3,1", "0,2,1,3")
    q, k, v = (net.op(f"Transpose <perm = [{perm}]> ({part})") for perm, part in zip(perms, parts, strict=True))
    scores = net.op(f"MatMul ({q}, {k})")
    if mask:
        gate = net.op(f"ReduceMean <axes = [-1], keepdims = 1> ({y})")
        scores = net.add(scores, net.op(f"Reshape ({gate}, {net.ints(0, 1, 1, tokens)})"))
    y = net.op(f"MatMul ({net.op(f'Softmax <axis = -1> ({scores})')}, {v})")
    y = net.op(f"Reshape ({net.op(f'Transpose <perm = [0,2,1,3]> ({y})')}, {net.ints(0, tokens, width)})")
    x = net.add(x, net.linear(y, width, width))
    y = net.op(f"Erf ({net.linear(net.layer_norm(x, width), width, 64)})")
    x = net.add(x, net.linear(y, 64, width))
    x = net.op(f"ReduceMean <axes = [1], keepdims = 0> ({x})")
    return net.model((net.linear(x, width, 16), ("N", 16)))


def mlp(rows: str | int = "N") -> ir.Model:
    """Gemms with the weight either way round, and one with a vector, for which no integer kernel is worth it."""
    net = WideNet(rows, 32)
    x = net.op(f"Relu ({net.op(f'Gemm <transB = 1> (x, {net.weight(64, 32)}, {net.weight(64)})')})")
    x = net.op(f"Relu ({net.op(f'Gemm ({x}, {net.weight(64, 128, fan=64)}, {net.weight(128)})')})")
    x = net.op(f"MatMul ({x}, {net.weight(128, 24, fan=128)})")
    gate = net.op(f"Sigmoid ({net.op(f'MatMul ({x}, {net.weight(24, 1, fan=24)})')})")
    return net.model((net.op(f"Mul ({x}, {gate})"), (rows, 24)))


WIDE = {
    "plain": plain,
    "resnet-a": lambda: resnet("A"),
    "resnet-b": lambda: resnet("B"),
    "resnet-10-classes": lambda: resnet("A", 10),
    "bottleneck": bottleneck,
    "preactivated": preactivated,
    "densenet": densenet,
    "inception": inception,
    "shufflenet-v1": shufflenet_v1,
    "shufflenet-v2": shufflenet_v2,
    "mobilenet-v2": mobilenet_v2,
    "mobilenet-v3": mobilenet_v3,
    "yolo": yolo,
    "fpn": fpn,
    "unet": unet,
    "convnext": convnext,
    "vit": vit,
    "vit-masked": lambda: vit(mask=True),
    "mlp": mlp,
    "mlp-one-row": lambda: mlp(1),
}
