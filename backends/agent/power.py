"""Sensors of the device: clocks, temperatures and throttling before and after, and watts while something runs.

Watts by rail, and which rail is the total:

    INA3221 on Jetson, L4T 34 and later   hwmon "ina3221": in<n>_label, in<n>_input (mV) x curr<n>_input (mA); channel
                                          7 is the sum of shunt voltages, no rail; "NC" is not connected
    INA3221 on Jetson, L4T 32             iio "ina3221x": rail_name_<n>, in_power<n>_input (mW)
    INA238 on Thor's carrier board        hwmon "ina238": power1_input (uW), rail VIN
    NVIDIA cards                          NVML, the whole card

    VDD_IN      module: TX2, Xavier NX, Orin NX, Orin Nano
    POM_5V_IN   board: Nano
    VIN         board: Thor
    else        the sum of all rails: AGX Xavier, AGX Orin. It is less than a meter at the socket shows: what the
                converters and the carrier board lose is in none of them
"""

import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from . import clocks, nvml
from .reading import Unread, maybe, number, paths
from .throttling import Throttling

#: The rails that hold all others, by their names on the boards.
TOTALS = ("VIN", "VDD_IN", "POM_5V_IN")
#: Seconds between two samples.
PERIOD = 0.05
#: A clock that falls by more than this share is said.
FELL = 0.03
#: Degrees Celsius past which a zone is said that has no throttling point of its own: a Raspberry Pi begins at 80.
HOT = 80.0
#: Volts and amperes are read one after the other; a rail is a function that returns watts, None where it fails.
_Rail = Callable[[], Optional[float]]


class Energy(NamedTuple):
    """What was drawn between start and stop: `joules` of the rail, in so many `seconds`, by so many `samples`."""

    joules: float
    mean_watts: float
    seconds: float
    samples: int
    rail: str


class Sensors:
    """What can be read of the device under `root`; `unknown` says by name why something cannot."""

    def __init__(self, root: str = "/") -> None:
        self.root, self.unknown = root, {}  # type: str, Dict[str, str]
        self._rails = self._found()

    def state(self) -> Dict[str, Any]:
        """Return clocks (MHz), temperatures (degrees Celsius) and their limits, throttling and the power mode.

        `throttled` is None where nothing tells; `counts` are events since the device was started.
        """
        found = clocks.clocks(self.root, self.unknown)
        degrees, limits = clocks.temperatures(self.root)
        degrees.update({name: value for name, value in clocks.gpu_temperatures().items() if name not in degrees})
        throttling = Throttling(self.root, self.unknown)
        mode = None
        if clocks.is_jetson(self.root):
            try:
                mode = clocks.power_mode(self.root)
            except Unread as error:
                self.unknown["power mode"] = str(error)
        return {
            "clocks": found,
            "clocks_locked": clocks.locked(found),
            "temperatures": degrees,
            "limits": limits,
            "throttled": throttling.now,
            "reasons": throttling.reasons,
            "counts": throttling.counts,
            "power_mode": mode,
        }

    def watts(self) -> Optional[Dict[str, float]]:
        """Return watts by rail; None where no rail can be read."""
        told = {name: read() for name, read in self._rails.items()}
        found = {name: value for name, value in told.items() if value is not None}
        return found or None

    def _found(self) -> Dict[str, _Rail]:
        found = _hwmon(self.root)
        found.update(_iio(self.root))
        if found:
            return found
        try:
            name, read = nvml.meter()
        except Unread as error:
            self.unknown["watts"] = "no power sensor of a board; %s" % error
            return {}
        return {name: read}


def total(rails: Dict[str, float]) -> Tuple[str, float]:
    """Return the rail that holds all others, or the sum of them, with its name."""
    for name in TOTALS:
        if name in rails:
            return name, rails[name]
    names = sorted(rails)
    return names[0] if len(names) == 1 else "sum of " + ", ".join(names), sum(rails.values())


def _hwmon(root: str) -> Dict[str, _Rail]:
    found = {}
    for folder in paths(root, "/sys/class/hwmon/hwmon*"):
        driver = maybe(root, folder + "/name")
        if driver == "ina3221":
            for label in paths(root, folder + "/in[0-9]*_label"):
                channel, name = label.split("/in")[-1].split("_")[0], maybe(root, label) or ""
                volts, amperes = folder + "/in%s_input" % channel, folder + "/curr%s_input" % channel
                if name and "NC" not in name and number(root, amperes) is not None:
                    found[name] = _product(root, volts, amperes)
        elif driver == "ina238" and number(root, folder + "/power1_input") is not None:
            found[maybe(root, folder + "/in1_label") or "VIN"] = _scaled(root, folder + "/power1_input", 1e6)
    return found


def _iio(root: str) -> Dict[str, _Rail]:
    found = {}
    for label in paths(root, "/sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*"):
        folder, channel = label.rsplit("/", 1)[0], label.rsplit("_", 1)[1]
        name, power = maybe(root, label), folder + "/in_power%s_input" % channel
        if name and number(root, power) is not None:
            found[name] = _scaled(root, power, 1e3)
    return found


def _product(root: str, millivolts: str, milliamperes: str) -> _Rail:
    def read() -> Optional[float]:
        volts, amperes = number(root, millivolts), number(root, milliamperes)
        return None if volts is None or amperes is None else volts * amperes / 1e6

    return read


def _scaled(root: str, path: str, unit: float) -> _Rail:
    def read() -> Optional[float]:
        value = number(root, path)
        return None if value is None else value / unit

    return read


class Meter:
    """Samples the watts in a thread of its own between start() and stop()."""

    def __init__(self, sensors: Sensors, period: float = PERIOD) -> None:
        self._sensors, self._period = sensors, period
        self._samples, self._stop = [], threading.Event()  # type: List[Tuple[float, Dict[str, float]]], threading.Event
        self._thread = None  # type: Optional[threading.Thread]

    def start(self) -> None:
        """Begin; the first sample is taken at once. Without a sensor nothing happens."""
        self._samples, self._stop = [], threading.Event()
        if self._sample():
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def stop(self) -> Optional[Energy]:
        """End with a last sample; return the energy since start(), None where it could not be measured."""
        if self._thread is None:
            return None
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._sample()
        return energy(self._samples)

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._sample()

    def _sample(self) -> bool:
        before = time.perf_counter()
        rails = self._sensors.watts()
        # the sensor was read somewhere in between
        if rails is not None:
            self._samples.append(((before + time.perf_counter()) / 2, rails))
        return rails is not None


def energy(samples: List[Tuple[float, Dict[str, float]]]) -> Optional[Energy]:
    """Return the energy of samples (seconds, watts by rail) by trapezoids; None for fewer than two moments.

    Samples that lack a rail which others have are left out: a sum without it would be too small.
    """
    most = max((len(rails) for _, rails in samples), default=0)
    whole = [(at, total(rails)) for at, rails in samples if len(rails) == most]
    if len(whole) < 2 or whole[-1][0] <= whole[0][0]:
        return None
    joules = 0.0
    for (start, (_, before)), (end, (_, after)) in zip(whole, whole[1:]):
        joules += (end - start) * (before + after) / 2
    seconds = whole[-1][0] - whole[0][0]
    return Energy(joules, joules / seconds, seconds, len(whole), whole[0][1][0])


# ------------------------------------------------------------------------------------------------ before and after


def compare(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    """Return in sentences what changed between two states, as far as it disturbs what was measured in between."""
    return _clocks(before, after) + _hot(before, after) + _throttled(before, after) + _mode(before, after)


def _clocks(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    found = []
    for name, old in before.get("clocks", {}).items():
        new = after.get("clocks", {}).get(name, {})
        if _fell(old.get("max"), new.get("max")):
            said = "the limit of the %s clock fell from %g to %g MHz during the run"
            found.append(said % (name, old["max"], new["max"]))
        elif _fell(old.get("current"), new.get("current")):
            said = "the %s clock fell from %g to %g MHz during the run" % (name, old["current"], new["current"])
            # an idle clock falls by itself at the end: only a locked one is known to have been forced
            loose = "" if old.get("locked") else "; it is not locked, so latencies vary with it"
            found.append(said + loose)
    return found


def _fell(old: Any, new: Any) -> bool:
    return bool(old and new and new < old * (1 - FELL))


def _hot(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    found = []
    for zone, new in after.get("temperatures", {}).items():
        limit, old = after.get("limits", {}).get(zone, HOT), before.get("temperatures", {}).get(zone)
        if new >= limit and (old is None or old < limit):
            words = "where throttling begins" if zone in after.get("limits", {}) else "which is hot"
            rose = "" if old is None else " from %g" % old
            found.append("%s rose%s to %g degrees Celsius, past %g, %s" % (zone, rose, new, limit, words))
    return found


def _throttled(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    found, counts = [], before.get("counts", {})
    for name, new in after.get("counts", {}).items():
        if new > counts.get(name, new):
            times = new - counts[name]
            found.append("throttled during the run: %s, %d event%s" % (name, times, "" if times == 1 else "s"))
    for said, state in (("before", before), ("after", after)):
        if state.get("throttled"):
            found.append("throttled %s the run: %s" % (said, ", ".join(state.get("reasons", ()))))
    return found


def _mode(before: Dict[str, Any], after: Dict[str, Any]) -> List[str]:
    old, new = before.get("power_mode"), after.get("power_mode")
    return ["the power mode changed from %s to %s during the run" % (old, new)] if old and new and old != new else []
