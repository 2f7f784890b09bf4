"""TensorRT's log, which is the only place where it says why it built or opened nothing, and what it says there.

There is one logger for the process: builders, parsers and runtimes keep a reference to theirs, and TensorRT complains
about a second one.
"""

import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import layer_info
from .faults import Fault

#: Lines kept at most, and characters of one in a Fault. A warning for each layer of each tactic makes many.
_MOST, _LONGEST = 5000, 600
_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")

_NO_KERNEL = re.compile(r"could not find any implementation for node (.+?)\s*(?:due to .*)?\.?\)?\.?$", re.I | re.S)
_FOREIGN = re.compile(r"ForeignNode\[(.+)\.\.\.(.+)\]", re.S)
_NO_MEMORY = re.compile(r"out ?of ?memory|memory is insufficient|insufficient memory|could not be allocated", re.I)
#: "[file.cpp::function::123] " and the name of a call, which say nothing to a person.
_ORIGIN = re.compile(r"^\s*(?:\d+: )?(?:\[[^\]]*::[^\]]*\]\s*)?(?:I\w+::\w+: )?")
#: How parsers before 9 name the node that they stopped at: a number and an operator, and the node's text behind it.
_STOPPED = re.compile(r"While parsing node number (\d+) \[(\w+)")
_NAME = re.compile(r'^name: "(.*)"\s*$', re.M)


class Layer(NamedTuple):
    """A layer of a network before it is built: its name and the ONNX nodes that it came from."""

    name: str
    nodes: Tuple[str, ...]


_loggers: Dict[int, Tuple[Any, Any]] = {}


def logger(trt: Any) -> Any:
    """Return the process's logger for this module; its `lines` are (severity, message), warnings and errors only."""
    if id(trt) not in _loggers:

        class Log(trt.ILogger):  # type: ignore[misc]  # its module has no types
            """Keeps what matters instead of printing it."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # without it the C++ half is missing, and the first call crashes
                self.lines: List[Tuple[str, str]] = []

            def log(self, severity: Any, msg: str) -> None:
                """Take one line; called from TensorRT's threads."""
                name = str(getattr(severity, "name", severity)).rsplit(".", 1)[-1]
                if name in _KEPT and (len(self.lines) < _MOST or name != "WARNING"):
                    self.lines.append((name, msg))

        _loggers[id(trt)] = (trt, Log())
    return _loggers[id(trt)][1]


def errors(log: Any, mark: int) -> List[str]:
    """Return the errors since the log had `mark` lines, oldest first."""
    return [message for severity, message in log.lines[mark:] if severity != "WARNING"]


def warnings(log: Any, mark: int, most: int = 20) -> List[str]:
    """Return the warnings since then, each once."""
    found: List[str] = []
    for severity, message in log.lines[mark:]:
        if severity == "WARNING" and message not in found:
            found.append(message.strip())
    return found[:most]


def plain(message: str) -> str:
    """Return a message of the log without where in TensorRT's sources it comes from."""
    said = " ".join(_ORIGIN.sub("", message, count=1).split())
    return said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"


def reason(some: Sequence[str], otherwise: str) -> str:
    """Return the first error in plain words, the first one being the cause of the others."""
    return plain(some[0]) if some else otherwise


# ------------------------------------------------------------------------------------------------ parsing


def parse_fault(version: str, parser: Any, said: Sequence[str]) -> Fault:
    """Return why an ONNX file could not be read: the node's name, its operator and the reason."""
    if not parser.num_errors:
        return Fault("TensorRT %s cannot read the ONNX file: %s" % (version, reason(said, "it does not say why")))
    error = parser.get_error(0)
    name, operator = _node(error, said)
    at = "node %s (%s)" % (name, operator) if operator else "node %s" % name
    what = "TensorRT %s cannot read %s: %s" % (version, at if name else "the ONNX file", plain(error.desc()))
    return Fault(what, _REPLACE if name else None, [name] if name else [])


_REPLACE = "keep this node out of quantization, or replace it in the model"


def _node(error: Any, said: Sequence[str]) -> Tuple[Optional[str], str]:
    """Return the name and operator of the node that a parser stopped at; (None, "") where nothing tells."""
    if hasattr(error, "node_name") and error.node_name():
        return str(error.node_name()), str(error.node_operator())
    operator, name = "", None
    for line in said:
        stopped, named = _STOPPED.search(line), _NAME.search(line)
        if stopped:
            operator, name = stopped.group(2), "number %s" % stopped.group(1)
        if stopped is None and named and operator:
            return named.group(1), operator
    if name is None and error.node() >= 0:
        name = "number %d" % error.node()
    return name, operator


# ------------------------------------------------------------------------------------------------ building


def build_fault(version: str, some: Sequence[str], warned: Sequence[str], layers: Sequence[Layer]) -> Fault:
    """Return why no engine was built, and the ONNX nodes of the layers that the log names."""
    found = [match.group(1) for match in map(_NO_KERNEL.search, some) if match]
    nodes: List[str] = []
    for name in found:
        nodes += [node for node in blamed(name, layers) if node not in nodes]
    cause = next((line for line in some if _NO_KERNEL.search(line)), None)
    said = plain(cause) if cause else reason(some, "its log does not say why")
    fix = "keep these nodes out of quantization, or use a wider precision" if nodes else None
    if any(_NO_MEMORY.search(line) for line in list(some) + list(warned)):
        fix = "memory was short: stop other programs on the device, and build again"
    return Fault("TensorRT %s built no engine: %s" % (version, said), fix, nodes)


def blamed(name: str, layers: Sequence[Layer]) -> List[str]:
    """Return the ONNX nodes of a layer by its name in the log, in the network's order.

    Fused layers join the names of what they came from, "a + b" or "PWN(a)"; a region, "{ForeignNode[a...b]}", is
    named by its ends, and all that stands between them in the network belongs to it. Where none of the network's
    names is in there, what it is joined from is returned as it is.
    """
    inside = [layer for layer in layers if layer.name and _whole(layer.name).search(name)]
    region = _FOREIGN.search(name)
    if region:
        ends = [n for n, layer in enumerate(layers) if any(_whole(layer.name).search(e) for e in region.groups())]
        inside = list(layers[ends[0] : ends[-1] + 1]) if ends else inside
    nodes: List[str] = []
    for layer in inside:
        nodes += [node for node in layer.nodes if node not in nodes]
    return nodes or list(layer_info.nodes_of_name(name))


def _whole(name: str) -> Any:
    """Return a pattern for a name that is not part of a longer one; three dots may stand around it, one may not."""
    return re.compile(r"(?<![\w/])(?<![^.]\.)%s(?![\w/])(?!\.[^.])" % re.escape(name))


def layers_of(network: Any) -> List[Layer]:
    """Return a network's layers. From 8.6 on their metadata names the ONNX nodes, before that their own names do."""
    found = []
    for n in range(network.num_layers):
        layer = network.get_layer(n)
        nodes = tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=[\s\x1e\x1f]|$)", str(getattr(layer, "metadata", "") or "")))
        found.append(Layer(layer.name, nodes or layer_info.nodes_of_name(layer.name)))
    return found
