"""Does what was probed fit the profile that was named, and what is to be said of it before anything is built.

What the profile says and what the probe of backends/agent found are compared by what cannot be changed: the part in the
device tree, the architecture, the GPU's name and compute capability, the CPU's features, the memory. A Super variant is
its board with other clocks, and fits it, either way: engines are the same. A card that devices.yaml does not have may
go by the profile of another one of its compute capability, which the note says: what it can compute with is the same,
how fast is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import devices
from .types import DeviceProfile

#: Of a memory's nominal size, what is at least left for programs: firmware keeps up to a fifth of a small board's.
_LEFT = 0.7
#: What memories are sold as, in GiB; beyond, multiples of 64.
_SIZES = (1, 2, 3, 4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64)
#: The first developer kit of AGX Orin: the GPU of the 64 GB module with 32 GB.
_FIRST_AGX_ORIN = "p3701-0000"
_LIST = "`edgec devices` lists what edgec knows"


@dataclass(frozen=True)
class Mismatch:
    """The device is not the one that was named: what is wrong, and how to put it right."""

    what: str
    fix: str


def fits(profile: DeviceProfile, probed: Mapping[str, Any]) -> Mismatch | None:
    """Return why what was probed is not the profile's device, None where it is or where nothing speaks against it."""
    if profile.is_local:
        return None
    wrong = _arch(profile, probed)
    if wrong is None and profile.kind == "gpu":
        wrong = _card(profile, probed)
    elif wrong is None and profile.vendor == "generic":
        wrong = _cpu_class(profile, probed)
    elif wrong is None:
        wrong = _board(profile, probed)
    return wrong


def toolchain(profile: DeviceProfile, probed: Mapping[str, Any]) -> DeviceProfile:
    """Return the profile with the toolchain that was found in place of the usual one, and a note of what was found.

    A tool that was not found there is not in it, whatever the device usually comes with.
    """
    found = {
        "jetpack": probed.get("jetpack"),
        "l4t": probed.get("l4t"),
        "tensorrt": tensorrt(probed),
        "cuda": probed.get("cuda"),
        "python": probed.get("python"),
        "onnxruntime-providers": " ".join((probed.get("onnxruntime") or {}).get("providers") or ()),
    }
    note = named(probed)
    if profile.kind == "gpu" and unlisted_card(probed):
        note += f"; not in devices.yaml, so it goes by {profile.title}, whose peaks are not its own"
    return replace(profile, toolchain={tool: str(v) for tool, v in found.items() if v}, note=note)


def device_of(probed: Mapping[str, Any]) -> str | None:
    """Return the profile's name of what was probed: its board, its GPU, or the class of its CPU; None for none."""
    profiles = devices.load_profiles()
    names: list[str | None] = [board(probed)] if board(probed) or probed.get("soc") else []
    if not names:
        names = [devices.gpu_name(card["name"]) for card in _cards(probed)[:1]]
        mine = devices.cpu_class(profiles, arch(probed), cpu(probed).features)
        names.append(mine.name if mine else None)
    if names == [None]:
        # a carrier board that does not name its module: chip and memory tell, where they leave one
        boards = [name for name, one in profiles.items() if one.kind == "soc" and name == _family(name)]
        fitting = [name for name in boards if fits(profiles[name], probed) is None]
        names = [*fitting] if len(fitting) == 1 else []
    return next((name for name in names if name in profiles and fits(profiles[name], probed) is None), None)


def unlisted_card(probed: Mapping[str, Any]) -> str | None:
    """Return the name of the card that CUDA uses first where devices.yaml does not have it, None else."""
    first = next((card["name"] for card in _cards(probed)), None)
    return None if first is None or probed.get("soc") or devices.gpu_name(first) else first


def alike(probed: Mapping[str, Any]) -> list[str]:
    """Return the names of the cards in devices.yaml that have the compute capability of the card that is there."""
    sm, profiles = probed.get("sm"), devices.load_profiles()
    return [name for name, one in profiles.items() if one.kind == "gpu" and sm is not None and one.sm == sm]


def tensorrt(probed: Mapping[str, Any]) -> str | None:
    """Return the version of TensorRT that engines are built with on the device, None where it has none."""
    found = probed.get("tensorrt")
    # the fourth number is that of the build
    return ".".join(str(found).split(".")[:3]) if found else None


def named(probed: Mapping[str, Any]) -> str:
    """Return the device and what it runs in a line: "Jetson Orin Nano … (8 GB), JetPack 6.2, TensorRT 10.3.0"."""
    jetpack, version = probed.get("jetpack"), tensorrt(probed)
    parts = [
        title(probed),
        f"JetPack {jetpack}" if jetpack else None,
        None if jetpack or not probed.get("driver") else f"driver {probed['driver']}",
        f"CUDA {probed['cuda']}" if probed.get("cuda") and _has_gpu(probed) and not jetpack else None,
        f"TensorRT {version}" if version else None,
        mode(probed),
    ]
    return ", ".join(part for part in parts if part)


def title(probed: Mapping[str, Any]) -> str:
    """Return the device's own name with its memory: that of the board, of the GPU, or of the CPU."""
    card = _cards(probed)[0] if _cards(probed) else {}
    if probed.get("model"):
        return f"{probed['model']}{_gigabytes(probed.get('memory_bytes'))}"
    if card:
        return f"{card['name']}{_gigabytes(card.get('memory_bytes'))}"
    return f"{cpu(probed).model or probed.get('arch') or 'a device'}{_gigabytes(probed.get('memory_bytes'))}"


def mode(probed: Mapping[str, Any]) -> str | None:
    """Return a Jetson's power mode in words, None where it is not known."""
    name = probed.get("power_mode")
    return f"{name} mode" if name and "mode" not in str(name).lower() else name


def cpu(probed: Mapping[str, Any]) -> devices.Cpu:
    """Return the device's CPU: the features that profiles know of its flags."""
    told = probed.get("cpu") or {}
    lines = [f"flags: {' '.join(told.get('features') or ())}", f"model name: {told.get('model') or ''}"]
    lines += [f"CPU implementer: {told.get('implementer') or ''}", f"CPU part: {told.get('part') or ''}"]
    return replace(devices.parse_cpuinfo("\n".join(lines)), physical_cores=told.get("cores"))


def arch(probed: Mapping[str, Any]) -> str:
    """Return the device's architecture by the name that profiles use, empty where it is not known."""
    machine = str(probed.get("arch") or "").lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def gibibytes(size: float) -> float:
    """Return what a memory is sold as, in GiB, by the bytes that are left of it for programs."""
    left = size / 2**30 / 1.02
    return next((n for n in _SIZES if n >= left), math.ceil(left / 64) * 64)


# ------------------------------------------------------------------------------------------ what does not fit


def _arch(profile: DeviceProfile, probed: Mapping[str, Any]) -> Mismatch | None:
    is_card_on_any = profile.kind == "gpu"  # a card may be in a server with an Arm processor as well
    if probed.get("bits") == 32:
        what = f"its python3 is a 32-bit one ({probed.get('arch')}); {profile.title} needs a 64-bit system"
        return Mismatch(what, "install a 64-bit system on the device")
    if is_card_on_any or not arch(probed) or arch(probed) == profile.arch:
        return None
    return _other(profile, probed, f"which has a processor of {arch(probed)}, not {profile.arch}")


def _board(profile: DeviceProfile, probed: Mapping[str, Any]) -> Mismatch | None:
    """Compare a board by its part, and where that is not known by chip and memory."""
    found = board(probed)
    if found is not None:
        if _family(found) != _family(profile.name):
            return _other(profile, probed, "", found)
        # its first kit has half the memory, and there is no other profile for it
        return None if probed.get("part") == _FIRST_AGX_ORIN else _memory(profile, probed, at_most=False)
    sm = probed.get("sm")
    if profile.sm is None or probed.get("part"):
        return _other(profile, probed, f"module {probed['part']}" if probed.get("part") else "")
    if sm != profile.sm:
        has = f"whose GPU has compute capability {sm:.1f}" if sm else "which has no NVIDIA GPU that answers"
        return _other(profile, probed, f"{has}, not {profile.sm:.1f}")
    return _memory(profile, probed, at_most=True)


def _card(profile: DeviceProfile, probed: Mapping[str, Any]) -> Mismatch | None:
    cards = _cards(probed)
    if not cards:
        why = probed.get("unknown", {}).get("gpus") or "the driver names none"
        what = f"devices.yaml says {profile.title}, but {title(probed)} has no NVIDIA GPU that can be seen ({why})"
        return Mismatch(what, "install NVIDIA's driver there, or name another --device")
    first = cards[0]
    if devices.gpu_name(first["name"]) == profile.name:
        return _card_memory(profile, probed, first)
    others = [card["name"] for card in cards[1:] if devices.gpu_name(card["name"]) == profile.name]
    if others:
        what = f"devices.yaml says {profile.title}, which is there, but CUDA uses {first['name']} first"
        return Mismatch(what, "set CUDA_VISIBLE_DEVICES for the user on the device, in what its login shell reads")
    if unlisted_card(probed):
        near = alike(probed)
        wrong = _other(profile, probed, "")
        fix = f"take one of its compute capability: --device {' or '.join(near)}" if near else wrong.fix
        return None if profile.name in near else replace(wrong, fix=fix)
    return _other(profile, probed, "", devices.gpu_name(first["name"]))


def _card_memory(profile: DeviceProfile, probed: Mapping[str, Any], card: Mapping[str, Any]) -> Mismatch | None:
    size, memory = card.get("memory_bytes"), profile.memory_gib
    if size is None or memory is None or _LEFT * memory.value <= size / 2**30 <= memory.value * 1.1:
        return None
    return _other(profile, probed, f"which has {size / 2**30:.3g} GiB, not {memory.value:g}")


def _cpu_class(profile: DeviceProfile, probed: Mapping[str, Any]) -> Mismatch | None:
    """Compare a class of CPUs by its features; a CPU that has more runs what is built for the class."""
    has = cpu(probed).features
    missing = [feature for feature in profile.features if feature not in has]
    if not has or not missing:
        return None
    mine = devices.cpu_class(devices.load_profiles(), arch(probed), has)
    return _other(profile, probed, f"whose CPU lacks {', '.join(missing)}", mine.name if mine else None)


def _memory(profile: DeviceProfile, probed: Mapping[str, Any], *, at_most: bool) -> Mismatch | None:
    """Compare the memory. A board whose part is right may have more of it than its profile, never less."""
    size, memory = probed.get("memory_bytes"), profile.memory_gib
    if size is None or memory is None:
        return None
    has = size / 2**30
    if has >= _LEFT * memory.value and (has <= memory.value * 1.1 or not at_most):
        return None
    return _other(profile, probed, f"which has {gibibytes(size):g} GB, not {memory.value:g}")


def _other(profile: DeviceProfile, probed: Mapping[str, Any], why: str, found: str | None = None) -> Mismatch:
    """Return the mismatch in words; `found` is the profile that the device has, where it is known."""
    profiles = devices.load_profiles()
    is_it = profiles[found].title if found in profiles and found != profile.name else None
    mine = title(probed)
    said = f"{is_it} ({mine})" if is_it and is_it not in mine else mine
    what = f"devices.yaml says {profile.title}, but this is {_article(said)}{said}{', ' + why if why else ''}"
    fix = f"--device {found}" if is_it else f"name the device that it is with --device; {_LIST}"
    return Mismatch(what, fix)


def _article(words: str) -> str:
    return "an " if words[:1] in "AEIO" or words.startswith("NVIDIA") else "a "


def board(probed: Mapping[str, Any]) -> str | None:
    """Return the profile of the board by its device tree, None where it is none of ours."""
    tree = [str(probed.get("model") or ""), *probed.get("compatible", ()), cpu(probed).model or ""]
    # the part may be known where the device tree does not name it
    return devices.board_name("\n".join([*tree, str(probed.get("part") or "")]))


def _family(name: str) -> str:
    return name.removesuffix("-super")


def _cards(probed: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the cards, the one first that CUDA uses first where that is known."""
    first, cards = probed.get("cuda_device"), list(probed.get("gpus") or ())
    if not first:
        return cards
    rest = list(cards)
    same = next((n for n, card in enumerate(rest) if card["name"] == first["name"]), None)
    if same is not None:
        del rest[same]
    return [first, *rest]


def _has_gpu(probed: Mapping[str, Any]) -> bool:
    return bool(_cards(probed) or probed.get("soc"))


def _gigabytes(size: float | None) -> str:
    return f" ({gibibytes(size):g} GB)" if size else ""
