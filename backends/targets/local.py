"""This machine as the target."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from ...compiler.types import Measurement, Progress, silent
from ..base import Runner
from . import timing


class LocalTarget:
    """Runs and times artifacts in this process."""

    url = "local"

    def measure(
        self,
        runners: Mapping[str, Runner],
        feed: Mapping[str, np.ndarray],
        *,
        baseline: str,
        threads: int,
        seconds: float = 4.0,
        progress: Progress = silent,
    ) -> dict[str, Measurement]:
        """Time the runners on the same input, interleaved; `baseline` names the one to compare with."""
        calls = {name: functools.partial(runner.run, feed) for name, runner in runners.items()}
        samples = timing.interleave(calls, seconds=seconds, progress=progress)
        batch = next((a.shape[0] for a in feed.values() if a.ndim), 1)
        return timing.summarise(
            samples,
            baseline,
            target=self.url,
            threads=threads,
            batch=batch,
            providers={name: runner.provider for name, runner in runners.items()},
        )
