"""Mixed precision for one compile: what its budgets limit, which weights may have 4 bits, which points are tried.

    asked                                   choices of a unit          limits of the integer program
    auto, int8                              float, 8 bits              half of the work on integers; REACH
    auto, --max-size that 8 bits miss       float, 8 bits, 4 bits      the same, and bytes
    w4a8                                    8 bits, 4 bits             WIDE_LAYERS at 8 bits
    w4a8, --max-size                        float, 8 bits, 4 bits      half of the work on integers, and bytes

`--max-size` and `--max-latency` are limits wherever they are stated; then the least error within them is looked for.
Sizes are predicted from two or three files and closed by bisection on files that are really built; latencies by
closing.py, once they have been measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .. import job
from .. import model as model_io
from ..errors import BudgetError
from ..quantization.quantizer import Quantizer
from ..report.text import count
from ..settings import objection
from ..types import QuantScheme
from . import mixed, narrow, program
from .narrow import Widths
from .tradeoff import Point, Tradeoff
from .weighing import Narrow, mixtures, weigh

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..job import Job
    from ..proof import Prover
    from ..quantization.closeness import Closeness

#: Layers that `--precision w4a8` may keep at 8 bits where no size is stated.
WIDE_LAYERS = 2
#: Points of the frontier; fewer where each has its weights rounded anew.
_POINTS, _POINTS_NARROW = 6, 3
#: Seconds in which the float model's latency is measured, for a limit in milliseconds.
_SECONDS = 1.0


_Search = functools.partial[tuple[mixed.Assignment, ...]]


@dataclass(frozen=True, eq=False)
class Mix:
    """A measured program, the limits that hold for it, the points to try, and the quantizers that make them."""

    tradeoff: Tradeoff
    quantizer: Quantizer
    widths: Widths | None = None
    points: tuple[Point, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)

    def quantizer_of(self, point: Point) -> Quantizer:
        """Return what builds a point; where only some weights have 4 bits they are rounded now."""
        return self.quantizer if self.widths is None else self.widths.mixture(point)

    def uniform(self, precision: str) -> Point:
        """Return what is predicted of one precision (int8 or w4a8) throughout."""
        return self.tradeoff.point(self.tradeoff.uniform(mixed.NARROW if precision == "w4a8" else mixed.INTEGER))

    def told(self) -> str:
        """Return what the step says of itself."""
        t = self.tradeoff
        off = "" if t.misfit is None else f", latencies within {100 * t.misfit:.0f} %"
        return (
            f"{count(len(self.points), 'assignment')}, from {count(t.errors.images, 'image')}; models fit what was "
            f"measured: errors within {t.errors.misfit_db:.1f} dB{off}{'; cached' if t.cached else ''}"
        )


def possible(this: Job) -> bool:
    """Say whether mixtures are looked for: there must be images; INT8 wants latencies that are measured here.

    Layers are timed by ONNX Runtime's profiler, which says nothing of other backends' kernels.
    """
    if this.images is None or "mixed-precision" in this.options.without or not this.backend.runs_onnx:
        return False
    return this.options.precision == "w4a8" or (this.options.precision in ("auto", "int8") and this.timed_here)


def widths(this: Job, quantizer: Quantizer, prover: Prover, size: int) -> Widths | None:
    """Return weights of 4 and of 8 bits where both are to be mixed; `size` is that of the quantizer's file."""
    schemes = this.backend.schemes(this.profile)
    wide, four = schemes["int8"], schemes["w4a8"]
    if not isinstance(wide, QuantScheme) or not isinstance(four, QuantScheme) or not possible(this):
        return None
    if this.options.precision == "w4a8":
        return narrow.widened(this, quantizer, wide)
    return None if objection(this, "w4a8", [size]) else narrow.narrowed(this, quantizer, four, prover)


def mix(
    this: Job, quantizer: Quantizer, ends: Widths | None, baseline: Path, judge: Closeness | None = None
) -> Mix | None:
    """Measure and solve; None where there is nothing to choose. `baseline` is the float model's file.

    `judge` is what the candidates' calibration figures come from.
    """
    assert this.images is not None
    budget = this.options.budget
    few_wide = ends is not None and this.options.precision == "w4a8" and budget.max_size_bytes is None
    wide = quantizer if ends is None else ends.wide
    tradeoff = weigh(
        wide,
        this.images,
        job.one_input(this) if this.timed_here and not few_wide else None,
        threads=this.threads,
        seed=this.options.seed,
        narrow=None if ends is None else Narrow(ends.narrow, floats=not few_wide),
        sizes=None if budget.max_size_bytes is None else _sizes(wide, ends, baseline),
        judge=judge,
        deadline=this.deadline,
        progress=this.progress,
    )
    if tradeoff is None:
        return None
    bare = Mix(tradeoff, wide, ends)
    if few_wide:
        best = tradeoff.closest({"wide": WIDE_LAYERS})
        return Mix(tradeoff, wide, ends, mixtures(tradeoff, [best]), {"wide": WIDE_LAYERS})
    limits = _limits(this, bare, baseline)
    deadline = None if this.deadline is None else max(this.deadline, time.monotonic() + 1.0)
    search = functools.partial(
        tradeoff.frontier,
        points=_POINTS if ends is None else _POINTS_NARROW,
        deadline=deadline,
        progress=this.progress,
    )
    some = mixtures(tradeoff, _found(search, limits))
    if this.options.precision == "w4a8":
        some = tuple(point for point in some if point.narrow)
    return Mix(tradeoff, wide, ends, some, limits)


def weighed(this: Job, quantizer: Quantizer, judge: Closeness | None = None) -> Mix | None:
    """Return the program of a quantizer that no mixtures were made of, for stepping back; None without images."""
    if this.images is None:
        return None
    feed = job.one_input(this) if this.timed_here else None
    found = weigh(
        quantizer, this.images, feed, threads=this.threads, seed=this.options.seed, judge=judge,
        deadline=this.deadline, progress=this.progress,
    )  # fmt: skip
    return None if found is None else Mix(found, quantizer)


def _found(search: _Search, limits: Mapping[str, float]) -> tuple[mixed.Assignment, ...]:
    """Return the frontier within the limits; a latency that nothing is predicted to hold is left to be measured."""
    for kept in (limits, {name: limit for name, limit in limits.items() if name != "ms"}):
        try:
            return search(kept)
        except BudgetError:
            continue
    return ()


# ------------------------------------------------------------------------------------------ budgets


def _limits(this: Job, mix: Mix, baseline: Path) -> dict[str, float]:
    """Return the stated budgets in the program's measures."""
    budget, found = this.options.budget, {}
    if budget.max_size_bytes is not None:
        found["bytes"] = _predicted_bytes(mix, budget.max_size_bytes)
    if budget.max_latency_ms is not None and mix.tradeoff.timed:
        found["ms"] = mix.tradeoff.ms_for(budget.max_latency_ms, _float_ms(this, baseline))
    return found


def _predicted_bytes(mix: Mix, most: float) -> float:
    """Return the prediction up to which files are no larger than `most` bytes, by bisection on files."""

    def size(one: mixed.Assignment) -> float:
        point = mix.tradeoff.point(one)
        unrounded = mix.quantizer if mix.widths is None else mix.widths.unrounded(point)
        return float(_bytes(unrounded.build(point.keep_float).model))

    best, _ = program.refine(mix.tradeoff.problem, "error", "bytes", most, size, tolerance=0.01)
    return most if best is None else best.predicted["bytes"] * (1 + 1e-9)


def _sizes(wide: Quantizer, ends: Widths | None, baseline: Path) -> dict[str, float]:
    """Return the bytes of the files with everything in one precision."""
    found = {mixed.FLOAT: model_io.size_bytes(baseline), mixed.INTEGER: _bytes(wide.build().model)}
    if ends is not None:
        found[mixed.NARROW] = _bytes(ends.narrow.build().model)
    return {precision: float(size) for precision, size in found.items()}


def _bytes(model: ir.Model) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model_io.save(model, path)
        return model_io.size_bytes(path)


def _float_ms(this: Job, baseline: Path) -> float:
    assert this.target is not None
    runner = this.backend.open(this.backend.lower(baseline, this.profile, "fp32"), this.threads)
    found = this.target.measure(
        {"fp32": runner}, job.one_input(this), baseline="fp32", threads=this.threads, seconds=_SECONDS
    )
    ms = found["fp32"].median_ms
    assert ms is not None  # the target has just measured it
    return ms
