"""What raced the whole network on the way to a smaller one, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import Trial
from . import text
from .grid import Table, columns


def tried(one: str, several: str, trials: Sequence[Trial]) -> list[Table]:
    """Return a table of what was tried: how much faster it was foretold and measured to be; none of nothing."""
    if not trials:
        return []
    titles = columns(one, "#predicted speed-up", "#measured speed-up", "#lost, points", "verdict")
    rows = tuple(
        (text.clean(t.name), text.ratio(t.predicted_speedup), text.ratio(t.measured_speedup), text.fixed(t.drop, 2),
         text.clean(t.verdict))
        for t in trials
    )  # fmt: skip
    precisions = " and ".join(dict.fromkeys(text.precision(t.precision) for t in trials))
    note = f"the whole network and the smaller one both in {precisions}, calibrated plainly where these are integers"
    return [Table(f"{several} that were tried", titles, rows, (note,))]
