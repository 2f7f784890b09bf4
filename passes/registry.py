"""The one list of passes: name -> "module:Class", in the order in which they usually run. Imported lazily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Pass

PASSES: dict[str, str] = {
    "raise-opset": "raise_opset:RaiseOpset",
    "normalise": "normalise:Normalise",
    "fold-batch-norm": "fold_batch_norm:FoldBatchNorm",
    "lower-opset": "lower_opset:LowerOpset",
    "equalize": "equalize:Equalize",
    "absorb-high-bias": "absorb_bias:AbsorbHighBias",
    "smooth": "smooth:Smooth",
    "quantize": "quantize:Quantize",
    "anchor-layout": "anchor_layout:AnchorLayout",
    "cast-fp16": "cast_fp16:CastFloat16",
}


def load(name: str) -> type[Pass]:
    """Return the class of the pass called `name`; KeyError if there is none."""
    module, _, cls = PASSES[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(f".{module}", __package__), cls)
    return found
