# /// script
# dependencies = ["onnxruntime==1.31.1", "onnx==1.23.2"]
#
# [tool.peers]
# configs = ["U8S8 minmax", "U8S8 percentile"]
# ///
"""ONNX Runtime's quantize_static behind its own pre-processing: per channel, uint8 activations and int8 weights."""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(common.Reader, CalibrationDataReader):
    """ONNX Runtime checks the class."""


def quantize(model: Path, images: np.ndarray, out: Path, method: CalibrationMethod) -> None:
    """Pre-process as its documentation advises (symbolic shapes left out: they fail on some models), and quantize."""
    prepared = out.with_suffix(".pre.onnx")
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, out, Reader(model, images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method,
    )  # fmt: skip


if __name__ == "__main__":
    common.main(
        {
            "U8S8 minmax": lambda *a: quantize(*a, CalibrationMethod.MinMax),
            "U8S8 percentile": lambda *a: quantize(*a, CalibrationMethod.Percentile),
        }
    )
