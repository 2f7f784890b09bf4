"""edgec: compile ONNX networks for a named edge device, with the proof attached.

The public API is imported on first use, so that `import edgec` and the command line's help stay instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .compiler.api import bench, calibrate, compile, devices, evaluate, inspect, open_bundle, robustness

__all__ = [
    "__version__",
    "bench",
    "calibrate",
    "compile",
    "devices",
    "evaluate",
    "inspect",
    "open_bundle",
    "robustness",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".compiler.api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
