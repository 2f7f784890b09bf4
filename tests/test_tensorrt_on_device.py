"""compile and bench with TensorRT on a device: over SSH, by a trtexec that is none but as strict as one of its version.

No engine computes anything here: what is tested is that the right files are built by the right flags, that what is
built comes back, and what happens where something fails.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import board_trees
import fake_trtexec
import pytest
import sshd
import tensorrt_standin

pytestmark = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))


@pytest.fixture
def device(tmp_path, edgec):
    """Start a device with a card and a trtexec of a version; `run(...)` is the command line with that target."""
    servers = []

    def start(version, module=False, **how):
        folder = tmp_path / f"device{len(servers)}"
        folder.mkdir()
        dotted, site = ".".join(map(str, version)), _made(tmp_path / f"site{len(servers)}")
        site = tensorrt_standin.path_for(dotted, site, **how) if module else ""
        server = sshd.Sshd(folder, before=f"PYTHONPATH={site}; export PYTHONPATH" if module else "")
        servers.append(server)
        board_trees.smi(server.bin, board_trees.CARD, "")
        card = {"sm": 8.9, "device": "NVIDIA GeForce RTX 4090", "memory": 24564}
        binary = "" if module else fake_trtexec.make(server.bin, version, **card, **how)
        environment = {"EDGEC_SSH": server.command, "TMPDIR": str(folder), "XDG_CACHE_HOME": str(tmp_path / "cache")}

        def run(*words):
            done = edgec(*words, "--target", "ssh://device", env=environment)
            assert server.gone(), server.left()
            return done

        return SimpleNamespace(run=run, calls=lambda: fake_trtexec.calls(binary), bin=server.bin)

    yield start
    for server in servers:
        server.close()


def _compile(device, tiny, out, *words):
    return device.run(
        "compile", tiny / "model.onnx", "-o", out, "--device", "rtx-4090", "--calib", tiny / "images", "--json", *words
    )


def _builds(device):
    return [call for call in device.calls() if any(word.startswith("--saveEngine") for word in call)]


@pytest.mark.parametrize(("version", "typed"), [((8, 6, 2), False), ((10, 3, 0), False), ((10, 13, 3), True)])
def test_what_is_built_measured_and_brought_back(device, tiny, tmp_path, version, typed):
    there, out = device(version), tmp_path / "out"
    done = _compile(there, tiny, out, "--precision", "int8", "--max-drop", "50%")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["precision"] == "int8" and report["baseline"]["name"] == "fp16"
    assert {a["name"] for a in report["attempts"]} == {"fp16", "fp32", "int8"}
    assert all(a["measurement"]["median_ms"] > 0 for a in report["attempts"])
    assert all(a["measurement"]["on_device"]["engine"] for a in report["attempts"])
    flags = [{word.partition("=")[0] for word in call} for call in _builds(there)]
    assert any({"--int8", "--fp16"} <= some for some in flags) is not typed
    assert any("--stronglyTyped" in some for some in flags) is typed
    said = json.loads((out / "model.engine.json").read_text())
    assert said["typing"] == ("strong" if typed else "weak") and said["identity"]["device"].endswith("RTX 4090")
    assert (out / "model.engine").stat().st_size == said["bytes"]
    assert list((tmp_path / "cache" / "edgec" / "tensorrt").glob("*.cache")), "the timing cache was not kept"
    assert not (out / "timing.cache").exists()
    assert any(layer["latency_ms"] for layer in report["layers"])


@pytest.mark.parametrize("version", [(8, 6, 2), (10, 13, 3), (11, 1, 0)])
def test_the_same_by_the_python_module(device, tiny, tmp_path, version):
    there, out = device(version, module=True, sm=8.9, no_int8_for=["Conv_3"]), tmp_path / "out"
    done = _compile(there, tiny, out, "--precision", "int8", "--max-drop", "50%")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["baseline"]["name"] == "fp16" and report["precision"] == "int8"
    assert report["result"]["on_device"]["throughput"] > 0 and report["result"]["on_device"]["with_copies_ms"] > 0
    assert any("Conv_3 left in float" in step["detail"] for step in report["steps"])
    said = json.loads((out / "model.engine.json").read_text())
    assert said["with"] == "python" and said["typing"] == ("weak" if version < (10, 12) else "strong")
    again = there.run("bench", out, "--builds", 2, "--seconds", 0.5, "--json")
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)["measurements"][0]["on_device"]
    assert told["engine"] == "the bundle's own engine" and len(told["builds_ms"]) == 1


def test_a_module_that_crashes_while_it_builds_is_a_sentence(device, tiny, tmp_path):
    done = _compile(device((10, 3, 0), module=True, sm=8.9, crash="build"), tiny, tmp_path / "out")
    assert done.returncode == 4 and "the program on the device broke down" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_bundles_engine_is_opened_where_it_was_built_and_nowhere_else(device, tiny, tmp_path):
    there, out = device((10, 3, 0)), tmp_path / "out"
    assert _compile(there, tiny, out, "--precision", "int8", "--max-drop", "50%").returncode == 0
    built = len(_builds(there))
    done = there.run("bench", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measurements"][0]["on_device"]["engine"] == "the bundle's own engine"
    assert len(_builds(there)) == built
    newer = device((10, 13, 3))
    done = newer.run("bench", out, "--json")
    assert done.returncode == 0, done.stderr
    engine = json.loads(done.stdout)["measurements"][0]["on_device"]["engine"]
    assert "built for TensorRT 10.3.0, and here it is 10.13.3" in engine and len(_builds(newer)) == 1


def test_an_engine_is_opened_for_the_model_it_was_built_from_alone(device, tiny, tmp_path, edgec, monkeypatch):
    out = tmp_path / "bundle"
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
        done = edgec("compile", tiny / "model.onnx", "-o", out, "--device", "rtx-4090", "--calib", tiny / "images")
    assert done.returncode == 0 and (out / "recipe.json").is_file(), done.stderr
    there = device((10, 3, 0))
    # the bundle's own program, in an environment like the device's
    environment = {**os.environ, "PATH": f"{there.bin}:/usr/bin:/bin"}
    alone = subprocess.run([sys.executable, out / "edgec-device.pyz"], env=environment, capture_output=True, text=True)
    assert alone.returncode == 0 and (out / "model.engine").is_file(), alone.stderr
    built = len(_builds(there))
    found = json.loads(there.run("bench", out, "--json").stdout)["measurements"]
    engines = {m["name"].split(" ")[0]: m["on_device"]["engine"] for m in found}
    assert engines["bundle"] == "the bundle's own engine"
    assert engines["fp16"].startswith("TensorRT 10.3.0") and engines["fp32"].startswith("TensorRT 10.3.0")
    assert len(_builds(there)) == built + 2


@pytest.mark.parametrize("names", [True, False])
def test_a_layer_without_a_kernel_is_left_in_float_and_said(device, tiny, tmp_path, names):
    there = device((8, 6, 2), no_int8=["Conv_3"], names=names)
    done = _compile(there, tiny, tmp_path / "out", "--precision", "int8", "--max-drop", "50%")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (step,) = [step for step in report["steps"] if step["name"] == "buildable"]
    assert "Conv_3 left in float" in step["detail"] and "Could not find any implementation" in step["detail"]
    assert report["precision"] == "int8" and report["result"]["median_ms"] > 0


def test_what_does_not_build_at_all_is_exit_4_with_the_reason(device, tiny, tmp_path):
    there = device((8, 6, 2), parse="Conv_0")
    done = _compile(there, tiny, tmp_path / "out")
    assert done.returncode == 4 and "Conv_0" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_trtexec_that_crashes_is_a_sentence(device, tiny, tmp_path):
    there = device((8, 6, 2), signal=11)
    done = _compile(there, tiny, tmp_path / "out")
    assert done.returncode == 4 and "Traceback" not in done.stderr and "ended by signal 11" in done.stderr


def test_a_desktop_is_the_same_without_ssh(tiny, tmp_path, edgec):
    board_trees.smi(_made(tmp_path / "bin"), board_trees.CARD, "")
    fake_trtexec.make(tmp_path / "bin", (11, 1, 0), sm=8.9, device="NVIDIA GeForce RTX 4090", memory=24564)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "TMPDIR": str(_made(tmp_path / "tmp"))}
    out = tmp_path / "out"
    done = edgec(
        "compile", tiny / "model.onnx", "-o", out, "--device", "rtx-4090", "--calib", tiny / "images", "--json",
        "--precision", "int8", "--max-drop", "50%", env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["target"] == "local" and report["backend"] == "tensorrt" and report["precision"] == "int8"
    assert report["device"]["toolchain"]["cuda"] and (out / "model.engine").is_file()
    code = (
        "import sys, edgec, numpy; bundle = edgec.open_bundle(sys.argv[1]);"
        "print(bundle.run({'image': numpy.zeros((1, 3, 16, 16), 'float32')})['logits'].shape)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, out], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert ran.stdout.strip() == "(1, 4)", ran.stderr
    left = [p.name for p in (tmp_path / "tmp").glob("edgec-*") if p.suffix != ".lock"]
    assert not left, left


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_a_carried_bundle_builds_and_measures_itself(device, tiny, tmp_path, edgec, monkeypatch):
    out = tmp_path / "jetson"
    done = edgec(
        "compile", tiny / "model.onnx", "-o", out, "--device", "jetson-orin-nano-8gb", "--calib", tiny / "images"
    )
    assert done.returncode == 0, done.stderr
    binary = fake_trtexec.make(tmp_path / "bin", (10, 3, 0))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    alone = subprocess.run([sys.executable, out / "edgec-device.pyz"], capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr + alone.stdout
    assert len(fake_trtexec.calls(binary)) > 3 and (out / "model.engine").is_file()
    joined = edgec("bench", out, "--json")
    assert joined.returncode == 0, joined.stderr
    measured = json.loads(joined.stdout)["measurements"]
    assert [m["name"] for m in measured] == ["result", "fp32", "fp16"] and all(m["median_ms"] for m in measured)
    report = json.loads((out / "report.json").read_text())
    assert report["baseline"]["name"] == "fp16"
    assert report["result"]["on_device"]["engine"].startswith("TensorRT 10.3.0")
    shutil.rmtree(out)
