"""Choices of ranks in a race by time (race.py): of chains that are foretold to be faster than their layers."""

from __future__ import annotations

from dataclasses import dataclass

from ..candidates import Candidate
from ..delivery import Delivery
from ..race import Entry, Words
from .kitchen import Chosen, Kitchen


@dataclass(frozen=True, eq=False)
class Made:
    """A choice of ranks under a name; `candidate` once it is fitted."""

    name: str
    chosen: Chosen
    candidate: Candidate | None = None


@dataclass(frozen=True, eq=False)
class Ranks:
    """What can be factorized of a network, and what that is foretold to save."""

    kitchen: Kitchen
    words: Words = Words("factorized", "factorization", "choice of ranks", "choices of ranks")

    @property
    def run(self) -> Delivery:
        """How the networks will run."""
        return self.kitchen.run

    def proposed(self, part: float) -> Chosen:
        """Return what saves that part of the time, or as much as can be, with the least error."""
        found = self.kitchen.chosen("ms", part, quick=True)
        return self.kitchen.cheapest("ms") if found is None else found

    def made(self, part: float, proposal: Chosen, fast: bool) -> Entry[Made] | str:
        """Return the network with these ranks; of random numbers, where only how fast it is counts."""
        name = self.kitchen.called(f"low rank {100 * part:.3g}% of the time")
        made = (self.kitchen.stand_in if fast else self.kitchen.made)(proposal, name)
        if isinstance(made, str):
            return made
        return Entry(made, Made(name, proposal, None if fast else made), self.kitchen.foretold(proposal))
