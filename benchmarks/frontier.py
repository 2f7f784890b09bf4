"""Mixed precision's frontier: error against latency, predicted and measured, with the share of MACs in INT8.

    python benchmarks/frontier.py --data DIR [--only fastestdet] [--threads 1] [--macs 0.5]

DIR as for int8.py. Layers' errors, layers' latencies, the integer program, then every point of its frontier is built,
judged on the held-out images and timed, all interleaved. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from edgec.backends.base import load as load_backend
from edgec.backends.ort import Session
from edgec.backends.targets.timing import interleave, median_interval
from edgec.calib import cache, folder, preprocess
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.devices import local_profile
from edgec.compiler.fidelity import compare
from edgec.compiler.metrics import load_metric
from edgec.compiler.mixed_precision import contributions, costs, mixed, program
from edgec.compiler.mixed_precision.switchboard import Switchboard
from edgec.compiler.mixed_precision.units import Wiring, wire
from edgec.compiler.quantization.quantizer import Quantizer, choose_ranges
from edgec.compiler.types import silent
from edgec.passes.placement import observed_tensors, place
from int8 import CASES, Case, _part


def macs(model: ir.Model) -> dict[str, float]:
    """Return the share of the multiply-adds of each Conv and Gemm."""
    found = {}
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm") and node.inputs[1].const_value is not None:
            outputs = math.prod(d for d in node.outputs[0].shape[2:] if isinstance(d, int))
            found[node.name] = math.prod(node.inputs[1].const_value.shape) * outputs
    return {name: count / sum(found.values()) for name, count in found.items()}


def quantizer_of(model: ir.Model, calib: folder.Folder, method: str, threads: int) -> Quantizer:
    """Return a quantizer with the machine's own scheme, its ranges by `method` and its biases corrected."""
    backend = load_backend("ort")
    scheme = backend.schemes(local_profile())["int8"]
    tensors = observed_tensors(model, backend.supports)
    found = cache.collect_cached(model, tensors, calib, histogram=True, seed=0, threads=threads, progress=silent)
    ranges = choose_ranges(found.statistics, method, scheme)
    return Quantizer(model, backend.supports, scheme, ranges, method).corrected(calib, threads, silent)


def run(case: Case, args: argparse.Namespace) -> None:
    """Search one model's frontier and print it."""
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        path = args.data / "models" / f"{case.model}.onnx"
        sidecar = work / "preprocess.yaml"
        sidecar.write_text(case.preprocess, encoding="utf-8")
        calib_dir = _part(args.data / case.calib, case.calibrate_on, work / "calib")
        eval_dir = _part(args.data / case.eval, case.compare_on, work / "eval")
        specs = model_io.input_specs(model_io.load(path))
        pre = preprocess.resolve(str(sidecar), path, specs[0])
        calib, held_out = (folder.open_folder(d, pre, specs) for d in (calib_dir, eval_dir))
        model, _ = pipeline.run(model_io.load(path), pipeline.exact_passes(13), None)
        quantizer = quantizer_of(model, calib, args.method, args.threads)
        placement = place(model, quantizer.ranges, quantizer.supports, quantizer.scheme, quantizer.kept)
        wiring = wire(model, placement)
        few = list(calib.subset(range(0, len(calib), max(1, len(calib) // args.images))).batches(16))
        feed = dict(few[0].feed)
        if feed[specs[0].name].shape[0] > 1:
            feed = {name: array[:1] for name, array in feed.items()}
        clock = time.perf_counter()
        bare = replace(quantizer, scheme=replace(quantizer.scheme, shield_float=False)).build().model
        board = Switchboard(model, bare, wiring, threads=args.threads)
        errors = contributions.measure(board, wiring, few, images=args.images, cumulative=False)
        told = f"errors {time.perf_counter() - clock:.0f} s (predicted within {errors.misfit_db:.1f} dB)"
        clock = time.perf_counter()
        build = functools.partial(built, quantizer, wiring)
        prices = costs.measure(build, wiring, feed, threads=args.threads, seconds=args.seconds)
        told += f", latencies {time.perf_counter() - clock:.0f} s (within {100 * prices.misfit:.0f} %)"
        clock = time.perf_counter()
        units = {unit.name for unit in wiring.units}
        share = {name: {mixed.FLOAT: part} for name, part in macs(model).items() if name in units}
        problem = mixed.mixed_problem(wiring, prices, errors, {"float_macs": share})
        found = program.frontier(problem, limits={"float_macs": 1 - args.macs}, points=args.points)
        print(f"\n### {case.model}: {told}, search {time.perf_counter() - clock:.0f} s\n")
        everything = mixed.Assignment(dict.fromkeys(problem.choices, mixed.INTEGER))
        everything = replace(everything, predicted=problem.amounts(everything.precision))
        nothing = mixed.Assignment(dict.fromkeys(problem.choices, mixed.FLOAT))
        nothing = replace(nothing, predicted=problem.amounts(nothing.precision))
        models = {"fp32": nothing, "int8": everything} | {f"mixed {i}": one for i, one in enumerate(found)}
        sessions = {}
        for name, one in models.items():
            file = work / f"{name}.onnx"
            model_io.save(model if name == "fp32" else build(one.having(mixed.INTEGER)), file)
            sessions[name] = Session(file, threads=args.threads)
        judged = compare(
            Session(path, optimise=False),
            sessions,
            held_out.batches(20),
            images=len(held_out),
            metric=load_metric(case.metric) if case.metric else None,
            labelled=held_out.labels() is not None,
        )
        calls = {name: functools.partial(session.run, feed) for name, session in sessions.items()}
        samples = interleave(calls, seconds=args.timing, max_rounds=5000)
    print("| model | MACs in INT8 | predicted dB | SQNR dB | figure | predicted ms | ms | speed-up over FP32 (95 %) |")
    print("|---|---|---|---|---|---|---|---|")
    for name, one in models.items():
        sqnr = judged[name].outputs[0].sqnr_db
        error = errors.expected(one.predicted["error"])
        ratio = median_interval(samples["fp32"] / samples[name])
        cells: Mapping[str, str] = {
            "model": name,
            "macs": f"{abs(1 - one.predicted['float_macs']):.3f}",
            "predicted": f"{-10 * math.log10(error):.2f}" if error else "",
            "sqnr": f"{sqnr:.2f}" if error and sqnr is not None else "",
            "figure": f"{judged[name].metric} {judged[name].value:.2f}",
            "predicted ms": f"{one.predicted['ms']:.3f}",
            "ms": f"{np.median(samples[name]):.3f}",
            "speed-up": f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})",
        }
        print("| " + " | ".join(cells.values()) + " |")


def built(quantizer: Quantizer, wiring: Wiring, integer: frozenset[str]) -> ir.Model:
    """Return the model in which these units, and no others, are quantized."""
    keep = {unit.name: "mixed precision keeps it in float" for unit in wiring.units if unit.name not in integer}
    return quantizer.build(keep).model


def main() -> None:
    """Run the models of the data folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=16, help="to measure errors on")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure layers' latencies")
    parser.add_argument("--timing", type=float, default=20.0, help="seconds to time the frontier's models")
    parser.add_argument("--macs", type=float, default=0.0, help="least share of the MACs in INT8")
    parser.add_argument("--points", type=int, default=7)
    parser.add_argument("--method", default="percentile", help="of choosing ranges")
    parser.add_argument("--only", help="run the models whose name holds this")
    args = parser.parse_args()
    for case in CASES:
        if not args.only or args.only in case.model:
            run(case, args)


if __name__ == "__main__":
    main()
