"""The pass contract: `requires -> call -> ensures`, a truthful `modified`, and a reason for every refusal.

A pass is a frozen dataclass; its fields are its options. To add one: a file here and a line in registry.py.
The contract test picks it up from there.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from ..compiler.types import Refusal

Stage = Literal["normalise", "fold", "compress", "quantize", "cast"]


@dataclasses.dataclass
class PassResult(ir.passes.PassResult):
    """onnx_ir's result, with what the report needs: how many rewrites, which refusals, and notes."""

    rewrites: int = 0
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()


class Pass(ir.passes.InPlacePass):
    """A rewrite of a model in place.

    `exact` passes keep every number up to float rounding: `tolerance` is the largest difference allowed,
    relative to the largest magnitude of the output. Other passes are lossy and judged on images.
    `call` returns a `PassResult` whose `modified` is true only if the serialised model differs.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4

    def apply(self, model: ir.Model) -> PassResult:
        """Run the pass, its pre- and postconditions checked, and return our own kind of result."""
        result = self(model)
        assert isinstance(result, PassResult), f"{self.name} must return edgec's PassResult"
        return result
