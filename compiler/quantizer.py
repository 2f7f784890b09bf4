"""From calibration statistics to quantized candidates: ranges, bias correction, what stays in float, how to step back.

1. Each method of choosing ranges gives a candidate. Its layers' own errors (sensitivity.py) say by how much each output
   is shifted, which the biases then correct, and which layers collapse.
2. Left to `auto`, the method is the one whose outputs are closest to the float model's on calibration images.
3. A layer is left in float where quantizing it destroys it: its own SQNR is below FLOOR_DB. That is a floor against
   collapse, not a tuning knob: 8 bits give 30 to 45 dB on a well-behaved layer.
4. Stepping back from a broken budget widens the layers with the lowest own SQNR first, doubling their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..backends.ort import Session
from ..calib import ranges as calib_ranges
from ..passes.quantize import Quantize
from . import fidelity, pipeline
from . import model as model_io
from .layers import LINEAR
from .sensitivity import LayerError, layer_errors
from .types import Fidelity, OpSupport, PassRecord, Progress, QuantScheme, Range, TensorStatistics

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ..calib.folder import Folder

#: What `auto` chooses among (docs/benchmarks.md has what each gains).
AUTO_METHODS = ("minmax", "percentile", "entropy", "mse")
#: The method where no images are at hand to choose by.
DEFAULT_METHOD = "percentile"
#: An own SQNR below this means that the layer's output is mostly noise.
FLOOR_DB = 12.0
#: Layers' errors are averaged, and methods compared, over so many input numbers, but at least so many images. Few
#: images flatter methods that clip: what they clip is rare.
_NUMBERS, _LEAST_IMAGES = 64 * 3 * 224 * 224, 64


@dataclass(frozen=True)
class Quantized:
    """One quantized candidate: the model, the pass's record, and the nodes that were kept in float with reasons."""

    model: ir.Model
    record: PassRecord
    keep_float: Mapping[str, str]


@dataclass(frozen=True)
class Quantizer:
    """Makes quantized candidates of one float model for one backend's tables and one choice of ranges."""

    model: ir.Model
    supports: tuple[OpSupport, ...]
    scheme: QuantScheme
    ranges: Mapping[str, Range]
    method: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    bias_shift: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    def build(self, keep_float: Mapping[str, str] | None = None) -> Quantized:
        """Quantize a copy of the model, all but the nodes in `kept` and in `keep_float` (name -> reason)."""
        keep = {**self.kept, **(keep_float or {})}
        step = Quantize(self.ranges, self.supports, self.scheme, keep, self.bias_shift)
        result, (record,) = pipeline.run(model_io.copy(self.model), [step], None)
        return Quantized(result, record, keep)

    def corrected(self, images: Folder, threads: int, progress: Progress) -> Quantizer:
        """Return a quantizer that knows its layers' own errors on the images and corrects its biases by them."""
        few = _few(images)
        first = self.build()

        def named(what: str, done: int, total: int | None) -> None:
            progress(f"{what} ({self.method})", done, total)

        if not first.record.modified:
            return self
        found = layer_errors(self.model, first.model, few.batches(8), images=len(few), threads=threads, progress=named)
        return replace(
            self,
            errors={name: e.sqnr_db for name, e in found.items()},
            bias_shift={name: e.shift for name, e in found.items() if e.shift is not None},
            kept=_collapsed(found),
        )

    def widened(self) -> list[dict[str, str]]:
        """Return ever larger sets of layers to keep in float: the 1, 2, 4, … with the lowest own SQNR."""
        ranked = sorted((db, name) for name, db in self.errors.items() if name not in self.kept)
        counts = [2**k for k in range(len(ranked).bit_length()) if 2**k < len(ranked)]
        return [
            {name: f"kept in float to hold the budget (own SQNR {db:.1f} dB)" for db, name in ranked[:count]}
            for count in counts
        ]


def edges(quantizer: Quantizer) -> list[dict[str, str]]:
    """Return what may be left in float for nothing: the layers at the two ends of the network, most of them first.

    A first layer has few input channels and fills no integer kernel; a last one gives floats anyway. Both round where
    it hurts most: the image itself, and the answer.
    """
    inputs, outputs = set(quantizer.model.graph.inputs), set(quantizer.model.graph.outputs)
    layers = [n for n in quantizer.model.graph if n.name in quantizer.errors and n.op_type in LINEAR]
    first = {
        n.name or "": "first layer: float costs less than 4 % of the time" for n in layers if n.inputs[0] in inputs
    }
    last = {
        n.name or "": "last layer: float costs less than 4 % of the time" for n in layers if n.outputs[0] in outputs
    }
    both = [{**first, **last}, first, last] if first and last else [first or last]
    return [e for e in both if e and len(e) < len(layers)]


def choose_ranges(statistics: Mapping[str, TensorStatistics], method: str, scheme: QuantScheme) -> dict[str, Range]:
    """Return each tensor's range by the method, for the scheme's activations."""
    return {name: calib_ranges.choose(stats, method, symmetric=scheme.symmetric) for name, stats in statistics.items()}


def closest(quantizers: list[Quantizer], images: Folder, threads: int, progress: Progress) -> Quantizer:
    """Return the quantizer whose outputs are closest to the float model's on a few images (worst output's SQNR)."""
    if len(quantizers) == 1:
        return quantizers[0]
    few = _few(images)
    with TemporaryDirectory() as folder:

        def session(model: ir.Model, name: str) -> Session:
            place = Path(folder) / name
            place.mkdir()
            return Session(model_io.session_source(model, place), threads=threads)

        found = fidelity.compare(
            session(quantizers[0].model, "float"),
            {q.method: session(q.build().model, q.method) for q in quantizers},
            few.batches(8),
            images=len(few),
            progress=progress,
        )
    return max(quantizers, key=lambda q: _worst_db(found[q.method]))


def _worst_db(found: Fidelity) -> float:
    return min((math.inf if o.sqnr_db is None else o.sqnr_db for o in found.outputs), default=0.0)


def _collapsed(errors: Mapping[str, LayerError]) -> dict[str, str]:
    return {
        name: f"its own SQNR would be {e.sqnr_db:.1f} dB, below {FLOOR_DB:g}"
        for name, e in errors.items()
        if e.sqnr_db < FLOOR_DB
    }


def _few(images: Folder) -> Folder:
    """Return enough of the images to judge by, spread evenly over the folder."""
    size = sum(math.prod(d or 1 for d in spec.shape[1:]) for spec in images.specs)
    count = min(len(images), max(_LEAST_IMAGES, _NUMBERS // max(size, 1)))
    return images.subset(i * len(images) // count for i in range(count))
