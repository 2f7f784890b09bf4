"""What the device is and what is installed on it: facts as JSON, and for each that cannot be read the reason.

    model, compatible, soc      the device tree: /proc/device-tree/{model,compatible}
    part                        the module's part, p3767-0003 for example: in `compatible`; else nvidia,boardids
                                ("3448:0000:..."), nvidia,dtsfilename, or the EEPROM ("699-13767-0003-300 ..." from byte
                                20 on, /sys/bus/i2c/devices/*-0050/eeprom), which names some parts otherwise
    cpu                         of /proc/cpuinfo: `model` (Raspberry Pi has the board's there), `implementer` and `part`
                                of Arm cores, `features` (flags as they stand there), `cores`; `threads` that this
                                process may use
    memory_bytes                /proc/meminfo; a Jetson's total lacks what its firmware keeps; memory_available_bytes
    disk_free_bytes             in the temporary folder, where models go
    clocks, temperatures, ...   as in power.Sensors.state(); `gpu_load` in percent, `load` the load averages
    the rest                    gpus.py, software.py

Only clocks, temperatures and load change from one probe to the next.
"""

import os
import platform
import re
import shutil
import struct
import sys
import tempfile
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import clocks, gpus, software
from .power import Sensors, total
from .reading import Unread, maybe, number, paths, text

#: Parts of modules, not of the carrier boards that stand before them ("p3768-0000+p3767-0005").
_PART = r"p(?:2180|2888|3310|3448|3489|3636|3668|3701|3767|3834)-\d{4}"


def probe(root: str = "/") -> Dict[str, Any]:
    """Return the facts; what cannot be read is not among them, its reason is in `unknown` by name. Never raises.

    `root` is a folder that stands for the device's file system; programs and Python modules are this machine's.
    """
    facts = {"unknown": {}}  # type: Dict[str, Any]
    unknown = facts["unknown"]  # type: Dict[str, str]
    groups: Tuple[Tuple[str, Callable[[], Dict[str, Any]]], ...] = (
        ("machine", lambda: _machine(root, unknown)),
        ("cpu", lambda: _cpu(root, unknown)),
        ("memory", lambda: _memory(root, unknown)),
        ("gpus", lambda: gpus.gpus(root, facts.get("soc"), unknown)),
        ("software", lambda: software.software(root, unknown)),
        ("state", lambda: _state(root, unknown)),
        ("load", lambda: _load(root, unknown)),
    )
    for name, group in groups:
        try:
            facts.update({key: value for key, value in group().items() if value is not None})
        except Exception as error:  # one odd file on one odd device shall not hide all the rest
            unknown[name] = "%s: %s" % (type(error).__name__, error)
    return facts


def _machine(root: str, unknown: Dict[str, str]) -> Dict[str, Any]:
    found = {
        "host": platform.node() or None,
        "arch": platform.machine() or None,
        "bits": struct.calcsize("P") * 8,  # a 64-bit kernel may run a 32-bit system, as on Raspberry Pi
        "kernel": platform.release() or None,
        "system": _system(root),
        "python": platform.python_version(),
        "python_path": sys.executable,
    }  # type: Dict[str, Any]
    try:
        found["model"] = text(root, "/proc/device-tree/model") or None
        found["compatible"] = [one for one in text(root, "/proc/device-tree/compatible").split("\0") if one]
    except Unread as error:
        unknown["model"] = "no device tree (%s)" % error
    found["soc"] = gpus.in_device_tree(root)
    if found["soc"]:
        found["part"] = _part(root, found.get("compatible") or [])
        if found["part"] is None:
            unknown["part"] = "neither the device tree nor the EEPROM tells it"
    return found


def _system(root: str) -> Optional[str]:
    told = re.search(r'^PRETTY_NAME="?([^"\n]+)', maybe(root, "/etc/os-release") or "", re.MULTILINE)
    return told.group(1) if told else None


def _part(root: str, compatible: List[str]) -> Optional[str]:
    board = maybe(root, "/proc/device-tree/nvidia,boardids") or ""
    named = re.match(r"(\d{4}):(\d{4})", board)
    ids = ["p%s-%s" % named.groups()] if named else []
    for one in compatible + ids + [maybe(root, "/proc/device-tree/nvidia,dtsfilename") or ""]:
        found = re.search(_PART, one)
        if found:
            return found.group()
    for path in paths(root, "/sys/bus/i2c/devices/*-0050/eeprom"):
        numbers = re.search(r"699-\d(\d{4})-(\d{4})", maybe(root, path) or "")
        if numbers:
            return "p%s-%s" % numbers.groups()
    return None


def _cpu(root: str, unknown: Dict[str, str]) -> Dict[str, Any]:
    try:
        blocks = text(root, "/proc/cpuinfo").split("\n\n")
    except Unread as error:
        unknown["cpu"] = str(error)
        return {"cpu": {"threads": _usable()}}
    fields = [dict(re.findall(r"^([^\n:]+?)\s*:[ \t]*(.*)$", block, re.MULTILINE)) for block in blocks]
    said = {key: value for block in reversed(fields) for key, value in block.items()}
    cores = {(block.get("physical id"), block["core id"]) for block in fields if "core id" in block}
    cpu = {
        "model": said.get("model name") or said.get("Model"),
        "implementer": said.get("CPU implementer"),
        "part": said.get("CPU part"),
        "features": (said.get("flags") or said.get("Features") or "").split(),
        "cores": len(cores) or sum("processor" in block for block in fields) or None,
        "threads": _usable(),
    }
    return {"cpu": {key: value for key, value in cpu.items() if value}}


def _usable() -> Optional[int]:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count()


def _memory(root: str, unknown: Dict[str, str]) -> Dict[str, Any]:
    found = {}  # type: Dict[str, Any]
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB", maybe(root, "/proc/meminfo") or "", re.MULTILINE))
    for name, key in (("memory_bytes", "MemTotal"), ("memory_available_bytes", "MemAvailable")):
        if key in told:
            found[name] = int(told[key]) * 1024
        else:
            unknown[name] = "/proc/meminfo does not tell %s" % key
    folder = tempfile.gettempdir()
    try:
        found["disk_free_bytes"] = shutil.disk_usage(folder).free
    except OSError as error:
        unknown["disk_free_bytes"] = "%s: %s" % (folder, error.strerror or error)
    return found


def _state(root: str, unknown: Dict[str, str]) -> Dict[str, Any]:
    sensors = Sensors(root)
    found = sensors.state()
    watts = sensors.watts()
    unknown.update(sensors.unknown)
    for name, why in (
        ("clocks", "the kernel tells no clocks, as in a virtual machine"),
        ("temperatures", "the kernel tells no temperatures, as in a virtual machine"),
    ):
        if not found[name]:
            unknown.setdefault(name, why)
            del found[name]
    found["governor"] = clocks.governors(root)
    if found["governor"] is None:
        unknown["governor"] = "the kernel does not change the CPU's clock, or does not tell"
    if watts:
        found["rail"], found["watts"] = total(watts)
    return found


def _load(root: str, unknown: Dict[str, str]) -> Dict[str, Any]:
    found = {"gpu_load": clocks.gpu_load(root)}  # type: Dict[str, Any]
    averages = re.match(r"([\d.]+) ([\d.]+) ([\d.]+)", maybe(root, "/proc/loadavg") or "")
    if averages:
        found["load"] = [float(one) for one in averages.groups()]
    else:
        unknown["load"] = "/proc/loadavg cannot be read"
    try:
        found["gpu_processes"] = gpus.processes()
    except Unread as error:
        if clocks.gpu_is_there(root) or clocks.is_jetson(root):
            unknown["gpu_processes"] = str(error)
    uptime = number(root, "/proc/uptime")
    found["up_seconds"] = uptime
    return found
