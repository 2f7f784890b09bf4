"""Which schedule is the fastest one known for a function, kept between compiles in the user's measurements (memory.py).

The key is the target, TVM's version, and the function itself without its weights: the same layer of another network
finds it. What was best for functions of the same class is kept by their features: a new one begins with what the most
similar had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ...compiler import memory
from .network import Function
from .spaces import Choice

#: Functions of one class that are remembered by their features.
_ALIKE = 200


@dataclass(frozen=True)
class Record:
    """A choice of a function's space, the seconds that it took, and the rounds of trying behind it."""

    choice: Choice
    seconds: float
    rounds: int = 0


class Records:
    """What is known on one target."""

    def __init__(self, target: Any, file: Path | None = None) -> None:
        """Open the user's measurements, or those of a file."""
        key = memory.context("schedules", target=str(target.export()), tvm=metadata.version("apache-tvm"))
        self._memory = memory.Memory(key, file)

    def get(self, function: Function) -> Record | None:
        """Return the best that is known of this function."""
        found = self._memory.get(function.key)
        if not isinstance(found, list) or function.space is None or found[0] != function.space.name:
            return None
        return Record(*found[1:])

    def put(self, function: Function, record: Record) -> None:
        """Keep the best."""
        space = function.space
        assert space is not None
        self._memory.put(function.key, [space.name, dict(record.choice), record.seconds, record.rounds])
        features = list(space.features())
        others = [one for one in self._known(space.name) if one[0] != features]
        self._memory.put(f"alike {space.name}", [*others, [features, dict(record.choice)]][-_ALIKE:])

    def alike(self, function: Function) -> list[Choice]:
        """Return what was best for functions of the same class, the most similar first.

        Similar is what differs by small factors: the sum of |log2| of the features' ratios.
        """
        space = function.space
        assert space is not None
        mine = space.features()
        known = [one for one in self._known(space.name) if len(one[0]) == len(mine)]
        known.sort(key=lambda one: sum(abs(math.log2((a + 1) / (b + 1))) for a, b in zip(mine, one[0], strict=True)))
        return [one[1] for one in known]

    def shun(self, function: Function, choice: Choice) -> None:
        """Keep that a choice takes down what it runs on."""
        others = [one for one in self.shunned(function) if one != dict(choice)]
        self._memory.put(f"shunned {function.key}", [*others, dict(choice)])

    def shunned(self, function: Function) -> list[Choice]:
        """Return the choices that are not to be tried again."""
        found = self._memory.get(f"shunned {function.key}")
        return found if isinstance(found, list) else []

    def _known(self, name: str) -> list[Any]:
        found = self._memory.get(f"alike {name}")
        return found if isinstance(found, list) else []
