"""What `edgec doctor` says: this machine, what is installed, and what would disturb a measurement.

Optional packages are looked up by their metadata and never imported: a broken one cannot take this down.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Literal

import platformdirs

from .._version import __version__
from ..backends import base, targets
from ..backends.targets import rpc
from ..backends.targets.on_device import DeviceTarget
from ..backends.targets.tracker import Tracker
from .devices import Cpu, local_profile, machine_arch, read_cpu, usable_cores, visible_gpus
from .errors import UnavailableError
from .findings import BUSY, Finding
from .types import DeviceProfile, QuantScheme

TRTEXEC = Path("/usr/src/tensorrt/bin/trtexec")  # where JetPack and the Debian packages put it, off the PATH
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

#: What the best feature of the CPU means for INT8. The first that the machine has is shown.
INT8_WORDS: tuple[tuple[str, Literal["ok", "warning"], str], ...] = (
    ("amx_int8", "ok", "AMX multiplies 8-bit tiles: INT8 is much faster than float32"),
    ("avx512_vnni", "ok", "AVX512-VNNI sums 8-bit products four at a time: INT8 usually beats float32"),
    ("avx_vnni", "ok", "AVX-VNNI sums 8-bit products four at a time: INT8 usually beats float32"),
    (
        "avx2",
        "warning",
        "no VNNI: sums of 8-bit products can saturate, so weights get 7 bits; INT8 may not pay",
    ),
    ("i8mm", "ok", "i8mm multiplies 8-bit matrices: INT8 usually beats float32"),
    ("asimddp", "ok", "SDOT sums 8-bit products four at a time: INT8 usually beats float32"),
    ("neon", "warning", "no dot product: 8-bit products are widened to 16 bits; INT8 may not pay"),
)


def examine(target: str = "local") -> list[Finding]:
    """Return what can be said of this machine and this installation, of a device, or of a tracker's boards.

    In the order shown. UserError for a target that is not understood, UnavailableError for a device out of reach.
    """
    if target.startswith("rpc:"):
        return list(_boards(*rpc.parsed(target)))
    there = targets.of(target)
    if isinstance(there, DeviceTarget):
        from .device_findings import findings  # which are findings of this module

        with closing(there):
            return findings(there.probed)
    profile, cpu = local_profile(), read_cpu()
    parts: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: _machine(profile, cpu),
        _python,
        _onnxruntime,
        lambda: _gpu(profile),
        _tvm,
        _tensorrt,
        _cache,
        _load,
        _governor,
    )
    return [finding for part in parts for finding in part()]


def _boards(tracker: Tracker, key: str | None) -> Iterable[Finding]:
    try:
        there = tracker.boards()
    except UnavailableError as error:
        yield Finding("tracker", "missing", f"{tracker}: {error.what}", fix=error.fix)
        return
    yield Finding("tracker", "ok", f"{tracker}, keys: {', '.join(there) or 'none'}")
    for name, boards in there.items():
        if key in (None, name):
            state = f"{len(boards.servers)} connected, {boards.free} free, {boards.busy} busy"
            waiting = f", {boards.waiting} waiting for one" if boards.waiting else ""
            yield Finding(name, "ok", f"{state}{waiting} ({', '.join(boards.servers)})")
    try:
        if key is not None or not there:
            tracker.refuse(key or "KEY", there)
    except UnavailableError as error:
        yield Finding(key or "boards", "missing", error.what if key else "none is connected", fix=error.fix)


def _machine(profile: DeviceProfile, cpu: Cpu) -> Iterable[Finding]:
    features = ", ".join(profile.features) or "no known instruction set"
    names = ", ".join(dict.fromkeys(filter(None, (profile.title, cpu.model))))
    yield Finding("machine", "ok", f"{names} ({machine_arch()}; {features})")
    yield int8_finding(profile)
    cores = f"{cpu.physical_cores} cores, " if cpu.physical_cores else ""
    yield Finding("cores", "ok", f"{cores}{os.cpu_count()} threads, {usable_cores()} usable by this process")
    memory = profile.memory_gib
    yield Finding("memory", "ok", f"{memory.value:g} GiB" if memory else "size not known")


def int8_finding(profile: DeviceProfile) -> Finding:
    """Say how ONNX Runtime wants its integers on this CPU, and what is to be expected of them."""
    scheme = base.load("ort").schemes(profile)["int8"]
    if not isinstance(scheme, QuantScheme):
        return Finding("INT8", "warning", str(scheme))
    rows = ((status, words) for feature, status, words in INT8_WORDS if feature in profile.features)
    status, words = next(rows, ("warning", "the CPU's instruction set is not known"))
    bits = f"{scheme.activation} activations, {scheme.weight} weights up to {scheme.weight_max}"
    return Finding("INT8", status, f"{words} (scheme {scheme.name}: {bits})")


def _python() -> Iterable[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("edgec", "ok", __version__)


def _onnxruntime() -> Iterable[Finding]:
    packages = {name: version for name in _ORT_PACKAGES if (version := _version(name))}
    if not packages:
        yield Finding("onnxruntime", "missing", "not installed", fix="pip install onnxruntime")
        return
    installed = ", ".join(f"{name} {version}" for name, version in packages.items())
    try:
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
    except (ImportError, OSError, AttributeError) as error:  # what a half-removed or mismatched wheel raises
        fix = f"pip install --force-reinstall {next(iter(packages))}"
        yield Finding("onnxruntime", "warning", f"{installed}, but it cannot be used: {error}", fix=fix)
        return
    yield Finding("onnxruntime", "ok", f"{installed}; {providers}")
    if len(packages) > 1:
        fix = f"pip uninstall {' '.join(packages)}, then install one of them"
        yield Finding("onnxruntime", "warning", "several builds overwrite each other's files", fix=fix)


_ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


def _gpu(profile: DeviceProfile) -> Iterable[Finding]:
    names = visible_gpus() or ((profile.title,) if "cuda" in profile.features else ())
    if not names:
        yield Finding("gpu", "missing", "no NVIDIA GPU visible (optional)")
    elif _version("onnxruntime-gpu") or _version("tensorrt"):
        yield Finding("gpu", "ok", ", ".join(names))
    else:
        fix = "pip install onnxruntime-gpu in place of onnxruntime, or TensorRT"
        yield Finding("gpu", "warning", f"{', '.join(names)}, but nothing installed uses it", fix=fix)


def _tvm() -> Iterable[Finding]:
    version, ffi = _version("apache-tvm"), _version("apache-tvm-ffi")
    if not version:
        yield Finding("tvm", "missing", "not installed (optional)", fix='pip install "edgec[tvm]"')
    elif ffi and ffi.startswith("0.1.15."):
        detail = f"apache-tvm {version}; apache-tvm-ffi {ffi} crashes when a module is saved or tuned"
        yield Finding("tvm", "warning", detail, fix="pip install apache-tvm-ffi==0.1.14.post1")
    else:
        yield Finding("tvm", "ok", f"apache-tvm {version}, apache-tvm-ffi {ffi or 'missing'}")


def _tensorrt() -> Iterable[Finding]:
    version = next(filter(None, map(_version, ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"))), None)
    fix = 'pip install "edgec[tensorrt]"; on a Jetson: sudo apt install nvidia-jetpack'
    if version:
        yield Finding("tensorrt", "ok", version)
    else:
        yield Finding("tensorrt", "missing", "no Python package (optional, needs an NVIDIA GPU)", fix=fix)
    trtexec = shutil.which("trtexec") or (str(TRTEXEC) if TRTEXEC.exists() else None)
    if trtexec:
        yield Finding("trtexec", "ok", trtexec)
    else:
        yield Finding("trtexec", "missing", f"neither on the PATH nor {TRTEXEC} (optional)")


def _cache() -> Iterable[Finding]:
    folder = Path(platformdirs.user_cache_dir("edgec"))
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        fix = f"make {existing} writable, or set XDG_CACHE_HOME to another folder"
        yield Finding("cache", "warning", f"{folder} cannot be written", fix=fix)
        return
    size = sum(_size(Path(parent) / name) for parent, _, names in os.walk(folder) for name in names)
    yield Finding("cache", "ok", f"{folder} ({size / 1e6:.1f} MB; can be deleted at any time)")


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # another edgec has just replaced it
        return 0


def _load() -> Iterable[Finding]:
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):  # Windows has no such call; a sandbox may refuse it
        return
    detail = f"load average {load:.2f} on {cores} threads"
    if load > BUSY * cores:
        fix = "stop other work before `edgec bench` and `edgec compile`"
        yield Finding("load", "warning", f"{detail}: other load, latencies will be noisy", fix=fix)
    else:
        yield Finding("load", "ok", detail)


def _governor() -> Iterable[Finding]:
    try:
        governor = GOVERNOR.read_text(encoding="ascii").strip()
    except OSError:  # virtual machines and other systems have none
        return
    if governor == "performance":
        yield Finding("cpu governor", "ok", governor)
    else:
        fix = "sudo cpupower frequency-set -g performance"
        detail = f"{governor}: the clock follows the load, latencies vary"
        yield Finding("cpu governor", "warning", detail, fix=fix)


def _version(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed or its metadata is damaged."""
    try:
        return importlib.metadata.metadata(package)["Version"] or None
    except (importlib.metadata.PackageNotFoundError, KeyError, OSError, UnicodeDecodeError):
        return None
