"""What auto tries on which device, and what it says of the rest."""

from dataclasses import replace

import lab
import numpy as np
import pytest
from edgec.backends.tensorrt import TensorRT
from edgec.compiler import devices
from edgec.compiler.settings import SETTINGS, not_tried, objection
from edgec.compiler.types import Budget
from test_quantize import build

NET = "g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) { y = Conv (x, w) }"


@pytest.fixture
def job(tmp_path):
    def make(**options):
        model = build(NET, w=np.ones((2, 2, 1, 1), np.float32))
        this = lab.job(tmp_path, model, np.zeros((4, 2, 4, 4)), **options)
        return replace(this, judged=this.images)

    return make


def on(job, device):
    return replace(job, profile=devices.find(device), backend=TensorRT())


def tried(job, sizes=()):
    return [s.precision for s in SETTINGS if objection(job, s.precision, sizes) is None]


def test_a_cpu_has_int8_and_4_bits_only_for_a_size_that_8_miss(job):
    assert tried(job()) == ["int8"]
    small = job(budget=Budget(max_size_bytes=1000))
    assert tried(small, [900]) == ["int8"]
    assert tried(small, [1100]) == ["int8", "w4a8"]
    assert tried(job(budget=Budget(max_size_bytes=1000), without=("mixed-precision",)), [1100]) == ["int8"]


def test_a_gpu_has_fp16_too_and_an_old_one_only_that(job):
    assert tried(on(job(), "rtx-4060")) == ["int8", "fp16"]
    assert tried(on(job(), "jetson-nano")) == ["fp16"]
    unjudged = replace(on(job(), "rtx-4060"), judged=None)
    assert tried(unjudged) == ["int8"]


def test_what_was_not_tried_has_a_line_with_the_reason(job):
    lines = not_tried(job(), ["fp32", "int8"], [100])
    assert len(lines) == 2
    assert "no --max-size is stated" in lines[0] and "W4A8 was not tried" in lines[0]
    assert "FP16 was not tried" in lines[1] and "converts float16 to float32" in lines[1]
    (line,) = not_tried(on(job(), "jetson-nano"), ["fp32", "fp16"], [])[:1]
    assert "has no INT8 units" in line
    assert "INT8 fits --max-size" in not_tried(job(budget=Budget(max_size_bytes=100)), ["int8"], [90])[0]


def test_without_images_one_line_says_it_all(job):
    (line,) = not_tried(replace(job(), images=None, judged=None), ["fp32"], [])
    assert "--calib" in line


def test_where_a_precision_was_named_nothing_else_is_tried(job):
    named = job(precision="int8", budget=Budget(max_size_bytes=10))
    assert tried(named, [1000]) == []
    assert not_tried(named, ["fp32", "int8"], [1000]) == []
