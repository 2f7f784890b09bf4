"""Kernel times: what ONNX Runtime's profiler says of each node of the graphs that it really runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..types import Progress, silent


@dataclass(frozen=True)
class Kernel:
    """One node of an optimised graph: its name, operator, tensors, and the milliseconds of one call."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ms: float


def profile(
    models: Mapping[str, Path],
    feed: Mapping[str, np.ndarray],
    *,
    threads: int,
    rounds: int = 30,
    deadline: float | None = None,
    progress: Progress = silent,
) -> dict[str, list[Kernel]]:
    """Return the kernels of each ONNX file in execution order, with their times on this machine.

    The models run in turn, each once to warm up and once for the record, so that a drift of the machine's speed hits
    all alike. Times are the mean of the middle half. `deadline` is on time.monotonic's clock; five rounds are always
    run.
    """
    with TemporaryDirectory() as folder:
        sessions = {
            name: _profiled(path, Path(folder) / str(i), threads) for i, (name, path) in enumerate(models.items())
        }
        for done in range(rounds):
            if deadline is not None and done >= 5 and time.monotonic() > deadline:
                break
            for session in sessions.values():
                session.run(None, dict(feed))
                session.run(None, dict(feed))
            progress("timing the layers", done + 1, rounds)
        return {
            name: _kernels(Path(session.end_profiling()), Path(folder) / str(i) / "optimised.onnx")
            for i, (name, session) in enumerate(sessions.items())
        }


def _profiled(model: Path, folder: Path, threads: int):  # type: ignore[no-untyped-def]  # onnxruntime has no types
    import onnxruntime as ort

    folder.mkdir()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _kernels(profile: Path, optimised: Path) -> list[Kernel]:
    import onnx

    samples: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            samples.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1e3)
    graph = onnx.load(str(optimised), load_external_data=False).graph
    return [
        Kernel(node.name, node.op_type, tuple(node.input), tuple(node.output), undisturbed(samples[node.name][1::2]))
        for node in graph.node
        if node.name in samples
    ]


def undisturbed(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean between the 10 % and the 35 % quantile.

    Neighbours on the machine interrupt long kernels more often than short ones, so a median would distort the shares;
    the profiler counts whole microseconds, so a single quantile would be coarse.
    """
    ordered = np.sort(values)
    return float(ordered[len(ordered) // 10 : len(ordered) * 35 // 100 + 1].mean())
