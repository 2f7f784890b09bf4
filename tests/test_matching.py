"""Whether what was probed is the device that was named, and the doctor's words for it."""

import dataclasses
import itertools

import board_trees
import pytest
from edgec.backends.agent import probe
from edgec.compiler import device_findings, devices, matching
from edgec.compiler.findings import Finding
from edgec.compiler.types import DeviceProfile

PROFILES = devices.load_profiles()
GIB = 2**30
#: What a probe of a machine without a device tree holds.
X86 = {
    "arch": "x86_64", "bits": 64, "python": "3.11.2", "memory_bytes": 31.2 * GIB,
    "unknown": {"gpus": "no nvidia-smi"},
    "cpu": {
        "model": "Intel(R) Core(TM) i7-12700K", "features": ["fpu", "avx2", "avx_vnni"], "cores": 12, "threads": 20,
    },
}  # fmt: skip


def card(name, memory=24564 * 2**20, sm=8.9):
    one = {"name": name, "compute_capability": str(sm), "driver": "570.86.15", "memory_bytes": memory}
    return {**X86, "gpus": [one], "sm": sm, "driver": "570.86.15"}


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Return a function that probes a folder as the Arm machine that it stands for."""
    board_trees.only_programs(monkeypatch, tmp_path / "bin")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")

    count = itertools.count()

    def probed(files, **changes):
        return {**probe.probe(board_trees.plant(tmp_path / f"root{next(count)}", files)), **changes}

    return probed


BOARDS = {
    "jetson-nano": board_trees.NANO,
    "jetson-xavier-nx": board_trees.XAVIER_NX,
    "jetson-orin-nano-8gb-super": board_trees.ORIN_NANO,
    "jetson-orin-nx-16gb": board_trees.ORIN_NX,
    "jetson-agx-orin-64gb": board_trees.AGX_ORIN,
    "jetson-agx-thor": board_trees.THOR,
    "raspberry-pi-4": board_trees.PI_4,
    "raspberry-pi-5": board_trees.PI_5,
}


def family(name):
    return name.removesuffix("-super")


# ------------------------------------------------------------------------------------------------ boards


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_fits_its_own_profile_and_its_super_variant_alone(board, name):
    """Against every profile of a board or a card: no other fits; classes of CPUs do where the CPU has the features."""
    probed = board(BOARDS[name])
    assert matching.device_of(probed) == name
    fitting = {p.name for p in PROFILES.values() if p.vendor != "generic" and matching.fits(p, probed) is None}
    assert fitting == {one for one in PROFILES if family(one) == family(name)}


def test_the_words_for_another_board(board):
    wrong = matching.fits(PROFILES["jetson-orin-nano-8gb"], board(board_trees.ORIN_NX))
    assert wrong.what == (
        "devices.yaml says NVIDIA Jetson Orin Nano 8GB, but this is an NVIDIA Jetson Orin NX 16GB "
        "(NVIDIA Jetson Orin NX Engineering Reference Developer Kit (16 GB))"
    )
    assert wrong.fix == "--device jetson-orin-nx-16gb"


@pytest.mark.parametrize(
    ("part", "memory", "profile", "right"),
    [
        ("p3767-0003", 7.4, "jetson-orin-nano-8gb", True),
        ("p3767-0004", 3.3, "jetson-orin-nano-4gb", True),
        ("p3767-0004", 3.3, "jetson-orin-nano-8gb", False),
        ("p3767-0003", 7.4, "jetson-orin-nano-4gb", False),
        ("p3767-0003", 3.3, "jetson-orin-nano-8gb", False),  # the part says 8, the memory does not
        ("p3767-0001", 7.4, "jetson-orin-nx-8gb", True),
        ("p3767-0001", 7.4, "jetson-orin-nano-8gb", False),
        ("p3701-0000", 29.9, "jetson-agx-orin-64gb", True),  # the first kit: its GPU, half its memory
        ("p3701-0004", 29.9, "jetson-agx-orin-64gb", False),
        ("p3668-0003", 15.3, "jetson-xavier-nx", True),  # there is no profile of its own for more memory
        ("p3448-0003", 1.9, "jetson-nano", False),  # Nano 2GB
    ],
)
def test_parts_of_one_name_are_told_apart(board, part, memory, profile, right):
    carrier = f"nvidia,p9999-0000+{part}\0nvidia,tegra234\0"
    files = {"/proc/device-tree/compatible": carrier, "/proc/device-tree/model": "NVIDIA Orin\0"}
    wrong = matching.fits(PROFILES[profile], board(files, memory_bytes=memory * GIB))
    assert (wrong is None) is right
    if not right:
        assert PROFILES[profile].title in wrong.what


@pytest.mark.parametrize(
    ("memory", "fitting"),
    [
        (3.3, {"jetson-orin-nano-4gb"}),
        (7.4, {"jetson-orin-nano-8gb", "jetson-orin-nx-8gb"}),
        (15.3, {"jetson-orin-nx-16gb"}),
        (61.4, {"jetson-agx-orin-64gb"}),
    ],
)
def test_a_carrier_that_does_not_name_its_module_is_known_by_chip_and_memory(board, memory, fitting):
    files = {"/proc/device-tree/compatible": "acme,box\0nvidia,tegra234\0", "/proc/device-tree/model": "Acme Box\0"}
    probed = board(files, memory_bytes=memory * GIB)
    boards = [p for p in PROFILES.values() if p.vendor != "generic" and p.name == family(p.name)]
    assert {p.name for p in boards if matching.fits(p, probed) is None} == fitting
    assert matching.device_of(probed) == (next(iter(fitting)) if len(fitting) == 1 else None)


def test_a_module_that_edgec_does_not_know_fits_nothing(board):
    files = {"/proc/device-tree/compatible": "nvidia,p2371-2180\0nvidia,p2180-1000\0nvidia,tegra210\0"}
    probed = board({**files, "/proc/device-tree/model": "jetson_tx1\0"}, memory_bytes=3.9 * GIB)
    wrong = matching.fits(PROFILES["jetson-nano"], probed)
    assert "module p2180-1000" in wrong.what
    assert matching.device_of(probed) is None


def test_a_laptop_is_no_jetson():
    wrong = matching.fits(PROFILES["jetson-orin-nano-8gb"], X86)
    assert wrong.what.endswith(
        "this is an Intel(R) Core(TM) i7-12700K (32 GB), which has a processor of x86_64, not aarch64"
    )


def test_a_32_bit_system_is_said_before_all_else(board):
    wrong = matching.fits(PROFILES["raspberry-pi-4"], board(board_trees.PI_4, bits=32, arch="armv7l"))
    assert "32-bit" in wrong.what
    assert "64-bit system" in wrong.fix


def test_local_fits_whatever_answers():
    assert matching.fits(DeviceProfile("local", "x", "generic", "cpu", "sparc", is_local=True), X86) is None


# ------------------------------------------------------------------------------------------------ cards


@pytest.mark.parametrize(
    ("probed", "profile", "words"),
    [
        (card("NVIDIA GeForce RTX 4090"), "rtx-4090", None),
        (card("Tesla T4", 15360 * 2**20, 7.5), "t4", None),
        (card("NVIDIA A100-SXM4-80GB", 81920 * 2**20, 8.0), "a100-80gb", None),
        (card("NVIDIA GeForce RTX 3060", 12288 * 2**20, 8.6), "rtx-3060-12gb", None),
        (card("NVIDIA GeForce RTX 3060", 8192 * 2**20, 8.6), "rtx-3060-12gb", "which has 8 GiB, not 12"),
        (card("NVIDIA A100-SXM4-80GB", 81920 * 2**20, 8.0), "a100-40gb", "NVIDIA A100"),
        (card("NVIDIA GeForce RTX 4060 Ti", 8188 * 2**20), "rtx-3090", "RTX 4060 Ti"),
        (card("NVIDIA GeForce RTX 4090"), "rtx-3090", "this is an NVIDIA GeForce RTX 4090 (24 GB)"),
        (X86, "rtx-4090", "no NVIDIA GPU that can be seen (no nvidia-smi)"),
    ],
)
def test_cards_by_name_and_memory(probed, profile, words):
    wrong = matching.fits(PROFILES[profile], probed)
    if words is None:
        assert wrong is None
        assert matching.device_of(probed) == profile
    else:
        assert words in wrong.what
        assert wrong.fix


def test_another_card_names_its_profile():
    wrong = matching.fits(PROFILES["rtx-3090"], card("NVIDIA GeForce RTX 4090"))
    assert wrong.fix == "--device rtx-4090"


def test_a_card_that_is_not_listed_goes_by_one_of_its_compute_capability_and_it_is_said():
    probed = card("NVIDIA GeForce RTX 4070", 12282 * 2**20)
    fitting = {p.name for p in PROFILES.values() if p.kind == "gpu" and matching.fits(p, probed) is None}
    assert fitting == {"rtx-4060", "rtx-4090", "l4"}
    wrong = matching.fits(PROFILES["rtx-3090"], probed)
    assert wrong.what.endswith("this is an NVIDIA GeForce RTX 4070 (12 GB)")
    assert "--device rtx-4060" in wrong.fix
    note = matching.toolchain(PROFILES["rtx-4060"], probed).note
    assert "RTX 4070" in note
    assert "not in devices.yaml, so it goes by NVIDIA GeForce RTX 4060" in note
    listed = matching.toolchain(PROFILES["rtx-4090"], card("NVIDIA GeForce RTX 4090")).note
    assert "not in devices.yaml" not in listed
    line = found({**probed, "cuda_device": {**probed["gpus"][0], "cuda": "12.8"}})["gpu"]
    assert (line.status, "not in devices.yaml" in line.detail) == ("warning", True)
    assert "rtx-4060" in line.fix
    unknown_sm = {k: v for k, v in probed.items() if k != "sm"}
    assert matching.fits(PROFILES["rtx-4060"], unknown_sm) is not None


def test_the_card_that_cuda_uses_first_decides():
    small, large = ({"name": f"NVIDIA GeForce RTX {n}", "memory_bytes": 24564 * 2**20} for n in ("3090", "4090"))
    two = {**X86, "gpus": [small, large], "cuda_device": {**large, "compute_capability": "8.9", "cuda": "12.8"}}
    assert matching.fits(PROFILES["rtx-4090"], two) is None
    assert matching.device_of(two) == "rtx-4090"
    wrong = matching.fits(PROFILES["rtx-3090"], two)
    assert "but CUDA uses NVIDIA GeForce RTX 4090 first" in wrong.what
    assert "CUDA_VISIBLE_DEVICES" in wrong.fix


# ------------------------------------------------------------------------------------------------ CPUs


@pytest.mark.parametrize(
    ("flags", "profile", "missing"),
    [
        ("avx2 avx_vnni", "x86-avx-vnni", None),
        ("avx2 avx_vnni", "x86-avx2", None),  # what is built for less runs on more
        ("avx2 avx_vnni", "x86-avx512-vnni", "avx512, avx512_vnni"),
        ("avx2", "x86-avx-vnni", "avx_vnni"),
        ("", "x86-amx", None),  # not known: nothing speaks against it
    ],
)
def test_classes_of_cpus_by_features(flags, profile, missing):
    probed = {**X86, "cpu": {**X86["cpu"], "features": flags.split()}}
    wrong = matching.fits(PROFILES[profile], probed)
    if missing is None:
        assert wrong is None
    else:
        assert wrong.what.endswith(f"whose CPU lacks {missing}")
        assert wrong.fix.startswith("--device x86-avx")


def test_a_machine_without_a_card_is_the_class_of_its_cpu():
    assert matching.device_of(X86) == "x86-avx-vnni"
    assert matching.device_of({**X86, "arch": "arm64", "cpu": {"features": ["asimd", "asimddp"]}}) == "arm64-dotprod"
    assert matching.device_of({"arch": "riscv64"}) is None


def test_flags_of_the_probe_are_those_that_profiles_are_matched_by(board):
    assert matching.cpu(board(board_trees.PI_5)).features == ("neon", "asimddp")
    assert matching.cpu(X86) == devices.Cpu("Intel(R) Core(TM) i7-12700K", ("avx2", "avx_vnni"), 12)
    arm = {"implementer": "0x41", "part": "0xd42", "features": ["asimd"]}
    assert matching.cpu({"cpu": arm}).model == "Cortex-A78AE"


# ------------------------------------------------------------------------------------------------ in words


@pytest.mark.parametrize(
    ("left", "sold"),
    [(1.9, 2), (3.3, 4), (3.87, 4), (7.4, 8), (7.63, 8), (15.3, 16), (23.5, 24), (29.9, 32), (61.4, 64), (122.8, 128)],
)
def test_memory_as_it_is_sold(left, sold):
    assert matching.gibibytes(left * GIB) == sold


def test_a_device_in_a_line(board):
    probed = board(board_trees.ORIN_NANO, tensorrt="10.3.0.30", power_mode="15W")
    assert matching.named(probed) == (
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super (8 GB), "
        "JetPack 6.2, TensorRT 10.3.0, 15W mode"
    )
    assert matching.named(board(board_trees.XAVIER_NX)).endswith("(8 GB), JetPack 5.1.2, MODE_20W_6CORE")
    desktop = {**card("NVIDIA GeForce RTX 4090"), "cuda": "12.8.0", "tensorrt": "10.13.3.9"}
    assert matching.named(desktop) == (
        "NVIDIA GeForce RTX 4090 (24 GB), driver 570.86.15, CUDA 12.8.0, TensorRT 10.13.3"
    )
    assert matching.named(X86) == "Intel(R) Core(TM) i7-12700K (32 GB)"
    assert matching.named({"unknown": {}}) == "a device"


def test_the_toolchain_is_the_one_that_is_there(board):
    profile = PROFILES["jetson-orin-nano-8gb"]
    found = matching.toolchain(profile, board(board_trees.ORIN_NANO, tensorrt="10.7.0.23", python="3.10.12"))
    wanted = {"jetpack": "6.2", "l4t": "36.4.3", "tensorrt": "10.7.0", "cuda": "12.6.11", "python": "3.10.12"}
    assert wanted.items() <= found.toolchain.items()
    assert "TensorRT 10.7.0" in found.note
    assert dataclasses.replace(found, toolchain=profile.toolchain, note=profile.note) == profile
    bare = matching.toolchain(profile, board({**BOARDS["raspberry-pi-5"]}))
    assert not {"jetpack", "l4t", "tensorrt"} & set(bare.toolchain)


# ------------------------------------------------------------------------------------------------ the doctor


def found(probed):
    findings = device_findings.findings(probed)
    assert all(isinstance(one, Finding) and one.detail for one in findings)
    names = [one.name for one in findings]
    assert len(names) == len(set(names))
    return {one.name: one for one in findings}


@pytest.mark.parametrize("name", BOARDS)
def test_every_group_of_facts_has_its_line(board, name):
    lines = found(board(BOARDS[name]))
    everywhere = {"machine", "python", "memory", "disk", "gpu", "onnxruntime", "tvm", "clocks", "temperature"}
    assert everywhere | {"throttling", "load"} <= set(lines)
    jetson = {"jetpack", "cuda", "tensorrt", "trtexec", "power mode", "power sensor"}
    assert jetson & set(lines) == (jetson if name.startswith("jetson") else set())
    assert lines["machine"].status == "ok"
    assert name in lines["machine"].detail


def test_clocks_that_are_not_locked_warn_with_the_command(board):
    lines = found(board(board_trees.NANO))
    assert lines["clocks"].status == "warning"
    assert "gpu 921.6 of 76.8 to 921.6 MHz" in lines["clocks"].detail
    assert lines["clocks"].fix == "sudo jetson_clocks on the device"
    assert lines["cpu governor"].fix == "sudo jetson_clocks on the device"
    locked = found(board(board_trees.ORIN_NANO))
    assert locked["clocks"].status == "ok"
    assert locked["clocks"].detail.endswith(": locked")
    assert "cpu governor" not in locked
    pi = found(board(board_trees.PI_5))
    assert (pi["clocks"].status, pi["cpu governor"].status) == ("ok", "warning")
    assert "jetson_clocks" not in pi["cpu governor"].fix


@pytest.mark.parametrize(
    ("facts", "line", "status", "words"),
    [
        ({"memory_available_bytes": 0.5 * GIB}, "memory", "warning", "0.5 free"),
        ({"disk_free_bytes": 3e8}, "disk", "warning", "0.3 GB free"),
        ({"bits": 32}, "python", "warning", "32-bit"),
        ({"jetpack": "6.2", "l4t": "36.4.3"}, "jetpack", "ok", "6.2 (L4T 36.4.3)"),
        ({"jetpack": None, "l4t": "37.1.0"}, "jetpack", "ok", "no JetPack that edgec knows"),
        ({"tensorrt": "10.3.0"}, "tensorrt", "ok", "10.3.0"),
        ({"trtexec": "/usr/src/tensorrt/bin/trtexec"}, "trtexec", "ok", "/usr/src/tensorrt"),
        ({"tvm": "0.27.0"}, "tvm", "ok", "0.27.0"),
        (
            {"onnxruntime": {"version": "1.20", "providers": ["CUDAExecutionProvider"]}},
            "onnxruntime",
            "ok",
            "1.20; CUDA",
        ),
        ({"power_mode": "MAXN"}, "power mode", "ok", "MAXN"),
        ({"throttled": True, "reasons": ["too hot"]}, "throttling", "warning", "throttled now: too hot"),
        (
            {"throttled": False, "reasons": [], "counts": {"x": 3}},
            "throttling",
            "ok",
            "none now; since it was started: x: 3",
        ),
        ({"temperatures": {"gpu": 96.0}, "limits": {"gpu": 99.0}}, "temperature", "warning", "96 degrees"),
        ({"temperatures": {"gpu": 93.0}, "limits": {"gpu": 99.0}}, "temperature", "ok", "93 degrees"),
        ({"temperatures": {"gpu": 81.0}, "limits": {}}, "temperature", "warning", "81 degrees"),
        ({"load": [5.0, 1.0, 1.0]}, "load", "warning", "load average 5.00"),
        ({"load": [0.1, 0.1, 0.1], "gpu_load": 40.0}, "load", "warning", "GPU 40 % busy"),
        (
            {"gpu_processes": [{"pid": "1", "name": "python3"}]},
            "load",
            "warning",
            "1 other program on the GPU (python3)",
        ),
        ({"cuda_device": {"name": "Orin", "cuda": "12.6"}, "cuda": "12.6.11"}, "cuda", "ok", "for up to 12.6"),
        ({"cuda_device": {"name": "Orin"}}, "gpu", "ok", "compute capability 8.7"),
    ],
)
def test_what_the_lines_say(board, facts, line, status, words):
    probed = board(board_trees.ORIN_NANO)
    probed["cpu"]["threads"] = 6
    probed.update(facts)
    one = found(probed)[line]
    assert (one.status, words in one.detail) == (status, True), one
    assert (one.fix is None) == (status == "ok")


def test_what_is_missing_says_why(board):
    lines = found(board(board_trees.ORIN_NANO))
    assert lines["gpu"].status == "warning"  # the chip has one, and no libcuda answers here
    assert "that of tegra234" in lines["gpu"].detail
    for name, words in (
        ("tensorrt", "libnvinfer 10.3.0 alone"),
        ("trtexec", "neither on the PATH"),
        ("tvm", "module tvm"),
    ):
        assert lines[name].status == "missing"
        assert words in lines[name].detail
    assert lines["power mode"].status == "warning"
    broken = {**X86, "unknown": {"onnxruntime": "the module is there, but cannot be used: ended by signal 6"}}
    assert found(broken)["onnxruntime"].status == "warning"


def test_a_probe_of_nothing_has_words_for_all():
    lines = found({"unknown": {}})
    assert {"machine", "python", "memory", "disk", "gpu", "onnxruntime", "clocks", "load"} <= set(lines)
    assert not any(one.detail == "None" for one in lines.values())


def test_findings_are_in_one_order(board):
    assert [one.name for one in device_findings.findings(board(board_trees.NANO))][:4] == [
        "machine", "cores", "python", "memory",
    ]  # fmt: skip
