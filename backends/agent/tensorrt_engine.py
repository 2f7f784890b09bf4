"""Runs and times a TensorRT engine: named tensors and one stream, from 8.5 on.

A call is timed as NVIDIA's own tool times "GPU compute": between two events around a captured graph, the inputs being
there and the outputs staying there. What cannot be captured is enqueued as it is.
"""

import math
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import tensorrt_log, tensorrt_profile
from .cudart import Cuda
from .faults import Fault
from .opened import Kernel, Opened, Tell
from .tensorrt_identity import imported
from .tensorrt_tensors import Buffer, converted, dtype_of
from .tensors import Described, Tensor, nbytes

#: Events tell half a microsecond apart. Calls shorter than _SHORT ms are timed several at once, over _SPAN ms.
_SHORT, _SPAN, _MOST = 0.05, 0.2, 100
_AGAIN = "build the engine again for these shapes"


def open_engine(
    path: str,
    shapes: Dict[str, Sequence[int]],
    tell: Tell,
    trt: Any = None,
    cuda: Optional[Cuda] = None,
    dla_core: Optional[int] = None,
) -> Opened:
    """Open an engine file for inputs of these shapes; feed() may bring others within what it was built for.

    Fault where it was built by another TensorRT or for another GPU, where it does not take the shapes, and where an
    output's shape depends on data.
    """
    trt = imported() if trt is None else trt
    cuda = Cuda() if cuda is None else cuda
    tell("opening the engine", 0, None)
    engine = Engine(path, trt, cuda, dla_core)
    try:
        engine.shape({d.name: list(shapes.get(d.name, d.shape)) for d in engine.inputs})
    except BaseException:
        engine.close()
        raise
    return engine


class Engine(Opened):
    """An engine with one execution context, one stream and memory for its tensors."""

    def __init__(self, path: str, trt: Any, cuda: Cuda, dla_core: Optional[int]) -> None:
        self._path, self._trt, self._cuda, self._core = path, trt, cuda, dla_core
        self._log = tensorrt_log.logger(trt)
        self._buffers: Dict[str, Buffer] = {}
        self._shapes: Dict[str, List[int]] = {}
        self._fed: Dict[str, Tensor] = {}
        self._graph: Optional[int] = None
        self._captured, self._at_once = False, 0
        self._runtime = self._engine = self._context = None  # type: Any
        self._stream, self._events = 0, []  # type: int, List[int]
        mark = len(self._log.lines)
        trt.init_libnvinfer_plugins(self._log, "")
        self._runtime = trt.Runtime(self._log)
        if dla_core is not None:
            self._runtime.DLA_core = dla_core
        with open(path, "rb") as file:
            self._engine = self._runtime.deserialize_cuda_engine(file.read())
        if self._engine is None:
            raise self._fault("does not open this engine", mark, "build it again on this device")
        try:
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise self._fault("has no memory to run this engine", mark, "stop other programs on the device")
            self._stream = cuda.stream()
            self._events = [cuda.event(), cuda.event()]
            self._describe()
        except BaseException:
            self.close()
            raise
        self.provider = "TensorRT %s" % trt.__version__

    def _fault(self, what: str, mark: int, fix: Optional[str] = None) -> Fault:
        said = tensorrt_log.reason(tensorrt_log.errors(self._log, mark), "its log does not say why")
        return Fault("TensorRT %s %s: %s" % (self._trt.__version__, what, said), fix)

    def _describe(self) -> None:
        """Take the tensors' names, types and shapes, which are the engine's to say: parsers change types."""
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
        self._on_host = {name for name in names if engine.get_tensor_location(name) == trt.TensorLocation.HOST}
        inputs, outputs = [], []  # type: List[Described], List[Described]
        for name in names:
            if engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
                raise Fault("the tensor %s lies in the engine's own order, which is not read here" % name)
            dtype = dtype_of(name, engine.get_tensor_dtype(name))
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else outputs).append(Described(name, dtype, list(engine.get_tensor_shape(name))))
        self.inputs, self.outputs = inputs, outputs

    # ---------------------------------------------------------------------------------------- shapes and inputs

    def shape(self, shapes: Dict[str, List[int]]) -> None:
        """Take the inputs' shapes, and memory for them. Those that are open are left to feed()."""
        for one in self.inputs:
            given = shapes[one.name]
            if -1 in given:
                return  # not told yet
            self._check(one, given)
        if shapes == self._shapes:
            return
        self._drop_graph()
        self._shapes = {}
        for one in self.inputs:
            if -1 in one.shape and not self._context.set_input_shape(one.name, tuple(shapes[one.name])):
                raise Fault("the engine does not take the input %s as %s" % (one.name, shapes[one.name]), _AGAIN)
            self._hold(one, shapes[one.name])
        if not self._on_host:
            self._infer()
        self._shapes = dict(shapes)

    def _check(self, one: Described, given: Sequence[int]) -> None:
        least, most = list(one.shape), list(one.shape)
        if -1 in one.shape:
            bounds = self._engine.get_tensor_profile_shape(one.name, 0)
            least, most = list(bounds[0]), list(bounds[2])
        fits = len(given) == len(least) and all(a <= size <= b for a, size, b in zip(least, given, most))
        if not fits:
            took = "%s" % least if least == most else "%s to %s" % (least, most)
            raise Fault("the engine takes the input %s as %s, not as %s" % (one.name, took, list(given)), _AGAIN)

    def _hold(self, one: Described, shape: Sequence[int]) -> None:
        """Have memory for a tensor of this shape, and tell the context where it is."""
        size, buffer = nbytes(one.dtype, shape), self._buffers.get(one.name)
        if buffer is None or buffer.room < size:
            if buffer is not None:
                del self._buffers[one.name]
                buffer.free()
            buffer = self._buffers[one.name] = Buffer(self._cuda, size, one.name in self._on_host)
            if not self._context.set_tensor_address(one.name, buffer.address):
                raise Fault("TensorRT does not take memory for the tensor %s" % one.name)
        buffer.size = size

    def _infer(self) -> None:
        """Let the context compute the outputs' shapes, and have memory for them."""
        mark = len(self._log.lines)
        missing = self._context.infer_shapes()
        if missing:
            raise self._fault("cannot tell the outputs' shapes without %s" % ", ".join(missing), mark)
        self._out_shapes = {}
        for one in self.outputs:
            shape = list(self._context.get_tensor_shape(one.name))
            if any(size < 0 for size in shape):
                what = "the shape of the output %s, %s, depends on what is in the inputs, which is not run here"
                raise Fault(what % (one.name, shape), "cut the model before the node that chooses (NonMaxSuppression)")
            self._out_shapes[one.name] = shape
            self._hold(one, shape)

    def feed(self, tensors: Dict[str, Tensor]) -> None:
        """Take an input, converted to the engine's types, and bring it to the device."""
        missing = [one.name for one in self.inputs if one.name not in tensors]
        if missing:
            raise Fault("the model's input %s was not given" % missing[0])
        self.shape({one.name: list(tensors[one.name].shape) for one in self.inputs})
        data = {one.name: converted(one.name, tensors[one.name], one.dtype) for one in self.inputs}
        for one in self.inputs:
            self._buffers[one.name].put(data[one.name])
            self._buffers[one.name].copy_in(self._stream)
        self._cuda.synchronize(self._stream)
        if self._on_host:
            # the values of shape tensors decide shapes, and a graph has the old ones in it
            self._drop_graph()
            self._infer()
        self._fed = {one.name: tensors[one.name] for one in self.inputs}

    # ---------------------------------------------------------------------------------------- running

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
        self._graph, self._captured, self._at_once = None, False, 0

    def _enqueue(self) -> bool:
        return bool(self._context.execute_async_v3(self._stream))

    def _run(self) -> None:
        """Give one call to the stream: the graph, or what it was to be captured from where that cannot be."""
        if not self._captured:
            if not self._fed:
                raise Fault("the engine was given no input")
            # the first call loads kernels and allocates, which cannot be captured
            self._plainly()
            self._cuda.synchronize(self._stream)
            self._graph, self._captured = self._cuda.capture(self._stream, self._enqueue), True
        if self._graph is not None:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._plainly()

    def _plainly(self) -> None:
        mark = len(self._log.lines)
        if not self._enqueue():
            raise self._fault("does not run this engine", mark)

    def call(self) -> None:
        """Run once, to the end."""
        self._run()
        self._cuda.synchronize(self._stream)

    def sample(self) -> List[float]:
        """Return the GPU's milliseconds of a call, behind one that is not timed.

        Calls so short that the events' resolution shows are timed several at once, and their mean is returned.
        """
        if not self._at_once:
            self.call()
            alone = self._timed(1)
            self._at_once = 1 if alone >= _SHORT else min(math.ceil(_SPAN / max(alone, 1e-3)), _MOST)
        self._run()
        return [self._timed(self._at_once)]

    def _timed(self, calls: int) -> float:
        start, stop = self._events
        self._cuda.record(start, self._stream)
        for _ in range(calls):
            self._run()
        self._cuda.record(stop, self._stream)
        self._cuda.wait(stop)
        return self._cuda.elapsed(start, stop) / calls

    def with_copies(self) -> Optional[float]:
        """Return the GPU's milliseconds of a call with inputs brought in and outputs fetched, by pinned memory."""
        self.call()
        start, stop = self._events
        self._cuda.record(start, self._stream)
        for one in self.inputs:
            self._buffers[one.name].copy_in(self._stream)
        self._run()
        for one in self.outputs:
            self._buffers[one.name].copy_out(self._stream)
        self._cuda.record(stop, self._stream)
        self._cuda.wait(stop)
        return self._cuda.elapsed(start, stop)

    def throughput(self, seconds: float) -> Optional[float]:
        """Return calls a second, the next one always being enqueued before the last one has ended."""
        self.call()
        calls, start = 0, time.perf_counter()
        while calls < 2 or time.perf_counter() < start + seconds:
            self._run()
            self._cuda.record(self._events[calls % 2], self._stream)
            calls += 1
            if calls > 1:
                self._cuda.wait(self._events[calls % 2])
        self._cuda.synchronize(self._stream)
        return calls / (time.perf_counter() - start)

    def read(self) -> Dict[str, Tensor]:
        """Return the outputs of the last call, in the engine's types."""
        for one in self.outputs:
            self._buffers[one.name].copy_out(self._stream)
        self._cuda.synchronize(self._stream)
        return {
            one.name: Tensor(one.dtype, self._out_shapes[one.name], self._buffers[one.name].get())
            for one in self.outputs
        }

    # ---------------------------------------------------------------------------------------- kernels

    def profile(self, runs: int) -> Optional[List[Kernel]]:
        """Return the kernels in their order, with the medians of their milliseconds.

        The engine is opened a second time for it: a profiler makes each call wait, and what is timed as a whole shall
        never have seen one. The sum is more than a call's time.
        """
        if not self._fed:
            raise Fault("the engine was given no input")
        other = Engine(self._path, self._trt, self._cuda, self._core)
        try:
            other.feed(self._fed)
            return other._profiled(runs)
        finally:
            other.close()

    def _profiled(self, runs: int) -> List[Kernel]:
        self._plainly()
        self._cuda.synchronize(self._stream)
        times = tensorrt_profile.times(self._trt)
        self._context.profiler = times
        found: List[List[Tuple[str, float]]] = []
        for _ in range(max(runs, 1)):
            times.reported = []
            self._plainly()
            self._cuda.synchronize(self._stream)
            found.append(times.reported)
        return tensorrt_profile.kernels(found, tensorrt_profile.nodes(self._trt, self._engine, self._context))

    def close(self) -> None:
        """Let go of everything, the context before the engine before the runtime."""
        try:
            if self._stream:
                self._cuda.synchronize(self._stream)
            self._drop_graph()
            self._context = None
            for buffer in self._buffers.values():
                buffer.free()
            for event in self._events:
                self._cuda.destroy_event(event)
            if self._stream:
                self._cuda.destroy_stream(self._stream)
        except Fault:
            pass  # after an error in a kernel every call fails, and that error was told
        self._context = self._engine = self._runtime = None
        self._buffers, self._events, self._stream, self._graph = {}, [], 0, None
