"""Rounds over opened models: each once a round, in an order drawn anew, so that a drift of the clock hits all alike.

A round's value of a model is its call's milliseconds, or where a runtime times in blocks the median of a block; the
ratios that matter are those within a round. Latency is measured alone; copies, throughput, kernels and energy come
after it, each in runs of their own: they would disturb it.
"""

import random
import statistics
import time
from typing import Any, Dict, List

from .faults import Fault
from .opened import Opened, Tell
from .power import Meter, Sensors

#: Rounds at least and at most, and of a runtime that times in blocks.
ROUNDS, MOST, BLOCKS = 50, 2000, 7
#: Clocks that are told of with every measurement.
_CLOCKS = ("cpu", "gpu")
#: Calls of a model that are timed kernel by kernel.
_PROFILED = 30


def measure(opened: Dict[str, Opened], job: Dict[str, Any], sensors: Sensors, tell: Tell) -> Dict[str, Dict[str, Any]]:
    """Return what was measured of each model: milliseconds, calls a second, joules a call."""
    seconds = float(job.get("seconds", 4.0))
    warm_up(opened, float(job.get("warm_up", 0.5)))
    calls, rounds = interleave(opened, seconds, int(job.get("seed", 0)), tell)
    found = {}
    for n, (name, one) in enumerate(opened.items()):
        tell("measuring copies, throughput and power", n, len(opened))
        entry: Dict[str, Any] = {"provider": one.provider, "calls": calls[name], "rounds": rounds[name]}
        entry.update(one.facts)
        try:
            if job.get("extras", True):
                entry.update(_extras(one, sensors, min(1.0, seconds / 4)))
            if job.get("profile"):
                kernels = one.profile(_PROFILED)
                entry["kernels"] = None if kernels is None else [[k.name, list(k.nodes), k.ms] for k in kernels]
        except Fault as fault:  # the latency is measured: what is beside it shall not cost it
            entry["beside"] = fault.what
        found[name] = entry
    return found


def state_in_words(before: Dict[str, Any], after: Dict[str, Any]) -> str:
    """Return the clocks and the hottest zone before and after, as far as the device tells them; else nothing."""
    told = []
    for name, clock in sorted(before.get("clocks", {}).items()):
        now = after.get("clocks", {}).get(name, {}).get("current")
        if name in _CLOCKS and clock.get("current") and now:
            locked = ", locked" if clock.get("locked") else ""
            told.append("%s %.0f MHz before and %.0f after%s" % (name, clock["current"], now, locked))
    zones = [max(state["temperatures"].values()) for state in (before, after) if state.get("temperatures")]
    if len(zones) == 2:
        told.append("%.0f degrees Celsius before and %.0f after" % tuple(zones))
    return "; ".join(told)


def warm_up(opened: Dict[str, Opened], seconds: float) -> None:
    """Run each model for so many seconds, and three times at least: clocks rise, kernels are loaded."""
    for one in opened.values():
        if one.in_blocks:
            continue  # each block warms itself up
        end, runs = time.perf_counter() + seconds, 0
        while runs < 3 or time.perf_counter() < end:
            one.call()
            runs += 1


def interleave(opened: Dict[str, Opened], seconds: float, seed: int, tell: Tell) -> Any:
    """Return milliseconds of all calls, and of each round, by model; rounds are equally many for all."""
    blocks = any(one.in_blocks for one in opened.values())
    least, most = (BLOCKS, BLOCKS) if blocks else (ROUNDS, MOST)
    calls: Dict[str, List[float]] = {name: [] for name in opened}
    rounds: Dict[str, List[float]] = {name: [] for name in opened}
    order, draw = list(opened), random.Random(seed)
    end, done = time.perf_counter() + seconds, 0
    while done < most and (done < least or time.perf_counter() < end):
        draw.shuffle(order)
        for name in order:
            some = opened[name].sample()
            calls[name] += some
            rounds[name].append(statistics.median(some))
        done += 1
        tell("measuring latency", done, least if blocks else None)
    return calls, rounds


def median_of(one: Opened, seconds: float) -> float:
    """Return the median milliseconds of one model alone, warmed up."""
    warm_up({"": one}, 0.3)
    calls, _ = interleave({"": one}, seconds, 0, lambda *_: None)
    return float(statistics.median(calls[""]))


def _extras(one: Opened, sensors: Sensors, seconds: float) -> Dict[str, Any]:
    """Return copies, throughput and energy; None for each that this runtime, or the device, does not tell."""
    found: Dict[str, Any] = {"with_copies_ms": _copies(one), "throughput": one.throughput(seconds)}
    if one.in_blocks:
        return found
    meter, runs = Meter(sensors), 0
    meter.start()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not runs:
        one.call()
        runs += 1
    energy = meter.stop()
    if energy is not None:
        found.update(joules=energy.joules / runs, watts=energy.mean_watts, rail=energy.rail)
    return found


def _copies(one: Opened) -> Any:
    some: List[float] = []
    for _ in range(20):
        try:
            found = one.with_copies()
        except Fault:
            return None
        if found is None:
            return None
        some.append(found)
        if one.in_blocks:
            break
    return statistics.median(some)
