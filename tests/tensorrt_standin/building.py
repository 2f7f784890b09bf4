"""The builder of the stand-in, its configuration, profiles, timing caches and what it refuses to build."""

import json
import os
import time

from .engines import serialized
from .reading import name_of
from .tables import DLA, Bound, check, within

_LOW = ("FP16", "INT8", "FP8", "BF16", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
_FLAG_OF = {"int8": "INT8", "fp8": "FP8", "int4": "INT4"}
_LEAST_SM = {"INT8": 7.2, "FP8": 8.9, "INT4": 8.0}


class IHostMemory(bytes):
    """Bytes, as far as writing them to a file goes."""

    nbytes = property(len)


class IOptimizationProfile(Bound):
    def __init__(self):
        self._shapes, self._values = {}, {}

    def set_shape(self, input, min, opt, max):
        self._shapes[input] = self._ordered(min, opt, max)

    def set_shape_input(self, input, min, opt, max):
        self._values[input] = self._ordered(min, opt, max)

    @staticmethod
    def _ordered(*bounds):
        for one in bounds:
            check(one, (tuple, list), "set_shape")
        low, best, high = (tuple(b) for b in bounds)
        alike = len(low) == len(best) == len(high)
        if not alike or any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise RuntimeError("shapes are inconsistent: min <= opt <= max does not hold")
        return low, best, high

    def __bool__(self):
        return bool(self._shapes or self._values)


class ITimingCache(Bound):
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return IHostMemory(b"STANDIN-CACHE" + json.dumps(self._content).encode())


class IBuilderConfig(Bound):
    """What is set by attribute stands here; what a version does not have is cut."""

    max_workspace_size = min_timing_iterations = avg_timing_iterations = 1
    builder_optimization_level, hardware_compatibility_level, max_aux_streams, max_num_tactics = 3, None, 0, -1
    tiling_optimization_level = int8_calibrator = default_device_type = profiling_verbosity = None
    progress_monitor, DLA_core, profile_stream, engine_capability = None, -1, 0, None

    def __init__(self, trt):
        self._trt, self._flags, self._pools, self._profiles, self._cache = trt, [], {}, [], None

    def set_flag(self, flag):
        check(flag, self._trt.BuilderFlag, "set_flag")
        self._flags.append(flag.name)

    def clear_flag(self, flag):
        check(flag, self._trt.BuilderFlag, "clear_flag")
        self._flags = [name for name in self._flags if name != flag.name]

    def get_flag(self, flag):
        check(flag, self._trt.BuilderFlag, "get_flag")
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool, pool_size):
        check(pool, self._trt.MemoryPoolType, "set_memory_pool_limit")
        check(pool_size, int, "set_memory_pool_limit")
        self._pools[pool.name] = pool_size

    def add_optimization_profile(self, profile):
        check(profile, self._trt.IOptimizationProfile, "add_optimization_profile")
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        check(serialized_timing_cache, (bytes, bytearray, memoryview), "create_timing_cache")
        said = bytes(serialized_timing_cache)
        if not said:
            return self._trt.ITimingCache({"of": self._trt.standin.device(), "builds": 0})
        try:
            return self._trt.ITimingCache(json.loads(said[said.index(b"STANDIN-CACHE") + 13 :]))
        except ValueError:
            self._trt.standin.log("ERROR", "Error Code 4: timing cache: the header is wrong")
            return None

    def set_timing_cache(self, cache, ignore_mismatch):
        check(cache, self._trt.ITimingCache, "set_timing_cache")
        check(ignore_mismatch, (bool, int), "set_timing_cache")
        if cache._content["of"] != self._trt.standin.device() and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class Builder(Bound):
    max_batch_size, max_threads, max_DLA_batch_size = 1, 1, 4096
    platform_has_fast_fp16 = platform_has_fast_int8 = True

    def __init__(self, logger):
        self._trt = type(self)._module
        self._trt.standin.check_logger(logger)

    @property
    def num_DLA_cores(self):
        return self._trt.standin.options.dla_cores if within(self._trt.standin.version, DLA) else 0

    def create_network(self, flags=0):
        check(flags, int, "create_network")
        trt = self._trt
        kinds = trt.NetworkDefinitionCreationFlag
        known = {int(m): n for n, m in vars(kinds).items() if isinstance(m, kinds)}
        asked = {known.get(bit) for bit in range(32) if flags >> bit & 1}
        if None in asked:
            raise RuntimeError(f"create_network: {flags} has bits that this version does not have")
        strong = "STRONGLY_TYPED" in asked or trt.standin.version >= (11, 0)
        explicit = "EXPLICIT_BATCH" in asked or trt.standin.version >= (10, 0)
        trt.standin.network_flags = sorted(asked)
        return trt.INetworkDefinition(trt, explicit, strong)

    def create_builder_config(self):
        return self._trt.IBuilderConfig(self._trt)

    def create_optimization_profile(self):
        return self._trt.IOptimizationProfile()

    def is_network_supported(self, network, config):
        return self._refused(network, config) is None

    def build_serialized_network(self, network, config):
        check(network, self._trt.INetworkDefinition, "build_serialized_network")
        check(config, self._trt.IBuilderConfig, "build_serialized_network")
        standin = self._trt.standin
        standin.config = config
        if standin.options.crash == "build":
            os._exit(139)
        why = self._refused(network, config) or self._steps(config) or self._without_kernel(network)
        if why:
            for line in why if isinstance(why, list) else [why]:
                standin.log("ERROR", line)
            return None
        if config._cache is not None and getattr(config, "builder_optimization_level", 3) != 0:
            config._cache._content["builds"] += 1
        return IHostMemory(serialized(self._trt, network, config))

    # ---------------------------------------------------------------------------------------- refusals

    def _refused(self, network, config):
        flags = [flag for flag in config._flags if flag in _LOW]
        why = self._flags_refused(network, config, flags) or self._shapes_refused(network, config)
        device = config.default_device_type
        if why is None and device is not None and device.name == "DLA":
            why = self._dla_refused(network, config, flags)
        return why

    def _flags_refused(self, network, config, flags):
        standin, stored = self._trt.standin, network._reader.stored if network._reader else None
        if stored is None:
            return "Network must have at least one output"
        if network._strong:
            return f"precision flags {flags} are illegal in a strongly typed network" if flags else None
        if standin.version >= (10, 12):
            standin.log("WARNING", "Weakly typed networks are deprecated.")
        for kind in stored:
            if _FLAG_OF[kind] not in flags:
                return f"the network has {kind} Q/DQ, and the flag {_FLAG_OF[kind]} is not set"
        for flag in flags:
            if standin.options.sm < _LEAST_SM.get(flag, 0):
                return f"{flag} is not supported on compute capability {standin.options.sm}"
        ranged = any(getattr(t, "dynamic_range", None) for t in network._inputs)
        if "INT8" in flags and not stored and not ranged and getattr(config, "int8_calibrator", None) is None:
            return "Calibrator is expected to be set: INT8 without Q/DQ and without dynamic ranges"
        return None

    @staticmethod
    def _shapes_refused(network, config):
        for one in network._inputs:
            given = config._profiles[0] if config._profiles else None
            if one.is_shape_tensor:
                if given is None or one.name not in given._values:
                    return f"the shape input {one.name} has no values in the optimization profile"
            elif -1 in one.shape:
                if given is None or one.name not in given._shapes:
                    return f"Network has dynamic inputs, but no optimization profile has been defined for {one.name}"
                for bound in given._shapes[one.name]:
                    alike = len(bound) == len(one.shape)
                    if not alike or any(s not in (-1, b) for s, b in zip(one.shape, bound, strict=True)):
                        return f"the optimization profile does not fit {one.name}"
        return None

    def _dla_refused(self, network, config, flags):
        if config.DLA_core not in range(self.num_DLA_cores):
            return f"there is no DLA core {config.DLA_core}"
        if network._reader.stored:
            return "Q/DQ are not supported on DLA"
        if not {"FP16", "INT8"} & set(flags):
            return "DLA needs FP16 or INT8"
        if any(low != high for p in config._profiles for low, _, high in p._shapes.values()):
            return "DLA needs static shapes"
        if "GPU_FALLBACK" not in config._flags and any(n.op_type == "Gather" for n in network._reader.graph.node):
            return "a layer cannot run on DLA, and there is no fallback"
        return None

    def _without_kernel(self, network):
        options, reader = self._trt.standin.options, network._reader
        for node in reader.graph.node:
            name = name_of(node)
            if name in options.no_kernel_for or (name in options.no_int8_for and reader.behind_dq(node)):
                if options.silent:
                    return ["Error Code 2: Internal Error (Assertion engine failed.)"]
                layer = f"{name}.weight + {name}.weight_QuantizeLinear + {name}"
                code = f"Error Code 10: Internal Error (Could not find any implementation for node {layer}.)"
                if self._trt.standin.version < (10, 0):
                    return [
                        f"10: Could not find any implementation for node {layer}.",
                        f"10: [optimizer.cpp::computeCosts::1] {code}",
                    ]
                return [f"IBuilder::buildSerializedNetwork: {code}"]
        return None

    def _steps(self, config):
        options, monitor = self._trt.standin.options, getattr(config, "progress_monitor", None)
        if monitor is None:
            time.sleep(options.steps * options.step_seconds)
            return None
        self._trt.standin.check_base(monitor, self._trt.IProgressMonitor)
        monitor.phase_start("Building Engine", None, 1)
        monitor.phase_start("Tactic Selection", "Building Engine", options.steps)
        for step in range(options.steps):
            time.sleep(options.step_seconds)
            self._trt.standin.steps += 1
            if not monitor.step_complete("Tactic Selection", step):
                return "the build was cancelled by the progress monitor"
        monitor.phase_finish("Tactic Selection")
        monitor.step_complete("Building Engine", 0)
        monitor.phase_finish("Building Engine")
        return None
