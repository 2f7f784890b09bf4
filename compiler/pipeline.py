"""Which passes run, in which order; and the runner that records what each did.

onnx_ir's own Sequential drops the extra fields of a result, hence this runner. It proves every exact pass against the
original and takes a pass back that fails its proof: the report then says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..passes import registry
from . import model as model_io
from .proof import Prover
from .types import PassRecord, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..passes.base import Pass, PassResult

logger = logging.getLogger(__name__)


def exact_passes(opset: int | None = None, newest: int | None = None) -> list[Pass]:
    """Return the passes that change no number: what every compile runs.

    `opset` is the lowest that is needed, `newest` the highest that the backend reads; None for any.
    """
    raise_opset = registry.load("raise-opset")(target=opset) if opset else None  # type: ignore[call-arg]  # each pass has options of its own
    lower = registry.load("lower-opset")(target=max(newest, opset or 0)) if newest else None  # type: ignore[call-arg]  # as above
    passes = [raise_opset, registry.load("normalise")(), registry.load("fold-batch-norm")(), lower]
    return [p for p in passes if p is not None]


def unfolded_passes(opset: int | None = None) -> list[Pass]:
    """Return those of them that leave BatchNormalization where it is."""
    return [step for step in exact_passes(opset) if step.stage != "fold"]


def run(model: ir.Model, passes: Sequence[Pass], prover: Prover | None) -> tuple[ir.Model, list[PassRecord]]:
    """Run the passes on `model` (changed in place) and return the result with a record for each.

    The returned model is another object than `model` where an exact pass had to be taken back.
    """
    records = []
    for step in passes:
        before = model_io.copy(model) if step.exact else None
        nodes = _count(model)
        start = time.perf_counter()
        result = step.apply(model)
        seconds = time.perf_counter() - start
        proof = prover.prove(model, step.tolerance) if prover and step.exact and result.modified else None
        undone = proof is not None and proof.error is not None and not proof.error <= proof.tolerance
        if undone and before is not None:
            logger.warning("%s changed the model's outputs and was taken back: %s", step.name, proof)
            model = before
        records.append(
            PassRecord(
                name=step.name,
                stage=step.stage,
                exact=step.exact,
                modified=result.modified and not undone,
                seconds=seconds,
                nodes_before=nodes,
                nodes_after=_count(model),
                rewrites=0 if undone else result.rewrites,
                refusals=_refusals(result, step, undone),
                notes=result.notes,
                proof=proof,
            )
        )
    return model, records


def _count(model: ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _refusals(result: PassResult, step: Pass, undone: bool) -> tuple[Refusal, ...]:
    found = result.refusals
    if undone:
        found += (Refusal("the whole model", step.name, "its proof on sample inputs failed, so it was taken back"),)
    return found
