"""Can this parsed ONNX file be compiled at all? The faults that a person must repair, each with its repair.

A rule looks at the protobuf message and returns a Fault or None; RULES lists them in the order they need.
Nothing is refused here that ONNX Runtime would run, except a model without outputs. Shapes and types are not
inferred, no session is made, and data outside the file is not touched (see external_data.py for that).
"""

from __future__ import annotations

import difflib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir

from .errors import ModelError

#: Opsets of the default domain: from the first on onnxruntime promises kernels, before it some operators have
#: one; the second is one that every onnxruntime we allow takes.
KERNEL_OPSET, SAFE_OPSET = 7, 21

_EXPORT_AGAIN = "the file is damaged, or a tool broke it: export the model again"

Container = onnx.GraphProto | onnx.FunctionProto


class Fault(NamedTuple):
    """What is wrong, and how to put it right."""

    what: str
    fix: str


def check(proto: onnx.ModelProto, where: str) -> None:
    """Raise ModelError for the first rule that `proto`, read from `where`, does not follow."""
    for rule in RULES:
        if fault := rule(proto):
            raise ModelError(fault.what, where=where, fix=fault.fix)


# ------------------------------------------------------------------------------------------- walking a proto


def containers(proto: onnx.ModelProto) -> Iterator[Container]:
    """Yield the main graph, the functions, and every subgraph of either."""
    for outermost in (proto.graph, *proto.functions):
        yield from _within(outermost)


def _within(outermost: Container) -> Iterator[Container]:
    stack = [outermost]
    while stack:
        container = stack.pop()
        yield container
        for node in container.node:
            stack.extend(_subgraphs(node))


class Held(NamedTuple):
    """A tensor in a model, the words that name it, and whether it is an initializer or an attribute."""

    tensor: onnx.TensorProto
    owner: str
    initializer: bool


def tensors(proto: onnx.ModelProto) -> Iterator[Held]:
    """Yield every dense tensor of the model: initializers, and attributes such as that of Constant."""
    for container in containers(proto):
        if isinstance(container, onnx.GraphProto):
            for tensor in container.initializer:
                yield Held(tensor, f"initializer {tensor.name!r}", True)
        for node in container.node:
            for attribute in node.attribute:
                owner = f"attribute {attribute.name!r} of {_call(node)}"
                if attribute.HasField("t"):
                    yield Held(attribute.t, owner, False)
                for tensor in attribute.tensors:
                    yield Held(tensor, owner, False)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _call(node: onnx.NodeProto) -> str:
    """Words that name a node: exporters often leave the name empty, so its first output helps out."""
    name = node.name or next(iter(node.output), "")
    return f"{node.op_type or 'a'} node {name!r}"


# ------------------------------------------------------------------------------------------- text


def _text(proto: onnx.ModelProto) -> Fault | None:
    """Every string is UTF-8: protobuf hands out others as bytes, which nothing after this expects."""
    stack: list[Any] = [proto]
    while stack:
        for name, value in _fields(stack.pop()):
            if isinstance(value, bytes):
                return Fault(f"is damaged: {value[:40]!r} in the field {name} is no text", _EXPORT_AGAIN)
            if not isinstance(value, str):
                stack.append(value)
    return None


def _fields(message: Any) -> Iterator[tuple[str, Any]]:
    """Yield the strings and messages right inside `message`; of a tensor, all but its data, which may be huge."""
    if isinstance(message, onnx.TensorProto):
        yield from (("name", message.name), ("doc_string", message.doc_string))
        yield from (("external_data", entry) for entry in message.external_data)
        return
    for field, value in message.ListFields():
        if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE):
            single = isinstance(value, (str, bytes)) or hasattr(value, "ListFields")
            yield from ((field.name, item) for item in ([value] if single else value))


# ------------------------------------------------------------------------------------------- versions


def _versions(proto: onnx.ModelProto) -> Fault | None:
    """The IR version and the opset of the default domain are ones that onnx and onnxruntime know."""
    if not 1 <= proto.ir_version <= onnx.IR_VERSION:
        what = f"declares IR version {proto.ir_version}; onnx {onnx.__version__} knows 1 to {onnx.IR_VERSION}"
        return Fault(what, "export the model again with an older exporter, or upgrade onnx and onnxruntime")
    if not proto.opset_import:
        return Fault("declares no operator set, so it is cut short or damaged", _EXPORT_AGAIN)
    imports = [*proto.opset_import, *(entry for f in proto.functions for entry in f.opset_import)]
    declared = {entry.version for entry in imports if not domain_of(entry)}
    if declared and max(declared) > SAFE_OPSET and max(declared) > newest_opset():
        what = f"uses opset {max(declared)}; the newest for the installed onnxruntime is {newest_opset()}"
        return Fault(what, f"export it with opset_version={newest_opset()} or lower, or upgrade onnxruntime")
    return None


@functools.cache
def newest_opset() -> int:
    """Return the newest opset of the default domain that both onnx and the onnxruntime installed here take.

    onnxruntime has no call that tells, so it is asked with a model of one node a version (milliseconds).
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as faults

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", [value], [output])
    for version in range(onnx.defs.onnx_opset_version(), SAFE_OPSET, -1):
        model = onnx.helper.make_model_gen_version(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except (faults.Fail, faults.InvalidGraph, faults.NotImplemented):
            continue
        return version
    return SAFE_OPSET


# ------------------------------------------------------------------------------------------- names


def _names(proto: onnx.ModelProto) -> Fault | None:
    """Every name has one definition, whatever is read is produced, and there is something to compute."""
    if not proto.graph.output:
        what = "has no outputs, so there is nothing to compute"
        return Fault(what, "export it again; if it is not damaged, name the outputs to keep")
    if any(c.sparse_initializer for c in containers(proto) if isinstance(c, onnx.GraphProto)):
        return Fault("holds sparse initializers, which are not supported", "export the weights as dense tensors")
    outermost: tuple[Container, ...] = (proto.graph, *proto.functions)
    return next((fault for c in outermost if (fault := _scope(c, frozenset()))), None)


def _scope(container: Container, outer: frozenset[str]) -> Fault | None:
    """Check one graph or function, whose nodes may read the names of `outer`, and the graphs within."""
    given = _given(container)
    produced = [name for node in container.node for name in node.output if name]
    twice = [name for name, count in Counter([*given, *produced]).items() if count > 1]
    if twice:
        return Fault(f"defines {_listed(twice)} more than once", _EXPORT_AGAIN)
    known = outer.union(given, produced)
    read = ((name, node) for node in container.node for name in node.input)
    if lost := [f"{name!r} of {_call(node)}" for name, node in read if name and name not in known]:
        return Fault(f"reads what nothing produces: {_listed(lost, quote=False)}", _EXPORT_AGAIN)
    own = {*given, *produced}  # an inner graph may read the names around it, but not hand them back
    if undefined := [name for name in _outputs(container) if name not in own]:
        return Fault(f"has outputs that nothing produces: {_listed(undefined)}", _EXPORT_AGAIN)
    inner = (graph for node in container.node for graph in _subgraphs(node))
    return next((fault for graph in inner if (fault := _scope(graph, known))), None)


def _given(container: Container) -> list[str]:
    """The names that need no node, once each unless repeated; an initializer may share an input's."""
    if isinstance(container, onnx.FunctionProto):
        return list(container.input)
    inputs = [value.name for value in container.input]
    weights = [tensor.name for tensor in container.initializer]
    repeated = [name for name, count in Counter(weights).items() if count > 1]
    return inputs + sorted(set(weights).difference(inputs)) + repeated


def _outputs(container: Container) -> list[str]:
    if isinstance(container, onnx.FunctionProto):
        return list(container.output)
    return [value.name for value in container.output]


# ------------------------------------------------------------------------------------------- operators


def domain_of(entry: onnx.NodeProto | onnx.OperatorSetIdProto) -> str:
    """The domain of a node or an import; "ai.onnx" is another name of the default one, ""."""
    return "" if entry.domain == "ai.onnx" else entry.domain


def _operators(proto: onnx.ModelProto) -> Fault | None:
    """Every node is an operator of an imported domain that onnx or onnxruntime knows, or a local function."""
    local = {(f.domain, f.name) for f in proto.functions}
    unknown: dict[str, str] = {}
    for outermost, entries in (
        (proto.graph, proto.opset_import),
        *((function, function.opset_import) for function in proto.functions),
    ):
        # onnxruntime takes its own domain without an import, and so do we
        imports = {"com.microsoft": 1} | {domain_of(entry): entry.version for entry in entries}
        for node in (node for container in _within(outermost) for node in container.node):
            domain, op = domain_of(node), node.op_type
            version = imports.get(domain)
            if not ((domain, op) in local and version is not None) and not is_known(domain, op, version):
                label = f"{domain}::{op}" if domain else op
                unknown.setdefault(label, f"{label} ({_hint(domain, op, version)})")
    if not unknown:
        return None
    what = f"uses operators that cannot run here: {_listed(unknown.values(), quote=False, limit=10)}"
    return Fault(what, "export with standard ONNX operators or local functions, and an opset that has them")


@functools.cache
def is_known(domain: str, op: str, version: int | None) -> bool:
    """Whether an operator exists, not deprecated, at `version` of `domain` (None: not imported)."""
    if version is None:
        return False
    if not domain and onnx.defs.has(op, version, domain):
        schema = onnx.defs.get_schema(op, version, domain)
        old = version < KERNEL_OPSET
        return not schema.deprecated and (not old or _has_kernel(op, schema.since_version))
    table = _runtime_operators().get(domain, {})
    return table.get(op, math.inf) <= version <= max(table.values(), default=0)


@functools.cache
def _runtime_operators() -> dict[str, dict[str, int]]:
    """What onnxruntime can run: domain -> operator -> the version since which."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    found: dict[str, dict[str, int]] = {}
    for schema in runtime.get_all_operator_schema():
        versions = found.setdefault(schema.domain, {})
        versions[schema.name] = min(schema.since_version, versions.get(schema.name, schema.since_version))
    return found


def _has_kernel(op: str, since: int) -> bool:
    """Whether onnxruntime's CPU provider has a kernel for a standard operator as it was in opset `since`."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    kernels = (k for k in runtime.get_all_opkernel_def() if (k.domain, k.op_name) == ("", op))
    return any(kernel.version_range[0] <= since <= kernel.version_range[1] for kernel in kernels)


def _hint(domain: str, op: str, version: int | None) -> str:
    """Why an operator cannot run, with the nearest names."""
    schemas = {s.name: s for s in onnx.defs.get_all_schemas() if s.domain == domain}
    table = {name: s.since_version for name, s in schemas.items()} | _runtime_operators().get(domain, {})
    if not table:
        return f"no backend here knows the domain {domain!r}"
    if version is None:
        return f"the model does not import the domain {domain or 'ai.onnx'!r}"
    if op in schemas and schemas[op].deprecated:
        return f"removed in opset {schemas[op].since_version}; the model uses {version}"
    if op in table and not domain and version < KERNEL_OPSET:
        return f"onnxruntime has no kernel for opset {version}; supported are 9 to {newest_opset()}"
    if op in table:
        return f"not in version {version} of its domain"
    near = difflib.get_close_matches(op, table, n=3)
    return f"no such operator; nearest: {', '.join(near)}" if near else "no such operator"


def _attributes(proto: onnx.ModelProto) -> Fault | None:
    """Every attribute says of what type it is, and has a value of that type."""
    types = onnx.AttributeProto
    fields = {types.TENSOR: "t", types.GRAPH: "g"}
    for node in (node for container in containers(proto) for node in container.node):
        for attribute in node.attribute:
            field = fields.get(attribute.type)
            empty = attribute.type == types.UNDEFINED or (field is not None and not attribute.HasField(field))
            if empty and not attribute.ref_attr_name:
                return Fault(f"attribute {attribute.name!r} of {_call(node)} has no value", _EXPORT_AGAIN)
    return None


# ------------------------------------------------------------------------------------------- tensors


def _tensors(proto: onnx.ModelProto) -> Fault | None:
    """Every tensor has a type, dimensions, and exactly as much data as they ask for."""
    for tensor, owner, _ in tensors(proto):
        if why := _tensor(tensor):
            return Fault(f"{owner} {why}", _EXPORT_AGAIN)
    return None


def _tensor(tensor: onnx.TensorProto) -> str | None:
    if any(dim < 0 for dim in tensor.dims):
        return f"has a negative dimension: {list(tensor.dims)}"
    if tensor.data_type not in _BITS:
        return f"has no element type that onnx knows ({tensor.data_type})"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    if tensor.HasField("raw_data"):
        have, want, unit = len(tensor.raw_data), size_bytes(tensor), "bytes"
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        have, want, unit = len(getattr(tensor, field)), _entries(tensor), "values"
    return None if have == want else f"of shape {list(tensor.dims)} holds {have} {unit} where {want} are due"


def size_bytes(tensor: onnx.TensorProto) -> int:
    """The bytes that the elements of `tensor` take, packed as ONNX packs them."""
    return _packed(math.prod(tensor.dims), _BITS[tensor.data_type])


def _packed(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _entries(tensor: onnx.TensorProto) -> int:
    """How many entries the typed fields must have: complex numbers take two, 2 and 4 bits share a byte."""
    count: int = math.prod(tensor.dims)
    bits = _BITS[tensor.data_type]
    if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return 2 * count
    return _packed(count, bits) if bits in (2, 4) else count


#: Bits an element takes; strings have no fixed size and are never raw.
_BITS: dict[int, int] = {
    kind.value: 0 if kind == ir.DataType.STRING else kind.bitwidth
    for kind in ir.DataType
    if kind != ir.DataType.UNDEFINED
}

RULES: tuple[Callable[[onnx.ModelProto], Fault | None], ...] = (
    _text,
    _versions,
    _names,
    _operators,
    _attributes,
    _tensors,
)


def _listed(items: Iterable[str], quote: bool = True, limit: int = 5) -> str:
    """Name the first few of many."""
    names = [repr(item) if quote else item for item in items]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
