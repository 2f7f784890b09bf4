"""TVM beside ONNX Runtime: a network, and single layers, after so many seconds of tuning, on one thread.

    pip install "edgec[tvm]"
    TVM_NUM_THREADS=1 python benchmarks/tvm_backend.py --data DIR [--tune 60] [--only resnet20|layers]

DIR as for int8.py. Every row starts from an empty record folder. Both run in turn in one process (timing.py); `of peak`
is what a layer's arithmetic takes of what a large product does on one thread, here.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from edgec.backends.ort import Session
from edgec.backends.targets import timing
from edgec.backends.tvm import module, runner, tuning
from edgec.compiler import model as model_io
from edgec.compiler import pipeline

#: Name, ONNX text of the layer, MACs.
LAYERS = (
    ("3x3 64->64 at 56x56", "y = Conv <pads = [1,1,1,1]> (x, w)", (1, 64, 56, 56), (64, 64, 3, 3),
     56 * 56 * 64 * 64 * 9),
    ("1x1 256->256 at 28x28", "y = Conv (x, w)", (1, 256, 28, 28), (256, 256, 1, 1), 28 * 28 * 256 * 256),
    ("depthwise 3x3, 256 at 28x28", "y = Conv <group = 256, pads = [1,1,1,1]> (x, w)", (1, 256, 28, 28), (256, 1, 3, 3),
     28 * 28 * 256 * 9),
    ("Gemm 256x1024x1024", "y = MatMul (x, w)", (256, 1024), (1024, 1024), 256 * 1024 * 1024),
)  # fmt: skip


def cases(data: Path | None, only: str, place: Path) -> Iterator[tuple[str, Path, int | None]]:
    """Yield name, file and MACs of what is measured."""
    if only in ("all", "resnet20") and data is not None:
        found, _ = pipeline.run(model_io.load(data / "models/resnet20_cifar10.onnx"), pipeline.exact_passes(), None)
        model_io.save(found, place / "resnet20.onnx")
        yield "resnet20", place / "resnet20.onnx", None
    if only in ("all", "layers"):
        rng = np.random.default_rng(0)
        for i, (name, node, x, w, macs) in enumerate(LAYERS):
            read, kept, unknown = (", ".join(map(str, dims)) for dims in (x, w, "abcd"[: len(x)]))
            text = f"g (float[{read}] x) => (float[{unknown}] y) <float[{kept}] w> {{ {node} }}"
            proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
            array = (rng.normal(size=w) / np.sqrt(np.prod(w[1:]))).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
            onnx.save(proto, place / f"layer{i}.onnx")
            yield name, place / f"layer{i}.onnx", macs


def peak(seconds: float = 2.0) -> float:
    """Return the multiply-accumulates a second of a large product on one thread: ONNX Runtime's or numpy's best."""
    text = "g (float[1024,1024] a, float[1024,1024] b) => (float[1024,1024] y) { y = MatMul (a, b) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    session, a = Session(proto.SerializeToString(), threads=1), np.ones((1024, 1024), np.float32)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for product in (lambda: a @ a, lambda: session.run({"a": a, "b": a})):
            start = time.perf_counter()
            product()
            best = max(best, 1024**3 / (time.perf_counter() - start))
    return best


def built(path: Path, seconds: float, place: Path) -> tuple[runner.Module, int]:
    """Return a module after so many seconds of tuning, and how many schedules were timed."""
    graph = model_io.load(path)
    specs, target = model_io.input_specs(graph), module.target_of(module.host_cpu(1))
    network = module.imported(path, specs, target)
    found = tuning.tune(network, seconds, folder=place)
    library = place / "model.so"
    module.compiled(network, found.records).export_library(str(library))
    return runner.Module(library, specs, tuple(v.name for v in graph.graph.outputs), 1), found.trials


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tune", type=float, default=60.0)
    parser.add_argument("--only", default="all")
    args = parser.parse_args()
    limit = peak()
    print(f"the largest product on one thread: {limit / 1e9:.0f} GMAC/s\n")
    heads = ("what", "untuned ms", "tuned ms", "schedules", "ONNX Runtime ms", "TVM / ORT (95 %)", "of peak %", "error")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with TemporaryDirectory() as folder:
        for name, path, macs in cases(args.data, args.only, Path(folder)):
            places = [Path(folder) / f"{path.stem}-{kind}" for kind in ("untuned", "tuned")]
            for place in places:
                place.mkdir()
            plain, _ = built(path, 0.0, places[0])
            tuned, trials = built(path, args.tune, places[1])
            session = Session(path, threads=1)
            feed = model_io.sample_inputs(tuned.inputs, seed=0)
            runs = {"untuned": plain.run, "tuned": tuned.run, "ort": session.run}
            calls = {key: functools.partial(run, feed) for key, run in runs.items()}
            samples = timing.interleave(calls, seconds=6.0)
            ms = {key: float(np.median(values)) for key, values in samples.items()}
            ratio, low, high = timing.median_interval(samples["tuned"] / samples["ort"])
            (a,), (b,) = tuned.run(feed).values(), session.run(feed).values()
            error = float(np.abs(a - b).max() / np.abs(b).max())
            share = "" if macs is None else f"{100 * macs / (ms['tuned'] / 1e3) / limit:.0f}"
            print(
                f"| {name} | {ms['untuned']:.3g} | {ms['tuned']:.3g} | {trials} | {ms['ort']:.3g} "
                f"| {ratio:.2f} ({low:.2f} to {high:.2f}) | {share} | {error:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
