"""What slows a device down, now and in events since it was started.

    over-current    hwmon "soctherm_oc" of Orin and Thor: oc<n>_event_cnt, events since boot, where n is 1 for too low
                    a voltage, 2 for average, 3 for instantaneous current (NVIDIA's driver tegra234-oc-event)
    cooling         /sys/class/thermal/cooling_device*/cur_state above 0, of devices that slow clocks, not of fans
    desktop GPUs    clocks_event_reasons.active of nvidia-smi, clocks_throttle_reasons.active before driver 535: bits
                    as in nvml.h (nvmlClocksThrottleReason...)
    Raspberry Pi    `vcgencmd get_throttled`: bits 0 to 3 what is now, 16 to 19 what has been since boot
    Intel           /sys/devices/system/cpu/cpu*/thermal_throttle/package_throttle_count, events since boot

As in NVIDIA's developer guides for L4T 35 to 38 and nvml.h, and in Raspberry Pi's documentation of vcgencmd.
"""

import os
import re
from typing import Dict, List, Optional

from . import reading
from .clocks import CPUS, gpu_is_there, is_jetson
from .reading import Unread, maybe, number, paths

#: Cooling devices that slow clocks down; pwm-fan and the like do not.
_SLOWS = re.compile(r"throttle|balanced|cpufreq|devfreq|alert|^Processor$", re.IGNORECASE)
_OVER_CURRENT = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}
#: Bits of nvml.h that mean: slower than asked for.
_NVML = (
    (0x04, "power limit"),
    (0x08, "hardware slowdown"),
    (0x20, "thermal slowdown by the driver"),
    (0x40, "thermal slowdown by the hardware"),
    (0x80, "power brake"),
)
_PI = ((1 << 0, "under-voltage"), (1 << 1, "CPU clock capped"), (1 << 2, "throttled"), (1 << 3, "temperature limit"))


class Throttling:
    """What slows a device down: `now` (None where nothing tells), the `reasons`, and `counts` of events since boot."""

    def __init__(self, root: str, unknown: Dict[str, str]) -> None:
        self.reasons, self.counts = [], {}  # type: List[str], Dict[str, int]
        self._told = False
        self._over_current(root)
        self._cooling(root)
        self._intel(root)
        self._card(root, unknown)
        if "raspberry pi" in (maybe(root, "/proc/device-tree/model") or "").lower():
            self._pi(root, unknown)
        if not self._told and not self.counts:
            unknown.setdefault("throttling", "neither the kernel nor nvidia-smi tells")

    @property
    def now(self) -> Optional[bool]:
        """Say whether it is throttled at this moment."""
        return bool(self.reasons) if self._told else None

    def _over_current(self, root: str) -> None:
        for path in paths(root, "/sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt"):
            short = os.path.basename(path).split("_")[0]
            count, enabled = number(root, path), number(root, path.replace("event_cnt", "throt_en"))
            if count is not None and enabled != 0:
                self.counts[_OVER_CURRENT.get(short, short)] = count

    def _cooling(self, root: str) -> None:
        for folder in paths(root, "/sys/class/thermal/cooling_device*"):
            name, state = maybe(root, folder + "/type") or "", number(root, folder + "/cur_state")
            if state is not None and _SLOWS.search(name):
                self._told = True
                if state > 0:
                    self.reasons.append("%s at step %d" % (name, state))

    def _intel(self, root: str) -> None:
        found = [number(root, p) for p in paths(root, CPUS + "/thermal_throttle/package_throttle_count")]
        told = [count for count in found if count is not None]
        if told:
            self.counts["CPU thermal throttling"] = max(told)

    def _card(self, root: str, unknown: Dict[str, str]) -> None:
        try:
            rows = _reasons()
        except Unread as error:
            if gpu_is_there(root) and not is_jetson(root):
                unknown["throttling"] = str(error)
            return
        for n, bits in enumerate(rows):
            if bits is not None:
                self._told = True
                which = "GPU" if len(rows) == 1 else "GPU %d" % n
                self.reasons += ["%s: %s" % (which, name) for bit, name in _NVML if bits & bit]

    def _pi(self, root: str, unknown: Dict[str, str]) -> None:
        try:
            bits = int(reading.said(["vcgencmd", "get_throttled"]).strip().split("=")[1], 16)
        except (Unread, ValueError, IndexError) as error:
            alarms = [number(root, p) for p in paths(root, "/sys/class/hwmon/hwmon*/in0_lcrit_alarm")]
            if any(alarms):
                self._told = True
                self.reasons.append("under-voltage")
            unknown["throttling"] = str(error)
            return
        self._told = True
        self.reasons += [name for bit, name in _PI if bits & bit]
        for bit, name in _PI:
            self.counts[name + " since boot"] = int(bool(bits & bit << 16))


def _reasons() -> List[Optional[int]]:
    try:
        rows = reading.table("gpu", ("clocks_event_reasons.active",))
    except Unread as error:
        if "not a valid field" not in str(error):
            raise
        rows = reading.table("gpu", ("clocks_throttle_reasons.active",))
    told = [next(iter(row.values())) for row in rows]
    return [int(cell, 16) if cell and re.match(r"0x[0-9a-fA-F]+$", cell) else None for cell in told]
