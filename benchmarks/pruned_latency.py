"""What a part of the measured latency costs in quality, beside the same part of the MACs: docs/benchmarks.md's table.

    python benchmarks/pruned_latency.py --data DIR [--only resnet20] [--saved 20,30] [--kinds latency,macs]

DIR as for int8.py. Each row is one `edgec compile --precision fp32 --prune KIND:PART%`: the cut, repaired network
beside the whole one, both folded, interleaved in one process; judged on images that were not calibrated on. No training
and no labels; the figure is top-1, or the F1 of a detector's boxes against FP32's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import edgec
from edgec.compiler.types import Report
from int8 import CASES, Case, _part

_HEADS = (
    "asked for", "MACs cut %", "speed-up (95 %)", "foretold", "of it in branches", "figure", "points lost (95 %)",
    "SQNR dB", "s",
)  # fmt: skip


def run(case: Case, data: Path, place: Path, kinds: list[str], saved: list[str], threads: int) -> None:
    """Print one network's rows."""
    sidecar = place / "preprocess.yaml"
    sidecar.write_text(case.preprocess, encoding="utf-8")
    calib = _part(data / case.calib, case.calibrate_on, place / "calib")
    held_out = _part(data / case.eval, case.compare_on, place / "eval")
    print(f"\n### {case.model}, {threads} threads\n\n| {' | '.join(_HEADS)} |\n|{'---|' * len(_HEADS)}", flush=True)
    for part in saved:
        for kind in kinds:
            start = time.perf_counter()
            report = edgec.compile(
                data / "models" / f"{case.model}.onnx", place / f"{kind}-{part}", calib=calib, eval=held_out,
                precision="fp32", prune=f"{kind}:{part}%", preprocess=str(sidecar), metric=case.metric, threads=threads,
            )  # fmt: skip
            print(f"| {kind} {part} % | {' | '.join(_cells(report, time.perf_counter() - start))} |", flush=True)


def _cells(report: Report, seconds: float) -> tuple[str, ...]:
    p, m, f = report.pruning, report.result, report.fidelity
    assert p is not None and f is not None
    if not p.kept:
        return (p.why, *[""] * (len(_HEADS) - 2))
    before, after = (
        sum(n or 0 for n in found) for found in zip(*((x.macs, x.macs_left) for x in p.layers), strict=True)
    )
    whole = sum(x.macs or 0 for x in p.layers if x.outputs_left == 0)
    foretold = next((t.predicted_speedup for t in p.tried if t.name == p.candidate), None)
    return (
        f"{100 * (1 - after / before):.1f}",
        f"{m.speedup:.2f}x ({m.speedup_low:.2f} to {m.speedup_high:.2f})",
        "" if foretold is None else f"{foretold:.2f}x",
        f"{100 * whole / before:.0f} %",
        f"{f.metric} {f.value:.2f}",
        f"{f.drop:+.2f} ({f.drop_low:+.2f} to {f.drop_high:+.2f})",
        f"{f.outputs[0].sqnr_db:.1f}",
        f"{seconds:.0f}",
    )


def main() -> None:
    """Run all cases, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--kinds", default="latency,macs")
    parser.add_argument("--saved", default="20,30")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for case in CASES:
        if args.only in case.model:
            with TemporaryDirectory() as place:
                run(case, args.data, Path(place), args.kinds.split(","), args.saved.split(","), args.threads)


if __name__ == "__main__":
    main()
