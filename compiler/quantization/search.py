"""The steps from a float model to few bits, each judged on calibration images and kept only if it comes closer.

smooth, absorb, equalize    the float model is changed so that it quantizes better (float_steps.py)
ranges           each tensor's range by minmax, percentile, entropy or mse (calib/ranges.py); under several conditions
                 also for each tensor's worst of them (calib/minimax.py)
bias-correction  each output is right on average: on exact inputs (sensitivity.py), or behind the layers that are
                 quantized already (layerwise.py)
rounding         weights rounded so that each layer's output errs least, which corrects biases on its way (rounder.py)

Without images there is nothing to judge by: ranges come from a file, and biases are corrected by what the network's
BatchNormalizations tell (analytic_bias.py).

The judge is the SQNR of the quantized model's worst output against the float model's on a few calibration images
(closeness.py). A step that gains nothing is taken back. What each of them tried, chose and gained is its StepRecord.
Images that are held out are never seen here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ...calib import degrade
from ...calib import ranges as calib_ranges
from ...passes.placement import observed_tensors
from ...passes.quant_params import needed_opset
from ...passes.rounding import MANY
from .. import model as model_io
from .. import pipeline
from ..fitting.feeds import calibration_feeds
from ..types import CalibrationSummary, PassRecord, QuantScheme, StepRecord, TensorStatistics
from . import analytic_bias
from .closeness import Closeness
from .conditions import CLEAN, MINIMAX, sweep
from .float_steps import FLOAT_STEPS, Context
from .quantizer import Quantizer
from .rounder import follow_biases, round_weights

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..job import Job
    from ..proof import Prover

#: What `auto` chooses among; grids that are not even (FP8) take the extremes, which their methods' algebra assumes.
AUTO_METHODS = ("minmax", "percentile", "entropy", "mse")
#: Methods whose biases are corrected before the last comparison.
_FINALISTS = 2
#: Weights of 8 bits are rounded by rounder.py where they take at most so many bytes as floats, on so many images. It
#: makes up for some of what earlier layers lost: on unseen images FastestDet gains 2 dB, the ResNets 0.5 to 0.7.
_SMALL, _EIGHT_BIT_IMAGES = 20_000_000, 100
#: Where images are degraded each condition needs its part: with 400 in place of 100, ResNet-20 gains 0.2 dB on average.
_DEGRADED_IMAGES = 400


@dataclass(frozen=True)
class Found:
    """What the search came to: a quantizer (of a model that may have been equalized) and how it got there."""

    quantizer: Quantizer
    steps: tuple[StepRecord, ...] = ()
    records: tuple[PassRecord, ...] = ()
    calibration: CalibrationSummary | None = None
    statistics: Mapping[str, TensorStatistics] = field(default_factory=dict)
    judge: Closeness | None = None


def search(this: Job, model: ir.Model, scheme: QuantScheme, prover: Prover) -> Found:
    """Run the steps that the job does not leave out. There must be images."""
    assert this.images is not None
    judge = Closeness(model, this.images, this.threads)
    state = _Search(Context(this, prover, this.images, judge), scheme, model)
    if scheme.activation is not None:
        state.prepare()
        state.calibrate()
    if state.worth_rounding():
        state.round()
    for name in state.late:
        state.note(name, False, None, None, time.perf_counter(), "not tried: the time budget is spent")
    return Found(state.quantizer, tuple(state.steps), tuple(state.records), state.calibration, state.statistics, judge)


def from_ranges(this: Job, model: ir.Model, scheme: QuantScheme) -> Found:
    """Do what can be done without images."""
    ranges = {} if this.options.ranges is None else calib_ranges.from_json(this.options.ranges)
    quantizer = Quantizer(model, this.backend.supports, scheme, ranges)
    if "bias-correction" in this.options.without:
        return Found(quantizer)
    start = time.perf_counter()
    unfolded, _ = pipeline.run(model_io.load(this.path), pipeline.unfolded_passes(needed_opset(scheme)), None)
    corrected = analytic_bias.corrected(quantizer, unfolded)
    layers = len(corrected.bias_shift)
    detail = f"{layers} layers, from BatchNormalization's statistics; there are no images to judge it by"
    step = StepRecord("bias-correction", layers > 0, None, None, time.perf_counter() - start, detail)
    return Found(corrected, (step,))


class _Search:
    """Lives for one search; each method is a step or a few."""

    def __init__(self, context: Context, scheme: QuantScheme, model: ir.Model) -> None:
        self.context, self.scheme = context, scheme
        self.this, self.images = context.this, context.images
        self.quantizer = Quantizer(model, self.this.backend.supports, scheme)
        self.steps: list[StepRecord] = []
        self.records: list[PassRecord] = []
        self.calibration: CalibrationSummary | None = None
        self.statistics: Mapping[str, TensorStatistics] = {}
        self.late: dict[str, None] = {}

    def wanted(self, name: str) -> bool:
        """Say whether a step is to be made: it was not left out, and there is time."""
        if name in self.this.options.without:
            return False
        if self.this.seconds_left == 0:
            self.late.setdefault(name)
        return name not in self.late

    def decibels(self, quantizer: Quantizer) -> float:
        """Return how close the quantizer's model is."""
        return self.context.decibels(quantizer)

    def note(self, name: str, kept: bool, before: float | None, after: float | None, start: float, detail: str) -> None:
        self.steps.append(StepRecord(name, kept, before, after, time.perf_counter() - start, detail))

    def prepare(self) -> None:
        """Change the float model where that makes it quantize better."""
        for name, step in FLOAT_STEPS.items():
            start = time.perf_counter()
            trial = step(self.context, self.quantizer) if self.wanted(name) else None
            if trial is None:
                continue
            kept = trial.after > trial.before
            if kept:
                self.quantizer = replace(self.quantizer, model=trial.model)
                self.records.append(trial.record)
            self.note(name, kept, trial.before, trial.after, start, trial.detail)

    # -------------------------------------------------------------------------------- ranges and biases

    def calibrate(self) -> None:
        """Sweep the images once, try the methods, correct biases, and keep what comes closest."""
        start, methods = time.perf_counter(), self._methods()
        found = sweep(
            self.quantizer.model,
            observed_tensors(self.quantizer.model, self.quantizer.supports),
            self.images,
            self.this.conditions,
            histogram=methods != ("minmax",),
            seed=self.this.options.seed,
            threads=self.this.threads,
            progress=self.this.progress,
        )
        self.statistics, seconds = found.statistics, time.perf_counter() - start
        start = time.perf_counter()
        tried = []
        for method in methods:
            quantizer = replace(self.quantizer, ranges=found.ranges(method, self.scheme), method=method)
            tried.append((self.decibels(quantizer), quantizer))
            self.this.progress("comparing ranges", len(tried), len(methods))
        first = tried[0][0]
        tried.sort(key=lambda t: -t[0])
        if len(methods) > 1:
            self.note("ranges", True, first, tried[0][0], start, " > ".join(q.method for _, q in tried))
        self.quantizer = self._corrected(tried[:_FINALISTS])
        speed = None if found.cached else len(self.images) / seconds
        self.calibration = self._summary(self.quantizer.method, speed, found.cached, found.key)

    def _summary(
        self, method: str, speed: float | None = None, cached: bool = False, key: str = ""
    ) -> CalibrationSummary:
        options, judged = self.this.options, self.this.judged
        return CalibrationSummary(
            folder=str(options.calib),
            images=len(self.images),
            held_out=0 if options.eval or judged is None else len(judged),
            method=method,
            skipped=tuple(self.images.skipped),
            images_per_second=speed,
            cached=cached,
            key=key,
            degrade=degrade.parse(options.degrade).text,
        )

    def _methods(self) -> tuple[str, ...]:
        """Return the methods to compare: one where it is named, where there is no time, or where grids are not even."""
        if self.this.options.method != "auto":
            return (self.this.options.method,)
        if (self.scheme.activation or "").startswith("float8"):
            return ("minmax",)
        several = (MINIMAX,) if self.this.conditions else ()
        if not self.wanted("ranges"):
            return several or ("minmax",)
        return (*several, *AUTO_METHODS)

    def _corrected(self, tried: Sequence[tuple[float, Quantizer]]) -> Quantizer:
        """Return the closest quantizer after the biases of all that were tried are corrected."""
        start = time.perf_counter()
        before, how = tried[0][0], "on exact inputs"
        results = []
        for _, quantizer in tried:
            fixed = quantizer.corrected(self.images, self.this.threads, self.this.progress)
            plain = replace(fixed, bias_shift={})
            one = fixed if self.wanted("bias-correction") else plain
            results.append((self.decibels(one), one))
        after, chosen = max(results, key=lambda t: t[0])
        if not self.wanted("bias-correction"):
            return chosen
        if not self.worth_rounding():  # which would do the same on its way
            followed = self._followed(chosen)
            on_prefix = self.decibels(followed)
            if on_prefix > after:
                after, chosen, how = on_prefix, followed, "on the quantized prefix"
        kept = after > before
        detail = f"{len(chosen.bias_shift)} layers, {how}, {chosen.method}"
        self.note("bias-correction", kept, before, after, start, detail)
        return chosen if kept else replace(results[0][1], bias_shift={})

    def _followed(self, quantizer: Quantizer) -> Quantizer:
        """Return it with its biases corrected layer after layer, each behind those that are quantized already."""
        bare = replace(quantizer, bias_shift={})
        shifts = follow_biases(
            bare.model,
            bare.step(),
            self._feeds(),
            threads=self.this.threads,
            progress=self.this.progress,
        )
        return replace(bare, bias_shift=shifts)

    # -------------------------------------------------------------------------------- weights

    def worth_rounding(self) -> bool:
        """Say whether weights are: integers of few bits, or of 8 in a network so small that it takes seconds."""
        if not self.wanted("rounding") or not self.scheme.weight.endswith(("int4", "int8")):
            return False
        few = self.scheme.weight_max <= MANY
        return few or (self.scheme.activation is not None and model_io.weights_bytes(self.quantizer.model) <= _SMALL)

    def _feeds(self) -> Sequence[Mapping[str, np.ndarray]]:
        """Return the images to walk along the layers with, fewer where memory would not hold them."""
        degraded = self.this.options.degrade != CLEAN
        most = _DEGRADED_IMAGES if degraded else _EIGHT_BIT_IMAGES
        most = len(self.images) if self.scheme.weight_max <= MANY else most
        return calibration_feeds(self.quantizer.model, self.context.sample(most), threads=self.this.threads)

    def round(self) -> None:
        """Round the weights for the least error of each layer's output."""
        start = time.perf_counter()
        before = self.decibels(self.quantizer)
        bare = replace(self.quantizer, bias_shift={})
        found = round_weights(
            bare.model,
            bare.step(),
            self._feeds(),
            correct=self.wanted("bias-correction"),
            seed=self.this.options.seed,
            threads=self.this.threads,
            progress=self.this.progress,
        )
        rounded = replace(bare, weights=found.weights, bias_shift=found.bias_shift)
        after = self.decibels(rounded)
        if after > before:
            self.quantizer = rounded
        if self.calibration is None:
            self.calibration = self._summary("weights alone")
        self.note("rounding", after > before, before, after, start, f"{len(found.weights)} layers")
