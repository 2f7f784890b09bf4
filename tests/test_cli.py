"""The command line as a process, on good input."""

import json

import edgec as package
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import document


def test_help_is_instant_and_complete(edgec):
    done = edgec("--help")
    assert done.returncode == 0
    for command in ("bench", "calibrate", "compile", "devices", "doctor", "eval", "inspect"):
        assert command in done.stdout
        page = edgec(command, "--help")
        assert page.returncode == 0
        assert "Usage: " in page.stdout


def test_nothing_heavy_is_imported_for_help():
    import subprocess
    import sys

    heavy = ("numpy", "onnx", "onnx_ir", "onnxruntime", "rich")
    code = f"import sys, edgec.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_bundle_holds_what_is_promised(bundle):
    assert {p.name for p in bundle.iterdir()} == {"model.onnx", "manifest.json", "report.json", "report.html"}
    model = onnx.load(bundle / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits"]
    ops = {n.op_type for n in model.graph.node}
    assert "BatchNormalization" not in ops
    assert {"QuantizeLinear", "DequantizeLinear"} <= ops


def test_the_report_is_honest_about_int8_as_asked(bundle):
    report = json.loads((bundle / "report.json").read_text())
    assert report["precision"] == "int8"
    names = [a["name"] for a in report["attempts"]]
    assert names[:2] == ["fp32", "int8"]
    assert [a["precision"] for a in report["attempts"] if a["chosen"]] == ["int8"]  # perhaps with layers in float
    for measurement in (report["original"], report["baseline"], report["result"]):
        assert measurement["median_ms"] > 0
        assert measurement["low_ms"] <= measurement["median_ms"] <= measurement["high_ms"]
        assert measurement["runs"] >= 50
    assert report["fidelity"]["metric"] == "agreement"
    assert report["fidelity"]["images"] == 32  # a fifth of 80 is 16; at least 32 are held out
    fold = next(p for p in report["passes"] if p["name"] == "fold-batch-norm")
    assert fold["rewrites"] == 2
    assert fold["proof"]["error"] <= fold["proof"]["tolerance"]


def test_a_bundle_opens_and_runs_like_its_onnx(bundle):
    image = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    opened = package.open_bundle(bundle)
    session = ort.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(opened.run({"image": image})["logits"], session.run(None, {"image": image})[0])
    assert opened.preprocess.mean == (0.5, 0.5, 0.5)


def test_auto_without_images_is_float_and_says_what_images_would_allow(tiny, tmp_path, edgec):
    done = edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "--calib" in done.stdout
    assert json.loads((tmp_path / "out/report.json").read_text())["precision"] == "fp32"


def test_json_is_one_document_and_nothing_else(tiny, tmp_path, edgec):
    report = document(edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--json"))
    assert report["precision"] == "fp32"
    assert report == json.loads((tmp_path / "out/report.json").read_text())


def test_the_same_compile_twice_gives_the_same_file(tiny, tmp_path, edgec):
    """On a device that is not here, so that no measured latency has a say."""
    args = ("--calib", tiny / "images", "--precision", "int8", "--device", "raspberry-pi-5", "--json")
    for out in ("one", "two"):
        report = document(edgec("compile", tiny / "model.onnx", "-o", tmp_path / out, *args))
    assert report["calibration"]["cached"] is True
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "two/model.onnx").read_bytes()


def test_labels_are_used_where_given(tiny, tmp_path, edgec):
    args = ("--calib", tiny / "images", "--eval", tiny / "images", "--json")
    report = document(edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", *args))
    assert report["fidelity"]["metric"] == "top1"
    assert report["fidelity"]["images"] == 80
    assert report["calibration"]["held_out"] == 0


def test_a_device_that_this_machine_is_not(tiny, tmp_path, edgec):
    out = tmp_path / "pi"
    done = edgec(
        "compile", tiny / "model.onnx", "-o", out, "--device", "raspberry-pi-4", "--calib", tiny / "images", "--json"
    )
    report = document(done)
    assert report["result"]["median_ms"] is None
    assert "Raspberry Pi 4" in report["result"]["reason"]
    assert report["fidelity"]["value"] is not None  # quality needs no device
    zero = [i for i in onnx.load(out / "model.onnx").graph.initializer if i.name.endswith("_zero_point")]
    assert {onnx.TensorProto.INT8} >= {z.data_type for z in zero} - {onnx.TensorProto.INT32}
    measured = document(edgec("bench", out, "--seconds", 0.2, "--json"))  # "carried there": it can be measured
    assert [m["median_ms"] > 0 for m in measured["measurements"]] == [True, True]


def test_a_jetson_bundle_obeys_tensorrt(tiny, tmp_path, edgec):
    out = tmp_path / "jetson"
    args = ("--device", "jetson-orin-nano-8gb", "--calib", tiny / "images", "--precision", "int8")
    assert edgec("compile", tiny / "model.onnx", "-o", out, *args).returncode == 0
    for node in onnx.load(out / "model.onnx").graph.node:
        assert node.op_type != "DequantizeLinear" or len(node.input) == 3


def test_int8_on_a_device_without_it_is_refused(tiny, tmp_path, edgec):
    args = ("--device", "jetson-nano", "--calib", tiny / "images", "--precision", "int8")
    done = edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", *args)
    assert done.returncode == 2
    assert "no INT8" in done.stderr


def test_a_stated_budget_that_cannot_be_met_is_3_and_keeps_the_best_attempt(tiny, tmp_path, edgec):
    done = edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--max-latency", "1us")
    assert done.returncode == 3
    assert "more than 0.001" in done.stderr
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_ranges_round_trip(tiny, tmp_path, edgec):
    ranges = tmp_path / "ranges.json"
    assert edgec("calibrate", tiny / "model.onnx", tiny / "images", "-o", ranges, "--method", "minmax").returncode == 0
    found = json.loads(ranges.read_text())["ranges"]
    assert found["image"]["min"] < found["image"]["max"]
    done = edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--ranges", ranges, "--precision", "int8")
    assert done.returncode == 0, done.stderr


def test_eval_of_a_bundle_against_its_original(tiny, bundle, edgec):
    found = document(edgec("eval", bundle, tiny / "images", "--json"))
    assert set(found["conditions"]) == {"clean"}
    assert found["conditions"]["clean"]["metric"] == "top1"
    assert found["conditions"]["clean"]["images"] == 80


def test_eval_with_a_metric_of_ones_own(tiny, bundle, tmp_path, edgec):
    (tmp_path / "mine.py").write_text("def half(got, want):\n    return 0.5\n")
    args = ("--metric", f"{tmp_path / 'mine.py'}:half", "--against", tiny / "model.onnx", "--json")
    found = document(edgec("eval", bundle, tiny / "images", *args))
    assert found["conditions"]["clean"]["value"] == 50.0


def test_bench_compares_in_one_process(tiny, bundle, edgec):
    found = document(edgec("bench", bundle, "--against", tiny / "model.onnx", "--seconds", 0.3, "--profile", "--json"))
    ours, theirs = found["measurements"]
    assert ours["speedup"] is not None
    assert theirs["speedup"] is None
    assert {"QLinearConv"} <= {row["op"] for row in found["operators"]}


@pytest.mark.parametrize("args", [(), ("--layers",), ("--why",), ("--json",)])
def test_inspect_a_bundle(bundle, edgec, args):
    done = edgec("inspect", bundle, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_inspect_a_model_and_two_side_by_side(tiny, bundle, tmp_path, edgec):
    assert "BatchNormalization" in edgec("inspect", tiny / "model.onnx").stdout
    assert edgec("inspect", bundle, "--against", tiny / "model.onnx").returncode == 0
    page = tmp_path / "page.html"
    assert edgec("inspect", bundle, "--html", page).returncode == 0
    assert "<html" in page.read_text()


def test_devices_and_doctor(edgec):
    assert "raspberry-pi-5" in edgec("devices").stdout
    assert "8.7" in edgec("devices", "jetson-orin-nano-8gb").stdout
    assert "onnxruntime" in edgec("doctor").stdout


def test_the_python_api_does_the_same(tiny, tmp_path):
    report = package.compile(tiny / "model.onnx", tmp_path / "out", calib=tiny / "images", precision="int8", threads=1)
    assert report.precision == "int8"
    assert package.inspect(tmp_path / "out").headline == report.headline
    assert package.evaluate(tmp_path / "out", tiny / "images").images == 80
    assert package.bench(tmp_path / "out", seconds=0.1)[0].median_ms > 0
    assert any(p.name == "jetson-orin-nano-8gb" for p in package.devices())
    assert set(package.calibrate(tiny / "model.onnx", tiny / "images")) >= {"image"}


def save(text, path, **constants):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 13]> {text}')
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def test_a_model_with_nothing_to_quantize_compiles_and_says_so(tiny, tmp_path, edgec):
    model = save("g (float[N, 3, 16, 16] x) => (float[N, 3, 16, 16] y) { y = Relu (x) }", tmp_path / "relu.onnx")
    done = edgec("compile", model, "-o", tmp_path / "out", "--calib", tiny / "images", "--precision", "int8")
    assert done.returncode == 0, done.stderr
    assert "no node of the model can be quantized" in " ".join(done.stdout.split())
    assert json.loads((tmp_path / "out/report.json").read_text())["precision"] == "fp32"


def test_a_model_that_is_quantized_already(tiny, bundle, tmp_path, edgec):
    done = edgec("compile", bundle / "model.onnx", "-o", tmp_path / "out", "--calib", tiny / "images")
    assert done.returncode == 0, done.stderr
    assert "quantized operators already" in " ".join(done.stdout.split())


def test_a_batch_that_is_declared_free_but_is_not(tiny, tmp_path, edgec):
    text = "g (float[N, 3, 16, 16] x) => (float[M, 4] y) { r = Reshape (x, shape)\n y = MatMul (r, w) }"
    weight = np.random.default_rng(0).normal(size=(768, 4)).astype(np.float32)
    model = save(text, tmp_path / "m.onnx", shape=np.array([1, 768], np.int64), w=weight)
    done = edgec("compile", model, "-o", tmp_path / "out", "--calib", tiny / "images", "--precision", "int8")
    assert done.returncode == 0, done.stderr


def test_auto_does_not_take_what_it_could_not_judge(tiny, tmp_path, edgec):
    ranges = tmp_path / "ranges.json"
    assert edgec("calibrate", tiny / "model.onnx", tiny / "images", "-o", ranges).returncode == 0
    report = document(edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--ranges", ranges, "--json"))
    assert report["precision"] == "fp32"
    assert "not judged" in report["attempts"][1]["verdict"]


def test_steps_can_be_left_out_and_unknown_ones_are_refused(tiny, tmp_path, edgec):
    args = ("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--calib", tiny / "images", "--precision", "int8")
    done = edgec(*args, "--without", "equalise")
    assert done.returncode == 2
    assert "'equalise'" in done.stderr and "bias-correction" in done.stderr
    lean = "smooth,equalize,bias-correction,rounding,mixed-precision"
    report = document(edgec(*args, "--without", lean, "--time-budget", "2min", "--json"))
    assert [step["name"] for step in report["steps"]] == ["ranges"]
    assert edgec(*args, "--time-budget", "soon").returncode == 2


def test_nan_in_activations_is_named_and_refused(tiny, tmp_path, edgec):
    text = """g (float[N, 3, 16, 16] x) => (float[N, 4, 16, 16] y) {
      root = Sqrt (x)
      y = Conv <pads = [1, 1, 1, 1]> (root, w) }"""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    model = save(text, tmp_path / "m.onnx", w=weight)
    (tmp_path / "m.preprocess.yaml").write_text("size: [16, 16]\nmean: [0.5, 0.5, 0.5]\n")  # half the pixels negative
    done = edgec("compile", model, "-o", tmp_path / "out", "--calib", tiny / "images", "--precision", "int8")
    assert done.returncode == 2
    assert "tensor 'root' holds NaN" in done.stderr
    assert ".png" in done.stderr and "fix: " in done.stderr
    assert not (tmp_path / "out").exists()


def test_subgraphs_are_left_alone_and_that_is_said(tiny, tmp_path, edgec):
    text = """g (float[N, 3, 16, 16] x, bool c) => (float[N, 4, 16, 16] y) {
      r = Conv <pads = [1, 1, 1, 1]> (x, w)
      s = If (c) <then_branch = yes () => (float[N, 4, 16, 16] t) { t = Conv <pads = [1, 1, 1, 1]> (r, u) },
                  else_branch = no () => (float[N, 4, 16, 16] e) { e = Identity (r) }>
      y = Conv <pads = [1, 1, 1, 1]> (s, u) }""".replace(", bool c)", ")").replace("If (c)", "If (b)")
    text = text.replace("s = If", "sum = ReduceSum <keepdims = 0> (r)\n b = Greater (sum, zero)\n s = If")
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(4, 3, 3, 3)), "u": rng.normal(size=(4, 4, 3, 3)), "zero": np.array(0.0)}
    arrays = {name: array.astype(np.float32) for name, array in constants.items()}
    model = save(text, tmp_path / "m.onnx", **arrays)
    args = ("--calib", tiny / "images", "--precision", "int8", "--without", "mixed-precision")
    done = edgec("compile", model, "-o", tmp_path / "out", *args)
    assert done.returncode == 0, done.stderr
    assert "it is inside a subgraph (If, Loop, Scan)" in " ".join(done.stdout.split())
    inside = [n for n in onnx.load(tmp_path / "out/model.onnx").graph.node if n.op_type == "If"]
    assert {n.op_type for n in inside[0].attribute[0].g.node} == {"Conv"}
