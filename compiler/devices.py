"""Device profiles: devices.yaml -> DeviceProfile, and which of them this machine is.

The file is walked as YAML nodes, not as plain objects, so that every complaint names its line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import DeviceError
from .types import DeviceProfile, Fact

PROFILES = Path(__file__).parent.parent / "devices.yaml"

KINDS = ("cpu", "gpu", "soc")
ARCHES = ("x86_64", "aarch64")
BACKENDS = ("ort", "tensorrt", "tvm")
TOOLS = ("jetpack", "tensorrt", "cuda", "python")
DTYPES = ("float32", "float16", "bfloat16", "int8", "float8e4m3fn", "int4", "float4e2m1")
#: Flag of /proc/cpuinfo -> feature of a profile.
FLAGS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "asimddp",
    "i8mm": "i8mm",
    "sve": "sve",
}
FEATURES = (*dict.fromkeys(FLAGS.values()), "cuda")

# ------------------------------------------------------------------------------------------ reading the file


@dataclass(frozen=True)
class _Entry:
    """A YAML node that knows where it stands, and the table of sources its numbers refer to."""

    path: Path
    node: yaml.Node
    sources: Mapping[str, str] = field(default_factory=dict)

    def error(self, what: str, fix: str | None = None) -> DeviceError:
        return DeviceError(what, where=f"{self.path}:{self.node.start_mark.line + 1}", fix=fix)

    def mapping(self, known: Collection[str] | None = None) -> dict[str, _Entry]:
        """Return the values by key; DeviceError for a key that is repeated or not in `known`."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error("expected `key: value` pairs")
        values: dict[str, _Entry] = {}
        for key_node, value in self.node.value:
            entry = self._of(key_node)
            key = entry.text() if known is None else entry.one_of(known, "key")
            if key in values:
                raise entry.error(f"key {key!r} stands here twice")
            values[key] = self._of(value)
        return values

    def items(self) -> list[_Entry]:
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("expected a list", fix="write it as [a, b]")
        return [self._of(node) for node in self.node.value]

    def text(self) -> str:
        return self._scalar("str", fix="put it in quotes")

    def one_of(self, known: Collection[str], what: str = "value") -> str:
        text = self.text()
        if text not in known:
            near = nearest(text, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(sorted(known))}"
            raise self.error(f"unknown {what} {text!r}", fix=fix)
        return text

    def number(self) -> float:
        text = self._scalar("int", "float", fix="write a plain decimal number")
        try:
            number = float(text)
        except ValueError:  # YAML's other notations: 0x10, 1:30
            number = math.nan
        if not 0 <= number < math.inf:
            raise self.error(f"{text!r} is not a plain number that is at least 0")
        return number

    def true(self) -> bool:
        return self._scalar("bool", fix="write true or false").lower() in ("true", "yes", "on")

    def _scalar(self, *tags: str, fix: str) -> str:
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error(f"expected one value ({' or '.join(tags)})")
        if self.node.tag.rpartition(":")[2] not in tags:
            raise self.error(f"{self.node.value!r} has the wrong type, expected {' or '.join(tags)}", fix=fix)
        return str(self.node.value)

    def _of(self, node: yaml.Node) -> _Entry:
        return dataclasses.replace(self, node=node)


def _fact(entry: _Entry) -> Fact:
    parts = entry.mapping(("value", "source", "unverified"))
    if "value" not in parts:
        raise entry.error("a number without `value`", fix="write {value: N, source: KEY}")
    source = parts["source"].one_of(entry.sources, "source") if "source" in parts else None
    unverified = "unverified" in parts and parts["unverified"].true()
    if source is None and not unverified:
        raise entry.error(
            "a number with neither source nor unverified",
            fix="add `source: KEY` (a key of the `sources` table) or `unverified: true`",
        )
    return Fact(parts["value"].number(), entry.sources[source] if source else None, unverified)


def _whole(entry: _Entry) -> int:
    value = _fact(entry).value
    if value != int(value):
        raise entry.error(f"{value} is not a whole number")
    return int(value)


def _texts(known: Collection[str]) -> Callable[[_Entry], tuple[str, ...]]:
    return lambda entry: tuple(item.one_of(known) for item in entry.items())


#: How each field of an entry is read: the fields of DeviceProfile but `name` and `is_local`.
_FIELDS: dict[str, Callable[[_Entry], Any]] = {
    "title": _Entry.text,
    "vendor": _Entry.text,
    "kind": lambda e: e.one_of(KINDS),
    "arch": lambda e: e.one_of(ARCHES),
    "features": _texts(FEATURES),
    "sm": lambda e: _fact(e).value,
    "cores": _whole,
    "memory_gib": _fact,
    "bandwidth_gb_s": _fact,
    "peak_gflops": lambda e: {dtype: _fact(fact) for dtype, fact in e.mapping(DTYPES).items()},
    "dtypes": _texts(DTYPES),
    "backends": _texts(BACKENDS),
    "toolchain": lambda e: {tool: version.text() for tool, version in e.mapping(TOOLS).items()},
    "channel_multiple": _whole,
    "dla": _whole,
    "power_modes": lambda e: tuple(mode.text() for mode in e.items()),
    "default_target": lambda e: None if e.node.tag.endswith(":null") else e.text(),
    "note": _Entry.text,
}
_REQUIRED = ("title", "vendor", "kind", "arch")


def _profile(name: str, entry: _Entry) -> DeviceProfile:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or name == "local":
        raise entry.error(f"{name!r} is no name for a device", fix="use kebab-case; `local` is this machine")
    values = entry.mapping(_FIELDS)
    for key in _REQUIRED:
        if key not in values:
            raise entry.error(f"device {name!r} has no {key!r}")
    return DeviceProfile(name=name, **{key: _FIELDS[key](value) for key, value in values.items()})


def load_profiles(path: Path | None = None) -> dict[str, DeviceProfile]:
    """Return the profiles of `path` (default: the devices.yaml of the package) by name.

    Raises DeviceError with the line number for YAML that cannot be parsed, an unknown or repeated key, a
    value of the wrong type, and a number that has neither a source nor `unverified: true`.
    """
    path = path or PROFILES
    try:
        node = yaml.compose(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise DeviceError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or error
        raise DeviceError(f"not valid YAML: {what}", where=where) from error
    if node is None:
        raise DeviceError("the file is empty", where=str(path))
    top = _Entry(path, node).mapping(("sources", "common", "devices"))
    if "devices" not in top:
        raise _Entry(path, node).error("no `devices`")
    texts = top["sources"].mapping() if "sources" in top else {}
    sources = {key: value.text() for key, value in texts.items()}
    devices = dataclasses.replace(top["devices"], sources=sources).mapping()
    return {name: _profile(name, entry) for name, entry in devices.items()}


def nearest(name: str, known: Iterable[str], n: int = 5) -> list[str]:
    """Return up to `n` of `known` that look like `name`, best first."""
    return difflib.get_close_matches(name.lower(), known, n=n, cutoff=0.5)


def find(name: str) -> DeviceProfile:
    """Return the profile called `name`; "local" is this machine. DeviceError names the nearest ones."""
    if name == "local":
        return local_profile()
    profiles = load_profiles()
    if name not in profiles:
        near = nearest(name, ("local", *profiles))
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise DeviceError(f"unknown device {name!r}", fix=f"{hint}`edgec devices` lists all of them")
    return profiles[name]


# ------------------------------------------------------------------------------------------ this machine

#: Text in the device tree (`model` and `compatible`) -> board. The first match wins, so "super" stands first.
#: Module part ids as in jetson_stats; "-super" is appended in the device trees of L4T R36.4 and later.
BOARDS: tuple[tuple[str, str], ...] = (
    (r"Raspberry Pi (Compute Module )?4", "raspberry-pi-4"),
    (r"Raspberry Pi (Compute Module )?5", "raspberry-pi-5"),
    (r"p3448", "jetson-nano"),
    (r"p3310|p3489", "jetson-tx2"),
    (r"p3668", "jetson-xavier-nx"),
    (r"p2888", "jetson-agx-xavier-32gb"),
    (r"p3767-0000-super", "jetson-orin-nx-16gb-super"),
    (r"p3767-0000", "jetson-orin-nx-16gb"),
    (r"p3767-0001-super", "jetson-orin-nx-8gb-super"),
    (r"p3767-0001", "jetson-orin-nx-8gb"),
    (r"p3767-000[35]-super", "jetson-orin-nano-8gb-super"),
    (r"p3767-000[35]", "jetson-orin-nano-8gb"),
    (r"p3767-0004-super", "jetson-orin-nano-4gb-super"),
    (r"p3767-0004", "jetson-orin-nano-4gb"),
    (r"p3701-0004", "jetson-agx-orin-32gb"),
    (r"p3701-000[05]", "jetson-agx-orin-64gb"),  # 0000 is the first developer kit: this GPU with 32 GB
    (r"p3834-0008", "jetson-agx-thor"),
)
#: What nvidia-smi calls a GPU, after "NVIDIA", "GeForce" and "Tesla" -> device.
GPUS: tuple[tuple[str, str], ...] = (
    (r"RTX 3060", "rtx-3060-12gb"),
    (r"RTX 3090", "rtx-3090"),
    (r"RTX 4060", "rtx-4060"),
    (r"RTX 4090", "rtx-4090"),
    (r"RTX 5090", "rtx-5090"),
    (r"A10", "a10"),
    (r"L4", "l4"),
    (r"T4", "t4"),
    (r"A100.*40GB", "a100-40gb"),
    (r"A100.*80GB.*", "a100-80gb"),
    (r"H100 80GB HBM3", "h100-sxm"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H200", "h200-sxm"),
    (r"H200 NVL", "h200-nvl"),
)
#: Part numbers of Arm's own cores (implementer 0x41) in /proc/cpuinfo.
_ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}
#: Where the CPU's flags cannot be read: what every machine of the kind has, and no more.
_ASSUMED = {"x86_64": ("avx2",), "aarch64": ("neon",)}


@dataclass(frozen=True)
class Cpu:
    """What /proc/cpuinfo says: model name, features that matter here, physical cores (None if not said)."""

    model: str | None = None
    features: tuple[str, ...] = ()
    physical_cores: int | None = None


def parse_cpuinfo(text: str) -> Cpu:
    """Read the text of /proc/cpuinfo, of x86 or Arm."""
    blocks = [dict(_pairs(block)) for block in text.strip().split("\n\n")]
    said = {key: value for block in reversed(blocks) for key, value in block.items()}
    flags = (said.get("flags") or said.get("Features") or "").split()
    core = _ARM_CORES.get(said.get("CPU part", "")) if said.get("CPU implementer") == "0x41" else None
    cores = {(block["physical id"], block["core id"]) for block in blocks if "core id" in block}
    return Cpu(
        model=said.get("model name") or said.get("Model") or core,
        features=tuple(dict.fromkeys(FLAGS[flag] for flag in FLAGS if flag in flags)),
        physical_cores=len(cores) or None,
    )


def _pairs(block: str) -> Iterable[tuple[str, str]]:
    for line in block.splitlines():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def read_cpu() -> Cpu:
    """Return this machine's CPU; empty where there is no /proc/cpuinfo."""
    return parse_cpuinfo(_read("/proc/cpuinfo"))


def machine_arch() -> str:
    """Return the architecture by the name that profiles use: x86_64, aarch64, or what the system says."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def cpu_class(profiles: Mapping[str, DeviceProfile], arch: str, features: Collection[str]) -> DeviceProfile | None:
    """Return the generic CPU profile of `arch` that needs the most of `features`, None if there is none."""
    fitting = [
        profile
        for profile in profiles.values()
        if profile.vendor == "generic" and profile.arch == arch and set(profile.features) <= set(features)
    ]
    return max(fitting, key=lambda profile: len(profile.features), default=None)


def board_name(device_tree: str) -> str | None:
    """Return the board whose `model` or `compatible` stands in the text, None if it is none of ours."""
    return next((name for pattern, name in BOARDS if re.search(pattern, device_tree)), None)


def gpu_name(reported: str) -> str | None:
    """Return the device for a GPU's name as nvidia-smi reports it, None if it is none of ours."""
    short = re.sub(r"^(NVIDIA )?(GeForce |Tesla )?", "", reported.strip())
    return next((name for pattern, name in GPUS if re.fullmatch(pattern, short)), None)


def visible_gpus() -> tuple[str, ...]:
    """Return the names that nvidia-smi reports; empty where it is missing, fails or hangs."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def usable_cores() -> int:
    """Return how many logical CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_profile() -> DeviceProfile:
    """Return this machine's profile: that of its board or CPU class, with its own ISA, cores and memory."""
    profiles, cpu, arch = load_profiles(), read_cpu(), machine_arch()
    features = cpu.features or _ASSUMED.get(arch, ())
    note = None if cpu.features else "the CPU's instruction set could not be read; only the least is assumed"
    model = next(iter(_device_tree().splitlines()), None)
    base = profiles.get(_this_board(cpu) or "") or cpu_class(profiles, arch, features)
    if base is None:
        base = DeviceProfile("local", "", "generic", "cpu", arch, dtypes=("float32", "int8"))
        note = note or f"no CPU class of devices.yaml fits this machine ({arch})"
    return dataclasses.replace(
        base,
        name="local",
        title=model or cpu.model or f"{platform.system()} {arch}",
        features=(*features, *(f for f in base.features if f == "cuda")),
        cores=base.cores if base.kind == "soc" else usable_cores(),
        memory_gib=_memory() or base.memory_gib,
        note=note or base.note,
        is_local=True,
    )


def is_this_machine(profile: DeviceProfile) -> bool:
    """Say whether an artifact for `profile` can be measured right here.

    A board is known by its device tree, a GPU by nvidia-smi's name (which does not always tell memory sizes
    apart), and a CPU class has to be the very class of this CPU, since figures for a lesser one mislead.
    """
    if profile.is_local:
        return True
    if profile.kind == "gpu":
        return profile.name in {gpu_name(gpu) for gpu in visible_gpus()}
    if profile.vendor == "generic":
        mine = cpu_class(load_profiles(), machine_arch(), read_cpu().features)
        return mine is not None and mine.name == profile.name
    return profile.name == _this_board(read_cpu())


def _this_board(cpu: Cpu) -> str | None:
    return board_name(f"{_device_tree()}\n{cpu.model}")  # containers hide the device tree, not /proc/cpuinfo


def _device_tree() -> str:
    """Return model and compatible strings, one a line; empty on machines without a device tree."""
    both = (_read(f"/proc/device-tree/{entry}") for entry in ("model", "compatible"))
    return "\n".join(text.strip("\0").replace("\0", "\n") for text in both if text)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _memory() -> Fact | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, some systems not these names
        return None
    return Fact(round(size / 2**30, 1), source="reported by the operating system")


def of_any_version(profile: DeviceProfile) -> DeviceProfile:
    """Return the profile without the version of TensorRT: what is carried to a device must suit whichever it has."""
    tools = {tool: version for tool, version in profile.toolchain.items() if tool != "tensorrt"}
    return dataclasses.replace(profile, toolchain=tools)


#: What channels are cut by on CPUs, less than their blocks: what a cut inside a block saves, a table of times says.
#: FastestDet with 30 % of its MACs cut one by one is 1.45 times slower than whole, in fours 1.25 times faster, in
#: eights and sixteens no more (ONNX Runtime, AVX512).
CPU_STEP = 4


def multiple_of(profile: DeviceProfile) -> int:
    """Return the multiple in which a device likes its channels, and ranks."""
    return CPU_STEP if profile.kind == "cpu" else profile.channel_multiple
