"""TVM beside ONNX Runtime: networks and single layers, in float32 and INT8, one thread, one process.

    pip install "edgec[tvm]"
    TVM_NUM_THREADS=1 python benchmarks/tvm_backend.py --data DIR [--tune 60] [--only resnet20|mobilenet|layers]

DIR as for int8.py. Every row starts without records, in a folder of its own. All of a row run in turn (timing.py), with
numpy arrays in and out. Columns:

    plain      TVM's own code: imported and fused, no schedules
    guess      edgec's schedules without tuning: the first of each space
    tuned      after so many seconds, or when nothing was left to win; `tried` schedules were timed
    of peak    what the arithmetic takes, at the pace of the fastest large product found here, of the tuned time
    INT8       the same layer in Q/DQ, uint8 in and out, after the same tuning; beside it ONNX Runtime's kernels
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import tvm
from edgec.backends.ort import Session
from edgec.backends.targets import timing
from edgec.backends.tvm import clock, network, records, runner, targets, tuning
from edgec.backends.tvm.lowering import importer
from edgec.compiler import devices, pipeline
from edgec.compiler import model as model_io
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

#: Name, ONNX operator, input and weight shapes, MACs.
LAYERS = (
    ("3x3 64->64 at 56x56", ("Conv", {"pads": [1] * 4}), (1, 64, 56, 56), (64, 64, 3, 3), 56 * 56 * 64 * 64 * 9),
    ("1x1 256->256 at 28x28", ("Conv", {}), (1, 256, 28, 28), (256, 256, 1, 1), 28 * 28 * 256 * 256),
    ("depthwise 3x3, 256 at 28x28", ("Conv", {"pads": [1] * 4, "group": 256}), (1, 256, 28, 28), (256, 1, 3, 3),
     28 * 28 * 256 * 9),
    ("Gemm 256x1024x1024", ("Gemm", {}), (256, 1024), (1024, 1024), 256 * 1024 * 1024),
)  # fmt: skip
#: MobileNetV2: expansion, channels, repeats, stride (Sandler et al., CVPR 2018, table 2).
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
TARGET_THREADS = 1


@dataclass(frozen=True)
class Case:
    """What is measured: the float32 file, the same in Q/DQ if there is one, and the float32 MACs of a layer."""

    name: str
    floats: Path
    integers: Path | None
    macs: int | None = None


class Graph:
    """Nodes and weights, drawn from a seed as they are added."""

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.nodes, self.weights = np.random.default_rng(seed), [], []

    def weight(self, array: np.ndarray) -> str:
        """Add a constant; return its name."""
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """Add a node; return its output's name."""
        self.nodes.append(helper.make_node(op, inputs, [f"t{len(self.nodes)}"], f"n{len(self.nodes)}", **attributes))
        return self.nodes[-1].output[0]

    def conv(self, x: str, channels: int, outputs: int, kernel: int, stride: int, group: int = 1) -> str:
        """Add a Conv with bias, padded to keep the size."""
        shape = (outputs, channels // group, kernel, kernel)
        w = self.rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        given = [self.weight(a.astype(np.float32)) for a in (w, 0.1 * self.rng.normal(size=outputs))]
        return self.add("Conv", x, *given, strides=[stride] * 2, pads=[kernel // 2] * 4, group=group)

    def save(self, path: Path, x: tuple[str, int, tuple[int, ...]], y: tuple[str, int]) -> Path:
        """Write the model: x is the input's name, type and shape, y the output's name and type."""
        read = [helper.make_tensor_value_info(*x)]
        given = [helper.make_tensor_value_info(y[0], y[1], None)]
        graph = helper.make_graph(self.nodes, "g", read, given, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(proto), path)
        return path


def mobilenet(path: Path) -> Path:
    """Write a network of MobileNetV2's shape at 224 x 224 with random weights: 300 million MACs."""
    g, channels = Graph(), 32
    low, high = g.weight(np.float32(0)), g.weight(np.float32(6))
    x = g.add("Clip", g.conv("x", 3, channels, 3, 2), low, high)
    for expansion, outputs, repeats, first in BLOCKS:
        for i in range(repeats):
            wide, y = channels * expansion, x
            if expansion > 1:
                y = g.add("Clip", g.conv(y, channels, wide, 1, 1), low, high)
            y = g.add("Clip", g.conv(y, wide, wide, 3, 1 if i else first, wide), low, high)
            y = g.conv(y, wide, outputs, 1, 1)
            x, channels = (g.add("Add", x, y) if i else y), outputs
    x = g.add("Clip", g.conv(x, channels, 1280, 1, 1), low, high)
    x = g.add("Flatten", g.add("GlobalAveragePool", x))
    y = g.add("Gemm", x, g.weight((g.rng.normal(size=(1280, 1000)) / 36).astype(np.float32)))
    return g.save(path, ("x", TensorProto.FLOAT, (1, 3, 224, 224)), (y, TensorProto.FLOAT))


def layer(place: Path, index: int) -> Case:
    """Write a layer with a bias, in float32 and in Q/DQ with a scale for each output channel."""
    name, (op, attributes), x, w, macs = LAYERS[index]
    axis = 1 if op == "Gemm" else 0
    rng = np.random.default_rng(0)
    whole, bias = rng.integers(-127, 128, w).astype(np.int8), rng.normal(size=w[axis]).astype(np.float32)
    scale = np.float32(1 / 127 / np.sqrt(np.prod(w) / w[axis]))
    g = Graph()
    y = g.add(op, "x", g.weight(whole * scale), g.weight(bias), **attributes)
    floats = g.save(place / f"{index}.onnx", ("x", TensorProto.FLOAT, x), (y, TensorProto.FLOAT))
    g = Graph()
    s, z, out = (g.weight(a) for a in (np.float32(1 / 255), np.uint8(0), np.float32(0.05)))
    middle = g.weight(np.uint8(128))
    scales, zeros = np.full(w[axis], scale), np.zeros(w[axis], np.int8)
    read = g.add("DequantizeLinear", "x", s, z)
    weight = g.add("DequantizeLinear", *map(g.weight, (whole, scales, zeros)), axis=axis)
    y = g.add("QuantizeLinear", g.add(op, read, weight, g.weight(bias), **attributes), out, middle)
    integers = g.save(place / f"{index}-int8.onnx", ("x", TensorProto.UINT8, x), (y, TensorProto.UINT8))
    return Case(name, floats, integers, macs)


def cases(data: Path | None, only: str, place: Path) -> Iterator[Case]:
    """Yield what is measured."""
    if only in ("all", "resnet20") and data is not None:
        found, _ = pipeline.run(model_io.load(data / "models/resnet20_cifar10.onnx"), pipeline.exact_passes(), None)
        model_io.save(found, place / "resnet20.onnx")
        yield Case("ResNet-20", place / "resnet20.onnx", None)
    if only in ("all", "mobilenet"):
        yield Case("MobileNetV2-shaped, 224", mobilenet(place / "mobilenet.onnx"), None)
    if only in ("all", "layers"):
        yield from (layer(place, i) for i in range(len(LAYERS)))


Call = Callable[[], dict[str, np.ndarray]]


def opened(path: Path, executable: object) -> Call:
    """Return a call of a module as edgec runs it: numpy arrays in and out."""
    model = model_io.load(path)
    specs = model_io.input_specs(model)
    outputs = tuple(value.name for value in model.graph.outputs)
    module = runner.Module(executable, runner.Facts(specs, outputs, "cpu", "TVM", ()), TARGET_THREADS)
    return functools.partial(module.run, model_io.sample_inputs(specs, seed=0))


def plain(path: Path, target: object) -> object:
    """Return TVM's own executable: no schedules."""
    module = importer.imported(path, model_io.input_specs(model_io.load(path)))
    with target:
        module = relax.get_pipeline("zero")(relax.transform.DecomposeOpsForInference()(module))
    return tvm.compile(module, target=target)


def built(path: Path, target: object, seconds: float, file: Path) -> tuple[object, tuning.Tuned, float]:
    """Return an executable after so many seconds of tuning, what was tried, and how long all of it took."""
    start = time.perf_counter()
    net = network.prepared(path, model_io.input_specs(model_io.load(path)), target)
    found = tuning.tune(net, records.Records(target, file), clock.Here(target, TARGET_THREADS), seconds)
    executable = network.built(net, found.choices)
    return executable, found, time.perf_counter() - start


def peak(place: Path, target: object, seconds: float) -> float:
    """Return the most multiply-accumulates a second seen here, by any of three programs, in a product of 1024^3."""
    g, a = Graph(), np.ones((1024, 1024), np.float32)
    y = g.add("Gemm", "x", g.weight(np.random.default_rng(0).random((1024, 1024), np.float32)))
    path = g.save(place / "peak.onnx", ("x", TensorProto.FLOAT, (1024, 1024)), (y, TensorProto.FLOAT))
    run = opened(path, built(path, target, seconds, place / "peak.sqlite")[0])
    session = Session(path, threads=1)
    calls = {"tvm": run, "ort": lambda: session.run({"x": a}), "numpy": lambda: a @ a}
    samples = timing.interleave(calls, seconds=3.0)
    return 1024**3 / (min(float(np.percentile(values, 5)) for values in samples.values()) / 1e3)


def measured(case: Case, tune: float, place: Path) -> Iterator[str]:
    """Yield the cells of a row, the limit's share left out."""
    target = targets.target_of(devices.find("local"), TARGET_THREADS)
    guess, _, _ = built(case.floats, target, 0.0, place / "none.sqlite")
    file = place / f"{case.floats.stem}.sqlite"
    tuned, found, took = built(case.floats, target, tune, file)
    _, again, second = built(case.floats, target, tune, file)
    feed = model_io.sample_inputs(model_io.input_specs(model_io.load(case.floats)), seed=0)
    session = Session(case.floats, threads=1)
    runs = {
        "plain": plain(case.floats, target),
        "guess": guess,
        "tuned": tuned,
        "again": network_of(case, target, again),
    }
    calls: dict[str, Call] = {name: opened(case.floats, one) for name, one in runs.items()}
    slow = timing.interleave({"plain": calls.pop("plain"), "tuned": calls["tuned"]}, seconds=3.0, min_rounds=5)
    calls["ort"] = functools.partial(session.run, feed)
    if case.integers is not None:
        executable, _, _ = built(case.integers, target, tune, place / f"{case.integers.stem}.sqlite")
        calls["int8"] = opened(case.integers, executable)
        other, bytes_ = Session(case.integers, threads=1), model_io.sample_inputs(
            model_io.input_specs(model_io.load(case.integers)), seed=0
        )  # fmt: skip
        calls["ort int8"] = functools.partial(other.run, bytes_)
    samples = timing.interleave(calls, seconds=8.0)
    ms = {name: float(np.median(values)) for name, values in samples.items()}
    ratio, low, high = timing.median_interval(samples["tuned"] / samples["ort"])
    (wanted,) = session.run(feed).values()
    (got,) = calls["tuned"]().values()
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    yield from (f"{float(np.median(slow['plain'])):.3g}", f"{ms['guess']:.3g}", f"{ms['tuned']:.3g}")
    yield from (f"{found.trials} in {took:.0f} s", f"{ms['ort']:.3g}", f"{ratio:.2f} ({low:.2f} to {high:.2f})")
    yield f"{float(np.median(slow['plain'] / slow['tuned'])):.0f}x"
    yield f"{ms['tuned']:.6g}"
    yield "" if case.integers is None else f"{ms['int8']:.3g} ({ms['tuned'] / ms['int8']:.2f}x; {ms['ort int8']:.3g})"
    yield f"{second:.1f} s, {ms['again'] / ms['tuned']:.3f}"
    yield f"{error:.0e}"


def network_of(case: Case, target: object, found: tuning.Tuned) -> object:
    """Return the executable with what was found."""
    net = network.prepared(case.floats, model_io.input_specs(model_io.load(case.floats)), target)
    return network.built(net, found.choices)


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tune", type=float, default=60.0)
    parser.add_argument("--only", default="all", choices=("all", "resnet20", "mobilenet", "layers"))
    args = parser.parse_args()
    heads = (
        "what", "plain ms", "guess ms", "tuned ms", "tried", "ONNX Runtime ms", "tuned / ORT (95 %)", "plain / tuned",
        "of peak %", "INT8 ms (tuned / INT8; ORT's ms)", "second compile, its latency / first's", "error",
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        place = Path(folder)
        target = targets.target_of(devices.find("local"), TARGET_THREADS)
        limit = peak(place, target, min(args.tune, 20.0))
        print(f"the fastest product on one thread: {limit / 1e9:.0f} GMAC/s; tuning: at most {args.tune:.0f} s\n")
        print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for case in cases(args.data, args.only, place):
            cells = list(measured(case, args.tune, place))
            tuned = float(cells[7])
            cells[7] = "" if case.macs is None else f"{100 * case.macs / (tuned / 1e3) / limit:.0f}"
            print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
