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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from .kernels import CONTRACTION, DEPTHWISE, LONGEST, PADDED
from .machine import Machine

Choice = Mapping[str, int]
#: TVM's number of an axis that is not summed over.
_SPATIAL = 0
#: How many loops sum where four bytes are summed at once: without taps and with.
_WITH_FOURS = (2, 4)
#: A multiply-add's result is there four cycles later, and two begin in each.
_AT_ONCE = 8
#: Schedules that MetaSchedule draws for functions that are none of ours, at most.
_DRAWN = 48
#: Rows of a stretch that the first guess takes.
_STRETCH = 8


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
    """Return the space of a function, None where it has none of these."""
    for kind in (Contraction, Depthwise, Plain):
        found = kind.of(schedule, machine)
        if found is not None:
            return found
    return None


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
        block = _block(schedule, CONTRACTION)
        if block is None:
            return None
        spatial, sums = ([int(schedule.get(loop).extent) for loop in loops] for loops in _roles(schedule, block))
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
            _divisors(self.rows, 4), _divisors(self.columns, LONGEST), _divisors(self.blocks, 8)
        ):
            places = high * wide
            if places * blocks + blocks < self.machine.registers:
                idle = max(1.0, _AT_ONCE / (places * blocks))
                found.append(((1 / places + 0.5 / blocks) * idle, high, wide, blocks))
        result: list[Choice] = []
        for (_, high, wide, blocks), unroll in itertools.product(sorted(found)[:16], (4, 2, 1)):
            if self.depth % unroll:
                continue
            fit = [s for s in _divisors(self.rows, self.rows) if s % high == 0]
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
        final = _last(schedule, block)
        schedule.set_scope(block, 0, "local")
        (*lead, outputs), sums = _roles(schedule, block)
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
        outer = _shared(schedule, self.machine, shared)
        _pad(schedule, self.machine, outer if stretch and not choice["weights"] else None)
        outside = len(order) - len(shared) + 1
        for loop in (*tile, d_in):
            schedule.unroll(loop)
        dot = self.machine.dot if four else None
        if dot is None:
            schedule.vectorize(lane)
        _decomposed(schedule, block, (*taps, d_out)[0], outside)
        if dot is not None:
            schedule.tensorize(lane, dot.intrinsic)
        *done, after = schedule.get_loops(final)[outside:]
        _vectorized(schedule, after, self.machine.lanes)
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
        block = _block(schedule, DEPTHWISE)
        if block is None:
            return None
        spatial, sums = ([int(schedule.get(loop).extent) for loop in loops] for loops in _roles(schedule, block))
        return cls(machine, spatial[1], spatial[2], spatial[3] // machine.lanes, math.prod(sums))

    def features(self) -> tuple[int, ...]:
        """Return rows, columns, blocks and taps."""
        return (self.rows, self.columns, self.blocks, self.taps)

    def choices(self) -> list[Choice]:
        """Return tiles of columns and blocks, some eight registers first."""
        found = []
        for wide, blocks in itertools.product(_divisors(self.columns, LONGEST), _divisors(self.blocks, 8)):
            if wide * blocks + 2 < self.machine.registers:
                found.append((abs(wide * blocks - _AT_ONCE), -wide, {"wide": wide, "blocks": blocks}))
        found.sort(key=lambda one: one[:2])
        stretches = _divisors(self.rows, self.rows)
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
        final = _last(schedule, block)
        schedule.set_scope(block, 0, "local")
        (n, rows, columns, channels), taps = _roles(schedule, block)
        outside, row = schedule.split(rows, [None, choice["stretch"]])
        c_out, wide = schedule.split(columns, [None, choice["wide"]])
        b_out, b_in, lane = schedule.split(channels, [None, choice["blocks"], self.machine.lanes])
        schedule.reorder(n, outside, row, b_out, c_out, *taps, wide, b_in, lane)
        schedule.reverse_compute_at(final, c_out)
        outer = _shared(schedule, self.machine, [n, outside])
        _pad(schedule, self.machine, None if choice["whole"] else outer)
        for loop in (*taps, wide, b_in):
            schedule.unroll(loop)
        schedule.vectorize(lane)
        _decomposed(schedule, block, taps[0], 4)
        *done, after = schedule.get_loops(final)[4:]
        _vectorized(schedule, after, self.machine.lanes)
        for loop in done:
            schedule.unroll(loop)


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
            return cls(machine, sizes, any(_roles(schedule, block)[1] for block in blocks))
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
        drawn: list[Choice] = [{"seed": i} for i in range(_DRAWN if self.sums else 0)]
        return [*({"lanes": n, "across": a, "sums": s} for n, a, s in table), *drawn]

    def apply(self, schedule: Any, choice: Choice) -> None:
        """Schedule the function."""
        if "seed" in choice:
            _drawn(schedule, self.machine, choice["seed"])
            return
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            if not _roles(schedule, block)[1] and len(schedule.get_consumers(block)) == 1:
                _tried(schedule, lambda s, b=block: s.compute_inline(b))
        for block in schedule.get_child_blocks(schedule.get_sblock("root")):
            spatial, sums = _roles(schedule, block)
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
        _shared(schedule, self.machine, outer)
        if sums:
            start = schedule.decompose_reduction(block, sums[0])
            if order:
                schedule.vectorize(schedule.get_loops(start)[-1])


def _last_axes(schedule: Any, block: Any) -> list[int]:
    """Return which of a block's axes run along the last index of what it reads.

    Only what is as large as the positions counts, and, where the block sums, what is summed.
    """
    body = schedule.get(block)
    spatial = [axis for axis in body.iter_vars if int(axis.iter_type) == _SPATIAL]
    size = math.prod(int(axis.dom.extent) for axis in spatial)
    sums = body.iter_vars[-1] if len(spatial) < len(body.iter_vars) else None
    ends = []
    for read in body.reads:
        at = [index.min for index in read.region]
        summed = sums is None or any(sums.var.same_as(one) for one in at)
        if at and summed and math.prod(int(i) for i in read.source.shape) >= size:
            ends.append(at[-1])
    return [i for i, axis in enumerate(body.iter_vars) for end in ends if axis.var.same_as(end)]


# ------------------------------------------------------------------------------------------- parts


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


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _block(schedule: Any, name: str) -> Any:
    """Return the block called `name`, None where there is none."""
    try:
        return schedule.get_sblock(name)
    except Exception:  # TVM raises what it likes
        return None


def _roles(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """Return a block's loops over positions, and those that sum."""
    loops, kinds = schedule.get_loops(block), [int(v.iter_type) for v in schedule.get(block).iter_vars]
    pairs = list(zip(loops, kinds, strict=True))
    return [loop for loop, kind in pairs if kind == _SPATIAL], [loop for loop, kind in pairs if kind != _SPATIAL]


def _shared(schedule: Any, machine: Machine, loops: list[Any]) -> Any:
    """Make one loop of the outer ones, which threads share, and return it."""
    outer = schedule.fuse(*loops) if len(loops) > 1 else loops[0]
    if machine.threads > 1:
        schedule.parallel(outer)
    return outer


def _last(schedule: Any, block: Any) -> Any:
    """Make one block of all that comes after `block`, and of what that reads beside it, and return it."""
    (final,) = schedule.get_output_blocks("root")
    name = schedule.get(block).name_hint
    for one in schedule.get_child_blocks(schedule.get_sblock("root")):
        if schedule.get(one).name_hint not in (name, PADDED) and schedule.get_consumers(one):
            schedule.compute_inline(one)
    return schedule.get_sblock(schedule.get(final).name_hint)


def _pad(schedule: Any, machine: Machine, where: Any) -> None:
    """Fill the input up at a loop, or once."""
    pad = _block(schedule, PADDED)
    if pad is None:
        return
    if where is not None:
        schedule.compute_at(pad, where)
    loops = schedule.get_loops(pad)
    _vectorized(schedule, loops[-1], machine.lanes)
    if where is None and machine.threads > 1:
        schedule.parallel(schedule.fuse(*loops[:2]))


def _decomposed(schedule: Any, block: Any, loop: Any, outside: int) -> None:
    """Begin the sums before `loop`, unrolled and vectorized like the sums; `outside` loops are around both."""
    start = schedule.decompose_reduction(block, loop)
    *begun, lane = schedule.get_loops(start)[outside:]
    schedule.vectorize(lane)
    for one in begun:
        schedule.unroll(one)


def _vectorized(schedule: Any, loop: Any, lanes: int) -> None:
    """Vectorize the inner `lanes` of a loop, or the most that divide it."""
    extent = int(schedule.get(loop).extent)
    lanes = math.gcd(extent, lanes)
    if extent > lanes:
        loop = schedule.split(loop, [None, lanes])[1]
    if lanes > 1:
        schedule.vectorize(loop)
