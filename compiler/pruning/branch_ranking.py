"""What it costs at the network's outputs that a branch goes, and how many of the layers' MACs go with it.

Each branch is removed alone, as one candidate (FinerCut judges its sub-blocks so: passes/branches.py), but here what is
left is repaired before the outputs are looked at (repair.py). With the mean of the branch in its place and no repair
the order is another one: repair leaves 5 to 34 % of that error on ResNet-20, the less the more layers stand behind the
branch, 17 to 98 % on ResNet-32, and 1 to 14 % on a vision transformer. Without the four branches of ResNet-20 that cost
least, 47 % of its MACs, 73.3 % of the images are right by this order and 65.4 % by the other; without three of
ResNet-32, 80.7 and 82.4 %: what two branches cost together is not the sum of what they cost alone.

A short repair for each branch of a large network would take minutes, so there the mean takes its place, and no repair.

A branch is a group of one unit, whose curve is 0, then that error, on the scale of importance.py's: there errors are
those before repair, which leaves about two fifths of them. At the same MACs it makes little difference whether branches
or channels go: with this scale halved, two to five branches go first, and top-1 changes by -0.8 to +0.6 points. Of time
they save more: ResNet-20 is 1.64 times faster without four branches, 1.31 times with half of its MACs cut in channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...passes import branch_rewrites, pruning
from ...passes.bias import shift_bias, takes_shift
from ...passes.branches import Branch
from ...passes.constants import Names
from ..fitting.layerwise import bias_of
from ..fitting.probe import Probe, is_large, spread
from ..fitting.stream import Stream
from ..types import Progress, silent
from .costs import Axis
from .importance import Ranking
from .repair import repaired

#: Images that are repaired by for the ranking. What they leave is 1.4 times what 500 do on ResNet-20 and 32, for every
#: branch, so their order is nearly the same.
_IMAGES, _MORE_LEFT = 64, 1.4
#: What repair leaves of the errors that the curves of groups are made of.
_LEFT_OF_GROUPS = 0.4


def rank_branches(
    model: ir.Model,
    branches: Sequence[Branch],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    ridge: float = pruning.RIDGE,
    seed: int = 0,
    threads: int = 0,
    deadline: float | None = None,
    progress: Progress = silent,
) -> dict[str, Ranking]:
    """Return the ranking of each branch, a group of one unit, by the branch's name. Takes one short repair for each.

    What is not ranked at the `deadline`, on time.monotonic's clock, is left out.
    """
    if not branches:
        return {}
    probe, found = Probe(model, feeds, threads), {}
    if is_large(model):
        for name, without in _with_means(model, branches, probe.feeds, threads):
            found[name] = Ranking((0,), np.array([0.0, probe.error(without)]))
            progress("ranking branches", len(found), len(branches))
        return found
    few = spread(feeds, _IMAGES)
    for branch in branches:
        if deadline is not None and time.monotonic() >= deadline:
            break
        left = repaired(
            model,
            {},
            few,
            ridge,
            branches=[branch],
            makers=False,
            skip=_before(model, branch),
            seed=seed,
            threads=threads,
        )
        error = probe.error(left)
        found[branch.name] = Ranking((0,), np.array([0.0, error / (_MORE_LEFT * _LEFT_OF_GROUPS)]))
        progress("ranking branches", len(found), len(branches))
    return found


def _before(model: ir.Model, branch: Branch) -> list[str]:
    """Return the nodes in front of a branch: what they read is as it was, so there is nothing to be fitted."""
    names = [node.name or "" for node in model.graph]
    return names[: min(names.index(name) for name in branch.nodes)]


def _with_means(
    model: ir.Model, branches: Sequence[Branch], feeds: Sequence[Mapping[str, np.ndarray]], threads: int
) -> Iterator[tuple[str, ir.Model]]:
    """Yield each branch's name and the model with the mean of its last layer, per channel, in its place."""
    stream, nodes = Stream(model, feeds, threads), {node.name: node for node in model.graph}
    for branch in branches:  # in the graph's order, which is the stream's
        node = nodes[branch.layer]
        outputs = stream.pull(node.outputs[0])
        channels = 1 if node.op_type.startswith("Conv") else outputs[0].ndim - 1
        count = outputs[0].shape[channels]
        sums = sum(np.moveaxis(y, channels, -1).reshape(-1, count).sum(axis=0, dtype=np.float64) for y in outputs)
        without = branch_rewrites.silenced(model, [branch])
        if takes_shift(node):
            twin = next(other for other in without.graph if other.name == branch.layer)
            mean = sums / (sum(y.size for y in outputs) / count)
            shift_bias(without.graph, twin, mean - bias_of(node, count), Names.of(without))
        yield branch.name, without


def branch_axes(branches: Sequence[Branch]) -> dict[str, tuple[Axis, ...]]:
    """Return, by node, an axis for each branch that the node computes for alone: one index, which goes with it."""
    axes: dict[str, tuple[Axis, ...]] = {}
    for branch in branches:
        for node in branch.nodes:
            axes[node] = (*axes.get(node, ()), Axis(1, {branch.name: np.zeros(1, np.intp)}))
    return axes
