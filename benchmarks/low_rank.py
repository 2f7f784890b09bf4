"""Low rank: what knowing the images gains over knowing the weights alone, and what a part of a network costs.

    python benchmarks/low_rank.py --data DIR [--only resnet20] [--saved 30%,macs:30%] [--threads 1]
    python benchmarks/low_rank.py --model FILE --calib DIR --eval DIR [--saved macs:40%]

DIR as for int8.py. The first table has every layer that can be a chain, at half of its parameters in each form: the
SQNR of the layer's output on images that were not seen, with factors in the metric of what the layer reads on the
calibration images, and with those of the weight alone (truncated SVD, HOSVD with HOOI, Jaderberg's spatial form, ALS
for CP). Then: random choices of ranks, timed, beside what the latency table foretells
of them. The second table is `edgec compile --precision fp32 --low-rank PART`: no training, no labels.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import edgec
import numpy as np
from edgec.compiler import job, layers, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.fitting.images import repair_feeds
from edgec.compiler.latency.networks import time_networks
from edgec.compiler.latency.shapes import name_of
from edgec.compiler.latency.table import from_timed
from edgec.compiler.low_rank import menu, prices
from edgec.compiler.options import Options
from edgec.compiler.types import silent
from edgec.passes import factorize
from edgec.passes.factorize import Choice
from int8 import CASES, _part

#: Held-out images that the first table is measured on.
_IMAGES = 200


def forms(path: Path, calib: Path, held_out: Path, pre: str | None, threads: int) -> None:
    """Print the gain in dB of each form over the layers of one network."""
    original = model_io.load(path)
    this = job.resolve(
        path, original, Options(calib=calib, eval=held_out, precision="fp32", preprocess=pre, threads=threads), silent
    )
    assert this.images is not None and this.judged is not None
    model, _ = pipeline.run(original, pipeline.exact_passes(), None)
    start = time.perf_counter()
    feeds = repair_feeds(model, this.images, threads=threads)
    known = {s.node.name: s for s in menu.seen(model, feeds, held_out=False)}
    few = this.judged.subset(range(0, len(this.judged), max(1, len(this.judged) // _IMAGES)))
    others = [batch.feed for batch in few.batches(16)]
    unseen = {s.node.name: s for s in menu.seen(model, others, held_out=False)}
    gains: dict[str, list[float]] = defaultdict(list)
    aware_db: dict[str, list[float]] = defaultdict(list)
    for name, layer in known.items():
        shape = layer.weight.shape
        plain = [np.eye(layer.weight[0, 0].size)] * len(layer.weight)
        for choice in filter(None, (_half(form, shape) for form in factorize.forms(shape))):
            errors = [
                unseen[name].lost(factorize.composed(choice.fitted(layer.weight, metrics), shape))
                for metrics in (layer.metrics, plain)
            ]
            if min(errors) > 1e-12 * unseen[name].energy:
                gains[choice.form].append(10 * math.log10(errors[1] / errors[0]))
                aware_db[choice.form].append(-10 * math.log10(errors[0] / unseen[name].energy))
    print("| form | layers | SQNR dB, mean | gain dB, mean | least gain dB |\n|---|---|---|---|---|")
    for form, found in gains.items():
        mean = sum(aware_db[form]) / len(found)
        print(f"| {form} | {len(found)} | {mean:.1f} | {sum(found) / len(found):+.1f} | {min(found):+.1f} |")
    every = [gain for found in gains.values() for gain in found]
    print(f"| all | {len(every)} | | {sum(every) / len(every):+.1f} | {min(every):+.1f} |")
    print(f"\n{time.perf_counter() - start:.0f} s\n", flush=True)


def _half(form: str, shape: tuple[int, ...]) -> Choice | None:
    """Return the form with half of the parameters of a weight (groups, out, in, k…); None where that is no rank."""
    half = math.prod(shape) / 2
    if form != "tucker":
        rank = int(half / Choice(form, (1,)).weights(shape))
        return Choice(form, (rank,)) if rank else None
    choices = (
        Choice(form, (max(1, int(p * shape[1])), max(1, int(p * shape[2])))) for p in np.arange(0.95, 0.05, -0.02)
    )
    return next((choice for choice in choices if choice.weights(shape) <= half), None)


def foretold(path: Path, calib: Path, held_out: Path, pre: str | None, threads: int, count: int = 8) -> None:
    """Print by how much the speed-ups of random choices, none of them timed before, are foretold too large or small."""
    original = model_io.load(path)
    this = job.resolve(
        path, original, Options(calib=calib, eval=held_out, precision="fp32", preprocess=pre, threads=threads), silent
    )
    model, _ = pipeline.run(original, pipeline.exact_passes(), None)
    offered: dict[str, list[menu.Item]] = {}
    for node in model.graph:
        if node.op_type in layers.LINEAR and menu.objection(node) is None:
            weight = node.inputs[1]
            assert weight is not None and weight.const_value is not None
            found = menu.choices(menu.groups_of(node, tuple(weight.const_value.shape.numpy())))
            offered[name_of(node)] = [menu.Item(c, 0.0, 1, 1) for c in (None, *found)]
    feed, rng = job.one_input(this), np.random.default_rng(0)
    drawn = [{name: int(rng.integers(0, len(items))) for name, items in offered.items()} for _ in range(count)]
    timed, others = (
        time_networks([model, *(prices.network(model, plan, offered) for plan in plans)], feed, threads=threads,
                      seconds=0.5 * (1 + len(plans)))
        for plans in (prices.plans(offered), drawn)
    )  # fmt: skip
    table = from_timed(timed)
    ms = [table.call_ms + sum(table.ms(*node[:3]) or 0.0 for node in one.nodes) for one in others]
    off = [(ms[0] / a) / (others[0].whole_ms / b.whole_ms) - 1 for a, b in zip(ms[1:], others[1:], strict=True)]
    print(f"speed-ups of {count} random choices: off by {100 * np.mean(np.abs(off)):.1f} % on average, "
          f"from {100 * min(off):+.0f} to {100 * max(off):+.0f} %\n", flush=True)  # fmt: skip


def parts(path: Path, calib: Path, held_out: Path, pre: str | None, saved: list[str], threads: int) -> None:
    """Print what each part costs."""
    heads = ("asked for", "parameters saved %", "MACs saved %", "chains", "speed-up (95 %)", "foretold", "figure")
    heads += ("points lost (95 %)", "SQNR dB", "s")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for part in saved:
        with TemporaryDirectory() as out:
            start = time.perf_counter()
            report = edgec.compile(
                path, Path(out) / "out", calib=calib, eval=held_out, precision="fp32", low_rank=part,
                preprocess=pre, threads=threads,
            )  # fmt: skip
            seconds = time.perf_counter() - start
        r, f, m = report.low_rank, report.fidelity, report.result
        assert r is not None and f is not None
        if not r.kept or r.parameters_before is None or r.parameters_after is None:
            print(f"| {part} | {r.why} |{' |' * (len(heads) - 2)}", flush=True)
            continue
        speed = "" if m.speedup is None else f"{m.speedup:.2f}x ({m.speedup_low:.2f} to {m.speedup_high:.2f})"
        macs = 100 * (1 - (r.macs_after or 0) / r.macs_before) if r.macs_before else math.nan
        foretold = "" if r.predicted_speedup is None else f"{r.predicted_speedup:.2f}x"
        print(
            f"| {part} | {100 * (1 - r.parameters_after / r.parameters_before):.1f} | {macs:.1f} "
            f"| {sum(x.form is not None for x in r.layers)} of {len(r.layers)} | {speed} | {foretold} "
            f"| {f.metric} {f.value:.2f} "
            f"| {f.drop:+.2f} ({f.drop_low:+.2f} to {f.drop_high:+.2f}) | {f.outputs[0].sqnr_db:.1f} | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    """Run the cases named, or one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="resnet")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--saved", default="30%,macs:30%")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    saved = args.saved.split(",")
    if args.model is not None:
        print(f"\n### {args.model.stem}\n")
        forms(args.model, args.calib, args.eval, None, args.threads)
        foretold(args.model, args.calib, args.eval, None, args.threads)
        parts(args.model, args.calib, args.eval, None, saved, args.threads)
        return
    for case in CASES:
        if args.only in case.model:
            with TemporaryDirectory() as place:
                sidecar = Path(place) / "preprocess.yaml"
                sidecar.write_text(case.preprocess, encoding="utf-8")
                calib = _part(args.data / case.calib, case.calibrate_on, Path(place) / "calib")
                held_out = _part(args.data / case.eval, case.compare_on, Path(place) / "eval")
                print(f"\n### {case.model}\n")
                path = args.data / "models" / f"{case.model}.onnx"
                forms(path, calib, held_out, str(sidecar), args.threads)
                foretold(path, calib, held_out, str(sidecar), args.threads)
                parts(path, calib, held_out, str(sidecar), saved, args.threads)


if __name__ == "__main__":
    main()
