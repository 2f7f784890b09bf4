"""The factors of the layers that become chains, fitted to the whole network's outputs behind those before them.

The walk of layerwise.py goes along both networks. At each layer, X is what it reads behind the layers that were fitted
already, Y what the original gives (with what a residual Add lacks, and what a ReLU forgives left out). The best weight

    T = W + (Y'X - W X'X) H^-1          H: passes/metric.py

is what least squares would give it; a layer that becomes a chain gets the factors that are closest to T in the metric
of H, which are those that err least against Y. So ranks are spent on what the images show, and later layers make up
for earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...passes import factorize, metric
from ...passes.bias import shift_bias
from ...passes.constants import Names
from ...passes.factorize import Chain
from ...passes.factorize import Choice as Form
from ...passes.metric import Metric
from ..fitting.layerwise import Choice, Site, walk
from ..latency.shapes import name_of
from ..pruning.repair import FEW_RIDGE
from ..types import Progress, silent
from .menu import with_weights

#: A layer with fewer rows than so many times its inputs keeps to its weight.
_FEW = 16


def fitted(
    model: ir.Model,
    forms: Mapping[str, Form],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = silent,
) -> tuple[ir.Model, dict[str, Chain]]:
    """Return the model with the weights that the chains stand for and the biases that go with them; and the chains.

    `model` is not changed. Layers without a form keep their weights, and their biases take the mean error.
    """
    chains: dict[str, Chain] = {}
    stand_for: dict[str, np.ndarray] = {}

    def choose(site: Site) -> Choice | str:
        form = forms.get(name_of(site.node))
        if form is None:
            return "it stays as it is"
        layout, metrics = site.moments.layout, site.moments.metrics()
        weight = layout.matrix(site.weight.astype(np.float64))
        owed = site.moments.owed(weight)
        target = weight + np.stack([metric.solved(h, o.T).T for h, o in zip(_pulled(site, metrics), owed, strict=True)])
        shape = factorize.as_groups(site.node, site.weight).shape
        chain = form.fitted(target.reshape(shape), metrics)
        chains[name_of(site.node)], made = chain, factorize.composed(chain, shape)
        stand_for[name_of(site.node)] = made
        return Choice(np.ascontiguousarray(factorize.as_stored(site.node, made)).astype(site.weight.dtype))

    steps = walk(model, model, feeds, choose, floats=True, every=True, seed=seed, threads=threads, progress=progress)
    twin = with_weights(model, stand_for)
    nodes, names = {node.name: node for node in twin.graph}, Names.of(twin)
    for step in steps:
        if step.shift is not None:
            shift_bias(twin.graph, nodes[step.node], step.shift, names)
    return twin, chains


def _pulled(site: Site, metrics: list[Metric]) -> list[Metric]:
    """Return the metrics with a strong pull to the old weight where rows are few."""
    few = site.moments.rows < _FEW * site.moments.layout.inputs
    return [metric.pulled(h, FEW_RIDGE) for h in metrics] if few else metrics
