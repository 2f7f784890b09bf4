"""What is sent to a device for TensorRT: ONNX files by how their types are meant, and the engine where there is one.

`weak` is in float32 with float32 scales, for versions that choose types by flags; `strong` has the types that shall
run. Which of them is built from is the device's to say: it knows its version.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from ...compiler.types import Artifact
from ..base import Shipped

#: The engine beside the ONNX file it was built from, and what it is tied to.
ENGINE, SAID = "model.engine", "model.engine.json"


def float16_beside(model: Path) -> Path:
    """Return where a model's copy with float16 types lies, if it has one."""
    return model.with_name(f"{model.stem}-float16.onnx")


def shipped(artifact: Artifact) -> Shipped:
    """Return what a device needs to build the artifact's engine, and the engine itself if it was fetched before."""
    from ...compiler import model as model_io

    named = artifact.folder / artifact.model
    strong = named if named.stem.endswith("-float16") else float16_beside(named)
    weak = strong.with_name(strong.name.replace("-float16.onnx", ".onnx"))
    files = {role: path for role, path in (("weak", weak), ("strong", strong)) if path.is_file()}
    beside, inputs, outputs = model_io.parts(named)
    for path in files.values():
        beside |= model_io.parts(path)[0]
    options: dict[str, object] = {"precision": artifact.precision}
    engine, said = artifact.folder / ENGINE, artifact.folder / SAID
    if engine.is_file() and said.is_file():
        carried = json.loads(said.read_text(encoding="utf-8"))
        of = [sha256(path.read_bytes()).hexdigest() for path in files.values()]
        # a folder has more ONNX files than the one that the engine was built from
        if carried.get("sha256") in of and carried.get("precision") == artifact.precision:
            files["engine"] = engine
            options["carried"] = carried
    return Shipped("tensorrt", files, beside, inputs, outputs, "TensorRT", options)

