"""Quantization side by side with other tools: one run, the same images, the same judge, the same timing.

    python benchmarks/peers.py --setup VENVS                              once: a virtual environment for each tool
    python benchmarks/peers.py --data DIR --venvs VENVS --work WORK [--only resnet20,edgec,nncf]
    python benchmarks/peers.py --model FILE --calib DIR --eval DIR --preprocess FILE --venvs VENVS --work WORK

DIR as for int8.py. The tools stand in peers/run_*.py, each with its packages and configurations at its top; a peer that
cannot be installed, fails, or takes more than --limit is a row with the reason. Peers get the BN-folded file at opset
13 or above and the decoded images, edgec the raw file and the folder, through its command line, without its caches.
Nobody gets the images that are judged on: edgec chooses among its candidates on calibration images that it holds out
itself. An item of --precision is a row: a precision, and further options of `edgec compile` behind it.

What the peers made is kept in WORK by the content of model, images and script: a run that was broken off goes on where
it stopped (--retry runs those again that failed). edgec is run each time.

Judge: SQNR and top-1, agreement, or the F1 of boxes, over all held-out images, one at a time, against the raw file with
ONNX Runtime's optimisations off. Latency: ONNX Runtime, interleaved in this process (backends/targets/timing.py).
Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import edgec
import numpy as np
import onnx
import onnxruntime
from edgec.backends.ort import Session
from edgec.backends.targets.timing import interleave, median_interval
from edgec.calib import folder, preprocess
from edgec.compiler import model as model_io
from edgec.compiler.errors import DataError, ModelError
from edgec.compiler.fidelity import compare
from edgec.compiler.metrics import load_metric
from edgec.compiler.types import Fidelity
from int8 import CASES, _part, folded
from peers.runner import Made, ours, peer, set_up, tools

RAW, FOLDED = "raw file", "FP32 folded"
#: edgec's rows: as it comes, and quantized throughout as the peers do it.
WISHES = ("int8", "int8 --without mixed-precision")
#: Operators of ONNX Runtime's optimised graph that do the linear layers, on integers and on floats.
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger"}
FLOAT = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"}


# --------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Subject:
    """One model with its images: files and folders."""

    model: Path
    preprocess: str | None
    calib: Path
    eval: Path
    metric: str | None


def subjects(args: argparse.Namespace, place: Path) -> Iterator[Subject]:
    """Yield the model of the command line, or those of the data folder."""
    if args.model:
        yield Subject(args.model, args.preprocess, args.calib, args.eval, args.metric)
        return
    named = [case for case in CASES if any(name in case.model for name in args.only)]
    for case in named or CASES:
        here = place / case.model
        here.mkdir(parents=True)
        sidecar = here / "preprocess.yaml"
        sidecar.write_text(case.preprocess, encoding="utf-8")
        calib = _part(args.data / case.calib, case.calibrate_on, here / "calib")
        held_out = _part(args.data / case.eval, case.compare_on, here / "eval")
        yield Subject(args.data / "models" / f"{case.model}.onnx", str(sidecar), calib, held_out, case.metric)


# --------------------------------------------------------------------------------------------- one model


def run(subject: Subject, args: argparse.Namespace) -> None:
    """Quantize with all, judge all on the held-out images, time all interleaved; print the tables."""
    model = subject.model
    specs = model_io.input_specs(model_io.load(model))
    pre = preprocess.resolve(subject.preprocess, model, specs[0])
    calib, held_out = (folder.open_folder(d, pre, specs) for d in (subject.calib, subject.eval))
    work = prepared(model, calib, args.work)
    made = [Made(RAW, model), Made(FOLDED, work / "folded.onnx")]
    settings = {"venvs": args.venvs, "limit": args.limit, "retry": args.retry}
    made += [peer(t, config, work, **settings) for t in tools() if wanted(t.name, args) for config in t.configs]
    if wanted("edgec", args):
        options = {
            "--calib": subject.calib, "--preprocess": subject.preprocess, "--metric": subject.metric,
            "--threads": args.threads,
        }  # fmt: skip
        made += [ours(model, wish, options, work, limit=args.limit) for wish in args.precision]
    feed = dict(next(iter(held_out.batches(1))).feed)
    opened: dict[str, Session] = {}
    reference = Session(model, optimise=False)
    for i, one in enumerate(made):
        session = opens(one, feed, reference, args.threads)
        if isinstance(session, Session):
            opened[one.name] = session
        else:
            made[i] = Made(one.name, None, session, one.seconds, one.cpu_s, one.peak_mb)
    print("judging …", file=sys.stderr, flush=True)
    judged = compare(
        reference,
        {name: session for name, session in opened.items() if name != RAW},
        held_out.batches(1),
        images=len(held_out),
        metric=load_metric(subject.metric) if subject.metric else None,
        labelled=held_out.labels() is not None,
    )
    print("timing …", file=sys.stderr, flush=True)
    calls = {name: functools.partial(session.run, feed) for name, session in opened.items()}
    samples = interleave(calls, seconds=args.seconds, max_rounds=5000)
    rounds = len(samples[FOLDED])
    print(f"\n### {model.stem}: {len(calib)} images to calibrate, {len(held_out)} to compare, {rounds} rounds\n")
    print_results(made, judged, samples)
    print_costs(made)


def wanted(name: str, args: argparse.Namespace) -> bool:
    """Say whether a tool was asked for: all are where --only names none."""
    names = [n for n in args.only if n in {"edgec", *(t.name for t in tools())}]
    return not names or name in names


def prepared(model: Path, calib: folder.Folder, work: Path) -> Path:
    """Return the folder for this model and these images, with folded.onnx and calib.npy for the peers."""
    images = np.concatenate([array for batch in calib.batches(1) for array in batch.feed.values()])
    with TemporaryDirectory() as place:
        folded(model, Path(place) / "folded.onnx")
        data = (Path(place) / "folded.onnx").read_bytes()
    digest = hashlib.sha256(data + images.tobytes()).hexdigest()[:8]
    here = work.absolute() / f"{model.stem}-{digest}"
    here.mkdir(parents=True, exist_ok=True)
    (here / "folded.onnx").write_bytes(data)
    np.save(here / "calib.npy", images)
    return here


def opens(one: Made, feed: Mapping[str, np.ndarray], reference: Session, threads: int) -> Session | str:
    """Open a model and run it once; return the session, or why it cannot be compared."""
    if one.path is None:
        return one.reason or "nothing was written"
    try:
        session = Session(one.path, threads=threads)
        compare(reference, {one.name: session}, [folder.Batch(dict(feed), None, ("",), 1, 1)], images=1)
    except (ModelError, DataError) as error:
        return error.what
    return session


# --------------------------------------------------------------------------------------------- tables


def print_results(made: Sequence[Made], judged: Mapping[str, Fidelity], samples: Mapping[str, np.ndarray]) -> None:
    """Print quality and latency; a ratio is that of the paired samples, with its 95 % interval."""
    best = next((one.name for one in made if one.name.startswith("edgec") and one.name in samples), None)
    head = ["model", "SQNR dB", "figure", "points lost (95 %)", "agreement %", "ms", "speed-up over folded FP32 (95 %)"]
    _print_head([*head, f"its time over that of {best} (95 %)"] if best else head)
    for one in made:
        if one.reason:
            cells = [f"not measured: {one.reason.replace('|', ' ')}"] + [""] * (len(head) - 2 + bool(best))
        else:
            values = samples[one.name]
            cells = [*_quality(judged.get(one.name)), f"{np.median(values):.3f}", _ratio(samples[FOLDED] / values)]
            cells += [_ratio(values / samples[best])] if best else []
        print(f"| {one.name} | " + " | ".join(cells) + " |")


def _quality(found: Fidelity | None) -> list[str]:
    if found is None:
        return [""] * 4
    sqnr, agreement = found.outputs[0].sqnr_db, found.outputs[0].agreement
    return [
        "exact" if sqnr is None else f"{sqnr:.2f}",
        f"{found.metric} {found.value:.2f}",
        f"{found.drop:+.2f} ({found.drop_low:+.2f} to {found.drop_high:+.2f})",
        "" if agreement is None else f"{agreement:.2f}",
    ]


def print_costs(made: Sequence[Made]) -> None:
    """Print what quantizing took, the file's size, and how much of the work runs on integers."""
    print()
    _print_head(["model", "quantized in s", "CPU s", "peak MB", "KB", "MACs between Q/DQ %", "integer kernels"])
    for one in made:
        share, kernels = (None, None) if one.path is None else (integer_share(one.path), integer_kernels(one.path))
        size = None if one.path is None else model_io.size_bytes(one.path) / 1e3
        cells = [_number(one.seconds, 1), _number(one.cpu_s, 1), _number(one.peak_mb), _number(size)]
        cells += [_number(share), kernels or ""]
        print(f"| {one.name} | " + " | ".join(cells) + " |")


def integer_share(path: Path) -> float | None:
    """Return the percentage of multiply-adds whose two factors are quantized in the file; None for unknown shapes."""
    layers = edgec.inspect(path).layers
    if any(layer.macs is None for layer in layers):
        return None
    quantized = sum(layer.macs for layer in layers if " x " in layer.precision)
    return 100 * quantized / sum(layer.macs for layer in layers)


def integer_kernels(path: Path) -> str:
    """Return "n of m": how many of the linear layers ONNX Runtime's optimised graph computes on integers."""
    with TemporaryDirectory() as place:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(place) / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds = [
            node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
        ]
    integer = sum(kind in INTEGER for kind in kinds)
    return f"{integer} of {integer + sum(kind in FLOAT for kind in kinds)}"


def _print_head(columns: Sequence[str]) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))


def _ratio(samples: np.ndarray) -> str:
    median, low, high = median_interval(samples)
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# --------------------------------------------------------------------------------------------- command line


def main() -> None:
    """Set up the tools, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_argument
    names("--setup", type=Path, metavar="VENVS", help="install the tools there, and stop")
    names("--venvs", type=Path, default=Path("out/peers/venvs"), help="where --setup put them")
    names("--work", type=Path, default=Path("out/peers/work"), help="for what the peers made, kept between runs")
    names("--data", type=Path, help="the folder with the three models")
    names("--model", type=Path, help="another model; with --calib, --eval, --preprocess, --metric as edgec takes them")
    names("--calib", type=Path)
    names("--eval", type=Path)
    names("--preprocess")
    names("--metric")
    names("--only", type=_list, default=[], metavar="NAME,…", help="these models and these tools (edgec, nncf, …)")
    names("--precision", type=_list, default=list(WISHES), metavar="ITEM,…", help="what edgec compiles to, a row each")
    names("--threads", type=int, default=1)
    names("--seconds", type=float, default=30.0, help="to time each model, in all")
    names("--limit", type=int, default=240, help="CPU seconds after which a tool is stopped (thrice that by the clock)")
    names("--retry", action="store_true", help="run peers again that failed in an earlier run")
    args = parser.parse_args()
    known = ["edgec", *(t.name for t in tools())]
    for name in args.only:
        if name not in known and not any(name in case.model for case in CASES):
            parser.error(f"--only: no model and no tool is called {name}; tools: {', '.join(known)}")
    if args.setup:
        for tool in tools():
            if wanted(tool.name, args):
                print(f"{tool.name}: {set_up(tool, args.setup)}", flush=True)
        return
    if not args.data and not (args.model and args.calib and args.eval):
        parser.error("give --data, or --model with --calib and --eval")
    with TemporaryDirectory() as place:
        for subject in subjects(args, Path(place)):
            run(subject, args)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    main()
