"""The folder that a compile leaves behind (model.onnx, manifest.json, report.*), and opening it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..backends import base as backends
from .errors import ModelError
from .types import Artifact, Preprocess, Report

if TYPE_CHECKING:
    import numpy as np

    from ..backends.base import Runner

MANIFEST = "manifest.json"
MODEL = "model.onnx"
#: The float baseline, kept in bundles that were not measured here, so that `bench` can compare on the device.
BASELINE = "baseline-fp32.onnx"
FORMAT = 1
_KEYS = {"backend", "precision", "model", "providers", "preprocess", "files"}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: `run(inputs)` gives outputs by name; it is opened by the backend that made it."""

    folder: Path
    manifest: Mapping[str, Any]
    runner: Runner

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model once; `feed` maps every input's name to an array."""
        return self.runner.run(feed)

    @property
    def preprocess(self) -> Preprocess | None:
        """How images become the model's input, as it was when the bundle was made."""
        return preprocess_of(self.manifest)


def write(folder: Path, artifact: Artifact, report: Report, source: Path) -> None:
    """Write manifest and reports beside the artifact's files, which lie in `folder` already."""
    from .report import html, serial

    manifest = {
        "format": FORMAT,
        "edgec": __version__,
        "backend": artifact.backend,
        "precision": artifact.precision,
        "device": report.device.name,
        "model": artifact.model,
        "providers": artifact.providers,
        "source_path": {"path": str(source.resolve()), "sha256": digest(source)},
        "preprocess": None if report.preprocess is None else asdict(report.preprocess),
        "threads": report.result.threads,
        "files": {p.name: digest(p) for p in sorted(folder.iterdir()) if p.is_file()},
    }
    (folder / "report.json").write_text(json.dumps(serial.to_json(report), indent=1), encoding="utf-8")
    (folder / "report.html").write_text(html.render(report), encoding="utf-8")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest. ModelError if there is none, or it is damaged, or from a newer edgec."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            "not a bundle: no manifest.json in it",
            where=str(folder),
            fix="give a folder that edgec compile wrote",
        ) from error
    except ValueError as error:
        raise ModelError(f"damaged: {error}", where=str(path), fix="compile again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not manifest.keys() >= _KEYS:
        raise ModelError(
            "written by another version of edgec", where=str(path), fix="compile again, or use that version"
        )
    return manifest


def artifact_of(folder: Path, manifest: Mapping[str, Any]) -> Artifact:
    """Return the artifact that the manifest describes. ModelError if its file was changed or is missing."""
    name = manifest["model"]
    path = folder / name
    if not path.is_file() or digest(path) != manifest["files"].get(name):
        raise ModelError("missing or changed since the bundle was written", where=str(path), fix="compile again")
    return Artifact(manifest["backend"], manifest["precision"], folder, name, tuple(manifest["providers"]))


def open_bundle(path: str | Path, threads: int = 0) -> Bundle:
    """Open a bundle on this machine; `threads` 0 means all cores.

    Raises ModelError if it is no bundle or damaged, UnavailableError if its backend cannot run here.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    artifact = artifact_of(folder, manifest)
    runner = backends.load(artifact.backend).open(artifact, threads)
    return Bundle(folder, manifest, runner)


def preprocess_of(manifest: Mapping[str, Any]) -> Preprocess | None:
    """Return the preprocessing that a manifest carries."""
    stated = manifest.get("preprocess")
    if stated is None:
        return None
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()}
    return Preprocess(**fields)


def digest(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
