"""The other backends: what was chosen runs on each that this machine has, side by side, and the fastest is handed over.

Only where the backend is left to `auto` and latency is measured here. The network is the same; each backend proves its
outputs itself when it builds, and what is handed over is judged on the images as it is built.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from ..backends import base as backends
from ..backends.base import Lowering
from ..backends.targets.local import LocalTarget
from . import guard, job, trials
from .errors import UserError
from .report import text
from .types import Attempt, Fidelity

if TYPE_CHECKING:
    from ..backends.base import Backend
    from .exploration import Explored
    from .job import Job


logger = logging.getLogger(__name__)


def raced(tried: Explored) -> tuple[Explored, tuple[str, ...]]:
    """Return what was explored, on the backend where it is fastest; a line for each backend that cannot run it."""
    this, told = tried.this, []
    if this.options.backend != "auto" or not isinstance(this.target, LocalTarget) or this.profile.kind != "cpu":
        return tried, ()
    for name in this.profile.backends:
        other = backends.load(name)
        if name == this.backend.name or other.unavailable() is not None:
            continue
        why = _objection(tried, other)
        if why is None:
            try:
                tried = _beside(tried, other.prepared(_lowering(this)))
            except UserError as error:
                why = str(error).splitlines()[0]
            except Exception as error:  # a rival's faults must not cost what there is
                logger.debug("%s failed", name, exc_info=True)
                why = f"it failed: {type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"
        if why is not None:
            told.append(f"{name} was not tried: {why}")
    return tried, tuple(told)


def _lowering(this: Job) -> Lowering:
    options, left = this.options, this.seconds_left
    tune = options.tune if left is None else min(options.tune, left)
    return Lowering(tune, this.threads, options.seed, this.progress, options.fixed_point, this.target)


def _objection(tried: Explored, other: Backend) -> str | None:
    """Return why another backend cannot have what was chosen."""
    found = other.schemes(tried.this.profile)[tried.chosen.precision]
    if isinstance(found, str):
        return found
    refused = other.check(tried.chosen.model, tried.this.profile)
    return f"{refused[0].node}: {refused[0].why}" if refused else None


def _beside(tried: Explored, other: Backend) -> Explored:
    """Measure what was chosen on both backends, then beside the original and the float baseline."""
    this, chosen, base = tried.this, tried.chosen, tried.state.candidates[0]
    assert this.target is not None
    name = f"{chosen.name} on {other.name}"
    lowered = {
        "original": (this.backend, this.path, "fp32"),
        base.name: (this.backend, base.path, base.precision),
        chosen.name: (this.backend, chosen.path, chosen.precision),
        name: (other, chosen.path, chosen.precision),
    }
    runners = {
        n: this.target.open(b, b.lower(path, this.profile, kind), this.threads)
        for n, (b, path, kind) in lowered.items()
    }
    measure = functools.partial(
        this.target.measure, feed=job.one_input(this), threads=this.threads, progress=this.progress
    )
    pair = measure({n: runners[n] for n in (chosen.name, name)}, baseline=chosen.name)
    judged = trials.judge(replace(this, backend=other), [chosen], as_built=True).get(chosen.name)
    measured = measure(runners, baseline=base.name)
    told = f"{text.ms(pair[name].median_ms)} against {text.ms(pair[chosen.name].median_ms)} on {this.backend.name}"
    more = _loses_more(tried, judged)
    quick = (pair[name].speedup_low or 0.0) > guard.MARGIN
    faster = quick and not more
    worse = ", but loses more than is allowed" if more else ""
    verdict = f"the same network, {'faster' if quick else 'not shown to be faster'}{worse}: {told}"
    rival = replace(
        tried.attempt,
        name=name,
        measurement=measured[name],
        chosen=faster,
        verdict=verdict,
        predicted_ms=None,
        fidelity=judged or tried.attempt.fidelity,
    )
    if not faster:
        return replace(tried, attempts=(*tried.attempts, rival))
    left = tuple(replace(a, chosen=False, verdict=_left(a, other)) for a in tried.attempts)
    state = replace(tried.state, measured={**tried.state.measured, **measured})
    return replace(tried, this=replace(this, backend=other), attempts=(*left, rival), attempt=rival, state=state)


def _loses_more(tried: Explored, judged: Fidelity | None) -> bool:
    """Say whether a rival's own module loses more than the budget, and than what was chosen."""
    if judged is None or judged.drop is None:
        return False
    mine = tried.attempt.fidelity
    before = 0.0 if mine is None or mine.drop is None else mine.drop
    return not judged.drop <= max(before, tried.this.options.budget.max_drop)


def _left(attempt: Attempt, other: Backend) -> str:
    return f"the same network is faster on {other.name}" if attempt.chosen else attempt.verdict
