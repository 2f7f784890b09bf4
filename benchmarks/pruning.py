"""What cutting channels costs, by criterion, before and after repair: the tables of docs/benchmarks.md.

    python benchmarks/pruning.py --data DIR [--only resnet20] [--criteria obs,l1,bn] [--saved 0.3,0.5] [--threads 1]

DIR as for int8.py. All criteria go through the same code: groups, curves, allocation, cut and repair; no labels are
seen, and nothing is trained. The figure is top-1 on held-out images, or the F1 of a detector's boxes against FP32's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from edgec.backends.ort import Session
from edgec.compiler import fidelity, job, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.fitting.images import repair_feeds
from edgec.compiler.options import Options
from edgec.compiler.pruning import allocation, importance
from edgec.compiler.pruning.costs import counted
from edgec.compiler.pruning.cutting import steps_of
from edgec.compiler.pruning.repair import repaired
from edgec.compiler.pruning.swaps import swapped
from edgec.compiler.types import silent
from edgec.passes import channel_cuts
from edgec.passes.cut_moves import JoinMoves
from int8 import CASES, Case, _part


def run(case: Case, data: Path, place: Path, criteria: list[str], saved: list[float], threads: int) -> None:
    """Print one network's rows."""
    sidecar = place / "preprocess.yaml"
    sidecar.write_text(case.preprocess, encoding="utf-8")
    calib = _part(data / case.calib, case.calibrate_on, place / "calib")
    held_out = _part(data / case.eval, case.compare_on, place / "eval")
    path = data / "models" / f"{case.model}.onnx"
    original = model_io.load(path)
    options = Options(
        calib=calib, eval=held_out, precision="fp32", preprocess=str(sidecar), metric=case.metric, threads=threads
    )
    this = job.resolve(path, original, options, silent)
    assert this.images is not None and this.judged is not None
    scales = importance.batch_norm_scales(pipeline.run(model_io.copy(original), pipeline.unfolded_passes(), None)[0])
    model, _ = pipeline.run(model_io.copy(original), [*pipeline.exact_passes(), JoinMoves()], None)
    groups = channel_cuts.groups(model)
    feeds = repair_feeds(model, this.images, threads=threads)
    costs, steps = counted(model, groups.groups, "macs"), steps_of(groups, this.profile)
    count = sum(len(next(iter(feed.values()))) for feed in feeds)
    print(f"\n### {case.model}: {len(groups.groups)} groups, {count} images to repair by\n")
    heads = ("criterion", "MACs cut %", "parameters cut %", "figure", "FP32", "cut", "repaired")
    heads += ("points lost (95 %)", "SQNR dB", "s")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for criterion in criteria:
        start = time.perf_counter()
        rankings = importance.rank(model, groups.groups, feeds, criterion, scales=scales, threads=threads)
        ranked = time.perf_counter() - start
        for part in saved:
            start = time.perf_counter()
            removed = groups.feasible(allocation.allocate(costs, rankings, part, steps))
            if criterion == "obs":
                removed = swapped(model, groups, removed, rankings, feeds, threads=threads)
            models = {
                "cut": channel_cuts.cut(model, removed),
                "repaired": repaired(model, removed, feeds, threads=threads),
            }
            seconds = ranked + time.perf_counter() - start
            with TemporaryDirectory() as folder:
                found = fidelity.compare(
                    Session(path, threads=threads, optimise=False),
                    {n: Session(model_io.session_source(m, Path(folder)), threads=threads) for n, m in models.items()},
                    this.judged.batches(8),
                    images=len(this.judged),
                    metric=this.metric,
                    labelled=this.metric is None and this.judged.labels() is not None,
                )
            end, before = found["repaired"], found["cut"]
            gone = 1 - model_io.parameters(models["repaired"]) / model_io.parameters(model)
            print(
                f"| {criterion} | {100 * (1 - costs.of(removed) / costs.of({})):.1f} | {100 * gone:.1f} | {end.metric} "
                f"| {end.reference:.2f} | {before.value:.2f} | {end.value:.2f} "
                f"| {end.drop:+.2f} ({end.drop_low:+.2f} to {end.drop_high:+.2f}) | {end.outputs[0].sqnr_db:.1f} "
                f"| {seconds:.0f} |",
                flush=True,
            )


def main() -> None:
    """Run all cases, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--criteria", default="obs,l1,l2,bn,energy")
    parser.add_argument("--saved", default="0.3,0.5")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for case in CASES:
        if args.only in case.model:
            with TemporaryDirectory() as place:
                saved = [float(part) for part in args.saved.split(",")]
                run(case, args.data, Path(place), args.criteria.split(","), saved, args.threads)


if __name__ == "__main__":
    main()
