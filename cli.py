"""The command line: parse, call the API, print. Heavy imports stand inside the commands, so that --help is instant."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .compiler import options as parse
from .compiler.errors import OutputError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from .compiler.types import Progress

_FILE = click.Path(path_type=Path)
_EPILOG = (
    "Exit codes: 0 done, 2 wrong input, 3 a stated budget cannot be met, 4 a target or toolchain is missing, 1 a bug."
)


def _threads(context: click.Context, option: click.Parameter, count: int) -> int:
    """Let numpy take no more threads than the runtime: OpenBLAS asks once, when it is loaded."""
    if count:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(count))
    return count


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG)
@click.version_option(__version__, prog_name="edgec")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr.")
def cli(verbose: bool) -> None:
    """Compile ONNX networks for a named edge device, with the proof attached.

    \b
    edgec compile model.onnx --calib images/        the fastest model for this machine that still does its job
    edgec inspect model.edgec --layers              what was done, layer by layer, and why
    edgec bench model.edgec --against model.onnx    its latency, measured here
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr, format="%(name)s: %(message)s"
    )


def main() -> None:
    """Run the command line; a person's mistake is a message and an exit code, a bug keeps its traceback."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        click.echo(f"edgec: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "edgec: interrupted; no bundle was left behind. What was measured is kept: run it again to go on", err=True
        )
        sys.exit(2)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = OutputError("the disk is full", where=error.filename, fix="free some space and run it again")
        click.echo(f"edgec: {full}", err=True)
        sys.exit(2)


@cli.command()
@click.argument("model", type=_FILE)
@click.option("-o", "--out", type=_FILE, help="Folder for the bundle.  [default: MODEL's name + .edgec]")
@click.option("--device", default="local", show_default=True, help="Named device (see: edgec devices).")
@click.option("--backend", default="auto", show_default=True, help="auto, ort, tensorrt or tvm.")
@click.option("--target", metavar="URL", help="Where to measure: local, ssh://USER@HOST, or rpc://HOST:PORT/KEY.")
@click.option(
    "--calib",
    type=_FILE,
    metavar="DIR",
    help="Images to calibrate on; a fifth of them is held out to judge by.",
)
@click.option("--ranges", type=_FILE, metavar="FILE", help="Ranges from edgec calibrate, in place of --calib.")
@click.option(
    "--eval",
    "eval_",
    type=_FILE,
    metavar="DIR",
    help="Images to judge by; sub-folders are classes, or box labels beside them.",
)
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="Your own judge: outputs -> boxes, or (outputs, reference) -> 0..1.",
)
@click.option(
    "--preprocess",
    metavar="NAME|FILE",
    help="How images become inputs.  [default: MODEL-stem.preprocess.yaml]",
)
@click.option(
    "--precision",
    type=click.Choice(parse.PRECISIONS),
    default="auto",
    show_default=True,
    help="auto keeps the fastest that holds the quality; what is named is done as asked.",
)
@click.option(
    "--method",
    type=click.Choice(parse.METHODS),
    default="auto",
    show_default=True,
    help="How the range of each tensor is chosen; auto compares them all.",
)
@click.option(
    "--without",
    metavar="STEP,...",
    default="",
    help=f"Steps of quantization to leave out: {', '.join(parse.STEPS)}.",
)
@click.option(
    "--degrade",
    metavar="clean|mixed[:F]|minimax|NAME,...",
    default="clean",
    show_default=True,
    help="Conditions to calibrate under: a mixture of noise, blur, low contrast, JPEG, …; or all of them together.",
)
@click.option(
    "--robust",
    is_flag=True,
    help="Calibrate on clean images, mixed and minimax; keep what held-out images show to be better. Takes 3 searches.",
)
@click.option(
    "--prune",
    metavar="auto|30%|params:50%|latency:20%",
    help="Cut channels, and repair what is left on the images of --calib: a part of the MACs, parameters or latency.",
)
@click.option(
    "--low-rank",
    metavar="auto|30%|macs:30%|latency:20%",
    help="Make chains of smaller layers, fitted to the images of --calib; a part of parameters, MACs or latency goes.",
)
@click.option(
    "--for",
    "goal",
    type=click.Choice(parse.GOALS),
    default="latency",
    show_default=True,
    help="What auto looks for in --prune and --low-rank: what is measured to be faster, or the smallest that holds.",
)
@click.option(
    "--time-budget", metavar="TIME", help="End the search after so long, e.g. 2min; run again, it goes on from there."
)
@click.option(
    "--tune", metavar="TIME", default="60s", show_default=True, help="Look for TVM's schedules for so long; 0: reuse."
)
@click.option("--fixed-point", is_flag=True, help="Requantize by integers alone, in TVM's INT8 modules.")
@click.option("--max-drop", metavar="POINTS", help="Most quality to lose.  [default: 1%]")
@click.option("--max-latency", metavar="TIME", help="E.g. 5ms.")
@click.option("--max-size", metavar="SIZE", help="E.g. 4MB.")
@click.option("--threads", type=click.IntRange(0), default=0, callback=_threads, help="CPU threads.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--verify", is_flag=True, help="Prove exact passes also on models over 1 GB.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def compile(
    model: Path,
    out: Path | None,
    max_drop: str | None,
    max_latency: str | None,
    max_size: str | None,
    time_budget: str | None,
    tune: str,
    eval_: Path | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Compile MODEL into a bundle with its report.

    The bundle holds the fastest artifact that still does its job on the device.

    \b
    Without --calib only exact passes run. With it, numbers of few bits are tried, judged on held-out images, and kept
    if they are measurably faster and lose no more than --max-drop. The report says where the error comes from.
    """
    from .compiler import api

    folder = out or Path(f"{model.stem}.edgec")
    budget: dict[str, Any] = {
        "max_drop": parse.parse_points(max_drop) if max_drop else None,
        "max_latency_ms": parse.parse_milliseconds(max_latency) if max_latency else None,
        "max_size_bytes": parse.parse_bytes(max_size) if max_size else None,
        "time_budget": parse.parse_seconds(time_budget) if time_budget else None,
        "tune": parse.parse_seconds(tune, "--tune"),
    }
    with _progress() as progress:
        report = api.compile(model, folder, eval=eval_, progress=progress, **budget, **rest)
    from .compiler.report import serial, terminal

    if as_json:
        _print_json(serial.to_json(report))
        return
    terminal.render(report, _console())
    click.echo(f"\nBundle  {folder}\nReport  {folder / 'report.html'}")
    if (folder / "recipe.json").is_file():
        click.echo(f"There   python3 {folder.name}/edgec-device.pyz, on the device")


@cli.command()
@click.argument("model", type=_FILE)
@click.argument("images", type=_FILE)
@click.option("-o", "--out", type=_FILE, required=True, help="The ranges file to write (JSON).")
@click.option("--method", type=click.Choice(parse.METHODS), default="auto", show_default=True)
@click.option(
    "--degrade",
    metavar="clean|mixed[:F]|minimax|NAME,...",
    default="clean",
    show_default=True,
    help="Conditions to calibrate under, as of compile.",
)
@click.option("--device", default="local", show_default=True, help="Whose quantization the ranges are for.")
@click.option("--preprocess", metavar="NAME|FILE", help="How images become inputs.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, callback=_threads, help="CPU threads.  [default: all]")
def calibrate(model: Path, images: Path, out: Path, **rest: Any) -> None:
    """Find tensor ranges on a folder of images.

    Writes what compile --ranges takes: the range of each tensor of MODEL that quantization asks for.
    (compile --calib does more with the images: it compares methods and corrects biases.)
    """
    from .compiler import api

    with _progress() as progress:
        ranges = api.calibrate(model, images, out, progress=progress, **rest)
    click.echo(f"{len(ranges)} ranges written to {out}", err=True)


@cli.command("eval")
@click.argument("model", type=_FILE, metavar="BUNDLE|MODEL")
@click.argument("images", type=_FILE)
@click.option(
    "--degrade",
    metavar="all|qrid|NAME,...",
    help="Also under conditions that cameras meet: noise, blur, low contrast, JPEG, …; each with a verdict.",
)
@click.option("--against", type=_FILE, metavar="MODEL", help="The reference.  [default: the bundle's original]")
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="Your own judge: outputs -> boxes, or (outputs, reference) -> 0..1.",
)
@click.option("--preprocess", metavar="NAME|FILE", help="How images become inputs.")
@click.option("--threads", type=click.IntRange(0), default=0, callback=_threads, help="CPU threads.  [default: all]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def evaluate(model: Path, images: Path, degrade: str | None, against: Path | None, as_json: bool, **rest: Any) -> None:
    """Judge a bundle or a model on images.

    By labels where the sub-folders of IMAGES are classes, or where box labels (YOLO or COCO) lie with them and --metric
    decodes boxes; else beside the original.
    """
    from .compiler import api, evaluation, show

    with _progress() as progress:
        judge = api.evaluate if degrade is None else functools.partial(api.robustness, degrade=degrade)
        result = judge(model, images, against=against, progress=progress, **rest)
    if as_json:
        _print_json(evaluation.to_json(model, against, result))
    else:
        show.quality(result, _console())


@cli.command()
@click.argument("path", type=_FILE, metavar="BUNDLE|MODEL|REPORT")
@click.option("--against", type=_FILE, metavar="OTHER", help="Show the two side by side.")
@click.option("--layers", is_flag=True, help="Each layer: precision, scale, clipping, SQNR, its share of the error.")
@click.option("--why", is_flag=True, help="Each node that was left as it was, and the reason.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write the report's page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect(path: Path, against: Path | None, layers: bool, why: bool, html: Path | None, as_json: bool) -> None:
    """Show what a bundle, a report.json or an ONNX file holds."""
    from .compiler import api, show

    show.inspect(
        api.inspect(path),
        api.inspect(against) if against else None,
        _console(),
        layers=layers,
        why=why,
        html=html,
        as_json=as_json,
        names=[str(p) for p in (path, against) if p],
    )


@cli.command()
@click.argument("model", type=_FILE, metavar="BUNDLE|MODEL")
@click.option("--against", type=_FILE, metavar="MODEL", help="The baseline, measured interleaved.")
@click.option(
    "--device", default="local", show_default=True, help="What a plain MODEL runs on: the CPU, or a GPU here."
)
@click.option("--target", default="local", show_default=True, help="local, ssh://USER@HOST, or rpc://HOST:PORT/KEY.")
@click.option("--threads", type=click.IntRange(0), default=0, callback=_threads, help="CPU threads.  [default: all]")
@click.option("--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True, help="How long to measure.")
@click.option("--builds", type=click.IntRange(1), default=1, help="Build TensorRT engines so often: an error bar.")
@click.option("--profile", is_flag=True, help="Time per operator as well.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def bench(model: Path, profile: bool, as_json: bool, **rest: Any) -> None:
    """Measure latency on this machine, or on a device.

    Median with its 95 % interval, p90 and p99, interleaved with the baseline where there is one.
    """
    from .compiler import api, benching, show

    shared = {name: rest[name] for name in ("device", "target", "threads")}
    with _progress() as progress:
        measured = api.bench(model, progress=progress, **rest)
        times = benching.operators(model, progress=progress, **shared) if profile else None
    show.bench(measured, _console(), times=times, as_json=as_json)


@cli.command()
@click.argument("name", required=False)
def devices(name: str | None) -> None:
    """List the devices, or show one.

    With NAME: its profile, each number with its source.
    """
    from .compiler import devices as table
    from .compiler.report import terminal

    if name:
        terminal.render_device(table.find(name), _console())
    else:
        terminal.render_devices(list(table.load_profiles().values()), _console())


@cli.command()
@click.option("--target", default="local", show_default=True, help="local, ssh://USER@HOST, or rpc://HOST:PORT[/KEY].")
def doctor(target: str) -> None:
    """Say what this machine, or a device, has and lacks, or what is connected to a tracker of boards."""
    from .compiler import doctor as examiner
    from .compiler.report import terminal

    title = {"local": "This machine", "ssh": f"The device behind {target}"}.get(target.partition(":")[0], "Boards")
    terminal.render_findings(examiner.examine(target), _console(), title)


# ------------------------------------------------------------------------------------------ printing


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=1, allow_nan=False))


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar with rate and time left on stderr, on a terminal only."""
    from .compiler.types import silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _bar_updater(bar)


def _bar_updater(bar: Any) -> Callable[[str, int, int | None], None]:
    tasks: dict[str, Any] = {}

    def update(what: str, done: int, total: int | None) -> None:
        name, _, found = what.partition(": ")  # what it has come to may follow
        if name not in tasks:
            tasks[name] = bar.add_task(what, total=total, rate="")
        task = bar.tasks[bar.task_ids.index(tasks[name])]
        rate = f"{task.speed:,.0f}/s" if task.speed and not found else ""
        bar.update(tasks[name], description=what, completed=done, total=total, rate=rate)

    return update
