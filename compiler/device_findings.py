"""What `edgec doctor --target ssh://…` says of a device: a line for each group of facts that were probed there.

Where something could not be read, the line says why; where it would disturb a measurement, what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import matching
from .findings import BUSY, Finding

#: Bytes that a build and its model should have at least: of memory, of disk.
_MEMORY, _DISK = 1 << 30, 1 << 30
#: Degrees Celsius below a zone's throttling point from which on it is said to be close, and what is hot without one.
_CLOSE, _HOT = 5.0, 80.0
#: Percent of the GPU that other work may use.
_IDLE = 10.0

_Probed = Mapping[str, Any]


def findings(probed: _Probed) -> list[Finding]:
    """Return the findings in the order shown."""
    return [finding for part in _PARTS for finding in part(probed)]


def _why(probed: _Probed, *names: str) -> str:
    unknown = probed.get("unknown", {})
    return next((str(unknown[name]) for name in names if name in unknown), "not told")


def _machine(probed: _Probed) -> Iterable[Finding]:
    known = matching.device_of(probed)
    features = ", ".join(matching.cpu(probed).features) or "no known instruction set"
    detail = f"{matching.title(probed)} ({matching.arch(probed) or 'architecture not known'}; {features})"
    if known:
        yield Finding("machine", "ok", f"{detail}: --device {known}")
    else:
        yield Finding("machine", "warning", f"{detail}: not in devices.yaml", fix="name the nearest one with --device")
    cores, threads = (probed.get("cpu") or {}).get("cores"), (probed.get("cpu") or {}).get("threads")
    if cores or threads:
        yield Finding("cores", "ok", f"{cores or '?'} cores, {threads or '?'} threads usable by this user")


def _python(probed: _Probed) -> Iterable[Finding]:
    where = ", ".join(filter(None, (probed.get("system"), probed.get("kernel"))))
    detail = f"{probed.get('python', 'version not told')}{f' on {where}' if where else ''}"
    if probed.get("bits") == 32:
        yield Finding("python", "warning", f"{detail}, a 32-bit one", fix="install a 64-bit system on the device")
    else:
        yield Finding("python", "ok", detail)


def _memory(probed: _Probed) -> Iterable[Finding]:
    size, free = probed.get("memory_bytes"), probed.get("memory_available_bytes")
    if size is None or free is None:
        yield Finding("memory", "warning", _why(probed, "memory_bytes", "memory_available_bytes", "memory"))
    else:
        detail = f"{size / 2**30:.1f} GiB, {free / 2**30:.1f} free"
        yield _judged("memory", detail, free >= _MEMORY, "stop other programs on the device, a desktop for example")
    disk = probed.get("disk_free_bytes")
    if disk is None:
        yield Finding("disk", "warning", _why(probed, "disk_free_bytes", "memory"))
    else:
        detail = f"{disk / 1e9:.1f} GB free in the temporary folder"
        yield _judged("disk", detail, disk >= _DISK, "make room on the device, or set TMPDIR there to a larger disk")


def _judged(name: str, detail: str, good: bool, fix: str) -> Finding:
    return Finding(name, "ok", detail) if good else Finding(name, "warning", detail, fix=fix)


def _gpu(probed: _Probed) -> Iterable[Finding]:
    cards = [card["name"] for card in probed.get("gpus") or ()]
    sm, soc, driver = probed.get("sm"), probed.get("soc"), probed.get("driver")
    told = ", ".join(cards) or (f"that of {soc}" if soc else "")
    if not told:
        yield Finding("gpu", "missing", f"no NVIDIA GPU visible ({_why(probed, 'gpus')})")
        return
    more = (f"compute capability {sm:.1f}" if sm else None, f"driver {driver}" if driver else None)
    detail = ", ".join(filter(None, (told, *more)))
    near = matching.alike(probed) if matching.unlisted_card(probed) else []
    if near and probed.get("cuda_device"):
        fix = f"it can go by one of its compute capability: --device {' or '.join(near)}"
        yield Finding("gpu", "warning", f"{detail}: not in devices.yaml", fix=fix)
    elif probed.get("cuda_device"):
        yield Finding("gpu", "ok", detail)
    else:
        fix = "on the device: sudo usermod -aG video $USER, then log in anew; see also nvidia-smi there"
        detail = f"{detail}, but CUDA does not use it: {_why(probed, 'cuda_device')}"
        yield Finding("gpu", "warning", detail, fix=fix)


def _jetpack(probed: _Probed) -> Iterable[Finding]:
    if probed.get("l4t"):
        jetpack = probed.get("jetpack")
        status = (
            f"{jetpack} (L4T {probed['l4t']})" if jetpack else f"L4T {probed['l4t']}, of no JetPack that edgec knows"
        )
        yield Finding("jetpack", "ok", status)
    elif probed.get("soc"):
        yield Finding(
            "jetpack", "warning", "an NVIDIA chip without NVIDIA's system for it", fix="flash it with JetPack"
        )


def _cuda(probed: _Probed) -> Iterable[Finding]:
    if not (probed.get("gpus") or probed.get("soc")):
        return  # nothing there would use it, nor TensorRT
    fix = (
        "sudo apt install nvidia-jetpack" if probed.get("soc") else "pip install tensorrt, which brings CUDA's runtime"
    )
    if probed.get("cuda"):
        upto = (probed.get("cuda_device") or {}).get("cuda")
        yield Finding("cuda", "ok", f"{probed['cuda']}{f', the driver is for up to {upto}' if upto else ''}")
    else:
        yield Finding("cuda", "missing", _why(probed, "cuda"), fix=f"on the device: {fix}")
    version, library = matching.tensorrt(probed), probed.get("tensorrt_library")
    fix = "sudo apt install nvidia-jetpack" if probed.get("soc") else "python3 -m pip install tensorrt"
    if version:
        beside = f" (libnvinfer {library})" if library and library != version else ""
        yield Finding("tensorrt", "ok", f"{version}{beside}")
    else:
        yield Finding("tensorrt", "missing", _why(probed, "tensorrt"), fix=f"on the device: {fix}")
    if probed.get("trtexec"):
        yield Finding("trtexec", "ok", str(probed["trtexec"]))
    else:
        yield Finding("trtexec", "missing", f"{_why(probed, 'trtexec')} (optional)")


def _onnxruntime(probed: _Probed) -> Iterable[Finding]:
    told = probed.get("onnxruntime")
    fix = "on the device: python3 -m pip install onnxruntime"
    if told:
        yield Finding("onnxruntime", "ok", f"{told['version']}; {', '.join(told.get('providers') or ())}")
        return
    why = _why(probed, "onnxruntime", "python modules")
    yield Finding("onnxruntime", "warning" if "cannot be used" in why else "missing", why, fix=fix)


def _tvm(probed: _Probed) -> Iterable[Finding]:
    if probed.get("tvm"):
        yield Finding("tvm", "ok", str(probed["tvm"]))
    else:
        fix = "on the device: python3 -m pip install apache-tvm"
        yield Finding("tvm", "missing", f"{_why(probed, 'tvm', 'python modules')} (optional)", fix=fix)


def _power_mode(probed: _Probed) -> Iterable[Finding]:
    if probed.get("power_mode"):
        yield Finding("power mode", "ok", f"{probed['power_mode']} (nvpmodel -q)")
    elif probed.get("soc"):
        fix = "sudo nvpmodel -q on the device tells it; latencies depend on it"
        yield Finding("power mode", "warning", _why(probed, "power mode"), fix=fix)
    if probed.get("watts") is not None:
        yield Finding("power sensor", "ok", f"{probed['rail']}, now {probed['watts']:.1f} W")
    elif probed.get("soc") or probed.get("gpus"):
        yield Finding("power sensor", "missing", f"{_why(probed, 'watts')} (no energy is measured)")


def _clocks(probed: _Probed) -> Iterable[Finding]:
    found = probed.get("clocks") or {}
    if not found:
        yield Finding("clocks", "ok", _why(probed, "clocks", "state"))
        return
    detail = ", ".join(f"{name} {_range(clock)}" for name, clock in found.items())
    lock = probed.get("clocks_locked")
    if lock or lock is None:
        yield Finding("clocks", "ok", f"{detail}{': locked' if lock else ''}")
    elif probed.get("soc"):
        detail = f"{detail}: not locked, they follow the load and latencies vary"
        yield Finding("clocks", "warning", detail, fix="sudo jetson_clocks on the device")
    else:
        yield Finding("clocks", "ok", f"{detail}: they follow the load")
    governor = probed.get("governor")
    if governor is None or lock:
        return
    fix = "sudo cpupower frequency-set -g performance on the device"
    fix = "sudo jetson_clocks on the device" if probed.get("soc") else fix
    said = governor if governor == "performance" else f"{governor}: the clock follows the load, latencies vary"
    yield _judged("cpu governor", said, governor == "performance", fix)


def _range(clock: Mapping[str, float]) -> str:
    limits = [f"{clock[end]:g}" for end in ("min", "max") if end in clock]
    of = f" of {' to '.join(dict.fromkeys(limits))}" if limits else ""
    return f"{clock['current']:g}{of} MHz" if "current" in clock else f"{' to '.join(limits)} MHz"


def _temperature(probed: _Probed) -> Iterable[Finding]:
    zones, limits = probed.get("temperatures") or {}, probed.get("limits") or {}
    if not zones:
        yield Finding("temperature", "ok", _why(probed, "temperatures", "state"))
    else:
        near = [name for name, value in zones.items() if value >= limits.get(name, _HOT + _CLOSE) - _CLOSE]
        hottest = max(zones, key=lambda name: zones[name])
        detail = f"{zones[hottest]:.0f} degrees Celsius at most ({hottest})"
        if near:
            detail += f"; close to throttling or hot: {', '.join(near)}"
        yield _judged("temperature", detail, not near, "let it cool down, see that its fan turns")
    yield _throttling(probed)


def _throttling(probed: _Probed) -> Finding:
    since = [f"{name}: {count}" for name, count in (probed.get("counts") or {}).items() if count]
    past = f"since it was started: {', '.join(since)}" if since else ""
    if probed.get("throttled"):
        detail = "; ".join(filter(None, (f"throttled now: {', '.join(probed.get('reasons') or ())}", past)))
        return Finding("throttling", "warning", detail, fix="see to its cooling, its power supply and its power mode")
    if probed.get("throttled") is None and not probed.get("counts"):
        return Finding("throttling", "ok", _why(probed, "throttling", "state"))
    return Finding("throttling", "ok", "; ".join(filter(None, ("none now", past))))


def _load(probed: _Probed) -> Iterable[Finding]:
    load, threads = probed.get("load"), (probed.get("cpu") or {}).get("threads") or 1
    others, busy = probed.get("gpu_processes") or (), probed.get("gpu_load")
    said, noisy = [], False
    if load:
        said.append(f"load average {load[0]:.2f} on {threads} threads")
        noisy = load[0] > BUSY * threads
    if busy is not None:
        said.append(f"GPU {busy:.0f} % busy")
        noisy = noisy or busy > _IDLE
    if others:
        names = ", ".join(dict.fromkeys(str(one["name"]) for one in others))
        said.append(f"{len(others)} other program{'s' if len(others) > 1 else ''} on the GPU ({names})")
        noisy = True
    if not said:
        yield Finding("load", "ok", _why(probed, "load"))
        return
    detail = ", ".join(said) + (": other load, latencies will be noisy" if noisy else "")
    yield _judged("load", detail, not noisy, "stop other work on the device before `edgec bench` and `edgec compile`")


_PARTS: tuple[Callable[[_Probed], Iterable[Finding]], ...] = (
    _machine,
    _python,
    _memory,
    _gpu,
    _jetpack,
    _cuda,
    _onnxruntime,
    _tvm,
    _power_mode,
    _clocks,
    _temperature,
    _load,
)
