"""Extremes of each channel of a model's tensors, over a few images: what equalization goes by.

min and max are reduced over every axis but the channels' inside ONNX Runtime; two numbers a channel and run come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from ..backends.ort import Session
from ..compiler import model as model_io
from .derive import values
from .folder import Batch
from .observe import first_not_finite


@dataclass(frozen=True, eq=False)
class ChannelExtremes:
    """Smallest and largest element of each channel, float64 of shape (channels,)."""

    min: np.ndarray
    max: np.ndarray

    @property
    def magnitude(self) -> np.ndarray:
        """The largest magnitude of each channel."""
        found: np.ndarray = np.maximum(np.abs(self.min), np.abs(self.max))
        return found


def collect_channels(
    model: ir.Model, axes: Mapping[str, int | None], batches: Iterable[Batch], threads: int = 0
) -> dict[str, ChannelExtremes]:
    """Run `model` over the batches and return the extremes along `axes` (tensor name -> its channel axis).

    An axis of None takes the tensor for one channel: shape (1,). Tensors that the main graph does not have, or whose
    rank is unknown, are left out; `model` is not changed. DataError where an extreme is NaN or infinite.
    """
    twin = model_io.copy(model)
    held = values(twin.graph)
    twin.graph.outputs.clear()
    names = []
    for name, axis in axes.items():
        value = held.get(name)
        if value is None or value.shape is None:
            continue
        rank = len(value.shape)
        others = [i for i in range(rank) if axis is None or i != axis % rank]
        for op in ("ReduceMin", "ReduceMax"):
            _append_reduction(twin, op, value, others)
        names.append(name)
    if not names:
        return {}
    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    with TemporaryDirectory() as folder:
        session = Session(model_io.session_source(twin, Path(folder)), threads=threads)
        for batch in batches:
            out = session.run(batch.feed)
            for name in names:
                least, most = (
                    np.atleast_1d(out[f"{name}::{op}"].astype(np.float64)) for op in ("ReduceMin", "ReduceMax")
                )
                if not (np.isfinite(least).all() and np.isfinite(most).all()):
                    raise first_not_finite(model, batch) or AssertionError(name)
                low[name] = np.minimum(low.get(name, least), least)
                high[name] = np.maximum(high.get(name, most), most)
    return {name: ChannelExtremes(low[name], high[name]) for name in low}


def _append_reduction(model: ir.Model, op: str, value: ir.Value, others: list[int]) -> None:
    """Append the reduction over the axes `others` as a graph output; axes are an input from opset 18 on."""
    graph = model.graph
    out = ir.Value(name=f"{value.name}::{op}", type=ir.TensorType(ir.DataType.FLOAT))
    attributes: dict[str, int | list[int]] = {"keepdims": 0}
    inputs = [value]
    if model.opset_imports.get("", 0) >= 18:
        axes = ir.Value(name=f"{value.name}::{op}::axes", const_value=ir.tensor(np.array(others, np.int64)))
        axes.type, axes.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(others)])
        graph.register_initializer(axes)
        inputs.append(axes)
    else:
        attributes["axes"] = others
    graph.append(ir.node(op, inputs, attributes, outputs=[out], name=out.name))
    graph.outputs.append(out)
