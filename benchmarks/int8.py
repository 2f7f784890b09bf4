"""INT8 beside ONNX Runtime's own quantizer: SQNR, top-1 or box agreement, latency, in one run on the same images.

    python benchmarks/int8.py --data DIR [--threads 1]

DIR holds models/ (resnet20_cifar10.onnx, resnet32_cifar10.onnx, fastestdet_coco.onnx), cifar10/calib, cifar10/val and
photos/. ONNX Runtime gets a BN-folded copy of the model at opset 13, since it folds nothing over the exporter's clutter
and writes an invalid file per channel below opset 13; edgec gets the raw file. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

import edgec
from edgec.backends.ort import Session
from edgec.backends.targets.timing import interleave, median_interval
from edgec.calib import folder, preprocess
from edgec.compiler import model as model_io
from edgec.compiler.fidelity import Metric, compare
from edgec.compiler.types import Fidelity, Preprocess

CIFAR = Preprocess((32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DETECTOR = Preprocess((352, 352), color="bgr")
#: ONNX Runtime's settings: (name, per channel, activation type, calibration method).
SETTINGS = (
    ("U8S8 minmax", True, QuantType.QUInt8, CalibrationMethod.MinMax),
    ("U8S8 percentile", True, QuantType.QUInt8, CalibrationMethod.Percentile),
    ("U8S8 per tensor", False, QuantType.QUInt8, CalibrationMethod.MinMax),
    ("S8S8 minmax", True, QuantType.QInt8, CalibrationMethod.MinMax),
)


class _Reader(CalibrationDataReader):
    """Hands images to ONNX Runtime's calibrator, one at a time."""

    def __init__(self, images: folder.Folder) -> None:
        self._batches = images.batches(1)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(iter(self._batches), None)
        return None if batch is None else dict(batch.feed)


def folded(path: Path, out: Path) -> Path:
    """Write a cleaned, BN-folded copy at opset 13 or above (onnxscript's folding, not ours)."""
    model = ir.load(path)
    onnxscript.optimizer.optimize_ir(model)
    proto = ir.to_proto(model)
    if model.opset_imports[""] < 13:
        proto = onnx.version_converter.convert_version(proto, 13)
    onnx.save(proto, out)
    return out


def peers(float_model: Path, calibration: folder.Folder, work: Path) -> Iterator[tuple[str, Path]]:
    """Quantize with each of ONNX Runtime's settings; a setting that fails is printed and left out."""
    for name, per_channel, activation, method in SETTINGS:
        out = work / f"{name.replace(' ', '-')}.onnx"
        try:
            quantize_static(
                float_model, out, _Reader(calibration), quant_format=QuantFormat.QDQ, per_channel=per_channel,
                activation_type=activation, weight_type=QuantType.QInt8, calibrate_method=method,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            print(f"onnxruntime {name}: {error}", file=sys.stderr)
            continue
        yield name, out


def run(model: Path, calib: folder.Folder, held_out: folder.Folder, args: argparse.Namespace, metric: Metric | None) -> None:
    """Quantize with all, compare all on the held-out images and time all interleaved; print one table."""
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        float_model = folded(model, work / "folded.onnx")
        paths = {f"onnxruntime {name}": path for name, path in peers(float_model, calib, work)}
        bundle = work / "edgec"
        edgec.compile(
            model, bundle, calib=calib.root, eval=held_out.root, precision="int8", preprocess=str(_preprocess(calib, work)),
            threads=args.threads,
        )  # fmt: skip
        paths["edgec"] = bundle / "model.onnx"
        labelled = held_out.labels() is not None
        found = compare(
            Session(model, optimise=False),
            {name: Session(path) for name, path in paths.items()},
            held_out.batches(50),
            images=len(held_out),
            metric=metric,
            labelled=labelled,
        )
        runners = {"raw file": model, "FP32 folded": float_model, **paths}
        feed = dict(next(iter(held_out.batches(1))).feed)
        calls = {n: (lambda s=Session(p, threads=args.threads): s.run(feed)) for n, p in runners.items()}
        samples = interleave(calls, seconds=args.seconds, max_rounds=5000)
    print(f"\n### {model.stem}: {len(calib)} images to calibrate, {len(held_out)} to compare\n")
    print("| model | SQNR dB | figure | points lost (95 %) | ms | speed-up over folded FP32 (95 %) | size kB |")
    print("|---|---|---|---|---|---|---|")
    for name, values in samples.items():
        ratio = median_interval(samples["FP32 folded"] / values)
        print(_row(name, found.get(name), float(np.median(values)), ratio))


def _row(name: str, fidelity: Fidelity | None, milliseconds: float, ratio: tuple[float, float, float]) -> str:
    quality = " |  | "
    if fidelity is not None:
        sqnr = fidelity.outputs[0].sqnr_db
        quality = (
            f"{sqnr:.2f} | {fidelity.metric} {fidelity.value:.2f} | "
            f"{fidelity.drop:+.2f} ({fidelity.drop_low:+.2f} to {fidelity.drop_high:+.2f})"
        )
    speed = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"
    return f"| {name} | {quality} | {milliseconds:.3f} | {speed} |"


def main() -> None:
    """Run the three models of the data folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="to time each model, in all")
    parser.add_argument("--only", help="run the models whose name holds this")
    args = parser.parse_args()
    for model in sorted((args.data / "models").glob("*.onnx")):
        if args.only and args.only not in model.name:
            continue
        run_one(model, args)


if __name__ == "__main__":
    main()
