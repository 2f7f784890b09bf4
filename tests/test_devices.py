"""devices.yaml and its reader, the recognition of this machine, and the doctor's findings."""

import dataclasses
import re
import subprocess
import sys
import time

import pytest
import yaml
from edgec.compiler import devices, doctor
from edgec.compiler.errors import DeviceError
from edgec.compiler.findings import Finding
from edgec.compiler.types import DeviceProfile, Fact

PROFILES = devices.load_profiles()

GOOD = """\
sources:
  sheet: data sheet
devices:
  board-a:
    title: Board A
    vendor: acme
    kind: soc
    arch: aarch64
    memory_gib: {value: 8, source: sheet}
    peak_gflops:
      int8: {value: 1.5, unverified: true}
    toolchain: {jetpack: "6.2"}
    default_target: null
"""


def complaint(tmp_path, text):
    path = tmp_path / "devices.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DeviceError) as caught:
        devices.load_profiles(path)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ the shipped file


def test_the_devices_asked_for_are_there():
    wanted = """x86-avx2 x86-avx512-vnni x86-amx arm64-neon arm64-dotprod raspberry-pi-4 raspberry-pi-5
        jetson-nano jetson-tx2 jetson-xavier-nx jetson-agx-xavier-32gb jetson-orin-nano-4gb
        jetson-orin-nano-8gb jetson-orin-nano-8gb-super jetson-orin-nx-8gb jetson-orin-nx-16gb
        jetson-agx-orin-32gb jetson-agx-orin-64gb jetson-agx-thor rtx-3060-12gb rtx-3090 rtx-4060 rtx-4090
        rtx-5090 a10 l4 t4 a100-40gb a100-80gb h100-sxm h100-pcie h200-sxm h200-nvl"""
    assert set(wanted.split()) <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_profile_is_consistent(profile):
    facts = [profile.memory_gib, profile.bandwidth_gb_s, *profile.peak_gflops.values()]
    for fact in filter(None, facts):
        assert fact.value > 0
        assert fact.source or fact.unverified
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", profile.name)
    assert set(profile.peak_gflops) <= set(profile.dtypes)
    assert "float32" in profile.dtypes
    assert profile.channel_multiple >= 1
    assert profile.backends[0] == ("ort" if profile.kind == "cpu" else "tensorrt")
    assert (profile.sm is None) == (profile.kind == "cpu")
    assert ("cuda" in profile.features) == (profile.kind != "cpu")
    assert (not profile.toolchain) or profile.kind == "soc"
    assert not profile.is_local


def test_dtypes_follow_the_compute_capability():
    for name, profile in PROFILES.items():
        if profile.sm is not None:
            assert ("float8e4m3fn" in profile.dtypes) == (profile.sm >= 8.9), name
            assert ("float4e2m1" in profile.dtypes) == (profile.sm >= 10.0), name
            assert ("int8" in profile.dtypes) == (profile.sm >= 7.2), name
            assert ("bfloat16" in profile.dtypes) == (profile.sm >= 8.0), name
    assert "int8" not in PROFILES["jetson-nano"].dtypes
    assert "int8" not in PROFILES["jetson-tx2"].dtypes


def test_peaks_are_dense_and_in_gflops():
    assert PROFILES["jetson-orin-nano-8gb"].peak_gflops["int8"].value == 20480
    for name, profile in PROFILES.items():
        if profile.sm == 8.7:  # Orin: integer Tensor Core operations come at twice the rate of float16
            ratio = profile.peak_gflops["int8"].value / profile.peak_gflops["float16"].value
            assert ratio == pytest.approx(2, rel=0.01), name


def test_the_reader_knows_every_field_of_a_profile_and_no_other():
    fields = {field.name for field in dataclasses.fields(DeviceProfile)}
    assert set(devices._FIELDS) == fields - {"name", "is_local"}


def test_recognised_boards_and_gpus_have_profiles():
    assert {name for _, name in devices.BOARDS} <= set(PROFILES)
    assert {name for _, name in devices.GPUS} == {n for n, p in PROFILES.items() if p.kind == "gpu"}


def test_finding_a_device_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from edgec.compiler import devices; devices.find('l4');"
        "print([m for m in ('numpy', 'onnx', 'onnx_ir', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        devices.find("l4")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1  # seconds; the best of five, since this machine may be busy


# ------------------------------------------------------------------------------------------ complaints


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert devices.load_profiles(path) == {
        "board-a": DeviceProfile(
            "board-a",
            "Board A",
            "acme",
            "soc",
            "aarch64",
            memory_gib=Fact(8.0, "data sheet"),
            peak_gflops={"int8": Fact(1.5, None, True)},
            toolchain={"jetpack": "6.2"},
        )
    }


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("memory_gib", "memroy_gib", 9, ["unknown key 'memroy_gib'", "did you mean 'memory_gib'"]),
        ("int8:", "int9:", 11, ["unknown key 'int9'", "'int8'"]),
        ("kind: soc", "kind: sock", 7, ["unknown value 'sock'", "'soc'"]),
        ("sources:", "source:", 1, ["unknown key 'source'", "'sources'"]),
        ("source: sheet", "source: sheets", 9, ["unknown source 'sheets'", "'sheet'"]),
        ("{value: 8, source: sheet}", "{value: 8}", 9, ["neither source nor unverified"]),
        ("unverified: true", "unverified: false", 11, ["neither source nor unverified"]),
        ("{value: 8, source: sheet}", "{source: sheet}", 9, ["without `value`"]),
        ("{value: 8, source: sheet}", "8", 9, ["key: value"]),
        ("value: 8", "value: eight", 9, ["'eight'", "expected int or float"]),
        ("value: 8", "value: -8", 9, ["'-8'"]),
        ("value: 8", "value: .inf", 9, ["'.inf'"]),
        ("value: 8", "value: 1:30", 9, ["'1:30'"]),
        ('"6.2"', "6.2", 12, ["'6.2'", "put it in quotes"]),
        ("vendor: acme", "vendor: [acme]", 6, ["expected one value"]),
        ("default_target: null", "features: neon", 13, ["expected a list"]),
        ("default_target: null", "dla: {value: 1.5, source: sheet}", 13, ["not a whole number"]),
        ("default_target: null", "title: B", 13, ["'title' stands here twice"]),
        ("board-a:", "Board_A:", 5, ["kebab-case"]),
        ("board-a:", "local:", 5, ["local"]),
        ("    title: Board A\n", "", 5, ["no 'title'"]),
        ("memory_gib: {", "memory_gib: {{", 10, ["not valid YAML"]),
        ("devices:", "common:", 1, ["no `devices`"]),
    ],
)
def test_complaints_name_the_line_and_the_nearest_key(tmp_path, old, new, line, words):
    assert old in GOOD
    text = complaint(tmp_path, GOOD.replace(old, new, 1))
    assert re.search(rf"devices\.yaml:{line}\b", text), text
    for word in words:
        assert word in text


def test_an_empty_and_a_missing_file_are_complaints(tmp_path):
    assert "empty" in complaint(tmp_path, "")
    with pytest.raises(DeviceError, match="cannot be read"):
        devices.load_profiles(tmp_path / "none.yaml")


def test_the_slow_yaml_loader_gives_the_same_lines(tmp_path, monkeypatch):
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert "devices.yaml:9:" in complaint(tmp_path, GOOD.replace("memory_gib", "memroy_gib"))
    assert devices.load_profiles() == PROFILES


@pytest.mark.parametrize(
    ("name", "near"),
    [("jetson-orin-nanoo", "jetson-orin-nano-8gb"), ("RTX_4090", "rtx-4090"), ("locall", "local")],
)
def test_an_unknown_device_is_told_the_nearest_names(name, near):
    with pytest.raises(DeviceError) as caught:
        devices.find(name)
    assert repr(name) in caught.value.what
    assert near in caught.value.fix
    assert "edgec devices" in caught.value.fix


# ------------------------------------------------------------------------------------------ this machine


def x86(flags, cpus=2, cores=2):
    return "\n\n".join(
        f"processor\t: {i}\nmodel\t\t: 85\nmodel name\t: Some CPU @ 2GHz\nphysical id\t: 0\n"
        f"core id\t\t: {i % cores}\nflags\t\t: fpu sse sse4_2 {flags}\npower management:"
        for i in range(cpus)
    )


def arm(features, part="0xd0b", tail=""):
    block = f"BogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n"
    return "\n".join(f"processor\t: {i}\n{block}" for i in range(4)) + tail


ARMV8 = "fp asimd evtstrm crc32 cpuid"
ARMV82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


@pytest.mark.parametrize(
    ("text", "arch", "model", "features", "cls"),
    [
        (x86("avx avx2 fma"), "x86_64", "Some CPU @ 2GHz", ("avx2",), "x86-avx2"),
        (x86("avx2 avx512f"), "x86_64", "Some CPU @ 2GHz", ("avx2", "avx512"), "x86-avx2"),
        (x86("avx2 avx_vnni"), "x86_64", "Some CPU @ 2GHz", ("avx2", "avx_vnni"), "x86-avx-vnni"),
        (
            x86("avx2 avx512f avx512_vnni"),
            "x86_64",
            "Some CPU @ 2GHz",
            ("avx2", "avx512", "avx512_vnni"),
            "x86-avx512-vnni",
        ),
        (
            x86("avx2 avx512f avx_vnni avx512_vnni amx_bf16 amx_tile amx_int8"),
            "x86_64",
            "Some CPU @ 2GHz",
            ("avx2", "avx512", "avx_vnni", "avx512_vnni", "amx_int8"),
            "x86-amx",
        ),
        (x86("avx"), "x86_64", "Some CPU @ 2GHz", (), None),
        (
            arm(ARMV8, "0xd08", "\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"),
            "aarch64",
            "Raspberry Pi 4 Model B Rev 1.4",
            ("neon",),
            "arm64-neon",
        ),
        (
            arm(ARMV82, "0xd0b", "\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"),
            "aarch64",
            "Raspberry Pi 5 Model B Rev 1.0",
            ("neon", "asimddp"),
            "arm64-dotprod",
        ),
        (
            arm(f"{ARMV82} uscat ilrcpc flagm paca pacg", "0xd42"),
            "aarch64",
            "Cortex-A78AE",
            ("neon", "asimddp"),
            "arm64-dotprod",
        ),
        (
            arm(f"{ARMV82} sve i8mm", "0xd4f"),
            "aarch64",
            "Neoverse-V2",
            ("neon", "asimddp", "i8mm", "sve"),
            "arm64-dotprod",
        ),
        ("", "aarch64", None, (), None),
    ],
    ids=["avx2", "avx512", "avx-vnni", "vnni", "amx", "avx", "pi4", "pi5", "orin", "grace", "empty"],
)
def test_cpuinfo(text, arch, model, features, cls):
    cpu = devices.parse_cpuinfo(text)
    assert (cpu.model, cpu.features) == (model, features)
    found = devices.cpu_class(PROFILES, arch, cpu.features)
    assert (found and found.name) == cls


def test_physical_cores_are_counted_where_they_are_told():
    assert devices.parse_cpuinfo(x86("avx2", cpus=4, cores=2)).physical_cores == 2
    assert devices.parse_cpuinfo(arm(ARMV8)).physical_cores is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4\nraspberrypi,4-model-b\nbrcm,bcm2711", "raspberry-pi-4"),
        ("Raspberry Pi 400 Rev 1.0", "raspberry-pi-4"),
        ("Raspberry Pi Compute Module 5 Rev 1.0", "raspberry-pi-5"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", None),
        (
            "NVIDIA Jetson Nano Developer Kit\nnvidia,p3449-0000-b00+p3448-0000-b00\nnvidia,tegra210",
            "jetson-nano",
        ),
        ("kit\nnvidia,p3768-0000+p3767-0005\nnvidia,p3767-0005\nnvidia,tegra234", "jetson-orin-nano-8gb"),
        ("kit\nnvidia,p3768-0000+p3767-0005-super\nnvidia,p3767-0005", "jetson-orin-nano-8gb-super"),
        ("kit\nnvidia,p3509-0000+p3767-0001\nnvidia,tegra234", "jetson-orin-nx-8gb"),
        ("kit\nnvidia,p3737-0000+p3701-0005\nnvidia,tegra234", "jetson-agx-orin-64gb"),
        ("", None),
    ],
)
def test_boards_are_known_by_their_device_tree(text, name):
    assert devices.board_name(text) == name


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "h200-nvl"),
    ],
)
def test_gpus_are_known_by_the_name_that_nvidia_smi_reports(reported, name):
    assert devices.gpu_name(reported) == name


def test_the_local_profile_of_this_machine():
    profile = devices.find("local")
    assert profile.is_local and profile.name == "local"
    assert profile.title and profile.backends and "float32" in profile.dtypes
    assert profile.cores >= 1
    assert profile.memory_gib is None or 0.1 < profile.memory_gib.value < 1e5
    if profile.arch in devices._ASSUMED:
        assert set(devices._ASSUMED[profile.arch]) <= set(profile.features)
    assert devices.is_this_machine(profile)


@pytest.fixture
def machine(monkeypatch):
    """Make this machine look like another one."""

    def pretend(arch, cpuinfo="", device_tree="", gpus=()):
        monkeypatch.setattr(devices.platform, "machine", lambda: arch)
        monkeypatch.setattr(devices, "read_cpu", lambda: devices.parse_cpuinfo(cpuinfo))
        monkeypatch.setattr(devices, "_device_tree", lambda: device_tree)
        monkeypatch.setattr(devices, "visible_gpus", lambda: gpus)

    return pretend


def this_machine_is():
    return {name for name, profile in PROFILES.items() if devices.is_this_machine(profile)}


def test_a_cpu_is_its_own_class_only(machine):
    machine("x86_64", x86("avx2 avx512f avx512_vnni"), gpus=("NVIDIA L4", "NVIDIA L4"))
    assert this_machine_is() == {"x86-avx512-vnni", "l4"}
    local = devices.local_profile()
    assert local.backends == PROFILES["x86-avx512-vnni"].backends
    assert local.channel_multiple == 16
    assert local.features == ("avx2", "avx512", "avx512_vnni")


def test_a_raspberry_pi_is_local_even_where_a_container_hides_the_device_tree(machine):
    machine("aarch64", arm(ARMV8, "0xd08", "\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"))
    assert this_machine_is() == {"raspberry-pi-4", "arm64-neon"}
    local = devices.local_profile()
    assert local.title == "Raspberry Pi 4 Model B Rev 1.4"
    assert local.peak_gflops == PROFILES["raspberry-pi-4"].peak_gflops


def test_a_jetson_is_local_with_its_gpu(machine):
    tree = "NVIDIA Jetson Orin Nano Developer Kit\nnvidia,p3768-0000+p3767-0005\nnvidia,tegra234"
    machine("aarch64", arm(ARMV82, "0xd42"), tree)
    assert this_machine_is() == {"jetson-orin-nano-8gb", "arm64-dotprod"}
    local = devices.local_profile()
    assert local.title == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (local.sm, local.kind, local.backends[0]) == (8.7, "soc", "tensorrt")
    assert local.features == ("neon", "asimddp", "cuda")


@pytest.mark.parametrize(("arch", "expected"), [("arm64", ("neon",)), ("AMD64", ("avx2",)), ("riscv64", ())])
def test_without_cpuinfo_the_least_is_assumed_and_said(machine, arch, expected):
    machine(arch)
    local = devices.local_profile()
    assert local.features == expected
    assert local.note and local.backends and "float32" in local.dtypes
    assert this_machine_is() == set()


def test_no_nvidia_smi_is_no_gpu(monkeypatch):
    for error in (FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 10)):

        def run(*_, error=error, **__):
            raise error

        monkeypatch.setattr(devices.subprocess, "run", run)
        assert devices.visible_gpus() == ()


# ------------------------------------------------------------------------------------------ the doctor


def named(findings, name):
    return [finding for finding in findings if finding.name == name]


def test_findings_have_their_shape():
    findings = doctor.examine()
    for finding in findings:
        assert isinstance(finding, Finding)
        assert finding.status in ("ok", "missing", "warning")
        assert finding.name and finding.detail and "\n" not in finding.detail
        assert finding.fix is None or finding.fix
    for name in (
        "machine",
        "INT8",
        "cores",
        "memory",
        "python",
        "edgec",
        "onnxruntime",
        "gpu",
        "tvm",
        "cache",
    ):
        assert named(findings, name), name
    assert "CPUExecutionProvider" in named(findings, "onnxruntime")[0].detail


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("x86-avx2", "warning", ["7 bits", "up to 63"]),
        ("x86-avx512-vnni", "ok", ["VNNI", "uint8-int8"]),
        ("x86-amx", "ok", ["AMX", "uint8-int8"]),
        ("raspberry-pi-4", "warning", ["no dot product", "int8-int8"]),
        ("raspberry-pi-5", "ok", ["SDOT", "int8-int8"]),
    ],
)
def test_what_the_isa_means_for_int8_is_said_in_words(name, status, words):
    finding = doctor.int8_finding(PROFILES[name])
    assert finding.status == status
    for word in words:
        assert word in finding.detail


def test_the_tvm_runtime_that_crashes_is_warned_of(monkeypatch):
    installed = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}
    monkeypatch.setattr(doctor, "_version", installed.get)
    (finding,) = doctor._tvm()
    assert finding.status == "warning" and "0.1.14.post1" in finding.fix
    installed["apache-tvm-ffi"] = "0.1.14.post1"
    assert next(iter(doctor._tvm())).status == "ok"
    installed.clear()
    assert next(iter(doctor._tvm())).status == "missing"


def test_a_broken_package_is_survived(tmp_path, monkeypatch):
    for name, metadata in (
        ("apache_tvm-1", None),
        ("tensorrt-2", b"\xff\xfe\x00broken"),
        ("apache_tvm_ffi-3", b""),
    ):
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir()
        if metadata is not None:
            (folder / "METADATA").write_bytes(metadata)
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    findings = doctor.examine()
    assert named(findings, "tensorrt")[0].status == "missing"
    broken = named(findings, "onnxruntime")[0]
    assert broken.status == "warning" and "libcudart" in broken.detail and "reinstall" in broken.fix


def test_other_load_is_warned_of(monkeypatch):
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    assert "latencies will be noisy" in next(iter(doctor._load())).detail
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.2, 0.0, 0.0))
    assert next(iter(doctor._load())).status == "ok"


def test_the_cache_folder_is_measured_and_its_size_said(tmp_path, monkeypatch):
    folder = tmp_path / "edgec"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(bytes(2_500_000))
    monkeypatch.setattr(doctor.platformdirs, "user_cache_dir", lambda _: str(folder))
    (finding,) = doctor._cache()
    assert finding.status == "ok" and "2.5 MB" in finding.detail
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)  # root may write anywhere: chmod proves nothing
    (finding,) = doctor._cache()
    assert finding.status == "warning" and finding.fix


def test_a_governor_that_is_not_performance_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "GOVERNOR", tmp_path / "governor")
    assert list(doctor._governor()) == []
    doctor.GOVERNOR.write_text("powersave\n")
    (finding,) = doctor._governor()
    assert finding.status == "warning" and "performance" in finding.fix
    doctor.GOVERNOR.write_text("performance\n")
    assert next(iter(doctor._governor())).status == "ok"
