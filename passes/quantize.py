"""Numbers of few bits, in the Q/DQ form: wherever the backend has a kernel for them; floats elsewhere.

Rules
1. placement.py decides which nodes and tensors; qdq_writer.py and weight_writer.py write.
2. One QuantizeLinear per tensor, one DequantizeLinear behind it, shared by all readers.
3. Weights become initializers of few bits behind a DequantizeLinear (or stay float behind a Q/DQ pair, for backends
   that want them so), one scale per output channel or block. A bias becomes int32 in the accumulator's scale, or stays
   float.
4. Data movement (Reshape, MaxPool, Pad with zero, …) is done on the integers themselves, between Q and DQ.
5. A graph output keeps its name and is float again.
6. A scheme without an activation type stores weights in few bits and leaves all else in float.

Not touched: subgraphs, float16 nodes, nodes whose weight is computed; the whole model where its opset has no Q/DQ for
the scheme's types. It is lossy: the judge decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.types import OpSupport, QuantScheme, Range, Refusal, StoredWeight, WeightType
from .base import Pass, PassResult, Stage
from .graph_builder import GraphBuilder
from .placement import place
from .qdq_writer import QdqWriter
from .quant_params import needed_opset
from .weight_writer import WeightWriter


@dataclass(frozen=True)
class Quantize(Pass):
    """Write Q/DQ for one backend's kernels.

    `ranges` maps tensor names to the interval each shall represent; `supports` and `scheme` are the backend's
    tables; `keep_float` maps node names to the reason why they are left in float; `bias_shift` maps node names to
    what is added to their bias, one number per output channel (bias correction, see quantization/sensitivity.py).
    By node name too: `weight_types`, the type of a weight where it is not the scheme's; `weights`, a weight that a
    rounding method has chosen already, which is stored as it is.
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = "quantize"
    exact: ClassVar[bool] = False

    ranges: Mapping[str, Range] = field(default_factory=dict)
    supports: tuple[OpSupport, ...] = ()
    scheme: QuantScheme = field(default_factory=lambda: QuantScheme("uint8-int8", "uint8", symmetric=False))
    keep_float: Mapping[str, str] = field(default_factory=dict)
    bias_shift: Mapping[str, np.ndarray] = field(default_factory=dict)
    weight_types: Mapping[str, WeightType] = field(default_factory=dict)
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)

    def call(self, model: ir.Model) -> PassResult:
        """Quantize `model` in place."""
        needed = needed_opset(self.scheme, (*self.weight_types.values(), *(w.dtype for w in self.weights.values())))
        opset = model.opset_imports.get("", 0)
        if opset < needed:
            why = f"its opset {opset} has no {self.scheme.name}: that needs {needed}"
            return PassResult(model, modified=False, refusals=(Refusal("the whole model", self.name, why),))
        placement = place(model, self.ranges, self.supports, self.scheme, self.keep_float)
        if placement.nodes:
            build = GraphBuilder(model.graph)
            weights = WeightWriter(build, self.scheme, self.bias_shift, self.weight_types, self.weights)
            QdqWriter(build, weights, placement, self.scheme).write()
        return PassResult(
            model,
            modified=bool(placement.nodes),
            rewrites=len(placement.nodes),
            refusals=tuple(placement.refusals),
        )
