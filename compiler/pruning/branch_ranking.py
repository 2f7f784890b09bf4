"""What it costs at the network's outputs that a branch goes, and how many of the layers' MACs go with it.

A branch's operand f becomes the constant that is best for it alone: the mean over images and positions of what its last
layer gives, per channel, as that layer's bias. The outputs' error e is measured with that, one branch at a time, before
any repair (FinerCut judges its sub-blocks so, by the change at the outputs: branches.py). But the more layers there are
behind it, the more is made up for. With p the part of the layers up to the sum, on ResNet-20,

    error behind repair  =  0.17 to 0.41 p e, 0.3 p e in the middle

so a block near the image may cost less than one near the outputs whose own e is a third. A branch is a group of one
unit whose curve is 0, then that error, on the scale of importance.py's, of which repair leaves two fifths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...passes.branch_rewrites import removed
from ...passes.branches import Branch, name_of
from ...passes.constants import Names
from ...passes.weight_writer import takes_shift
from .. import model as model_io
from ..fitting.layerwise import bias_of, is_layer
from ..fitting.stream import Stream
from ..types import Progress, silent
from .allocation import Axis
from .importance import Ranking
from .probe import Probe
from .repair import shift_bias

#: What repair leaves of p e, over what it leaves of the error of a group inside a block.
_LASTING = 0.3 / 0.4


def rank_branches(
    model: ir.Model,
    branches: Sequence[Branch],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    threads: int = 0,
    progress: Progress = silent,
) -> dict[str, Ranking]:
    """Return the ranking of each branch, a group of one unit, by the branch's name."""
    if not branches:
        return {}
    probe, found = Probe(model, feeds, threads), {}
    means, parts = _means(model, branches, probe.feeds, threads), _parts(model)
    for branch in branches:
        error = probe.error(removed(_averaged(model, branch, means[branch.layer]), [branch]))
        found[branch.name] = Ranking((0,), np.array([0.0, _LASTING * parts[branch.add] * error]))
        progress("ranking branches", len(found), len(branches))
    return found


def branch_axes(branches: Sequence[Branch]) -> dict[str, tuple[Axis, ...]]:
    """Return, by node, an axis for each branch that the node computes for alone: one index, which goes with it."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for branch in branches:
        for node in branch.nodes:
            axes[node] = (*axes.get(node, ()), Axis(1, {branch.name: np.zeros(1, np.intp)}))
    return axes


def _means(
    model: ir.Model, branches: Sequence[Branch], feeds: Sequence[Mapping[str, np.ndarray]], threads: int
) -> dict[str, np.ndarray]:
    """Return the mean of what each branch's last layer gives, per channel."""
    wanted, stream, found = {branch.layer for branch in branches}, Stream(model, feeds, threads), {}
    for node in model.graph:
        if name_of(node) in wanted:
            y = stream.pull(node.outputs[0])
            axis = 1 if node.op_type.startswith("Conv") else y[0].ndim - 1
            others = tuple(i for i in range(y[0].ndim) if i != axis)
            total = sum(one.sum(axis=others, dtype=np.float64) for one in y)
            found[name_of(node)] = np.asarray(total) / sum(one.size // one.shape[axis] for one in y)
    return found


def _parts(model: ir.Model) -> dict[str, float]:
    """Return which part of the layers stands before each node, by the graph's order."""
    layers = np.cumsum([is_layer(node) for node in model.graph])
    return {name_of(node): float(count / max(1, layers[-1])) for node, count in zip(model.graph, layers, strict=True)}


def _averaged(model: ir.Model, branch: Branch, mean: np.ndarray) -> ir.Model:
    """Return a copy of the model in which the branch's last layer has that mean as its bias, where it can have one."""
    twin = model_io.copy(model)
    layer = next(node for node in twin.graph if name_of(node) == branch.layer)
    if takes_shift(layer):
        shift_bias(twin.graph, layer, mean - bias_of(layer, len(mean)), Names.of(twin))
    return twin
