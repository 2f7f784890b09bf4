"""compile, bench and doctor on a device over SSH, and bundles that measure themselves when they are carried there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sshd
from edgec.compiler import devices, matching
from edgec.compiler.report import serial

needs_sshd = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))
#: A board with another processor than this machine's, so that nothing is measured here.
ELSEWHERE = "raspberry-pi-5" if devices.machine_arch() != "aarch64" else "x86-avx2"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An sshd; `environment` is what the command line gets to reach it as ssh://device."""
    folder = tmp_path_factory.mktemp("device")
    with sshd.running(folder) as one:
        # its own temporary folder: there the socket of the shared connection is
        one.environment = {"EDGEC_SSH": one.command, "TMPDIR": str(folder)}
        yield one


@pytest.fixture(scope="module")
def carried(tiny, tmp_path_factory, edgec) -> Path:
    """A bundle for a device that this machine is not."""
    out = tmp_path_factory.mktemp("carried") / "bundle"
    done = edgec("compile", tiny / "model.onnx", "-o", out, "--device", ELSEWHERE, "--calib", tiny / "images")
    assert done.returncode == 0, done.stderr
    assert f"python3 {out.name}/edgec-device.pyz" in done.stdout
    return out


def _alone(bundle, *words):
    return subprocess.run(
        [sys.executable, bundle / "edgec-device.pyz", *words], capture_output=True, text=True, timeout=120
    )


# ------------------------------------------------------------------------------------------- over SSH


@needs_sshd
def test_compile_measures_on_the_device(server, tiny, tmp_path, edgec):
    done = edgec(
        "compile", tiny / "model.onnx", "-o", tmp_path / "out", "--target", "ssh://device", "--calib", tiny / "images",
        "--threads", 1, "--json", env=server.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["target"] == "ssh://device" and report["result"]["median_ms"] > 0
    assert report["original"]["target"] == report["baseline"]["target"] == "ssh://device"
    assert all(a["measurement"]["median_ms"] for a in report["attempts"])
    assert serial.from_json(report).result.on_device is not None
    assert server.gone(), server.left()


@needs_sshd
def test_another_device_than_the_one_that_is_named_is_said_before_anything_is_done(server, tiny, tmp_path, edgec):
    for device in (ELSEWHERE, "jetson-orin-nano-8gb"):
        done = edgec(
            "compile", tiny / "model.onnx", "-o", tmp_path / "out", "--target", "ssh://device", "--device", device,
            env=server.environment,
        )  # fmt: skip
        assert done.returncode == 2 and "devices.yaml says" in done.stderr and "fix:" in done.stderr
        assert not (tmp_path / "out").exists() and server.gone()


@needs_sshd
def test_a_backend_that_the_device_lacks_is_said_before_anything_is_done(server, tiny, tmp_path, edgec):
    done = edgec(
        "compile", tiny / "model.onnx", "-o", tmp_path / "out", "--target", "ssh://device", "--backend", "tensorrt",
        env=server.environment,
    )  # fmt: skip
    assert done.returncode == 4 and "the device has no TensorRT" in done.stderr
    assert server.gone()


@needs_sshd
def test_latency_cannot_be_saved_where_no_layer_is_timed(server, tiny, tmp_path, edgec):
    done = edgec(
        "compile", tiny / "model.onnx", "-o", tmp_path / "out", "--target", "ssh://device", "--calib", tiny / "images",
        "--prune", "latency:20%", env=server.environment,
    )  # fmt: skip
    assert done.returncode == 2 and "layers are timed on this machine only" in done.stderr
    assert "macs:30%" in done.stderr and server.gone()


@needs_sshd
def test_bench_compares_two_files_on_the_device(server, tiny, bundle, edgec):
    done = edgec(
        "bench", tiny / "model.onnx", "--against", tiny / "model.onnx", "--target", "ssh://device", "--seconds", 0.5,
        "--threads", 1, "--json", env=server.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, base = json.loads(done.stdout)["measurements"]
    assert one["target"] == "ssh://device" and 0.6 < one["speedup"] < 1.6 and base["speedup"] is None


@needs_sshd
def test_bench_measures_a_bundle_with_the_baseline_that_it_carries(server, carried, edgec):
    class_of_this = matching.device_of({"arch": devices.machine_arch(), "cpu": {"features": _flags()}})
    done = edgec(
        "bench", carried, "--target", "ssh://device", "--device", class_of_this, "--seconds", 0.5, "--json",
        env=server.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [m["name"] for m in json.loads(done.stdout)["measurements"]]
    assert names == [carried.name, "fp32 (baseline)"]


def _flags():
    text = Path("/proc/cpuinfo").read_text()
    line = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return line.partition(":")[2].split()


@needs_sshd
def test_doctor_tells_what_the_device_is(server, edgec):
    done = edgec("doctor", "--target", "ssh://device", env=server.environment)
    assert done.returncode == 0 and "The device behind ssh://device" in done.stdout
    for name in ("machine", "python", "memory", "disk", "onnxruntime", "load"):
        assert f"  {name} " in done.stdout


def test_a_device_out_of_reach_is_exit_4(tiny, tmp_path, edgec):
    for verb in (("bench", tiny / "model.onnx"), ("doctor",), ("compile", tiny / "model.onnx", "-o", tmp_path / "o")):
        done = edgec(*verb, "--target", "ssh://no-such-host.invalid")
        assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
        assert "host name is not known" in done.stderr or "no ssh here" in done.stderr


# ------------------------------------------------------------------------------------------- carried by hand


def test_a_carried_bundle_measures_itself_and_the_report_takes_it_in(carried, tmp_path, edgec):
    bundle = shutil.copytree(carried, tmp_path / "bundle")
    before = json.loads((bundle / "report.json").read_text())
    assert before["result"]["median_ms"] is None and before["result"]["reason"]
    done = _alone(bundle, "--seconds", "0.5")
    assert done.returncode == 0, done.stderr
    assert "result" in done.stdout and "CPUExecutionProvider" in done.stdout
    assert sorted(p.name for p in bundle.iterdir() if p.name not in os.listdir(carried)) == ["measurement.json"]
    joined = edgec("bench", bundle, "--json")
    assert joined.returncode == 0, joined.stderr
    result, base = json.loads(joined.stdout)["measurements"]
    assert result["median_ms"] > 0 and base["name"] == "fp32" and result["speedup"] > 0
    after = serial.from_json(json.loads((bundle / "report.json").read_text()))
    assert after.result.median_ms == result["median_ms"] and after.baseline.median_ms == base["median_ms"]
    assert after.target == result["target"] and "not measured" not in after.headline
    shown = edgec("inspect", bundle)
    assert shown.returncode == 0 and "not measured" not in shown.stdout.split("Quality")[0].split("original")[0]


def test_a_measurement_of_another_model_is_not_taken(carried, tmp_path, edgec):
    bundle = shutil.copytree(carried, tmp_path / "bundle")
    assert _alone(bundle, "--seconds", "0.2").returncode == 0
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    done = edgec("bench", bundle)
    assert done.returncode == 2 and "it was measured of another model.onnx" in done.stderr


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"result": {"models": {}}, "probe": {}, "sha256": {}}'])
def test_a_damaged_measurement_is_said(carried, tmp_path, edgec, text):
    bundle = shutil.copytree(carried, tmp_path / "bundle")
    (bundle / "measurement.json").write_text(text)
    done = edgec("bench", bundle)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "fix:" in done.stderr, done.stderr


def test_a_jetson_bundle_has_both_artifacts_and_says_what_the_device_lacks(tiny, tmp_path, edgec):
    out = tmp_path / "jetson"
    done = edgec(
        "compile", tiny / "model.onnx", "-o", out, "--device", "jetson-orin-nano-8gb", "--calib", tiny / "images"
    )
    assert done.returncode == 0, done.stderr
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["baseline"] == "fp16" and [m["name"] for m in recipe["models"]] == ["result", "fp32", "fp16"]
    for model in recipe["models"]:
        assert all((out / name).is_file() for name in model["files"].values())
    assert set(recipe["models"][0]["files"]) == set(recipe["models"][2]["files"]) == {"weak", "strong"}
    alone = _alone(out)
    if "neither a TensorRT for its python3 nor trtexec" not in alone.stderr:
        pytest.skip("this machine has TensorRT")
    assert alone.returncode == 4 and "nvidia-jetpack" in alone.stderr
    assert not (out / "measurement.json").exists()


def test_a_program_without_its_bundle_says_where_it_belongs(carried, tmp_path):
    shutil.copy(carried / "edgec-device.pyz", tmp_path)
    done = _alone(tmp_path)
    assert done.returncode == 2 and "in a bundle" in done.stderr
