"""Calibration beside plain FP32 inference: time over the same decoded images, and peak memory.

    python benchmarks/calibration.py --data DIR [--repeat N] [--threads 1,2]

DIR holds models/ (resnet20_cifar10.onnx, fastestdet_coco.onnx), cifar10/calib, cifar10/val and photos/; a network of
ResNet-50's size with random weights is made here. Both sides run the same BN-folded model on the same batches, decoded
beforehand, from the start of the session to the last image, in turns; medians. Plain inference uses as many threads for
each run, as ONNX Runtime does by default; the sweep uses them for runs side by side. Memory is the peak RSS of a fresh
process that opens the folder, decodes, and runs everything. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
from edgec.backends.ort import SUPPORTS, Session
from edgec.calib import observe, preprocess
from edgec.calib.folder import Batch, Folder, open_folder
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.types import InputSpec, Preprocess
from edgec.passes.placement import observed_tensors

#: What is compared: name -> histogram or not; None is plain inference.
SIDES: dict[str, bool | None] = {"plain": None, "minmax": False, "histogram": True}


@dataclass(frozen=True)
class Case:
    """A model, its images and how they become its input."""

    name: str
    images: str
    preprocess: str | Preprocess
    many: int = 1000


CASES = (
    Case("resnet20_cifar10", "cifar10/calib", "imagenet-stretch"),
    Case("fastestdet_coco", "photos", Preprocess((352, 352), color="bgr")),
    Case("resnet50_random", "photos", "imagenet", many=300),
)


class Decoded:
    """A folder's batches, decoded beforehand, in the place of a Folder."""

    def __init__(self, folder: Folder, size: int) -> None:
        self._batches = list(folder.batches(size, pad=True))
        self._count = len(folder)
        self.specs, self.pre, self.fixed_batch = folder.specs, folder.pre, folder.fixed_batch

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int, *, pad: bool = False) -> Iterator[Batch]:
        """Yield the same batches each time."""
        yield from self._batches


def resnet50(path: Path) -> None:
    """Write a network with ResNet-50's layers and random weights, BatchNormalization folded."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []

    def conv(x: str, cin: int, cout: int, k: int, stride: int = 1, relu: bool = True) -> str:
        name = f"c{len(nodes)}"
        w = (rng.standard_normal((cout, cin, k, k)) * np.sqrt(2 / (cin * k * k))).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(w, f"{name}.w"))
        weights.append(onnx.numpy_helper.from_array(np.zeros(cout, np.float32), f"{name}.b"))
        pads = [k // 2] * 4
        inputs = [x, f"{name}.w", f"{name}.b"]
        nodes.append(onnx.helper.make_node("Conv", inputs, [name], name, pads=pads, strides=[stride, stride]))
        return node("Relu", name) if relu else name

    def node(op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op.lower()}{len(nodes)}"
        nodes.append(onnx.helper.make_node(op, inputs, [name], name, **attributes))
        return name

    x = conv("image", 3, 64, 7, 2)
    x = node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            skip = x if block else conv(x, channels, 4 * width, 1, stride, relu=False)
            y = conv(conv(x, channels, width, 1), width, width, 3, stride)
            x = node("Relu", node("Add", conv(y, width, 4 * width, 1, relu=False), skip))
            channels = 4 * width
    x = node("Flatten", node("GlobalAveragePool", x))
    weights.append(onnx.numpy_helper.from_array(rng.standard_normal((1000, 2048)).astype(np.float32) * 0.02, "fc.w"))
    nodes.append(onnx.helper.make_node("Gemm", [x, "fc.w"], ["logits"], "fc", transB=1))
    graph = onnx.helper.make_graph(
        nodes,
        "resnet50",
        [onnx.helper.make_tensor_value_info("image", 1, ["N", 3, 224, 224])],
        [onnx.helper.make_tensor_value_info("logits", 1, ["N", 1000])],
        weights,
    )
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 13)]), path)


def folded(case: Case, data: Path, work: Path) -> Path:
    """Return the case's model after the exact passes, written once."""
    out = work / f"{case.name}.onnx"
    if not out.exists():
        source = data / "models" / out.name
        if not source.exists():
            resnet50(out)
            source = out
        model, _ = pipeline.run(model_io.load(source), pipeline.exact_passes(13), None)
        model_io.save(model, out)
    return out


def opened(case: Case, images: Path, spec: InputSpec) -> Folder:
    """Open a folder of images for the case's model."""
    pre = case.preprocess
    if isinstance(pre, str):
        pre = preprocess.resolve(pre, Path("none.onnx"), spec) or Preprocess()
    return open_folder(images, pre, (spec,))


def run(side: str, model: ir.Model, folder: Folder | Decoded, size: int, threads: int) -> None:
    """Run plain inference, or the sweep, over all images."""
    histogram = SIDES[side]
    if histogram is None:
        session = Session(model_io.serialize(model), threads=threads)
        for batch in folder.batches(size, pad=True):
            session.run(batch.feed)
    else:
        tensors = observed_tensors(model, SUPPORTS)
        observe.collect(model, tensors, folder, histogram=histogram, batch=size, threads=threads)  # type: ignore[arg-type]  # Decoded stands in


def seconds(work: Callable[[], None]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(case: Case, data: Path, work: Path, threads: int, repeat: int) -> str:
    """Return a row: seconds of each side, and the ratios to plain inference."""
    model = model_io.load(folded(case, data, work))
    folder = opened(case, data / case.images, model_io.input_specs(model)[0])
    size = folder.fixed_batch or observe._images_a_run(folder)
    decoded = Decoded(folder, size)
    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeat):
        for side in SIDES:
            spent[side].append(seconds(lambda side=side: run(side, model, decoded, size, threads)))
    median = {side: statistics.median(spent[side]) for side in SIDES}
    cells = [case.name, len(folder), size, threads, *(f"{s:.3f}" for s in median.values())]
    cells += [f"{median[side] / median['plain']:.2f}" for side in SIDES if side != "plain"]
    return row(cells)


def memory(side: str, case: Case, data: Path, work: Path, images: str, count: int) -> float:
    """Return the peak RSS in MB of a fresh process that runs `side` over `count` images."""
    arguments = [sys.executable, __file__, "--data", data, "--work", work, "--child", side, case.name, images, count]
    done = subprocess.run([str(a) for a in arguments], check=True, capture_output=True, text=True)
    return float(done.stdout)


def child(side: str, name: str, images: str, count: int, data: Path, work: Path) -> None:
    """Run one side over `count` images and print this process's peak RSS in MB."""
    case = next(case for case in CASES if case.name == name)
    model = model_io.load(folded(case, data, work))
    folder = opened(case, data / images, model_io.input_specs(model)[0])
    picked = np.linspace(0, len(folder) - 1, count).astype(int)
    folder = folder.subset(picked)
    run(side, model, folder, folder.fixed_batch or observe._images_a_run(folder), 0)
    print(peak_mb())


def peak_mb() -> float:
    """Return this process's peak RSS in MB.

    Linux starts `ru_maxrss` at the parent's size when a process is forked; VmHWM begins anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(cells: Sequence[object]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names: str) -> str:
    """Return the head of a Markdown table."""
    return row(names) + "\n" + row(["---"] * len(names))


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="thread counts, separated by commas")
    parser.add_argument("--no-times", action="store_true", help="memory only")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        side, name, images, count = given.child
        child(side, name, images, int(count), given.data, given.work)
        return
    cases = [case for case in CASES if case.name in given.cases.split(",")]
    with TemporaryDirectory() as folder:
        work = Path(folder)
        if not given.no_times:
            ratios = [f"{side}/plain" for side in SIDES if side != "plain"]
            print(head("model", "images", "batch", "threads", *(f"{s}, s" for s in SIDES), *ratios))
            for case, threads in itertools.product(cases, dict.fromkeys(map(int, given.threads.split(",")))):
                print(times(case, given.data, work, threads, given.repeat), flush=True)
            print()
        print(head("model", "images of cifar10/val", *(f"{s}, peak MB" for s in SIDES)))
        for case in cases:
            for count in (100, case.many):
                peaks = [memory(side, case, given.data, work, "cifar10/val", count) for side in SIDES]
                print(row([case.name, count, *(f"{p:.0f}" for p in peaks)]), flush=True)


if __name__ == "__main__":
    main()
