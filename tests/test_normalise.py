"""Normalise and RaiseOpset: what goes, what stays, what is said."""

import resource
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgec.compiler import model as model_io
from edgec.passes import folding
from edgec.passes.normalise import Normalise
from edgec.passes.raise_opset import RaiseOpset
from equivalence import assert_equivalent

EXACT = 0.0  # constants are computed by ONNX Runtime itself, and nothing else changes: not a bit may differ


def ops(model):
    return [node.op_type for node in model.graph]


def normalise(text, *, opset=17, weights=None, rtol=EXACT):
    before, model = zoo.model(text, weights, opset=opset), zoo.model(text, weights, opset=opset)
    result = Normalise()(model)
    onnx.checker.check_model(model_io.serialize(model), full_check=True)
    assert_equivalent(before, model, rtol=rtol)
    return model, result


def body(text, outputs="float[N,4] y", declared=""):
    return f"g (float[N,4] x) => ({outputs}) {declared} {{ {text} }}"


# ------------------------------------------------------------------------------------------- clutter


def test_exporter_clutter_goes_and_the_convolution_is_left_without_a_bias_of_zeros():
    model, _ = normalise(zoo.CLUTTER, opset=18)
    assert ops(model) == ["Conv", "BatchNormalization", "Relu", "Reshape", "MatMul", "Add"]
    conv, reshape = model.graph.node(0), model.graph.node(3)
    assert len(conv.inputs) == 2
    assert reshape.inputs[1].const_value.numpy().tolist() == [-1, 256]
    assert {value.name for value in model.graph.initializers.values()} >= {"w", "b2", "wt"}
    assert "w2" not in model.graph.initializers


def test_a_bias_that_is_not_zero_becomes_a_constant():
    model, _ = normalise(zoo.CLUTTER.replace("float {0.0}", "float {0.5}"), opset=18)
    bias = model.graph.node(0).inputs[2]
    np.testing.assert_array_equal(bias.const_value.numpy(), np.full(4, 0.5, np.float32))


def test_a_clean_model_is_not_modified_twice():
    model = zoo.build("residual")
    assert Normalise()(model).modified  # shapes and node names are new
    data = ir.to_proto(model).SerializeToString()
    assert not Normalise()(model).modified
    assert ir.to_proto(model).SerializeToString() == data


# ------------------------------------------------------------------------------------------- what does nothing

NO_OPS = {
    "Identity": "a = Identity (x)",
    "Cast": "a = Cast <to = 1> (x)",
    "CastLike": "a = CastLike (x, x)",
    "Reshape": "s = Constant <value = int64[2] {0, 4}> ()  a = Reshape (x, s)",
    "Reshape, -1": "s = Constant <value = int64[2] {-1, 4}> ()  a = Reshape (x, s)",
    "Flatten": "a = Flatten (x)",
    "Expand": "s = Constant <value = int64[1] {4}> ()  a = Expand (x, s)",
    "Expand to 1": "s = Constant <value = int64[2] {1, 1}> ()  a = Expand (x, s)",
    "Transpose": "a = Transpose <perm = [0, 1]> (x)",
    "Pad": "s = Constant <value = int64[4] {0, 0, 0, 0}> ()  a = Pad (x, s)",
    "Slice": "z = Constant <value = int64[1] {0}> ()  e = Constant <value = int64[1] {9223372036854775807}> ()"
    "  a = Slice (x, z, e, z)",
    "Concat": "a = Concat <axis = 0> (x)",
    "Sum": "a = Sum (x)",
    "Dropout": "a, m = Dropout (x)",
    "Dropout, told": "p = Constant <value = float {0.5}> ()  t = Constant <value = bool {0}> ()  a = Dropout (x, p, t)",
}


@pytest.mark.parametrize("case", NO_OPS)
def test_what_does_nothing_goes(case):
    model, _ = normalise(body(f"{NO_OPS[case]}  y = Relu (a)"))
    assert ops(model) == ["Relu"]


@pytest.mark.parametrize("case", NO_OPS)
def test_what_does_nothing_to_an_output_hands_its_name_on(case):
    model, _ = normalise(body(f"r = Relu (x)  {NO_OPS[case].replace('(x', '(r')}  y = Neg (a)"))
    assert ops(model) == ["Relu", "Neg"]
    last = NO_OPS[case].replace("(x", "(r").replace("a = ", "y = ").replace("a, m", "y, m")
    model, _ = normalise(body(f"r = Relu (x)  {last}"))
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert ops(model)[0] == "Relu" and len(ops(model)) <= 2


SOME_OPS = {
    "Cast": "c = Cast <to = 11> (x)  a = Cast <to = 1> (c)",
    "Reshape": "s = Constant <value = int64[2] {4, -1}> ()  a = Reshape (x, s)",
    "Expand": "s = Constant <value = int64[3] {2, 1, 4}> ()  a = Expand (x, s)",
    "Transpose": "a = Transpose <perm = [1, 0]> (x)",
    "Transpose, default": "a = Transpose (x)",
    "Pad": "s = Constant <value = int64[4] {0, 0, 0, 1}> ()  a = Pad (x, s)",
    "Slice": "z = Constant <value = int64[1] {0}> ()  e = Constant <value = int64[1] {3}> ()"
    "  o = Constant <value = int64[1] {1}> ()  a = Slice (x, z, e, o)",
    "Slice, every other": "z = Constant <value = int64[1] {0}> ()  e = Constant <value = int64[1] {2147483647}> ()"
    "  o = Constant <value = int64[1] {1}> ()  s = Constant <value = int64[1] {2}> ()  a = Slice (x, z, e, o, s)",
    "Slice, reversed": "z = Constant <value = int64[1] {-1}> ()  e = Constant <value = int64[1] {-9}> ()"
    "  o = Constant <value = int64[1] {1}> ()  a = Slice (x, z, e, o, z)",
    "Dropout with a mask": "a, m = Dropout (x)  n = Cast <to = 1> (m)",
    "Identity of an input": "a = Identity (x)  n = Identity (x)",
}


@pytest.mark.parametrize("case", SOME_OPS)
def test_what_does_something_stays(case):
    more = ", float[N,4] n" if "n = " in SOME_OPS[case] else ""
    shape = "A,B,C" if case == "Expand" else "A,B"
    model, _ = normalise(body(f"{SOME_OPS[case]}  y = Relu (a)", f"float[{shape}] y{more}"))
    assert len(ops(model)) > 1


def test_a_reshape_that_swaps_two_dynamic_dimensions_stays():
    text = """
    g (float[A,B] x) => (float[C,D] y) {
        s = Shape (x)
        order = Constant <value = int64[2] {1, 0}> ()
        t = Gather (s, order)
        r = Reshape (x, t)
        y = Relu (r)
    }"""
    model, _ = normalise(text)
    assert ops(model) == ["Shape", "Gather", "Reshape", "Relu"]


def test_two_outputs_of_one_value_both_stay():
    model, _ = normalise(body("a = Relu (x)  b = Identity (a)", "float[N,4] a, float[N,4] b"))
    assert ops(model) == ["Relu", "Identity"]


def test_training_dropout_stays():
    text = body("r = Constant <value = float {0.5}> ()  t = Constant <value = bool {1}> ()  y = Dropout (x, r, t)")
    model = zoo.model(text)
    Normalise()(model)
    assert ops(model) == ["Dropout"]


@pytest.mark.parametrize("opset", [9, 11])
def test_dropout_of_old_opsets_never_trains(opset):
    model, _ = normalise(body("a = Dropout <ratio = 0.5> (x)  y = Relu (a)"), opset=opset)
    assert ops(model) == ["Relu"]


# ------------------------------------------------------------------------------------------- constants


def test_static_dimensions_of_a_dynamic_shape_are_constants():
    text = """
    g (float[N,4,6] x) => (float[A,B,C] y, int64[1] z, int64[2] s) {
        d = Shape (x)
        one = Constant <value = int64[1] {-1}> ()
        z0 = Gather (d, one)
        z = Neg (z0)
        from = Constant <value = int64[1] {1}> ()
        to = Constant <value = int64[1] {3}> ()
        s0 = Slice (d, from, to)
        s = Neg (s0)
        batch = Constant <value = int64[1] {0}> ()
        n = Gather (d, batch)
        both = Concat <axis = 0> (n, s0)
        y = Reshape (x, both)
    }"""
    model, _ = normalise(text)
    assert "Slice" not in ops(model) and ops(model).count("Gather") == 1


def test_a_result_that_would_be_too_large_is_left_and_said():
    text = body(
        "s = Constant <value = int64[2] {1000, 4}> ()  k = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()"
        "  e = Expand (k, s)  l = Constant <value = int64[3] {100, 1, 1}> ()  t = Expand (e, l)"
        "  r = ReduceMax <axes = [0, 1], keepdims = 0> (t)  y = Add (x, r)"
    )
    model, result = normalise(text)
    assert ops(model) == ["Expand", "ReduceMax", "Add"]
    assert [(r.rule, r.why) for r in result.refusals] == [("fold-constants", "its constant result would take 1562 kB")]


def test_half_precision_weights_may_grow_when_they_are_cast():
    rows = folding.GROWTH_BYTES // 8  # as float16 already the limit for a constant that just grows
    cast = "w = Cast <to = 1> (h)  y = MatMul (x, w)"
    text = f"g (float[2,{rows}] x) => (float[2,4] y) <float16[{rows},4] h> {{ {cast} }}"
    model, _ = normalise(text, rtol=1e-6)  # the constant is the same; the order of a long sum may differ
    assert ops(model) == ["MatMul"]


def test_a_constant_of_a_type_without_arrays_is_left():
    casts = "b = Cast <to = 16> (h)  w = Cast <to = 1> (b)  y = Add (x, w)"
    model, result = normalise(body(casts, declared="<float[4] h>"))
    assert ops(model) == ["Cast", "Cast", "Add"]
    assert [refusal.why for refusal in result.refusals] == ["ONNX Runtime cannot compute it"]


def test_quantized_weights_stay_integers():
    model, _ = normalise(zoo.QUANTIZED)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert model.graph.initializers["w"].const_value.dtype == ir.DataType.INT8


def test_what_callers_can_override_is_no_constant():
    model, result = normalise(zoo.OVERRIDABLE)
    assert ops(model) == ["Exp", "Mul", "Unsqueeze", "Squeeze"] and not result.rewrites
    feed = {"x": np.ones((2, 3), np.float32), "k": np.zeros(3, np.float32), "axes": np.array([1])}
    assert_equivalent(zoo.build("overridable"), model, rtol=EXACT, inputs=feed)


def test_random_operators_and_foreign_ones_are_never_computed():
    model = zoo.build("random")
    Normalise()(model)
    assert ops(model) == ["Bernoulli", "RandomNormal", "Add", "Add"]
    model, _ = normalise(zoo.FOREIGN)
    assert ops(model) == ["Gelu", "Gelu", "Mul"]


def test_unused_nodes_and_initializers_go_but_not_inputs():
    text = """
    g (float[N,4] x, float[N,4] unused, float[2] k) => (float[N,4] y) <float[2] k = {1.0, 1.0}, float[9] w> {
        n = Neg (x)
        y = Relu (x)
    }"""
    model, _ = normalise(text)
    assert ops(model) == ["Relu"] and list(model.graph.initializers) == ["k"]
    assert [value.name for value in model.graph.inputs] == ["x", "unused", "k"]


# ------------------------------------------------------------------------------------------- structure


def test_functions_are_inlined_and_names_stay_unique():
    model, _ = normalise(zoo.FUNCTIONS)
    assert ops(model) == ["Mul", "Mul"] and not model.functions
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_a_function_of_another_opset_stays_a_call_and_that_is_said():
    model, result = normalise(zoo.OTHER_FUNCTION)
    assert ops(model) == ["twice", "twice"]
    assert [refusal.rule for refusal in result.refusals] == ["inline-function"]


def test_control_flow_stays_and_a_constant_condition_opens_its_branch():
    model, _ = normalise(zoo.CONTROL_FLOW)
    assert ops(model) == ["If", "Loop"]
    model, _ = normalise(zoo.CONSTANT_IF)
    assert ops(model) == ["Squeeze", "Neg"]


def test_a_branch_that_only_works_unseen_stays_closed():
    """A Range of one-element tensors runs behind an If, but is refused where the shapes are known."""
    text = """
    g (int64[N,3] x) => (int64[N,3] y) <int64[1] three = {3}> {
        c = Constant <value = bool {1}> ()
        zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64 {1}> ()
        end = If (c) <then_branch = yes () => (int64[1] a) { a = Identity (three) },
                      else_branch = no () => (int64 b) { b = Identity (one) }>
        r = Range (zero, end, one)
        y = Add (x, r)
    }"""
    model, result = normalise(text)
    assert ops(model) == ["If", "Range", "Add"] and not result.notes


def test_empty_outputs_stay_empty():
    text = """
    g (float[3,1,4] x) => (float[1,1,5] h)
    <float[1,20,4] w, float[1,20,5] r> { , h = LSTM <hidden_size = 5> (x, w, r) }"""
    model, _ = normalise(text)
    assert [value.name for value in model.graph.node(0).outputs] == ["", "h"]


# ------------------------------------------------------------------------------------------- shapes


def test_shapes_are_inferred_afresh_since_those_in_the_file_may_be_stale():
    text = """
    g (float[N,4] x) => (int64[2] y) <float[1,4] r> {
        r = Relu (x)
        s = Shape (r)
        y = Neg (s)
    }"""
    before, model = zoo.model(text), zoo.model(text)
    Normalise()(model)
    assert "Shape" in ops(model)
    assert str(model.graph.node(0).outputs[0].shape) == "[N,4]"
    assert_equivalent(before, model, rtol=EXACT, inputs={"x": np.ones((3, 4), np.float32)})


def test_the_shape_that_a_foreign_operator_states_is_believed():
    text = zoo.FOREIGN.replace("(float[N,3] y) {", "(float[N,3] y) <float[N,3] a> {")
    model, _ = normalise(text)
    shapes = {node.op_type: str(node.outputs[0].shape) for node in model.graph if node.inputs[0].name == "x"}
    assert shapes == {"Gelu": "[N,3]"}


def test_a_fault_that_inference_finds_is_noted_and_the_rest_is_inferred():
    model = zoo.model("g (float[N,4] x) => (float[N,5] y) { a = Relu (x)  b = Exp (a)  y = Neg (b) }")
    result = Normalise()(model)
    assert len(result.notes) == 1 and "inference found a fault" in result.notes[0]
    assert str(model.graph.node(0).outputs[0].shape) == "[N,4]"


def test_the_signature_is_never_refined():
    model = zoo.model("g (float[N,4] x) => (float[A,B] y) { a = Relu (x)  y = Concat <axis = 0> (a, a) }")
    Normalise()(model)
    assert [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == ["[N,4]", "[A,B]"]


# ------------------------------------------------------------------------------------------- opset


@pytest.mark.parametrize("name", ["old", "conv-norm-relu-9", "residual-11"])
def test_the_opset_is_raised(name):
    before, model = zoo.build(name), zoo.build(name)
    result = RaiseOpset(target=13)(model)
    assert result.modified and model.opset_imports[""] == 13 and model.ir_version >= 7
    assert_equivalent(before, model, rtol=EXACT)


def test_the_opset_is_never_lowered():
    model = zoo.build("clutter")
    assert not RaiseOpset(target=13)(model).modified
    assert model.opset_imports[""] == 18


def test_names_metadata_weights_and_subgraphs_survive_a_raise():
    text = """<ir_version: 8, opset_import: ["" : 11, "com.microsoft" : 1]>
    g (float[2,1,2000] x, bool c) => (float[2,2000] y) <float[2000] w> {
        [first] a = com.microsoft.Gelu (x)
        [branch] s = If (c) <then_branch = yes () => (float[2,2000] p) { p = Squeeze <axes = [1]> (a) },
                    else_branch = no () => (float[2,2000] q) { q0 = Squeeze <axes = [1]> (a)  q = Neg (q0) }>
        [last] y = Add (s, w)
    }"""
    before, model = zoo.model(text), zoo.model(text)
    model.metadata_props["author"] = "somebody"
    model.graph.node(0).metadata_props["from"] = "layer 1"
    weight = model.graph.initializers["w"].const_value
    assert RaiseOpset(target=13)(model).modified
    assert [node.name for node in model.graph if node.name] == ["first", "branch", "last"]
    assert model.metadata_props == {"author": "somebody"}
    assert next(iter(model.graph)).metadata_props == {"from": "layer 1"}
    assert model.graph.initializers["w"].const_value is weight
    assert_equivalent(before, model, rtol=EXACT)


def test_functions_are_inlined_before_a_raise():
    model = zoo.model(zoo.FUNCTIONS.replace('"" : 17', '"" : 11'))
    RaiseOpset(target=13)(model)
    assert not model.functions and model.opset_imports[""] == 13
    assert_equivalent(zoo.build("functions"), model, rtol=EXACT)


@pytest.mark.parametrize(
    ("text", "target", "why"),
    [
        (zoo.OTHER_FUNCTION.replace('"" : 17', '"" : 11').replace('"" : 16', '"" : 10'), 13, "another opset"),
        (body("y = Relu (x)"), 999, "version"),
        (body("y = NoSuchOperator (x)"), 20, "NoSuchOperator"),
    ],
)
def test_what_cannot_be_raised_is_left_untouched_with_the_reason(text, target, why):
    model = zoo.model(text)
    before = ir.to_proto(model).SerializeToString()
    result = RaiseOpset(target=target)(model)
    assert not result.modified and ir.to_proto(model).SerializeToString() == before
    assert len(result.refusals) == 1 and why in result.refusals[0].why


# ------------------------------------------------------------------------------------------- memory

LARGE = """
import resource, sys
from pathlib import Path
from edgec.compiler import model as model_io
from edgec.passes.fold_batch_norm import FoldBatchNorm
from edgec.passes.normalise import Normalise
from edgec.passes.raise_opset import RaiseOpset

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

model_io.load(Path(sys.argv[2]))
start = peak()
model = model_io.load(Path(sys.argv[1]))
for step in (RaiseOpset(), Normalise(), FoldBatchNorm()):
    step(model)
print(peak() - start)
"""


def external_model(folder, layers, size):
    """Write a chain of MatMul and Add whose weights are a file without a single byte on the disk."""
    folder.mkdir()
    length = 4 * size * size
    (folder / "w.bin").touch()
    with (folder / "w.bin").open("r+b") as file:
        file.truncate(layers * length)
    text = "  ".join(f"m{i} = MatMul (x{i}, w{i})  x{i + 1} = Add (m{i}, b{i})" for i in range(layers))
    biases = ", ".join(f"float[{size}] b{i}" for i in range(layers))
    weights = ", ".join(f"float[1,1] w{i}" for i in range(layers))
    head = f"g (float[N,{size}] x0) => (float[N,{size}] x{layers}) <{biases}, {weights}>"
    proto = ir.to_proto(zoo.model(f"{head} {{ {text} }}", opset=11))
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("w"):
            place = {"location": "w.bin", "offset": int(tensor.name[1:]) * length, "length": length}
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.data_location = f"w{place['offset'] // length}", 1, 1
            tensor.dims.extend([size, size])
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    for info in list(proto.graph.value_info):
        if info.name.startswith("w"):
            proto.graph.value_info.remove(info)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def test_the_passes_do_not_read_large_weights(tmp_path):
    large = external_model(tmp_path / "large", 5, 11_000)  # 2.4 GB
    small = external_model(tmp_path / "small", 5, 10)
    command = [sys.executable, "-c", textwrap.dedent(LARGE), str(large), str(small)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 50  # MB; one of the weights alone is 484
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the unit above is Linux's: kB


SLICES = """
g (float[1,2,6,8] x) => (float[1,2,3,4] y)
<int64[1] zero = {0}, int64[1] far = {9223372036854775807}, int64[1] two = {2}, int64[1] rows = {2},
 int64[1] columns = {%s}>
{
    half = Slice (x, zero, far, rows, two)
    y = Slice (half, zero, far, columns, two)
}
"""


def test_two_slices_along_different_axes_become_one():
    assert ops(normalise(SLICES % "-1")[0]) == ["Slice"]


def test_two_slices_along_one_axis_stay_two():
    assert ops(normalise(SLICES.replace("[1,2,3,4] y", "[1,2,2,8] y") % "2")[0]) == ["Slice", "Slice"]
