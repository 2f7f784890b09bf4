"""The probe on folders that stand for boards, on programs that fail, and on this very machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import board_trees
import pytest
from edgec.backends.agent import gpus, probe, reading, software

AGENT = Path(probe.__file__).parent


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH with nothing on it but a shell."""
    folder = tmp_path / "bin"
    board_trees.only_programs(monkeypatch, folder)
    return folder


def probed(tmp_path, files):
    facts = probe.probe(board_trees.plant(tmp_path / "root", files))
    json.dumps(facts)
    return facts


BOARDS = {
    "nano": (
        board_trees.NANO,
        {
            "model": "NVIDIA Jetson Nano Developer Kit", "part": "p3448-0000", "soc": "tegra210", "sm": 5.3,
            "l4t": "32.7.1", "jetpack": "4.6.1", "cuda": "10.2.300", "tensorrt_library": "8.2.1",
            "memory_bytes": 4059252 * 1024, "memory_available_bytes": 2500000 * 1024, "load": [0.42, 0.2, 0.1],
            "gpu_load": 25.0, "clocks_locked": False, "governor": "schedutil", "throttled": False,
            "rail": "POM_5V_IN", "watts": 5.1,
        },
    ),
    "xavier": (
        board_trees.XAVIER_NX,
        {
            "part": "p3668-0000", "soc": "tegra194", "sm": 7.2, "l4t": "35.4.1", "jetpack": "5.1.2",
            "cuda": "11.4.19", "tensorrt_library": "8.5.2", "power_mode": "MODE_20W_6CORE", "rail": "VDD_IN",
        },
    ),
    "orin nano": (
        board_trees.ORIN_NANO,
        {
            "part": "p3767-0005", "soc": "tegra234", "sm": 8.7, "l4t": "36.4.3", "jetpack": "6.2",
            "cuda": "12.6.11", "tensorrt_library": "10.3.0", "clocks_locked": True, "governor": "performance",
            "limits": {"cpu": 99.0}, "watts": 6.0,
        },
    ),
    "orin nx": (board_trees.ORIN_NX, {"part": "p3767-0000", "memory_bytes": 16000000 * 1024}),
    "agx orin": (board_trees.AGX_ORIN, {"part": "p3701-0005", "l4t": "35.3.1", "jetpack": "5.1.1"}),
    "thor": (
        board_trees.THOR,
        {
            "part": "p3834-0008", "soc": "tegra264", "sm": 11.0, "l4t": "38.2.0", "jetpack": "7.0",
            "tensorrt_library": "10.13.3", "rail": "VIN", "watts": 41.5,
        },
    ),
    "pi 4": (
        board_trees.PI_4,
        {
            "model": "Raspberry Pi 4 Model B Rev 1.4", "bits": 64,
            "system": "Debian GNU/Linux 12 (bookworm)", "temperatures": {"cpu": 52.1}, "governor": "ondemand",
        },
    ),
    "pi 5": (board_trees.PI_5, {"compatible": ["raspberrypi,5-model-b", "brcm,bcm2712"], "clocks_locked": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOARDS)
def test_boards_are_read_from_where_their_generation_has_it(tmp_path, programs, name):
    files, expected = BOARDS[name]
    facts = probed(tmp_path, files)
    assert {key: facts.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", ["pi 4", "pi 5"])
def test_a_board_without_a_gpu_has_no_facts_of_one(tmp_path, programs, name):
    facts = probed(tmp_path, BOARDS[name][0])
    assert not {"soc", "part", "sm", "l4t", "jetpack", "gpus", "cuda_device", "power_mode", "watts"} & set(facts)
    assert facts["unknown"]["watts"]


def test_what_cannot_be_read_has_its_reason(tmp_path, programs):
    unknown = probed(tmp_path, board_trees.ORIN_NANO)["unknown"]
    assert unknown["tensorrt"] == "python3 has no module tensorrt, libnvinfer 10.3.0 alone"
    assert unknown["gpus"] == "nvidia-smi is not on the PATH"
    assert unknown["power mode"] == "nvpmodel is not on the PATH"
    assert "only root" in unknown["memory clock"]
    assert "tensorrt" in unknown["trtexec"]


def test_an_empty_device_gives_reasons_and_no_exception(tmp_path, programs):
    facts = probed(tmp_path, {"/etc/hostname": "x"})
    reasons = {"model", "cpu", "memory_bytes", "gpus", "load", "clocks", "temperatures", "governor"}
    assert reasons <= set(facts["unknown"])
    assert not (reasons - {"cpu"}) & set(facts)
    assert all(isinstance(reason, str) and reason for reason in facts["unknown"].values())


@pytest.mark.parametrize("garbage", ["", "\0\0", "nonsense", "9" * 400, "{", "-1"])
def test_no_file_content_makes_it_fail(tmp_path, programs, garbage):
    """Every file of a board, all at once, with content that is none."""
    facts = probed(tmp_path, dict.fromkeys({**board_trees.ORIN_NANO, **board_trees.NANO}, garbage))
    broken = {"machine", "cpu", "memory", "software", "load"} & set(facts["unknown"])
    assert not broken - {"cpu", "load"}  # those two are names of facts, too
    assert "clocks" not in facts or all(facts["clocks"].values())


def test_a_fault_in_one_group_leaves_the_others(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(software, "software", lambda root, unknown: 1 / 0)
    facts = probed(tmp_path, board_trees.NANO)
    assert "ZeroDivisionError" in facts["unknown"]["software"]
    assert facts["soc"] == "tegra210"
    assert facts["memory_bytes"]


def test_the_whole_of_this_machine(tmp_path):
    facts = probe.probe()
    json.dumps(facts)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["memory_bytes"] >= facts["memory_available_bytes"] > 0
    assert facts["disk_free_bytes"] > 0
    assert facts["bits"] == 64
    assert facts["cpu"]["threads"] == len(os.sched_getaffinity(0))
    onnxruntime = pytest.importorskip("onnxruntime")
    there = {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}
    assert facts["onnxruntime"] == there


# ------------------------------------------------------------------------------------------------ cards


def test_a_desktop_is_asked_by_nvidia_smi(tmp_path, programs):
    board_trees.smi(programs, board_trees.CARD, "1234, python3, 512\n")
    facts = probed(tmp_path, board_trees.DESKTOP)
    card = {"name": "NVIDIA GeForce RTX 4090", "compute_capability": "8.9", "driver": "570.86.15"}
    assert facts["gpus"] == [{**card, "memory_bytes": 24564 * 2**20}]
    assert facts["sm"] == 8.9
    assert facts["driver"] == "570.86.15"
    assert facts["tensorrt_library"] == "10.13.3"
    assert facts["cpu"]["cores"] == 2
    assert "avx_vnni" in facts["cpu"]["features"]
    assert facts["gpu_processes"] == [{"pid": "1234", "name": "python3", "mebibytes": 512.0}]
    assert facts["temperatures"] == {"cpu": 51.0, "gpu": 47.0}
    assert facts["clocks"]["gpu"] == {"current": 2520.0, "max": 3105.0}


def test_a_driver_that_does_not_know_compute_cap_is_asked_without(tmp_path, programs):
    board_trees.smi(programs, {k: v for k, v in board_trees.CARD.items() if k != "compute_cap"})
    facts = probed(tmp_path, board_trees.DESKTOP)
    card = {"name": "NVIDIA GeForce RTX 4090", "driver": "570.86.15", "memory_bytes": 24564 * 2**20}
    assert facts["gpus"] == [card]
    assert "sm" not in facts
    assert "gpus" not in facts["unknown"]


def test_values_in_brackets_are_none(tmp_path, programs):
    card = {**board_trees.CARD, "name": "Orin (nvgpu)", "memory.total": "[N/A]", "compute_cap": "[N/A]"}
    board_trees.smi(programs, {**card, "clocks_event_reasons.active": "[N/A]"})
    facts = probed(tmp_path, board_trees.ORIN_NANO)
    assert facts["gpus"] == [{"name": "Orin (nvgpu)", "driver": "570.86.15"}]
    assert facts["sm"] == 8.7


def test_the_device_that_cuda_uses_first_is_asked_of_cuda(tmp_path, programs, monkeypatch):
    """By a libcuda of our own, with the calls and attribute numbers of cuda.h."""
    compiler = shutil.which("cc", path="/usr/bin:/bin")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "cuda.c"
    source.write_text(
        "#include <string.h>\n#include <stddef.h>\nstatic int ready;\n"
        "int cuInit(unsigned f) { ready = f == 0; return 0; }\n"
        "int cuDriverGetVersion(int *v) { *v = 12080; return 0; }\n"
        "int cuDeviceGet(int *d, int n) { *d = 42; return !(ready && n == 0); }\n"
        'int cuDeviceGetName(char *s, int n, int d) { if (n == 128 && d == 42) strcpy(s, "NVIDIA L4"); return 0; }\n'
        "int cuDeviceTotalMem_v2(size_t *m, int d) { *m = d == 42 ? (size_t)23 << 30 : 0; return 0; }\n"
        "int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 9 : -1; return 0; }\n"
    )
    libraries = tmp_path / "lib"
    libraries.mkdir()
    built = ["-shared", "-fPIC", "-o", str(libraries / "libcuda.so.1"), str(source)]
    subprocess.run([compiler, *built], check=True, env={**os.environ, "PATH": "/usr/bin:/bin"})
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    facts = probed(tmp_path, board_trees.DESKTOP)
    card = {"name": "NVIDIA L4", "compute_capability": "8.9", "memory_bytes": 23 << 30}
    assert facts["cuda_device"] == {**card, "cuda": "12.8"}
    assert facts["gpus"] == [card]
    assert facts["sm"] == 8.9


def test_the_chips_are_those_of_the_profiles():
    from edgec.compiler import devices

    told = {float(sm) for sm in gpus.CAPABILITIES.values()}
    assert {profile.sm for profile in devices.load_profiles().values() if profile.kind == "soc"} == told


# ------------------------------------------------------------------------------------------------ software


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("36.4.0", "6.1"), ("36.4.3", "6.2"), ("36.4.7", "6.2.1"), ("36.4.9", "6.2.1"), ("36.5.0", "6.2.2"),
        ("35.4.1", "5.1.2"), ("35.6.3", "5.1.5"), ("32.7.6", "4.6.6"), ("38.4.0", "7.1"), ("39.2.0", "7.2"),
        ("36.4", "6.1"), ("35.3.0", None), ("37.1.0", None), ("21.5", None),
    ],
)  # fmt: skip
def test_jetpack_by_release(release, jetpack):
    assert software.jetpack(release) == jetpack


def test_a_release_without_its_file_is_that_of_the_debian_package(tmp_path):
    status = "Package: nvidia-l4t-core\nStatus: install ok installed\nVersion: 36.4.3-20250107174145\n"
    root = board_trees.plant(tmp_path, {"/var/lib/dpkg/status": status})
    assert software.l4t(root) == "36.4.3"
    removed = status.replace("ok installed", "ok config-files")
    assert software.l4t(board_trees.plant(tmp_path, {"/var/lib/dpkg/status": removed})) is None


@pytest.mark.parametrize(
    ("files", "version"),
    [
        (["libnvinfer.so.10", "libnvinfer.so.10.3.0"], "10.3.0"),
        (["libnvinfer.so.8.6.1", "libnvinfer.so.10.3.0"], "10.3.0"),
        (["libnvinfer.so.9"], "9"),
        (["libnvinfer.so.8.6.1", "libnvinfer.so.8.10.0"], "8.10.0"),
        (["libnvinfer.so", "libnvinfer_plugin.so.10.3.0"], None),
    ],
)
def test_tensorrt_by_the_names_of_its_library(tmp_path, files, version):
    root = board_trees.plant(tmp_path, {f"/usr/lib/aarch64-linux-gnu/{name}": "" for name in files})
    assert software.tensorrt_library(root) == version


def test_cuda_by_its_compiler_or_its_library(tmp_path, programs):
    library = {"/usr/local/cuda/targets/aarch64-linux/lib/libcudart.so.12.6.68": ""}
    root = board_trees.plant(tmp_path / "root", library)
    assert software.cuda(root) == "12.6.68"
    board_trees.program(programs, "nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 12.5, V12.5.40'\n")
    assert software.cuda(root) == "12.5.40"


def test_trtexec_off_the_path_is_found(tmp_path, programs):
    root = board_trees.plant(tmp_path / "root", {software.TRTEXEC: "#!/bin/sh\n"})
    assert software.trtexec(root) is None  # it cannot be run
    (tmp_path / "root" / software.TRTEXEC.lstrip("/")).chmod(0o755)
    assert software.trtexec(root) == root + software.TRTEXEC
    there = board_trees.program(programs, "trtexec", "#!/bin/sh\n")
    assert software.trtexec(root) == str(there)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import os; os.abort()", "ended by signal 6"),
        ("raise RuntimeError('CUDA is broken')", "RuntimeError: CUDA is broken"),
        ("", "no attribute"),
    ],
)
def test_a_module_that_breaks_does_not_break_the_probe(tmp_path, programs, monkeypatch, content, words):
    site = tmp_path / "site"
    (site / "onnxruntime").mkdir(parents=True)
    (site / "onnxruntime" / "__init__.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(site))
    facts = probed(tmp_path, board_trees.NANO)
    assert "onnxruntime" not in facts
    assert words in facts["unknown"]["onnxruntime"]
    assert facts["soc"] == "tegra210"


def test_a_module_without_metadata_tells_its_version_itself(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "tensorrt").mkdir(parents=True)
    (site / "tensorrt" / "__init__.py").write_text("print('banner')\n__version__ = '8.5.2.2'\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    unknown = {}
    found = software._python_modules({}, {"tensorrt": True}, unknown)
    assert found == {"tensorrt": "8.5.2.2"}
    assert "tensorrt" not in unknown
    assert "no module tvm" in unknown["tvm"]


# ------------------------------------------------------------------------------------------------ programs


def test_programs_that_fail_hang_or_are_missing_are_reasons(programs):
    board_trees.program(programs, "fails", "#!/bin/sh\necho NVPM ERROR: not permitted >&2\nexit 3\n")
    board_trees.program(programs, "hangs", "#!/bin/sh\nsleep 60\n")  # whose child has its output open, too
    board_trees.program(programs, "none", "\x7fELF nonsense")
    for name, words in (
        ("fails", "NVPM ERROR: not permitted"),
        ("hangs", "did not answer in 0.2 s"),
        ("none", "cannot be started"),
        ("missing", "not on the PATH"),
    ):
        start = time.monotonic()
        with pytest.raises(reading.Unread, match=words):
            reading.said([name], 0.2)
        assert time.monotonic() - start < 20


def test_the_power_mode_is_what_nvpmodel_says(tmp_path, programs):
    board_trees.program(programs, "nvpmodel", '#!/bin/sh\n[ "$1" = -q ] && printf "NV Power Mode: 15W\\n0\\n"\n')
    assert probed(tmp_path, board_trees.XAVIER_NX)["power_mode"] == "15W"
    board_trees.program(programs, "nvpmodel", "#!/bin/sh\necho NVPM ERROR: Permission denied\nexit 1\n")
    assert probed(tmp_path, board_trees.XAVIER_NX)["power_mode"] == "MODE_20W_6CORE"
    facts = probed(tmp_path / "other", board_trees.ORIN_NANO)
    assert "Permission denied" in facts["unknown"]["power mode"]


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"/proc/device-tree/nvidia,boardids": "3448:0000:400:\0"}, "p3448-0000"),
        ({"/proc/device-tree/nvidia,dtsfilename": "/x/tegra194-p3668-0001-p3509-0000.dts\0"}, "p3668-0001"),
        ({"/sys/bus/i2c/devices/0-0050/eeprom": "\x02\x00zz699-13767-0003-300 N.2\x00"}, "p3767-0003"),
        ({"/proc/device-tree/nvidia,boardids": "nonsense"}, None),
    ],
)
def test_parts_by_other_ways(tmp_path, programs, files, part):
    tree = {"/proc/device-tree/compatible": "acme,carrier\0nvidia,tegra234\0", "/proc/device-tree/model": "Acme\0"}
    facts = probed(tmp_path, {**tree, **files})
    assert facts.get("part") == part
    assert ("part" in facts["unknown"]) == (part is None)


def test_it_runs_on_the_oldest_python(tmp_path):
    """JetPack 4 has Python 3.6; where there is one, it probes a board and this machine."""
    found = sorted(Path.home().glob(".pyenv/versions/3.6.*/bin/python3.6"))
    python = str(found[-1]) if found else shutil.which("python3.6")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("no Python 3.6")
    root = board_trees.plant(tmp_path / "root", board_trees.NANO)
    package = tmp_path / "agent"
    shutil.copytree(AGENT, package, ignore=shutil.ignore_patterns("__pycache__"))
    ask = "import json, sys; from agent import probe; print(json.dumps([probe.probe(sys.argv[1]), probe.probe()]))"
    done = subprocess.run([python, "-c", ask, root], cwd=tmp_path, capture_output=True, text=True, check=True)
    board, here = json.loads(done.stdout)
    assert (board["part"], board["python"][:3], board["jetpack"]) == ("p3448-0000", "3.6", "4.6.1")
    assert here["memory_bytes"] > 0
    assert "python modules" not in here["unknown"]
