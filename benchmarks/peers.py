"""Quantization side by side with other tools: one run, the same images, the same judge, the same timing.

    python benchmarks/peers.py --setup VENVS                              once: a virtual environment for each tool
    python benchmarks/peers.py --data DIR --venvs VENVS --work WORK [--only resnet20,edgec,nncf] [--precision int8,w4a8]
    python benchmarks/peers.py --model FILE --calib DIR --eval DIR --preprocess FILE --venvs VENVS --work WORK

DIR as for int8.py. The tools stand in peers/run_*.py, each with its packages and configurations at its top; a peer that
cannot be installed, fails, or takes longer than --limit is a row with the reason. Peers get the BN-folded file at opset
13 or above and the decoded images, edgec the raw file and the folder, through its command line, without its caches.

Results of the peers are kept in WORK by the content of model, images and script: a run that was broken off goes on where
it stopped (--retry runs those again that failed). edgec is run each time.

Judge: SQNR and top-1, agreement, or the F1 of boxes, over all held-out images, one at a time, against the raw file with
ONNX Runtime's optimisations off. Latency: ONNX Runtime, interleaved in this process (backends/targets/timing.py).
Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

PEERS = Path(__file__).with_suffix("")
RAW, FOLDED = "raw file", "FP32 folded"
#: No tool shall call home, and none shall look for a GPU.
ENVIRONMENT = {
    "OLIVE_DISABLE_TELEMETRY": "1",
    "NNCF_CI": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
#: Operators of ONNX Runtime's optimised graph that do the linear layers, on integers and on floats.
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger"}
FLOAT = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"}


# --------------------------------------------------------------------------------------------- the tools


@dataclass(frozen=True)
class Tool:
    """One peer: its script and what the script's head says."""

    name: str
    script: Path
    dependencies: tuple[str, ...]
    configs: tuple[str, ...]


def tools() -> list[Tool]:
    """Read the heads of the scripts (inline script metadata, PEP 723)."""
    found = []
    for script in sorted(PEERS.glob("run_*.py")):
        block = re.search(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", script.read_text(encoding="utf-8"))
        assert block is not None, f"{script} has no inline metadata"
        head = tomllib.loads("\n".join(line[2:] for line in block[1].splitlines()))
        configs = head["tool"]["peers"]["configs"]
        found.append(Tool(script.stem.removeprefix("run_"), script, tuple(head["dependencies"]), tuple(configs)))
    return found


def python_of(venv: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return venv / "bin" / "python"


def set_up(tool: Tool, venvs: Path) -> str:
    """Make the tool's environment, unless it is there with these packages; return "ready" or why it is not.

    Ends with a first import, which with some tools builds code.
    """
    venv, wanted = venvs / tool.name, json.dumps(tool.dependencies)
    ready, failed = venv / "ready.json", venv / "failed.txt"
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return "ready"
    venv.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    for command in (
        [sys.executable, "-m", "venv", venv],
        [python_of(venv), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *tool.dependencies],
        [python_of(venv), tool.script],
    ):
        done = subprocess.run(
            command, cwd=venv, env=_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            failed.write_text(done.stdout, encoding="utf-8")
            return f"not installed: {_last_line(done.stdout)}"
    ready.write_text(wanted, encoding="utf-8")
    return "ready"


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **more}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|InvalidGraph|Fail)\b", line)]
    return (errors or lines or ["no output"])[-1][:160]


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


@dataclass(frozen=True)
class Made:
    """What one tool made of the model: `path` is None where it made nothing, and `reason` says why.

    `seconds` is the tool's own call, `cpu_s` and `peak_mb` are those of the whole process, imports included.
    """

    name: str
    path: Path | None = None
    reason: str | None = None
    seconds: float | None = None
    cpu_s: float | None = None
    peak_mb: float | None = None


def launch(
    command: Sequence[object], here: Path, limit: int, cwd: Path | None = None, **environment: str
) -> tuple[dict[str, Any], str]:
    """Run a command, its log going to the folder `here`; return what it took (launch.py) and what it printed."""
    spent, log = here / "spent.json", here / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(
            [sys.executable, PEERS / "launch.py", str(limit), spent, *map(str, command)],
            cwd=cwd, env=_environment(**environment), stdout=stream, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    return json.loads(spent.read_text(encoding="utf-8")), log.read_text(encoding="utf-8", errors="replace")


def peer(tool: Tool, config: str, work: Path, args: argparse.Namespace) -> Made:
    """Quantize work/folded.onnx with a peer, or take what an earlier run made."""
    name = f"{tool.name} {config}"
    venv = args.venvs / tool.name
    if not (venv / "ready.json").exists():
        failed = venv / "failed.txt"
        return Made(name, reason=_last_line(failed.read_text(encoding="utf-8")) if failed.exists() else "not installed")
    digest = hashlib.sha256(tool.script.read_bytes() + (PEERS / "common.py").read_bytes()).hexdigest()[:8]
    here = work / f"{tool.name}-{config.replace(' ', '-')}-{digest}"
    record = here / "record.json"
    if record.exists():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["reason"] is None or not args.retry:
            return _made(name, here, known)
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    out = here / "model.onnx"
    command = [python_of(venv), tool.script, work / "folded.onnx", work / "calib.npy", out, config]
    print(f"{name} …", file=sys.stderr, flush=True)
    spent, log = launch(command, here, args.limit, cwd=here)  # some leave files where they stand
    reason = None
    if spent["exit"] is None:
        reason = f"stopped after {args.limit} CPU seconds"
    elif spent["exit"] or not out.exists():
        reason = _last_line(log)
    seconds = here / "seconds.json"
    known = {**spent, "reason": reason, "seconds": json.loads(seconds.read_text(encoding="utf-8")) if seconds.exists() else None}
    record.write_text(json.dumps(known), encoding="utf-8")
    return _made(name, here, known)


def _made(name: str, here: Path, known: Mapping[str, Any]) -> Made:
    path = None if known["reason"] else here / "model.onnx"
    return Made(name, path, known["reason"], known["seconds"], known["cpu_s"], known["peak_mb"])


def ours(subject: Subject, precision: str, work: Path, args: argparse.Namespace) -> Made:
    """Compile the raw file through edgec's command line, with an empty cache."""
    name, here = f"edgec {precision}", work / f"edgec-{precision}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    options = {
        "-o": here / "bundle", "--calib": subject.calib, "--eval": subject.eval, "--preprocess": subject.preprocess,
        "--metric": subject.metric, "--precision": precision, "--threads": args.threads,
    }  # fmt: skip
    given = [part for option, value in options.items() if value is not None for part in (option, value)]
    print(f"{name} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "edgec", "compile", subject.model, *given]
    spent, log = launch(command, here, args.limit, XDG_CACHE_HOME=str(here / "cache"))
    if spent["exit"]:
        return Made(name, None, _last_line(log), None, spent["cpu_s"], spent["peak_mb"])
    if spent["exit"] is None:
        return Made(name, None, f"stopped after {args.limit} CPU seconds", None, spent["cpu_s"], spent["peak_mb"])
    report = edgec.inspect(here / "bundle")
    return Made(name, here / "bundle" / "model.onnx", None, report.seconds, spent["cpu_s"], spent["peak_mb"])


# --------------------------------------------------------------------------------------------- one model


def run(subject: Subject, args: argparse.Namespace) -> None:
    """Quantize with all, judge all on the held-out images, time all interleaved; print the tables."""
    model = subject.model
    specs = model_io.input_specs(model_io.load(model))
    pre = preprocess.resolve(subject.preprocess, model, specs[0])
    calib, held_out = (folder.open_folder(d, pre, specs) for d in (subject.calib, subject.eval))
    work = prepared(model, calib, args.work)
    made = [Made(RAW, model), Made(FOLDED, work / "folded.onnx")]
    made += [peer(t, config, work, args) for t in tools() if wanted(t.name, args) for config in t.configs]
    if wanted("edgec", args):
        made += [ours(subject, precision, work, args) for precision in args.precision]
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
    digest = hashlib.sha256(model.read_bytes() + images.tobytes()).hexdigest()[:8]
    here = work.absolute() / f"{model.stem}-{digest}"
    here.mkdir(parents=True, exist_ok=True)
    if not (here / "folded.onnx").exists():
        folded(model, here / "part.onnx").replace(here / "folded.onnx")
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
    """Return the percentage of multiply-adds whose two factors are quantized in the file; None if shapes are unknown."""
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
        kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node]
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
    names("--precision", type=_list, default=["int8"], metavar="NAME,…", help="what edgec compiles to, a row each")
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
    args.venvs = args.venvs.absolute()
    with TemporaryDirectory() as place:
        for subject in subjects(args, Path(place)):
            run(subject, args)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    main()
