"""What each kernel of an engine takes, as TensorRT's profiler reports it, joined to the ONNX nodes by its inspector."""

import statistics
from typing import Any, Dict, List, Sequence, Tuple

from . import layer_info
from .opened import Kernel


def times(trt: Any) -> Any:
    """Return a profiler for an execution context; `reported` has (name, milliseconds) in the kernels' order."""

    class Times(trt.IProfiler):  # type: ignore[misc]  # its module has no types
        """Collects what is reported."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.reported: List[Tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            """Take one kernel's time."""
            self.reported.append((layer_name, ms))

    return Times()


def nodes(trt: Any, engine: Any, context: Any) -> Dict[str, Tuple[str, ...]]:
    """Return the ONNX nodes of an engine's layers by the layers' names, {} where the inspector does not tell."""
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # which knows the shapes
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return layer_info.by_name(layer_info.layers(text))
    except ValueError:
        return {}


def kernels(calls: Sequence[Sequence[Tuple[str, float]]], known: Dict[str, Tuple[str, ...]]) -> List[Kernel]:
    """Return the kernels of equal calls with the medians of their times. A name may stand there more than once."""
    found = []
    for same in zip(*calls):
        name = same[0][0]
        found.append(Kernel(name, known.get(name) or layer_info.nodes_of_name(name), _median(same)))
    return found


def _median(same: Sequence[Tuple[str, float]]) -> float:
    return float(statistics.median(ms for _, ms in same))
