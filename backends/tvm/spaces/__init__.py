"""How functions are run on a processor: the schedules that each class of them may have.

A space is a class of functions, recognised by its blocks, with its choices as plain numbers, the best guess first. To
add one: a class with these methods, and its place in the list below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from .machine import Machine

Choice = Mapping[str, int]
#: In a choice that MetaSchedule draws: nobody knows what it does beside its arrays.
SEED = "seed"


class Space(Protocol):
    """The schedules of one class of functions."""

    name: ClassVar[str]

    def features(self) -> tuple[int, ...]:
        """Return the numbers by which functions of the class are alike."""

    def choices(self) -> list[Choice]:
        """Return what there is to choose, the best guess first."""

    def apply(self, schedule: Any, choice: Choice) -> None:
        """Schedule the function."""


def space_of(schedule: Any, machine: Machine) -> Space | None:
    """Return the space of a function, None where no schedule can be chosen."""
    from . import layers, plain

    for kind in (layers.Contraction, layers.Depthwise, plain.Plain):
        found = kind.of(schedule, machine)
        if found is not None:
            return found
    return None
