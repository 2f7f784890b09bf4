"""Memory and time for a model larger than memory should need: load, exact passes, save, fingerprint.

A chain of MatMul, Add and Relu with external weights (2.4 GB by default) is streamed into a temporary folder and
worked on in a fresh process, whose peak resident memory is the figure. The proof on sample inputs is not part
of it. Needs about 2.2 times the model's size of free disk; everything is removed afterwards.

    python benchmarks/large_model.py [--gigabytes 2.4] [--folder DIR] [--passes NAME,NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET_MB = 600
WIDTH = 4096  # a weight is WIDTH x WIDTH float32: 64 MiB
PASSES = "raise-opset,normalise,fold-batch-norm"


def write_model(path: Path, gigabytes: float) -> int:
    """Write the model with its data file beside it, one chunk at a time; return the number of layers."""
    import onnx

    layers = max(1, round(gigabytes * 1e9 / (WIDTH * WIDTH * 4)))
    graph = onnx.GraphProto(name="large")
    dims = ["N", WIDTH]
    graph.input.append(onnx.helper.make_tensor_value_info("h0", onnx.TensorProto.FLOAT, dims))
    graph.output.append(onnx.helper.make_tensor_value_info(f"h{layers}", onnx.TensorProto.FLOAT, dims))
    data = path.with_suffix(".bin")
    chunk = os.urandom(1 << 22)
    with data.open("wb") as file:
        for i in range(layers):
            _external(graph, f"w{i}", [WIDTH, WIDTH], data.name, file.tell())
            for _ in range(WIDTH * WIDTH * 4 // len(chunk)):
                file.write(chunk)
            _external(graph, f"b{i}", [WIDTH], data.name, file.tell())
            file.write(bytes(WIDTH * 4))
            graph.node.add(op_type="MatMul", input=[f"h{i}", f"w{i}"], output=[f"m{i}"])
            graph.node.add(op_type="Add", input=[f"m{i}", f"b{i}"], output=[f"a{i}"])
            graph.node.add(op_type="Relu", input=[f"a{i}"], output=[f"h{i + 1}"])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return layers


def _external(graph: object, name: str, dims: list[int], location: str, offset: int) -> None:
    tensor = graph.initializer.add(name=name, dims=dims, data_type=1, data_location=1)  # type: ignore[attr-defined]  # protobuf
    length = 4
    for dim in dims:
        length *= dim
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def work(source: Path, result: Path, passes: list[str]) -> dict[str, list[float]]:
    """Do the job in this process; return step -> [seconds, peak MB so far]."""
    steps: dict[str, list[float]] = {}
    started = time.perf_counter()

    def done(step: str) -> None:
        nonlocal started
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
        steps[step] = [time.perf_counter() - started, peak]
        started = time.perf_counter()

    from edgec.compiler import model as model_io
    from edgec.passes import registry

    done("import")
    model = model_io.load(source)
    done("load")
    for name in passes:
        registry.load(name)()(model)
        done(name)
    model_io.save(model, result)
    done("save")
    model_io.fingerprint(model)
    done("fingerprint")
    return steps


def main() -> None:
    """Write the model, run the job in a fresh process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.4, help="size of the weights (default 2.4)")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--work", nargs=2, type=Path, metavar=("SOURCE", "RESULT"), help=argparse.SUPPRESS)
    parser.add_argument("--passes", default=PASSES, help=f"what to run (default {PASSES})")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(*options.work, options.passes.split(","))))
        return
    with tempfile.TemporaryDirectory(prefix="edgec-large-", dir=options.folder) as folder:
        need, free = 2.2e9 * options.gigabytes, shutil.disk_usage(folder).free
        if free < need:
            parser.error(f"{folder} has {free / 1e9:.0f} GB free, and {need / 1e9:.0f} are needed: use --folder")
        source = Path(folder) / "large.onnx"
        layers = write_model(source, options.gigabytes)
        result = Path(folder) / "out" / "model.onnx"
        command = [sys.executable, __file__, "--passes", options.passes, "--work", str(source), str(result)]
        steps = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{layers} MatMul layers, {layers * WIDTH * WIDTH * 4 / 1e9:.2f} GB of external weights")
    for step, (seconds, peak) in steps.items():
        print(f"  {step:16} {seconds:7.2f} s   peak {peak:6.0f} MB")
    reached = "reached" if max(peak for _, peak in steps.values()) < TARGET_MB else "NOT reached"
    print(f"target: peak under {TARGET_MB} MB: {reached}")


if __name__ == "__main__":
    main()
