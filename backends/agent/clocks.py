"""Clocks, temperatures and power mode, each from where the device's generation has it.

    GPU clock       /sys/class/devfreq/<device>/{cur,min,max}_freq, Hz. The device is 57000000.gpu on Nano (tegra210),
                    17000000.gp10b on TX2, 17000000.gv11b on Xavier, 17000000.ga10b on Orin with L4T 35, 17000000.gpu
                    on Orin from L4T 36 on, gpu-gpc-0 on Thor. A desktop GPU's clocks: nvidia-smi.
    CPU clock       /sys/devices/system/cpu/cpu*/cpufreq/scaling_{cur,min,max}_freq, kHz; an offline core has none
    memory clock    /sys/class/devfreq/bwmgr on Thor; before, it is in /sys/kernel/debug, which only root may read
    locked          jetson_clocks makes the lower limit of a clock the same as the upper one
    temperatures    /sys/class/thermal/thermal_zone*/{type,temp}, thousandths of a degree; trip points of type passive
                    are where throttling begins. A zone that is switched off (cv on Orin, gpu on Thor) fails to read.
    power mode      `nvpmodel -q`; where it refuses, /var/lib/nvpmodel/status with the names of /etc/nvpmodel.conf

Paths of Jetsons as in jetson_stats and NVIDIA's developer guides for L4T 32 to 38.
"""

import os
import re
from typing import Any, Dict, List, Optional, Tuple

from . import reading
from .reading import Unread, maybe, number, paths

#: A GPU's name as a devfreq device, or in the device tree below it.
_GPU = re.compile(r"(^|\.)(gpu|gp10b|gv11b|ga10b|gb10b)$|^gpu-gpc-\d+$")
CPUS = "/sys/devices/system/cpu/cpu[0-9]*"
#: hwmon drivers that tell a CPU's temperature where there is no thermal zone for it.
_CPU_SENSORS = ("k10temp", "zenpower", "coretemp")


# ------------------------------------------------------------------------------------------------ clocks


def clocks(root: str, unknown: Dict[str, str]) -> Dict[str, Dict[str, Any]]:
    """Return clocks by name (gpu, cpu, memory): MHz as `current`, `min`, `max`, and `locked`; what is not known lacks.

    `locked` is left out where the limits are not known.
    """
    found = {}  # type: Dict[str, Dict[str, Any]]
    for device in gpu_devices(root):
        name = "gpu" if "gpu" not in found else "gpu " + os.path.basename(device)
        found[name] = _clock(root, device + "/%s_freq", 1e6)
    found.update(_cpu(root))
    memory = _memory(root, unknown)
    if memory:
        found["memory"] = memory
    if "gpu" not in found:
        found.update(_desktop(root, unknown))
    return {name: clock for name, clock in found.items() if clock}


def gpu_devices(root: str) -> List[str]:
    """Return the devfreq folders of GPUs."""
    found = []
    for device in paths(root, "/sys/class/devfreq/*"):
        name = maybe(root, device + "/device/of_node/name") or ""
        if _GPU.search(os.path.basename(device)) or _GPU.search(name.lower()):
            found.append(device)
    return found


def _clock(root: str, pattern: str, per_mhz: float) -> Dict[str, Any]:
    shorts = (("current", "cur"), ("min", "min"), ("max", "max"))
    values = {kind: number(root, pattern % short) for kind, short in shorts}
    clock = {kind: round(value / per_mhz, 1) for kind, value in values.items() if value}  # type: Dict[str, Any]
    if "min" in clock and "max" in clock:
        clock["locked"] = clock["min"] == clock["max"]
    return clock


def _cpu(root: str) -> Dict[str, Dict[str, Any]]:
    """Return one clock for each kind of core, by its limits; its current one is that of the fastest core."""
    kinds = {}  # type: Dict[Tuple[Any, Any], Dict[str, Any]]
    names = {}  # type: Dict[Tuple[Any, Any], List[str]]
    for cpu in paths(root, CPUS):
        clock = _clock(root, cpu + "/cpufreq/scaling_%s_freq", 1e3)
        if not clock:
            continue
        kind = (clock.get("min"), clock.get("max"))
        names.setdefault(kind, []).append(os.path.basename(cpu)[3:])
        if kind not in kinds or clock.get("current", 0) > kinds[kind].get("current", 0):
            kinds[kind] = clock
    if len(kinds) == 1:
        return {"cpu": next(iter(kinds.values()))}
    return {"cpu %s" % _span(names[kind]): clock for kind, clock in kinds.items()}


def _span(numbers: List[str]) -> str:
    return numbers[0] if len(numbers) == 1 else "%s-%s" % (numbers[0], numbers[-1])


def _memory(root: str, unknown: Dict[str, str]) -> Dict[str, Any]:
    if os.path.isdir(reading.under(root, "/sys/class/devfreq/bwmgr")):
        return _clock(root, "/sys/class/devfreq/bwmgr/%s_freq", 1e6)
    for folder, names in (
        ("/sys/kernel/debug/bpmp/debug/clk/emc", ("rate", "min_rate", "max_rate")),
        ("/sys/kernel/debug/clk/emc", ("clk_rate", "clk_min_rate", "clk_max_rate")),
    ):
        values = [number(root, folder + "/" + name) for name in names]
        if values[0]:
            told = zip(("current", "min", "max"), values)
            clock = {kind: round(value / 1e6, 1) for kind, value in told if value}  # type: Dict[str, Any]
            if "max" in clock:
                # jetson_clocks does not touch this clock's lower limit: it runs at the upper one then
                clock["locked"] = clock["current"] >= clock["max"]
            return clock
    if is_jetson(root):
        unknown["memory clock"] = "only root may read /sys/kernel/debug"
    return {}


def _desktop(root: str, unknown: Dict[str, str]) -> Dict[str, Dict[str, Any]]:
    fields = ("clocks.current.graphics", "clocks.max.graphics", "clocks.current.memory", "clocks.max.memory")
    try:
        rows = reading.table("gpu", fields)
    except Unread as error:
        if is_jetson(root) or gpu_is_there(root):
            unknown["gpu clock"] = str(error)
        return {}
    found = {}
    for n, row in enumerate(rows):
        suffix = "" if len(rows) == 1 else " %d" % n
        for name, short in (("gpu", "graphics"), ("gpu memory", "memory")):
            told = {"current": row["clocks.current." + short], "max": row["clocks.max." + short]}
            values = {kind: reading.numeric(cell) for kind, cell in told.items()}
            found[name + suffix] = {kind: value for kind, value in values.items() if value is not None}
    return found


def is_jetson(root: str) -> bool:
    """Say whether the device tree is that of an NVIDIA chip."""
    return "nvidia,tegra" in (maybe(root, "/proc/device-tree/compatible") or "")


def gpu_is_there(root: str) -> bool:
    """Say whether NVIDIA's driver for cards is loaded."""
    return bool(paths(root, "/proc/driver/nvidia/version") or paths(root, "/dev/nvidia[0-9]*"))


def locked(found: Dict[str, Dict[str, Any]]) -> Optional[bool]:
    """Say whether all clocks whose limits are known are locked, None where no limit is known."""
    told = [clock["locked"] for clock in found.values() if "locked" in clock]
    return all(told) if told else None


def governors(root: str) -> Optional[str]:
    """Return the CPU's frequency governor; several, joined with commas, where the cores differ."""
    found = [maybe(root, cpu + "/cpufreq/scaling_governor") for cpu in paths(root, CPUS)]
    return ", ".join(sorted({one for one in found if one})) or None


def gpu_load(root: str) -> Optional[float]:
    """Return how busy a Jetson's GPU is, in percent; the kernel tells thousandths."""
    for device in gpu_devices(root):
        load = number(root, device + "/device/load")
        if load is not None:
            return load / 10.0
    return None


# ------------------------------------------------------------------------------------------------ temperatures


def temperatures(root: str) -> Tuple[Dict[str, float], Dict[str, float]]:
    """Return degrees Celsius by zone, and by zone the temperature at which throttling begins, where it is told."""
    found, limits = {}, {}  # type: Dict[str, float], Dict[str, float]
    for zone in paths(root, "/sys/class/thermal/thermal_zone*"):
        name = maybe(root, zone + "/type") or os.path.basename(zone)
        value = number(root, zone + "/temp")
        # the PMIC of Nano and TX2 tells 100 degrees always; sensors that are off tell -256
        if value is None or "PMIC" in name or not -100000 < value < 200000:
            continue
        name = re.sub(r"[-_](therm|thermal)$", "", name)
        name = name if name not in found else "%s %s" % (name, os.path.basename(zone)[len("thermal_zone") :])
        found[name] = value / 1000.0
        trips = _passive(root, zone)
        if trips:
            limits[name] = min(trips)
    if not any(re.search("cpu|pkg", name, re.IGNORECASE) for name in found):
        found.update(_sensors(root))
    return found, limits


def _passive(root: str, zone: str) -> List[float]:
    found = []
    for kind in paths(root, zone + "/trip_point_*_type"):
        degrees = number(root, kind[: -len("type")] + "temp")
        if maybe(root, kind) == "passive" and degrees and degrees > 0:
            found.append(degrees / 1000.0)
    return found


def _sensors(root: str) -> Dict[str, float]:
    for folder in paths(root, "/sys/class/hwmon/hwmon*"):
        if maybe(root, folder + "/name") in _CPU_SENSORS:
            values = [number(root, path) for path in paths(root, folder + "/temp*_input")]
            told = [value / 1000.0 for value in values if value is not None]
            if told:
                return {"cpu": max(told)}
    return {}


def gpu_temperatures() -> Dict[str, float]:
    """Return the temperatures of NVIDIA's cards in degrees Celsius; empty where nvidia-smi does not tell any."""
    try:
        rows = reading.table("gpu", ("temperature.gpu",))
    except Unread:
        return {}
    told = [reading.numeric(row["temperature.gpu"]) for row in rows]
    names = ["gpu" if len(told) == 1 else "gpu %d" % n for n in range(len(told))]
    return {name: value for name, value in zip(names, told) if value is not None}


# ------------------------------------------------------------------------------------------------ power mode


def power_mode(root: str) -> str:
    """Return the name of a Jetson's power mode. Unread where nothing tells it."""
    try:
        told = re.search(r"NV Power Mode:[ \t]*(\S.*)", reading.said(["nvpmodel", "-q"]))
        if told:
            return told.group(1).strip()
        reason = "nvpmodel -q tells no power mode"
    except Unread as error:
        reason = str(error)
    status = re.search(r"pmode:0*(\d+)", maybe(root, "/var/lib/nvpmodel/status") or "")
    if status is None:
        raise Unread(reason)
    named = re.search(r"POWER_MODEL\s+ID=%s\s+NAME=(\S+)" % status.group(1), maybe(root, "/etc/nvpmodel.conf") or "")
    return named.group(1) if named else "mode %s" % status.group(1)
