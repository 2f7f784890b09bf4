"""CUDA's runtime by ctypes: memory, one stream, events and graphs, which is all that running an engine takes.

No wheel of a CUDA binding fits every JetPack; libcudart is there wherever TensorRT is. Of its functions only those are
used whose signatures are the same from CUDA 10.2 to 13, but for cudaGraphInstantiate: its 5-argument form is 10.2's
to 11.3's, cudaGraphInstantiateWithFlags came with 11.4. cudaGetDeviceProperties is not used, since its struct changed.
Sizes are bytes, times milliseconds, addresses and handles plain ints; every error is a Fault with CUDA's own words.
"""

import ctypes
from typing import Any, Callable, Dict, List, Optional, Tuple

from .faults import Fault

#: Where the library is looked for, newest first; the last is where it lies if the loader's cache does not know it.
NAMES = (
    "libcudart.so.13",
    "libcudart.so.12",
    "libcudart.so.11.0",
    "libcudart.so.10.2",
    "/usr/local/cuda/lib64/libcudart.so",
)

#: Attributes of cudaDeviceGetAttribute, by what they say.
ATTRIBUTES = {
    "sm_major": 75,
    "sm_minor": 76,
    "sm_count": 16,
    "clock_khz": 13,
    "memory_clock_khz": 36,
    "bus_bits": 37,
    "l2_bytes": 38,
    "integrated": 18,
}

_POINTER, _SIZE, _INT, _UINT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
_TO_POINTER, _TO_INT, _TO_SIZE = ctypes.POINTER(_POINTER), ctypes.POINTER(_INT), ctypes.POINTER(_SIZE)

#: What each function takes. Without argtypes, ctypes passes an int as 32 bits and cuts addresses short.
_SIGNATURES: Dict[str, Tuple[Any, ...]] = {
    "cudaSetDevice": (_INT,),
    "cudaMalloc": (_TO_POINTER, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaMallocHost": (_TO_POINTER, _SIZE),
    "cudaFreeHost": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaStreamCreateWithFlags": (_TO_POINTER, _UINT),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamDestroy": (_POINTER,),
    "cudaEventCreateWithFlags": (_TO_POINTER, _UINT),
    "cudaEventRecord": (_POINTER, _POINTER),
    "cudaEventSynchronize": (_POINTER,),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _POINTER, _POINTER),
    "cudaEventDestroy": (_POINTER,),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaStreamEndCapture": (_POINTER, _TO_POINTER),
    "cudaGraphLaunch": (_POINTER, _POINTER),
    "cudaGraphExecDestroy": (_POINTER,),
    "cudaGraphDestroy": (_POINTER,),
    "cudaMemGetInfo": (_TO_SIZE, _TO_SIZE),
    "cudaDeviceGetAttribute": (_TO_INT, _INT, _INT),
    "cudaDeviceGetPCIBusId": (ctypes.c_char_p, _INT, _INT),
    "cudaRuntimeGetVersion": (_TO_INT,),
    "cudaDriverGetVersion": (_TO_INT,),
    "cudaGetLastError": (),
}
_INSTANTIATE_WITH_FLAGS = (_TO_POINTER, _POINTER, ctypes.c_ulonglong)
_INSTANTIATE_10 = (_TO_POINTER, _POINTER, _TO_POINTER, ctypes.c_char_p, _SIZE)

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_NON_BLOCKING = 1
#: Capture watches this thread only: another one that allocates memory meanwhile does not spoil it.
_THREAD_LOCAL = 1
_WITH_FLAGS_FROM = (11, 4)


def load() -> Any:
    """Return libcudart. Fault where there is none."""
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    fix = "on a Jetson: sudo apt install nvidia-jetpack; on a desktop: install the CUDA runtime that TensorRT needs"
    raise Fault("the device has no CUDA runtime (libcudart.so)", fix)


class Cuda:
    """One device. `library`: what load() gives, or something with the same functions."""

    def __init__(self, library: Any = None, device: int = 0) -> None:
        self._library = load() if library is None else library
        self.device = device
        words = self._library.cudaGetErrorString
        words.argtypes, words.restype = (_INT,), ctypes.c_char_p
        for name, takes in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = takes, _INT
        self.version = self._number("cudaRuntimeGetVersion")
        self.driver = self._number("cudaDriverGetVersion")
        with_flags = self.version >= _WITH_FLAGS_FROM
        name = "cudaGraphInstantiateWithFlags" if with_flags else "cudaGraphInstantiate"
        self._instantiate = getattr(self._library, name)
        self._instantiate.argtypes = _INSTANTIATE_WITH_FLAGS if with_flags else _INSTANTIATE_10
        self._instantiate.restype = _INT
        self._call("cudaSetDevice", device)

    # -------------------------------------------------------------------------------------------- the device

    def attribute(self, which: str) -> int:
        """Return an attribute of ATTRIBUTES."""
        found = _INT()
        self._call("cudaDeviceGetAttribute", ctypes.byref(found), ATTRIBUTES[which], self.device)
        return found.value

    def capability(self) -> Tuple[int, int]:
        """Return the compute capability, (8, 7)."""
        return self.attribute("sm_major"), self.attribute("sm_minor")

    def memory(self) -> Tuple[int, int]:
        """Return free and total bytes of the device's memory; on a Jetson that is the CPU's, too."""
        free, total = _SIZE(), _SIZE()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def bus_id(self) -> str:
        """Return the device's PCI address, "0000:01:00.0"."""
        text = ctypes.create_string_buffer(32)
        self._call("cudaDeviceGetPCIBusId", text, 32, self.device)
        return text.value.decode("ascii", "replace")

    # -------------------------------------------------------------------------------------------- memory

    def malloc(self, size: int) -> int:
        """Return the address of device memory, aligned to 256 bytes at least."""
        return self._made("cudaMalloc", _SIZE(size), of="%d bytes" % size)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def malloc_host(self, size: int) -> int:
        """Return the address of host memory that stays in place, which copies need to run beside other work."""
        return self._made("cudaMallocHost", _SIZE(size), of="%d bytes" % size)

    def free_host(self, address: int) -> None:
        """Give host memory back."""
        self._call("cudaFreeHost", address)

    def copy_in(self, device: int, host: int, size: int, stream: int) -> None:
        """Copy from host to device once the stream comes to it."""
        self._call("cudaMemcpyAsync", device, host, size, _HOST_TO_DEVICE, stream)

    def copy_out(self, host: int, device: int, size: int, stream: int) -> None:
        """Copy from device to host once the stream comes to it."""
        self._call("cudaMemcpyAsync", host, device, size, _DEVICE_TO_HOST, stream)

    # -------------------------------------------------------------------------------------------- streams, events

    def stream(self) -> int:
        """Return a stream of its own, which does not wait for the default one."""
        return self._made("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        """Wait for all that was given to a stream. Errors of what ran in it come out here."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        """Let go of a stream."""
        self._call("cudaStreamDestroy", stream)

    def event(self) -> int:
        """Return an event that keeps time."""
        return self._made("cudaEventCreateWithFlags", 0)

    def record(self, event: int, stream: int) -> None:
        """Let an event happen once the stream comes to it."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Wait until an event has happened."""
        self._call("cudaEventSynchronize", event)

    def elapsed(self, start: int, stop: int) -> float:
        """Return the milliseconds between two events, to about half a microsecond."""
        found = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(found), start, stop)
        return float(found.value)

    def destroy_event(self, event: int) -> None:
        """Let go of an event."""
        self._call("cudaEventDestroy", event)

    # -------------------------------------------------------------------------------------------- graphs

    def capture(self, stream: int, enqueue: Callable[[], bool]) -> Optional[int]:
        """Record what `enqueue` gives to the stream as a graph; None where that cannot be captured.

        Loops, shapes that depend on data, and calls that wait for the device cannot. `enqueue` returns whether it
        worked. The stream is as before afterwards.
        """
        self._call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
        worked = False
        try:
            worked = enqueue()
        finally:
            # also after a failure: until then the stream takes no other work
            graph = _POINTER()
            code = self._library.cudaStreamEndCapture(stream, ctypes.byref(graph))
            if code or not worked:
                self._library.cudaGetLastError()  # else the next call would report this one's error
        if code or not graph.value:
            return None
        try:
            return self._instantiated(graph.value) if worked else None
        finally:
            self._call("cudaGraphDestroy", graph.value)

    def _instantiated(self, graph: int) -> Optional[int]:
        made = _POINTER()
        last: List[Any] = [0] if self.version >= _WITH_FLAGS_FROM else [None, None, 0]
        if self._instantiate(ctypes.byref(made), graph, *last):
            self._library.cudaGetLastError()
            return None
        return made.value

    def launch(self, graph: int, stream: int) -> None:
        """Give a graph to a stream."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Let go of a graph."""
        self._call("cudaGraphExecDestroy", graph)

    # -------------------------------------------------------------------------------------------- calls

    def _call(self, name: str, *given: Any, **said: str) -> None:
        code = getattr(self._library, name)(*given)
        if code:
            words = self._library.cudaGetErrorString(code) or b"unknown error"
            of = " of %s" % said["of"] if "of" in said else ""
            raise Fault("CUDA: %s (error %d in %s%s)" % (words.decode("utf-8", "replace"), code, name, of))

    def _made(self, name: str, *given: Any, **said: str) -> int:
        made = _POINTER()
        self._call(name, ctypes.byref(made), *given, **said)
        return int(made.value or 0)

    def _number(self, name: str) -> Tuple[int, int]:
        """Return a version that CUDA writes as 1000 * major + 10 * minor."""
        found = _INT()
        self._call(name, ctypes.byref(found))
        return found.value // 1000, found.value % 1000 // 10
