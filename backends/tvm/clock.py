"""Times schedules where they will run: in this process, or on a board over RPC."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import tvm

logger = logging.getLogger(__name__)


class Clock(Protocol):
    """Builds functions and times them on the target."""

    def seconds(self, body: Any, repeats: int = 5) -> float | None:
        """Return the seconds that one call of a PrimFunc takes; None where it cannot be built or run."""


class Here:
    """Times in this process, on as many threads as the target says."""

    def __init__(self, target: Any, threads: int) -> None:
        """Take a TVM target of kind llvm for this machine."""
        self._target = target
        if threads:
            tvm.get_global_func("runtime.config_threadpool")(1, threads)

    def seconds(self, body: Any, repeats: int = 5) -> float | None:
        """Return the fastest of some repeats, of a millisecond each: what else runs here only adds time."""
        try:
            module = tvm.compile(body.with_attr("global_symbol", "main"), target=self._target)
            given = [tvm.runtime.tensor(array) for array in filled(body)]
            timer = module.mod.time_evaluator("main", tvm.cpu(), number=1, repeat=repeats, min_repeat_ms=1)
            return float(min(timer(*given).results))
        except Exception as error:  # TVM raises what it likes
            logger.debug("a schedule failed: %s", str(error).splitlines()[:1])
            return None


def filled(body: Any) -> list[np.ndarray]:
    """Return random numbers for a function's parameters: zeros may take another time."""
    rng = np.random.default_rng(0)
    found = []
    for parameter in body.params:
        buffer = parameter.ty if hasattr(parameter, "ty") else parameter
        shape, dtype = [int(i) for i in buffer.shape], str(buffer.dtype)
        numbers = rng.random(shape) if "float" in dtype else rng.integers(0, 2 if dtype == "bool" else 100, shape)
        found.append(numbers.astype(dtype))
    return found
