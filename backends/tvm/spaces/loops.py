"""What schedules of all classes do to blocks and their loops."""

from __future__ import annotations

import math
from typing import Any

from ..lowering.kernels import PADDED
from .machine import Machine

#: TVM's number of an axis that is not summed over.
SPATIAL = 0


def divisors(n: int, most: int) -> list[int]:
    """Return the divisors of n up to `most`, ascending."""
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def find(schedule: Any, name: str) -> Any:
    """Return the block called `name`, None where there is none."""
    try:
        return schedule.get_sblock(name)
    except Exception:  # TVM raises what it likes
        return None


def roles(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """Return a block's loops over positions, and those that sum."""
    loops, kinds = schedule.get_loops(block), [int(v.iter_type) for v in schedule.get(block).iter_vars]
    pairs = list(zip(loops, kinds, strict=True))
    return [loop for loop, kind in pairs if kind == SPATIAL], [loop for loop, kind in pairs if kind != SPATIAL]


def shared_by_threads(schedule: Any, machine: Machine, loops: list[Any]) -> Any:
    """Make one loop of the outer ones, which threads share, and return it."""
    outer = schedule.fuse(*loops) if len(loops) > 1 else loops[0]
    if machine.threads > 1:
        schedule.parallel(outer)
    return outer


def one_block_behind(schedule: Any, block: Any) -> Any:
    """Make one block of all that comes after `block`, and of what that reads beside it, and return it."""
    (final,) = schedule.get_output_blocks("root")
    name = schedule.get(block).name_hint
    for one in schedule.get_child_blocks(schedule.get_sblock("root")):
        if schedule.get(one).name_hint not in (name, PADDED) and schedule.get_consumers(one):
            schedule.compute_inline(one)
    return schedule.get_sblock(schedule.get(final).name_hint)


def fill_up(schedule: Any, machine: Machine, where: Any) -> None:
    """Fill the input up at a loop, or once."""
    pad = find(schedule, PADDED)
    if pad is None:
        return
    if where is not None:
        schedule.compute_at(pad, where)
    loops = schedule.get_loops(pad)
    vectorized(schedule, loops[-1], machine.lanes)
    if where is None and machine.threads > 1:
        schedule.parallel(schedule.fuse(*loops[:2]))


def decomposed(schedule: Any, block: Any, loop: Any, outside: int) -> None:
    """Begin the sums before `loop`, unrolled and vectorized like the sums; `outside` loops are around both."""
    start = schedule.decompose_reduction(block, loop)
    *begun, lane = schedule.get_loops(start)[outside:]
    schedule.vectorize(lane)
    for one in begun:
        schedule.unroll(one)


def vectorized(schedule: Any, loop: Any, lanes: int) -> None:
    """Vectorize the inner `lanes` of a loop, or the most that divide it."""
    extent = int(schedule.get(loop).extent)
    lanes = math.gcd(extent, lanes)
    if extent > lanes:
        loop = schedule.split(loop, [None, lanes])[1]
    if lanes > 1:
        schedule.vectorize(loop)
