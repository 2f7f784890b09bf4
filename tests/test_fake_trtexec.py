"""The trtexec that is none refuses what the real ones refuse: else the tests that use it would prove nothing."""

import json
import os
import subprocess

import fake_trtexec
import pytest
from trtexec_bench import QUANTIZED, Bench, image, save


@pytest.fixture
def bench(tmp_path):
    return lambda version=(10, 3, 0), **how: Bench(tmp_path, version, **how)


def refused(binary, *arguments):
    done = subprocess.run([binary, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ("&&&& FAILED" in done.stdout) == (done.returncode == 1)
    return done.stdout if done.returncode else None


@pytest.mark.parametrize(
    "version, flag",
    [
        ((8, 2, 1), "--skipInference"),
        ((8, 2, 1), "--memPoolSize=workspace:64"),
        ((8, 2, 1), "--fp8"),
        ((8, 2, 1), "--duration=0.5"),
        ((8, 5, 2), "--skipInference"),
        ((8, 5, 2), "--builderOptimizationLevel=3"),
        ((8, 5, 2), "--stronglyTyped"),
        ((8, 6, 2), "--int4"),
        ((8, 6, 2), "--includeDataTransfers"),
        ((10, 3, 0), "--workspace=64"),
        ((10, 3, 0), "--buildOnly"),
        ((10, 3, 0), "--noCudaGraph"),
        ((10, 13, 3), "--explicitBatch"),
        ((11, 1, 0), "--fp16"),
        ((11, 1, 0), "--int8"),
        ((11, 1, 0), "--calib=x"),
        ((11, 1, 0), "--best"),
        ((8, 2, 1), "--onnx"),
        ((8, 2, 1), "--useSpinWait=1"),
    ],
)
def test_the_fake_refuses_what_a_version_does_not_take(bench, version, flag):
    some = bench(version)
    assert refused(some.binary, "--loadEngine=none", flag).count("[E]") == 1


@pytest.mark.parametrize(
    "version, arguments, words",
    [
        ((8, 5, 2), ["--int8", "--shapes=x:1x3x8x8"], "Static model does not take explicit shapes"),
        ((8, 5, 2), [], "need the flag of their type"),
        ((8, 5, 2), ["--int8", "--fp16", "--timingCacheFile=bad"], "TimingCache creation failed"),
        ((10, 3, 0), ["--int8", "--fp8"], "aren't allowed to be enabled together"),
        ((10, 3, 0), ["--int8", "--stronglyTyped"], "precision flags in strong typing"),
        ((10, 3, 0), ["--int8", "--useDLACore=0"], "not available"),
    ],
)
def test_the_fake_refuses_what_does_not_go_together(bench, tmp_path, monkeypatch, version, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("no cache")
    some = bench(version)
    base = [f"--onnx={save(tmp_path / 'q.onnx', QUANTIZED)}", f"--saveEngine={tmp_path / 'e'}"]
    assert words in refused(some.binary, *base, *arguments)


def test_the_fake_reads_no_newer_opset_no_half_scale_and_no_int8_weight_on_8(bench, tmp_path):
    some = bench((8, 6, 2))
    base = ["--int8", "--buildOnly", f"--saveEngine={tmp_path / 'e'}"]
    half = QUANTIZED.replace("float s = {0.1}", "float16 s = {11878}")  # its bits
    weight = "<float s = {0.1}, int8 z = {0}, int8[2] w = {1, 2}> { d = DequantizeLinear(w, s, z) y = Add(x, d) }"
    two = "<float s = {0.1}> { q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = Relu(d) }"
    for body, opset, words in [
        (QUANTIZED, 13, None),
        (QUANTIZED, 19, "opset 19"),
        (half, 13, "scales must be float32"),
        (weight, 13, "only activation types allowed"),
        (two, 13, "three inputs"),
    ]:
        told = refused(some.binary, f"--onnx={save(tmp_path / 'm.onnx', body, opset=opset)}", *base)
        assert told is None if words is None else words in told


def test_quotes_are_part_of_a_name_for_inputs(bench):
    some = bench()
    some.build()
    folder = os.path.dirname(some.engine)
    with open(os.path.join(folder, "x.bin"), "wb") as file:
        file.write(image().data)
    load = [f"--loadEngine={some.engine}", "--iterations=1"]
    assert refused(some.binary, *load, f"--loadInputs=x:{folder}/x.bin") is None
    assert "Invalid tensor names" in refused(some.binary, *load, f"--loadInputs='x':{folder}/x.bin")
    assert "Unexpected file size" in refused(some.binary, *load, f"--loadInputs=x:{some.engine}")


def test_the_fakes_calls_are_kept(bench):
    some = bench()
    some.build()
    kept = fake_trtexec.calls(some.binary)
    assert len(kept) == 2 and all(isinstance(one, list) for one in kept) and json.dumps(kept)
