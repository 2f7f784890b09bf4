"""CUDA by ctypes, against a stand-in with the true C signatures."""

import ctypes

import pytest
from edgec.backends.agent import cudart
from edgec.backends.agent.cudart import Cuda
from edgec.backends.agent.faults import Fault
from tensorrt_standin.libcudart import LibCudart

VERSIONS = [(10, 2), (11, 4), (12, 6), (13, 0)]


def cleared(lib):
    return lib.device == lib.host == lib.streams == lib.events == lib.graphs == lib.executables == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_device_is_described(version):
    cuda = Cuda(LibCudart(version, sm=12.1, total=64 << 30, integrated=False))
    assert cuda.version == cuda.driver == version
    assert cuda.capability() == (12, 1)
    assert cuda.memory() == (64 << 30, 64 << 30)
    assert cuda.attribute("integrated") == 0 and cuda.attribute("sm_count") == 8
    assert cuda.bus_id() == "0000:01:00.0"


@pytest.mark.parametrize("version", VERSIONS)
def test_copies_events_and_graphs(version):
    lib = LibCudart(version)
    cuda = Cuda(lib)
    stream, device, host = cuda.stream(), cuda.malloc(1000), cuda.malloc_host(1000)
    assert device > 1 << 32  # an address that would not survive as a C int
    assert device % 256 == 0
    ctypes.memmove(host, b"ab" * 500, 1000)
    cuda.copy_in(device, host, 1000, stream)
    cuda.synchronize(stream)
    ctypes.memset(host, 0, 1000)

    graph = cuda.capture(stream, lambda: cuda.copy_out(host, device, 1000, stream) is None)
    assert graph is not None and ctypes.string_at(host, 2) == b"\0\0"  # captured, not run
    start, stop = cuda.event(), cuda.event()
    cuda.record(start, stream)
    cuda.launch(graph, stream)
    lib.give(stream, lambda: setattr(lib, "now", lib.now + 2.5))
    cuda.record(stop, stream)
    with pytest.raises(Fault, match="not ready"):
        cuda.elapsed(start, stop)
    cuda.wait(stop)
    assert cuda.elapsed(start, stop) == 2.5
    assert ctypes.string_at(host, 1000) == b"ab" * 500

    cuda.destroy_graph(graph)
    cuda.free(device)
    cuda.free_host(host)
    cuda.destroy_event(start)
    cuda.destroy_event(stop)
    cuda.destroy_stream(stream)
    assert cleared(lib)


def test_graphs_are_made_as_the_version_wants():
    old, new = LibCudart((10, 2)), LibCudart((11, 4))
    assert not hasattr(old, "cudaGraphInstantiateWithFlags") and not hasattr(new, "cudaGraphInstantiate")
    for lib in (old, new):
        cuda = Cuda(lib)
        assert cuda.capture(cuda.stream(), lambda: True)


@pytest.mark.parametrize("how", ["spoilt", "refused", "raised"])
def test_a_failed_capture_leaves_the_stream_usable(how):
    lib = LibCudart(capture_fails=how == "spoilt")
    cuda = Cuda(lib)
    stream, device, host = cuda.stream(), cuda.malloc(4), cuda.malloc_host(4)

    def enqueue():
        cuda.copy_in(device, host, 4, stream)
        if how == "raised":
            raise KeyError
        return how != "refused"

    if how == "raised":
        with pytest.raises(KeyError):
            cuda.capture(stream, enqueue)
    else:
        assert cuda.capture(stream, enqueue) is None
    cuda.copy_in(device, host, 4, stream)
    cuda.synchronize(stream)
    assert not lib.executables


def test_a_wait_inside_a_capture_spoils_it():
    cuda = Cuda(LibCudart())
    stream = cuda.stream()

    def enqueue():
        with pytest.raises(Fault, match="capturing"):
            cuda.synchronize(stream)
        return True

    assert cuda.capture(stream, enqueue) is None


def test_errors_are_in_cudas_words():
    cuda = Cuda(LibCudart(total=100))
    with pytest.raises(Fault, match=r"CUDA: out of memory \(error 2 in cudaMalloc of 101 bytes\)"):
        cuda.malloc(101)
    with pytest.raises(Fault, match="invalid device pointer"):
        cuda.free(12345)
    with pytest.raises(Fault, match="invalid resource handle"):
        cuda.synchronize(99)
    with pytest.raises(Fault, match="invalid argument"):
        Cuda(LibCudart(), device=1)


def test_a_copy_over_the_end_is_refused_by_the_standin():
    lib = LibCudart()
    cuda = Cuda(lib)
    device, host, stream = cuda.malloc(4), cuda.malloc_host(8), cuda.stream()
    with pytest.raises(Fault):
        cuda.copy_in(device, host, 8, stream)


def test_the_library_is_looked_for_by_its_names(monkeypatch):
    tried = []

    def library(name):
        tried.append(name)
        if name.endswith(".so.11.0"):
            return "found"
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert cudart.load() == "found"
    assert tried == ["libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    monkeypatch.setattr(cudart, "NAMES", ("libcudart.so.13",))
    with pytest.raises(Fault, match="no CUDA runtime") as caught:
        cudart.load()
    assert "sudo apt install" in caught.value.fix


def test_functions_without_argtypes_cut_addresses_short():
    # so that the tests above would notice if they were not set
    lib = LibCudart()
    made = ctypes.c_void_p()
    lib.cudaMalloc.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)
    assert lib.cudaMalloc(ctypes.byref(made), 16) == 0
    assert lib.cudaFree.argtypes is None
    assert lib.cudaFree(made.value) == 17  # an invalid pointer
