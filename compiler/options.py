"""What a person asks of a compile: the options, and the parsers of their units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .types import Budget

PRECISIONS = ("auto", "fp32", "fp16", "int8", "fp8", "int4", "w4a8")
#: The steps of quantization that `--without` can leave out, in their order.
STEPS = ("smooth", "absorb", "equalize", "ranges", "bias-correction", "rounding", "mixed-precision")
#: What cuts are made for: to be faster, or to be small, however fast that is.
GOALS = ("latency", "size")
#: What `--prune` and `--low-rank` can save a part of.
SAVED = {"macs": "MACs", "params": "parameters", "latency": "latency"}
METHODS = ("auto", "minmax", "percentile", "entropy", "mse")

_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_LONG_TIME = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Saving:
    """What `--prune` or `--low-rank` asks for: a part to save of "macs", "params" or "latency"; none for auto."""

    text: str
    kind: str = "macs"
    saved: tuple[float, ...] = ()


@dataclass(frozen=True)
class Options:
    """The options of `compile`, one field each; the defaults are those of the command line."""

    device: str = "local"
    backend: str = "auto"
    target: str | None = None
    calib: Path | None = None
    ranges: Path | None = None
    eval: Path | None = None
    metric: str | None = None
    preprocess: str | None = None
    precision: str = "auto"
    method: str = "auto"
    without: tuple[str, ...] = ()
    degrade: str = "clean"
    robust: bool = False
    prune: Saving | None = None
    low_rank: Saving | None = None
    goal: str = "latency"
    budget: Budget = Budget()
    time_budget: float | None = None
    tune: float = 60.0
    fixed_point: bool = False
    threads: int = 0
    seed: int = 0
    verify: bool = False
    force: bool = False


def parse_points(text: str) -> float:
    """Return "1%" or "1" as 1.0 points. UserError if it is neither."""
    return _number(text, {"%": 1.0, "": 1.0}, "--max-drop", "1% or 0.5%")


def parse_milliseconds(text: str) -> float:
    """Return "5ms", "800us" or "0.1s" in milliseconds. UserError otherwise."""
    return _number(text, _TIME, "--max-latency", "5ms, 800us or 0.1s")


def parse_seconds(text: str, option: str = "--time-budget") -> float:
    """Return "60", "60s", "2min" or "1h" in seconds. UserError otherwise."""
    return _number(text, _LONG_TIME, option, "60s, 2min or 1h")


def parse_steps(text: str) -> tuple[str, ...]:
    """Return "equalize,rounding" as the names of steps, each once. UserError for a name that is none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        fix = "choose among: " + ", ".join(STEPS)
        raise UserError(f"no step of quantization is called {unknown[0]!r}", where="--without", fix=fix)
    return names


def parse_prune(text: str) -> Saving:
    """Return "auto", "30%" (of the MACs), "macs:30%", "params:50%" or "latency:20%". UserError otherwise."""
    return _saving(text, "macs", "--prune", "auto, 30%, params:50% or latency:20%")


def parse_low_rank(text: str) -> Saving:
    """Return "auto", "30%" (of the parameters), "params:30%", "macs:30%" or "latency:20%". UserError otherwise."""
    return _saving(text, "params", "--low-rank", "auto, 30%, macs:30% or latency:20%")


def _saving(text: str, usual: str, option: str, examples: str) -> Saving:
    kind, colon, part = text.strip().partition(":")
    kind, part = (kind, part) if colon else (usual, kind)
    if part == "auto" and not colon:
        return Saving("auto", usual)
    if kind not in SAVED:
        fix = f"write it like {examples}"
        raise UserError(f"{kind!r} is nothing that can be saved", where=f"{option} {text}", fix=fix)
    percent = _number(part, {"%": 1.0}, option, examples)
    if not 0 < percent < 100:
        raise UserError(
            f"{part} is no part of a network", where=f"{option} {text}", fix="give more than 0% and less than 100%"
        )
    return Saving(f"{percent:g}% of the {SAVED[kind]}", kind, (percent / 100,))


def parse_bytes(text: str) -> int:
    """Return "4MB", "300KiB" or "1000B" in bytes. UserError otherwise."""
    return round(_number(text, _SIZE, "--max-size", "4MB, 300KB or 2MiB"))


def _number(text: str, units: Mapping[str, float], option: str, example: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z%]*)\s*", text)
    factor = units.get(found.group(2).lower()) if found else None
    if found is None or factor is None:
        raise UserError(f"{text!r} is not understood", where=option, fix=f"write it like {example}")
    return float(found.group(1)) * factor
