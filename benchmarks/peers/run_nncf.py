# /// script
# dependencies = ["nncf==3.4.0", "onnxruntime==1.31.1", "onnx==1.23.2"]
#
# [tool.peers]
# configs = ["mixed"]
# ///
"""NNCF's post-training quantization with the mixed preset (asymmetric activations, symmetric weights)."""

from __future__ import annotations

from pathlib import Path

import common
import nncf
import numpy as np
import onnx


def mixed(model: Path, images: np.ndarray, out: Path) -> None:
    """Quantize on all images; its own default is the first 300."""
    name = common.input_name(model)
    data = nncf.Dataset(images, lambda image: {name: np.array(image[None])})
    found = nncf.quantize(
        onnx.load(model), data, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images),
        target_device=nncf.TargetDevice.CPU,
    )  # fmt: skip
    onnx.save(found, out)


if __name__ == "__main__":
    common.main({"mixed": mixed})
