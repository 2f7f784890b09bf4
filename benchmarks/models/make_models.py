"""Make networks that edgec is measured on beside trained ResNets, their images and their preprocessing files.

    pip install torch==2.13.0 scikit-learn pillow numpy onnx onnxscript onnxruntime
    python benchmarks/models/make_models.py DIR [--only digits|random|vgg]

torch and scikit-learn are needed only here, best in an environment of their own; edgec never imports them.

DIR gets  vit_digits.onnx   a ViT trained on the 8x8 digits of scikit-learn, upscaled to 32x32: 64 patches of 4x4
          vit_random.onnx   ViT-Tiny (224x224, 12 blocks of 192 channels) with random weights and outlier channels,
                            without a head: random classes are so close together that agreement would count ties
          vgg_digits.onnx   two convolutions and a head like VGG's (4096 x 4096 twice), trained on the same digits
          *-legacy.onnx     the same by the TorchScript exporter
          calib/, val/      the digits as PNG, val/ held out and with the classes as folders
          models.json       the accuracy reached, and what made it
Everything random follows `SEED`. Data: see examples/digits/train.py.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

SEED = 20261121
SIDE = 32  # 8x8 upscaled: enough patches that the arithmetic, not call overhead, makes the latency
EPOCHS, BATCH, PEAK_LR, THREADS = 30, 64, 1.5e-3, 2
VGG_EPOCHS, VGG_PEAK_LR = 10, 3e-4
VAL_SHARE, CALIB_IMAGES = 0.25, 200

DIGITS_PREPROCESS = f"size: [{SIDE}, {SIDE}]\nresize: stretch\ncolor: gray\nmean: [0.5]\nstd: [0.5]\n"
RANDOM_PREPROCESS = (
    "size: [224, 224]\nresize: crop\ncolor: rgb\nmean: [0.485, 0.456, 0.406]\nstd: [0.229, 0.224, 0.225]\n"
)

# ---------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """Pre-norm transformer block: attention with one product for q, k and v, then an MLP with GELU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, tokens, dim) -> the same."""
        n, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches by a convolution, a class token, learned positions, blocks; a linear head on the class token, or none."""

    def __init__(
        self, side: int, patch: int, channels: int, dim: int, heads: int, blocks: int, classes: int | None
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (side // patch) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes) if classes else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, channels, side, side) -> logits (N, classes), or features (N, tokens, dim)."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        features = self.norm(self.blocks(x))
        return features if self.head is None else self.head(features[:, 0])


def vgg_model() -> nn.Sequential:
    """Two convolutions, then 4096 -> 4096 -> 4096 -> 10: 33.6 M parameters, nearly all of them in the head."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
        nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
        nn.Linear(4096, 10),
    )  # fmt: skip


def digits_model() -> ViT:
    """4 blocks of 96 channels: 0.46 M parameters, 32 M multiplications."""
    return ViT(SIDE, 4, 1, 96, 3, 4, 10)


def random_model() -> ViT:
    """ViT-Tiny whose LayerNorms have a few large gains, as those of trained transformers have.

    Two channels in a hundred have gains of 8 to 24 (the same channels in all layers), the rest of 0.5 to 1.5; the
    weights that read them are smaller by the same factor, so that every channel matters about as much.
    """
    model = ViT(224, 16, 3, 192, 3, 12, None)
    outliers = torch.randperm(192)[:4]
    with torch.no_grad():
        for block in model.blocks:
            for norm, reader in ((block.norm1, block.qkv), (block.norm2, block.fc1)):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.2)
                large = torch.empty(len(outliers)).uniform_(8, 24)
                norm.weight[outliers] = large
                norm.bias[outliers] *= large
                reader.weight.normal_(0, 192**-0.5)
                reader.weight[:, outliers] /= large
            block.qkv.weight[: 2 * 192] *= 1.5  # attention that looks somewhere, not everywhere
    return model


# ---------------------------------------------------------------------------------------------- images


def upscaled(digit: np.ndarray) -> np.ndarray:
    """An 8x8 image of levels 0..16 as SIDE x SIDE bytes."""
    small = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def write_images(folder: Path, indices: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Replace `folder` by <class>/<index>.png."""
    shutil.rmtree(folder, ignore_errors=True)
    for index in indices:
        path = folder / str(labels[index]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(path, optimize=True)


def normalized(pixels: np.ndarray) -> torch.Tensor:
    """Bytes (N, H, W) as the digits model's input (N, 1, H, W)."""
    return torch.from_numpy((pixels[:, None].astype(np.float32) / 255 - 0.5) / 0.5)


# ------------------------------------------------------------------------------------------- training


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Each image turned up to 12 degrees, scaled up to 10 %, and moved up to 3 pixels."""
    n = len(x)
    angle, zoom = (torch.rand(n) * 2 - 1) * math.radians(12), 1 + (torch.rand(n) * 2 - 1) * 0.1
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift = (torch.rand(n, 2) * 2 - 1) * (2 * 3 / SIDE)
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    return F.grid_sample(
        x, F.affine_grid(affine, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = EPOCHS, peak_lr: float = PEAK_LR) -> None:
    """AdamW, one cycle, cross-entropy; the last epoch is taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.05)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.15)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(augmented(x[batch])), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1:2}/{epochs}  loss {total / len(x):.4f}", flush=True)


# ---------------------------------------------------------------------------------- export and measure


def export(model: nn.Module, sample: torch.Tensor, path: Path, preprocess: str) -> None:
    """Write the ONNX file as both exporters do by default, any batch size, each with its sidecar."""
    model.eval()
    output = "features" if getattr(model, "head", model) is None else "logits"
    names = {"input_names": ["image"], "output_names": [output]}
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (sample,), path, dynamo=True, external_data=False, dynamic_shapes=({0: batch},), **names)
    legacy = path.with_name(f"{path.stem}-legacy.onnx")
    torch.onnx.export(
        model, (sample[:1],), legacy, dynamo=False, opset_version=17,
        dynamic_axes={"image": {0: "batch"}, output: {0: "batch"}}, **names,
    )  # fmt: skip
    for file in (path, legacy):
        file.with_name(f"{file.stem}.preprocess.yaml").write_text(preprocess)


def accuracy(path: Path, x: torch.Tensor, y: np.ndarray) -> float:
    """Share of right answers of the exported file in ONNX Runtime."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = [session.run(None, {"image": batch.numpy()})[0] for batch in x.split(50)]
    return float(np.mean(np.concatenate(logits).argmax(1) == y))


def digits(out: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Write the images; return the inputs, the labels, and which of them are to train, calibrate and validate with."""
    found, labels = load_digits(return_X_y=True)
    pixels = np.stack([upscaled(digit) for digit in found.reshape(-1, 8, 8)])
    train_at, val_at = train_test_split(np.arange(len(labels)), test_size=VAL_SHARE, stratify=labels, random_state=SEED)
    _, calib_at = train_test_split(train_at, test_size=CALIB_IMAGES, stratify=labels[train_at], random_state=SEED)
    write_images(out / "calib", calib_at, pixels, labels)
    write_images(out / "val", val_at, pixels, labels)
    return normalized(pixels), labels, train_at, calib_at, val_at


def make_digits(out: Path, name: str = "vit_digits") -> dict[str, object]:
    """Train, export and measure a model of the digits; return what models.json says of it."""
    start = time.perf_counter()
    x, labels, train_at, calib_at, val_at = digits(out)
    model, *how = (vgg_model(), VGG_EPOCHS, VGG_PEAK_LR) if name == "vgg_digits" else (digits_model(),)
    train(model, x[train_at], torch.from_numpy(labels[train_at]), *how)
    export(model, x[:2], out / f"{name}.onnx", DIGITS_PREPROCESS)
    return {
        "top1": 100 * accuracy(out / f"{name}.onnx", x[val_at], labels[val_at]),
        "images": {"train": len(train_at), "calib": len(calib_at), "val": len(val_at)},
        "seconds": round(time.perf_counter() - start),
    }


def make_vgg(out: Path) -> dict[str, object]:
    """As make_digits, for the network like VGG."""
    return make_digits(out, "vgg_digits")


def make_random(out: Path) -> dict[str, object]:
    """Export the random model; return what models.json says of it."""
    model = random_model()
    export(model, torch.randn(2, 3, 224, 224), out / "vit_random.onnx", RANDOM_PREPROCESS)
    return {"parameters": sum(p.numel() for p in model.parameters())}


MODELS = {"digits": make_digits, "random": make_random, "vgg": make_vgg}


def main() -> None:
    """Make what is asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=sorted(MODELS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)  # the order of a sum, so the last bits of the weights, depend on it
    path = args.out / "models.json"
    record: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    record |= {"seed": SEED, "torch": torch.__version__, "onnxruntime": ort.__version__}
    for name, make in MODELS.items():
        if args.only in (None, name):
            torch.manual_seed(SEED)
            record[name] = make(args.out)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
