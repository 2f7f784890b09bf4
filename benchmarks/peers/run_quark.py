# /// script
# dependencies = ["amd-quark==0.13", "onnxruntime==1.31.1", "torch==2.13.0"]
#
# [tool.peers]
# configs = ["INT8_CNN_DEFAULT", "INT8_CNN_ACCURATE", "U8S8_AAWS"]
# ///
"""AMD's Quark with its ready configurations for ONNX Runtime's CPU provider; ACCURATE tunes the rounding (AdaRound)."""

from __future__ import annotations

import functools
from pathlib import Path

import common
import numpy as np
from onnxruntime.quantization import CalibrationDataReader
from quark.onnx import ModelQuantizer
from quark.onnx.quantization.config import Config, get_default_config


class Reader(common.Reader, CalibrationDataReader):
    """ONNX Runtime's class, as it asks for."""


def quantize(model: Path, images: np.ndarray, out: Path, *, config: str) -> None:
    """Quantize with the configuration as it comes."""
    quantizer = ModelQuantizer(Config(global_quant_config=get_default_config(config)))
    quantizer.quantize_model(str(model), str(out), Reader(model, images))


if __name__ == "__main__":
    names = ("INT8_CNN_DEFAULT", "INT8_CNN_ACCURATE", "U8S8_AAWS")
    common.main({name: functools.partial(quantize, config=name) for name in names})
