# /// script
# dependencies = ["onnx-neural-compressor==1.0", "onnxruntime==1.31.1", "prettytable", "scipy"]
#
# [tool.peers]
# configs = ["U8S8 minmax"]
# ///
"""Intel's onnx-neural-compressor: static quantization, Q/DQ, per channel, uint8 activations and int8 weights."""

from __future__ import annotations

from pathlib import Path

import common
import numpy as np
from onnx_neural_compressor import data_reader
from onnx_neural_compressor.quantization import config, quantize
from onnxruntime.quantization import QuantFormat, QuantType


class Reader(common.Reader, data_reader.CalibrationDataReader):
    """It checks the class."""


def minmax(model: Path, images: np.ndarray, out: Path) -> None:
    """Quantize on all images; its own default is the first 100."""
    settings = config.StaticQuantConfig(
        Reader(model, images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibration_sampling_size=len(images),
    )  # fmt: skip
    quantize(str(model), str(out), settings)


if __name__ == "__main__":
    common.main({"U8S8 minmax": minmax})
