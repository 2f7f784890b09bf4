"""A TVM module, opened: arrays in, arrays out, by name."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler import devices
from ...compiler.errors import ModelError, UnavailableError
from ...compiler.types import InputSpec
from .threads import use

#: Outputs of so many bytes are copied anyhow: a constant that is one may be changed by who gets it.
_SMALL = 1 << 16
_PROVIDERS = {"cpu": "TVM, llvm", "cuda": "TVM, cuda"}


@dataclass(frozen=True)
class Facts:
    """What is said beside a library: what it reads and gives, TVM's name of its device, its calls and their nodes."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    device: str
    provider: str
    calls: tuple[tuple[str, str | None], ...]
    arch: str = ""

    @classmethod
    def of(cls, library: Path) -> Facts:
        """Read them. OSError, ValueError or KeyError where they are missing or damaged."""
        said = json.loads(library.with_suffix(library.suffix + ".json").read_text(encoding="utf-8"))
        inputs = tuple(InputSpec(name, dtype, tuple(shape)) for name, dtype, shape in said["inputs"])
        calls = tuple((name, node) for name, node in said.get("calls", []))
        provider = _PROVIDERS[said["device"]]
        return cls(inputs, tuple(said["outputs"]), said["device"], provider, calls, said.get("arch", ""))


def opened(path: Path, threads: int) -> Module:
    """Open a library with what is said beside it. ModelError if it is broken, UnavailableError without its device."""
    try:
        facts = Facts.of(path)
        if facts.arch not in ("", devices.machine_arch()):
            other = f"it is built for an {facts.arch} processor, and this machine is {devices.machine_arch()}"
            raise UnavailableError(other, where=str(path), fix="open it on the device, or on a board: --target rpc://…")
        return Module(_loaded(path, facts), facts, threads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = str(error).strip().splitlines()[:1]
        raise ModelError(f"it does not load: {' '.join(why)}", where=str(path), fix="compile again") from error


def _loaded(path: Path, facts: Facts) -> Any:
    import tvm

    if facts.device != "cpu" and not tvm.device(facts.device).exist:
        raise UnavailableError("there is no CUDA GPU here", where=str(path), fix="open it on the device")
    return tvm.runtime.load_module(str(path))


def one_by_one(
    facts: Facts, feed: Mapping[str, np.ndarray], once: Callable[[list[np.ndarray]], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Run a module that was built for batch 1 on a feed of any batch; `once` takes its inputs in order."""
    given = [np.ascontiguousarray(feed[spec.name], dtype=spec.dtype) for spec in facts.inputs]
    free = [spec.shape[:1] == (None,) for spec in facts.inputs]
    batch = max((len(a) for a, f in zip(given, free, strict=True) if f), default=1)
    if batch == 1:
        return once(given)
    each = [once([a[i : i + 1] if f else a for a, f in zip(given, free, strict=True)]) for i in range(batch)]
    return {name: np.concatenate([one[name] for one in each]) for name in facts.outputs}


class Module:
    """A Runner over one Relax virtual machine. A module built for batch 1 takes more images one by one."""

    def __init__(self, library: Any, facts: Facts, threads: int) -> None:
        """Take a library that is loaded, or an executable that was just built; `facts` is what is said beside it."""
        import tvm
        from tvm import relax

        self.inputs, self.outputs, self.provider = facts.inputs, facts.outputs, facts.provider
        self._facts, self.calls, self._lock = facts, facts.calls, threading.Lock()
        use(threads)
        self._device = tvm.device(facts.device)
        self._tensor, self._library = tvm.runtime.tensor, library
        #: Where inputs are put, TVM's tensors and numpy's views of them: it wants 64-byte alignment, numpy gives 16.
        self._read: list[tuple[Any, np.ndarray]] | None = None
        if facts.device == "cpu":
            shapes = [[1 if size is None else size for size in spec.shape] for spec in self.inputs]
            tensors = [tvm.runtime.empty(shape, spec.dtype) for shape, spec in zip(shapes, self.inputs, strict=True)]
            with contextlib.suppress(BufferError, RuntimeError):  # types that DLPack does not know
                self._read = [(tensor, np.from_dlpack(tensor)) for tensor in tensors]
        self._main: Any = relax.VirtualMachine(self._library, self._device)["main"]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once, or once for each image; `feed` holds every input. One call at a time: others wait.

        ModelError for an array of another shape than the input's.
        """
        with self._lock:
            return self._run(self._main, feed)

    def _run(self, main: Any, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return one_by_one(self._facts, feed, functools.partial(self._once, main))

    def profile(self, feed: Mapping[str, np.ndarray], runs: int = 30) -> list[tuple[str, str | None, float]]:
        """Return each call of a function, its ONNX node where one is known, and its median milliseconds.

        The machine calls back before and after each function; on a GPU, which runs behind, that times nothing.
        """
        from tvm import relax

        samples: list[list[float]] = []
        names: list[str] = []
        now: list[float] = []

        def watch(function: Any, name: str, before: bool, value: Any, *arguments: Any) -> int:
            if not name.startswith("vm.builtin."):
                if before:
                    names.append(name)
                    now.append(time.perf_counter())
                else:
                    now[-1] = time.perf_counter() - now[-1]
            return int(relax.VMInstrumentReturnKind.NO_OP)

        machine = relax.VirtualMachine(self._library, self._device)  # one of its own: it cannot be told to stop
        machine.set_instrument(watch)
        for _ in range(runs):
            names.clear()
            now.clear()
            self._run(machine["main"], feed)
            samples.append(list(now))
        medians = 1e3 * np.median(np.array(samples), axis=0)
        # TVM leaves out calls that only say another shape
        left = iter([(name, node) for name, node in self._facts.calls if name in names])
        nodes = [next((node for known, node in left if known == name), None) for name in names]
        return [(name, node, float(ms)) for name, node, ms in zip(names, nodes, medians, strict=True)]

    def _once(self, main: Any, given: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Run on one image; what is read is copied to memory that stays, and what is given is not copied at all."""
        if self._read is None:
            found: Any = main(*(self._tensor(array, self._device) for array in given))
        else:
            for (_, room), array, spec in zip(self._read, given, self.inputs, strict=True):
                if array.shape != room.shape:
                    raise ModelError(
                        f"it takes {list(room.shape)}, not {list(array.shape)}",
                        where=f"input {spec.name}",
                        fix="reshape it",
                    )
                np.copyto(room, array)
            found = main(*(tensor for tensor, _ in self._read))
        values = [found] if hasattr(found, "numpy") else list(found)
        return {name: self._array(value) for name, value in zip(self.outputs, values, strict=True)}

    def _array(self, value: Any) -> np.ndarray:
        """Return an output, without copying it where that pays, unless it is memory that the next call writes to."""
        try:
            array = np.asarray(value.numpy() if self._read is None else np.from_dlpack(value))
        except (BufferError, RuntimeError):  # types that DLPack, or numpy's side of it, does not know
            return np.asarray(value.numpy())
        kept = self._read is not None and any(np.may_share_memory(array, room) for _, room in self._read)
        return array.copy() if kept or array.nbytes <= _SMALL else array
