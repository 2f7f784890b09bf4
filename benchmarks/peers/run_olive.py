# /// script
# dependencies = ["olive-ai==0.13.0", "onnxruntime==1.31.1", "torch==2.13.0", "requests"]
#
# [tool.peers]
# configs = ["U8S8 minmax"]
# ///
"""Microsoft's Olive: its pass around ONNX Runtime's quantize_static, per channel, with its own pre-processing."""

from __future__ import annotations

import shutil
from pathlib import Path

import common
import numpy as np
from olive.data.config import DataComponentConfig, DataConfig
from olive.data.registry import Registry
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.quantization import OnnxStaticQuantization


def minmax(model: Path, images: np.ndarray, out: Path) -> None:
    """Quantize through the Python interface of the pass."""
    name = common.input_name(model)

    @Registry.register_dataset("peer_images")
    def _dataset(**_: object) -> np.ndarray:
        return images

    @Registry.register_dataloader("peer_loader")
    def _loader(dataset: np.ndarray, **_: object) -> list[tuple[dict[str, np.ndarray], None]]:
        return [({name: np.array(image[None])}, None) for image in dataset]

    data = DataConfig(
        name="peer", type="DataContainer",
        load_dataset_config=DataComponentConfig(type="peer_images"),
        pre_process_data_config=DataComponentConfig(type="skip_pre_process"),
        dataloader_config=DataComponentConfig(type="peer_loader"),
    )  # fmt: skip
    settings = {"data_config": data, "per_channel": True, "precision": "int8", "activation_type": "uint8"}
    step = create_pass_from_dict(OnnxStaticQuantization, settings, disable_search=True)
    found = step.run(ONNXModelHandler(str(model)), str(out.parent / "olive"))
    shutil.copyfile(found.model_path, out)


if __name__ == "__main__":
    common.main({"U8S8 minmax": minmax})
