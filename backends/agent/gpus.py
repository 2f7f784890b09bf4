"""NVIDIA GPUs: names, compute capability, memory, driver, and what else runs on them.

nvidia-smi lists cards in the order of the PCI bus, CUDA the fastest one first; so what CUDA's device 0 is, which is
what engines are built for, is asked of libcuda itself: cuInit, cuDeviceGet, cuDeviceGetName, cuDeviceTotalMem_v2 and
cuDeviceGetAttribute with CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75 and _MINOR = 76, as in cuda.h. That makes
no context. It runs in a process of its own: a broken driver may hang or crash.
"""

import json
import re
import sys
from typing import Any, Dict, List, Optional

from . import reading
from .clocks import gpu_is_there
from .reading import Unread, maybe

#: Compute capability by chip, for where no driver tells it.
CAPABILITIES = {
    "tegra210": "5.3",
    "tegra186": "6.2",
    "tegra194": "7.2",
    "tegra234": "8.7",
    "tegra264": "11.0",
}
_ASK = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
code = cuda.cuInit(0)
assert code == 0, "cuInit fails with CUDA error %d" % code
version, device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
name, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
cuda.cuDriverGetVersion(ctypes.byref(version))
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0, "CUDA sees no device"
cuda.cuDeviceGetName(name, 128, device)
cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
print(json.dumps({
    "name": name.value.decode("utf-8", "replace"), "compute_capability": "%d.%d" % (major.value, minor.value),
    "memory_bytes": memory.value, "cuda": "%d.%d" % (version.value // 1000, version.value % 1000 // 10),
}))
"""


def gpus(root: str, soc: Optional[str], unknown: Dict[str, str]) -> Dict[str, Any]:
    """Return what is known of the GPUs.

    `gpus`: name, compute_capability, driver and memory_bytes of each, as nvidia-smi lists them. `cuda_device`: the same
    of CUDA's device 0, and as `cuda` the version that the driver is for; it stands for `gpus` where nvidia-smi is
    missing, as on Jetson. `sm`: the compute capability that code runs on, a number. `driver`.
    """
    found = {}  # type: Dict[str, Any]
    cards, driver = _cards(root, unknown)
    if cards:
        found["gpus"] = cards
    driver = driver or _module(root)
    if driver:
        found["driver"] = driver
    if soc or cards or gpu_is_there(root):
        first = _first(unknown)
        if first:
            found["cuda_device"] = first
    if "cuda_device" in found and not cards:
        found["gpus"] = [{key: value for key, value in found["cuda_device"].items() if key != "cuda"}]
        unknown.pop("gpus", None)
    told = found.get("cuda_device", cards[0] if len(cards) == 1 else {}).get("compute_capability")
    sm = reading.numeric(told or CAPABILITIES.get(soc or ""))
    if sm is not None:
        found["sm"] = sm
    elif len(cards) > 1:
        unknown["sm"] = "several cards, and CUDA does not tell which one is its first"
    return found


def _cards(root: str, unknown: Dict[str, str]) -> Any:
    fields = ["name", "driver_version", "memory.total", "compute_cap"]
    try:
        try:
            rows = reading.table("gpu", fields)
        except Unread as error:
            if "not a valid field" not in str(error):
                raise
            # drivers before 510 do not know compute_cap
            rows = reading.table("gpu", fields[:3])
    except Unread as error:
        unknown["gpus"] = str(error)
        return [], None
    cards = []
    for row in rows:
        mebibytes = reading.numeric(row["memory.total"])
        card = {"name": row["name"], "compute_capability": row.get("compute_cap")}  # type: Dict[str, Any]
        card["driver"] = row["driver_version"]
        card["memory_bytes"] = int(mebibytes * 2**20) if mebibytes else None
        cards.append({key: value for key, value in card.items() if value is not None})
    return [card for card in cards if "name" in card], next((row["driver_version"] for row in rows), None)


def _module(root: str) -> Optional[str]:
    """Return the version of the kernel's NVIDIA module."""
    told = maybe(root, "/proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)(\s|$)", told)
    return found.group(1) if found else None


def _first(unknown: Dict[str, str]) -> Optional[Dict[str, Any]]:
    try:
        told = json.loads(reading.said([sys.executable, "-c", _ASK], 30.0))
    except (Unread, ValueError) as error:
        unknown["cuda_device"] = str(error)
        return None
    return told if isinstance(told, dict) else None


def processes() -> List[Dict[str, Any]]:
    """Return other programs that compute on the cards: pid, name, memory in MiB. Unread where nvidia-smi does not tell.

    On Jetson nvidia-smi is missing or tells none; see clocks.gpu_load there.
    """
    found = []
    for row in reading.table("compute-apps", ("pid", "process_name", "used_memory")):
        found.append({"pid": row["pid"], "name": row["process_name"], "mebibytes": reading.numeric(row["used_memory"])})
    return found


def in_device_tree(root: str) -> Optional[str]:
    """Return the chip by the device tree's `compatible`: tegra234 and so on, None where it is none of NVIDIA's."""
    found = re.search(r"nvidia,(tegra\d+)", maybe(root, "/proc/device-tree/compatible") or "")
    return found.group(1) if found else None
