"""Which TensorRT wants what, what its log says of failures, and what an engine is tied to."""

import json
import os
import subprocess
import sys

import pytest
from edgec.backends.agent import tensorrt_identity, tensorrt_log, tensorrt_rules
from edgec.backends.agent.cudart import Cuda
from edgec.backends.agent.faults import Fault
from edgec.backends.agent.tensorrt_log import Layer
from tensorrt_standin import VERSIONS, make, path_for
from tensorrt_standin.models import files


@pytest.mark.parametrize(
    ("version", "typing"),
    [
        ((8, 2, 1), "weak"),
        ((8, 6, 2), "weak"),
        ((9, 3, 0), "weak"),
        ((10, 3, 0), "weak"),
        ((10, 11, 0), "weak"),
        ((10, 12, 0, 36), "strong"),
        ((10, 16, 1), "strong"),
        ((11, 4, 1), "strong"),
    ],
)
def test_typing_by_version(version, typing):
    assert tensorrt_rules.typing_of(version) == typing


def test_typing_that_is_asked_for():
    assert tensorrt_rules.typing_of((9, 0), "strong") == "strong"
    assert tensorrt_rules.typing_of((10, 16), "weak") == "weak"
    for version, typing in (((8, 6), "strong"), ((11, 0), "weak"), ((10, 0), "mixed")):
        with pytest.raises(Fault):
            tensorrt_rules.typing_of(version, typing)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("10.3.0.26", (10, 3, 0, 26)),
        ("8.5.2-1+cuda11.4", (8, 5, 2)),
        ("11.1.0", (11, 1, 0)),
        ("8.2.1.post1", (8, 2, 1)),
    ],
)
def test_versions_are_read(text, numbers):
    assert tensorrt_rules.parse(text) == numbers
    with pytest.raises(Fault):
        tensorrt_rules.parse("none")


@pytest.mark.parametrize(
    ("precision", "sm", "instead"),
    [
        ("int8", (5, 3), "fp16"),
        ("int8", (6, 2), "fp16"),
        ("fp8", (8, 7), "int8"),
        ("fp8", (6, 2), "fp16"),
        ("int4", (7, 5), "int8"),
        ("fp16", (5, 2), "fp32"),
    ],
)
def test_what_a_device_lacks_is_said_with_what_to_use(precision, sm, instead):
    with pytest.raises(Fault, match=precision.upper()) as caught:
        tensorrt_rules.check_precision((10, 3, 0), precision, sm)
    assert caught.value.fix == f"use --precision {instead}"


def test_what_a_device_has():
    for precision, sm in (("int8", (7, 2)), ("fp8", (8, 9)), ("fp8", (12, 0)), ("int4", (8, 7)), ("fp16", (5, 3))):
        tensorrt_rules.check_precision((10, 3, 0), precision, sm)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tables_agree_with_the_standins(version):
    # two readings of the same sources: ours for the device, and the tests' own
    trt, numbers = make(version), tensorrt_rules.parse(version)
    for name, span in tensorrt_rules.PRECISION_FLAGS.items():
        assert hasattr(trt.BuilderFlag, name) == tensorrt_rules.within(numbers, span), name
    assert hasattr(trt, "IProgressMonitor") == tensorrt_rules.has(numbers, "progress_monitor")
    for name in ("builder_optimization_level", "max_aux_streams"):
        assert hasattr(trt.IBuilderConfig, name) == tensorrt_rules.has(numbers, name)
    strong = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    assert strong == tensorrt_rules.within(numbers, tensorrt_rules.STRONG)
    assert hasattr(trt.BuilderFlag, "FP16") == tensorrt_rules.within(numbers, tensorrt_rules.WEAK)


def test_a_flag_that_is_missing_is_a_fault():
    trt = make("11.1.0")
    with pytest.raises(Fault, match=r"TensorRT 11.1.0 has no BuilderFlag.FP16"):
        tensorrt_rules.member(trt.BuilderFlag, "FP16", (11, 1, 0))
    old, new = make("10.3.0").NetworkDefinitionCreationFlag, trt.NetworkDefinitionCreationFlag
    assert tensorrt_rules.bits(old, ("STRONGLY_TYPED",), (10, 3)) == 2
    assert tensorrt_rules.bits(new, ("STRONGLY_TYPED",), (11, 1)) == 1


# ------------------------------------------------------------------------------------------------ the log

LAYERS = [
    Layer(name, (name,)) for name in ("/a/Conv", "/a/Add", "/b/Sigmoid", "/b/Mul", "/c/MatMul", "/cc/MatMul", "d.1")
]
NO = "Could not find any implementation for node "


@pytest.mark.parametrize(
    ("line", "nodes"),
    [
        (f"10: {NO}a.weight + a.weight_QuantizeLinear + /a/Conv + /a/Add.", ["/a/Conv", "/a/Add"]),
        (f"10: [optimizer.cpp::computeCosts::3869] Error Code 10: Internal Error ({NO}/a/Conv.)", ["/a/Conv"]),
        (f"{NO}/a/Conv + PWN(PWN(/b/Sigmoid), /b/Mul).", ["/a/Conv", "/b/Sigmoid", "/b/Mul"]),
        (f"Error Code 10: Internal Error ({NO}{{ForeignNode[/a/Add...(Unnamed Layer* 3) [Shuffle]]}}.)", ["/a/Add"]),
        (f"Error Code 10: ({NO}{{ForeignNode[/a/Add...d.1]}}.)", [one.name for one in LAYERS[1:]]),
        (f"{NO}/cc/MatMul due to insufficient workspace. See verbose log for requested sizes.", ["/cc/MatMul"]),
        (f"{NO}d.1.", ["d.1"]),
        (f"{NO}d.12 + e.", ["d.12", "e"]),  # not in the network: what is joined there, as it is
    ],
)
def test_nodes_are_found_in_the_log(line, nodes):
    fault = tensorrt_log.build_fault("10.3.0", ["something else", line], [], LAYERS)
    assert fault.nodes == nodes
    assert "Could not find any implementation" in fault.what and "::" not in fault.what


def test_memory_that_was_short_is_said():
    warned = ["Tactic Device request: 3203MB Available: 2045MB. Device memory is insufficient to use tactic."]
    fault = tensorrt_log.build_fault("8.6.2", [f"{NO}/a/Conv."], warned, LAYERS)
    assert fault.nodes == ["/a/Conv"] and "memory was short" in fault.fix
    assert "does not say why" in tensorrt_log.build_fault("8.6.2", [], [], LAYERS).what


def test_the_log_keeps_what_matters():
    trt = make("10.3.0")
    log = tensorrt_log.logger(trt)
    assert tensorrt_log.logger(trt) is log and tensorrt_log.logger(make("10.3.0")) is not log
    severity = trt.ILogger.Severity
    log.log(severity.INFO, "nothing")
    log.log(severity.WARNING, "early")
    mark = len(log.lines)
    for _ in range(3):
        log.log(severity.WARNING, "again")
    log.log(severity.INTERNAL_ERROR, "worst")
    log.log(severity.ERROR, "bad")
    assert tensorrt_log.errors(log, mark) == ["worst", "bad"]
    assert tensorrt_log.warnings(log, mark) == ["again"]


def test_layers_come_with_their_nodes_from_metadata_or_names():
    class Network:
        num_layers = 1

        def __init__(self, **said):
            self.layer = type("L", (), said)

        def get_layer(self, n):
            return self.layer

    assert tensorrt_log.layers_of(Network(name="x", metadata="[ONNX Layer: /a/Conv]"))[0].nodes == ("/a/Conv",)
    assert tensorrt_log.layers_of(Network(name="/a/Conv"))[0].nodes == ("/a/Conv",)


# ------------------------------------------------------------------------------------------------ identity


def tree(root, **texts):
    for path, text in texts.items():
        file = root / path.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(root)


def identity(root, version="10.3.0", **options):
    trt = make(version, **options)
    return tensorrt_identity.identity(trt, Cuda(trt.standin.libcudart), root)


def test_a_jetsons_identity(tmp_path):
    root = tree(
        tmp_path,
        **{
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
        },
    )
    found = identity(root)
    assert found["device"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (found["tensorrt"], found["sm"], found["driver"], found["cuda"]) == ("10.3.0", "8.7", "L4T 36.4.3", "12.6")
    assert found["os"] == "Linux" and found["arch"]


def test_a_cards_identity(tmp_path):
    root = tree(
        tmp_path,
        **{
            "proc/device-tree/model": "Some Board",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n",
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ: 1\n",
        },
    )
    found = identity(root, "11.1.0", sm=8.9)
    assert (found["device"], found["driver"]) == ("NVIDIA GeForce RTX 4090", "535.104.05")


def test_what_is_not_told_is_unknown(tmp_path):
    found = identity(str(tmp_path))
    assert found["device"] == found["driver"] == "unknown"
    assert tensorrt_identity.mismatch(found, found) is None


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("tensorrt", "8.6.2", "the engine was built for TensorRT 8.6.2, and here it is 10.3.0"),
        ("sm", "7.2", "the engine was built for compute capability 7.2, and here it is 8.7"),
        ("driver", "L4T 35.1", "the engine was built for the driver L4T 35.1, and here it is unknown"),
        ("arch", "vax", "the engine was built for the processor's architecture vax, and here it is"),
        ("device", "Orin NX", "the engine was built for the GPU Orin NX, and here it is unknown"),
    ],
)
def test_why_an_engine_is_built_again(tmp_path, key, value, sentence):
    here = identity(str(tmp_path))
    assert tensorrt_identity.mismatch({**here, key: value}, here).startswith(sentence)
    saved = dict(here)
    del saved[key]
    assert (tensorrt_identity.mismatch(saved, here) is None) == (here[key] == "unknown")


# ------------------------------------------------------------------------------------------------ another process

RUN = """
import json, sys
from edgec.backends.agent import engines
from edgec.backends.agent.tensors import Tensor
said = json.loads(sys.argv[1])
job = {"feed": {"x": {"shape": [2, 3, 8, 8]}}}
one = engines.open_model({"name": "m", "runtime": "tensorrt", **said}, job, lambda *_: None)
one.feed({"x": Tensor("float32", [2, 3, 8, 8], bytes(4 * 2 * 3 * 64))})
facts = one.facts["built"]
print(json.dumps([one.provider, one.sample(), facts["version"], facts["identity"]["sm"], facts["flags"]]))
"""


def in_a_process(folder, version, overrides=None, **options):
    weak, strong = files(folder, "int8")
    said = {"files": {"weak": weak, "strong": strong}, "options": {"precision": "int8"}}
    said["options"]["shapes"] = {"x": [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]}
    path = folder / "path"
    path.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": path_for(version, str(path), **options), "OPENBLAS_NUM_THREADS": "1"}
    env["STANDIN_TENSORRT"] = json.dumps(overrides or {})
    command = [sys.executable, "-c", RUN, json.dumps(said)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=120)


@pytest.mark.parametrize(("version", "flags"), [("8.6.2", ["INT8", "FP16"]), ("11.1.0", [])])
def test_another_process_finds_tensorrt_and_cuda(tmp_path, version, flags):
    done = in_a_process(tmp_path, version, {"ms": {"int8": 3.0}})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [f"TensorRT {version}", [3.0], version, "8.7", flags]


def test_another_process_may_fail_or_die(tmp_path):
    assert in_a_process(tmp_path, "10.3.0", {"crash": "run"}).returncode == 139
    (tmp_path / "other").mkdir()
    done = in_a_process(tmp_path / "other", "10.3.0", no_kernel_for=["n_c1"], sm=8.9)
    assert done.returncode == 1 and "Could not find any implementation for node n_c1" in done.stderr
