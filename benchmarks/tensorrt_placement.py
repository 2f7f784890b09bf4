"""Where Q/DQ pairs stand: edgec's artifacts for TensorRT beside those of NVIDIA's Model Optimizer.

    python benchmarks/tensorrt_placement.py --venvs VENVS --setup                 once: an environment for the tool
    python benchmarks/tensorrt_placement.py --venvs VENVS --work WORK [--data DIR] [--only NAMES] [--all]

Models are those of tests/wide_zoo.py and tests/prune_zoo.py, and with --data the three of DIR/models. Both tools get
the same file (BatchNormalization folded, opset 13 or above, kernel_shape stated) and the same inputs: images of DIR, or
two random ones for the zoos, since placement does not depend on them. Compared is by node and input: does it read a
tensor that went through QuantizeLinear, directly or through data movement? Weights: how many scales.

Prints a line a model and, for each difference, its class, the node and who has a pair there; "beside a pair" is a float
read of a tensor that other nodes read through a pair. With --all, also which rules of tests/qdq_rules.py either file
breaks, and how far edgec's file, in ONNX Runtime, is from tests/integer_simulation.py on two inputs, with each stretch
from pair to pair judged by itself, and from end to end. What the other tool made is kept in WORK (see peers/runner.py).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
from edgec.backends.tensorrt import SUPPORTS, TensorRT
from edgec.calib import folder, preprocess
from edgec.compiler import devices, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.types import Range
from edgec.passes.placement import observed_tensors
from int8 import CASES
from peers.runner import peer, set_up, tools

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import equivalence  # the tests' models, their inputs, and how they look at a file
import integer_simulation
import prune_zoo
import qdq_rules
import trt_artifacts
import wide_zoo
from qdq_graph import COPIES, LAYERS, Graph, Node

CONFIG = "int8 max"  # the method changes scales, not places
DEVICE = "jetson-orin-nano-8gb"
#: A layer's name may say more than its operator.
CLASSES: Mapping[str, str] = {
    "Add": "elementwise", "Mul": "elementwise", "Sub": "elementwise", "Div": "elementwise",
    "AveragePool": "pool", "GlobalAveragePool": "pool", "Resize": "resize", "Concat": "concat",
    "ConvTranspose": "transposed conv",
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One input of one node that one tool quantizes and the other does not."""

    kind: str
    node: str
    index: int
    tensor: str
    ours: str
    theirs: str


# --------------------------------------------------------------------------------------------- models


def models(args: argparse.Namespace) -> Iterator[tuple[str, ir.Model, np.ndarray]]:
    """Yield name, float model and inputs (N, …) of each subject, the zoos' first."""
    zoos = {**{f"wide {n}": make for n, make in wide_zoo.WIDE.items()},
            **{f"narrow {n}": make for n, make in prune_zoo.BUILDERS.items()}}  # fmt: skip
    for name, make in zoos.items():
        if wanted(name, args):
            model = cleaned(make())
            session = equivalence.session(model)
            yield name, model, np.concatenate([equivalence.sample(session, seed)["x"] for seed in (0, 1)])
    for case in CASES if args.data else ():
        if wanted(case.model, args):
            path = args.data / "models" / f"{case.model}.onnx"
            model = cleaned(model_io.load(path))
            with TemporaryDirectory() as place:
                sidecar = Path(place) / "preprocess.yaml"
                sidecar.write_text(case.preprocess, encoding="utf-8")
                specs = model_io.input_specs(model)
                images = folder.open_folder(
                    args.data / case.calib, preprocess.resolve(str(sidecar), path, specs[0]), specs
                )
                some = images.subset(range(min(args.images, len(images))))
                yield case.model, model, np.concatenate([a for b in some.batches(1) for a in b.feed.values()])


def wanted(name: str, args: argparse.Namespace) -> bool:
    """Say whether a model was asked for: all are where --only names none."""
    return not args.only or any(part in name for part in args.only)


def cleaned(model: ir.Model) -> ir.Model:
    """Return the model behind the exact passes, each node with a name of its own, as exporters write them.

    The other tool takes a convolution without the attribute kernel_shape, which ONNX has as optional, for 1 x 1.
    """
    model, _ = pipeline.run(model, pipeline.exact_passes(13), None)
    taken = Counter(node.name for node in model.graph)
    for i, node in enumerate(model.graph):
        if not node.name or taken[node.name] > 1:
            node.name = f"{node.op_type}_{i}"
        weight = node.inputs[1].const_value if node.op_type in ("Conv", "ConvTranspose") else None
        if weight is not None:
            node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(weight.shape.numpy()[2:]))
    return model


def ours(model: ir.Model, inputs: np.ndarray, out: Path) -> Path:
    """Quantize with edgec, by the extremes of each tensor."""
    scheme = TensorRT().schemes(devices.find(DEVICE))["int8"]
    assert not isinstance(scheme, str)
    names = observed_tensors(model, SUPPORTS)
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = equivalence.session(proto.SerializeToString())
    size = model.graph.inputs[0].shape[0]
    step = size if isinstance(size, int) else 1
    ranges: dict[str, Range] = {}
    for start in range(0, len(inputs), step):
        found = session.run(list(names), {model.graph.inputs[0].name: inputs[start : start + step]})
        for name, values in zip(names, found, strict=True):
            old = ranges.get(name, Range(0.0, 0.0))
            ranges[name] = Range(min(old.min, float(values.min())), max(old.max, float(values.max())))
    model_io.save(Quantizer(model, SUPPORTS, scheme, ranges).build().model, out)
    return out


# --------------------------------------------------------------------------------------------- comparing


def reads_integers(graph: Graph, name: str, through: tuple[str, ...] = COPIES) -> bool:
    """Say whether a tensor comes out of DequantizeLinear, directly or through data movement."""
    node = graph.producer.get(name)
    if node is None or node.op == "DequantizeLinear":
        return node is not None
    inputs = graph.computed(node) if node.op == "Concat" else node.inputs[:1]
    return node.op in through and bool(inputs) and all(reads_integers(graph, i, through) for i in inputs)


def differences(model: Graph, first: Graph, second: Graph) -> Iterator[Difference]:
    """Yield what differs between two quantized files of one float model, in its order."""
    one, other = ({node.name: node for node in graph.nodes} for graph in (first, second))
    for node in model.nodes:
        mine, theirs = one.get(node.name), other.get(node.name)
        if mine is None or theirs is None:
            yield Difference("node gone", node.name, -1, node.outputs[0], _there(mine), _there(theirs))
            continue
        for i, name in compared(node):
            found = [_state(graph, twin, i) for graph, twin in ((first, mine), (second, theirs))]
            if found[0] != found[1] and any(state == "pair" or "scales" in state for state in found):
                yield Difference(kind(model, node), node.name, i, name, *found)


def compared(node: Node) -> list[tuple[int, str]]:
    """Return the inputs of a node that are compared: data movement but Concat is looked through."""
    if node.op in COPIES and node.op != "Concat":
        return []
    return [(i, name) for i, name in enumerate(node.inputs) if name]


def _there(node: Node | None) -> str:
    return "-" if node is None else "there"


def _state(graph: Graph, node: Node, index: int) -> str:
    dq = graph.dequantizer(node, index)
    if dq is not None and graph.is_weight(dq):
        scales = graph.scale(dq)
        return f"{scales.size} scales" if scales is not None else "computed scales"
    name = node.input(index)
    if reads_integers(graph, name, () if node.op == "Concat" else COPIES):
        return "pair"
    shared = any(reader.op == "QuantizeLinear" for reader, _ in graph.readers.get(name, ()))
    return "beside a pair" if shared else "-"


def kind(graph: Graph, node: Node) -> str:
    """Name the class of a difference."""
    if node.op == "Conv":
        return _conv(graph, node)
    if node.op in ("Gemm", "MatMul"):
        return "attention" if len(graph.computed(node)) == 2 else "gemv or few columns"
    if node.op == "Add" and len(graph.computed(node)) == 2:
        return "residual side"
    return CLASSES.get(node.op, node.op)


def _conv(graph: Graph, node: Node) -> str:
    shape = graph.shape(node.input(1)) or []
    if node.attributes.get("group", 1) > 1:
        return "depthwise conv" if shape[1] == 1 else "grouped conv"
    small = min(d or 0 for d in shape[:2]) < 16
    first = node.input(0) in graph.inputs
    return ("small-channel " if small else "") + ("first conv" if first else "conv")


def pairs(graph: Graph) -> int:
    """Count the activations that go through QuantizeLinear."""
    return sum(node.op == "QuantizeLinear" and not graph.is_weight(node) for node in graph.nodes)


def compare(name: str, model: ir.Model, inputs: np.ndarray, args: argparse.Namespace) -> Counter[str]:
    """Quantize one model with both tools and print what differs; return the numbers of that, by class."""
    work = args.work / name.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    model_io.save(model, work / "folded.onnx")
    np.save(work / "calib.npy", inputs)
    tool = next(t for t in tools() if t.name == "modelopt")
    made = peer(tool, CONFIG, work, venvs=args.venvs, limit=args.limit, retry=args.retry)
    if made.path is None:
        print(f"{name}: the other tool made nothing: {made.reason}")
        return Counter()
    graphs = [Graph(work / "folded.onnx"), Graph(ours(model, inputs, work / "edgec.onnx")), Graph(made.path)]
    found = list(differences(*graphs))
    layers = [sum(graph.quantized(node) for node in graph.nodes) for graph in graphs[1:]]
    count = Counter(
        {
            "models": 1,
            "layers": sum(node.op in LAYERS for node in graphs[0].nodes),
            "layers on integers, edgec": layers[0],
            "layers on integers, modelopt": layers[1],
            "pairs of activations, edgec": pairs(graphs[1]),
            "pairs of activations, modelopt": pairs(graphs[2]),
            "inputs compared": sum(len(compared(node)) for node in graphs[0].nodes),
            "inputs that differ": len(found),
        }
    )
    print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in count.items() if what != "models"))
    for d in found:
        print(f"    {d.kind}: {d.node} input {d.index} ({d.tensor}): edgec {d.ours}, modelopt {d.theirs}")
    if args.all:
        for who, path in (("edgec", work / "edgec.onnx"), ("modelopt", made.path)):
            for line in qdq_rules.violations(path, (10, 3), "int8"):
                print(f"    {who} breaks {line}")
        print(f"    {numbers(work / 'edgec.onnx', model, inputs)}")
    return count + Counter(f"inputs that differ: {d.kind}" for d in found)


def numbers(path: Path, model: ir.Model, inputs: np.ndarray) -> str:
    """Say how far ONNX Runtime's numbers are from the integer simulation's: stretch by stretch, and from end to end."""
    size, name = model.graph.inputs[0].shape[0], model.graph.inputs[0].name
    feed = {name: inputs[: size if isinstance(size, int) else 2]}
    seen = trt_artifacts.observed(path, feed)
    said = []
    for given in (seen, None):
        found = trt_artifacts.steps(integer_simulation.simulate(path, feed, given), seen).values()
        apart = np.concatenate([values.ravel() for values in found])
        said.append(f"{(apart > 0.5).sum()} by at most {apart.max():.2g} steps")
    return f"of {apart.size} numbers {said[0]} off the integers' sums; from end to end {said[1]}"


# --------------------------------------------------------------------------------------------- command line


def main() -> None:
    """Set up the tool, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, default=Path("out/peers/venvs"), help="where peers' environments are")
    parser.add_argument("--setup", action="store_true", help="install the tool there, and stop")
    parser.add_argument("--work", type=Path, default=Path("out/tensorrt_placement"), help="what was made stays there")
    parser.add_argument("--data", type=Path, help="a folder with models/, cifar10/ and photos/, as for int8.py")
    parser.add_argument("--images", type=int, default=16, help="so many of them for ranges")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="parts of models' names")
    parser.add_argument("--all", action="store_true", help="say, too, which rules of the checker either file breaks")
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds for one model in the other tool")
    parser.add_argument("--retry", action="store_true", help="run again what failed before")
    args = parser.parse_args()
    if args.setup:
        print(set_up(next(t for t in tools() if t.name == "modelopt"), args.venvs))
        return
    args.work = args.work.absolute()
    count: Counter[str] = Counter()
    for name, model, inputs in models(args):
        count += compare(name, model, inputs, args)
    print("\n| all models | |\n|---|---|")
    for what, number in count.items():
        print(f"| {what} | {number} |")


if __name__ == "__main__":
    main()
