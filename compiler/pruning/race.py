"""How far to cut where time is what counts: cuts that are foretold to be faster race the whole network on the target.

Each runs as it will be delivered: where integers will be tried, both are quantized without any search. A race is short,
its speed-ups are paired (trials.py), and what is kept is judged and measured again in the end like everything else.

    budget      the part of the time that is cut is bisected on the measured drop of quality; of the cuts inside the
                budget the one is kept that guard.py would hand over: the fastest, if it is shown to be faster
    limit       what is foretold errs by about the same at neighbouring cuts: the next cut aims at what the last one
                missed, until the measured speed-up is what was asked for and hardly more
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import guard, trials
from ..candidates import Candidate
from ..types import Attempt, Fidelity, PruneTrial
from .cutting import Cutting, Made
from .latencies import Pricing

if TYPE_CHECKING:
    from ..job import Job

#: The first part of the time that is tried, the most, and how many cuts are made in all.
_FIRST, _MOST, _CUTS = 0.2, 0.7, 4
#: The bisection ends where the part is known this well.
_CLOSE = 0.04
#: A speed-up that is asked for is aimed at a little too high, and met well enough within this.
_AIM, _ENOUGH = 1.005, 1.03
#: Two races of the same network differ by so much: a part of the time that is named is saved within this.
_ALIKE = 0.99
#: What takes this much longer saves as much.
_AS_MUCH = 1.02
#: Where the next cut would be the same one, the aim goes further by this.
_FURTHER = 1.02
#: So much faster than a stated latency needs: milliseconds drift with the machine, and are measured once more.
_MARGIN = 1.04


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is kept, if anything, and why; the cuts that were tried, and what else the report shall say."""

    made: Made | None
    why: str
    trials: tuple[PruneTrial, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Race:
    """The whole network and the cuts that are made of it on the way, all as they will run."""

    this: Job
    cutting: Cutting
    prices: Pricing
    baseline: Candidate
    work: Path
    made: list[Made] = field(default_factory=list)

    def budget(self) -> Chosen:
        """Cut as much of the time as the quality budget allows, if that is shown to be faster."""
        low, high, part = 0.0, _MOST, _FIRST
        judged: dict[str, Fidelity] = {}
        while len(self.made) < _CUTS and high - low > _CLOSE and not self._out_of_time():
            one = self._cut(part)
            if isinstance(one, str):
                high = part
            else:
                found = trials.judge(self.this, [one.candidate])
                judged |= found
                drop = found[one.candidate.name].drop if found else None
                holds = drop is not None and drop <= self.this.options.budget.max_drop
                low, high = (part, high) if holds else (low, part)
            part = min(2 * part, (part + high) / 2) if part == low else (low + high) / 2
        if not self.made:
            return Chosen(None, "no cut is foretold to save time here, and nothing was pruned")
        return self._worth(judged)

    def _worth(self, judged: Mapping[str, Fidelity]) -> Chosen:
        whole = self.prices.run.delivered(self.baseline)
        runners = [self.prices.run.delivered(one.candidate) for one in self.made]
        measured = trials.measure(self.this, [whole, *runners], seconds=trials.BRIEF)
        judged = {**judged, **trials.judge(self.this, [whole])}
        every = [trials.attempt(one, measured, judged, whole.name) for one in (whole, *runners)]
        attempts = guard.choose(every, self.this.options.budget, named=None)
        rows = tuple(self._trial(one, attempt) for one, attempt in zip(self.made, attempts[1:], strict=True))
        for one, attempt in zip(self.made, attempts[1:], strict=True):
            if attempt.chosen:
                return Chosen(one, "the fastest that holds the budget, of the cuts that were tried", rows)
        tried = "; ".join(f"{row.name}: {_speed(row.measured_speedup)}{row.verdict}" for row in rows)
        return Chosen(None, f"pruning does not pay here, and nothing was pruned ({tried})", rows)

    def limit(self, limit_ms: float) -> Chosen:
        """Cut what it takes for a stated latency to hold; nothing where it holds as it is."""
        whole = self.prices.run.delivered(self.baseline)
        ms = trials.measure(self.this, [whole], seconds=trials.BRIEF)[whole.name].median_ms
        if ms is None or ms <= limit_ms:
            took = "" if ms is None else f" ({ms:.3g} ms)"
            return Chosen(None, f"the whole network holds {limit_ms:g} ms as it is{took}, and nothing was pruned")
        found = self._faster(_MARGIN * ms / limit_ms)
        return replace(found, why=f"{found.why}, for {limit_ms:g} ms in place of {ms:.3g} ms")

    def part(self, saved: float) -> Chosen:
        """Cut what it takes to save a part of the latency, as asked for."""
        return self._faster(_ALIKE / (1 - saved))

    def _faster(self, wanted: float) -> Chosen:
        """Cut until the network is measured to be `wanted` times as fast, with as little as that takes."""
        whole, rows = self.prices.run.delivered(self.baseline), list[PruneTrial]()
        reaching: list[tuple[float, Made]] = []
        short: list[tuple[float, Made]] = []
        aim, before, further = wanted, dict[str, list[int]](), _FURTHER
        while len(self.made) < _CUTS and not (rows and self._out_of_time()):
            removed = self._proposed(1 - 1 / aim)
            while removed == before and 1 < aim < 1 / (1 - _MOST):
                aim *= further
                removed = self._proposed(1 - 1 / aim)
            one = "it was tried" if removed == before else self._cut(1 - 1 / aim, removed)
            if isinstance(one, str):
                break
            measured = trials.measure(
                self.this, [whole, self.prices.run.delivered(one.candidate)], seconds=trials.BRIEF
            )
            speed = measured[one.candidate.name].speedup or 1.0
            rows.append(self._row(one, speed, None, "fast enough" if speed >= wanted else "not fast enough"))
            (reaching if speed >= wanted else short).append((speed, one))
            if wanted <= speed <= _ENOUGH * wanted:
                break
            before, further = removed, _FURTHER if speed < wanted else 1 / _FURTHER
            aim = max(aim * _AIM * wanted / speed, 1 + (aim - 1) / 2)
        if not reaching and not short:
            return Chosen(None, "no cut is foretold to save time here, and nothing was pruned")
        if reaching:
            return Chosen(min(reaching, key=lambda found: found[0])[1], "cut as asked, by measured time", tuple(rows))
        speed, one = max(short, key=lambda found: found[0])
        why = f"{speed:.2f}x is what cuts in whole units were measured to give, {wanted:.2f}x was asked for"
        return Chosen(one, why, tuple(rows))

    # ---------------------------------------------------------------------------------------- one cut

    def _cut(self, part: float, removed: dict[str, list[int]] | None = None) -> Made | str:
        """Return a cut that is foretold to save the part, or what can be saved, of the time; or why there is none."""
        removed = self._proposed(part) if removed is None else removed
        proposals = [removed, *self._without_branches(part, removed)]
        made = self.cutting.closest(proposals, self.work, f"pruned {100 * part:.3g}% of the time")
        if isinstance(made, str):
            return made
        costs = self.prices.costs()
        self.made.append(replace(made, foretold=costs.of({}) / costs.of(made.removed)))
        return self.made[-1]

    def _without_branches(self, part: float, removed: dict[str, list[int]]) -> list[dict[str, list[int]]]:
        """Return what is proposed if branches stay, where some go and this saves as much."""
        if not self.cutting.loses_branches(removed):
            return []
        other = self.prices.settled(lambda costs: self.cutting.proposed(costs, part, whole=False))
        costs = self.prices.costs()
        return [other] if other and costs.of(other) <= _AS_MUCH * costs.of(removed) else []

    def _proposed(self, part: float) -> dict[str, list[int]]:
        return self.prices.settled(lambda costs: self.cutting.proposed(costs, part))

    def _trial(self, one: Made, attempt: Attempt) -> PruneTrial:
        drop = None if attempt.fidelity is None else attempt.fidelity.drop
        return self._row(one, attempt.measurement.speedup, drop, attempt.verdict)

    def _row(self, one: Made, speed: float | None, drop: float | None, verdict: str) -> PruneTrial:
        return PruneTrial(one.candidate.name, self.prices.run.precision, one.foretold, speed, drop, verdict)

    def _out_of_time(self) -> bool:
        return self.this.seconds_left == 0


def _speed(found: float | None) -> str:
    return "" if found is None else f"{found:.2f}x, "
