"""ONNX models in ONNX Runtime on the device: its CPU, CUDA and TensorRT providers."""

import json
import os
import tempfile
import time
from typing import Any, Dict, List, Optional

from .faults import Fault
from .opened import Kernel, Opened, Tell
from .tensors import Described, Tensor

_INSTALL = "on the device: python3 -m pip install onnxruntime (or onnxruntime-gpu)"


def open_model(model: Dict[str, Any], job: Dict[str, Any], tell: Tell) -> Opened:
    """Open `model["files"]["onnx"]` with the providers and threads of its options. Fault where that cannot be."""
    options = model.get("options", {})
    tell("opening %s" % model["name"], 0, None)
    return Session(
        model["files"]["onnx"],
        options.get("providers") or ["CPUExecutionProvider"],
        int(options.get("threads", 0)),
        optimise=options.get("optimise", True),
    )


class Session(Opened):
    """An ONNX Runtime session; inputs stay where the provider computes, outputs too, where that is a GPU."""

    def __init__(self, path: str, providers: List[str], threads: int, optimise: bool = True) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise Fault("the device's python3 has no onnxruntime (%s)" % error, _INSTALL) from error
        there = ort.get_available_providers()
        if providers[0] not in there:
            what = "onnxruntime %s on the device has no %s" % (ort.__version__, providers[0])
            raise Fault("%s, only %s" % (what, ", ".join(there)), "install a build of onnxruntime that has it")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(path, options, providers=[p for p in providers if p in there])
        except Exception as error:  # its exceptions have no common class of their own
            raise Fault("onnxruntime %s on the device: %s" % (ort.__version__, _first_line(error))) from error
        self.provider = self._session.get_providers()[0]
        if self.provider != providers[0]:
            raise Fault("%s could not be used on the device, only %s" % (providers[0], self.provider))
        self._device = "cuda" if self.provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"
        self._path, self._providers, self._options = path, providers, options
        self.inputs = [_described(i) for i in self._session.get_inputs()]
        self.outputs = [_described(o) for o in self._session.get_outputs()]
        self._arrays: Dict[str, Any] = {}
        self._binding: Any = None
        self._ort = ort

    def feed(self, tensors: Dict[str, Tensor]) -> None:
        """Take an input. Fault where one is missing."""
        import numpy as np

        given = zip(self.inputs, self.given(tensors))
        self._arrays = {i.name: np.frombuffer(one.data, one.dtype).reshape(one.shape) for i, one in given}
        if self._device == "cpu":
            return
        self._binding = self._session.io_binding()
        for name, array in self._arrays.items():
            self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0))
        for output in self.outputs:
            self._binding.bind_output(output.name, self._device)

    def call(self) -> None:
        """Run once; on a GPU without copies. Fault where it fails on this input."""
        try:
            if self._binding is None:
                self._session.run(None, self._arrays)
            else:
                self._session.run_with_iobinding(self._binding)
        except Exception as error:  # its exceptions have no common class of their own
            raise Fault("it fails on this input: %s" % _first_line(error)) from error

    def with_copies(self) -> Optional[float]:
        """Time a call with its copies; a CPU has none."""
        if self._binding is None:
            return None
        start = time.perf_counter()
        self._session.run(None, self._arrays)
        return (time.perf_counter() - start) * 1e3

    def read(self) -> Dict[str, Tensor]:
        """Run once more and return the outputs."""
        found = self._session.run(None, self._arrays)
        return {
            output.name: Tensor(str(array.dtype), list(array.shape), array.tobytes())
            for output, array in zip(self.outputs, found)
        }

    def profile(self, runs: int) -> Optional[List[Kernel]]:
        """Return the nodes with the means of so many calls, by ONNX Runtime's profiler in a session of its own."""
        self._options.enable_profiling = True
        self._options.profile_file_prefix = os.path.join(tempfile.gettempdir(), "edgec-profile")
        session = self._ort.InferenceSession(self._path, self._options, providers=self._session.get_providers())
        for _ in range(runs):
            session.run(None, self._arrays)
        path = session.end_profiling()
        with open(path) as file:
            events = json.load(file)
        os.remove(path)
        times: Dict[str, float] = {}
        kinds: Dict[str, str] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                node = event["name"][: -len("_kernel_time")]
                times[node] = times.get(node, 0.0) + event["dur"] / 1e3 / runs
                kinds[node] = event["args"]["op_name"]
        return [Kernel(kinds[node], (node,), ms) for node, ms in times.items()]

    def close(self) -> None:
        """Let go of the session."""
        self._session = self._binding = None


#: ONNX Runtime's names for types that NumPy calls otherwise.
_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}


def _described(value: Any) -> Described:
    dtype = _TYPES.get(value.type) or value.type.replace("tensor(", "").rstrip(")")
    return Described(value.name, dtype, [d if isinstance(d, int) else -1 for d in value.shape])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
