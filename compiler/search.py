"""The steps from a float model to few bits, each judged on calibration images and kept only if it comes closer.

smooth           outliers behind a normalisation move into the weights (passes/smooth.py)
absorb           what never falls below a positive value is moved into the next bias (passes/absorb_bias.py)
equalize         channels of a tensor get alike ranges (passes/equalize.py)
ranges           each tensor's range by minmax, percentile, entropy or mse (calib/ranges.py)
bias-correction  each output is right on average (sensitivity.py)
rounding         weights of few bits, rounded so that each layer's output errs least (rounder.py)

The judge is the SQNR of the quantized model's worst output against the float model's on a few calibration images
(closeness.py). A step that gains nothing is taken back. What each of them tried, chose and gained is its StepRecord.
Images that are held out are never seen here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ..calib import cache
from ..calib.channels import ChannelExtremes, collect_channels
from ..passes.absorb_bias import AbsorbHighBias
from ..passes.channel_groups import ChannelVariables, analyse
from ..passes.equalize import Equalize
from ..passes.equalize_factors import activation_range_factors
from ..passes.placement import observed_tensors
from ..passes.smooth import Smooth, smoothed_tensors
from ..passes.weights import ALONG_OUTPUTS
from . import model as model_io
from . import pipeline
from .closeness import Closeness
from .quantizer import Quantizer, choose_ranges
from .rounder import calibration_feeds, round_weights
from .types import CalibrationSummary, PassRecord, QuantScheme, Range, StepRecord, TensorStatistics

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..calib.folder import Folder
    from .job import Job
    from .proof import Prover

#: What `auto` chooses among; grids that are not even (FP8) take the extremes, which their methods' algebra assumes.
AUTO_METHODS = ("minmax", "percentile", "entropy", "mse")
#: How strongly small channels are enlarged: none of the three is best everywhere (docs/benchmarks.md).
STRENGTHS = (0.5, 0.75, 1.0)
#: Input numbers, and the least and most images, for the extremes of channels. Too few of them
#: flatter what is left as it was: ranges that clip a little are better ones.
_EXTREMES, _LEAST_EXTREMES, _MOST_EXTREMES = 1 << 21, 32, 400
#: Methods whose biases are corrected before the last comparison.
_FINALISTS = 2
#: Weights of so many levels or fewer on either side of 0 are rounded by rounder.py.
_FEW_LEVELS = 15
#: Weights of 8 bits are, too, where the outputs' SQNR is below the first and the weights take at most the second; on so
#: many images. It makes up for some of what earlier layers lost: FastestDet gains 2 dB, the ResNets (30 dB) 0.3.
_POOR_DB, _SMALL, _EIGHT_BIT_IMAGES = 25.0, 20_000_000, 48


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
    state = _Search(this, scheme, prover, this.images, Closeness(model, this.images, this.threads), model)
    if scheme.activation is not None:
        state.smooth()
        state.absorb()
        state.equalize()
        state.calibrate()
    if scheme.weight_max <= _FEW_LEVELS:
        state.round(calibration_feeds(state.quantizer.model, state.images, threads=this.threads))
    elif state.worth_rounding():
        state.round([batch.feed for batch in state.sample(_EIGHT_BIT_IMAGES).batches(16)])
    return Found(
        state.quantizer, tuple(state.steps), tuple(state.records), state.calibration, state.statistics, state.judge
    )


class _Search:
    """Lives for one search; each method is a step."""

    def __init__(
        self, this: Job, scheme: QuantScheme, prover: Prover, images: Folder, judge: Closeness, model: ir.Model
    ) -> None:
        self.this, self.scheme, self.prover, self.images, self.judge = this, scheme, prover, images, judge
        self.quantizer = Quantizer(model, this.backend.supports, scheme)
        self.steps: list[StepRecord] = []
        self.records: list[PassRecord] = []
        self.calibration: CalibrationSummary | None = None
        self.statistics: Mapping[str, TensorStatistics] = {}

    def wanted(self, name: str) -> bool:
        return name not in self.this.options.without

    def decibels(self, quantizer: Quantizer) -> float:
        """Return how close the quantizer's model is."""
        return self.judge.decibels(quantizer.build().model, simulated=self.scheme.simulated)

    def note(self, name: str, kept: bool, before: float | None, after: float | None, start: float, detail: str) -> None:
        self.steps.append(StepRecord(name, kept, before, after, time.perf_counter() - start, detail))

    # -------------------------------------------------------------------------------- on the float model

    def smooth(self) -> None:
        names = smoothed_tensors(self.quantizer.model) if self.wanted("smooth") else ()
        if not names:
            return
        start = time.perf_counter()
        batches = self.some().batches(8)
        found = collect_channels(self.quantizer.model, dict.fromkeys(names, -1), batches, self.this.threads)
        largest = {name: extremes.magnitude for name, extremes in found.items()}
        step = Smooth(largest, alpha=None, weight_max=self.scheme.weight_max)
        model, (record,) = pipeline.run(model_io.copy(self.quantizer.model), [step], self.prover)
        if not record.modified:
            return
        before, after = self._by_extremes(self.quantizer.model), self._by_extremes(model)
        self._accept("smooth", model, record, before, after, start, f"{record.rewrites} normalisations")

    def absorb(self) -> None:
        start = time.perf_counter()
        model = self.quantizer.model
        layers = [n.outputs[0].name or "" for n in model.graph if n.op_type in ALONG_OUTPUTS and _feeds_relu(n)]
        if not layers or not self.wanted("absorb"):
            return
        batches = self.some().batches(8)
        found = collect_channels(model, dict.fromkeys(layers, 1), batches, self.this.threads)
        absorbed = model_io.copy(model)
        passes = [AbsorbHighBias({name: extremes.min for name, extremes in found.items()})]
        absorbed, (record,) = pipeline.run(absorbed, passes, None)
        if record.modified:
            before, after = self._by_extremes(model), self._by_extremes(absorbed)
            self._accept("absorb", absorbed, record, before, after, start, f"{record.rewrites} layers")

    def equalize(self) -> None:
        if not self.wanted("equalize"):
            return
        start = time.perf_counter()
        variables = analyse(self.quantizer.model)
        if variables.count <= 1:
            return
        found = self._extremes(self.quantizer.model, variables)
        ranges = {n: np.stack([e.min, e.max]) for n, e in found.items() if variables.channels(n)[0] is not None}
        before = self.decibels(replace(self.quantizer, ranges=_scaled(found, variables, None)))
        tried = []
        for strength in STRENGTHS:
            factors = activation_range_factors(variables, ranges, strength)
            model = model_io.copy(self.quantizer.model)
            Equalize(factors).apply(model)
            trial = replace(self.quantizer, model=model, ranges=_scaled(found, variables, factors))
            tried.append((self.decibels(trial), strength, factors))
        after, strength, factors = max(tried, key=lambda t: t[0])
        model, (record,) = pipeline.run(model_io.copy(self.quantizer.model), [Equalize(factors)], self.prover)
        detail = f"{variables.count - 1} channel variables, strength {strength:g}"
        if record.modified:
            self._accept("equalize", model, record, before, after, start, detail)

    def _accept(
        self, name: str, model: ir.Model, record: PassRecord, before: float, after: float, start: float, detail: str
    ) -> None:
        kept = after > before
        if kept:
            self.quantizer = replace(self.quantizer, model=model)
            self.records.append(record)
        self.note(name, kept, before, after, start, detail)

    def _extremes(self, model: ir.Model, variables: ChannelVariables) -> dict[str, ChannelExtremes]:
        axes = {name: variables.channels(name)[0] for name in observed_tensors(model, self.quantizer.supports)}
        return collect_channels(model, axes, self.some().batches(8), self.this.threads)

    def _by_extremes(self, model: ir.Model) -> float:
        """Return how close the model comes with ranges from the extremes of a few images."""
        axes: dict[str, int | None] = dict.fromkeys(observed_tensors(model, self.quantizer.supports))
        found = collect_channels(model, axes, self.some().batches(8), self.this.threads)
        return self.decibels(replace(self.quantizer, model=model, ranges=_whole(found)))

    # -------------------------------------------------------------------------------- ranges and biases

    def calibrate(self) -> None:
        """Sweep the images once, try the methods, correct biases, and keep what comes closest."""
        options = self.this.options
        methods = AUTO_METHODS if options.method == "auto" else (options.method,)
        if (self.scheme.activation or "").startswith("float8") or not self.wanted("ranges"):
            methods = ("minmax",) if options.method == "auto" else methods
        start = time.perf_counter()
        found = cache.collect_cached(
            self.quantizer.model,
            observed_tensors(self.quantizer.model, self.quantizer.supports),
            self.images,
            histogram=methods != ("minmax",),
            seed=options.seed,
            threads=self.this.threads,
            progress=self.this.progress,
        )
        self.statistics, seconds = found.statistics, time.perf_counter() - start
        start = time.perf_counter()
        tried = []
        for method in methods:
            ranges = choose_ranges(found.statistics, method, self.scheme)
            quantizer = replace(self.quantizer, ranges=ranges, method=method)
            tried.append((self.decibels(quantizer), quantizer))
            self.this.progress("comparing ranges", len(tried), len(methods))
        first = tried[0][0]
        tried.sort(key=lambda t: -t[0])
        if len(methods) > 1:
            self.note("ranges", True, first, tried[0][0], start, " > ".join(q.method for _, q in tried))
        self.quantizer = self._corrected(tried[:_FINALISTS])
        self.calibration = CalibrationSummary(
            folder=str(options.calib),
            images=len(self.images),
            held_out=0 if options.eval or self.this.judged is None else len(self.this.judged),
            method=self.quantizer.method,
            skipped=tuple(self.images.skipped),
            images_per_second=None if found.cached else len(self.images) / seconds,
            cached=found.cached,
            key=found.key,
        )

    def _corrected(self, tried: Sequence[tuple[float, Quantizer]]) -> Quantizer:
        """Return the closest quantizer after the biases of all that were tried are corrected."""
        start = time.perf_counter()
        before = tried[0][0]
        results = []
        for _, quantizer in tried:
            fixed = quantizer.corrected(self.images, self.this.threads, self.this.progress)
            plain = replace(fixed, bias_shift={})
            one = fixed if self.wanted("bias-correction") else plain
            results.append((self.decibels(one), one))
        after, chosen = max(results, key=lambda t: t[0])
        if not self.wanted("bias-correction"):
            return chosen
        kept = after > before
        self.note("bias-correction", kept, before, after, start, f"{len(chosen.bias_shift)} layers, {chosen.method}")
        return chosen if kept else replace(results[0][1], bias_shift={})

    # -------------------------------------------------------------------------------- weights

    def worth_rounding(self) -> bool:
        """Say whether 8-bit weights are: what is lost is a lot, and the network small enough for it to take seconds."""
        integers = self.scheme.activation is not None and self.scheme.weight.endswith("int8")
        small = model_io.weights_bytes(self.quantizer.model) <= _SMALL
        return integers and small and self.decibels(self.quantizer) < _POOR_DB

    def some(self) -> Folder:
        """Return the images for extremes of channels."""
        size = sum(math.prod(d or 1 for d in spec.shape[1:]) for spec in self.images.specs)
        return self.sample(max(_LEAST_EXTREMES, min(_MOST_EXTREMES, _EXTREMES // max(size, 1))))

    def sample(self, count: int) -> Folder:
        """Return so many of the images, spread evenly."""
        count = min(count, len(self.images))
        return self.images.subset(i * len(self.images) // count for i in range(count))

    def round(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Round the weights for the least error of each layer's output on these inputs."""
        if not self.wanted("rounding"):
            return
        start = time.perf_counter()
        before = self.decibels(self.quantizer)
        bare = replace(self.quantizer, bias_shift={})
        found = round_weights(
            bare.model,
            bare.step(),
            feeds,
            correct=self.wanted("bias-correction"),
            seed=self.this.options.seed,
            threads=self.this.threads,
            progress=self.this.progress,
        )
        rounded = replace(bare, weights=found.weights, bias_shift=found.bias_shift)
        after = self.decibels(rounded)
        if after > before:
            self.quantizer = rounded
        self.note("rounding", after > before, before, after, start, f"{len(found.weights)} layers")


def _feeds_relu(node: ir.Node) -> bool:
    return any(use.node.op_type == "Relu" for use in node.outputs[0].uses())


def _scaled(
    found: Mapping[str, ChannelExtremes], variables: ChannelVariables, factors: np.ndarray | None
) -> dict[str, Range]:
    """Return the tensors' ranges after their channels were multiplied by the factors of their variables."""
    if factors is None:
        return _whole(found)
    scaled = {}
    for name, e in found.items():
        axis, ids = variables.channels(name)
        f = factors[ids] if axis is not None else factors[ids][:1]
        scaled[name] = ChannelExtremes(e.min * f, e.max * f)
    return _whole(scaled)


def _whole(found: Mapping[str, ChannelExtremes]) -> dict[str, Range]:
    return {name: Range(float(e.min.min()), float(e.max.max())) for name, e in found.items()}
