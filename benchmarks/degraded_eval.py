"""What it costs to judge a model under QRID's eight conditions, beside judging it on clean images alone.

    python benchmarks/degraded_eval.py --data DIR [--model NAME] [--images N] [--repeat N] [--threads 1]

DIR holds models/ and cifar10/calib, cifar10/val. The model is compiled to INT8 once; then both evaluations run in
turns, in one process: decoding, degrading, both models, statistics. Prints a table in Markdown: the medians, and the
median of the ratios of neighbouring runs, by the clock and in CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import edgec
from edgec.calib.degrade import QRID
from edgec.calib.sources import IMAGES, walk

_PREPROCESS = """size: [32, 32]
resize: stretch
color: rgb
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
"""


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes: by the clock, and of CPU time."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - cpu


def part(images: Path, count: int, out: Path) -> Path:
    """Return a folder with links to `count` of the images, evenly over all of them, in their class folders."""
    files = walk(images)
    files = [file for file in files if file.lower().endswith(IMAGES)]
    for i in range(min(count, len(files))):
        file = files[i * len(files) // count] if count < len(files) else files[i]
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).symlink_to((images / file).resolve())
    return out


def main() -> None:
    """Compile, evaluate in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="resnet20_cifar10")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        sidecar = work / "preprocess.yaml"
        sidecar.write_text(_PREPROCESS, encoding="utf-8")
        model, bundle = args.data / "models" / f"{args.model}.onnx", work / "int8"
        edgec.compile(
            model, bundle, calib=args.data / "cifar10/calib", preprocess=str(sidecar), precision="int8",
            threads=args.threads,
        )  # fmt: skip
        images = part(args.data / "cifar10/val", args.images, work / "val")
        pairs = []
        for _ in range(args.repeat):
            clean = timed(lambda: edgec.evaluate(bundle, images, threads=args.threads))
            pairs.append((clean, timed(lambda: edgec.robustness(bundle, images, "qrid", threads=args.threads))))
    print(f"{args.model}, {args.images} images, {args.repeat} pairs of runs, {args.threads} thread(s)\n")
    print(f"| | clean, s | {len(QRID)} conditions, s | ratio | from | to |")
    print("|---|---|---|---|---|---|")
    for i, name in enumerate(("clock", "CPU time")):
        clean, degraded = zip(*((a[i], b[i]) for a, b in pairs), strict=True)
        ratios = [b / a for a, b in zip(clean, degraded, strict=True)]
        ends = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}"
        print(f"| {name} | {statistics.median(clean):.2f} | {statistics.median(degraded):.2f} | {ends} |")


if __name__ == "__main__":
    main()
