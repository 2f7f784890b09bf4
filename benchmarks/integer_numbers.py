"""Trained networks: the INT8 artifact for TensorRT in ONNX Runtime, optimisations off, beside integer arithmetic.

    python benchmarks/integer_numbers.py --data DIR

DIR holds models/*.onnx. The simulation and the checks that it can fail are those of tests/integer_simulation.py. Each
model is quantized on random inputs and run on two others that are 1.2 times as large, so that numbers saturate.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import equivalence  # a folder of the repository, not of the package
import trt_artifacts as artifacts
from edgec.compiler import devices
from edgec.compiler import model as model_io
from integer_simulation import simulate

_SEEDS = (1, 2)


def compared(path: Path, work: Path) -> tuple[int, int, float, int, float]:
    """Return how many numbers there are, how many differ by stretch and by how much at most, and from end to end."""
    profile = replace(devices.find("jetson-orin-nano-8gb"), toolchain={"tensorrt": "8.6.2"})
    made = artifacts.make(model_io.load(path), work, profile, "int8").model
    stretches, whole = [], []
    for seed in _SEEDS:
        drawn = equivalence.sample(equivalence.session(made.read_bytes()), seed)
        feed = {name: (1.2 * array).astype(np.float32) for name, array in drawn.items()}
        seen = artifacts.observed(made, feed)
        for kept, exact in ((stretches, simulate(made, feed, given=seen)), (whole, simulate(made, feed))):
            kept += [apart.ravel() for apart in artifacts.steps(exact, seen).values()]
    one, end = np.concatenate(stretches), np.concatenate(whole)
    return len(one), int((one > 0.5).sum()), float(one.max()), int((end > 0.5).sum()), float(end.max())


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    print("| model | numbers | differ, by stretch | by at most | differ, from end to end | by at most |")
    print("|---|---|---|---|---|---|")
    for path in sorted((parser.parse_args().data / "models").glob("*.onnx")):
        with TemporaryDirectory() as work:
            count, some, most, more, furthest = compared(path, Path(work) / "made")
        print(f"| {path.stem} | {count:,} | {some} | {most:.3g} steps | {more:,} | {furthest:.3g} steps |", flush=True)


if __name__ == "__main__":
    main()
