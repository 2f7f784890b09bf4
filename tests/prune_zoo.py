"""Small networks with every way in which channels hang together; weights are random, scaled by fan-in.

`BUILDERS` makes them by name. Each is a few lines on `Net`, which writes ONNX's text form.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import onnx_ir as ir
import zoo


class Net:
    """A network in the making: `x` is the input; methods return the name of a tensor."""

    def __init__(self, *shape, opset=17, dtype="float"):
        self.opset, self.dtype, self.shape = opset, dtype, shape
        self.lines, self.declared, self.values = [], [], {}

    def weight(self, *shape, name=None, fan=None):
        name = name or f"w{len(self.declared)}"
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        fan = fan or max(1, math.prod(shape[1:]))
        self.declared.append(f"{self.dtype}[{','.join(map(str, shape))}] {name}")
        self.values[name] = rng.normal(size=shape) / math.sqrt(fan)
        return name

    def near_one(self, *shape):
        name = self.weight(*shape)
        self.values[name] = 1 + 0.3 * np.tanh(self.values[name])
        return name

    def ints(self, *numbers):
        name = f"i{len(self.declared)}"
        self.declared.append(f"int64[{len(numbers)}] {name}")
        self.values[name] = np.array(numbers)
        return name

    def op(self, expression, outputs=1):
        names = [f"t{len(self.lines)}_{i}" for i in range(outputs)]
        self.lines.append(f"{', '.join(names)} = {expression}")
        return names[0] if outputs == 1 else names

    def conv(self, x, ins, outs, k=1, *, group=1, stride=1, bias=False, weight=None):
        pad = k // 2
        weight = weight or self.weight(outs, ins // group, k, k)
        b = f", {self.weight(outs)}" if bias else ""
        attributes = f"group = {group}, strides = [{stride},{stride}], pads = [{pad},{pad},{pad},{pad}]"
        return self.op(f"Conv <{attributes}> ({x}, {weight}{b})")

    def norm(self, x, n):
        parameters = [self.near_one(n), self.weight(n, fan=9), self.weight(n, fan=9), self.near_one(n)]
        return self.op(f"BatchNormalization ({x}, {', '.join(parameters)})")

    def block(self, x, ins, outs, k=1, act="Relu", **options):
        return self.op(f"{act} ({self.norm(self.conv(x, ins, outs, k, **options), outs)})")

    def linear(self, x, ins, outs):
        y = self.op(f"MatMul ({x}, {self.weight(ins, outs, fan=ins)})")
        return self.op(f"Add ({self.weight(outs)}, {y})")

    def classify(self, x, ins, classes=3):
        x = self.op(f"Flatten ({self.op(f'GlobalAveragePool ({x})')})")
        return self.op(f"Gemm <transB = 1> ({x}, {self.weight(classes, ins)}, {self.weight(classes)})")

    def model(self, *outputs) -> ir.Model:
        """Return the network; `outputs` are pairs of a tensor and its shape."""
        header = ", ".join(f"{self.dtype}[{','.join(map(str, shape))}] y{i}" for i, (_, shape) in enumerate(outputs))
        lines = self.lines + [f"y{i} = Identity ({name})" for i, (name, _) in enumerate(outputs)]
        shape = ",".join(map(str, self.shape))
        text = f"g ({self.dtype}[{shape}] x) => ({header}) <{', '.join(self.declared)}> {{ {chr(10).join(lines)} }}"
        return zoo.model(text, self.values, opset=self.opset)


# ------------------------------------------------------------------------------------------- convolutional networks


def resnet(shortcut: str, **options) -> ir.Model:
    """Two stages of two blocks; the second halves the image and has twice the channels (He et al. 2016)."""
    net = Net("N", 3, 8, 8, **options)
    x = net.block("x", 3, 4, 3)
    x = net.op(f"Relu ({net.op(f'Add ({net.norm(net.conv(net.block(x, 4, 5, 3), 5, 4, 3), 4)}, {x})')})")
    y = net.norm(net.conv(net.block(x, 4, 6, 3, stride=2), 6, 8, 3), 8)
    if shortcut == "A":
        bounds = [net.ints(0, 0), net.ints(9, 9), net.ints(2, 3), net.ints(2, 2)]
        part = net.op(f"Slice ({', '.join([x, *bounds])})")
        x = net.op(f"Pad ({part}, {net.ints(0, 2, 0, 0, 0, 2, 0, 0)})")
    else:
        x = net.norm(net.conv(x, 4, 8, stride=2), 8)
    x = net.op(f"Relu ({net.op(f'Add ({y}, {x})')})")
    x = net.op(f"Relu ({net.op(f'Add ({x}, {net.norm(net.conv(net.block(x, 8, 8, 3), 8, 8, 3), 8)})')})")
    return net.model((net.classify(x, 8), ("N", 3)))


def bottleneck(**options) -> ir.Model:
    """Narrow, convolve, widen (He et al. 2016), behind an identity and behind a projection."""
    net = Net("N", 3, 8, 8, **options)
    x = net.block("x", 3, 8, 3)
    y = net.norm(net.conv(net.block(net.block(x, 8, 3), 3, 3, 3), 3, 8), 8)
    x = net.op(f"Relu ({net.op(f'Add ({x}, {y})')})")
    y = net.norm(net.conv(net.block(net.block(x, 8, 4), 4, 4, 3, stride=2), 4, 12), 12)
    x = net.op(f"Relu ({net.op(f'Add ({y}, {net.norm(net.conv(x, 8, 12, stride=2), 12)})')})")
    return net.model((net.classify(x, 12), ("N", 3)))


def densenet() -> ir.Model:
    """Normalise, then convolve; everything before is read again (Huang et al. 2017)."""
    net = Net("N", 3, 8, 8)
    x, width = net.conv("x", 3, 4, 3), 4
    for _ in range(2):
        y = net.op(f"Relu ({net.norm(x, width)})")
        y = net.block(y, width, 6)
        x, width = net.op(f"Concat <axis = 1> ({x}, {net.conv(y, 6, 3, 3)})"), width + 3
    x = net.op(f"AveragePool <kernel_shape = [2,2], strides = [2,2]> ({net.block(x, width, 5)})")
    return net.model((net.classify(x, 5), ("N", 3)))


def shufflenet_v1() -> ir.Model:
    """Convolutions in groups with a shuffle between them (Zhang et al. 2018)."""
    net = Net("N", 3, 6, 6)
    x = net.block("x", 3, 12, 3)
    y = net.block(x, 12, 12, group=3)
    y = net.op(f"Reshape ({y}, {net.ints(0, 3, 4, 6, 6)})")
    y = net.op(f"Reshape ({net.op(f'Transpose <perm = [0,2,1,3,4]> ({y})')}, {net.ints(0, -1, 6, 6)})")
    y = net.norm(net.conv(y, 12, 12, 3, group=12), 12)
    x = net.op(f"Relu ({net.op(f'Add ({x}, {net.norm(net.conv(y, 12, 12, group=2), 12)})')})")
    return net.model((net.classify(x, 12), ("N", 3)))


def shufflenet_v2(split: str = "Split", opset: int = 17) -> ir.Model:
    """Half of the channels goes through, then all are shuffled (Ma et al. 2018); exporters differ in the split."""
    net = Net(1, 3, 4, 4, opset=opset)
    x = net.block("x", 3, 8, 3)
    for _ in range(2):
        if split == "Split":
            half, work = net.op(f"Split <axis = 1> ({x}, {net.ints(4, 4)})", 2)
        else:
            y = net.op(f"Reshape ({x}, {net.ints(4, 2, 16)})")
            y = net.op(f"Reshape ({net.op(f'Transpose <perm = [1,0,2]> ({y})')}, {net.ints(2, -1, 4, 4, 4)})")
            half, work = (net.op(f"Gather <axis = 0> ({y}, {index})") for index in ("zero", "one"))
        work = net.block(net.norm(net.conv(net.block(work, 4, 6), 6, 6, 3, group=6), 6), 6, 4)
        x = net.op(f"Concat <axis = 1> ({half}, {work})")
        if split == "Split":
            y = net.op(f"Reshape ({x}, {net.ints(1, 2, 4, 4, 4)})")
            x = net.op(f"Reshape ({net.op(f'Transpose <perm = [0,2,1,3,4]> ({y})')}, {net.ints(1, 8, 4, 4)})")
    net.declared += ["int64 zero = {0}", "int64 one = {1}"]
    return net.model((net.classify(x, 8), (1, 3)))


def mobilenet_v2(dtype: str = "float", opset: int = 13) -> ir.Model:
    """Widen, convolve by channel, narrow (Sandler et al. 2018), with Clips at 6."""
    net = Net("N", 3, 8, 8, dtype=dtype, opset=opset)
    clip = "Clip <min = 0.0, max = 6.0>" if opset < 11 else "Clip"
    ends = "" if opset < 11 else ", lo, hi"
    if ends:
        net.declared += [f"{dtype} lo", f"{dtype} hi"]
        net.values.update(lo=np.array(0.0), hi=np.array(6.0))

    def six(x, ins, outs, k=1, **options):
        return net.op(f"{clip} ({net.norm(net.conv(x, ins, outs, k, **options), outs)}{ends})")

    x = six("x", 3, 4, 3)
    y = six(six(x, 4, 12), 12, 12, 3, group=12)
    x = net.op(f"Add ({x}, {net.norm(net.conv(y, 12, 4), 4)})")
    x = six(six(x, 4, 8), 8, 16, 3, group=8, stride=2)
    return net.model((net.classify(net.norm(net.conv(x, 16, 6), 6), 6), ("N", 3)))


def mobilenet_v3() -> ir.Model:
    """The same with squeeze-and-excite (Hu et al. 2018) and HardSwish (Howard et al. 2019)."""
    net = Net("N", 3, 8, 8)
    x = net.block("x", 3, 4, 3, act="HardSwish")
    y = net.block(net.block(x, 4, 10, act="HardSwish"), 10, 10, 3, group=10)
    s = net.op(f"Relu ({net.conv(net.op(f'GlobalAveragePool ({y})'), 10, 4, bias=True)})")
    y = net.op(f"Mul ({y}, {net.op(f'HardSigmoid ({net.conv(s, 4, 10, bias=True)})')})")
    x = net.op(f"Add ({net.norm(net.conv(y, 10, 4), 4)}, {x})")
    gate = net.op(f"Sigmoid ({net.conv(x, 4, 1, 3)})")  # the same for all channels
    return net.model((net.classify(net.op(f"Mul ({x}, {gate})"), 4), ("N", 3)))


def yolo() -> ir.Model:
    """C2f blocks and the anchor-free head of YOLOv8, one scale: boxes by a softmax over bins, and classes."""
    net = Net(1, 3, 8, 8)

    def silu(x, ins, outs, k=1, **options):
        y = net.norm(net.conv(x, ins, outs, k, **options), outs)
        return net.op(f"Mul ({y}, {net.op(f'Sigmoid ({y})')})")

    x = silu(silu("x", 3, 4, 3), 4, 8, 3, stride=2)
    a, b = net.op(f"Split <axis = 1> ({silu(x, 8, 8)}, {net.ints(4, 4)})", 2)
    c = net.op(f"Add ({b}, {silu(silu(b, 4, 4, 3), 4, 4, 3)})")
    x = silu(net.op(f"Concat <axis = 1> ({a}, {b}, {c})"), 12, 8)
    pools = [x]
    for _ in range(2):
        pools.append(net.op(f"MaxPool <kernel_shape = [3,3], pads = [1,1,1,1], strides = [1,1]> ({pools[-1]})"))
    x = silu(net.op(f"Concat <axis = 1> ({', '.join(pools)})"), 24, 8)
    boxes = net.conv(silu(silu(x, 8, 6, 3), 6, 6, 3), 6, 16, bias=True)
    classes = net.conv(silu(silu(x, 8, 5, 3), 5, 5, 3), 5, 3, bias=True)
    both = net.op(f"Concat <axis = 1> ({boxes}, {classes})")
    boxes, classes = net.op(
        f"Split <axis = 1> ({net.op(f'Reshape ({both}, {net.ints(1, 19, -1)})')}, {net.ints(16, 3)})", 2
    )
    bins = net.op(f"Transpose <perm = [0,2,1,3]> ({net.op(f'Reshape ({boxes}, {net.ints(1, 4, 4, 16)})')})")
    sides = net.conv(net.op(f"Softmax <axis = 1> ({bins})"), 4, 1)
    sides = net.op(f"Reshape ({sides}, {net.ints(1, 4, 16)})")
    y = net.op(f"Concat <axis = 1> ({sides}, {net.op(f'Sigmoid ({classes})')})")
    return net.model((y, (1, 7, 16)))


def unet() -> ir.Model:
    """Down, up by ConvTranspose and by Resize, and skips (Ronneberger et al. 2015)."""
    net = Net("N", 3, 8, 8)
    top = net.block("x", 3, 4, 3)
    mid = net.block(net.op(f"MaxPool <kernel_shape = [2,2], strides = [2,2]> ({top})"), 4, 6, 3)
    low = net.block(mid, 6, 8, 3, stride=2)
    up = net.op(f"ConvTranspose <strides = [2,2]> ({low}, {net.weight(8, 5, 2, 2)}, {net.weight(5)})")
    x = net.block(net.op(f"Concat <axis = 1> ({up}, {mid})"), 11, 6, 3)
    net.declared.append("float[4] scales = {1.0, 1.0, 2.0, 2.0}")
    x = net.op(f'Resize <mode = "nearest"> ({x}, , scales)')
    x = net.op(f"ConvTranspose <group = 2, pads = [1,1,1,1]> ({x}, {net.weight(6, 2, 3, 3)})")
    x = net.block(net.op(f"Concat <axis = 1> ({top}, {x})"), 8, 4, 3)
    return net.model((net.conv(x, 4, 2, bias=True), ("N", 2, 8, 8)))


def convnext() -> ir.Model:
    """A depthwise convolution, LayerNorm over channels, an MLP, and a scale for each channel (Liu et al. 2022)."""
    net = Net("N", 3, 8, 8)
    x = net.conv("x", 3, 6, 2, stride=2)
    y = net.op(f"Transpose <perm = [0,2,3,1]> ({net.conv(x, 6, 6, 3, group=6, bias=True)})")
    y = net.op(f"LayerNormalization <axis = -1> ({y}, {net.near_one(6)}, {net.weight(6)})")
    y = net.linear(net.op(f"Erf ({net.linear(y, 6, 10)})"), 10, 6)
    y = net.op(f"Transpose <perm = [0,3,1,2]> ({net.op(f'Mul ({y}, {net.near_one(6)})')})")
    x = net.op(f"Add ({x}, {y})")
    return net.model((net.classify(net.block(x, 6, 5), 5), ("N", 3)))


def inception() -> ir.Model:
    """Branches of different width and kernel, joined (Szegedy et al. 2015), and flattened at the end."""
    net = Net("N", 3, 8, 8)
    x = net.block("x", 3, 6, 3, stride=2)
    wide = net.conv(net.block(x, 6, 3), 3, 4, 1)
    tall = net.block(net.block(x, 6, 2), 2, 3, 5)
    pool = net.op(f"MaxPool <kernel_shape = [3,3], pads = [1,1,1,1], strides = [1,1]> ({x})")
    x = net.op(f"Concat <axis = 1> ({net.block(x, 6, 4)}, {wide}, {tall}, {net.block(pool, 6, 2)})")
    x = net.op(f"Reshape ({net.op(f'PRelu ({x}, {net.weight(13, 1, 1)})')}, {net.ints(0, -1)})")
    return net.model((net.linear(net.op(f"Tanh ({net.linear(x, 208, 7)})"), 7, 3), ("N", 3)))


# ------------------------------------------------------------------------------------------- others


def vit(joined: bool = False) -> ir.Model:
    """One block of a vision transformer (Dosovitskiy et al. 2021): three heads of two, and an MLP."""
    net, tokens, width, heads = Net("N", 3, 8, 8), 9, 6, 3
    x = net.op(f"Reshape ({net.conv('x', 3, width, 4, stride=4)}, {net.ints(0, width, -1)})")
    x = net.op(f"Add ({net.op(f'Transpose <perm = [0,2,1]> ({x})')}, {net.weight(1, tokens, width)})")
    y = net.op(f"LayerNormalization ({x}, {net.near_one(width)}, {net.weight(width)})")
    if joined:
        y = net.op(f"Reshape ({net.linear(y, width, 3 * width)}, {net.ints(-1, tokens, 3, heads, 2)})")
        y = net.op(f"Transpose <perm = [2,0,3,1,4]> ({y})")
        net.declared += [f"int64 n{i} = {{{i}}}" for i in range(3)]
        q, k, v = (net.op(f"Gather <axis = 0> ({y}, n{i})") for i in range(3))
        k = net.op(f"Transpose <perm = [0,1,3,2]> ({k})")
    else:
        parts = [net.op(f"Reshape ({net.linear(y, width, width)}, {net.ints(0, tokens, heads, 2)})") for _ in range(3)]
        perms = ("0,2,1,3", "0,2,3,1", "0,2,1,3")
        q, k, v = (net.op(f"Transpose <perm = [{perm}]> ({part})") for perm, part in zip(perms, parts, strict=True))
    scores = net.op(f"Add ({net.op(f'MatMul ({q}, {k})')}, {net.weight(heads, tokens, tokens)})")
    y = net.op(f"MatMul ({net.op(f'Softmax <axis = -1> ({scores})')}, {v})")
    y = net.op(f"Reshape ({net.op(f'Transpose <perm = [0,2,1,3]> ({y})')}, {net.ints(0, tokens, width)})")
    x = net.op(f"Add ({x}, {net.linear(y, width, width)})")
    y = net.op(f"LayerNormalization ({x}, {net.near_one(width)}, {net.weight(width)})")
    x = net.op(f"Add ({x}, {net.linear(net.op(f'Erf ({net.linear(y, width, 8)})'), 8, width)})")
    x = net.op(f"ReduceMean <axes = [1], keepdims = 0> ({x})")
    return net.model((net.linear(x, width, 3), ("N", 3)))


BUILDERS = {
    "resnet-a": lambda: resnet("A"),
    "resnet-b": lambda: resnet("B"),
    "densenet": densenet,
    "shufflenet-v1": shufflenet_v1,
    "shufflenet-v2": shufflenet_v2,
    "shufflenet-v2-gather": lambda: shufflenet_v2("Gather"),
    "mobilenet-v2": mobilenet_v2,
    "mobilenet-v3": mobilenet_v3,
    "yolo": yolo,
    "unet": unet,
    "convnext": convnext,
    "inception": inception,
    "vit": vit,
    "vit-joined": lambda: vit(joined=True),
}
