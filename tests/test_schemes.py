"""Which precision a backend has on a device, the reasons where it has not, and what a compile makes of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from edgec.backends import base, ort, tensorrt
from edgec.compiler import devices, job
from edgec.compiler.errors import DataError, UserError
from edgec.compiler.options import PRECISIONS, Options
from edgec.compiler.types import FloatScheme, QuantScheme

PROFILES = devices.load_profiles()
BACKENDS = {"ort": ort.OnnxRuntime(), "tensorrt": tensorrt.TensorRT()}
#: What float types are called in a device's list.
TENSORRT = {
    "jetson-nano": {"fp32", "fp16"},
    "jetson-tx2": {"fp32", "fp16"},
    "jetson-xavier-nx": {"fp32", "fp16", "int8"},
    "jetson-orin-nano-8gb": {"fp32", "fp16", "int8", "int4"},
    "jetson-agx-thor": {"fp32", "fp16", "int8", "int4", "fp8"},
    "t4": {"fp32", "fp16", "int8"},
    "a100-40gb": {"fp32", "fp16", "int8", "int4"},
    "l4": {"fp32", "fp16", "int8", "int4", "fp8"},
}


def schemes(backend: str, device: str):
    return BACKENDS[backend].schemes(PROFILES[device])


def had(found) -> set[str]:
    return {name for name, scheme in found.items() if not isinstance(scheme, str)}


def test_backends_answer_for_every_precision_of_the_command_line():
    assert set(base.SCHEMED) == set(PRECISIONS) - {"auto"}


@pytest.mark.parametrize("device", PROFILES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_device_has_an_answer_for_every_precision(backend, device):
    found = schemes(backend, device)
    assert tuple(found) == base.SCHEMED
    assert found["fp32"] == base.FLOAT32
    assert isinstance(found["fp16"], FloatScheme | str)
    for name in ("int8", "fp8", "int4", "w4a8"):
        assert isinstance(found[name], QuantScheme | str)
    for name, scheme in found.items():
        if isinstance(scheme, str):
            assert "; use " in scheme, f"{name}: the reason names no alternative"
            if "--precision" in scheme:  # which must itself be there
                assert scheme.rpartition("--precision ")[2] in had(found), scheme


@pytest.mark.parametrize(("device", "precisions"), TENSORRT.items())
def test_tensorrt_by_compute_capability(device, precisions):
    assert had(schemes("tensorrt", device)) == precisions


def test_cpus_have_no_fp8_and_no_fp16():
    for device in ("x86-avx2", "x86-avx512-vnni", "raspberry-pi-5", "arm64-neon"):
        assert had(schemes("ort", device)) == {"fp32", "int8", "int4", "w4a8"}


@pytest.mark.parametrize(
    ("device", "precision", "words"),
    [
        ("a100-40gb", "fp8", "(SM 8) has no FP8 units, which came with SM 8.9; use --precision int8"),
        ("jetson-nano", "int8", "(SM 5.3) has no INT8 units; use --precision fp16"),
        ("jetson-tx2", "int8", "(SM 6.2) has no INT8 units; use --precision fp16"),
        ("t4", "int4", "(SM 7.5) has no INT4 weights, which came with SM 8.0; use --precision int8"),
    ],
)
def test_the_reason_says_what_is_missing_and_what_to_take(device, precision, words):
    assert schemes("tensorrt", device)[precision] == f"{PROFILES[device].title} {words}"


def test_tensorrt_before_10_reads_no_int4_and_no_fp8():
    profile = replace(PROFILES["jetson-agx-thor"], toolchain={"tensorrt": "8.6.2"})
    found = BACKENDS["tensorrt"].schemes(profile)
    assert had(found) == {"fp32", "fp16", "int8"}
    assert found["int4"].startswith("TensorRT 8.6.2, which")
    assert found["fp8"].endswith("use --precision int8")


def test_w4a8_is_int8_with_other_weights():
    for device in ("x86-avx512-vnni", "x86-avx2", "raspberry-pi-5"):
        found = schemes("ort", device)
        int8, w4a8 = found["int8"], found["w4a8"]
        assert replace(w4a8, name=int8.name, weight="int8", weight_max=int8.weight_max) == int8
        assert (w4a8.weight, w4a8.weight_max, w4a8.weight_max_8bit) == ("int4", 7, int8.weight_max)


# ------------------------------------------------------------------------------------------ a compile's choice


def asked(precision: str, device: str = "x86-avx512-vnni", backend: str = "ort", images: object = "some"):
    return SimpleNamespace(
        options=Options(precision=precision), backend=BACKENDS[backend], profile=PROFILES[device], images=images
    )


def test_auto_is_int8_where_it_can_be():
    assert job.quant_scheme(asked("auto")) == schemes("ort", "x86-avx512-vnni")["int8"]
    assert job.quant_scheme(asked("auto", images=None)) is None
    assert job.quant_scheme(asked("auto", "jetson-nano", "tensorrt")) is None


@pytest.mark.parametrize("precision", ["int8", "int4", "w4a8"])
def test_a_named_precision_is_taken(precision):
    assert job.quant_scheme(asked(precision)) == schemes("ort", "x86-avx512-vnni")[precision]


def test_floats_are_no_quantization():
    assert job.quant_scheme(asked("fp32")) is None
    assert not job.wants_float16(asked("fp32"))
    assert job.quant_scheme(asked("fp16", "t4", "tensorrt")) is None
    assert job.wants_float16(asked("fp16", "t4", "tensorrt"))


def test_weights_only_needs_no_images():
    assert job.quant_scheme(asked("int4", images=None)).activation is None
    for precision in ("int8", "w4a8"):
        with pytest.raises(DataError, match=f"{precision.upper()} needs images"):
            job.quant_scheme(asked(precision, images=None))


@pytest.mark.parametrize(
    ("precision", "device", "backend", "words"),
    [
        ("fp8", "a100-40gb", "tensorrt", "came with SM 8.9; use --precision int8"),
        ("int8", "jetson-nano", "tensorrt", "no INT8 units; use --precision fp16"),
        ("fp8", "x86-avx512-vnni", "ort", "no CPU computes in FP8; use --precision int8"),
        ("w4a8", "l4", "tensorrt", "no kernels for INT4 weights with INT8 activations; use --precision int8"),
    ],
)
def test_what_the_device_cannot_run_is_refused(precision, device, backend, words):
    with pytest.raises(UserError, match=words) as refused:
        job.scheme(asked(precision, device, backend))
    assert refused.value.where == f"--precision {precision}"


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="unknown precision 'int7'"):
        job.check_precision(Options(precision="int7"))
    for precision in PRECISIONS:
        job.check_precision(Options(precision=precision))
