"""What to measure of a bundle on its device, as data: beside the program that does it there, and for `bench --target`.

    recipe.json          the models with their files in the bundle, which of them is the baseline, an input
    edgec-device.pyz     python3 BUNDLE/edgec-device.pyz builds and measures them on the device, and writes
    measurement.json     what came out: `edgec bench BUNDLE` takes it into the report
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..backends import base as backends
from ..backends.base import Backend, Shipped
from ..backends.targets import on_device, packing
from . import bundle, files, matching
from .errors import DataError
from .report import html, serial, text
from .types import Artifact, DeviceProfile, FloatScheme, Measurement, Report

RECIPE, MEASUREMENT = "recipe.json", "measurement.json"
COMMAND = f"python3 BUNDLE/{packing.NAME}"
#: What the bundle's own artifact is called beside its baselines.
RESULT = "result"


@dataclass(frozen=True)
class Compared:
    """What is measured of a bundle: the names of the baselines and the result, and which of them is compared with."""

    models: Mapping[str, Shipped]
    baseline: str


def compared(folder: Path, artifact: Artifact, profile: DeviceProfile, threads: int) -> Compared:
    """Return the bundle's artifact beside its float baselines, as far as it carries them.

    FP16 is the baseline where the backend casts and the device computes in it: INT8 is often slower than that.
    """
    backend = backends.load(artifact.backend)
    found = {RESULT: backend.shipped(artifact, threads)}
    carried = folder / bundle.BASELINE
    for precision in _floats(backend, profile, artifact.precision) if carried.is_file() else ():
        lowered = Artifact(artifact.backend, precision, folder, carried.name, artifact.providers)
        found[precision] = backend.shipped(lowered, threads)
    return Compared(found, list(found)[-1])


def _floats(backend: Backend, profile: DeviceProfile, precision: str) -> tuple[str, ...]:
    """Return the float precisions to measure beside one; the last is what it is compared with."""
    half = backend.casts and isinstance(backend.schemes(profile)["fp16"], FloatScheme) and precision != "fp16"
    return ("fp32", "fp16") if half else ("fp32",)


def write(folder: Path, artifact: Artifact, profile: DeviceProfile, feed: Mapping[str, np.ndarray]) -> None:
    """Put the recipe, an input and the program into a bundle whose ONNX files are there."""
    if artifact.precision != "fp16" and (folder / bundle.BASELINE).is_file():
        backends.load(artifact.backend).lower(folder / bundle.BASELINE, profile, "fp16")
    found = compared(folder, artifact, profile, 0)
    fed = {}
    for n, (name, array) in enumerate(feed.items()):
        (folder / f"input-{n}.bin").write_bytes(np.ascontiguousarray(array).tobytes())
        fed[name] = {"dtype": str(array.dtype), "shape": list(array.shape), "file": f"input-{n}.bin"}
    document = {
        "kind": "measure",
        "device": profile.name,
        "title": profile.title,
        "baseline": found.baseline,
        "models": [on_device.entry(name, one, feed, folder) for name, one in found.models.items()],
        "feed": fed,
        "extras": True,
    }
    (folder / RECIPE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    (folder / packing.NAME).write_bytes(packing.packed())


def came_back(folder: Path) -> bool:
    """Say whether a bundle holds what was measured on its device."""
    return (folder / MEASUREMENT).is_file() and (folder / RECIPE).is_file()


def joined(folder: Path) -> list[Measurement]:
    """Take what was measured on the device into the bundle's report, and return the measurements, the baseline last.

    DataError where it is damaged, or of another bundle.
    """
    where = str(folder / MEASUREMENT)
    try:
        said = json.loads((folder / MEASUREMENT).read_text(encoding="utf-8"))
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        there, hashes = matching.named(said["probe"]), dict(said["sha256"])
        batch = next((one["shape"][0] for one in recipe["feed"].values() if one["shape"]), 1)
        found = on_device.measurements(said["result"], recipe["baseline"], target=there, threads=0, batch=batch)
        measured = [found[one["name"]] for one in recipe["models"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"damaged: {error!r}", where=where, fix=f"measure again on the device: {COMMAND}") from error
    for name, sha256 in hashes.items():
        if not (folder / name).is_file() or bundle.digest(folder / name) != sha256:
            raise DataError(f"it was measured of another {name}", where=where, fix=f"measure again: {COMMAND}")
    _into_report(folder, found, recipe["baseline"], there)
    return measured


def _into_report(folder: Path, found: Mapping[str, Measurement], baseline: str, there: str) -> None:
    path = folder / "report.json"
    report: Report = serial.from_json(json.loads(path.read_text(encoding="utf-8")))
    base = replace(found[baseline], name=baseline)
    result = replace(found[RESULT], name=report.result.name)
    known = {a.name: result if a.chosen else found.get(a.precision) for a in report.attempts}
    attempts = tuple(
        a if (m := known[a.name]) is None else replace(a, measurement=replace(m, name=a.name)) for a in report.attempts
    )
    report = replace(report, target=there, result=result, baseline=base, attempts=attempts)
    report = replace(report, headline=text.headline(report))
    files.write_atomic(path, json.dumps(serial.to_json(report), indent=1))
    files.write_atomic(folder / "report.html", html.render(report))
