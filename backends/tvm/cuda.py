"""CUDA modules: TVM's own pipeline, with the schedules of its rules for GPUs (DLight). Not tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax import transform

from ...compiler.types import InputSpec
from .lowering import constants, importer


def built(path: Path, inputs: Sequence[InputSpec], target: Any) -> Any:
    """Return the executable of an ONNX file for a target of kind cuda; no GPU is needed to build it."""
    module = constants.folded(transform.DecomposeOpsForInference()(importer.imported(path, inputs)))
    with target:
        module = relax.get_pipeline("zero")(module)
        return tvm.compile(module, target=target)
