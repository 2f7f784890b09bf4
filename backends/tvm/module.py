"""From an ONNX file to a TVM module: imported, fused, scheduled by what tuning found, compiled, exported.

    from_onnx -> decompose, fold, fuse (Relax) -> records applied (tuning.py) -> weights laid out -> llvm -> model.so

A batch that may be any is built as 1, for which there are schedules; runner.py takes more images one after another.
Everything here imports tvm, which takes half a second and 200 MB: only what builds or runs does.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compiler.errors import ModelError
from ...compiler.types import InputSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Imported:
    """A network in Relax, fused and ready to be tuned: `module` is an IRModule, `target` a tvm.target.Target."""

    module: Any
    target: Any


def target_of(cpu: Mapping[str, object]) -> Any:
    """Return TVM's target: `cpu` has llvm's attributes (mcpu, mtriple, mattr, num-cores)."""
    import tvm

    return tvm.target.Target({"kind": "llvm", **cpu})


def host_cpu(threads: int) -> dict[str, object]:
    """Return llvm's attributes of this machine."""
    from tvm.target import codegen

    return {"mcpu": codegen.llvm_get_system_cpu(), "num-cores": threads}


def imported(path: Path, inputs: Sequence[InputSpec], target: Any) -> Imported:
    """Import an ONNX file with batch 1. ModelError where TVM's importer fails."""
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax import transform
    from tvm.relax.frontend.onnx import from_onnx

    shapes = {spec.name: [1 if dim is None else dim for dim in spec.shape] for spec in inputs}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # it prints what it stumbles over before it raises
            module = from_onnx(onnx.load(path), shape_dict=shapes)
        passes = [
            transform.DecomposeOpsForInference(),
            transform.FoldConstant(),
            transform.CanonicalizeBindings(),
            relax.get_pipeline("zero"),
            transform.AttachAttrLayoutFreeBuffers(),
        ]
        with target:
            return Imported(tvm.ir.transform.Sequential(passes)(module), target)
    except Exception as error:  # TVM raises what it likes
        logger.debug("TVM's importer said: %s", said.getvalue())
        raise ModelError(
            f"TVM cannot import it: {str(error).strip().splitlines()[0]}", where=str(path), fix="use --backend ort"
        ) from error


def compiled(found: Imported, records: Any) -> Any:
    """Return the executable, scheduled by the records (a MetaSchedule database) where they know a function."""
    import tvm
    from tvm.relax import transform

    with found.target, records:
        module = transform.MetaScheduleApplyDatabase(enable_warning=False)(found.module)
    after = [transform.SplitLayoutRewritePreproc(), transform.FoldConstant(), transform.DeadCodeElimination(["main"])]
    with found.target:
        module = tvm.ir.transform.Sequential(after)(module)
    return tvm.compile(module, target=found.target)
