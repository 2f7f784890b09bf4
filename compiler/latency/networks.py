"""Whole networks timed side by side, with and without the profiler: what the table of latencies is made of."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...backends.ort import Session
from ...backends.targets import timing
from .. import model as model_io
from ..types import Progress, silent
from .attribution import by_node
from .kernel_times import profile, undisturbed
from .shapes import shapes
from .table import Timed

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Rounds that are run at least, however long they take.
_ROUNDS = 12


def time_networks(
    models: Sequence[ir.Model],
    feed: Mapping[str, np.ndarray],
    *,
    axes: Mapping[str, int] | None = None,
    run_as: Callable[[ir.Model], ir.Model] = lambda model: model,
    threads: int = 0,
    seconds: float = 6.0,
    progress: Progress = silent,
) -> list[Timed]:
    """Time float networks on one input, in turn; `run_as` makes of each what really runs (quantized, say).

    `axes` as for shapes().
    `seconds` in all, half of them with the profiler.
    """
    with TemporaryDirectory() as folder:
        paths = {str(i): Path(folder) / f"{i}.onnx" for i in range(len(models))}
        for path, model in zip(paths.values(), models, strict=True):
            model_io.save(run_as(model), path)
        sessions = {name: Session(path, threads=threads) for name, path in paths.items()}
        calls = {name: functools.partial(session.run, feed) for name, session in sessions.items()}
        whole = timing.interleave(calls, seconds=seconds / 2, warm_up=0.05, min_rounds=_ROUNDS, progress=progress)
        del calls, sessions
        kernels = profile(paths, feed, threads=threads, deadline=time.monotonic() + seconds / 2, progress=progress)
    found = []
    for name, model in zip(paths, models, strict=True):
        of_nodes = by_node(kernels[name], model)
        rows = []
        for shape in shapes(model, feed, axes):
            ms, count = of_nodes.pop(shape.node, (0.0, 0))
            rows.append((shape.family, *shape.amounts({}), ms, count))
        rows += [(f"unknown {node}", 1.0, 1.0, ms, count) for node, (ms, count) in of_nodes.items()]
        found.append(Timed(rows, undisturbed(whole[name])))
    return found
