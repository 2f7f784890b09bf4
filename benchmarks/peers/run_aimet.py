# /// script
# dependencies = ["aimet-onnx==2.42.0", "onnxruntime==1.31.1", "torch==2.13.0", "torchvision==0.28.0"]
#
# [tool.peers]
# configs = ["minmax", "minmax cle"]
# ///
"""Qualcomm's AIMET for ONNX: min-max ranges per channel with its default configuration, with and without CLE."""

from __future__ import annotations

import functools
from pathlib import Path

import common
import numpy as np
import onnx
from aimet_onnx import QuantizationSimModel, int8
from aimet_onnx.cross_layer_equalization import equalize_model


def quantize(model: Path, images: np.ndarray, out: Path, *, equalize: bool = False) -> None:
    """Simulate, calibrate, and write integers where ONNX Runtime's kernels want them (weights, int32 biases)."""
    loaded = onnx.load(model)
    name = common.input_name(model)
    if equalize:
        equalize_model(loaded)
    first = {name: np.array(images[:1])}
    simulated = QuantizationSimModel(
        loaded, param_type=int8, activation_type=int8, quant_scheme="min_max", dummy_input=first
    )
    simulated.compute_encodings({name: np.array(image[None])} for image in images)
    onnx.save(simulated.to_onnx_qdq(export_int32_bias=True, prequantize_constants=True), out)


if __name__ == "__main__":
    common.main({"minmax": quantize, "minmax cle": functools.partial(quantize, equalize=True)})
