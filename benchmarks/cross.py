"""TVM's modules for other processors: built here, run under qemu where one can be played, held against ONNX Runtime.

    make aarch64
    .venv/bin/python benchmarks/cross.py

No timings: an emulator says nothing of them. The networks are the digits demo, in float32 and INT8.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from edgec.backends.ort import Session
from edgec.compiler import api
from edgec.compiler import model as model_io

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import emulated  # the tests run modules in the same way

DIGITS = emulated.ROOT / "examples/digits"
#: The instructions that multiply bytes, for the lanes of 32 bits that they are summed in.
DOTS = ("sdot", "smull", "vpdpbusd")


def error(program: Path, library: Path, profile: str) -> float:
    """Return the largest difference of an output from ONNX Runtime's of the bundle's ONNX, relative to its largest."""
    path = library.with_suffix(".onnx")
    feed = model_io.sample_inputs(model_io.input_specs(model_io.load(path)), seed=0)
    wanted = Session(path, threads=1, optimise=False).run(feed)
    given = emulated.run(program, library, emulated.CPUS[profile], feed, wanted)
    return max(float(np.abs(given[name] - array).max() / np.abs(array).max()) for name, array in wanted.items())


def main() -> None:
    """Print a row for each profile and precision."""
    problem = emulated.missing()
    if problem is not None:
        raise SystemExit(problem)
    heads = ("profile", "precision", "model.so, KB", *DOTS, "run as", "largest error")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with TemporaryDirectory() as folder:
        program = emulated.runner(Path(folder))
        for profile in (*emulated.CPUS, "x86-avx512-vnni"):
            cpu = emulated.CPUS.get(profile)
            for precision in ("fp32", "int8"):
                out = Path(folder) / profile / precision
                api.compile(
                    DIGITS / "digits.onnx", out, backend="tvm", device=profile, precision=precision,
                    calib=DIGITS / "calib", tune=0.0, threads=1,
                )  # fmt: skip
                library = out / "model.so"
                found = emulated.instructions(library, "x86_64" if cpu is None else "aarch64")
                counts = " | ".join(str(found.count(name)) for name in DOTS)
                ran = "not here | " if cpu is None else f"{cpu} | {error(program, library, profile):.0e}"
                size = round(library.stat().st_size / 1024)
                print(f"| {profile} | {precision} | {size} | {counts} | {ran} |", flush=True)


if __name__ == "__main__":
    main()
