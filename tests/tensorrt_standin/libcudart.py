"""A libcudart that is none: C functions with the true signatures, over memory of this process. It computes nothing.

The functions are real C function pointers without argtypes, as ctypes finds them in a library, so that a caller who
forgets to set them cuts its addresses short here as there. Work given to a stream runs when something waits for it, so
that reading too early, or freeing too early, shows. What the real library answers with an error code is one here.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p

#: cudaError by number: those that this one answers with.
WORDS = {
    1: b"invalid argument",
    2: b"out of memory",
    17: b"invalid device pointer",
    400: b"invalid resource handle",
    600: b"device not ready",
    700: b"an illegal memory access was encountered",
    900: b"operation not permitted when stream is capturing",
    901: b"operation failed due to a previous error during capture",
}
ALIGNMENT = 256
_CDECL = 1  # ctypes' FUNCFLAG_CDECL


class _Untyped(ctypes._CFuncPtr):
    """A function as CDLL gives it: nothing is known of its arguments."""

    _flags_ = _CDECL
    _restype_ = c_int


class Refused(Exception):
    """Becomes an error code."""

    def __init__(self, code, why=""):
        super().__init__(why)
        self.code, self.why = code, why


class Block:
    """Memory, 256-byte aligned, with a known end; filled with what is no zero."""

    def __init__(self, size):
        self.buffer = ctypes.create_string_buffer(size + ALIGNMENT)
        start = ctypes.addressof(self.buffer)
        self.address = start + -start % ALIGNMENT
        self.size = size
        ctypes.memset(self.address, 0xCD, size)


class Stream:
    def __init__(self):
        self.pending, self.captured, self.spoilt = [], None, False

    @property
    def capturing(self):
        return self.captured is not None


class LibCudart:
    """One device and its memory; `version` is CUDA's, (12, 6)."""

    def __init__(self, version=(12, 6), sm=8.7, total=8 << 30, integrated=True, capture_fails=False):
        self.version, self.total, self.capture_fails = version, total, capture_fails
        self.attributes = {75: int(sm), 76: round(sm * 10) % 10, 16: 8, 13: 918000, 36: 3199000, 37: 128, 38: 4 << 20}
        self.attributes[18] = int(integrated)
        self.device, self.host, self.streams, self.events, self.graphs, self.executables = {}, {}, {}, {}, {}, {}
        self.now, self.why, self.calls, self._next = 0.0, [], [], 0x1000
        self._kept, self._words = [], {code: ctypes.create_string_buffer(text) for code, text in WORDS.items()}
        self._export()

    # ---------------------------------------------------------------------------------------- as a library

    def _export(self):
        pointer, out = c_void_p, POINTER(c_void_p)
        functions = {
            "cudaSetDevice": (c_int,),
            "cudaMalloc": (out, c_size_t),
            "cudaFree": (pointer,),
            "cudaMallocHost": (out, c_size_t),
            "cudaFreeHost": (pointer,),
            "cudaMemcpyAsync": (pointer, pointer, c_size_t, c_int, pointer),
            "cudaStreamCreateWithFlags": (out, c_uint),
            "cudaStreamSynchronize": (pointer,),
            "cudaStreamDestroy": (pointer,),
            "cudaEventCreateWithFlags": (out, c_uint),
            "cudaEventRecord": (pointer, pointer),
            "cudaEventSynchronize": (pointer,),
            "cudaEventElapsedTime": (POINTER(c_float), pointer, pointer),
            "cudaEventDestroy": (pointer,),
            "cudaStreamBeginCapture": (pointer, c_int),
            "cudaStreamEndCapture": (pointer, out),
            "cudaGraphLaunch": (pointer, pointer),
            "cudaGraphExecDestroy": (pointer,),
            "cudaGraphDestroy": (pointer,),
            "cudaMemGetInfo": (POINTER(c_size_t), POINTER(c_size_t)),
            "cudaDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
            "cudaDeviceGetPCIBusId": (pointer, c_int, c_int),
            "cudaRuntimeGetVersion": (POINTER(c_int),),
            "cudaDriverGetVersion": (POINTER(c_int),),
            "cudaGetLastError": (),
        }
        if self.version >= (11, 4):
            functions["cudaGraphInstantiateWithFlags"] = (out, pointer, c_ulonglong)
        if self.version < (11, 4):
            functions["cudaGraphInstantiate"] = (out, pointer, out, c_char_p, c_size_t)
        for name, takes in functions.items():
            self._give(name, c_int, takes, self._answering(name))
        self._give("cudaGetErrorString", c_void_p, (c_int,), self._said)

    def _give(self, name, returns, takes, function):
        behind = ctypes.CFUNCTYPE(returns, *takes)(function)
        self._kept.append(behind)
        setattr(self, name, _Untyped(ctypes.cast(behind, c_void_p).value))

    def _answering(self, name):
        do = getattr(self, "_" + name)

        def answer(*given):
            self.calls.append(name)
            try:
                do(*given)
            except Refused as refused:
                self.why.append(f"{name}: {refused.why}")
                return refused.code
            except Exception as error:  # it cannot pass through C: said in `why`, which tests look at
                self.why.append(f"{name}: {error!r}")
                return 1
            return 0

        return answer

    def _said(self, code):
        return ctypes.addressof(self._words[code]) if code in self._words else 0

    def _handle(self, table, thing):
        self._next += 8
        table[self._next] = thing
        return self._next

    @staticmethod
    def _known(table, handle, what):
        if handle not in table:
            raise Refused(400, f"no {what} {handle}")
        return table[handle]

    # ---------------------------------------------------------------------------------------- the device

    def _cudaSetDevice(self, device):
        if device != 0:
            raise Refused(1, "there is device 0 only")

    def _cudaMemGetInfo(self, free, total):
        free[0], total[0] = self.total - sum(b.size for b in self.device.values()), self.total

    def _cudaDeviceGetAttribute(self, found, which, device):
        if which not in self.attributes or device:
            raise Refused(1, f"attribute {which} of device {device}")
        found[0] = self.attributes[which]

    def _cudaDeviceGetPCIBusId(self, text, size, device):
        ctypes.memmove(text, b"0000:01:00.0\0", min(13, size))

    def _cudaRuntimeGetVersion(self, found):
        found[0] = self.version[0] * 1000 + self.version[1] * 10

    _cudaDriverGetVersion = _cudaRuntimeGetVersion

    def _cudaGetLastError(self):
        pass

    # ---------------------------------------------------------------------------------------- memory

    def _allocate(self, table, made, size):
        if not size or size > self.total:
            raise Refused(2 if size else 1, f"{size} bytes")
        block = Block(size)
        table[block.address] = block
        made[0] = block.address

    def _cudaMalloc(self, made, size):
        self._not_while_capturing("cudaMalloc")
        self._allocate(self.device, made, size)

    def _cudaMallocHost(self, made, size):
        self._allocate(self.host, made, size)

    def _cudaFree(self, address):
        if address not in self.device:
            raise Refused(17, f"{address} is not allocated")
        self._all()  # the real one waits for the device
        del self.device[address]

    def _cudaFreeHost(self, address):
        if address not in self.host:
            raise Refused(1, f"{address} is not allocated")
        del self.host[address]

    def _not_while_capturing(self, what):
        # in the thread-local mode, the thread that captures must not do what may wait for the device
        if any(s.capturing for s in self.streams.values()):
            raise Refused(900, f"{what} while a stream is captured")

    def holds(self, address, size, table=None):
        """Say whether so many bytes from an address on are allocated on the device (or in another table)."""
        table = self.device if table is None else table
        return any(b.address <= (address or 0) and (address or 0) + size <= b.address + b.size for b in table.values())

    # ---------------------------------------------------------------------------------------- streams

    def give(self, handle, work):
        """Put work into a stream: a function that is called when the stream comes to it."""
        if not handle:
            raise Refused(400, "the default stream is not for this")
        stream = self._known(self.streams, handle, "stream")
        (stream.captured if stream.capturing else stream.pending).append(work)

    def _all(self):
        for stream in self.streams.values():
            self._run(stream)

    @staticmethod
    def _run(stream):
        while stream.pending:
            stream.pending.pop(0)()

    def _cudaStreamCreateWithFlags(self, made, flags):
        if flags != 1:
            raise Refused(1, "a stream that waits for the default one")
        made[0] = self._handle(self.streams, Stream())

    def _cudaStreamSynchronize(self, handle):
        stream = self._known(self.streams, handle, "stream")
        if stream.capturing:
            stream.spoilt = True
            raise Refused(900, "wait while capturing")
        self._run(stream)

    def _cudaStreamDestroy(self, handle):
        self._run(self._known(self.streams, handle, "stream"))
        del self.streams[handle]

    def _cudaMemcpyAsync(self, to, source, size, kind, stream):
        if kind not in (1, 2):
            raise Refused(1, f"kind {kind}")
        device, host = (to, source) if kind == 1 else (source, to)

        def copy():
            if not self.holds(device, size):
                raise Refused(700, "copy over the end of device memory")
            if not self.holds(host, size, self.host):
                raise Refused(700, "host memory that is not pinned, or no longer there")
            ctypes.memmove(to, source, size)

        if not self.holds(device, size):
            raise Refused(1, "copy over the end of device memory")
        self.give(stream, copy)

    # ---------------------------------------------------------------------------------------- events

    def _cudaEventCreateWithFlags(self, made, flags):
        if flags:
            raise Refused(1, "events that keep time have no flags")
        made[0] = self._handle(self.events, {"at": None, "stream": None})

    def _cudaEventRecord(self, handle, stream):
        event = self._known(self.events, handle, "event")
        event.update(at=None, stream=stream)
        self.give(stream, lambda: event.update(at=self.now))

    def _cudaEventSynchronize(self, handle):
        event = self._known(self.events, handle, "event")
        if event["stream"] is None:
            return
        self._run(self._known(self.streams, event["stream"], "stream"))

    def _cudaEventElapsedTime(self, found, start, stop):
        first, last = (self._known(self.events, h, "event") for h in (start, stop))
        if first["stream"] is None or last["stream"] is None:
            raise Refused(400, "an event that was never recorded")
        if first["at"] is None or last["at"] is None:
            raise Refused(600, "an event that has not happened")
        found[0] = last["at"] - first["at"]

    def _cudaEventDestroy(self, handle):
        self._known(self.events, handle, "event")
        del self.events[handle]

    # ---------------------------------------------------------------------------------------- graphs

    def _cudaStreamBeginCapture(self, handle, mode):
        stream = self._known(self.streams, handle, "stream")
        if mode not in (0, 1, 2) or stream.capturing:
            raise Refused(1, "capture")
        stream.captured, stream.spoilt = [], self.capture_fails

    def _cudaStreamEndCapture(self, handle, made):
        stream = self._known(self.streams, handle, "stream")
        if not stream.capturing:
            raise Refused(1, "nothing is captured")
        work, stream.captured = stream.captured, None
        if stream.spoilt:
            made[0] = 0
            raise Refused(901, "capture")
        made[0] = self._handle(self.graphs, work)

    def _cudaGraphInstantiateWithFlags(self, made, graph, flags):
        if flags:
            raise Refused(1, "flags of a graph")
        made[0] = self._handle(self.executables, list(self._known(self.graphs, graph, "graph")))

    def _cudaGraphInstantiate(self, made, graph, node, text, size):
        made[0] = self._handle(self.executables, list(self._known(self.graphs, graph, "graph")))

    def _cudaGraphLaunch(self, graph, stream):
        for work in self._known(self.executables, graph, "graph"):
            self.give(stream, work)

    def _cudaGraphExecDestroy(self, graph):
        self._known(self.executables, graph, "graph")
        del self.executables[graph]

    def _cudaGraphDestroy(self, graph):
        self._known(self.graphs, graph, "graph")
        del self.graphs[graph]
