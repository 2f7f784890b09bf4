"""TVM's target for a device: a tag of TVM's own where there is one, a table, or what the device's features say.

mcpu names are LLVM's; a CPU class takes the least processor that has its features. Devices with a CUDA GPU take it,
with their CPU as the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm.target import codegen

from ...compiler.errors import UnavailableError
from ...compiler.types import DeviceProfile

_ARM, _X86 = "aarch64-linux-gnu", "x86_64-linux-gnu"


@dataclass(frozen=True)
class Cpu:
    """A processor as LLVM knows it: triple and mcpu."""

    triple: str
    mcpu: str


_CPUS: dict[str, Cpu] = {
    "x86-avx2": Cpu(_X86, "haswell"),
    "x86-avx-vnni": Cpu(_X86, "alderlake"),
    "x86-avx512-vnni": Cpu(_X86, "cascadelake"),
    "x86-amx": Cpu(_X86, "sapphirerapids"),
    "arm64-neon": Cpu(_ARM, "generic"),
    "arm64-dotprod": Cpu(_ARM, "cortex-a76"),
    "raspberry-pi-4": Cpu(_ARM, "cortex-a72"),
    "raspberry-pi-5": Cpu(_ARM, "cortex-a76"),
}
#: Hosts of GPUs by CUDA compute capability, where GPU and CPU share a chip: Jetsons.
_JETSONS: dict[float, Cpu] = {
    5.3: Cpu(_ARM, "cortex-a57"),
    6.2: Cpu(_ARM, "cortex-a57"),
    7.2: Cpu(_ARM, "carmel"),
    8.7: Cpu(_ARM, "cortex-a78"),
    11.0: Cpu(_ARM, "neoverse-v2"),
}
#: Cards in a desktop or server: a processor with AVX2 beside them.
_DESKTOP = Cpu(_X86, "x86-64-v3")
#: Where TVM has a target of its own for the device, under this tag: then its limits are TVM's figures.
TAGS: dict[str, str] = {
    "raspberry-pi-4": "raspberry-pi/4b-aarch64",
    "jetson-nano": "nvidia/jetson-nano",
    "jetson-tx2": "nvidia/jetson-tx2",
    "jetson-agx-xavier-32gb": "nvidia/jetson-agx-xavier",
    "jetson-orin-nano-4gb": "nvidia/jetson-orin-nano",
    "jetson-orin-nano-8gb": "nvidia/jetson-orin-nano",
    "jetson-agx-orin-32gb": "nvidia/jetson-agx-orin-32gb",
    "jetson-agx-orin-64gb": "nvidia/jetson-agx-orin-64gb",
    "jetson-agx-thor": "nvidia/jetson-agx-thor",
    "rtx-3060-12gb": "nvidia/geforce-rtx-3060",
    "rtx-3090": "nvidia/geforce-rtx-3090",
    "rtx-4090": "nvidia/geforce-rtx-4090",
    "a100-40gb": "nvidia/nvidia-a100",
    "a100-80gb": "nvidia/nvidia-a100",
    "h100-pcie": "nvidia/nvidia-h100",
    "h100-sxm": "nvidia/nvidia-h100",
}


def cpu_of(profile: DeviceProfile) -> Cpu:
    """Return the processor of a device, this machine's if it is local. UnavailableError for unknown ones."""
    if profile.is_local:
        return Cpu(codegen.llvm_get_system_triple(), codegen.llvm_get_system_cpu())
    found = _CPUS.get(profile.name)
    if profile.kind == "soc":
        found = _JETSONS.get(profile.sm or 0.0)
    elif profile.kind == "gpu":
        found = _DESKTOP
    if found is None:
        why = "edgec does not know this device's processor as LLVM calls it"
        raise UnavailableError(why, where=f"device {profile.name}", fix="use --backend ort")
    return found


def target_of(profile: DeviceProfile, threads: int) -> Any:
    """Return the device's tvm.target.Target, of kind cuda with a host where it has a GPU, else of kind llvm."""
    cpu = cpu_of(profile)
    host = {"kind": "llvm", "mtriple": cpu.triple, "mcpu": cpu.mcpu, "num-cores": threads}
    tag = TAGS.get(profile.name)
    if profile.kind == "cpu" or profile.sm is None:
        known = {} if tag is None else dict(tvm.target.Target(tag).attrs)
        return tvm.target.Target(host | {name: known[name] for name in ("mcpu", "mattr") if name in known})
    gpu = tag if tag is not None else {"kind": "cuda", "arch": f"sm_{round(10 * profile.sm)}"}
    return tvm.target.Target(tvm.target.Target(gpu), host=tvm.target.Target(host))
