"""Watts of NVIDIA's cards by ctypes on NVML, which the driver brings: some microseconds a call, where nvidia-smi takes
a tenth of a second and the processor with it.

Signatures as in nvml.h: nvmlInit_v2, nvmlDeviceGetCount_v2, nvmlDeviceGetHandleByIndex_v2, nvmlDeviceGetName,
nvmlDeviceGetPowerUsage (milliwatts of the whole card; the mean of the last second on some, from Ampere on).
"""

import ctypes
import os
from typing import Any, Callable, List, Optional, Tuple

from .reading import Unread

#: The second one is where WSL has it.
_FILES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")


def _library() -> Any:
    for name in _FILES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Unread("no libnvidia-ml.so.1: no NVIDIA card, or no driver for one")


def meter() -> Tuple[str, Callable[[], Optional[float]]]:
    """Return the name of the card that CUDA uses first, and what reads its watts.

    Unread where there is no such card, it tells no watts, or several differ and it is not known which one CUDA uses.
    """
    library = _library()
    if library.nvmlInit_v2() != 0:
        raise Unread("NVML does not start: the driver does not answer")
    count = ctypes.c_uint(0)
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or not count.value:
        raise Unread("NVML knows no card")
    names, handles = [], []  # type: List[str], List[Any]
    for n in range(count.value):
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(n), ctypes.byref(handle)) == 0:
            library.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
            names.append(name.value.decode("utf-8", "replace"))
            handles.append(handle)
    if not handles:
        raise Unread("NVML lets this user use no card")
    index = first(names)
    handle = handles[index]

    def watts() -> Optional[float]:
        milliwatts = ctypes.c_uint(0)
        if library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(milliwatts)) != 0:
            return None
        return milliwatts.value / 1000.0

    if watts() is None:
        raise Unread("%s tells no watts" % names[index])
    return names[index] if len(names) == 1 else "%s (%d)" % (names[index], index), watts


def first(names: List[str]) -> int:
    """Return which card, in the order of the PCI bus, is CUDA's device 0. Unread where that cannot be told.

    CUDA puts the fastest one first unless CUDA_DEVICE_ORDER=PCI_BUS_ID; among equal ones the order is the bus's.
    """
    if len(names) == 1:
        return 0
    if len(set(names)) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise Unread("several different cards: set CUDA_DEVICE_ORDER=PCI_BUS_ID to tell which one CUDA uses")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if not visible.isdigit() or int(visible) >= len(names):
        raise Unread("CUDA_VISIBLE_DEVICES=%s does not tell which of %d cards it is" % (visible, len(names)))
    return int(visible)
