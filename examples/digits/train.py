"""Train, export and measure the demo classifier of handwritten digits, and write its images.

    pip install torch==2.13.0 scikit-learn pillow numpy onnx onnxscript onnxruntime pyyaml
    python examples/digits/train.py [--out FOLDER]

torch and scikit-learn are needed only here; edgec never imports them. Everything random follows `SEED`
(20240607). Reached on the held-out images: 360 of 360 right (see training.json).

Data: the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine
Learning Repository, CC BY 4.0), 1797 images of 8x8 pixels, as shipped by scikit-learn (BSD 3-Clause) in
`sklearn.datasets.load_digits`. A fifth is held out (val/) and never trained on, nor used to choose an epoch;
calib/ is a part of what was trained on. An image's file name is its index in `load_digits`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import sklearn
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

SEED = 20240607
SIDE = 32  # 8x8 upscaled: large enough that convolutions, not call overhead, make the latency
VAL_SHARE, CALIB_IMAGES = 0.2, 200
EPOCHS, BATCH, PEAK_LR, THREADS = 24, 32, 4e-3, 2
PREPROCESS = {
    "size": [SIDE, SIDE],
    "resize": "stretch",
    "color": "gray",
    "scale": 1 / 255,
    "mean": [0.5],
    "std": [0.5],
    "layout": "NCHW",
}

# ---------------------------------------------------------------------------------------------- model


def chain(**modules: nn.Module) -> nn.Sequential:
    """One after the other; the names become ONNX node names, so that a report on layers is readable."""
    return nn.Sequential(OrderedDict(modules))


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, padded to keep the size when the stride is 1, and batch normalization."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return chain(conv=convolution, norm=nn.BatchNorm2d(outputs))


def separable(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Depthwise, then pointwise convolution, each with ReLU."""
    depthwise = conv(inputs, inputs, kernel, stride, groups=inputs)
    return chain(depthwise=depthwise, relu1=nn.ReLU(), pointwise=conv(inputs, outputs), relu2=nn.ReLU())


class Residual(nn.Module):
    """Dense 3x3 and 1x1 convolution beside an identity: nearly all the multiplications of the network."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = conv(channels, channels, 3)
        self.mix = conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """ReLU of the sum."""
        return F.relu(x + self.mix(F.relu(self.dense(x))))


def network() -> nn.Sequential:
    """A narrow, cheap stem; width where INT8 pays; 5x5 depthwise steps, to see the whole digit."""
    return chain(
        stem=conv(1, 16, 3),
        relu=nn.ReLU(),
        widen=separable(16, 64, 3),
        residual=Residual(64),
        down1=separable(64, 64, 5, stride=2),
        down2=separable(64, 64, 5, stride=2),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(64, 10),
    )


# --------------------------------------------------------------------------------------------- images


def upscaled(digit: np.ndarray) -> np.ndarray:
    """An 8x8 image of levels 0..16 as SIDE x SIDE bytes, before training, so that all see the same pixels."""
    small = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices to train with, to calibrate with (some of the former), and held out; all stratified."""
    train, val = train_test_split(np.arange(len(labels)), test_size=VAL_SHARE, stratify=labels, random_state=SEED)
    _, calib = train_test_split(train, test_size=CALIB_IMAGES, stratify=labels[train], random_state=SEED)
    return train, calib, val


def write_images(folder: Path, indices: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Replace `folder` by <class>/<index>.png."""
    shutil.rmtree(folder, ignore_errors=True)
    for index in indices:
        path = folder / str(labels[index]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(path, optimize=True)


def normalized(pixels: np.ndarray, preprocess: dict) -> np.ndarray:
    """Bytes (N, H, W) as the model's input (N, 1, H, W)."""
    scaled = pixels[:, None].astype(np.float32) * preprocess["scale"]
    return ((scaled - preprocess["mean"][0]) / preprocess["std"][0]).astype(np.float32)


# ------------------------------------------------------------------------------------------- training


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Each image turned up to 12 degrees, scaled up to 10 %, moved up to 3 pixels, and made noisy."""
    n = len(x)
    angle = (torch.rand(n) * 2 - 1) * math.radians(12)
    zoom = 1 + (torch.rand(n) * 2 - 1) * 0.1
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift = (torch.rand(n, 2) * 2 - 1) * (2 * 3 / SIDE)
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return moved + 0.05 * torch.randn_like(moved)


def train(x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    """The network after the last epoch, in evaluation mode."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.02)
    steps = EPOCHS * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(augmented(x[batch])), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1:2}/{EPOCHS}  loss {total / len(x):.4f}", flush=True)
    return model.eval()


# ---------------------------------------------------------------------------------- export and measure


def export(model: nn.Sequential, path: Path) -> None:
    """Write the ONNX file as trained: batch normalization apart, for edgec to fold; any batch size.

    The TorchScript exporter: the newer one, when not optimizing, computes each absent bias at run time.
    """
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, SIDE, SIDE),),
        path,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # else the exporter folds batch normalization itself
        do_constant_folding=False,
        opset_version=17,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


def measure(onnx_path: Path, preprocess_path: Path, folder: Path) -> float:
    """Accuracy of the file in ONNX Runtime on the images of `folder`, through the stated preprocessing."""
    session = ort.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    paths = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    x = normalized(pixels, yaml.safe_load(preprocess_path.read_text()))
    (logits,) = session.run(None, {"image": x})
    return float(np.mean(logits.argmax(1) == [int(path.parent.name) for path in paths]))


def main() -> None:
    """Write the images, train, export, measure, and write down how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(THREADS)  # the order of a sum, so the last bits of the weights, depend on it

    digits, labels = load_digits(return_X_y=True)
    pixels = np.stack([upscaled(digit) for digit in digits.reshape(-1, 8, 8)])
    train_at, calib_at, val_at = split(labels)
    write_images(out / "calib", calib_at, pixels, labels)
    write_images(out / "val", val_at, pixels, labels)
    model_path, preprocess_path = out / "digits.onnx", out / "digits.preprocess.yaml"
    preprocess_path.write_text("".join(f"{key}: {json.dumps(PREPROCESS[key])}\n" for key in PREPROCESS))

    x = torch.from_numpy(normalized(pixels[train_at], PREPROCESS))
    model = train(x, torch.from_numpy(labels[train_at]))
    export(model, model_path)
    accuracy = measure(model_path, preprocess_path, out / "val")
    record = {
        "seed": SEED,
        "held_out_accuracy": round(accuracy, 4),
        "images": {"train": len(train_at), "calib": len(calib_at), "val": len(val_at)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": EPOCHS,
        "threads": THREADS,
        "wall_seconds": round(time.perf_counter() - started),
        "onnx_bytes": model_path.stat().st_size,
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (torch, sklearn, np, onnx, ort)},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
