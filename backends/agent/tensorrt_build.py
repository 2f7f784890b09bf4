"""Builds TensorRT engines from ONNX files through TensorRT's Python module, 8.5 and later.

Quantization is explicit: the Q/DQ nodes of the file say what runs in few bits, and nothing is calibrated here. Only the
DLA, which takes no Q/DQ, gets scales by tensor (`ranges`) with a file without Q/DQ.
"""

import os
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import tensorrt_log, tensorrt_progress, tensorrt_rules
from .cudart import Cuda
from .faults import Fault
from .opened import Tell
from .tensorrt_identity import identity, imported, mismatch
from .tensorrt_rules import Plan, Version, has, member, named

__all__ = ["Built", "Request", "build", "identity", "imported", "mismatch"]

#: A workspace smaller than this leaves most kernels out.
_LEAST = 64 << 20
_STATIC = "compile with static shapes for the DLA"


class Request(NamedTuple):
    """What to build.

    weak: path of the ONNX file in float32 with float32 scales; strong: of the one with float16 types. None where there
        is none. fp32 is built from `weak` always.
    precision: fp32, fp16, int8, fp8 or int4.
    engine: path to write; it appears once it is complete.
    shapes: min, opt and max by input, for inputs that have an open dimension; entries of others are ignored. For an
        input whose values are a shape, the values.
    workspace: bytes that a kernel may use; None for a share of the device's memory.
    timing_cache: path of measured kernel times, read where it is there and written afterwards.
    typing: weak or strong instead of what the version wants. level: effort, 0 to 5, from 8.6 on.
    dla_core: the DLA instead of the GPU, up to TensorRT 10.7. ranges: scale by tensor for INT8 there.
    """

    weak: Optional[str]
    strong: Optional[str]
    precision: str
    engine: str
    shapes: Dict[str, Tuple[List[int], List[int], List[int]]]
    workspace: Optional[int] = None
    timing_cache: Optional[str] = None
    typing: Optional[str] = None
    level: Optional[int] = None
    dla_core: Optional[int] = None
    ranges: Optional[Dict[str, float]] = None


class Built(NamedTuple):
    """What was built: the file, TensorRT's version, weak or strong, the ONNX file, the builder's flags by name."""

    engine: str
    version: str
    typing: str
    source: str
    flags: List[str]
    seconds: float
    size: int
    warnings: List[str]


def build(request: Request, tell: Tell, trt: Any = None, cuda: Optional[Cuda] = None) -> Built:
    """Build an engine. Fault with the ONNX nodes that are to blame, as far as TensorRT says.

    `tell` hears of the builder's steps where the version tells them (from 9.0 on). What it raises stops the build and
    is raised here.
    """
    trt = imported() if trt is None else trt
    cuda = Cuda() if cuda is None else cuda
    return _Build(request, tell, trt, cuda).run()


class _Build:
    """One build; TensorRT's objects live as long as it does."""

    def __init__(self, request: Request, tell: Tell, trt: Any, cuda: Cuda) -> None:
        self.request, self.tell, self.trt, self.cuda = request, tell, trt, cuda
        self.version: Version = tensorrt_rules.parse(trt.__version__)
        if not has(self.version, "named_tensors"):
            what = "TensorRT %s is older than 8.5, and its Python module is not used" % trt.__version__
            raise Fault(what, "install trtexec on the device: sudo apt install nvidia-tensorrt")
        self.log = tensorrt_log.logger(trt)
        self.mark, self.notes = len(self.log.lines), []  # type: int, List[str]
        trt.init_libnvinfer_plugins(self.log, "")

    def run(self) -> Built:
        """Build and write."""
        start = time.monotonic()
        request, version, trt = self.request, self.version, self.trt
        typing = request.typing if request.dla_core is None else request.typing or "weak"
        plan = tensorrt_rules.plan(
            version, request.precision, self.cuda.capability(), request.weak, request.strong, typing
        )
        self.notes += plan.warnings
        builder = trt.Builder(self.log)
        core = self._dla_core(builder, plan)
        flags = tensorrt_rules.bits(trt.NetworkDefinitionCreationFlag, plan.network_flags, version)
        network = builder.create_network(flags)
        parser = self._parsed(network, plan.source)
        config = builder.create_builder_config()
        names = self._configure(config, network, plan, core)
        self._profile(builder, config, network, core is not None)
        cache = self._read_cache(config)
        monitor = self._monitor(config)
        before = len(self.log.lines)
        plan_bytes = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.raised is not None:
            raise monitor.raised
        if plan_bytes is None:
            said, warned = tensorrt_log.errors(self.log, before), tensorrt_log.warnings(self.log, before)
            raise tensorrt_log.build_fault(trt.__version__, said, warned, tensorrt_log.layers_of(network))
        _write(request.engine, plan_bytes)
        if cache is not None:
            _write(request.timing_cache or "", config.get_timing_cache().serialize())
        del parser  # the weights that it read are the network's until here
        seconds, size = time.monotonic() - start, os.path.getsize(request.engine)
        notes = self.notes + tensorrt_log.warnings(self.log, self.mark)
        return Built(request.engine, trt.__version__, plan.typing, plan.source, names, seconds, size, notes)

    def _parsed(self, network: Any, source: str) -> Any:
        """Read the ONNX file into the network; from its path, since weights may lie in files beside it."""
        self.tell("reading the ONNX file", 0, None)
        parser = self.trt.OnnxParser(network, self.log)
        if not parser.parse_from_file(os.path.abspath(source)):
            said = tensorrt_log.errors(self.log, self.mark)
            raise tensorrt_log.parse_fault(self.trt.__version__, parser, said)
        return parser

    # ---------------------------------------------------------------------------------------- settings

    def _configure(self, config: Any, network: Any, plan: Plan, core: Optional[int]) -> List[str]:
        """Set the builder's flags and limits; return the names of the flags."""
        trt, names = self.trt, list(plan.builder_flags)
        if core is not None:
            names.append("GPU_FALLBACK")
            config.default_device_type, config.DLA_core = trt.DeviceType.DLA, core
            self._check_quantized(network, True)
            self._set_ranges(network)
        elif plan.typing == "weak" and not self._check_quantized(network, False):
            # INT8 without Q/DQ would ask for a calibrator
            names = [name for name in names if name not in ("INT8", "FP8", "INT4")]
        for name in names:
            config.set_flag(member(trt.BuilderFlag, name, self.version))
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._workspace())
        # the inspector's formats, by which kernels are explained, are in the engine only then
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.request.level is not None:
            if has(self.version, "builder_optimization_level"):
                config.builder_optimization_level = self.request.level
            else:
                self.notes.append("TensorRT %s has no optimisation levels" % trt.__version__)
        return names

    def _check_quantized(self, network: Any, dla: bool) -> bool:
        """Say whether the network has Q/DQ. Fault where that does not fit."""
        kinds = self.trt.LayerType.QUANTIZE, self.trt.LayerType.DEQUANTIZE
        found = any(network.get_layer(n).type in kinds for n in range(network.num_layers))
        wanted = self.request.precision in ("int8", "fp8", "int4")
        if dla and found:
            raise Fault("the DLA takes no Q/DQ, and the ONNX file has some", "build it from a file without, and ranges")
        if wanted and not found and not dla:
            self.notes.append("the ONNX file has no Q/DQ: built without %s" % self.request.precision.upper())
        if found and not wanted:
            what = "the ONNX file is quantized, and %s was asked for" % self.request.precision
            raise Fault(what, "compile the model with --precision %s" % self.request.precision)
        return found

    def _workspace(self) -> int:
        """Return the bytes of memory that a kernel may ask for.

        TensorRT's own limit is all of the device's memory. On a Jetson that is the CPU's memory, too, and a kernel
        that is tried with most of it gets the process killed: there a quarter of all is taken, and never more than half
        of what is free. A card's memory is its own: kernels that do not fit are left out, so it may be most of it.
        """
        if self.request.workspace is not None:
            return max(int(self.request.workspace), 0)
        free, total = self.cuda.memory()
        if self.cuda.attribute("integrated"):
            return max(min(total // 4, max(free, _available()) // 2), _LEAST)
        return max(free * 9 // 10, _LEAST)

    def _profile(self, builder: Any, config: Any, network: Any, dla: bool) -> None:
        """Give the builder the shapes of inputs that have an open dimension. Fault where one is missing or wrong."""
        profile, used = builder.create_optimization_profile(), False
        for n in range(network.num_inputs):
            one = network.get_input(n)
            values = bool(one.is_shape_tensor)
            if not values and -1 not in tuple(one.shape):
                continue
            bounds = self.request.shapes.get(one.name)
            if bounds is None:
                raise Fault("the input %s has an open dimension, and no shapes were given for it" % one.name)
            if dla and not bounds[0] == bounds[1] == bounds[2]:
                raise Fault("the DLA needs static shapes, and the input %s has a range of them" % one.name, _STATIC)
            try:
                (profile.set_shape_input if values else profile.set_shape)(one.name, *map(tuple, bounds))
            except (RuntimeError, ValueError) as error:
                what = "the input %s %s does not take the shapes %s to %s"
                said = (one.name, list(one.shape), bounds[0], bounds[2])
                raise Fault("%s: %s" % (what % said, error)) from error
            used = True
        if used and (not bool(profile) or config.add_optimization_profile(profile) < 0):
            why = tensorrt_log.reason(tensorrt_log.errors(self.log, self.mark), "it does not say why")
            raise Fault("TensorRT %s does not take the shapes: %s" % (self.trt.__version__, why))

    # ---------------------------------------------------------------------------------------- DLA

    def _dla_core(self, builder: Any, plan: Plan) -> Optional[int]:
        """Return the DLA core to build for, None for the GPU. Fault where there is none."""
        core, version = self.request.dla_core, self.version
        if core is None:
            return None
        if not has(version, "dla") or plan.typing != "weak":
            what = "TensorRT %s builds no engines for the DLA here; up to 10.7 does, weakly typed" % named(version)
            raise Fault(what, "build for the GPU")
        if core >= builder.num_DLA_cores or core < 0:
            raise Fault("this device has %d DLA cores, and core %d was asked for" % (builder.num_DLA_cores, core))
        if self.request.precision not in ("fp16", "int8"):
            raise Fault("the DLA computes in FP16 or INT8, not in %s" % self.request.precision, "use --precision fp16")
        if self.request.precision == "int8" and not self.request.ranges:
            raise Fault("INT8 on the DLA needs a range for each tensor, and none were given", "use --precision fp16")
        return core

    def _set_ranges(self, network: Any) -> None:
        """Give each tensor its range, inputs too; a layer with a tensor that has none runs in FP16 or on the GPU."""
        if self.request.precision != "int8":
            return
        ranges, without = self.request.ranges or {}, []
        for tensor in _tensors(network):
            scale = ranges.get(tensor.name)
            if scale is None or not tensor.set_dynamic_range(-127 * scale, 127 * scale):
                without.append(tensor.name)
        if without:
            self.notes.append("%d tensors have no range, %s the first: not in INT8" % (len(without), without[0]))

    # ---------------------------------------------------------------------------------------- cache, progress

    def _read_cache(self, config: Any) -> Any:
        """Give the builder the kernel times of earlier builds; None where no cache is wanted."""
        path = self.request.timing_cache
        if path is None:
            return None
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            content = b""
        for some in [content, b""] if content else [b""]:
            try:
                cache = config.create_timing_cache(some)
                if cache is not None and config.set_timing_cache(cache, False):
                    return cache
            except (RuntimeError, TypeError, ValueError):
                pass  # corrupt: as good as none
            if some:
                self.notes.append("the timing cache is of another device or TensorRT, or damaged: begun anew")
        return None

    def _monitor(self, config: Any) -> Any:
        if not has(self.version, "progress_monitor") or not hasattr(self.trt, "IProgressMonitor"):
            self.tell("choosing kernels", 0, None)
            return None
        monitor = tensorrt_progress.monitor(self.trt, self.tell)
        config.progress_monitor = monitor
        return monitor


def _tensors(network: Any) -> List[Any]:
    """Return a network's tensors, inputs first, each once."""
    found = {one.name: one for one in (network.get_input(n) for n in range(network.num_inputs))}
    for n in range(network.num_layers):
        layer = network.get_layer(n)
        for m in range(layer.num_outputs):
            found.setdefault(layer.get_output(m).name, layer.get_output(m))
    return list(found.values())


def _available() -> int:
    """Return the bytes that Linux could free, 0 where it does not say: to CUDA, a Jetson's file cache is in use."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0


def _write(path: str, content: Any) -> None:
    """Write a file so that it is there completely or not at all."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.rename(part, path)
    except OSError:
        if os.path.exists(part):
            os.remove(part)
        raise
