"""Models of all zoos as the compiler hands them to TensorRT: exact passes, quantizer, `TensorRT().lower`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import equivalence
import numpy as np
import onnx
import onnx_ir as ir
import prune_zoo
import wide_zoo
import zoo
from edgec.backends.tensorrt import SUPPORTS, TensorRT
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.types import DeviceProfile, QuantScheme, Range
from edgec.passes.placement import observed_tensors
from edgec.passes.quant_params import needed_opset
from qdq_graph import Graph

MODELS: Mapping[str, Callable[[], ir.Model]] = {
    **{f"zoo {name}": lambda name=name: zoo.build(name) for name in zoo.ZOO},
    **{f"narrow {name}": make for name, make in prune_zoo.BUILDERS.items()},
    **{f"wide {name}": make for name, make in wide_zoo.WIDE.items()},
}


@dataclass(frozen=True)
class Made:
    """The float model behind the exact passes, the quantized one, and how many nodes were quantized."""

    original: Path
    model: Path
    nodes: int


def make(model: ir.Model, folder: Path, profile: DeviceProfile, precision: str) -> Made:
    """Compile a model up to the file that TensorRT's lowering starts from; ranges are those of one random input."""
    scheme = TensorRT().schemes(profile)[precision]
    assert not isinstance(scheme, str), scheme
    few_bits = isinstance(scheme, QuantScheme)
    needed = needed_opset(scheme) if few_bits else None
    model, _ = pipeline.run(model, pipeline.exact_passes(needed, TensorRT().newest_opset(profile)), None)
    folder.mkdir(parents=True)
    made = Made(folder / "original.onnx", folder / "model.onnx", 0)
    model_io.save(model, made.original)
    if few_bits:
        wanted = observed_tensors(model, SUPPORTS) if scheme.activation else ()
        done = Quantizer(model, SUPPORTS, scheme, ranges(model, wanted)).build()
        model, made = done.model, replace(made, nodes=done.records[0].rewrites)
    model_io.save(model, made.model)
    return made


def ranges(model: ir.Model, names: tuple[str, ...]) -> dict[str, Range]:
    """Return the least and the greatest number of each tensor for one random input."""
    if not names:
        return {}
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = equivalence.session(proto.SerializeToString())
    found = session.run(list(names), equivalence.sample(session, 0))
    return {n: Range(float(np.min(v)), float(np.max(v))) for n, v in zip(names, found, strict=True)}


def lower(made: Made, profile: DeviceProfile, precision: str, version: str | None) -> list[Path]:
    """Return the files that `TensorRT().lower` leaves for a version, the float32 one first where it leaves both."""
    profile = replace(profile, toolchain={} if version is None else {"tensorrt": version})
    copy = made.model.with_name("model-float16.onnx")
    copy.unlink(missing_ok=True)
    artifact = TensorRT().lower(made.model, profile, precision)
    return [made.model, copy] if version is None and copy.exists() else [artifact.folder / artifact.model]


def observed(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a file in ONNX Runtime with optimisations off; return all quantized tensors, and the outputs."""
    proto = onnx.load(path)
    graph = Graph(path)
    names = [node.outputs[0] for node in graph.nodes if node.op == "QuantizeLinear"]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT8, None) for n in names)
    session = equivalence.session(proto.SerializeToString())
    wanted = [value.name for value in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, feed), strict=True))


def steps(exact: Mapping[str, np.ndarray], seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return how many quantization steps two runs are apart, by tensor; an output's step is a 127th of its largest."""
    assert exact.keys() == seen.keys()
    found = {}
    for name, want in exact.items():
        assert want.shape == seen[name].shape, name
        step = 1.0 if seen[name].dtype == np.int8 else np.abs(want).max() / 127
        found[name] = np.abs(want - seen[name].astype(np.float64)) / step
    return found
