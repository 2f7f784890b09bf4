"""Which node of the network a kernel of the optimised graph belongs to.

ONNX Runtime's names keep those of the nodes and tensors that they come from, with something appended; or put in front,
where a CPU computes float16 in float32. A kernel that
computes several nodes at once is named after the last of them, and belongs to the layer among them. What the runtime
made up itself (reorders, transposes) belongs to the node that makes the tensor which it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir

from ..layers import LINEAR
from .kernel_times import Kernel
from .shapes import name_of

_PREFIXES = ("InsertedPrecisionFreeCast_", "InsertedCast_")


def by_node(kernels: Iterable[Kernel], model: ir.Model) -> dict[str, tuple[float, int]]:
    """Return (milliseconds, number) of the kernels of each node of a network, by the node's name.

    `kernels` in execution order, of that network or of one made from it (quantized) that kept its names. What belongs
    to no node is under "".
    """
    nodes = {name_of(node): node for node in model.graph}
    tensors = {value.name: node for node in model.graph for value in node.outputs if value.name}
    read = {v.name: node for node in model.graph for v in node.inputs if v and v.name and v.is_graph_input()}
    homes: dict[str, ir.Node] = {**read, **nodes, **tensors}
    claimed: set[ir.Node] = set()
    seen: dict[str, ir.Node | None] = {}
    found: dict[str, tuple[float, int]] = {}
    for kernel in kernels:
        anonymous = kernel.name == kernel.op or kernel.name.startswith(f"{kernel.op}_token_")
        source = next((seen[name] for name in kernel.inputs if seen.get(name)), None)
        names = [*kernel.outputs, *([] if anonymous else [kernel.name]), *kernel.inputs]
        home = source if anonymous else None
        if home is None:
            home = next((homes[name] for name in (longest_known(n, homes) for n in names) if name), source)
        op = next((op for op in LINEAR if op in kernel.op and "Integer" not in kernel.op), None)
        if home is not None and op is not None and home.op_type != op:
            home = _behind(home, op, claimed) or home
        if home is not None and op is not None:
            claimed.add(home)
        for name in kernel.outputs:
            seen[name] = home
        key = "" if home is None else name_of(home)
        ms, count = found.get(key, (0.0, 0))
        found[key] = (ms + kernel.ms, count + 1)
    return found


def _behind(node: ir.Node, op: str, claimed: Collection[ir.Node]) -> ir.Node | None:
    """Return the nearest unclaimed layer of this kind before a node, through nodes that are no layers."""
    waiting, tried = [node], {node}
    while waiting:
        at = waiting.pop(0)
        for value in at.inputs:
            producer = value.producer() if value is not None else None
            if producer is None or producer in tried:
                continue
            if producer.op_type == op and producer not in claimed:
                return producer
            tried.add(producer)
            if producer.op_type not in LINEAR:
                waiting.append(producer)
    return None


def longest_known(name: str, names: Mapping[str, object]) -> str:
    """Return the longest known name that `name` begins with and continues after _ or /; empty if there is none."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    while name and name not in names:
        name = name[: max(name.rfind("_"), name.rfind("/"), 0)]
    return name
