"""A TVM module, opened: arrays in, arrays out, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.types import InputSpec


class Module:
    """A Runner over one Relax virtual machine on this CPU. A module built for batch 1 takes more images one by one."""

    def __init__(self, path: Path, inputs: tuple[InputSpec, ...], outputs: tuple[str, ...], threads: int) -> None:
        import tvm
        from tvm import relax

        self.inputs, self.outputs, self.provider = inputs, outputs, "TVM, llvm"
        if threads:
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
        self._tensor, self._device = tvm.runtime.tensor, tvm.cpu()
        self._main = relax.VirtualMachine(tvm.runtime.load_module(str(path)), self._device)["main"]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once, or once for each image; `feed` holds every input."""
        given = [np.ascontiguousarray(feed[spec.name], dtype=spec.dtype) for spec in self.inputs]
        batch = max((len(a) for a, s in zip(given, self.inputs, strict=True) if s.shape[:1] == (None,)), default=1)
        if batch == 1:
            return self._once(given)
        free = [spec.shape[:1] == (None,) for spec in self.inputs]
        each = [self._once([a[i : i + 1] if f else a for a, f in zip(given, free, strict=True)]) for i in range(batch)]
        return {name: np.concatenate([one[name] for one in each]) for name in self.outputs}

    def _once(self, given: list[np.ndarray]) -> dict[str, np.ndarray]:
        found: Any = self._main(*(self._tensor(array, self._device) for array in given))
        values = [found] if hasattr(found, "numpy") else list(found)
        return {name: value.numpy() for name, value in zip(self.outputs, values, strict=True)}
