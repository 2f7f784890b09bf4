"""Layers that would collapse stay in float, with the reason."""

import hashlib
from dataclasses import dataclass, field

import pytest
from edgec.backends import ort as ort_backend
from edgec.compiler.quantization.quantizer import FLOOR_DB, Quantizer
from edgec.compiler.types import InputSpec, Range, silent
from test_quantize import ranges_of, residual, weight


@dataclass
class Batch:
    feed: dict
    count: int
    rows: int
    labels: None = None


@dataclass
class Images:
    """What the quantizer asks of a folder."""

    feed: dict = field(default_factory=lambda: {"x": weight(4, 8, 6, 6)})
    specs: tuple = (InputSpec("x", "float32", (None, 8, 6, 6)),)
    pre: None = None

    def manifest(self):
        return hashlib.sha256(self.feed["x"].tobytes()).hexdigest()

    def __len__(self):
        return 4

    def subset(self, indices):
        return self

    def batches(self, size):
        return [Batch(self.feed, 4, 4)]


@pytest.fixture
def quantizer():
    model, images = residual(), Images()
    found = ranges_of(model, ort_backend.SUPPORTS, images.feed)
    return Quantizer(model, ort_backend.SUPPORTS, ort_backend.SCHEMES[0][1], found), images


def test_well_behaved_layers_all_run_on_integers(quantizer):
    made, images = quantizer
    corrected = made.corrected(images, 1, silent)
    assert not corrected.kept
    assert min(corrected.errors.values()) > FLOOR_DB


def test_a_layer_whose_input_range_explodes_stays_in_float_and_says_why(quantizer):
    made, images = quantizer
    made.ranges["ra"] = Range(0.0, 1e5)  # one step is larger than the whole tensor
    corrected = made.corrected(images, 1, silent)
    assert "Conv_2" in corrected.kept
    assert "Conv_0" not in corrected.kept
    assert "below 12" in corrected.kept["Conv_2"]
    built = corrected.build()
    assert "Conv_2" in {r.node for r in built.records[0].refusals if r.rule == "kept-float"}
