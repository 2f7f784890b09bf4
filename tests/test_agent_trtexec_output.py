"""trtexec's output, its files and the inspector's, 8.2 to 11, read from files in the documented forms."""

import math
import struct
from pathlib import Path

import onnx
import pytest
from edgec.backends.agent import layer_info, onnx_file, trtexec_faults, trtexec_output
from edgec.backends.agent.faults import Fault
from edgec.backends.agent.tensors import Described, Tensor

SAMPLES = Path(__file__).parent / "trtexec_samples"


def sample(name):
    return (SAMPLES / name).read_text().replace("%RS%", "\x1e").replace("%US%", "\x1f")


# -------------------------------------------------------------------------------------------- console


def test_console_of_8_2():
    said = trtexec_output.console(sample("console-8.2.txt"))
    assert (said.version, said.verdict, said.capability) == ((8, 2, 1), "PASSED", (5, 3))
    assert said.device["Selected Device"] == "NVIDIA Tegra X1"
    assert said.device["Device Global Memory"] == "3956 MiB"
    assert said.throughput == 136.5
    assert said.summary["GPU Compute Time"] == {"min": 7.25, "max": 9.5, "mean": 7.5, "median": 7.375, "99%": 9}
    assert said.summary["End-to-End Host Latency"]["max"] == 9.75
    assert (said.warnings, said.errors, said.built_in) == ([], [], None)


def test_console_of_10_3():
    said = trtexec_output.console(sample("console-10.3.txt"))
    assert (said.version, said.verdict, said.capability) == ((10, 3, 0), "PASSED", (8, 7))
    assert "TensorRT version" not in said.device and said.device["SMs"] == "8"
    assert said.summary["Latency"]["50%"] == 0.118 and said.summary["Latency"]["99.9%"] == 0.24
    enqueue = said.summary["Enqueue Time"]
    assert enqueue["min"] == 1.2e-05 and enqueue["max"] == math.inf and math.isnan(enqueue["mean"])
    assert sum("not permitted under CUDA graph" in line for line in said.warnings) == 1, "said twice, kept once"
    assert "* GPU compute time is unstable, with coefficient of variance = 3.2%." in said.warnings


def test_console_of_11_1_that_failed():
    said = trtexec_output.console(sample("console-11.1.txt"))
    assert (said.version, said.verdict, said.capability) == ((11, 1, 0), "FAILED", (8, 9))
    assert said.errors == ["Error opening engine file: m.engine", "Engine set up failed"]


@pytest.mark.parametrize(
    "number, version",
    [("8201", (8, 2, 1)), ("8502", (8, 5, 2)), ("9300", (9, 3, 0)), ("100300", (10, 3, 0)), ("101303", (10, 13, 3))],
)
def test_both_schemes_of_version_numbers(number, version):
    text = f"&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] # trtexec --help\n"
    assert trtexec_output.console(text).version == version


def test_a_version_is_taken_from_its_own_line_where_the_mark_is_missing():
    assert trtexec_output.console("[x] [I] TensorRT version: 8.6.1\n").version == (8, 6, 1)
    assert trtexec_output.console("trtexec: command not found\n").version == ()


def test_names_with_control_bytes_do_not_cut_lines():
    text = "[x] [E] [TRT] Could not find any implementation for node a\x1eb.\n"
    assert trtexec_output.console(text).errors == ["[TRT] Could not find any implementation for node a\x1eb."]


# ---------------------------------------------------------------------------------------------- files


def test_times_of_8_2_hold_the_warm_up_which_is_left_out():
    text = sample("times-8.2.json")
    assert [call.compute for call in trtexec_output.times(text)] == [12, 9, 7.5]
    assert [call.compute for call in trtexec_output.times(text, warm_up=500)] == [7.5]


def test_times_of_10_3():
    calls = trtexec_output.times(sample("times-10.3.json"), warm_up=500)
    assert [call.compute for call in calls] == [0.115234, 1.2e-05]
    assert calls[0].latency == 0.270234


@pytest.mark.parametrize("text", ["", "[{}]", "{}x", '[{"computeMs": 1}]', "[3]"])
def test_what_are_no_times_is_refused(text):
    with pytest.raises(ValueError):
        trtexec_output.times(text)


def test_profile_of_8_2_has_no_medians():
    found = trtexec_output.profile(sample("profile-8.2.json"))
    assert found == (30, [("Conv_0 + Relu_1", 2.0, None), ("Gemm_2", 0.5, None)])


def test_profile_with_quotes_in_names_and_nan_shares():
    found = trtexec_output.profile(sample("profile-10.3.json"))
    assert found.runs == 100
    assert found.layers[1] == ('/a/"Conv"\x1e/a/Relu', 0.06, 0.0575)
    assert [one.median for one in found.layers] == [0.014, 0.0575, 0.011]


def test_what_is_no_profile_is_refused():
    with pytest.raises(ValueError, match="count"):
        trtexec_output.profile("[]")


def test_outputs_keep_order_shape_and_names_with_quotes():
    found = trtexec_output.outputs(sample("outputs.json"))
    shape, values = found["logits"]
    assert shape == [2, 3] and values[:3] == [0.123457, -1.5, 1.2e-05]
    assert math.isnan(values[3]) and values[4:] == [math.inf, -math.inf]
    assert found['out:"x"'] == ([2], [-(2**63), 9007199254740993]), "integers are not rounded to doubles"
    assert found["count"] == ([], [7])


# -------------------------------------------------------------------------------------------- tensors


def test_tensors_are_packed_little_endian():
    assert trtexec_output.packed("y", "int64", [2], [-(2**63), 5]).data == struct.pack("<qq", -(2**63), 5)
    assert trtexec_output.packed("y", "float16", [1], [1.5]).data == b"\x00\x3e"
    assert trtexec_output.packed("y", "bool", [2], [1, 0]).data == b"\x01\x00"


def test_tensors_are_converted_to_the_types_of_engines():
    wide = Tensor("int64", [2], struct.pack("<qq", 7, -1))
    assert trtexec_output.converted("x", wide, "int32") == Tensor("int32", [2], struct.pack("<ii", 7, -1))
    single = Tensor("float32", [1], struct.pack("<f", 0.5))
    assert trtexec_output.converted("x", single, "float16").data == struct.pack("<e", 0.5)
    assert trtexec_output.converted("x", single, "float32") is single


@pytest.mark.parametrize(
    "tensor, dtype",
    [
        (Tensor("int64", [1], struct.pack("<q", 1 << 40)), "int32"),
        (Tensor("float32", [1], struct.pack("<f", 1e6)), "float16"),
        (Tensor("bfloat16", [1], b"\0\0"), "float32"),
        (Tensor("float32", [1], b"\0\0\0\0"), "bfloat16"),
    ],
)
def test_what_a_type_cannot_hold_is_a_fault(tensor, dtype):
    with pytest.raises(Fault, match="x"):
        trtexec_output.converted("x", tensor, dtype)


# --------------------------------------------------------------------------------------------- layers


def test_layers_of_8_2_are_joined_by_their_names():
    found = layer_info.layers(sample("layers-8.2.json"))
    assert [layer.nodes for layer in found] == [
        ("conv1.weight", "QuantizeLinear_7", "Conv_9", "Relu_10"),
        (),
        ("Sigmoid_11", "Mul_12"),
        ("Conv_13", "Conv_14"),
        ("Unsqueeze_93", "Softmax_208"),
    ]
    assert found[0].kind == "CaskConvolution" and found[3].name == "Conv_13 || Conv_14 [profile 1]"


def test_layers_of_8_6_are_joined_by_their_metadata():
    found = layer_info.layers(sample("layers-8.6.json"))
    assert [layer.nodes for layer in found] == [
        ("/a/Conv", "/a/list[0]/Relu"),
        ("/b/MatMul", "/b/Add"),
        ("Gemm_3",),
    ]
    assert layer_info.by_name(found)["/a/Conv\x1e/a/Relu"] == ("/a/Conv", "/a/list[0]/Relu")


def test_layers_of_11_1():
    (layer,) = layer_info.layers(sample("layers-11.1.json"))
    assert layer == ("__myl_Conv_myl0_0", "kgen", ("/a/Conv", "/a/Relu"))


def test_layers_that_are_names_only():
    found = layer_info.layers(sample("layers-names.json"))
    assert found == [("Conv_0 + Relu_1", "", ("Conv_0", "Relu_1")), ("Gemm_2", "", ("Gemm_2",))]


@pytest.mark.parametrize(
    "name, nodes",
    [
        ("/a/Conv\x1e/a/Relu", ("/a/Conv", "/a/Relu")),
        ("{ForeignNode[(Unnamed Layer* 7) [Shuffle].../x/Reshape]}", ("/x/Reshape",)),
        ("PWN(/a/Sigmoid, PWN(/a/Mul))", ("/a/Sigmoid", "/a/Mul")),
        ("a + b + a", ("a", "b")),
        ("(Unnamed Layer* 3) [Constant]", ()),
        ("__myl_Fc_myl0_2", ()),
        ("model.0.conv+bias", ("model.0.conv+bias",)),
    ],
)
def test_nodes_in_names(name, nodes):
    assert layer_info.nodes_of_name(name) == nodes


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": 3}', '{"Layers": [3]}', '{"Layers": [{"Name": "a"b"}]}'])
def test_what_the_inspector_did_not_write_is_refused(text):
    with pytest.raises(ValueError):
        layer_info.layers(text)


# --------------------------------------------------------------------------------------------- faults


def graph_of(*names):
    return onnx_file.Graph([], [], [onnx_file.Node(name, "Conv") for name in names])


def fault_of(name, graph, code=1):
    text = sample(name)
    return trtexec_faults.build_fault(trtexec_output.console(text), text, code, "8.5.2", graph)


def test_a_node_that_the_parser_refuses_is_named_with_the_reason():
    fault = fault_of("build-8.5-parse.txt", graph_of("/conv1/weight/DequantizeLinear"))
    assert fault.nodes == ["/conv1/weight/DequantizeLinear"]
    assert "/conv1/weight/DequantizeLinear (DequantizeLinear)" in fault.what
    assert "Scale coefficients must all be positive" in fault.what and fault.fix


def test_an_attribute_is_not_taken_for_the_nodes_name():
    text = sample("build-8.5-parse.txt").replace('name: "/conv1/weight/DequantizeLinear"\n', "")
    assert trtexec_faults.refused(text)[0].node == "conv1.weight_dq", "a node without a name goes by its output"


def test_the_one_line_form_of_parser_errors():
    fault = fault_of("build-10.13-parse.txt", graph_of("/head/NMS"))
    assert fault.nodes == ["/head/NMS"]
    assert "NonMaxSuppressionX" in fault.what and "Plugin not found" in fault.what


def test_a_layer_without_a_kernel_is_traced_to_its_nodes():
    fault = fault_of("build-8.5-kernel.txt", graph_of("/l1/QuantizeLinear", "/l1/Conv", "/l1/Con", "/other"))
    assert fault.nodes == ["/l1/QuantizeLinear", "/l1/Conv"], "not the weight, and not a name that another begins with"
    assert "any implementation" in fault.what and fault.fix


def test_a_killed_build_is_said_to_be_short_of_memory():
    fault = trtexec_faults.build_fault(trtexec_output.console(""), "", -9, "8.5.2", graph_of())
    assert "signal 9" in fault.what and "memory" in (fault.fix or "")


def test_what_only_repeats_a_failure_is_not_the_reason():
    said = trtexec_output.console("[x] [E] Engine set up failed\n[x] [E] [TRT] No space left on device\n")
    fault = trtexec_faults.run_fault(said, 1, "measuring")
    assert fault.what == "trtexec failed at measuring: No space left on device" and "disk" in (fault.fix or "")


# ------------------------------------------------------------------------------------------ ONNX files


def test_an_onnx_file_is_read_without_onnx(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[N, 3, 8, M] x, int64[2] sizes, float16[4] h) => (float[N, 3] y, bool[] flag)
    <float[3] w = {1, 2, 3}, int64[1] axes = {0}>
    { y = Foo(x, w) flag = Bar(sizes, h, axes) }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name = "first"
    onnx.save(model, tmp_path / "m.onnx")
    graph = onnx_file.read(str(tmp_path / "m.onnx"))
    assert graph.inputs == [
        Described("x", "float32", [-1, 3, 8, -1]),
        Described("sizes", "int64", [2]),
        Described("h", "float16", [4]),
    ]
    assert graph.outputs[0] == Described("y", "float32", [-1, 3]) and graph.outputs[1].dtype == "bool"
    assert graph.nodes == [("first", "Foo"), ("", "Bar")]


def test_initializers_are_no_inputs(tmp_path):
    tensor = onnx.helper.make_tensor("w", 1, [2], [1.0, 2.0])
    info = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "w", "y")]
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", info[:2], info[2:], [tensor])
    onnx.save(onnx.helper.make_model(graph, ir_version=3), tmp_path / "m.onnx")
    assert [one.name for one in onnx_file.read(str(tmp_path / "m.onnx")).inputs] == ["x"]


@pytest.mark.parametrize("cut", [0, 1, 40, -3])
def test_files_that_are_cut_off_are_faults(tmp_path, cut):
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="relu")
    info = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "y")]
    whole = onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:])).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole[: cut or None] if cut else b"")
    with pytest.raises(Fault, match="no ONNX file"):
        onnx_file.read(str(tmp_path / "m.onnx"))


def test_a_field_that_is_longer_than_its_message_is_a_fault(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\x3a\x02\x0a\x03" + b"\x1a\x01x")  # a graph of 2 bytes with a node of 3
    with pytest.raises(Fault, match="no ONNX file"):
        onnx_file.read(str(tmp_path / "m.onnx"))


def test_dimensions_and_types_are_those_that_onnx_reads(tmp_path):
    for kind in (1, 2, 3, 6, 7, 9, 10, 11, 16):
        info = [onnx.helper.make_tensor_value_info(name, kind, [1 << 40, None, 0, "n"]) for name in ("x", "y")]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", info[:1], info[1:])
        onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
        (one,) = onnx_file.read(str(tmp_path / "m.onnx")).inputs
        assert one.shape == [1 << 40, -1, 0, -1]
        assert one.dtype == str(onnx.helper.tensor_dtype_to_np_dtype(kind)).replace("ml_dtypes.", "")
