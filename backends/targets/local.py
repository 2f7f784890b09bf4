"""This machine as the target."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from ...compiler.types import Artifact, Measurement, Progress, silent
from ..base import Backend, Runner
from . import timing


class LocalTarget:
    """Runs and times artifacts in this process."""

    url, is_here = "local", True

    def check(self) -> None:
        """Do nothing: this machine is there."""

    def refuses(self, backend: Backend) -> str | None:
        """Return None: what a backend lacks here it says itself."""
        return None

    def open(self, backend: Backend, artifact: Artifact, threads: int) -> Runner:
        """Open an artifact in this process."""
        return backend.open(artifact, threads)

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

    def close(self) -> None:
        """Do nothing: artifacts ran in this process."""
