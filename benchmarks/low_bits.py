"""Few bits: weights of 4 and 3 bits, INT4 weights with INT8 activations, and FP8 beside INT8.

    python benchmarks/low_bits.py --data DIR [--vit DIR] [--only resnet20] [--threads 2]

DIR as for int8.py; the folder of --vit is what vit/make_models.py wrote. Two tables a model: top-1 (or SQNR) with the
weights rounded to nearest and by edgec, everything else in float; and the formats with 8 bits, with the same placement
and rounding of activations for all (van Baalen et al. 2023, "FP8 versus INT8 for efficient deep learning inference"):
the SQNR of the outputs, and by kind of layer the mean SQNR of a layer alone. Types that no kernel here has are rounded
by Q/DQ and computed with in float32. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from edgec.backends.ort import SIMULATED, Session
from edgec.calib import cache, folder, preprocess
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.fidelity import compare
from edgec.compiler.fitting.feeds import calibration_feeds
from edgec.compiler.quantization.quantizer import Quantizer, choose_ranges
from edgec.compiler.quantization.rounder import round_weights
from edgec.compiler.quantization.sensitivity import layer_errors
from edgec.compiler.types import Fidelity, QuantScheme, silent
from edgec.passes.placement import observed_tensors
from int8 import CASES, Case, _part

#: Weights only, per output channel; 3 bits are 4-bit integers of which only -3 to 3 are used.
WEIGHTS = {
    8: QuantScheme("w8", None, True, "int8", 127),
    4: QuantScheme("w4", None, True, "int4", 7),
    3: QuantScheme("w3", None, True, "int4", 3),
}
_FORMAT = QuantScheme("", "int8", True, bias="float32", placement="inputs", simulated=True)
#: Format -> scheme and method for ranges; all symmetric, one scale a tensor, one a channel of weights.
FORMATS: Mapping[str, tuple[QuantScheme, str]] = {
    "INT8, extremes": (_FORMAT, "minmax"),
    "INT8, least error": (_FORMAT, "mse"),
    "FP8 E4M3": (replace(_FORMAT, activation="float8e4m3fn", weight="float8e4m3fn", weight_max=448), "minmax"),
    "FP8 E5M2": (replace(_FORMAT, activation="float8e5m2", weight="float8e5m2", weight_max=57344), "minmax"),
}
VIT = (
    Case("vit_digits", "", "calib", "val"),
    Case("vit_random", "", "photos", "photos", None, (0, 60), (60, 100)),
)


def figure(found: Fidelity) -> str:
    """Return the figure, what was lost with its interval, and the SQNR."""
    sqnr = min((o.sqnr_db for o in found.outputs if o.sqnr_db is not None), default=float("nan"))
    lost = f"{found.drop:+.2f} ({found.drop_low:+.2f} to {found.drop_high:+.2f})" if found.drop is not None else ""
    return f"{found.metric} {found.value:.2f} | {lost} | {sqnr:.2f}"


def weights(case: Case, model: ir.Model, calib: folder.Folder, held_out: folder.Folder, threads: int) -> None:
    """Round the weights of all layers, first and last included, and judge."""
    print(f"\n### {case.model}: weights of few bits, activations in float\n")
    print("| bits | rounding | seconds | figure | points lost (95 %) | SQNR dB |\n|---|---|---|---|---|---|")
    opened = {}
    taken = {}
    for bits, scheme in WEIGHTS.items():
        quantizer = Quantizer(model, SIMULATED, scheme)
        opened[bits, "nearest"], taken[bits, "nearest"] = quantizer, 0.0
        if bits < 8:
            start = time.perf_counter()
            feeds = calibration_feeds(model, calib, threads=threads)
            done = round_weights(model, quantizer.step(), feeds, threads=threads)
            taken[bits, "edgec"] = time.perf_counter() - start
            opened[bits, "edgec"] = replace(quantizer, weights=done.weights, bias_shift=done.bias_shift)
    found = judged(case, model, {str(key): q.build().model for key, q in opened.items()}, held_out, threads)
    for key in opened:
        print(f"| {key[0]} | {key[1]} | {taken[key]:.0f} | {figure(found[str(key)])} |", flush=True)


def formats(case: Case, model: ir.Model, calib: folder.Folder, held_out: folder.Folder, threads: int) -> None:
    """Quantize in each format, judge, and compare layer by layer."""
    tensors = observed_tensors(model, SIMULATED)
    statistics = cache.collect_cached(
        model, tensors, calib, histogram=True, seed=0, threads=threads, progress=silent
    ).statistics
    built, own = {}, {}
    kinds = {node.name or "": kind(node) for node in model.graph}
    few = calib.subset(range(0, len(calib), max(1, len(calib) // 32)))
    for name, (scheme, method) in FORMATS.items():
        quantizer = Quantizer(model, SIMULATED, scheme, choose_ranges(statistics, method, scheme))
        built[name] = quantizer.build().model
        errors = layer_errors(model, built[name], few.batches(8), images=len(few), threads=threads, simulated=True)
        own[name] = {n: e.sqnr_db for n, e in errors.items() if kinds[n]}
    found = judged(case, model, built, held_out, threads)
    present = sorted({kinds[n] for n in next(iter(own.values()))})
    counts = {k: sum(kinds[n] == k for n in next(iter(own.values()))) for k in present}
    print(f"\n### {case.model}: formats with 8 bits\n")
    headings = ["format", "figure", "points lost (95 %)", "SQNR dB", *(f"{k} ({counts[k]})" for k in present)]
    print("| " + " | ".join(headings) + " |")
    print("|---" * (4 + len(present)) + "|")
    for name in FORMATS:
        cells = [f"{np.mean([db for n, db in own[name].items() if kinds[n] == k]):.1f}" for k in present]
        print(f"| {name} | {figure(found[name])} | " + " | ".join(cells) + " |", flush=True)


def kind(node: ir.Node) -> str:
    """Return what kind of layer a node is; nothing for what is no layer."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or node.inputs[1].const_value is None:
        return ""
    if node.op_type != "Conv":
        return node.op_type
    groups, kernel = node.attributes.get_int("group", 1), node.inputs[1].const_value.shape.numpy()[2:]
    if groups > 1:
        return "Conv, depthwise"
    return "Conv 1x1" if max(kernel) == 1 else "Conv k x k"


def judged(
    case: Case, model: ir.Model, models: Mapping[str, ir.Model], held_out: folder.Folder, threads: int
) -> dict[str, Fidelity]:
    """Compare the models with the float one on the held-out images."""
    from edgec.compiler.metrics import load_metric

    with TemporaryDirectory() as place:

        def session(one: ir.Model, name: str) -> Session:
            path = Path(place) / f"{name}.onnx"
            model_io.save(one, path)
            return Session(path, threads=threads, fuse_quantized=False)

        return compare(
            session(model, "float"),
            {name: session(one, str(i)) for i, (name, one) in enumerate(models.items())},
            held_out.batches(20),
            images=len(held_out),
            metric=load_metric(case.metric) if case.metric else None,
            labelled=held_out.labels() is not None,
        )


def cases(args: argparse.Namespace) -> Iterable[tuple[Case, Path, Path, Path]]:
    """Yield each case with its model's file and the folders of its images."""
    for case in CASES:
        yield case, args.data / "models" / f"{case.model}.onnx", args.data / case.calib, args.data / case.eval
    if args.vit:
        found = {path.stem: path for path in sorted(args.vit.rglob("*.onnx"))}
        for case in VIT:
            path = next((found[name] for name in sorted(found) if name.startswith(case.model)), None)
            if path is not None:
                home = args.data if case.calib == "photos" else path.parent
                yield case, path, home / case.calib, home / case.eval


def main() -> None:
    """Run all models whose name fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vit", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=("weights", "formats"))
    args = parser.parse_args()
    for case, path, calib_dir, eval_dir in cases(args):
        if args.only not in case.model:
            continue
        with TemporaryDirectory() as temporary:
            work = Path(temporary)
            sidecar = work / "preprocess.yaml"
            sidecar.write_text(case.preprocess, encoding="utf-8")
            original = model_io.load(path)
            specs = model_io.input_specs(original)
            pre = preprocess.resolve(str(sidecar) if case.preprocess else None, path, specs[0])
            calib = folder.open_folder(_part(calib_dir, case.calibrate_on, work / "calib"), pre, specs)
            held_out = folder.open_folder(_part(eval_dir, case.compare_on, work / "eval"), pre, specs)
            model, _ = pipeline.run(original, pipeline.exact_passes(21), None)
            if args.part in (None, "weights"):
                weights(case, model, calib, held_out, args.threads)
            if args.part in (None, "formats"):
                formats(case, model, calib, held_out, args.threads)


if __name__ == "__main__":
    main()
