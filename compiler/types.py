"""The contract types: frozen dataclasses that the parts of edgec hand to each other. No I/O, no heavy imports.

Units are in the names (`_ms`, `_bytes`, `_db`); points are percentage points, 0 to 100.
A missing measurement is None, and `reason` says why; it is never an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import onnx_ir as ir

# --------------------------------------------------------------------------------------------- progress

#: `progress(what, done, total)`: called while something long runs; `total` is None where it is unknown. "what: figure"
#: is the same thing as "what", with what it has come to so far.
Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """Report no progress: the default of every function that takes a `Progress`."""


# --------------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class Fact:
    """One number of a device profile, with its source; `unverified` where none could be checked."""

    value: float
    source: str | None = None
    unverified: bool = False


@dataclass(frozen=True)
class DeviceProfile:
    """What is known of a device: data only, read from devices.yaml."""

    name: str
    title: str
    vendor: str
    kind: Literal["cpu", "gpu", "soc"]
    arch: str
    features: tuple[str, ...] = ()
    sm: float | None = None
    cores: int | None = None
    memory_gib: Fact | None = None
    bandwidth_gb_s: Fact | None = None
    peak_gflops: Mapping[str, Fact] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32",)
    backends: tuple[str, ...] = ("ort",)
    toolchain: Mapping[str, str] = field(default_factory=dict)
    channel_multiple: int = 1
    dla: int = 0
    power_modes: tuple[str, ...] = ()
    default_target: str | None = None
    note: str | None = None
    is_local: bool = False


# --------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Preprocess:
    """How an image file becomes a model input: `x = (pixel * scale - mean) / std`, after colour and resize.

    `size` is (height, width), None for the model's own; `assumed` lists what was not stated by the user.
    """

    size: tuple[int, int] | None = None
    resize: Literal["stretch", "letterbox", "crop"] = "stretch"
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """One model input: name, numpy dtype name, shape with None where a dimension is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


# --------------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Range:
    """The interval of a tensor that quantization shall represent; always holds 0 when quantized."""

    min: float
    max: float


@dataclass(frozen=True, eq=False)
class TensorStatistics:
    """What one sweep over the images leaves of a tensor; its size does not depend on the number of images.

    `min` and `max` are exact over all elements of all images; `min` is given as 0 where no element can be negative.
    `histogram` (int64, 1-D, None when only min and max were asked for) estimates the counts of all elements from a
    random subset of them, in equal bins over [`low`, `high`]. `images` is how many images were seen.
    """

    min: float
    max: float
    images: int
    histogram: np.ndarray | None = None
    low: float = 0.0
    high: float = 0.0


class StatisticsProvider(Protocol):
    """Statistics over the calibration images, for any model, handed to passes that need them."""

    def collect(self, model: ir.Model, tensors: tuple[str, ...]) -> dict[str, TensorStatistics]:
        """Return the statistics of the named tensors of `model`."""


# --------------------------------------------------------------------------------------------- quantization


#: ONNX types that weights may be stored in.
WeightType = Literal["int8", "uint8", "int4", "float8e4m3fn", "float8e5m2"]


@dataclass(frozen=True)
class FloatScheme:
    """Floating point throughout, in one type: what `fp32` and `fp16` mean on a device."""

    name: str
    dtype: Literal["float32", "float16"]
    source: str = ""


@dataclass(frozen=True)
class QuantScheme:
    """How a backend on a device wants its numbers of few bits: a row of that backend's table.

    `activation` and `weight` are ONNX type names in lower case; an `activation` of None leaves activations in float
    (weights only). `weight_max` is the largest magnitude a quantized weight may take (127; 63 where 8-bit products can
    saturate; 7 for int4). `block`: so many weights along the input axis share a scale; None for a scale per channel.
    `placement` says where Q/DQ pairs stand: "kernels" puts them around every node that has an integer
    kernel, inputs and output; "inputs" only in front of linear nodes and on the skip branch of an Add.
    `shield_float`: the runtime quantizes a float layer that it finds between DequantizeLinear and
    QuantizeLinear by itself, with one scale for all channels; a layer kept in float must be shielded from that.
    `simulated`: nothing here runs this type by itself; accuracy is measured on rounded floats.
    `nhwc_kernels`: the runtime's integer kernels want NHWC, its float layers NCHW (see passes/anchor_layout.py).
    `cast_weights`: the runtime's kernels take no packed weights, but it folds a Cast when it loads the model: weights
    pass through one on their way (see passes/weight_writer.py). `weight_max_8bit`: the largest magnitude of the
    weights of those layers that stay at 8 bits where the scheme's own weights have 4.
    """

    name: str
    activation: Literal["uint8", "int8", "uint16", "int16", "float8e4m3fn", "float8e5m2"] | None
    symmetric: bool
    weight: WeightType = "int8"
    weight_max: int = 127
    per_channel: bool = True
    block: int | None = None
    bias: Literal["int32", "float32"] = "int32"
    stored_weights: Literal["integer", "float"] = "integer"
    placement: Literal["kernels", "inputs"] = "kernels"
    shield_float: bool = False
    simulated: bool = False
    source: str = ""
    cast_weights: bool = False
    weight_max_8bit: int = 127
    nhwc_kernels: bool = False


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """The integers that stand for one layer's weight, chosen by a rounding method.

    `integers` (int8, the weight's own shape) times `scales`: one scale (`axis` None), one per index of `axis`, or,
    with `block`, an array of the weight's shape with the input axis divided by the block (float32).
    `dtype` is the ONNX type they are stored in; for an FP8 type `integers` holds the codes' values (ml_dtypes).
    """

    integers: np.ndarray
    scales: np.ndarray
    axis: int | None
    dtype: WeightType = "int8"
    block: int | None = None


@dataclass(frozen=True)
class OpSupport:
    """What a backend can do with one operator in integers: a row of its support table.

    `role` says how the operator is quantized:
      linear   activation input 0, weight input 1, bias input 2; its own scale on the output
      combine  every input is an activation with a scale of its own, and so is the output
      product  as combine, but worth integers wherever it stands, like linear (activation x activation MatMul)
      move     data movement: input and output share one scale, so nothing is rounded again
    `output` says whether the integer kernel needs a quantized output ("required") or can also give
    floats ("optional"). `needs` are conditions on the node, checked by name (see passes/placement_rules.py).
    Where an operator has several rows, the first whose conditions hold counts.
    """

    op: str
    role: Literal["linear", "combine", "product", "move"]
    activations: tuple[str, ...] = ("uint8", "int8")
    weights: tuple[str, ...] = ()
    output: Literal["required", "optional"] = "required"
    needs: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Refusal:
    """A node that could have been rewritten but was not: which, by which rule, and why."""

    node: str
    rule: str
    why: str


@dataclass(frozen=True)
class Proof:
    """An exact pass compared with the original model on sample inputs, ONNX Runtime's optimisations off.

    `error` is the largest difference relative to the output's largest magnitude; None with a `reason`
    where the proof was not made.
    """

    error: float | None
    tolerance: float
    samples: int
    reason: str | None = None


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: the report's row."""

    name: str
    stage: str
    exact: bool
    modified: bool
    seconds: float
    nodes_before: int
    nodes_after: int
    rewrites: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    proof: Proof | None = None


@dataclass(frozen=True)
class StepRecord:
    """One step on the way to few bits, which `--without NAME` leaves out: what it tried and what it gained.

    The SQNR (worst output, dB) is that of the quantized model on calibration images before and after; None where it
    was not measured. `kept` is False for a step that gained nothing and was taken back; `detail` says what was chosen.
    """

    name: str
    kept: bool
    sqnr_before_db: float | None
    sqnr_after_db: float | None
    seconds: float
    detail: str


@dataclass(frozen=True)
class OutputFidelity:
    """How close one output is to the reference, over all images. Ratios are of energies, in float64."""

    name: str
    sqnr_db: float | None
    cosine: float | None
    agreement: float | None = None


@dataclass(frozen=True)
class BoxFidelity:
    """How well a detector's boxes find the true ones: COCO's average precision (compiler/boxes.py), in percent.

    `truth` says what the true boxes are: YOLO or COCO (labels), or original (its own boxes); there are `boxes` of them.
    `ap50` is at IoU 0.5, `ap` the mean over 0.5, 0.55, … 0.95, of this model and, as `reference_…`, of the original.
    None where there is no true box, or no original.
    """

    truth: str
    boxes: int
    ap50: float | None
    ap: float | None
    reference_ap50: float | None
    reference_ap: float | None


#: The metrics whose figures are beside labels; those of the others are beside the original.
LABELLED = frozenset({"top1", "boxes-labelled"})


@dataclass(frozen=True)
class Fidelity:
    """How well a model does the original's job on held-out images.

    `metric` is one of top1, agreement, boxes, boxes-labelled, energy, or the user's own; `reference` and `value` are
    that figure for the original and for this model; `drop` is what was lost, in points, with its paired
    95 % interval (`drop_low`, `drop_high`). None with a `reason` where nothing could be judged.
    """

    metric: str
    images: int
    reference: float | None
    value: float | None
    drop: float | None
    drop_low: float | None
    drop_high: float | None
    outputs: tuple[OutputFidelity, ...] = ()
    top5: float | None = None
    reference_top5: float | None = None
    reason: str | None = None
    boxes: BoxFidelity | None = None


#: What a comparison on the same images shows, at 95 %.
Verdict = Literal["better", "no difference shown", "worse"]


@dataclass(frozen=True)
class Difference:
    """What one model, or condition, loses beside another on the same images, in `unit` (points or dB).

    Above zero something is lost. `low` and `high` are the paired 95 % interval, `error` the standard error, both by
    bootstrap; `images` were compared, and on `differing` of them the two differ at all.
    """

    value: float
    low: float
    high: float
    unit: str
    error: float
    images: int
    differing: int
    verdict: Verdict


@dataclass(frozen=True)
class UnderCondition:
    """One model, and the original that it was made from, on the images as one condition has them.

    `fidelity`: the model beside the original, both under the condition; None where there is only the original.
    `original`: the original under the condition beside itself on clean images. `difference`: the comparison that the
    verdict is of (Robustness says which); None on clean images where it is the base of the others.
    """

    fidelity: Fidelity | None
    original: Fidelity
    difference: Difference | None = None


@dataclass(frozen=True)
class Robustness:
    """One model under each condition, by name, clean first; always the same images.

    With labels a condition's difference is what the model loses beside the original under that condition; without,
    how much more it loses there than on clean images. `together` names the conditions whose verdict also holds when
    all of them are tested at once. `notes` say how to read the figures.
    """

    metric: str
    images: int
    seed: int
    conditions: Mapping[str, UnderCondition]
    together: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnDevice:
    """What a device told beside the latency; None for what it, or the runtime, does not tell.

    `with_copies_ms`: a call with its inputs brought to the GPU and its outputs fetched. `throughput`: calls a second
    that need not wait for each other. `joules`: energy of a call, `watts` mean power, both of the sensor `rail`.
    `builds_ms`: medians of further builds of the same engine. `engine` says what was built, `notes` what disturbed.
    """

    with_copies_ms: float | None = None
    throughput: float | None = None
    joules: float | None = None
    watts: float | None = None
    rail: str | None = None
    builds_ms: tuple[float, ...] = ()
    engine: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """Latency of one artifact on one target: milliseconds for one call.

    `low_ms` and `high_ms` are the 95 % interval of the median. `speedup` is the baseline's time over this
    one's, the median of pairs taken in the same rounds, with its own 95 % interval; None for the baseline.
    `p5_ms`: one call in twenty is faster, which is what it takes when nobody else uses the machine.
    """

    name: str
    target: str
    median_ms: float | None
    low_ms: float | None = None
    high_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    runs: int = 0
    threads: int = 0
    batch: int = 1
    provider: str | None = None
    reason: str | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    p5_ms: float | None = None
    on_device: OnDevice | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of the result, for `inspect --layers`.

    `sqnr_db` is the error of this layer alone at its output, its inputs and weights quantized from the
    float tensors; None with a `reason` where the layer is in float or was not judged.
    `sqnr_in_db` and `sqnr_out_db` are those of what it reads and gives, with the errors of all layers before it; None
    where there is no error, or none was measured. `clipped_percent`: elements of its output outside the represented
    range. `share_percent`: its part of the error at the network's outputs, each rounding measured alone, of which
    `weights_percent` (of the whole as well) by its weights. `cause` is the likely one, with figures, and `remedy` what
    was done or can be done. `latency_ms` is the median of the kernel that computes it, with what is fused to it; None
    where the backend does not say. Layers that only join or round tensors have `macs` 0; a graph input that is rounded
    is one with the operator "input".
    """

    node: str
    op: str
    precision: str
    output_range: Range | None = None
    scale: float | None = None
    sqnr_db: float | None = None
    macs: int | None = None
    reason: str | None = None
    sqnr_in_db: float | None = None
    sqnr_out_db: float | None = None
    clipped_percent: float | None = None
    share_percent: float | None = None
    weights_percent: float | None = None
    cause: str | None = None
    remedy: str | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Inspection:
    """An ONNX file at a glance. `macs` counts one image; None where a shape is unknown."""

    path: str
    size_bytes: int
    ir_version: int
    opset: int
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    operators: Mapping[str, int]
    parameters: int
    macs: int | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Artifact:
    """What a backend made of a graph: `model` is a file in `folder`, to be opened by that backend.

    `providers` are the execution providers that ONNX Runtime shall use, in order; empty for other backends.
    """

    backend: str
    precision: str
    folder: Path
    model: str
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One candidate that was built and judged on the way to the result: a row of the report's table.

    `predicted_ms` and `predicted_db` (output SQNR) are what mixed precision's models foretold, None where nothing was;
    `calibration_db` is the SQNR on calibration images that `predicted_db` is to be compared with. `integer_macs` is the
    share of multiply-accumulates on integers, None where nothing was predicted.
    """

    name: str
    precision: str
    measurement: Measurement
    fidelity: Fidelity | None
    size_bytes: int
    chosen: bool
    verdict: str
    predicted_ms: float | None = None
    predicted_db: float | None = None
    calibration_db: float | None = None
    integer_macs: float | None = None


@dataclass(frozen=True)
class Budget:
    """What the user will not give up: points of the fidelity figure, milliseconds, bytes."""

    max_drop: float = 1.0
    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    drop_stated: bool = False


@dataclass(frozen=True)
class CalibrationSummary:
    """What was calibrated on: counts of images, skipped files with their reasons, speed, cache hit or not.

    `degrade` is what the images were changed by, as `--degrade` takes it, in full.
    """

    folder: str
    images: int
    held_out: int
    method: str
    skipped: tuple[Refusal, ...] = ()
    images_per_second: float | None = None
    cached: bool = False
    key: str = ""
    degrade: str = "clean"


@dataclass(frozen=True)
class RobustWay:
    """One way of calibrating, on held-out images under each condition, and why it was kept or not.

    `under` has it beside the FP32 original. `sqnr_db`, by condition: the mean over images of its outputs' SQNR, of
    which `worst` names the lowest. Beside clean calibration, above zero where it is worse, and empty or None for clean
    calibration itself: `errors` in dB by condition, `losses` in points of the task's figure by condition (empty where
    the task has none), and `worst_error` in dB, each of the two under its own worst condition.
    """

    calibration: str
    kept: bool
    verdict: str
    worst: str
    sqnr_db: Mapping[str, float]
    under: Robustness
    errors: Mapping[str, Difference] = field(default_factory=dict)
    losses: Mapping[str, Difference] = field(default_factory=dict)
    worst_error: Difference | None = None


@dataclass(frozen=True)
class RobustChoice:
    """Which way of calibrating `compile --robust` kept, and the evidence; no `ways` where nothing was compared.

    Clean images may come to err by `tolerance_db` more at most. `not_tried` are the ways for which the time budget left
    no time. `why` is the sentence for the reader.
    """

    kept: str
    why: str
    tolerance_db: float
    ways: tuple[RobustWay, ...] = ()
    not_tried: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrunedLayer:
    """One linear layer's channels and multiply-accumulates (None where shapes are unknown) before and after a cut."""

    node: str
    inputs: int
    outputs: int
    inputs_left: int
    outputs_left: int
    macs: int | None
    macs_left: int | None


@dataclass(frozen=True)
class Trial:
    """One smaller network that was tried: how much faster than the whole one it was foretold and measured to be.

    Both are ratios in the precision that is delivered (`precision`), where both are quantized without any search;
    None where no time was foretold or measured. `drop`: points that it lost, rounded plainly where
    integers will be tried.
    """

    name: str
    precision: str
    predicted_speedup: float | None
    measured_speedup: float | None
    drop: float | None
    verdict: str


@dataclass(frozen=True)
class Pruning:
    """What `--prune` came to: what was asked, what was kept and why.

    Where something was cut (`kept`), `candidate` is the row of the attempts that has its latency, and `unrepaired` and
    `repaired` are the cut network beside the original on the images to judge by; None without such images. `tried` are
    the cuts that were tried on the way, `notes` what else is to be said.
    """

    asked: str
    why: str
    criterion: str
    groups: int
    kept: bool
    candidate: str | None = None
    layers: tuple[PrunedLayer, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    parameters_before: int | None = None
    parameters_after: int | None = None
    unrepaired: Fidelity | None = None
    repaired: Fidelity | None = None
    tried: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LowRankLayer:
    """A layer and the chain that it became, if any: `form` (passes/factorize.py) and `ranks`.

    Times are foretold, of one call: the layer's, and its chain's; of a layer that stayed, those of the closest chain
    that is faster, or of the fastest. None where nothing was timed.
    """

    node: str
    form: str | None
    ranks: tuple[int, ...]
    parameters: int
    parameters_left: int
    macs: int | None
    macs_left: int | None
    predicted_ms: float | None
    predicted_ms_chain: float | None


@dataclass(frozen=True)
class LowRank:
    """What `--low-rank` came to: what was asked, what was kept and why.

    Where something was factorized (`kept`), `candidate` is the row of the attempts that has its latency, and `fitted`
    is it beside the original on the images to judge by; None without such images. `predicted_speedup` is what the
    table of timed shapes foretold of it, as it will be delivered; `tried` are the choices of ranks that raced the whole
    network.
    """

    asked: str
    why: str
    kept: bool
    candidate: str | None = None
    layers: tuple[LowRankLayer, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    parameters_before: int | None = None
    parameters_after: int | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    fitted: Fidelity | None = None
    predicted_speedup: float | None = None
    tried: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything a compile found out; terminal, JSON and HTML are three views of it."""

    model: str
    device: DeviceProfile
    backend: str
    target: str
    precision: str
    headline: str
    original: Measurement
    baseline: Measurement
    result: Measurement
    fidelity: Fidelity | None
    budget: Budget
    size_before_bytes: int
    size_after_bytes: int
    passes: tuple[PassRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    layers: tuple[Layer, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    calibration: CalibrationSummary | None = None
    preprocess: Preprocess | None = None
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    seconds: float = 0.0
    seed: int = 0
    robust: RobustChoice | None = None
    pruning: Pruning | None = None
    low_rank: LowRank | None = None
