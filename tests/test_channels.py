"""Extremes of each channel, reduced inside ONNX Runtime, against numpy."""

import lab
import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.calib.channels import collect_channels
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.errors import DataError

RNG = np.random.default_rng(4)

NET = """
g (float[N,3,6,6] x) => (float[N,3] y) <float[5,3,3,3] w, float[5] b, float[5,3] v> {
    c = Conv <pads = [1,1,1,1]> (x, w, b)
    r = Relu (c)
    m = ReduceMean <keepdims = 0, axes = [2,3]> (r)
    y = MatMul (m, v)
}
"""


def net(opset: int = 17, text: str = NET) -> ir.Model:
    return pipeline.run(zoo.model(text, opset=opset), pipeline.exact_passes(), None)[0]


def everything(model: ir.Model, x: np.ndarray, names) -> dict[str, np.ndarray]:
    twin = model_io.copy(model)
    twin.graph.outputs.extend(v for n in twin.graph for v in n.outputs if v.name in names and not v.is_graph_output())
    return {"x": x, **lab.outputs(twin, {"x": x})}


AXES = {"x": 1, "c": 1, "r": -3, "m": -1, "y": 1}


@pytest.mark.parametrize("opset", [13, 17, 18, 21])  # from 18 on the axes of a reduction are an input
def test_extremes_are_those_of_all_images(tmp_path, opset):
    text = (
        NET
        if opset < 18
        else NET.replace("ReduceMean <keepdims = 0, axes = [2,3]> (r)", "ReduceMean <keepdims = 0> (r, d)")
    )
    model = net(opset, text.replace("float[5,3] v>", "float[5,3] v, int64[2] d = {2,3}>") if opset >= 18 else text)
    x = RNG.normal(size=(11, 3, 6, 6)).astype(np.float32) * np.r_[1, 5, 0.1].reshape(1, 3, 1, 1).astype(np.float32)
    x[7] *= 3  # the extremes lie in one image, not the last
    before = model_io.serialize(model)
    found = collect_channels(model, AXES, lab.folder(tmp_path, model, x).batches(4), 1)
    assert model_io.serialize(model) == before
    seen = everything(model, x, AXES)
    assert set(found) == set(AXES)
    for name, axis in AXES.items():
        rows = np.moveaxis(seen[name], axis, 0).reshape(seen[name].shape[axis], -1)
        extremes = found[name]
        assert extremes.min.dtype == extremes.max.dtype == np.float64
        # the same sums in another session: kernels may add in another order
        np.testing.assert_allclose(extremes.min, rows.min(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(extremes.max, rows.max(1), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(extremes.magnitude, np.maximum(-extremes.min, extremes.max))


def test_no_axis_takes_the_tensor_for_one_channel(tmp_path):
    model, x = net(), RNG.normal(size=(3, 3, 6, 6)).astype(np.float32)
    found = collect_channels(model, {"x": None, "x2": None}, lab.folder(tmp_path, model, x).batches(2), 1)
    assert set(found) == {"x"}
    assert found["x"].min.shape == found["x"].max.shape == (1,)
    assert (found["x"].min[0], found["x"].max[0]) == (x.min(), x.max())


def test_all_negative_channels_have_a_negative_maximum(tmp_path):
    model, x = net(), -1 - RNG.random(size=(4, 3, 6, 6)).astype(np.float32)
    found = collect_channels(model, {"x": 1}, lab.folder(tmp_path, model, x).batches(4), 1)["x"]
    np.testing.assert_array_equal(found.max, x.max((0, 2, 3)))
    np.testing.assert_array_equal(found.magnitude, -x.min((0, 2, 3)))


def test_what_is_not_there_or_has_no_rank_is_left_out(tmp_path):
    model, x = net(), RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)
    for node in model.graph:
        node.outputs[0].shape = None if node.outputs[0].name == "r" else node.outputs[0].shape
    folder = lab.folder(tmp_path, model, x)
    assert set(collect_channels(model, {"r": 1, "gone": 0, "w": 0, "c": 1}, folder.batches(2), 1)) == {"c"}
    assert collect_channels(model, {"gone": 0}, folder.batches(2), 1) == {}


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_by_the_first_tensor_that_has_it(tmp_path, broken):
    model, x = net(), RNG.normal(size=(6, 3, 6, 6)).astype(np.float32)
    model.graph.initializers["b"].const_value = ir.tensor(np.r_[np.zeros(4), broken].astype(np.float32))
    with pytest.raises(DataError, match="'c' holds (NaN|infinite values)") as caught:
        collect_channels(model, {"x": 1, "c": 1, "r": 1}, lab.folder(tmp_path, model, x).batches(3), 1)
    assert "samples.npy" in str(caught.value)
