"""How far to go where time is what counts: networks that are foretold to be faster race the whole one on the target.

Each runs as it will be delivered: where integers will be tried, both are quantized without any search, and judged so,
which leaves room for what rounding costs. A race is short, its speed-ups are paired (trials.py), and what is kept is
judged and measured again in the end like everything else.

    budget      the part of the time that is saved is bisected on the measured drop of quality; of the networks inside
                the budget the one is kept that guard.py would hand over: the fastest, if it is shown to be faster
    limit       what is foretold errs by about the same at neighbouring parts: the next one aims at what the last one
                missed, until the measured speed-up is what was asked for and hardly more

What is made smaller, and how, is the contest's affair: channels (pruning/contest.py) or ranks (low_rank/contest.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from . import guard, trials
from .candidates import Candidate
from .types import Attempt, Fidelity, Trial

if TYPE_CHECKING:
    from .delivery import Delivery
    from .job import Job

#: The first part of the time that is tried, the most, and how many networks are made in all.
_FIRST, _MOST, _COUNT = 0.2, 0.7, 4
#: The bisection ends where the part is known this well.
_CLOSE = 0.04
#: A speed-up that is asked for is aimed at a little too high, and met well enough within this.
_AIM, _ENOUGH = 1.005, 1.03
#: Two races of the same network differ by so much: a part of the time that is named is saved within this.
_ALIKE = 0.99
#: Where the next network would be the same one, the aim goes further by this.
_FURTHER = 1.02
#: So much faster than a stated latency needs: milliseconds drift with the machine, and are measured once more.
_MARGIN = 1.04


@dataclass(frozen=True)
class Words:
    """What a contest calls what it does: "pruned", "pruning", "cut", "cuts"."""

    done: str
    doing: str
    one: str
    several: str


What = TypeVar("What")
Proposal = TypeVar("Proposal")


@dataclass(frozen=True, eq=False)
class Entry(Generic[What]):
    """A network that takes part: `what` was done to it, and how many times as fast it was foretold to be."""

    candidate: Candidate
    what: What
    foretold: float | None = None


class Contest(Protocol[Proposal, What]):
    """One way of making a network smaller. Proposals can be compared; a `fast` network need only be as fast."""

    @property
    def words(self) -> Words:
        """How it is spoken of."""
        ...

    @property
    def run(self) -> Delivery:
        """How the networks will run."""
        ...

    def proposed(self, part: float) -> Proposal:
        """Return what is foretold to save the part, or what can be saved, of the time."""
        ...

    def made(self, part: float, proposal: Proposal, fast: bool) -> Entry[What] | str:
        """Return the network that was proposed; or why there is none."""
        ...


@dataclass(frozen=True, eq=False)
class Chosen(Generic[What]):
    """What is kept, if anything, and why; what was tried, and what else the report shall say."""

    what: What | None
    why: str
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Race(Generic[Proposal, What]):
    """The whole network and those that are made of it on the way, all as they will run."""

    this: Job
    contest: Contest[Proposal, What]
    baseline: Candidate
    made: list[Entry[What]] = field(default_factory=list)

    def budget(self) -> Chosen[What]:
        """Save as much of the time as the quality budget allows, if that is shown to be faster."""
        low, high, part = 0.0, _MOST, _FIRST
        judged: dict[str, Fidelity] = {}
        before: Proposal | None = None
        holds = False
        while len(self.made) < _COUNT and high - low > _CLOSE and not self._out_of_time():
            proposal = self.contest.proposed(part)
            if proposal != before:
                found = self._judged(part, proposal)
                judged, before = judged | found, proposal
                holds = any(f.drop is not None and f.drop <= self.this.options.budget.max_drop for f in found.values())
            low, high = (part, high) if holds else (low, part)
            part = min(2 * part, (part + high) / 2) if part == low else (low + high) / 2
        return self._worth(judged) if self.made else Chosen(None, self._nothing())

    def _judged(self, part: float, proposal: Proposal) -> dict[str, Fidelity]:
        """Return what the network that was proposed loses; nothing where there is none."""
        made = self._enter(part, proposal, fast=False)
        return {} if isinstance(made, str) else trials.judge(self.this, [self.contest.run.rounded(made.candidate)])

    def _worth(self, judged: Mapping[str, Fidelity]) -> Chosen[What]:
        words, run = self.contest.words, self.contest.run
        whole = run.delivered(self.baseline)
        runners = [run.delivered(one.candidate) for one in self.made]
        measured = trials.measure(self.this, [whole, *runners], seconds=trials.BRIEF)
        judged = {**judged, **trials.judge(self.this, [whole])}
        every = [trials.attempt(one, measured, judged, whole.name) for one in (whole, *runners)]
        attempts = guard.choose(every, self.this.options.budget, named=None)
        rows = tuple(self._trial(one, attempt) for one, attempt in zip(self.made, attempts[1:], strict=True))
        for one, attempt in zip(self.made, attempts[1:], strict=True):
            if attempt.chosen:
                why = f"the fastest that holds the budget, of the {words.several} that were tried"
                return Chosen(one.what, why, rows)
        tried = "; ".join(f"{row.name}: {_speed(row.measured_speedup)}{row.verdict}" for row in rows)
        return Chosen(None, f"{words.doing} does not pay here, and nothing was {words.done} ({tried})", rows)

    def limit(self, limit_ms: float) -> Chosen[What]:
        """Save what it takes for a stated latency to hold; nothing where it holds as it is."""
        whole, done = self.contest.run.delivered(self.baseline), self.contest.words.done
        ms = trials.measure(self.this, [whole], seconds=trials.BRIEF)[whole.name].median_ms
        if ms is None or ms <= limit_ms:
            took = "" if ms is None else f" ({ms:.3g} ms)"
            return Chosen(None, f"the whole network holds {limit_ms:g} ms as it is{took}, and nothing was {done}")
        found = self._faster(_MARGIN * ms / limit_ms)
        return replace(found, why=f"{found.why}, for {limit_ms:g} ms in place of {ms:.3g} ms")

    def part(self, saved: float) -> Chosen[What]:
        """Save a part of the latency, as asked for."""
        return self._faster(_ALIKE / (1 - saved))

    def _faster(self, wanted: float) -> Chosen[What]:
        """Go on until the network is measured to be `wanted` times as fast, with as little as that takes."""
        words, whole = self.contest.words, self.contest.run.delivered(self.baseline)
        rows = list[Trial]()
        reaching: list[tuple[float, Entry[What]]] = []
        short: list[tuple[float, Entry[What]]] = []
        aim, before, further = wanted, None, _FURTHER
        while len(self.made) < _COUNT and not (rows and self._out_of_time()):
            proposal = self.contest.proposed(1 - 1 / aim)
            while proposal == before and 1 < aim < 1 / (1 - _MOST):
                aim *= further
                proposal = self.contest.proposed(1 - 1 / aim)
            one = "it was tried" if proposal == before else self._enter(1 - 1 / aim, proposal, fast=True)
            if isinstance(one, str):
                break
            runner = self.contest.run.delivered(one.candidate)
            speed = trials.measure(self.this, [whole, runner], seconds=trials.BRIEF)[one.candidate.name].speedup or 1.0
            rows.append(self._row(one, speed, None, "fast enough" if speed >= wanted else "not fast enough"))
            (reaching if speed >= wanted else short).append((speed, one))
            if wanted <= speed <= _ENOUGH * wanted:
                break
            before, further = proposal, _FURTHER if speed < wanted else 1 / _FURTHER
            aim = max(aim * _AIM * wanted / speed, 1 + (aim - 1) / 2)
        if not reaching and not short:
            return Chosen(None, self._nothing())
        if reaching:
            least = min(reaching, key=lambda found: found[0])[1]
            return Chosen(least.what, f"{words.done} as asked, by measured time", tuple(rows))
        speed, one = max(short, key=lambda found: found[0])
        if speed <= guard.MARGIN:
            why = f"no {words.one} was measured to be faster (the best of {len(rows)}: {speed:.2f}x)"
            return Chosen(None, f"{why}, and nothing was {words.done}", tuple(rows))
        why = f"{speed:.2f}x is what {words.several} were measured to give, {wanted:.2f}x was asked for"
        return Chosen(one.what, why, tuple(rows))

    # ---------------------------------------------------------------------------------------- one network

    def _enter(self, part: float, proposal: Proposal, fast: bool) -> Entry[What] | str:
        made = self.contest.made(part, proposal, fast)
        if not isinstance(made, str):
            self.made.append(made)
        return made

    def _trial(self, one: Entry[What], attempt: Attempt) -> Trial:
        drop = None if attempt.fidelity is None else attempt.fidelity.drop
        return self._row(one, attempt.measurement.speedup, drop, attempt.verdict)

    def _row(self, one: Entry[What], speed: float | None, drop: float | None, verdict: str) -> Trial:
        return Trial(one.candidate.name, self.contest.run.precision, one.foretold, speed, drop, verdict)

    def _nothing(self) -> str:
        words = self.contest.words
        return f"no {words.one} is foretold to save time here, and nothing was {words.done}"

    def _out_of_time(self) -> bool:
        return self.this.seconds_left == 0


def _speed(found: float | None) -> str:
    return "" if found is None else f"{found:.2f}x, "
