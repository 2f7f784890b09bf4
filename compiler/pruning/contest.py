"""Cuts in a race by time (race.py): proposed by the prices of what they save, made and repaired as all cuts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..delivery import Delivery
from ..race import Entry, Words
from .cutting import Cutting, Made
from .latencies import Pricing

#: What takes this much longer saves as much.
_AS_MUCH = 1.02

Removed = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Cuts:
    """What can be cut of a network, and what that is foretold to save."""

    cutting: Cutting
    prices: Pricing
    work: Path
    words: Words = Words("pruned", "pruning", "cut", "cuts")

    @property
    def run(self) -> Delivery:
        """How the networks will run."""
        return self.prices.run

    def proposed(self, part: float) -> Removed:
        """Return what goes, so that the part of the time does."""
        return self.prices.settled(lambda costs: self.cutting.proposed(costs, part))

    def made(self, part: float, proposal: Removed, fast: bool) -> Entry[Made] | str:
        """Return the network without that; or, where branches go, cut in channels alone if that errs less."""
        proposals = [proposal, *self._without_branches(part, proposal)]
        made = self.cutting.closest(proposals, self.work, f"pruned {100 * part:.3g}% of the time")
        if isinstance(made, str):
            return made
        costs = self.prices.costs()
        foretold = costs.of({}) / costs.of(made.removed)
        return Entry(made.candidate, replace(made, foretold=foretold), foretold)

    def _without_branches(self, part: float, removed: Removed) -> list[Removed]:
        """Return what is proposed if branches stay, where some go and this saves as much."""
        if not self.cutting.loses_branches(removed):
            return []
        other = self.prices.settled(lambda costs: self.cutting.proposed(costs, part, whole=False))
        costs = self.prices.costs()
        return [other] if other and costs.of(other) <= _AS_MUCH * costs.of(removed) else []
