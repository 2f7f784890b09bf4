"""The steps that change the float model before it is quantized: it computes the same, and quantizes better.

smooth     outliers behind a normalisation move into the weights (passes/smooth.py)
absorb     what never falls below a positive value is moved into the next bias (passes/absorb_bias.py)
equalize   channels of a tensor get alike ranges (passes/equalize.py)

Each looks at extremes over a few calibration images and comes back with a Trial, or None where there is nothing to do;
search.py keeps what comes closer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ...calib.channels import ChannelExtremes, collect_channels
from ...passes.absorb_bias import AbsorbHighBias
from ...passes.base import Pass
from ...passes.channel_groups import ChannelVariables, analyse
from ...passes.constants import small_array
from ...passes.equalize import Equalize
from ...passes.equalize_factors import activation_range_factors
from ...passes.placement import observed_tensors
from ...passes.smooth import Smooth, smoothed_tensors
from ...passes.weights import ALONG_OUTPUTS
from .. import model as model_io
from .. import pipeline
from ..types import PassRecord, Range
from .closeness import Closeness
from .quantizer import Quantizer

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...calib.folder import Folder
    from ..job import Job
    from ..proof import Prover

#: How strongly small channels are enlarged: none of the three is best everywhere (docs/benchmarks.md).
STRENGTHS = (0.5, 0.75, 1.0)
#: A Clip that no image brings nearer to its limit than this counts as one that nothing reaches.
_ROOM = 1.25
#: Input numbers, and the least and most images, for the extremes of channels. Too few of them
#: flatter what is left as it was: ranges that clip a little are better ones.
_EXTREMES, _LEAST_EXTREMES, _MOST_EXTREMES = 1 << 21, 32, 400


@dataclass(frozen=True, eq=False)
class Trial:
    """A changed float model, how close it came when quantized by a few images' extremes, and the unchanged one."""

    model: ir.Model
    record: PassRecord
    before: float
    after: float
    detail: str


@dataclass(frozen=True, eq=False)
class Context:
    """What all steps of one search need."""

    this: Job
    prover: Prover
    images: Folder
    judge: Closeness

    def decibels(self, quantizer: Quantizer) -> float:
        """Return how close the quantizer's model is."""
        return self.judge.decibels(quantizer.build().model, simulated=quantizer.scheme.simulated)

    def sample(self, count: int) -> Folder:
        """Return so many of the images, spread evenly."""
        count = min(count, len(self.images))
        return self.images.subset(i * len(self.images) // count for i in range(count))

    def extremes(self, model: ir.Model, axes: Mapping[str, int | None]) -> dict[str, ChannelExtremes]:
        """Return the extremes of tensors along their axes over a part of the images."""
        size = sum(math.prod(d or 1 for d in spec.shape[1:]) for spec in self.images.specs)
        some = self.sample(max(_LEAST_EXTREMES, min(_MOST_EXTREMES, _EXTREMES // max(size, 1))))
        return collect_channels(model, axes, some.batches(8), self.this.threads)

    def by_extremes(self, quantizer: Quantizer, model: ir.Model) -> float:
        """Return how close `model` comes with ranges from extremes."""
        axes: dict[str, int | None] = dict.fromkeys(observed_tensors(model, quantizer.supports))
        return self.decibels(replace(quantizer, model=model, ranges=_whole(self.extremes(model, axes))))

    def run(self, model: ir.Model, step: Pass, *, exact: bool = True) -> tuple[ir.Model, PassRecord]:
        """Run a pass on a copy; an exact one is proven to leave the outputs as they are, whatever the input."""
        result, (record,) = pipeline.run(model_io.copy(model), [step], self.prover if exact else None)
        return result, record


def smooth(context: Context, quantizer: Quantizer) -> Trial | None:
    """Move outliers behind a normalisation into the weights."""
    names = smoothed_tensors(quantizer.model)
    if not names:
        return None
    found = context.extremes(quantizer.model, dict.fromkeys(names, -1))
    largest = {name: extremes.magnitude for name, extremes in found.items()}
    step = Smooth(largest, alpha=None, weight_max=quantizer.scheme.weight_max)
    model, record = context.run(quantizer.model, step)
    return _by_extremes(context, quantizer, model, record, f"{record.rewrites} normalisations")


def absorb(context: Context, quantizer: Quantizer) -> Trial | None:
    """Move what no image brings below a positive value into the next bias."""
    layers = [n.outputs[0].name or "" for n in quantizer.model.graph if n.op_type in ALONG_OUTPUTS and _feeds_relu(n)]
    if not layers:
        return None
    found = context.extremes(quantizer.model, dict.fromkeys(layers, 1))
    step = AbsorbHighBias({name: extremes.min for name, extremes in found.items()})
    model, record = context.run(quantizer.model, step, exact=False)
    return _by_extremes(context, quantizer, model, record, f"{record.rewrites} layers")


def equalize(context: Context, quantizer: Quantizer) -> Trial | None:
    """Give the channels of each tensor alike ranges, by the best of a few strengths."""
    unreached = _unreached(context, quantizer.model)
    variables = analyse(quantizer.model, unreached)
    if variables.count <= 1:
        return None
    axes = {name: variables.channels(name)[0] for name in observed_tensors(quantizer.model, quantizer.supports)}
    found = context.extremes(quantizer.model, axes)
    ranges = {n: np.stack([e.min, e.max]) for n, e in found.items() if axes[n] is not None}
    before = context.decibels(replace(quantizer, ranges=_whole(found)))
    tried = []
    for strength in STRENGTHS:
        factors = activation_range_factors(variables, ranges, strength)
        model = model_io.copy(quantizer.model)
        Equalize(factors, unreached).apply(model)
        ranged = replace(quantizer, model=model, ranges=_scaled(found, variables, factors))
        tried.append((context.decibels(ranged), strength, factors))
    after, strength, factors = max(tried, key=lambda t: t[0])
    model, record = context.run(quantizer.model, Equalize(factors, unreached), exact=not unreached)
    detail = f"{variables.count - 1} channel variables, strength {strength:g}"
    return Trial(model, record, before, after, detail) if record.modified else None


#: The steps, in their order.
FLOAT_STEPS: Mapping[str, Callable[[Context, Quantizer], Trial | None]] = {
    "smooth": smooth,
    "absorb": absorb,
    "equalize": equalize,
}


def _by_extremes(
    context: Context, quantizer: Quantizer, model: ir.Model, record: PassRecord, detail: str
) -> Trial | None:
    if not record.modified:
        return None
    before, after = (context.by_extremes(quantizer, one) for one in (quantizer.model, model))
    return Trial(model, record, before, after, detail)


def _unreached(context: Context, model: ir.Model) -> frozenset[str]:
    """Return the outputs of the Clips (ReLU6 and the like) whose upper limit no image comes near."""
    limits = {n.outputs[0].name or "": _number(n.inputs[2]) for n in model.graph if _is_relu_with_limit(n)}
    found = context.extremes(model, dict.fromkeys(limits)) if limits else {}
    return frozenset(name for name, e in found.items() if _ROOM * float(e.max.max()) < limits[name])


def _is_relu_with_limit(node: ir.Node) -> bool:
    return node.op_type == "Clip" and len(node.inputs) == 3 and _number(node.inputs[1]) == 0 < _number(node.inputs[2])


def _number(value: ir.Value | None) -> float:
    """Return a constant number, NaN where it is none."""
    array = small_array(value)
    return float(array.item()) if array is not None and array.size == 1 else math.nan


def _feeds_relu(node: ir.Node) -> bool:
    return any(use.node.op_type == "Relu" for use in node.outputs[0].uses())


def _scaled(found: Mapping[str, ChannelExtremes], variables: ChannelVariables, factors: np.ndarray) -> dict[str, Range]:
    """Return the tensors' ranges after their channels were multiplied by the factors of their variables."""
    scaled = {}
    for name, e in found.items():
        axis, ids = variables.channels(name)
        f = factors[ids] if axis is not None else factors[ids][:1]
        scaled[name] = ChannelExtremes(e.min * f, e.max * f)
    return _whole(scaled)


def _whole(found: Mapping[str, ChannelExtremes]) -> dict[str, Range]:
    return {name: Range(float(e.min.min()), float(e.max.max())) for name, e in found.items()}
