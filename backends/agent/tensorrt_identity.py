"""What an engine is tied to, and why one that was built elsewhere, or earlier, must be built again."""

import os
import platform
import re
import shutil
import subprocess
from typing import Any, Dict, Optional, Tuple, Union

from .cudart import Cuda
from .faults import Fault

Identity = Dict[str, Union[str, int]]

#: The keys of an identity, in the order in which they are compared, and each one's name for a person.
TIED_TO = (
    ("tensorrt", "TensorRT"),
    ("sm", "compute capability"),
    ("device", "the GPU"),
    ("driver", "the driver"),
    ("cuda", "CUDA"),
    ("os", "the operating system"),
    ("arch", "the processor's architecture"),
)

_INSTALL = "on a Jetson: sudo apt install python3-libnvinfer; on a desktop: python3 -m pip install tensorrt"


def imported() -> Any:
    """Return the device's TensorRT module. Fault where it has none."""
    try:
        import tensorrt
    except Exception as error:  # a broken installation raises what it likes
        raise Fault("the device's python3 has no TensorRT (%s)" % error, _INSTALL) from error
    if not hasattr(tensorrt, "Builder"):
        raise Fault("the device's TensorRT module is incomplete: it has no Builder", _INSTALL)
    return tensorrt


def identity(trt: Any = None, cuda: Optional[Cuda] = None, root: str = "/") -> Identity:
    """Return what engines built here are tied to; "unknown" for what the device does not tell.

    `root`: where /proc and /etc are, for tests. Fault where there is no CUDA or no TensorRT.
    """
    if trt is None:
        trt = imported()
    cuda = Cuda() if cuda is None else cuda
    try:
        bus = cuda.bus_id().lower()
    except Fault:
        bus = ""  # a GPU on a chip may have none
    found = of_gpu(str(trt.__version__), cuda.capability(), bus, root)
    found["cuda"] = "%d.%d" % cuda.version
    return found


def of_gpu(version: str, sm: Tuple[int, int], bus: str = "", root: str = "/") -> Identity:
    """Return that of a version and a GPU that are known; `bus` tells its address where there may be several."""
    device, driver = _board(root) or _card(root, bus), _l4t(root) or _driver(root)
    told = _smi(bus) if root == "/" and not (device and driver) else {}
    return {
        "tensorrt": version,
        "sm": "%d.%d" % sm,
        "device": device or told.get("name") or "unknown",
        "driver": driver or told.get("driver") or "unknown",
        "os": platform.system(),
        "arch": platform.machine(),
    }


def mismatch(saved: Dict[str, Any], here: Dict[str, Any]) -> Optional[str]:
    """Return in a sentence why an engine with the identity `saved` must be built again, None where it need not.

    What neither side knows is no difference: TensorRT itself checks its version and the compute capability again.
    """
    for key, name in TIED_TO:
        there, now = saved.get(key, "unknown"), here.get(key, "unknown")
        if there != now:
            return "the engine was built for %s %s, and here it is %s" % (name, there, now)
    return None


def _read(root: str, path: str) -> str:
    try:
        with open(os.path.join(root, path), "rb") as file:
            return file.read(1 << 16).replace(b"\0", b"").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _board(root: str) -> str:
    """Return a Jetson's model. Other boards have one, too, but theirs does not name the GPU."""
    model = _read(root, "proc/device-tree/model")
    return model if "nvidia" in _read(root, "proc/device-tree/compatible").lower() else ""


def _card(root: str, bus: str) -> str:
    found = re.search(r"^Model:\s*(.+)$", _read(root, "proc/driver/nvidia/gpus/%s/information" % bus), re.M)
    return found.group(1).strip() if found else ""


def _l4t(root: str) -> str:
    """Return the release of L4T, with which a Jetson's driver comes: "L4T 36.4.3"."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(root, "etc/nv_tegra_release"))
    return "L4T %s.%s" % found.groups() if found else ""


def _driver(root: str) -> str:
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d[\d.]*)\s", _read(root, "proc/driver/nvidia/version"), re.M)
    return found.group(1) if found else ""


def _smi(bus: str) -> Dict[str, str]:
    """Ask nvidia-smi, for where /proc does not have it (WSL)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program] + ["--id=" + bus] * bool(bus) + ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    first = done.stdout.decode("utf-8", "replace").strip().partition("\n")[0]
    name, _, driver = first.rpartition(",")
    return {"name": name.strip(), "driver": driver.strip()} if not done.returncode and name else {}
