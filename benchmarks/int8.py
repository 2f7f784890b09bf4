"""INT8 beside ONNX Runtime's own quantizer: SQNR, top-1 or box agreement, latency, in one run on the same images.

    python benchmarks/int8.py --data DIR [--threads 1]

DIR holds models/ (resnet20_cifar10.onnx, resnet32_cifar10.onnx, fastestdet_coco.onnx), cifar10/calib, cifar10/val and
photos/. ONNX Runtime gets a BN-folded copy of the model at opset 13, since it folds nothing over the exporter's clutter
and writes an invalid file per channel below opset 13; edgec gets the raw file. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import edgec
import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
from edgec.backends.ort import Session
from edgec.backends.targets.timing import interleave, median_interval
from edgec.calib import folder, preprocess
from edgec.compiler import model as model_io
from edgec.compiler.fidelity import compare
from edgec.compiler.metrics import load_metric
from edgec.compiler.types import Fidelity
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

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


@dataclass(frozen=True)
class Case:
    """One model with its images: preprocessing as YAML text, folders, and the judge."""

    model: str
    preprocess: str
    calib: str
    eval: str
    metric: str | None = None
    calibrate_on: tuple[int, int] | None = None
    compare_on: tuple[int, int] | None = None


_IMAGENET = "mean: [0.485, 0.456, 0.406]\nstd: [0.229, 0.224, 0.225]\n"
_CIFAR = ("size: [32, 32]\nresize: stretch\ncolor: rgb\n" + _IMAGENET, "cifar10/calib", "cifar10/val")
_DECODER = f"{Path(__file__).parents[1] / 'examples' / 'detectors' / 'fastestdet.py'}:decode"
CASES = (
    Case("resnet20_cifar10", *_CIFAR),
    Case("resnet32_cifar10", *_CIFAR),
    Case(
        "fastestdet_coco",
        "size: [352, 352]\nresize: stretch\ncolor: bgr\n",
        "photos",
        "photos",
        _DECODER,
        (0, 60),
        (60, 100),
    ),  # fmt: skip
)


def run(case: Case, args: argparse.Namespace) -> None:
    """Quantize with all, compare all on the held-out images and time all interleaved; print one table."""
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = args.data / "models" / f"{case.model}.onnx"
        sidecar = work / "preprocess.yaml"
        sidecar.write_text(case.preprocess, encoding="utf-8")
        calib_dir = _part(args.data / case.calib, case.calibrate_on, work / "calib")
        eval_dir = _part(args.data / case.eval, case.compare_on, work / "eval")
        specs = model_io.input_specs(model_io.load(model))
        pre = preprocess.resolve(str(sidecar), model, specs[0])
        calib, held_out = (folder.open_folder(d, pre, specs) for d in (calib_dir, eval_dir))
        metric_name, metric = case.metric, load_metric(case.metric) if case.metric else None
        float_model = folded(model, work / "folded.onnx")
        paths = {f"onnxruntime {name}": path for name, path in peers(float_model, calib, work)}
        bundle = work / "edgec"
        edgec.compile(
            model, bundle, calib=calib_dir, precision="int8", preprocess=str(sidecar),
            metric=metric_name, threads=args.threads,
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
        sessions = {name: Session(path, threads=args.threads) for name, path in runners.items()}
        calls = {name: functools.partial(session.run, feed) for name, session in sessions.items()}
        samples = interleave(calls, seconds=args.seconds, max_rounds=5000)
    print(f"\n### {case.model}: {len(calib)} images to calibrate, {len(held_out)} to compare\n")
    print("| model | SQNR dB | figure | points lost (95 %) | ms | speed-up over folded FP32 (95 %) |")
    print("|---|---|---|---|---|---|")
    for name, values in samples.items():
        ratio = median_interval(samples["FP32 folded"] / values)
        print(_row(name, found.get(name), float(np.median(values)), ratio))


def _part(source: Path, chosen: tuple[int, int] | None, out: Path) -> Path:
    """Return a folder with the chosen files of a flat folder (links), or the folder itself where all are chosen."""
    if chosen is None:
        return source
    out.mkdir()
    for file in sorted(source.iterdir())[slice(*chosen)]:
        (out / file.name).symlink_to(file.resolve())
    return out


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
    for case in CASES:
        if not args.only or args.only in case.model:
            run(case, args)


if __name__ == "__main__":
    main()
