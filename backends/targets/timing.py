"""Interleaved latency measurement and its statistics.

The candidates run in turn in one process, so that a drift of the machine's speed hits all alike. The order is drawn
anew each round, and each runs once untimed just before it is timed: else whoever follows a large model would pay for
the caches that it left, and no model in use runs beside its rivals.
Per candidate: median, p90, p99, and a 95 % interval of the median that assumes no distribution: with n ordered
samples the interval lies between the ranks n/2 -+ 1.96 sqrt(n)/2 (binomial, normal approximation; see e.g.
Le Boudec, Performance Evaluation of Computer and Communication Systems, 2010, ch. 2). The speed-up is the median of
the per-round ratios baseline / candidate, its interval by the same ranks.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping

import numpy as np

from ...compiler.types import Measurement, Progress, silent

#: Rounds below which no 95 % interval can be stated with the ranks above.
MIN_ROUNDS = 30


def median_interval(samples: np.ndarray) -> tuple[float, float, float]:
    """Return (median, low, high) of a 1-D array, low and high being the 95 % interval of the median."""
    ordered = np.sort(samples)
    n = len(ordered)
    half = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 4.0,
    warm_up: float = 0.3,
    min_rounds: int = 50,
    max_rounds: int = 2000,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Time the calls in turn and return their samples in milliseconds, round by round (equal lengths).

    Runs for `seconds` in all, but at least `min_rounds` and at most `max_rounds` rounds. Each call is warmed up
    first, for its share of `warm_up` seconds and at least three times.
    """
    return in_turn(
        calls,
        {name: functools.partial(_milliseconds, call) for name, call in calls.items()},
        seconds=seconds,
        warm_up=warm_up,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        seed=seed,
        progress=progress,
    )


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    watches: Mapping[str, Callable[[], float]],
    *,
    seconds: float = 4.0,
    warm_up: float = 0.3,
    min_rounds: int = 50,
    max_rounds: int = 2000,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Interleave as above, by stop-watches of the target's own.

    A watch runs its call once untimed and once timed, and returns the milliseconds of the latter; `calls` warm up.
    """
    for call in calls.values():
        end, runs = time.perf_counter() + warm_up, 0
        while runs < 3 or time.perf_counter() < end:
            call()
            runs += 1
    samples: dict[str, list[float]] = {name: [] for name in watches}
    names, rng = list(watches), np.random.default_rng(seed)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < max_rounds and (rounds < min_rounds or time.perf_counter() < end):
        for name in (names[i] for i in rng.permutation(len(names))):
            samples[name].append(watches[name]())
        rounds += 1
        progress("measuring latency", rounds, None)
    return {name: np.array(values) for name, values in samples.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def summarise(
    samples: Mapping[str, np.ndarray],
    baseline: str,
    *,
    target: str,
    threads: int,
    batch: int,
    providers: Mapping[str, str],
    calls: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Measurement]:
    """Turn samples in milliseconds into measurements; `baseline` names the one that the others are compared with.

    Samples are paired round by round. Where each stands for several calls, `calls` are those.
    """
    result = {}
    for name, paired in samples.items():
        values = paired if calls is None else calls[name]
        median, low, high = median_interval(values)
        ratio = median_interval(samples[baseline] / paired) if name != baseline else (None, None, None)
        result[name] = Measurement(
            name=name,
            target=target,
            median_ms=median,
            low_ms=low,
            high_ms=high,
            p90_ms=float(np.percentile(values, 90)),
            p99_ms=float(np.percentile(values, 99)),
            runs=len(values),
            threads=threads,
            batch=batch,
            provider=providers[name],
            speedup=ratio[0],
            speedup_low=ratio[1],
            speedup_high=ratio[2],
            p5_ms=float(np.percentile(values, 5)),
        )
    return result
