"""Does calibrating on degraded images help? One study over models, conditions and seeds: docs/robustness.md.

    python benchmarks/robustness.py --data DIR [--only resnet20] [--seeds 5] [--images 2000] [--threads 1]

DIR as for int8.py; the digits come with the repository. For each seed, four fifths of the calibration images are drawn
anew, and with them each network is quantized three times: calibrated clean, mixed and minimax; classifiers by search.py
(nothing in float beyond what cannot be quantized), detectors, which do not bear that, by a whole `compile --precision
int8` with its mixed precision. FP32 and the three then see the same held-out images under each of QRID's
conditions (calib/degradations.py), which the seed makes, too. Two tables a model, in Markdown:

    what INT8 adds    points that INT8 loses beside FP32 under the same condition: the mean over the seeds, its 95 %
                      interval over seeds, and the largest
    mixed, minimax    less clean calibration: mean error of the outputs in dB, over seeds with their 95 % interval by
                      Student's t; a difference is shown where the interval leaves 0 out

Intervals over images, which `edgec eval --degrade` states, take the quantized model as given; these are over
quantized models, which is what the question is about.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from edgec.backends.ort import Session
from edgec.calib import degrade
from edgec.calib.folder import Folder, together
from edgec.compiler import api, fidelity, job, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.fidelity import Comparison
from edgec.compiler.options import Options
from edgec.compiler.proof import Prover
from edgec.compiler.quantization.robust import WAYS
from edgec.compiler.quantization.search import search
from edgec.compiler.types import silent
from edgec.passes.quant_params import needed_opset
from int8 import CASES, Case, _part
from scipy.stats import t as student

DIGITS = Case("digits", "", "calib", "val")
EXAMPLES = Path(__file__).parents[1] / "examples" / "digits"


@dataclass(frozen=True)
class Subject:
    """One network with its images."""

    model: Path
    calib: Path
    held_out: Path
    preprocess: str | None
    metric: str | None


def subjects(data: Path | None, only: str, place: Path) -> Iterator[Subject]:
    """Yield the digits' network, and those of the data folder."""
    if only in DIGITS.model:
        yield Subject(EXAMPLES / "digits.onnx", EXAMPLES / "calib", EXAMPLES / "val", None, None)
    for case in CASES:
        if data is None or only not in case.model:
            continue
        here = place / case.model
        here.mkdir()
        sidecar = here / "preprocess.yaml"
        sidecar.write_text(case.preprocess, encoding="utf-8")
        calib = _part(data / case.calib, case.calibrate_on, here / "calib")
        held_out = _part(data / case.eval, case.compare_on, here / "eval")
        yield Subject(data / "models" / f"{case.model}.onnx", calib, held_out, str(sidecar), case.metric)


def compare(subject: Subject, seed: int, count: int, threads: int) -> Comparison:
    """Quantize in all ways with one seed, and run them on the held-out images under all conditions."""
    original = model_io.load(subject.model)
    options = Options(
        calib=subject.calib, eval=subject.held_out, precision="int8", preprocess=subject.preprocess,
        metric=subject.metric, threads=threads, seed=seed,
    )  # fmt: skip
    this = job.resolve(subject.model, original, options, silent)
    assert this.images is not None and this.judged is not None
    drawn = np.random.default_rng(seed).permutation(len(this.images))[: -(-len(this.images) * 4 // 5)]
    this = replace(this, images=this.images.subset(sorted(drawn.tolist())))
    scheme, prover = job.quant_scheme(this), Prover(original)
    passes = pipeline.exact_passes(needed_opset(scheme))
    model, _ = pipeline.run(model_io.copy(original), passes, prover)

    def quantized(way: str) -> ir.Model:
        if subject.metric is not None:
            return compiled(subject, this.images, way, seed, threads)
        return search(job.calibrated(this, way), model, scheme, prover).quantizer.build().model

    images = this.judged.subset(range(0, len(this.judged), -(-len(this.judged) // count)))
    with TemporaryDirectory() as folder:
        built = {way: Session(model_io.session_source(quantized(way), Path(folder))) for way in WAYS}
        return fidelity.compare_together(
            Session(model_io.session_source(model, Path(folder))),  # folded: the same numbers, and faster
            built,
            together(degrade.under(images, degrade.QRID, seed), 8),
            images=len(images),
            metric=this.metric,
            labelled=this.judged.labels() is not None,
        )


def compiled(subject: Subject, images: Folder, way: str, seed: int, threads: int) -> ir.Model:
    """Return what the command makes of some of the images."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        for item in images.items:
            (folder / Path(item.name).name).symlink_to((subject.calib / item.name).resolve())
        out = Path(place) / "out"
        api.compile(
            subject.model, out, calib=folder, precision="int8", degrade=way, preprocess=subject.preprocess,
            metric=subject.metric, threads=threads, seed=seed,
        )  # fmt: skip
        return model_io.load(next(out.glob("*.onnx")))


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by Student's t."""
    mean, n = float(np.mean(values)), len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return mean, mean - half, mean + half


def lost(seen: Comparison, condition: str, way: str) -> float:
    """Return the points that a way loses beside FP32 under a condition."""
    columns = seen.candidates[condition][way].lost
    return 100 * float(columns[:, 0].sum() / max(columns[:, 1].sum(), 1e-300))


def error(seen: Comparison, condition: str, way: str) -> float:
    """Return the mean over the images of the outputs' error, in dB of the signal."""
    return float(seen.candidates[condition][way].error_db.mean())


def tables(name: str, runs: Sequence[Comparison]) -> None:
    """Print what the seeds show of one network."""
    conditions = list(runs[0].candidates)
    metric = runs[0].candidates[conditions[0]][WAYS[0]].metric
    images = len(runs[0].candidates[conditions[0]][WAYS[0]].error_db)
    print(f"\n### {name}: {images} images under each condition, {len(runs)} seeds\n")
    head = " | ".join(f"INT8 {way} (95 %), largest" for way in WAYS)
    print(f"| condition | FP32 itself loses | {head} |\n|---|---|" + "---|" * len(WAYS))
    for k in conditions:
        own = over_seeds([_own_loss(run, k) for run in runs])[0]
        cells = [_interval([lost(run, k, way) for run in runs], largest=True) for way in WAYS]
        print(f"| {k} | {own:+.2f} | {' | '.join(cells)} |")
    print(f"\nPoints of {metric}.\n")
    others = [way for way in WAYS if way != WAYS[0]]
    head = " | ".join(f"{way} less clean, dB (95 %) | shown" for way in others)
    print(f"| condition | clean's error, dB | {head} |\n|---|---|" + "---|---|" * len(others))
    for k in conditions:
        cells = [_shown([error(run, k, way) - error(run, k, WAYS[0]) for run in runs]) for way in others]
        print(f"| {k} | {over_seeds([error(run, k, WAYS[0]) for run in runs])[0]:.2f} | {' | '.join(cells)} |")
    worst = {way: [max(error(run, k, way) for k in conditions) for run in runs] for way in WAYS}
    cells = [_shown((np.array(worst[way]) - worst[WAYS[0]]).tolist()) for way in others]
    print(f"| the worst of them | {np.mean(worst[WAYS[0]]):.2f} | {' | '.join(cells)} |", flush=True)


def _own_loss(run: Comparison, condition: str) -> float:
    columns = run.original[condition].lost
    return 0.0 if columns is None else 100 * float(columns[:, 0].sum() / max(columns[:, 1].sum(), 1e-300))


def _interval(values: Sequence[float], *, largest: bool = False) -> str:
    mean, low, high = over_seeds(values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" + (f", {max(values):+.2f}" if largest else "")


def _shown(values: Sequence[float]) -> str:
    _, low, high = over_seeds(values)
    return f"{_interval(values)} | {'worse' if low > 0 else 'better' if high < 0 else 'no difference'}"


def main() -> None:
    """Run the study on every subject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with TemporaryDirectory() as place:
        for subject in subjects(args.data, args.only, Path(place)):
            start = time.perf_counter()
            runs: list[Comparison] = []
            for seed in range(args.seeds):
                runs.append(compare(subject, seed, args.images, args.threads))
                print(f"{subject.model.stem}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
            tables(subject.model.stem, runs)


if __name__ == "__main__":
    main()
