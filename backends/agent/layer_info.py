"""The layers of an engine, as the engine inspector writes them in JSON (trtexec --exportLayerInfo writes the same).

Three forms: {"Layers": [...], "Bindings": [...]} up to TensorRT 10 (the oldest without "Bindings"), {"Layers": [...],
"I/O Tensors": [...]} in 11, and a list of names instead of objects where an engine was built without detailed
verbosity. Names hold raw control bytes from 8.6 on. From 8.6 on the ONNX nodes stand in "Metadata"; before, and where
it is empty, they are read from the layer's name, which joins them by " + ".
"""

import json
import re
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

#: Between joined names: " + " for what is fused, " || " for what runs side by side, control bytes from 8.6 on.
_JOINTS = re.compile(r"\s+\+\s+|\s+\|\|\s+|[\x1e\x1f]+")
_METADATA = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*(?:\[ONNX Layer: |$))", re.DOTALL)
_PROFILE = re.compile(r"\s*\[profile +\d+\]\s*$")
#: A region of many nodes, named by the layers that it begins and ends with.
_FOREIGN = re.compile(r"\{?ForeignNode\[(.*)\]\}?", re.DOTALL)
_POINTWISE = re.compile(r"^PWN\((.*)\)$", re.DOTALL)
#: Names that TensorRT made up: layers that compute no node.
_OWN = ("Reformatting CopyNode", "(Unnamed Layer*", "__my", "shuffle_between_", "copied_squeeze_after_")


class Layer(NamedTuple):
    """One layer of an engine: its name, TensorRT's word for what it is, and the ONNX nodes that it computes.

    `nodes` read from a name may hold names of initializers as well: whoever knows the model leaves those out.
    """

    name: str
    kind: str
    nodes: Tuple[str, ...]


def layers(text: str) -> List[Layer]:
    """Return the layers of an engine in their order. ValueError where the text is not the inspector's JSON."""
    found = json.loads(text, strict=False)
    if not isinstance(found, dict) or not isinstance(found.get("Layers"), list):
        raise ValueError("not the engine inspector's JSON: it has no list of Layers")
    return [_layer(entry) for entry in found["Layers"]]


def by_name(some: Sequence[Layer]) -> Dict[str, Tuple[str, ...]]:
    """Return the ONNX nodes of layers by the layers' names, by which profiles call them."""
    return {layer.name: layer.nodes for layer in some}


def nodes_of_name(name: str) -> Tuple[str, ...]:
    """Return the names that a layer's name is joined from, each once, without those that TensorRT made up."""
    found: List[str] = []
    plain = _FOREIGN.sub(lambda region: region.group(1).replace("...", " + ", 1), _PROFILE.sub("", name))
    for part in _JOINTS.split(plain):
        found += _parts(part.strip())
    return _once(found)


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", nodes_of_name(entry))
    if not isinstance(entry, dict):
        raise ValueError("not the engine inspector's JSON: a layer is neither a name nor an object")
    name = str(entry.get("Name", ""))
    kind = str(entry.get("LayerType") or entry.get("ParameterType") or "")
    return Layer(name, kind, _of_metadata(str(entry.get("Metadata") or "")) or nodes_of_name(name))


def _of_metadata(text: str) -> Tuple[str, ...]:
    found: List[str] = []
    for part in re.split(r"[\x1e\x1f]+", text):
        found += _METADATA.findall(part)
    return _once(found)


def _parts(name: str) -> List[str]:
    """Return the names inside one part of a layer's name."""
    if not name or name.startswith(_OWN):
        return []
    pointwise = _POINTWISE.match(name)
    if pointwise:
        return [one for part in _arguments(pointwise.group(1)) for one in _parts(part)]
    return [name]


def _arguments(text: str) -> List[str]:
    """Split what stands in PWN(...) at its commas, not at those within inner brackets."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def _once(names: Sequence[str]) -> Tuple[str, ...]:
    return tuple(dict.fromkeys(names))
