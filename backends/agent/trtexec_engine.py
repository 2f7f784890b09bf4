"""An engine that trtexec runs: each measurement is a process of its own that loads it, warms up and times many calls.

Defaults are said anyway where flags for them exist: 11 measures a captured graph without copies and waits spinning,
earlier versions none of these. What is timed here is always that: kernels only, a captured graph where the engine
allows it. 11 still takes the old flags but warns that they will go, so it is given none of them.

What an engine reads and gives is written beside it, <engine>.io.json, since trtexec does not tell it.
"""

import json
import os
import shutil
import statistics
import tempfile
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import layer_info, tensorrt_rules, tensors, trtexec_faults, trtexec_output
from .faults import Fault
from .opened import Kernel, Opened
from .tensors import Described, Tensor
from .trtexec_output import Console, Query
from .trtexec_run import plain, run, shape_spec, version

_BESIDE = ".io.json"
#: Milliseconds of warm-up of a block: clocks rise, and what is loaded on first use is loaded.
_WARM_UP = 500
_TIMES, _OUTPUTS, _PROFILE, _LAYERS = "times.json", "outputs.json", "profile.json", "layers.json"


class Beside(NamedTuple):
    """What is kept beside an engine: what it reads and gives, its ONNX nodes, and what it was built with."""

    inputs: List[Described]
    outputs: List[Described]
    nodes: List[str]
    version: Tuple[int, ...]
    dla_core: Optional[int]

    @classmethod
    def of(cls, said: Dict[str, Any]) -> "Beside":
        """Return it from what was written. KeyError or TypeError where that is something else."""
        return cls(
            inputs=[Described(*one) for one in said["inputs"]],
            outputs=[Described(*one) for one in said["outputs"]],
            nodes=said["nodes"],
            version=tuple(said["version"]),
            dla_core=said["dla_core"],
        )

    def write(self, engine: str) -> None:
        """Write it beside an engine, whole or not at all."""
        with open(engine + _BESIDE + ".part", "w", encoding="utf-8") as file:
            json.dump(self._asdict(), file)
        os.replace(engine + _BESIDE + ".part", engine + _BESIDE)


def beside(engine: str) -> Beside:
    """Return what is kept beside an engine. Fault where nothing is."""
    try:
        with open(engine + _BESIDE, encoding="utf-8") as file:
            return Beside.of(json.load(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "what engine %s reads and gives is not known: %s" % (os.path.basename(engine), error)
        raise Fault(what, "build it again by trtexec on this device") from None


class Engine(Opened):
    """An engine and the trtexec that built it. Fault where another version did, or nothing tells what it reads."""

    in_blocks = True

    def __init__(self, path: str, shapes: Dict[str, List[int]], binary: str, seconds: float) -> None:
        self._kept, self._binary, self._path = beside(path), binary, os.path.abspath(path)
        self._version, self._seconds = version(binary), seconds
        here, there = tensorrt_rules.named(self._version), tensorrt_rules.named(self._kept.version)
        if here != there:
            raise Fault("the engine was built by TensorRT %s, and here it is %s" % (there, here), "build it again")
        self.inputs, self.outputs = self._kept.inputs, self._kept.outputs
        self._name = "TensorRT %s by trtexec" % here
        self.provider = self._name
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        self._files: Dict[str, str] = {}
        self._folder = tempfile.mkdtemp(prefix="trtexec-", dir=os.path.dirname(self._path))

    # ------------------------------------------------------------------------------------- input, output

    def feed(self, tensors: Dict[str, Tensor]) -> None:
        """Take an input. Fault where one is missing, has another shape, or values that its type cannot hold."""
        self._remove(_OUTPUTS)
        for n, one in enumerate(self.inputs):
            if one.name not in tensors:
                raise Fault("the model's input %s was not given" % one.name)
            given = trtexec_output.converted(one.name, tensors[one.name], one.dtype)
            _check(one, given)
            self._shapes[one.name], self._files[plain(one.name)] = list(given.shape), "input-%d.bin" % n
            with open(os.path.join(self._folder, "input-%d.bin" % n), "wb") as file:
                file.write(given.data)

    def call(self) -> None:
        """Run once, for its outputs."""
        self._remove(_OUTPUTS)
        length = ["--warmUp=0", "--duration=0", "--iterations=1"]
        self._run(length + self._measuring(copies=True, graph=False) + ["--exportOutput=" + _OUTPUTS], "running")

    def read(self) -> Dict[str, Tensor]:
        """Return the outputs of the last call: as trtexec writes them, which is with six digits."""
        if not os.path.exists(os.path.join(self._folder, _OUTPUTS)):
            self.call()
        try:
            found = trtexec_output.outputs(self._text(_OUTPUTS))
        except ValueError as error:
            raise Fault("trtexec wrote outputs that cannot be read: %s" % error) from None
        missing = [one.name for one in self.outputs if one.name not in found]
        if missing:
            raise Fault("trtexec wrote no output %s" % missing[0])
        return {one.name: trtexec_output.packed(one.name, one.dtype, *found[one.name]) for one in self.outputs}

    # ------------------------------------------------------------------------------------------ measuring

    def sample(self) -> List[float]:
        """Return milliseconds of the kernels of each call of a block, warmed up."""
        calls, said = self._block(self._seconds, copies=False)
        if any("graph" in line.lower() and "capture" in line.lower() for line in said.warnings):
            self.provider = self._name + ", without a captured graph"
        return [call.compute for call in calls]

    def with_copies(self) -> Optional[float]:
        """Return the median milliseconds of a block's calls with their copies."""
        calls, _ = self._block(self._seconds, copies=True)
        return float(statistics.median(call.latency for call in calls))

    def throughput(self, seconds: float) -> Optional[float]:
        """Return calls a second of a block without copies, in which the next call is enqueued before one has ended."""
        _, said = self._block(seconds, copies=False)
        return said.throughput

    def profile(self, runs: int) -> Optional[List[Kernel]]:
        """Return the layers by time, in runs of their own; TensorRT 8.2 tells means where later ones tell medians."""
        length = ["--warmUp=%d" % _WARM_UP, "--duration=0", "--iterations=%d" % runs]
        extra = ["--exportProfile=" + _PROFILE, "--exportLayerInfo=" + _LAYERS]
        if self._version < (11, 0):
            extra.append("--separateProfileRun")  # else the first run is profiled as well; 11 always does so
        self._run(length + self._measuring(copies=False, graph=False) + extra, "profiling")
        try:
            timed = trtexec_output.profile(self._text(_PROFILE)).layers
        except ValueError as error:
            raise Fault("trtexec wrote a profile that cannot be read: %s" % error) from None
        nodes = self._nodes()
        found = []
        for one in timed:
            joined = nodes.get(one.name) or layer_info.nodes_of_name(one.name)
            ms = one.average if one.median is None else one.median
            found.append(Kernel(one.name, self._known(joined), ms))
        return found

    def close(self) -> None:
        """Remove what was written for its runs."""
        shutil.rmtree(self._folder, ignore_errors=True)

    # --------------------------------------------------------------------------------------------- inside

    def _block(self, seconds: float, copies: bool) -> Tuple[List[Query], Console]:
        """Time calls for so many seconds, whole ones, which is all that 8.2 takes."""
        length = ["--warmUp=%d" % _WARM_UP, "--duration=%d" % max(1, round(seconds)), "--iterations=10"]
        # means of a hundred calls: one line for each call would be megabytes
        length += ["--avgRuns=100", "--exportTimes=" + _TIMES]
        said = self._run(length + self._measuring(copies, self._kept.dla_core is None), "measuring")
        try:
            calls = trtexec_output.times(self._text(_TIMES), _WARM_UP)
        except ValueError as error:
            raise Fault("trtexec wrote times that cannot be read: %s" % error) from None
        if not calls:
            raise Fault("trtexec timed no call after its warm-up")
        return calls, said

    def _measuring(self, copies: bool, graph: bool) -> List[str]:
        """Return flags for what is to be measured. DLA and captured graphs exclude each other."""
        if self._version >= (11, 0):
            return (["--includeDataTransfers"] if copies else []) + ([] if graph else ["--noCudaGraph"])
        flags = ["--useSpinWait"]
        return flags + ([] if copies else ["--noDataTransfers"]) + (["--useCudaGraph"] if graph else [])

    def _run(self, flags: Sequence[str], doing: str) -> Console:
        command = [self._binary, "--loadEngine=" + self._path]
        if self._kept.dla_core is not None:
            command.append("--useDLACore=%d" % self._kept.dla_core)
        ran = run(command + self._given() + list(flags), self._folder)
        if ran.failed:
            raise trtexec_faults.run_fault(ran.said, ran.code, doing)
        return ran.said

    def _given(self) -> List[str]:
        """Return flags for shapes, of inputs that have an open dimension only, and for files with values."""
        flags = []
        moving = [one.name for one in self.inputs if -1 in one.shape]
        missing = [name for name in moving if name not in self._shapes]
        if missing:
            raise Fault("input %s has an open dimension, and no shape is given for it" % missing[0])
        if moving:
            flags.append(shape_spec("--shapes", [(name, self._shapes[name]) for name in moving]))
        if self._files:
            # without quotes: 8.2 would take them for part of the name
            flags.append("--loadInputs=" + ",".join("%s:%s" % pair for pair in self._files.items()))
        return flags

    def _nodes(self) -> Dict[str, Tuple[str, ...]]:
        """Return ONNX nodes by layer; nothing where the inspector's file cannot be read: it does not escape names."""
        try:
            return layer_info.by_name(layer_info.layers(self._text(_LAYERS)))
        except ValueError:
            return {}

    def _known(self, names: Sequence[str]) -> Tuple[str, ...]:
        """Return those names that are nodes of the ONNX file; others are its weights."""
        return tuple(name for name in names if name in self._kept.nodes)

    def _text(self, name: str) -> str:
        try:
            with open(os.path.join(self._folder, name), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError as error:
            raise Fault("trtexec wrote no %s: %s" % (name, error.strerror or error)) from None

    def _remove(self, name: str) -> None:
        if os.path.exists(os.path.join(self._folder, name)):
            os.remove(os.path.join(self._folder, name))


def _check(one: Described, given: Tensor) -> None:
    fits = len(given.shape) == len(one.shape) and all(a in (-1, b) for a, b in zip(one.shape, given.shape))
    if not fits:
        raise Fault("input %s has shape %s in the engine, and %s was given" % (one.name, one.shape, given.shape))
    if len(given.data) != tensors.nbytes(given.dtype, given.shape):
        raise Fault("input %s has %d bytes, which are not its shape's" % (one.name, len(given.data)))
