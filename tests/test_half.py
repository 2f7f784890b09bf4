"""float16: what overflows stays in float32, for backends that are handed a cast model and for those that cast."""

from dataclasses import replace

import lab
import numpy as np
import onnx_ir as ir
import zoo
from edgec.backends.ort import OnnxRuntime
from edgec.backends.tensorrt import TensorRT
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.quantization import half as halves
from edgec.passes.cast_fp16 import MARK

RNG = np.random.default_rng(6)

#: `big` reaches some 600,000, far beyond float16's 65504; what stands around it does not.
OVERFLOW = """
g (float[N,4,6,6] x) => (float[N,3,6,6] y)
<float[8,4,3,3] w1, float[8,8,1,1] w2, float[3,8,1,1] w3, float large = {30000}, float small = {0.0001}> {
    c1 = Conv <pads = [1,1,1,1]> (x, w1)
    r1 = Relu (c1)
    big = Mul (r1, large)
    back = Mul (big, small)
    c2 = Conv (back, w2)
    r2 = Relu (c2)
    y = Conv (r2, w3)
}
"""


def model(text: str = OVERFLOW) -> ir.Model:
    made = zoo.model(text)
    for node in made.graph:
        node.name = f"make_{node.outputs[0].name}"
    return pipeline.run(made, pipeline.exact_passes(), None)[0]


def images(count: int = 12) -> np.ndarray:
    return RNG.normal(size=(count, 4, 6, 6)).astype(np.float32)


def types(made: ir.Model) -> dict[str, str]:
    return {node.name: node.outputs[0].dtype.name for node in made.graph if node.op_type != "Cast"}


def test_what_overflows_stays_in_float32_and_all_else_is_cast(tmp_path):
    original, x = model(), images()
    before = model_io.serialize(original)
    found = halves.half(lab.job(tmp_path, original, x), original)
    assert model_io.serialize(original) == before
    wide = {name for name, dtype in types(found.model).items() if dtype == "FLOAT"}
    assert "make_big" in wide and wide <= {"make_big", "make_back"}  # the output's own Cast aside
    exact = lab.outputs(original, {"x": x})
    for made in (found.model, found.judged):
        assert lab.sqnr(exact, lab.outputs(made, {"x": x})) > 50  # 11 bits a number
    (record,) = found.records
    (refusal,) = [r for r in record.refusals if r.node == "make_big"]
    assert refusal.rule == "kept-float32" and "65504" in refusal.why


def test_the_judged_model_shows_what_would_happen_otherwise(tmp_path, monkeypatch):
    """The cast model computes the product in float32 here, as CPUs do; the judged one rounds, and overflows."""
    original, x = model(), images()
    monkeypatch.setattr(halves, "unsafe_nodes", lambda this, model: {})
    found = halves.half(lab.job(tmp_path, original, x), original)
    assert set(types(found.model).values()) == {"FLOAT16"}
    assert not np.isfinite(lab.outputs(found.judged, {"x": x})["y"]).all()


def test_without_images_only_what_the_operators_tell_is_kept(tmp_path):
    original = model()
    assert halves.unsafe_nodes(lab.job(tmp_path / "a", original, None), original) == {}
    assert set(halves.unsafe_nodes(lab.job(tmp_path / "b", original, images()), original)) >= {"make_big"}


def test_what_never_overflows_is_cast_as_a_whole(tmp_path):
    original = model(OVERFLOW.replace("{30000}", "{30}").replace("{0.0001}", "{0.1}"))
    found = halves.half(lab.job(tmp_path, original, images()), original)
    assert set(types(found.model).values()) == {"FLOAT16"}


def test_a_backend_that_casts_gets_float32_with_marks(tmp_path):
    original, x = model(), images()
    found = halves.half(lab.job(tmp_path, original, x, backend=TensorRT()), original)
    assert "Cast" not in {node.op_type for node in found.model.graph}
    assert set(types(found.model).values()) == {"FLOAT"}
    marked = {node.name for node in found.model.graph if MARK in node.metadata_props}
    assert "make_big" in marked and marked <= {"make_big", "make_back"}
    assert not any(MARK in node.metadata_props for node in original.graph)
    exact = lab.outputs(original, {"x": x})
    np.testing.assert_array_equal(lab.outputs(found.model, {"x": x})["y"], exact["y"])
    assert 40 < lab.sqnr(exact, lab.outputs(found.judged, {"x": x})) < 100  # judged as it will be cast, not as it is


def test_the_files_hold_both_models(tmp_path):
    original, x = model(), images()
    this = lab.job(tmp_path, original, x)
    found, path, judged = halves.write(this, original, tmp_path)
    session = OnnxRuntime().open(OnnxRuntime().lower(path, this.profile, "fp16"), 1)
    assert lab.sqnr(lab.outputs(original, {"x": x}), session.run({"x": x})) > 50
    for file, made in ((path, found.model), (judged, found.judged)):
        assert file.read_bytes() == model_io.serialize(made)


def test_a_tensorrt_bundle_keeps_the_marked_nodes_in_float32(tmp_path):
    """From a marked file to the artifact of a TensorRT that keeps the graph's types."""
    original = model()
    this = lab.job(tmp_path, original, images(), backend=TensorRT())
    _, path, _ = halves.write(this, original, tmp_path)
    profile = replace(this.profile, toolchain={"tensorrt": "10.13.0"})
    artifact = TensorRT().lower(path, profile, "fp16")
    lowered = model_io.load(artifact.folder / artifact.model)
    assert types(lowered)["make_big"] == "FLOAT"
    assert types(lowered)["make_c1"] == types(lowered)["make_c2"] == "FLOAT16"
