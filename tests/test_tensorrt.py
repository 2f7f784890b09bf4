"""What TensorRT gets: one artifact for each way in which its versions choose types."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgec.backends import tensorrt
from edgec.backends.ort import Session
from edgec.compiler import devices
from edgec.compiler import model as model_io
from edgec.compiler.types import Range
from edgec.passes.cast_fp16 import mark_float32
from edgec.passes.placement import observed_tensors
from edgec.passes.placement_lint import lint
from edgec.passes.quantize import Quantize
from test_placement import RESIDUAL, parse

JETSON = devices.find("jetson-orin-nano-8gb")


def lowered(tmp_path, version, precision="int8", marks=None):
    """Write a quantized residual block at opset 13 and lower it; return the artifact and the files there are."""
    model = parse(RESIDUAL)
    ranges = {name: Range(-1.0, 1.0) for name in observed_tensors(model, tensorrt.SUPPORTS)}
    Quantize(ranges, tensorrt.SUPPORTS, tensorrt.INT8)(model)
    mark_float32(model, marks or {})
    model_io.save(model, tmp_path / "model.onnx")
    profile = replace(JETSON, toolchain={} if version is None else {"tensorrt": version})
    artifact = tensorrt.TensorRT().lower(tmp_path / "model.onnx", profile, precision)
    return artifact, sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize("version", ["8.2.1", "8.6.2", "10.3.0", "10.11.0"])
def test_older_versions_build_from_float32(tmp_path, version):
    artifact, files = lowered(tmp_path, version)
    assert (artifact.model, files) == ("model.onnx", ["model.onnx"])


@pytest.mark.parametrize("version", ["10.12.0", "10.13.3", "11.0.0", "11"])
def test_later_versions_build_from_float16(tmp_path, version):
    artifact, files = lowered(tmp_path, version)
    assert (artifact.model, files) == ("model-float16.onnx", ["model-float16.onnx", "model.onnx"])


def test_an_unknown_version_gets_both(tmp_path):
    artifact, files = lowered(tmp_path, None)
    assert (artifact.model, files) == ("model.onnx", ["model-float16.onnx", "model.onnx"])


@pytest.mark.parametrize("precision", ["fp32", "as given"])
def test_float32_is_left_alone(tmp_path, precision):
    artifact, files = lowered(tmp_path, "11.0.0", precision)
    assert (artifact.model, files) == ("model.onnx", ["model.onnx"])


def test_the_float16_artifact_obeys_strong_typing(tmp_path):
    lowered(tmp_path, "10.13.3")
    model = model_io.load(tmp_path / "model-float16.onnx")
    assert model.opset_imports[""] >= 19 and lint(model) == ()
    assert {v.dtype for v in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
    assert [n.op_type for n in model.graph].count("Cast") == 2
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = node.inputs[1].const_value
            assert scale.dtype == ir.DataType.FLOAT16 and (scale.numpy() > 0).all()
        elif node.op_type != "Cast":
            assert {v.dtype for v in (*node.inputs, *node.outputs) if v is not None} == {ir.DataType.FLOAT16}


def test_both_artifacts_compute_the_same(tmp_path):
    lowered(tmp_path, None)
    feed = {"x": np.random.default_rng(0).standard_normal((4, 16, 6, 6)).astype(np.float32)}
    one, other = (Session(tmp_path / f, optimise=False).run(feed)["y"] for f in ("model.onnx", "model-float16.onnx"))
    # numbers next to the middle between two integers may fall to either side
    assert 10 * np.log10((one**2).sum() / ((one - other) ** 2).sum()) > 30


def test_what_was_measured_to_need_float32_stays(tmp_path):
    lowered(tmp_path, "10.13.3", marks={"Add_3": "it reaches 1e+05"})
    model = model_io.load(tmp_path / "model-float16.onnx")
    (add,) = [n for n in model.graph if n.op_type == "Add"]
    assert add.outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("zero", "stored", "why"),
    [
        ("uint8 z = {0}", False, "uint8"),
        (None, False, "uint8"),
        ("int8 z = {0}", True, "stored in integers"),
        ("int8 z = {0}", False, None),
    ],
)
@pytest.mark.parametrize(("device", "refuses"), [("jetson-agx-xavier-32gb", True), ("jetson-orin-nano-8gb", False)])
def test_quantized_models_are_refused_where_the_devices_version_does_not_read_them(zero, stored, why, device, refuses):
    third = ", z" if zero else ""
    q = "" if stored else f"q = QuantizeLinear (x, s{third})"
    constants = ", ".join(filter(None, ("float s = {0.1}", zero, "int8[4] q = {1, 2, 3, 4}" if stored else None)))
    text = f'<ir_version: 8, opset_import: ["" : 13]> g (float[4] x) => (float[4] y) <{constants}> {{'
    text += f"{q} d = DequantizeLinear (q, s{third}) y = Add (x, d) }}"
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    found = tensorrt.TensorRT().check(model, devices.find(device))
    assert bool(found) is (refuses and why is not None)
    assert all(why in refusal.why for refusal in found)
