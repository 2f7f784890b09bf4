"""The questions that mixed precision answers, put to one measured integer program.

    least error for each latency, from the fastest to the closest     frontier
    least error under a latency or a size                             frontier with that limit; `closest`
    two layers back to 8 bits                                         `closest` with a limit on their number

Where nothing is timed, the multiply-accumulates left in float stand in for the latency. The program's `ms` are what
was predicted when it was measured; `ms_for` turns milliseconds of another measurement into these by the ratio of the
float model's, since a machine does not run as fast on two days.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BudgetError
from ..types import Progress, silent
from . import mixed, program
from .contributions import Contributions
from .units import Wiring

#: At least this share of the multiply-accumulates stays on integers where integers were asked for.
LEAST_INTEGER = 0.5
#: Assignments are looked for up to this multiple of the plain one's latency, or of the float one's if that is less.
REACH = 1.06
_REASON = "mixed precision: in float the network is closer to the original for its latency"


@dataclass(frozen=True)
class Point:
    """One assignment: what stays in float (with the reason), what has weights of 4 bits, and what is predicted of it.

    `speedup` is over the float model, None where nothing was measured; `db` is the SQNR of the outputs, `integer_macs`
    the share on integers; `size_bytes` that of the file, None where sizes were not asked for. `wide`: how many units
    have weights of 8 bits beside others that have 4.
    """

    keep_float: Mapping[str, str]
    speedup: float | None
    db: float
    integer_macs: float
    narrow: frozenset[str] = frozenset()
    size_bytes: float | None = None
    wide: int = 0

    @property
    def said(self) -> list[str]:
        """What tells it from the plain assignment, for its name."""
        parts = (f"{self.wide} at 8 bits" if self.wide else "", f"{len(self.keep_float)} in float")
        return [part for part in parts if part and not part.startswith("0 ")]


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """One quantizer's integer program, and what turns its amounts into predictions.

    `possible`: the share of multiply-accumulates that can run on integers at all. `timed`: whether `ms` were measured,
    `misfit` how far they are off at most on the models that were, None where nothing was. `images`: how many the
    errors come from; `cached`: all was known from an earlier compile.
    """

    problem: mixed.Problem
    wiring: Wiring
    errors: Contributions
    possible: float
    misfit: float | None
    cached: bool = False

    @property
    def timed(self) -> bool:
        """Whether latencies were measured."""
        return self.misfit is not None

    @property
    def measure(self) -> str:
        """The measure that stands for the latency."""
        return "ms" if self.timed else "float_macs"

    def uniform(self, precision: str) -> mixed.Assignment:
        """Return the assignment of one precision to every unit that may have it, and of int8 to the others."""
        choice = {u: precision if precision in ks else mixed.INTEGER for u, ks in self.problem.choices.items()}
        return mixed.Assignment(choice, self.problem.amounts(choice))

    def ms_for(self, measured: float, float_ms: float) -> float:
        """Return the program's milliseconds for `measured` ones of a run where the float model took `float_ms`."""
        return measured * self.float_ms / float_ms

    @property
    def float_ms(self) -> float:
        """The float model's latency, as measured when the program was."""
        choice = dict.fromkeys(self.problem.choices, mixed.FLOAT)
        return self.problem.amounts(choice)["ms"]

    def frontier(
        self,
        limits: Mapping[str, float] | None = None,
        *,
        least_integer: float = LEAST_INTEGER,
        reach: float | None = REACH,
        points: int = 6,
        deadline: float | None = None,
        progress: Progress = silent,
    ) -> tuple[mixed.Assignment, ...]:
        """Return the assignments of least error for their latency, from the fastest to the closest.

        At least `least_integer` of the multiply-accumulates runs on integers, and `limits` (measure -> largest amount)
        hold. Nothing slower than `reach` times the plain assignment is looked for, unless there is nothing else; None,
        or a limit on `ms` among the limits: no matter how slow. BudgetError where nothing is within the limits.
        """
        bounds = self.bounds(limits, least_integer=least_integer)
        plain = min(self.uniform(k).predicted["ms"] for k in (mixed.INTEGER, mixed.FLOAT))
        near = bounds if reach is None or not self.timed or "ms" in bounds else {**bounds, "ms": reach * plain}

        def found(bounds: Mapping[str, float]) -> list[mixed.Assignment]:
            return program.frontier(
                self.problem, "error", self.measure, points=points, limits=bounds, deadline=deadline, progress=progress
            )

        try:
            return tuple(found(near))
        except BudgetError:  # nothing with so much on integers is as fast
            return tuple(found(bounds))

    def closest(
        self, limits: Mapping[str, float] | None = None, *, least_integer: float = LEAST_INTEGER
    ) -> mixed.Assignment:
        """Return the assignment of least error within the limits. BudgetError where there is none."""
        return program.solve(self.problem, "error", self.bounds(limits, least_integer=least_integer))

    def bounds(
        self, limits: Mapping[str, float] | None = None, *, least_integer: float = LEAST_INTEGER
    ) -> dict[str, float]:
        """Return the limits, and the one on the work left in float."""
        return {"float_macs": max(self.possible - least_integer, 0.0), **(limits or {})}

    def point(self, one: mixed.Assignment) -> Point:
        """Return what an assignment means for the quantizer, and what is predicted of it."""
        error = self.errors.expected(one.predicted.get("error", 0.0))
        on = self.wiring.realised(set(one.having(mixed.INTEGER, mixed.NARROW)))
        return Point(
            {unit.name: _REASON for unit in self.wiring.units if unit.name not in on},
            self.float_ms / one.predicted["ms"] if self.timed else None,
            -10 * math.log10(error) if error > 0 else math.inf,
            self.possible - one.predicted.get("float_macs", 0.0),
            one.having(mixed.NARROW) & frozenset(on),
            one.predicted.get("bytes"),
            round(one.predicted.get("wide", 0.0)) if one.having(mixed.NARROW) else 0,
        )
