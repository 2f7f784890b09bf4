"""Why trtexec failed, from what it printed: the ONNX nodes to blame, in words, and what helps.

It says what TensorRT's own log says, and tensorrt_log reads that; its parser's errors span several lines.
"""

import re
from typing import List, NamedTuple, Optional, Sequence

from . import tensorrt_log
from .faults import Fault
from .onnx_file import Graph
from .trtexec_output import Console

#: "[TRT] " and "Error[10]: ", which stand before TensorRT's own messages.
_PREFIX = re.compile(r"^(?:\[TRT\] )?(?:Error\[\d+\]: )?")
#: What trtexec adds when something before it went wrong.
_ECHOES = (
    "Engine set up failed",
    "Parsing model failed",
    "Failed to parse onnx file",
    "Failed to create engine from model or file.",
    "Engine could not be created from network",
    "Building engine failed",
    "Network And Config setup failed",
    "Engine deserialization failed",
    "Inference set up failed",
    "Error occurred during inference",
)
_STOPPED = re.compile(r"While parsing node number (\d+) \[(\S+) -> \"(.*?)\"\]:?\s*$", re.MULTILINE)
_NAME = re.compile(r'^name: "(.*)"\s*$', re.MULTILINE)
_REASON = re.compile(r"ERROR: \S+ In function \w+:\s*(?:\[\d+\] )?(.+)")
_IN_NODE = re.compile(r"In node (-?\d+)(?: with name: (.*?) and operator: (\S+))? \(\w+\): (.+)")
_CACHE = re.compile(r"timing ?cache", re.IGNORECASE)

#: What a message begins with or has in it, and what helps.
_FIXES = (
    ("Unknown option", "this trtexec is not one that edgec knows: report its version"),
    ("No space left", "make room on the device's disk"),
    ("out of memory", "stop other programs on the device, and try again"),
    ("not compatible with this version", "build the engine again on this device"),
    ("Cuda failure", "look whether the device's driver is loaded, and whether its GPU is free"),
)


class Refused(NamedTuple):
    """A node that the parser cannot read; its name is its first output's where the file gives it none."""

    node: str
    operator: str
    reason: str


def refused(text: str) -> List[Refused]:
    """Return the nodes that the ONNX parser stopped at, in its order, each once."""
    found: List[Refused] = []
    starts = list(_STOPPED.finditer(text))
    for n, start in enumerate(starts):
        block = text[start.end() : starts[n + 1].start() if n + 1 < len(starts) else len(text)]
        name, reason = _NAME.search(block), _REASON.search(block)
        called = name.group(1) if name and name.group(1) else start.group(3)
        found.append(Refused(called, start.group(2), reason.group(1).strip() if reason else "it does not say why"))
    if not found:
        for number, name_, operator, why in _IN_NODE.findall(text):
            found.append(Refused(name_ or ("number %s" % number if number != "-1" else ""), operator, why.strip()))
    return list(dict.fromkeys(found))


def of_cache(said: Console) -> bool:
    """Say whether a build failed because the timing cache is of another device or version, or is no cache."""
    return any(_CACHE.search(line) for line in said.errors)


def build_fault(said: Console, text: str, code: int, version: str, graph: Graph) -> Fault:
    """Return why no engine was built, with the ONNX nodes to blame."""
    nodes = refused(text)
    if nodes:
        first = nodes[0]
        at = "node %s (%s)" % (first.node, first.operator) if first.node else "the ONNX file"
        names = [one.node for one in nodes if one.node]
        fix = "keep this node out of quantization, or replace it in the model" if names else None
        return Fault("TensorRT %s cannot read %s: %s" % (version, at, tensorrt_log.plain(first.reason)), fix, names)
    if code < 0:
        return _killed(code, "building the engine")
    errors, warned = _own(said.errors), _own(said.warnings)
    layers = [tensorrt_log.Layer(node.name, (node.name,)) for node in graph.nodes if node.name]
    fault = tensorrt_log.build_fault(version, errors, warned, layers)
    return Fault(fault.what, fault.fix or _fix(errors), fault.nodes)


def run_fault(said: Console, code: int, doing: str) -> Fault:
    """Return why an engine did not run, or trtexec did not start; `doing` says what it was to do."""
    if code < 0:
        return _killed(code, doing)
    errors = _own(said.errors)
    reason = tensorrt_log.reason(errors, "it does not say why and ended with exit code %d" % code)
    return Fault("trtexec failed at %s: %s" % (doing, reason), _fix(errors))


def _killed(code: int, doing: str) -> Fault:
    what = "trtexec was ended by signal %d while %s" % (-code, doing)
    return Fault(what, "the device's memory may be too small for it: stop other programs there" if code == -9 else None)


def _own(lines: Sequence[str]) -> List[str]:
    """Return messages without what stands before them, those that only repeat that something failed last."""
    plain = [_PREFIX.sub("", line) for line in lines]
    return [line for line in plain if line not in _ECHOES] + [line for line in plain if line in _ECHOES]


def _fix(errors: Sequence[str]) -> Optional[str]:
    for words, fix in _FIXES:
        if any(words.lower() in line.lower() for line in errors):
            return fix
    return None
