"""Models brought down to an older opset: the same numbers, or left alone with the reason."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgec.passes.lower_opset import LowerOpset
from equivalence import assert_equivalent


def _model(body, opset=18, inputs="float[2, 4, 6, 6] x", outputs="float y", constants=""):
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {constants} {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")  # the text has no form for an unknown rank
    weight = np.random.default_rng(0).normal(size=(3, 4, 1, 1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def _opset(model):
    return model.opset_imports[""]


@pytest.mark.parametrize(
    ("body", "opset", "target"),
    [
        ("y = Relu (x)", 18, 13),
        ("y = Relu (x)", 22, 17),
        ("d = Add (x, x) y = Conv (d, w)", 22, 13),
        ("y = ReduceMean <keepdims = 0> (x, a)", 18, 17),
        ("y = ReduceMax <keepdims = 1> (x, a)", 20, 13),
        ("y = ReduceMean (x)", 18, 17),
        ("y, z = Split <axis = 1, num_outputs = 2> (x)", 18, 17),
        ("t, y = Split <axis = 3, num_outputs = 2> (x)", 21, 13),
        ("y = AveragePool <kernel_shape = [2, 2]> (x)", 22, 17),
        ("q = QuantizeLinear (x, s, o) y = DequantizeLinear (q, s, o)", 19, 13),
        ("y = Transpose <perm = [0, 2, 3, 1]> (x)", 21, 13),
    ],
)
def test_the_numbers_stay(body, opset, target):
    outputs = "float y, float z" if ", z" in body else "float y"
    constants = "<int64[2] a = {2, 3}, float s = {0.1}, int8 o = {0}>"
    model = _model(body, opset, constants=constants, outputs=outputs)
    before = model.clone()
    result = LowerOpset(target).apply(model)
    assert result.modified and _opset(model) == target, result.refusals
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_equivalent(before, model, rtol=1e-6)
    assert not LowerOpset(target).apply(model).modified


@pytest.mark.parametrize(
    ("body", "opset", "target", "why"),
    [
        ('y = Gelu <approximate = "none"> (x)', 20, 17, "opset 17 has no Gelu, which came with 20"),
        ('y = Resize <coordinate_transformation_mode = "half_pixel_symmetric"> (x, , c)', 19, 17, "half_pixel_sy"),
        ('y = Resize <keep_aspect_ratio_policy = "not_larger"> (x, , c)', 18, 17, "keep_aspect_ratio_policy"),
        ("y = Resize <antialias = 1, mode = \"linear\"> (x, , c)", 18, 17, "antialias"),
        ("y = ReduceMean <noop_with_empty_axes = 1> (x)", 18, 17, "does nothing without axes"),
        ("n = Shape (x) m = Slice (n, i, j) y = ReduceMean (x, m)", 18, 17, "axes that are computed"),
        ("y = AveragePool <kernel_shape = [2, 2], dilations = [2, 2]> (x)", 19, 17, "dilations"),
        ("g = Pad (x, p, , e) y = Relu (g)", 18, 17, "Pad has 4 inputs"),
    ],
)
def test_what_means_something_else_stays_with_the_reason(body, opset, target, why):
    constants = (
        "<float[4] c = {1, 1, 2, 2}, int64[1] i = {0}, int64[1] j = {1}, int64[2] p = {1, 1}, int64[1] e = {1}>"
    )
    model = _model(body, opset, constants=constants, outputs="float y")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = LowerOpset(target).apply(model)
    assert not result.modified and why in result.refusals[0].why
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_an_older_model_is_left_alone():
    assert not LowerOpset(17).apply(_model("y = Relu (x)", 13)).modified
