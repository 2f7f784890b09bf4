"""Normalisation: constants folded, identities gone, dead code gone, shapes inferred.

Rules, applied in rounds until a round changes nothing (so a second run of the pass changes nothing either)
1. Local functions are inlined.
2. Types and shapes are inferred afresh (shapes.py).
3. What is known before the model runs becomes an initializer (folding.py).
4. A node that does nothing is bypassed; a graph output keeps its name.
5. CastLike becomes Cast; a Reshape whose result has at most one dynamic dimension gets a constant shape;
   a bias of zeros is dropped from Conv and ConvTranspose; an If with a constant condition becomes its branch;
   two Slices in a row become one (slices.py).
6. Nodes and initializers that nothing uses are removed; every node and value has a name of its own.

Not touched: the signature (inputs, outputs, their names, types and shapes), initializers that are graph inputs too,
random operators, operators of other domains, Q/DQ pairs, and, but for 1, 2 and 6, the bodies of If, Loop and Scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ..compiler.types import Refusal
from . import folding
from .base import Pass, PassResult, Stage
from .constants import Fingerprint, Names, add_initializer, graphs, remove_unused, small_array, supplant, values
from .shapes import infer_shapes
from .slices import merge_slices

#: A rule returns whether it changed the model.
_Rule = Callable[[ir.Node, ir.Model], bool]

#: A bias up to this many bytes is looked at: is it all zeros?
_BIAS_BYTES = 1 << 20


@dataclass(frozen=True)
class Normalise(Pass):
    """Fold constants, remove what does nothing or is never used, and infer all shapes."""

    name: ClassVar[str] = "normalise"
    stage: ClassVar[Stage] = "normalise"

    def call(self, model: ir.Model) -> PassResult:
        """Normalise `model` in place."""
        before = Fingerprint.of(model)
        calls = inline_functions(model)
        spare = model.clone() if any(node.op_type == "If" for node in model.graph) else None
        work = _Work(model, _RULES)
        after = work.run()
        if spare is not None and work.fault_before is None and work.fault is not None:
            # ONNX Runtime takes in a branch, unseen, what it refuses in the open: leave the branches closed
            model.graph = spare.graph
            work = _Work(model, tuple(rule for rule in _RULES if rule is not _constant_if))
            after = work.run()
        notes = (f"shapes are incomplete, since inference found a fault: {work.fault}",) if work.fault else ()
        refusals = (*calls, *work.refusals)
        return PassResult(model, after != before, rewrites=work.rewrites, refusals=refusals, notes=notes)


def inline_functions(model: ir.Model) -> list[Refusal]:
    """Put the bodies of local functions in the place of their calls; return what had to stay a call."""
    if not model.functions:
        return []
    imports = model.opset_imports
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # onnx_ir's own
    called_with_graphs = {node.op_identifier() for node in model.graph.all_nodes() if _takes_graph(node)}

    def fits(function: ir.Function) -> bool:
        same_opsets = all(imports.get(d, version) == version for d, version in function.opset_imports.items())
        return same_opsets and function.identifier() not in called_with_graphs

    common.InlinePass(criteria=fits)(model)
    why = "it is written for another opset than the model, or takes a graph"
    return [Refusal(f"{domain}::{name}", "inline-function", why) for domain, name, _ in model.functions]


def _takes_graph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


@dataclass
class _Work:
    """One run of the pass on one model."""

    model: ir.Model
    rules: tuple[_Rule, ...]
    rewrites: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    fault_before: str | None = None
    fault: str | None = None

    def run(self) -> Fingerprint:
        """Apply rules 2 to 6 until nothing changes; return the fingerprint of the result."""
        self.fault_before = infer_shapes(self.model)
        last = None
        while (now := Fingerprint.of(self.model)) != last:
            last = now
            self.simplify()
            self.fault = infer_shapes(self.model)
        return now

    def simplify(self) -> None:
        """Apply the rules once to every node of the main graph, in topological order."""
        graph = self.model.graph
        _make_names_unique(self.model)
        self.refusals = []
        for node in list(graph):
            if node.graph is graph and not node.domain:
                self.rewrites += self._fold(node) or any(rule(node, self.model) for rule in self.rules)
        nodes = graph.num_nodes()
        common.RemoveUnusedNodesPass()(self.model)
        self.rewrites += nodes - graph.num_nodes()
        _make_names_unique(self.model)

    def _fold(self, node: ir.Node) -> bool:
        """Rule 3."""
        known = folding.constant_attribute(node) or folding.static_dimensions(node)
        if known is not None:
            return _replace_by_constants(node, [known])
        if not folding.is_constant(node):
            return False
        why = folding.why_too_large(node)
        results = None if why else folding.compute(node, self.model)
        if results is None:
            why = why or "ONNX Runtime cannot compute it"
            self.refusals.append(Refusal(node.name or "", "fold-constants", why))
            return False
        return _replace_by_constants(node, results)


def _replace_by_constants(node: ir.Node, tensors: list[ir.TensorProtocol]) -> bool:
    """Replace a node by initializers with its outputs' names; False where an output is one of the graph."""
    graph = node.graph
    values = [value for value in node.outputs if value.name]
    if not isinstance(graph, ir.Graph) or any(value.is_graph_output() for value in values):
        return False
    inputs = [value for value in node.inputs if value is not None]
    for value, tensor in zip(values, tensors, strict=True):
        value.replace_all_uses_with(add_initializer(graph, value.name or "", tensor))
    graph.remove(node, safe=True)
    remove_unused(inputs)
    return True


# ------------------------------------------------------------------------------------------- rules


def _bypass(node: ir.Node, model: ir.Model) -> bool:
    """Rule 4. To keep an output's name, its source must be able to take it: made here, and no output itself."""
    if not folding.does_nothing(node, model.opset_imports.get("", 1)):
        return False
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None and isinstance(node.graph, ir.Graph)
    if y.is_graph_output():
        if x.producer() is None or x.graph is not node.graph or x.is_graph_output():
            return False
        supplant(y, x)
    else:
        y.replace_all_uses_with(x)
    node.graph.remove(node, safe=True)
    return True


def _cast_like(node: ir.Node, model: ir.Model) -> bool:
    """Rule 5: the type is known, so the second input is not needed."""
    del model
    like = node.inputs[1].dtype if node.op_type == "CastLike" and node.inputs[1] is not None else None
    if like is None:
        return False
    attributes = [*node.attributes.values(), ir.AttrInt64("to", like.value)]
    cast = ir.Node("", "Cast", [node.inputs[0]], attributes, name=node.name)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, cast)
    supplant(node.outputs[0], cast.outputs[0])
    node.graph.remove(node, safe=True)
    return True


def _constant_shape(node: ir.Node, model: ir.Model) -> bool:
    """Rule 5: -1 stands for the one dynamic dimension; a 0 would mean another thing."""
    y = node.outputs[0]
    if node.op_type != "Reshape" or y.is_graph_output() or y.shape is None or len(node.inputs) < 2:
        return False
    target = [dim if isinstance(dim, int) else -1 for dim in y.shape]
    computed = node.inputs[1] is not None and node.inputs[1].producer() is not None
    if not computed or target.count(-1) > 1 or 0 in target:
        return False
    tensor = ir.tensor(np.array(target, np.int64))
    node.replace_input_with(1, add_initializer(model.graph, Names.of(model).fresh(f"{y.name}_shape"), tensor))
    return True


def _zero_bias(node: ir.Node, model: ir.Model) -> bool:
    """Rule 5."""
    del model
    bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) > 2 else None
    array = small_array(bias, _BIAS_BYTES)
    if bias is None or array is None or array.any():
        return False
    node.resize_inputs(2)
    remove_unused([bias])
    return True


def _constant_if(node: ir.Node, model: ir.Model) -> bool:
    """Rule 5. The branch's outputs must be made in the branch, once each, to take the names of the If's outputs."""
    condition = small_array(node.inputs[0]) if node.op_type == "If" else None
    if condition is None:
        return False
    branch = node.attributes["then_branch" if condition.all() else "else_branch"].as_graph()
    results = list(branch.outputs)
    made_here = all(value.producer() is not None and value.graph is branch for value in results)
    if not made_here or len(set(results)) < len(results):
        return False
    branch.outputs.clear()
    names = Names.of(model)
    for name in list(branch.initializers):
        value = branch.initializers.pop(name)
        value.name = names.fresh(f"{node.name}_{name}")
        model.graph.initializers.add(value)
    nodes = list(branch)
    branch.remove(nodes)
    model.graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        if old.name:
            supplant(old, new)
    model.graph.remove(node, safe=True)
    return True


_RULES: tuple[_Rule, ...] = (
    _bypass,
    _cast_like,
    _constant_shape,
    _zero_bias,
    _constant_if,
    merge_slices,
)


def _make_names_unique(model: ir.Model) -> None:
    """Give every node and value a name of its own; an empty value name is an output left out, and stays."""
    named = [value for value in values(model) if value.name != ""]
    names, seen = Names(value.name for value in named), set()
    for value in named:
        if value.name is None or value.name in seen:
            value.name = names.fresh(value.name or "value")
        seen.add(value.name)
    nodes = [node for graph in graphs(model) for node in graph]
    names, seen = Names(node.name for node in nodes), {""}
    for node in nodes:
        if node.name is None or node.name in seen:
            node.name = names.fresh(node.name or f"node_{node.op_type}")
        seen.add(node.name)
