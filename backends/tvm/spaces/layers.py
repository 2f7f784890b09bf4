"""How a function is run on a processor: which schedules it may have, and the application of one.

A space is a class of functions, recognised by a block, with its choices as plain numbers, the best guess first. For
sums with constant weights the choices are the tile of positions and channels that is kept in vector registers,

    for rows, weights (in either order):         a stretch of rows; the padded input is made for it
        for tile:                                acc[rows, columns, blocks, lanes] in registers, all unrolled
            for kh, kw, q:  acc += broadcast(P) * W
            whatever comes after, from acc to memory

The tile takes at most the registers that there are, less some for broadcasts and weights. Sources of the form: Goto and
van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34(3), 2008, and NeoCPU (kernels.py).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..lowering.kernels import CONTRACTION, DEPTHWISE, LONGEST
from . import Choice
from .loops import decomposed, divisors, fill_up, find, one_block_behind, roles, shared_by_threads, vectorized
from .machine import Machine

#: How many loops sum where four bytes are summed at once: without taps and with.
_WITH_FOURS = (2, 4)
#: A multiply-add's result is there four cycles later, and two begin in each.
_AT_ONCE = 8
#: Rows of a stretch that the first guess takes.
_STRETCH = 8


@dataclass(frozen=True)
class Contraction:
    """Sums over channels with weights laid out by kernels.convolution or kernels.product.

    `rows`, `columns` and `blocks` are what tiles are cut from; a sum has `depth` terms for each of `taps`.
    """

    name: ClassVar[str] = CONTRACTION
    machine: Machine
    rows: int
    columns: int
    blocks: int
    depth: int
    taps: int
    fours: bool

    @classmethod
    def of(cls, schedule: Any, machine: Machine) -> Contraction | None:
        """Return the space of a function, None where it is none."""
        block = find(schedule, CONTRACTION)
        if block is None:
            return None
        spatial, sums = ([int(schedule.get(loop).extent) for loop in loops] for loops in roles(schedule, block))
        fours, with_taps = len(sums) in _WITH_FOURS, len(sums) > _WITH_FOURS[0]
        lead, blocks = spatial[:-2] if with_taps else spatial[:-1], spatial[-1] // machine.lanes
        depth, taps = sums[2 if with_taps else 0], sums[0] * sums[1] if with_taps else 1
        return cls(machine, lead[-2] if len(lead) > 1 else 1, lead[-1], blocks, depth, taps, fours)

    def features(self) -> tuple[int, ...]:
        """Return rows, columns, blocks, terms and taps."""
        return (self.rows, self.columns, self.blocks, self.depth, self.taps, int(self.fours))

    def choices(self) -> list[Choice]:
        """Return tiles that fit into registers, those first that load least for what they multiply."""
        found = []
        for high, wide, blocks in itertools.product(
            divisors(self.rows, 4), divisors(self.columns, LONGEST), divisors(self.blocks, 8)
        ):
            places = high * wide
            if places * blocks + blocks < self.machine.registers:
                idle = max(1.0, _AT_ONCE / (places * blocks))
                found.append(((1 / places + 0.5 / blocks) * idle, high, wide, blocks))
        result: list[Choice] = []
        for (_, high, wide, blocks), unroll in itertools.product(sorted(found)[:16], (4, 2, 1)):
            if self.depth % unroll:
                continue
            fit = [s for s in divisors(self.rows, self.rows) if s % high == 0]
            middle = min(fit, key=lambda s: abs(s - _STRETCH))
            for stretch, weights in itertools.product(dict.fromkeys((middle, fit[-1], fit[0])), (0, 1)):
                named = {"high": high, "wide": wide, "blocks": blocks, "unroll": unroll, "stretch": stretch}
                result.append({**named, "weights": weights})
        return sorted(result, key=self._uneven)

    def _uneven(self, choice: Choice) -> float:
        """Return how much longer a choice takes for threads that have nothing to do; 1 on one thread."""
        parts = self.rows // choice["stretch"] if self.rows > 1 else self.columns // choice["wide"]
        parts *= self.blocks // choice["blocks"] if choice["weights"] else 1
        rounds = math.ceil(parts / self.machine.threads)
        return rounds * self.machine.threads / parts

    def apply(self, schedule: Any, choice: Choice) -> None:
        """Schedule the function; `weights` says that a block of weights stays while all rows pass."""
        block = schedule.get_sblock(CONTRACTION)
        final = one_block_behind(schedule, block)
        schedule.set_scope(block, 0, "local")
        (*lead, outputs), sums = roles(schedule, block)
        four = [sums.pop()] if self.fours else []
        (*taps, depth) = sums
        groups = [lead.pop()] if taps else []
        columns, tile, stretch, middle = lead.pop(), [], [], []
        if lead:
            outside, inside = schedule.split(lead.pop(), [None, choice["stretch"]])
            between, high = schedule.split(inside, [None, choice["high"]])
            stretch, middle, tile = [outside], [between], [high]
        c_out, wide = schedule.split(columns, [None, choice["wide"]])
        b_out, b_in, lane = schedule.split(outputs, [None, choice["blocks"], self.machine.lanes])
        d_out, d_in = schedule.split(depth, [None, choice["unroll"]])
        tile += [wide, b_in]
        weights, places = [*groups, b_out], stretch or [c_out]
        ahead = weights + places if choice["weights"] else places + weights
        order = [*lead, *ahead, *middle, *([c_out] if stretch else [])]
        schedule.reorder(*order, *taps, d_out, d_in, *tile, lane, *four)
        schedule.reverse_compute_at(final, order[-1])
        # between a stretch and its blocks of weights the input is filled up
        shared = [*lead, *(ahead if choice["weights"] else ahead[:1])]
        outer = shared_by_threads(schedule, self.machine, shared)
        fill_up(schedule, self.machine, outer if stretch and not choice["weights"] else None)
        outside = len(order) - len(shared) + 1
        for loop in (*tile, d_in):
            schedule.unroll(loop)
        dot = self.machine.dot if four else None
        if dot is None:
            schedule.vectorize(lane)
        decomposed(schedule, block, (*taps, d_out)[0], outside)
        if dot is not None:
            schedule.tensorize(lane, dot.intrinsic)
        *done, after = schedule.get_loops(final)[outside:]
        vectorized(schedule, after, self.machine.lanes)
        for loop in done:
            schedule.unroll(loop)


@dataclass(frozen=True)
class Depthwise:
    """Sums over taps alone, kernels.depthwise: lanes are channels."""

    name: ClassVar[str] = DEPTHWISE
    machine: Machine
    rows: int
    columns: int
    blocks: int
    taps: int

    @classmethod
    def of(cls, schedule: Any, machine: Machine) -> Depthwise | None:
        """Return the space of a function, None where it is none."""
        block = find(schedule, DEPTHWISE)
        if block is None:
            return None
        spatial, sums = ([int(schedule.get(loop).extent) for loop in loops] for loops in roles(schedule, block))
        return cls(machine, spatial[1], spatial[2], spatial[3] // machine.lanes, math.prod(sums))

    def features(self) -> tuple[int, ...]:
        """Return rows, columns, blocks and taps."""
        return (self.rows, self.columns, self.blocks, self.taps)

    def choices(self) -> list[Choice]:
        """Return tiles of columns and blocks, some eight registers first."""
        found = []
        for wide, blocks in itertools.product(divisors(self.columns, LONGEST), divisors(self.blocks, 8)):
            if wide * blocks + 2 < self.machine.registers:
                found.append((abs(wide * blocks - _AT_ONCE), -wide, {"wide": wide, "blocks": blocks}))
        found.sort(key=lambda one: one[:2])
        stretches = divisors(self.rows, self.rows)
        middle = min(stretches, key=lambda s: abs(s - _STRETCH))
        result: list[Choice] = []
        for _, _, tile in found[:12]:
            for stretch, whole in itertools.product(dict.fromkeys((middle, stretches[-1], stretches[0])), (0, 1)):
                result.append({**tile, "stretch": stretch, "whole": whole})
        threads = self.machine.threads
        parts = {s: self.rows // s for s in stretches}
        return sorted(result, key=lambda c: math.ceil(parts[c["stretch"]] / threads) * threads / parts[c["stretch"]])

    def apply(self, schedule: Any, choice: Choice) -> None:
        """Schedule the function; `whole` says that the input is filled up once, not at each stretch of rows."""
        block = schedule.get_sblock(DEPTHWISE)
        final = one_block_behind(schedule, block)
        schedule.set_scope(block, 0, "local")
        (n, rows, columns, channels), taps = roles(schedule, block)
        outside, row = schedule.split(rows, [None, choice["stretch"]])
        c_out, wide = schedule.split(columns, [None, choice["wide"]])
        b_out, b_in, lane = schedule.split(channels, [None, choice["blocks"], self.machine.lanes])
        schedule.reorder(n, outside, row, b_out, c_out, *taps, wide, b_in, lane)
        schedule.reverse_compute_at(final, c_out)
        outer = shared_by_threads(schedule, self.machine, [n, outside])
        fill_up(schedule, self.machine, None if choice["whole"] else outer)
        for loop in (*taps, wide, b_in):
            schedule.unroll(loop)
        schedule.vectorize(lane)
        decomposed(schedule, block, taps[0], 4)
        *done, after = schedule.get_loops(final)[4:]
        vectorized(schedule, after, self.machine.lanes)
        for loop in done:
            schedule.unroll(loop)
