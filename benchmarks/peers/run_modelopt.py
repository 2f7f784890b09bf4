# /// script
# dependencies = ["nvidia-modelopt[onnx]==0.47.0", "torch==2.13.0"]
#
# [tool.peers]
# configs = ["int8 max", "int8 entropy"]
# ///
"""NVIDIA's Model Optimizer for ONNX, int8. It places Q/DQ for TensorRT: ONNX Runtime's CPU kernels are not its aim."""

from __future__ import annotations

import functools
from pathlib import Path

import common
import numpy as np
from modelopt.onnx.quantization import quantize as modelopt_quantize


def quantize(model: Path, images: np.ndarray, out: Path, *, method: str) -> None:
    """Quantize with all else in float32; the images are one array for it."""
    modelopt_quantize(
        str(model), "int8", {common.input_name(model): np.array(images)}, method,
        calibration_eps=["cpu"], high_precision_dtype="fp32", output_path=str(out),
    )  # fmt: skip


if __name__ == "__main__":
    common.main({f"int8 {method}": functools.partial(quantize, method=method) for method in ("max", "entropy")})
