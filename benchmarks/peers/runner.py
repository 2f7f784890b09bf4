"""Installs the tools, runs them, and keeps what they made: peers.py's other half.

A tool is a script run_NAME.py, whose head names its packages and configurations (inline script metadata, PEP 723).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgec
from edgec.compiler.types import Report

HERE = Path(__file__).parent
#: No tool shall call home, and none shall look for a GPU.
ENVIRONMENT = {
    "OLIVE_DISABLE_TELEMETRY": "1",
    "NNCF_CI": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Tool:
    """One peer: its script and what the script's head says."""

    name: str
    script: Path
    dependencies: tuple[str, ...]
    configs: tuple[str, ...]


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


def tools() -> list[Tool]:
    """Read the heads of the scripts."""
    found = []
    for script in sorted(HERE.glob("run_*.py")):
        block = re.search(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", script.read_text(encoding="utf-8"))
        assert block is not None, f"{script} has no inline metadata"
        head = tomllib.loads("\n".join(line[2:] for line in block[1].splitlines()))
        configs = head["tool"]["peers"]["configs"]
        found.append(Tool(script.stem.removeprefix("run_"), script, tuple(head["dependencies"]), tuple(configs)))
    return found


# --------------------------------------------------------------------------------------------- installing


def set_up(tool: Tool, venvs: Path) -> str:
    """Make the tool's environment, unless it is there with these packages; return "ready" or why it is not.

    Ends with a first import, which with some tools builds code.
    """
    venv, packages = venvs.absolute() / tool.name, json.dumps(tool.dependencies)
    ready, failed = venv / "ready.json", venv / "failed.txt"
    if ready.exists() and ready.read_text(encoding="utf-8") == packages:
        return "ready"
    venv.mkdir(parents=True, exist_ok=True)
    ready.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    for command in (
        [sys.executable, "-m", "venv", venv],
        [_python(venv), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *tool.dependencies],
        [_python(venv), tool.script],
    ):
        done = subprocess.run(
            command, cwd=venv, env=os.environ | ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            failed.write_text(done.stdout, encoding="utf-8")
            return f"not installed: {_complaint(done.stdout)}"
    ready.write_text(packages, encoding="utf-8")
    return "ready"


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _complaint(log: str) -> str:
    """Return the last line that names an error, or else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|ERROR|Exception|InvalidGraph|Fail)\b", line)]
    return (errors or lines or ["it printed nothing"])[-1][:160]


# --------------------------------------------------------------------------------------------- running


def peer(tool: Tool, config: str, work: Path, *, venvs: Path, limit: int, retry: bool) -> Made:
    """Quantize work/folded.onnx with a peer and work/calib.npy, or take what an earlier run made."""
    name, venv = f"{tool.name} {config}", venvs.absolute() / tool.name
    if not (venv / "ready.json").exists():
        failed = venv / "failed.txt"
        log = failed.read_text(encoding="utf-8") if failed.exists() else "run --setup"
        return Made(name, reason=f"not installed: {_complaint(log)}")
    digest = hashlib.sha256(tool.script.read_bytes() + (HERE / "common.py").read_bytes()).hexdigest()[:8]
    here = work / f"{tool.name}-{config.replace(' ', '-')}-{digest}"
    record = here / "record.json"
    if record.exists():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["reason"] is None or not retry:
            return _made(name, here / "model.onnx", known)
    out = _empty(here) / "model.onnx"
    command = [_python(venv), tool.script, work / "folded.onnx", work / "calib.npy", out, config]
    known = _launch(name, command, here, out, limit, cwd=here)  # some leave files where they stand
    seconds = here / "seconds.json"
    known["seconds"] = json.loads(seconds.read_text(encoding="utf-8")) if seconds.exists() else None
    part = here / "record.part"
    part.write_text(json.dumps(known), encoding="utf-8")
    part.replace(record)
    return _made(name, out, known)


def ours(model: Path, wish: str, options: Mapping[str, object], work: Path, *, limit: int) -> Made:
    """Compile the raw file through edgec's command line, with an empty cache; options of None are left out.

    `wish` is a precision, and further options of `edgec compile` behind it, split at spaces.
    """
    name, here = f"edgec {wish}", _empty(work / f"edgec-{wish.replace(' ', '-')}")
    given = [part for option, value in options.items() if value is not None for part in (option, value)]
    out = here / "bundle" / "model.onnx"
    wished = ["--precision", *wish.split()]
    command = [sys.executable, "-m", "edgec", "compile", model, "-o", out.parent, *wished, *given]
    known = _launch(name, command, here, out, limit, environment={"XDG_CACHE_HOME": str(here / "cache")})
    report = None if known["reason"] else edgec.inspect(out.parent)
    return _made(name, out, {**known, "seconds": report.seconds if isinstance(report, Report) else None})


def _launch(
    name: str, command: Sequence[object], here: Path, out: Path, limit: int, *,
    cwd: Path | None = None, environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a command that shall write `out`; return what it took (launch.py) and the reason if it did not."""
    print(f"{name} …", file=sys.stderr, flush=True)
    spent, log = here / "spent.json", here / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(
            [sys.executable, HERE / "launch.py", str(limit), spent, *map(str, command)],
            cwd=cwd, env=os.environ | ENVIRONMENT | dict(environment or {}), stdout=stream, stderr=subprocess.STDOUT,
            check=True,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(spent.read_text(encoding="utf-8"))
    reason = None
    if found["exit"] is None:
        reason = f"stopped after {limit} CPU seconds, or {3 * limit} by the clock"
    elif found["exit"] or not out.exists():
        reason = _complaint(log.read_text(encoding="utf-8", errors="replace"))
    return {**found, "reason": reason}


def _made(name: str, out: Path, known: Mapping[str, Any]) -> Made:
    path = None if known["reason"] else out
    return Made(name, path, known["reason"], known["seconds"], known["cpu_s"], known["peak_mb"])


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
