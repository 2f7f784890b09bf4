"""What is left of a network after a cut, fitted to what the whole one gave: no training, least squares alone.

The masked network (passes/channel_cuts.py) runs beside the original, layer after layer (layerwise.py). X is what a
layer reads behind the layers that were fitted already, so it holds the errors of all of them; Y is what the original's
layer gives, plus what a residual Add behind it lacks on its other input. The layer's new weight is

    V = argmin |Y - X V'|^2 + ridge m |V - W|^2          m = mean of X'X's diagonal,  W the weight as it was

and its bias takes care of the mean (passes/pruning.py). So a block makes up for what its skip branch lost, and the
statistics of a BatchNormalization, which is folded by then, are estimated anew on the way. Where a Relu alone reads
the sum, what is negative and shall be is right (passes/forgiving.py): 0.1 to 0.2 dB at the outputs of ResNet-20 and 32.
The ridge is the one that errs least on a fifth of the images, fitted to the others: 0.5 dB on a detector's 60 images,
nothing that can be measured where there are 500. Large networks (probe.py) are not forgiven: a minute of a ResNet-50's.

On ResNet-20 with half of its MACs cut, fitting each layer to its own old output on exact inputs leaves 56 %, this 73 to
75 % top-1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...passes import branch_rewrites, channel_cuts, pruning
from ...passes.bias import shift_bias
from ...passes.branches import Branch
from ...passes.channel_cuts import Removed
from ...passes.constants import Names
from ...passes.forgiving import refit_forgiving
from ..fitting.gram import Moments
from ..fitting.images import split
from ..fitting.layerwise import Choice, LayerStep, Site, walk
from ..fitting.probe import is_large
from ..types import Progress, silent
from .producers import made_for_readers

#: A layer with fewer rows than so many times its inputs, such as the classifier behind a pooling, follows the noise of
#: the images: there the pull to the old weight is strong. On ResNet-20 held-out images choose 1 to 10 for it.
_FEW, FEW_RIDGE = 16, 1.0
#: A layer of more inputs keeps the usual ridge: six systems of 2,304 equations, layer after layer, are half a minute.
_WIDEST = 1200


def repaired(
    model: ir.Model,
    removed: Removed,
    feeds: Sequence[Mapping[str, np.ndarray]],
    ridge: float | None = None,
    *,
    branches: Sequence[Branch] = (),
    makers: bool = True,
    skip: Collection[str] = (),
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> ir.Model:
    """Return `model` without the units `removed` and without `branches`, what is left fitted on `feeds`.

    `model` is not changed. Of a branch the best constant is left, which the walk finds as its last layer's bias.

    A layer whose weight is shared, or that has no Gram matrix (layout_of), keeps the weights that it had. Without a
    `ridge`, images that are held out choose one for each layer. With `makers`, layers that make channels some of which
    are cut are fitted to what their readers lose (producers.py), but for large networks.
    """
    silent_model = branch_rewrites.silenced(model, branches)
    masked = channel_cuts.mask(silent_model, removed)
    last = {branch.layer for branch in branches}
    inside = {name for branch in branches for name in branch.nodes} - last

    batches, held_out = split(model, feeds, seed)

    settled: set[str] = set()
    makers = makers and not is_large(model)

    def refit(site: Site) -> Choice | str:
        if site.node.name in last:
            return "its branch is removed"
        if len(_weight(site.node).uses()) > 1:
            return "its weight is shared"
        if site.node.name in settled:
            return Choice(site.weight, shift=np.zeros(len(site.weight)))
        weight = _refitted(site, ridge)
        made = made_for_readers(site, weight, inside | last, seed)
        settled.update(made.passed if made else ())
        return made.choice if made else Choice(weight)

    steps = walk(
        model, masked, batches, refit,
        floats=True, skip={*inside, *skip}, forgive=not is_large(model), held_out=held_out, ahead=makers,
        seed=seed, threads=threads, progress=progress,
    )  # fmt: skip
    cut = channel_cuts.cut(_written(silent_model, steps), removed)
    return branch_rewrites.removed(cut, branches)


def _refitted(site: Site, ridge: float | None) -> np.ndarray:
    """Return the best weight of a layer, in the shape it has."""
    layout = site.dense.layout
    fitted = layout.matrix(site.weight.astype(np.float64)).copy()
    grams, crosses = site.dense.gram(), site.dense.cross()
    read = [np.flatnonzero(np.diagonal(gram) > 0) for gram in grams]  # the others are cut, or were never but 0
    if ridge is None and site.held_out is not None and layout.inputs <= _WIDEST:
        pull = _chosen(site.dense, site.held_out, fitted, read)
    elif site.dense.rows < _FEW * layout.inputs:
        pull = FEW_RIDGE
    else:
        pull = pruning.RIDGE if ridge is None else ridge
    for i, (old, kept) in enumerate(zip(fitted, read, strict=True)):
        if not len(kept):
            continue
        if site.rows is None:
            old[:, kept] = pruning.refit(grams[i], crosses[i], kept, pull, old)
        else:
            old[:, kept] = refit_forgiving(site.rows.of_group(i), grams[i], kept, pull, old)
    return np.ascontiguousarray(layout.unmatrix(fitted)).astype(np.float32)


def _chosen(every: Moments, apart: Moments, weight: np.ndarray, read: Sequence[np.ndarray]) -> float:
    """Return the ridge whose refit to the other images errs least on those held out, all groups taken together."""
    rest, errors = every.less(apart), np.zeros(len(pruning.RIDGES))
    sums = (list(zip(part.gram(), part.cross(), strict=True)) for part in (rest, apart))
    for fitted, held_out, old, kept in zip(*sums, weight, read, strict=True):
        if len(kept):
            errors += pruning.held_out_errors(fitted, held_out, kept, old)
    return pruning.RIDGES[int(np.argmin(errors))]


def _weight(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    assert value is not None
    return value


def _written(model: ir.Model, steps: Sequence[LayerStep]) -> ir.Model:
    """Return a copy of the model with the weights and shifts of biases that were chosen."""
    twin = model.clone()
    nodes, names = {node.name: node for node in twin.graph}, Names.of(twin)
    for step in steps:
        node = nodes[step.node]
        if step.weight is not None:
            weight = _weight(node)
            weight.const_value = ir.tensor(step.weight, name=weight.name)
        if step.shift is not None:
            shift_bias(twin.graph, node, step.shift, names)
    return twin
