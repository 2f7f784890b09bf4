"""Functions that are no layers of ours: by rules, or, where they sum, by what MetaSchedule draws.

Sums along what lies side by side go in lanes (rfactor: Suriana et al., "Parallel associative reductions in Halide", CGO
2017); transpositions in tiles that are read by few cache lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from . import SEED, Choice
from .loops import SPATIAL, roles, shared_by_threads
from .machine import Machine

#: Schedules that MetaSchedule draws for a function, at most.
_DRAWN = 48


@dataclass(frozen=True)
class Plain:
    """Everything else: what can be is computed where it is used, the last axis is spread over lanes."""

    name: ClassVar[str] = "plain"
    machine: Machine
    sizes: tuple[int, ...]
    sums: bool

    @classmethod
    def of(cls, schedule: Any, machine: Machine) -> Plain | None:
        """Return the space of a function, None where a size is not known."""
        try:
            blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
            sizes = tuple(int(schedule.get(loop).extent) for b in blocks for loop in schedule.get_loops(b))
            return cls(machine, sizes, any(roles(schedule, block)[1] for block in blocks))
        except Exception:  # TVM raises what it likes: sizes that are not known, no root
            return None

    def features(self) -> tuple[int, ...]:
        """Return all sizes."""
        return self.sizes

    def choices(self) -> list[Choice]:
        """Return lanes for the last axis, rows that a transposition takes at once, and whether sums go in lanes.

        Where there are sums, also numbers that MetaSchedule draws a schedule by, from its space for the function.
        """
        lanes = self.machine.lanes
        table = ((lanes, 4, 1), (lanes, 4, 0), (lanes, 1, 0), (2 * lanes, 8, 1), (lanes, 8, 0), (1, 1, 0))
        drawn: list[Choice] = [{SEED: i} for i in range(_DRAWN if self.sums else 0)]
        return [*({"lanes": n, "across": a, "sums": s} for n, a, s in table), *drawn]

    def apply(self, schedule: Any, choice: Choice) -> None:
        """Schedule the function."""
        if SEED in choice:
            _drawn(schedule, self.machine, choice[SEED])
            return
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            if not roles(schedule, block)[1] and len(schedule.get_consumers(block)) == 1:
                _tried(schedule, lambda s, b=block: s.compute_inline(b))
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            spatial, sums = roles(schedule, block)
            ends = _last_axes(schedule, block)
            aside, along = len(spatial) - 1, len(spatial) + len(sums) - 1
            if choice["sums"] and sums and along in ends and aside not in ends:
                self._summed(schedule, block, sums[-1], len(spatial), choice["lanes"])
            elif spatial:
                turned = next((i for i in ends if i < len(spatial) - 1), None)
                self._spread(schedule, block, (spatial, sums), turned, choice)

    def _summed(self, schedule: Any, block: Any, sums: Any, outside: int, lanes: int) -> None:
        """Sum in lanes, and the lanes at the end; `outside` loops run over what is not summed."""
        lanes = math.gcd(int(schedule.get(sums).extent), lanes)
        if lanes < 2:
            return
        _, lane = schedule.split(sums, [None, lanes])
        parts = schedule.rfactor(lane, 0)
        loops = schedule.get_loops(parts)
        schedule.vectorize(loops[-1])
        start = schedule.decompose_reduction(parts, loops[outside])
        schedule.vectorize(schedule.get_loops(start)[-1])

    def _spread(
        self, schedule: Any, block: Any, loops: tuple[list[Any], list[Any]], turned: int | None, choice: Choice
    ) -> None:
        """Spread the last axis over lanes and the others over threads; what is turned goes in small tiles.

        `turned` is the outer loop along which what is read lies side by side.
        """
        (*outer, inner), sums = loops
        wide = int(schedule.get(inner).extent)
        lanes = math.gcd(wide, choice["lanes"])
        if not outer or (sums and wide % choice["lanes"] and wide < choice["lanes"]):
            outer, order = [*outer, inner], []
        else:
            between, lane = schedule.split(inner, [None, lanes])
            order = [between, *sums, lane]
            if turned is not None and choice["across"] > 1 and not sums:
                across = math.gcd(int(schedule.get(outer[turned]).extent), choice["across"])
                apart, some = schedule.split(outer.pop(turned), [None, across])
                order = [between, apart, some, lane]
                schedule.unroll(some)
                outer = outer or [between]
            schedule.reorder(*outer, *(loop for loop in order if loop not in outer))
            schedule.vectorize(lane)
        shared_by_threads(schedule, self.machine, outer)
        if sums:
            start = schedule.decompose_reduction(block, sums[0])
            if order:
                schedule.vectorize(schedule.get_loops(start)[-1])


def _last_axes(schedule: Any, block: Any) -> list[int]:
    """Return which of a block's axes run along the last index of what it reads.

    Only what is as large as the positions counts, and, where the block sums, what is summed.
    """
    body = schedule.get(block)
    spatial = [axis for axis in body.iter_vars if int(axis.iter_type) == SPATIAL]
    size = math.prod(int(axis.dom.extent) for axis in spatial)
    sums = body.iter_vars[-1] if len(spatial) < len(body.iter_vars) else None
    ends = []
    for read in body.reads:
        at = [index.min for index in read.region]
        summed = sums is None or any(sums.var.same_as(one) for one in at)
        if at and summed and math.prod(int(i) for i in read.source.shape) >= size:
            ends.append(at[-1])
    return [i for i, axis in enumerate(body.iter_vars) for end in ends if axis.var.same_as(end)]


def _drawn(schedule: Any, machine: Machine, seed: int) -> None:
    """Apply a schedule that MetaSchedule draws, the same for the same seed. ValueError where it finds none."""
    from tvm.s_tir import meta_schedule as ms

    context = ms.TuneContext(
        mod=schedule.mod, target=machine.target, space_generator="post-order-apply", search_strategy="replay-trace",
        task_name="function", num_threads=1, rand_state=seed + 1,
    )  # fmt: skip
    context.pre_tuning(1, 1, database=ms.database.MemoryDatabase(), cost_model=ms.CostModel.create("random"))
    found = context.generate_measure_candidates()
    if not found:
        raise ValueError(f"MetaSchedule draws nothing by {seed}")
    found[0].sch.trace.apply_to_schedule(schedule, remove_postproc=False)


def _tried(schedule: Any, change: Any) -> None:
    """Change the schedule where TVM allows it."""
    try:
        change(schedule)
    except Exception:  # TVM raises what it likes
        return
