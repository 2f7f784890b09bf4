"""TVM modules on the device: a library that was built elsewhere, run by the device's own TVM runtime.

What stands beside the library, <library>.json, says what it reads and gives, and which device it was built for.
"""

import json
import os
from typing import Any, Dict, Optional

from .faults import Fault
from .opened import Opened, Tell
from .tensors import Described, Tensor

_INSTALL = "on the device: python3 -m pip install apache-tvm==0.27.* apache-tvm-ffi==0.1.14.post1"


def open_model(model: Dict[str, Any], job: Dict[str, Any], tell: Tell) -> Opened:
    """Open `model["files"]["library"]`. Fault where TVM is missing there, or the library is for another machine."""
    tell("opening %s" % model["name"], 0, None)
    threads = int(model.get("options", {}).get("threads", 0))
    if threads:
        os.environ["TVM_NUM_THREADS"] = str(threads)  # read when its thread pool starts
    return Module(model["files"]["library"])


class Module(Opened):
    """One Relax virtual machine over a library; it was built for batch 1."""

    def __init__(self, path: str) -> None:
        try:
            import tvm
            from tvm import relax
        except Exception as error:  # a broken installation raises what it likes
            raise Fault("the device's python3 has no TVM (%s)" % error, _INSTALL) from error
        with open(path + ".json") as file:
            said = json.load(file)
        self.inputs = [Described(n, t, [-1 if d is None else d for d in s]) for n, t, s in said["inputs"]]
        self._outputs = said["outputs"]
        self.provider = {"cpu": "TVM, llvm", "cuda": "TVM, cuda"}[said["device"]]
        self._tvm, self._device = tvm, tvm.device(said["device"])
        if not self._device.exist:
            raise Fault("the module wants %s, which the device's TVM has not" % said["device"])
        try:
            library = tvm.runtime.load_module(os.path.abspath(path))
            devices = [self._device] if said["device"] == "cpu" else [self._device, tvm.cpu()]
            self._machine = relax.VirtualMachine(library, devices)
        except Exception as error:  # TVM raises what it likes
            fix = "compile for the device's own processor: --device"
            raise Fault("TVM cannot load the module there: %s" % str(error).strip().splitlines()[0], fix) from error

    def feed(self, tensors: Dict[str, Tensor]) -> None:
        """Take an input. Fault where one is missing."""
        import numpy as np

        arrays = [np.frombuffer(t.data, t.dtype).reshape(t.shape) for t in self.given(tensors)]
        self._machine.set_input("main", *[self._tvm.runtime.tensor(a, self._device) for a in arrays])

    def call(self) -> None:
        """Run once."""
        self._machine.invoke_stateful("main")
        self._device.sync()

    def with_copies(self) -> Optional[float]:
        """Return None: on a CPU nothing is copied."""
        return None

    def read(self) -> Dict[str, Tensor]:
        """Return the outputs of the last call."""
        found = self._machine.get_outputs("main")
        arrays = [one.numpy() for one in ([found] if hasattr(found, "numpy") else found)]
        return {n: Tensor(str(a.dtype), list(a.shape), a.tobytes()) for n, a in zip(self._outputs, arrays)}

    def close(self) -> None:
        """Let go of the machine."""
        self._machine = None
