"""Anchoring NHWC where floats end: the same integers, only at these boundaries, for any batch, and once."""

from dataclasses import replace

import lab
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from edgec.backends import ort
from edgec.compiler import model as model_io
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.passes.anchor_layout import AnchorLayout
from edgec.passes.quantize import Quantize
from test_quantize import VNNI, build, optimised_ops, ranges_of, weight
from test_quantize import residual as drawn

FEED = {"x": np.random.default_rng(0).normal(size=(3, 8, 6, 6)).astype(np.float32)}
PLAIN = replace(VNNI, nhwc_kernels=False)
BLOCK = drawn()


def residual() -> ir.Model:
    return model_io.copy(BLOCK)


def quantized(model: ir.Model, *keep: str, scheme=PLAIN) -> ir.Model:
    found = ranges_of(model, ort.SUPPORTS, FEED)
    Quantize(found, ort.SUPPORTS, scheme, dict.fromkeys(keep, "a test"))(model)
    return model


def anchored(model: ir.Model):
    result = AnchorLayout()(model)
    onnx.checker.check_model(model_io.serialize(model), full_check=True)
    return result


def boundaries(model: ir.Model) -> list[str]:
    """The tensors whose integers are reshaped back to NHWC and transposed."""
    found = []
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            around = [node.inputs[0].producer(), *(use.node for use in node.outputs[0].uses())]
            if [n.op_type for n in around if n is not None] == ["Reshape", "Reshape"]:
                source = node.inputs[0].producer().inputs[0].producer()
                assert source.op_type == "Transpose"
                found.append(source.inputs[0].name.removesuffix("_shielded"))
    return found


@pytest.mark.parametrize("keep", [("Conv_0",), ("Conv_0", "Conv_2"), ("Conv_0", "Conv_5")])
def test_values_are_bit_equal(keep):
    before, after = (quantized(residual(), *keep) for _ in range(2))
    result = anchored(after)
    assert result.modified and result.rewrites == len(boundaries(after)) > 0
    for optimise in (False, True):
        y, z = (
            ort.Session(model_io.serialize(m), threads=1, optimise=optimise).run(FEED)["y"] for m in (before, after)
        )
        if not optimise:
            np.testing.assert_array_equal(y, z)
        else:  # the layouts decide which kernel computes: sums in another order fall to the next integer at most
            assert np.abs(y - z).mean() < 0.05 * np.abs(y).mean()
    for model in (before, after):  # the integers themselves, not what comes of them
        model.graph.outputs.extend(
            n.inputs[0] for n in model.graph if n.op_type == "DequantizeLinear" and not n.inputs[0].is_initializer()
        )
    a, b = (lab.outputs(m, FEED) for m in (before, after))
    assert len(a) == len(b) > 2
    for (name, y), z in zip(a.items(), b.values(), strict=True):
        np.testing.assert_array_equal(y, z, err_msg=name)


@pytest.mark.parametrize(
    ("keep", "where"),
    [
        ((), []),  # the graph's input is rounded, but no layer computes it
        (("Conv_0",), ["ra"]),
        (("Conv_2",), []),  # its output is rounded for the Add alone
        (("Conv_5",), []),
        (("Conv_0", "Conv_2"), ["rs"]),  # an Add without integers is a float layer
    ],
)
def test_only_where_a_float_layer_hands_over_to_integer_convs(keep, where):
    model = quantized(residual(), *keep)
    assert anchored(model).rewrites == len(where)
    assert boundaries(model) == where


def test_integers_that_no_conv_reads_are_left_alone():
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w)
      b = Conv (x, v)
      s = Add (a, b)
      y = Conv (s, u) }"""
    model = quantized(build(text, w=weight(8, 8, 3, 3), v=weight(8, 8, 1, 1), u=weight(8, 8, 1, 1)), "Conv_0")
    assert {n.op_type for n in model.graph} >= {"Add", "QuantizeLinear"}
    assert not anchored(model).modified


def test_pooling_behind_the_layer_does_not_hide_it():
    text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 3, 3] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w)
      r = Relu (a)
      p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
      y = Conv (p, v) }"""
    model = quantized(build(text, w=weight(8, 8, 3, 3), v=weight(8, 8, 1, 1)), "Conv_0")
    anchored(model)
    assert boundaries(model) == ["p"]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_batch_goes_through(count):
    model, plain = quantized(residual(), "Conv_0"), quantized(residual(), "Conv_0")
    anchored(model)
    x = np.random.default_rng(count).normal(size=(count, 8, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(lab.outputs(model, {"x": x})["y"], lab.outputs(plain, {"x": x})["y"])


def test_a_second_run_finds_nothing_even_in_the_file():
    model = quantized(residual(), "Conv_0")
    assert anchored(model).modified
    again = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    for one in (model, again):
        before = model_io.serialize(one)
        result = AnchorLayout()(one)
        assert (result.modified, result.rewrites) == (False, 0)
        assert model_io.serialize(one) == before


def forget(model: ir.Model, *dims: int | None) -> ir.Model:
    for value in (v for node in model.graph for v in node.outputs if v.name == "ra"):
        value.shape = ir.Shape(dims) if dims else None
    return model


def test_unknown_sizes_are_left_alone():
    for dims in ((), (None, 8, None, None), (None, None, 6, 6), (None, 8, 36)):
        assert not AnchorLayout()(forget(quantized(residual(), "Conv_0"), *dims)).modified
    assert AnchorLayout()(forget(quantized(residual(), "Conv_0"), None, 8, 6, 6)).modified


def test_scales_for_each_channel_are_left_alone():
    """They follow an axis, and would be read along another one."""
    model = quantized(residual(), "Conv_0")
    (quantize,) = [n for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "ra"]
    for i in (1, 2):
        old = quantize.inputs[i]
        many = np.repeat(old.const_value.numpy(), 8)
        value = ir.Value(name=f"{old.name}_many", const_value=ir.tensor(many), shape=ir.Shape([8]), type=old.type)
        model.graph.register_initializer(value)
        quantize.replace_input_with(i, value)
    assert not AnchorLayout()(model).modified


def test_it_spares_the_transposes_of_a_stage_behind_a_float_layer(tmp_path):
    """An Add of one NHWC and one NCHW input drags Transposes along, block after block."""
    text = "\n".join(
        f"a{i} = Conv <pads = [1, 1, 1, 1]> (r{i}, w)\n b{i} = Relu (a{i})\n"
        f"c{i} = Conv <pads = [1, 1, 1, 1]> (b{i}, v)\n d{i} = Add (c{i}, r{i})\n r{i + 1} = Relu (d{i})"
        for i in range(3)
    )
    text = f"""g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {{
      a = Conv <pads = [1, 1, 1, 1]> (x, u)
      r0 = Relu (a)
      {text}
      y = Conv (r3, t) }}"""

    def made():
        parts = {"u": weight(8, 8, 3, 3), "w": 0.1 * weight(8, 8, 3, 3), "v": 0.1 * weight(8, 8, 3, 3)}
        return quantized(build(text, **parts, t=weight(8, 8, 1, 1)), "Conv_0")

    plain, model = made(), made()
    anchored(model)
    before, after = (optimised_ops(m, tmp_path)["Transpose"] for m in (plain, model))
    assert after < before


def test_the_quantizer_anchors_where_the_scheme_says_so():
    model = residual()
    ranges = ranges_of(model, ort.SUPPORTS, FEED)
    for scheme, names in ((VNNI, ["quantize", "anchor-layout"]), (PLAIN, ["quantize"])):
        built = Quantizer(model, ort.SUPPORTS, scheme, ranges, kept={"Conv_0": "a test"}).build()
        assert [record.name for record in built.records] == names
        assert boundaries(built.model) == (["ra"] if scheme is VNNI else [])
