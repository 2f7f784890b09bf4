"""Every precision from the command line to the bundle, for devices that this machine is not: nothing is measured."""

import json
import sys
from collections import Counter
from pathlib import Path

import conftest
import edgec
import numpy as np
import onnx
import pytest
from edgec import cli
from edgec.backends.ort import Session
from edgec.compiler import trials
from edgec.compiler.errors import UserError
from onnx import TensorProto


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line inside this process; return exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["edgec", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return run


@pytest.fixture
def compiled(command, tiny, tmp_path):
    """Compile the tiny classifier; return the report and the bundle's model."""

    def run(precision, device, *more, model=tiny / "model.onnx"):
        args = ("-o", tmp_path / "out", "--calib", tiny / "images", "--precision", precision, "--device", device)
        args = (*args, "--preprocess", tiny / "model.preprocess.yaml", "--threads", 1, "--json", *more)
        code, out, err = command("compile", model, *args)
        assert code == 0, err
        report = json.loads(out)
        assert report["result"]["median_ms"] is None and report["result"]["reason"]
        assert report["precision"] == precision
        assert [a["name"] for a in report["attempts"]][:2] == ["fp32", precision]
        assert [a["verdict"] for a in report["attempts"] if a["chosen"]] == ["asked for"]
        model = onnx.load(tmp_path / "out" / "model.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert [i.name for i in model.graph.input] == ["image"]
        assert [(o.name, o.type.tensor_type.elem_type) for o in model.graph.output] == [("logits", TensorProto.FLOAT)]
        return report, model

    return run


def sqnr(report) -> float:
    (output,) = report["fidelity"]["outputs"]
    return output["sqnr_db"]


def stored(model: onnx.ModelProto, least: int = 32) -> Counter:
    """Return the types of the large initializers: the weights."""
    return Counter(TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if np.prod(t.dims) > least)


def steps(report) -> list[str]:
    return [step["name"] for step in report["steps"]]


def test_int8_for_a_cpu(compiled):
    report, model = compiled("int8", "raspberry-pi-5")
    assert stored(model) == {"INT8": 3}
    assert steps(report) == ["equalize", "ranges", "bias-correction", "rounding"]
    assert sqnr(report) > 30 and report["fidelity"]["value"] >= 90
    precisions = {layer["precision"] for layer in report["layers"] if layer["macs"]}
    assert precisions == {"int8 x int8"}


def test_int4_for_a_cpu(compiled):
    report, model = compiled("int4", "raspberry-pi-5")
    assert stored(model) == {"INT4": 3}
    assert not {"QuantizeLinear"} & {n.op_type for n in model.graph.node}, "activations stay float"
    assert steps(report) == ["rounding"]
    assert sqnr(report) > 15
    plain, _ = compiled("int4", "raspberry-pi-5", "--without", "rounding", "--force")
    assert steps(plain) == []
    assert sqnr(report) > sqnr(plain) + 1
    assert report["size_after_bytes"] < report["size_before_bytes"]


def test_w4a8_for_a_cpu(compiled):
    plain, model = compiled("w4a8", "raspberry-pi-5", "--without", "mixed-precision")
    assert stored(model) == {"INT4": 3}
    assert "QuantizeLinear" in {n.op_type for n in model.graph.node}
    assert steps(plain) == ["equalize", "ranges", "bias-correction", "rounding"]
    assert sqnr(plain) > 15
    report, model = compiled("w4a8", "raspberry-pi-5", "--force")
    assert [a["name"] for a in report["attempts"]] == ["fp32", "w4a8", "w4a8, 2 at 8 bits"]
    assert steps(report) == [*steps(plain), "mixed-precision"]
    assert stored(model) == {"INT4": 1, "INT8": 2}, "two layers at 8 bits come closer"
    assert sqnr(report) > sqnr(plain)
    again, _ = compiled("w4a8", "raspberry-pi-5", "--force")
    assert again["steps"][-1]["detail"].endswith("; cached")


def test_a_size_is_held_by_weights_of_four_bits(compiled):
    """Between INT8's file and that with all weights at 4 bits: not all of them need 4."""
    most = compiled("int8", "raspberry-pi-5")[0]["size_after_bytes"]
    least = compiled("w4a8", "raspberry-pi-5", "--force", "--without", "mixed-precision")[0]["size_after_bytes"]
    limit = (least + 2 * most) // 3
    report, model = compiled("w4a8", "raspberry-pi-5", "--force", "--max-size", f"{limit}B")
    assert least < most
    assert report["size_after_bytes"] <= limit
    found = stored(model)
    assert found["INT4"] >= 1 and found["INT4"] < found.total()


def test_int8_for_a_gpu_is_written_as_tensorrt_reads_it(compiled):
    report, model = compiled("int8", "rtx-3090")
    assert report["backend"] == "tensorrt"
    zeros = [t for t in model.graph.initializer if t.name.endswith("zero_point")]
    assert zeros and not any(onnx.numpy_helper.to_array(t).any() for t in zeros)
    assert stored(model) == {"FLOAT": 3}
    assert sqnr(report) > 25


def test_fp16_for_a_gpu(compiled, tmp_path):
    report, model = compiled("fp16", "rtx-4060")
    assert (report["backend"], steps(report)) == ("tensorrt", [])
    assert stored(model) == {"FLOAT": 3}, "the backend casts by itself"
    assert sqnr(report) > 50
    assert report["fidelity"]["value"] == 100
    cast = onnx.load(tmp_path / "out" / "model-float16.onnx")
    assert stored(cast) == {"FLOAT16": 3}
    assert (report["attempts"][1]["precision"], report["calibration"]) == ("fp16", None)


@pytest.fixture
def wide(tmp_path):
    """The tiny classifier with 32 channels: TensorRT has FP8 kernels for more than 16."""
    model = conftest.classifier()
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        for axis, size in enumerate(array.shape):
            if size == 16:
                array = np.concatenate([array, array[::-1] if axis == 0 else array[:, ::-1]], axis) * (
                    0.7 if axis else 1
                )
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    onnx.save(model, tmp_path / "wide.onnx")
    return tmp_path / "wide.onnx"


def test_fp8_for_a_gpu_is_judged_although_nothing_here_computes_in_it(compiled, wide, tmp_path):
    report, model = compiled("fp8", "rtx-4060", model=wide)
    assert stored(model, 200) == {"FLOAT8E4M3FN": 1, "FLOAT": 1}  # the stem's three channels are too few
    assert report["calibration"]["method"] == "minmax"
    assert "ranges" not in steps(report)
    assert 15 < sqnr(report) < 60  # one layer of three bits of mantissa, averaged over the image
    assert any("FP8 was simulated" in w for w in report["warnings"])
    image = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    exact, got = (
        Session(path, threads=1, optimise=False).run({"image": image})["logits"]
        for path in (wide, tmp_path / "out" / "model.onnx")
    )
    assert 10 * np.log10((exact**2).sum() / ((exact - got) ** 2).sum()) > 15


def test_what_is_simulated_is_judged_without_fusions(compiled, wide, monkeypatch):
    """ONNX Runtime's rewrites take the zero of an 8-bit float for the end of its range."""
    fused = {}

    class Spy(trials.Session):
        def __init__(self, source, **options):
            fused[Path(source).name] = options.get("fuse_quantized", True)
            super().__init__(source, **options)

    monkeypatch.setattr(trials, "Session", Spy)
    compiled("fp8", "rtx-4060", model=wide)
    assert (fused["fp8.onnx"], fused["fp32.onnx"]) == (False, True)


def test_where_no_layer_can_take_what_was_asked_for_each_says_why(command, tiny, tmp_path):
    args = ("-o", tmp_path / "out", "--calib", tiny / "images", "--precision", "fp8", "--device", "rtx-4060", "--json")
    code, out, _ = command("compile", tiny / "model.onnx", *args)
    assert code == 0
    report = json.loads(out)
    assert (report["precision"], report["attempts"][0]["verdict"]) == ("fp32", "only exact passes ran")
    assert "no node of the model can be quantized: only exact passes ran" in report["warnings"]
    assert not any("simulated" in w for w in report["warnings"])
    told = {r["node"]: r["why"] for r in report["refusals"] if r["rule"] in ("enough-channels", "a-matrix")}
    assert set(told) == {"Conv_0", "Conv_3", "Gemm_9"}
    assert "no FP8 kernel" in told["Conv_0"]


@pytest.mark.parametrize(
    ("precision", "device", "says"),
    [
        ("fp8", "jetson-orin-nano-8gb", ("no FP8 units", "SM 8.9", "--precision int8")),
        ("fp8", "raspberry-pi-5", ("no FP8 kernels", "--precision int8")),
        ("int8", "jetson-nano", ("no INT8 units", "--precision fp16")),
        ("int4", "jetson-nano", ("no INT4 weights", "SM 8.0", "--precision fp16")),
        ("w4a8", "rtx-4060", ("no kernels for INT4 weights with INT8", "--precision int8")),
        ("w4a8", "jetson-nano", ("no kernels for INT4 weights with INT8", "--precision fp16")),
        ("fp16", "raspberry-pi-5", ("converts float16 to float32", "--precision int8")),
    ],
)
def test_what_the_device_cannot_run_is_refused_with_the_alternative(command, tiny, tmp_path, precision, device, says):
    args = ("-o", tmp_path / "out", "--calib", tiny / "images", "--precision", precision, "--device", device)
    code, out, err = command("compile", tiny / "model.onnx", *args)
    assert (code, out) == (2, "")
    for words in (*says, f"--precision {precision}", "fix:"):
        assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["int8", "w4a8"])
def test_activations_of_few_bits_need_images(command, tiny, tmp_path, precision):
    args = ("-o", tmp_path / "out", "--precision", precision, "--device", "raspberry-pi-5")
    code, _, err = command("compile", tiny / "model.onnx", *args)
    assert code == 2
    assert "needs images" in err and "--calib" in err


def test_weights_of_four_bits_need_none(command, tiny, tmp_path):
    args = ("-o", tmp_path / "out", "--precision", "int4", "--device", "raspberry-pi-5", "--json")
    code, out, _ = command("compile", tiny / "model.onnx", *args)
    assert code == 0
    report = json.loads(out)
    assert (report["precision"], report["fidelity"]) == ("int4", None)
    assert stored(onnx.load(tmp_path / "out" / "model.onnx")) == {"INT4": 3}


def test_a_model_that_gives_nan_is_refused_by_the_tensors_name(command, tiny, tmp_path):
    model = onnx.load(tiny / "model.onnx")
    (bias,) = [t for t in model.graph.initializer if t.name == "b1"]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(16, np.nan, np.float32), "b1"))
    onnx.save(model, tmp_path / "broken.onnx")
    args = ("-o", tmp_path / "out", "--calib", tiny / "images", "--precision", "int8", "--device", "raspberry-pi-5")
    code, out, err = command("compile", tmp_path / "broken.onnx", *args)
    assert (code, out) == (2, "")
    assert "holds NaN" in err and "fix:" in err and ".png" in err


def test_the_same_seed_gives_the_same_file(compiled, tmp_path):
    files = []
    for _ in range(2):
        compiled("w4a8", "raspberry-pi-5", "--force", "--seed", 3)
        files.append((tmp_path / "out" / "model.onnx").read_bytes())
    assert files[0] == files[1]


def test_an_unknown_precision_is_refused_in_python_too(tiny, tmp_path):
    with pytest.raises(UserError, match="unknown precision 'int3'") as caught:
        edgec.compile(tiny / "model.onnx", tmp_path / "out", precision="int3")
    assert "int8, fp8, int4, w4a8" in caught.value.fix
