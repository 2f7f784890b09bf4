"""What each TensorRT version has in Python: enum members and members of classes, by the first version and the end.

From NVIDIA's published bindings of each release. A name that is in no table is in no stand-in.
"""

ALL = (None, None)
BELOW_9, BELOW_10, BELOW_11 = (None, (9, 0)), (None, (10, 0)), (None, (11, 0))


def within(version, span):
    first, end = span
    return (first is None or version >= first) and (end is None or version < end)


def _all(*names):
    return [(name, ALL) for name in names]


#: enum -> (member, span[, value]); without a value they are counted through.
ENUMS = {
    "NetworkDefinitionCreationFlag": [
        ("EXPLICIT_BATCH", BELOW_11, 0),
        ("EXPLICIT_PRECISION", BELOW_9, 1),
        ("STRONGLY_TYPED", ((9, 0), (11, 0)), 1),
        ("STRONGLY_TYPED", ((11, 0), None), 0),
        ("PREFER_JIT_PYTHON_PLUGINS", ((10, 9), (11, 0)), 2),
        ("PREFER_JIT_PYTHON_PLUGINS", ((11, 0), None), 1),
        ("PREFER_AOT_PYTHON_PLUGINS", ((10, 9), (11, 0)), 3),
        ("PREFER_AOT_PYTHON_PLUGINS", ((11, 0), None), 2),
    ],
    "BuilderFlag": [
        ("FP16", BELOW_11),
        ("INT8", BELOW_11),
        ("FP8", ((8, 6), (11, 0))),
        ("BF16", ((9, 0), (11, 0))),
        ("INT4", ((10, 1), (11, 0))),
        ("FP4", ((10, 8), (11, 0))),
        ("OBEY_PRECISION_CONSTRAINTS", BELOW_11),
        ("PREFER_PRECISION_CONSTRAINTS", BELOW_11),
        ("STRICT_TYPES", BELOW_10),
        *_all("TF32", "GPU_FALLBACK", "REFIT", "DISABLE_TIMING_CACHE", "SPARSE_WEIGHTS", "DEBUG", "DIRECT_IO"),
        *_all("SAFETY_SCOPE"),
        ("VERSION_COMPATIBLE", ((8, 6), None)),
        ("EXCLUDE_LEAN_RUNTIME", ((8, 6), None)),
        ("ERROR_ON_TIMING_CACHE_MISS", ((9, 0), None)),
        ("DISABLE_COMPILATION_CACHE", ((9, 0), None)),
        ("STRIP_PLAN", ((10, 0), None)),
        ("REFIT_IDENTICAL", ((10, 0), None)),
        ("WEIGHT_STREAMING", ((10, 0), None)),
        ("WEIGHTLESS", ((10, 0), (11, 0))),
        ("REFIT_INDIVIDUAL", ((10, 3), None)),
        ("STRICT_NANS", ((10, 7), None)),
        ("MONITOR_MEMORY", ((10, 7), None)),
        ("EDITABLE_TIMING_CACHE", ((10, 8), None)),
        ("DISTRIBUTIVE_INDEPENDENCE", ((10, 12), None)),
        ("ENABLE_TACTIC_HEURISTIC", ((8, 5), (8, 6))),
    ],
    "MemoryPoolType": [
        *_all("WORKSPACE", "DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM"),
        ("TACTIC_DRAM", ((8, 6), None)),
        ("TACTIC_SHARED_MEMORY", ((10, 0), None)),
    ],
    "HardwareCompatibilityLevel": [
        ("NONE", ((8, 6), None)),
        ("AMPERE_PLUS", ((8, 6), None)),
        ("SAME_COMPUTE_CAPABILITY", ((10, 9), None)),
    ],
    "ProfilingVerbosity": [*_all("LAYER_NAMES_ONLY", "NONE", "DETAILED"), ("DEFAULT", BELOW_10), ("VERBOSE", BELOW_10)],
    "TilingOptimizationLevel": [(name, ((10, 8), None)) for name in ("NONE", "FAST", "MODERATE", "FULL")],
    "OnnxParserFlag": [
        ("NATIVE_INSTANCENORM", ((8, 6), None)),
        ("ENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA", ((10, 11), None)),
        ("REPORT_CAPABILITY_DLA", ((10, 15), None)),
        ("ENABLE_PLUGIN_OVERRIDE", ((10, 15), None)),
        ("ADJUST_FOR_DLA", ((10, 16), None)),
    ],
    "DataType": [
        *_all("FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8"),
        ("FP8", ((8, 6), None)),
        ("BF16", ((9, 0), None)),
        ("INT64", ((9, 0), None)),
        ("INT4", ((10, 1), None)),
        ("FP4", ((10, 8), None)),
        ("E8M0", ((10, 16), None)),
    ],
    "TensorIOMode": _all("NONE", "INPUT", "OUTPUT"),
    "TensorLocation": _all("DEVICE", "HOST"),
    "TensorFormat": _all("LINEAR", "CHW2", "HWC8", "CHW4", "CHW16", "CHW32", "HWC"),
    "LayerInformationFormat": _all("ONELINE", "JSON"),
    "DeviceType": _all("GPU", "DLA"),
    "LayerType": _all("CONVOLUTION", "MATRIX_MULTIPLY", "ELEMENTWISE", "ACTIVATION", "QUANTIZE", "DEQUANTIZE"),
    "Severity": _all("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"),
}

#: Class.member -> span, for members that not all versions have.
MEMBERS = {
    "Builder.max_batch_size": BELOW_10,
    "Builder.build_engine": BELOW_10,
    "Builder.platform_has_fast_fp16": BELOW_11,
    "Builder.platform_has_fast_int8": BELOW_11,
    "IBuilderConfig.max_workspace_size": BELOW_10,
    "IBuilderConfig.min_timing_iterations": BELOW_10,
    "IBuilderConfig.set_memory_pool_limit": ((8, 4), None),
    "IBuilderConfig.builder_optimization_level": ((8, 6), None),
    "IBuilderConfig.hardware_compatibility_level": ((8, 6), None),
    "IBuilderConfig.max_aux_streams": ((8, 6), None),
    "IBuilderConfig.progress_monitor": ((9, 0), None),
    "IBuilderConfig.max_num_tactics": ((10, 5), None),
    "IBuilderConfig.tiling_optimization_level": ((10, 8), None),
    "IBuilderConfig.int8_calibrator": BELOW_11,
    "INetworkDefinition.has_implicit_batch_dimension": BELOW_11,
    "ITensor.set_dynamic_range": BELOW_11,
    "ITensor.dynamic_range": BELOW_11,
    "ILayer.metadata": ((8, 6), None),
    "OnnxParser.supports_model": BELOW_11,
    "ParserError.node_name": ((9, 0), None),
    "ParserError.node_operator": ((9, 0), None),
    "ParserError.local_function_stack": ((10, 0), None),
    "ICudaEngine.num_bindings": BELOW_10,
    "ICudaEngine.get_binding_name": BELOW_10,
    "ICudaEngine.device_memory_size": BELOW_11,
    "ICudaEngine.device_memory_size_v2": ((10, 1), None),
    "IExecutionContext.execute_async_v2": BELOW_10,
    "IExecutionContext.set_binding_shape": BELOW_10,
    "IExecutionContext.all_shape_inputs_specified": BELOW_11,
    "tensorrt.IProgressMonitor": ((9, 0), None),
    "tensorrt.IInt8EntropyCalibrator2": BELOW_11,
}

#: The CUDA that each comes with, and where its engines run.
CUDA = {(8, 5): (11, 4), (8, 6): (12, 2), (10, 3): (12, 6), (10, 13): (13, 0), (11, 1): (13, 2)}
#: Versions that know the DLA of a Jetson.
DLA = (None, (10, 8))
#: The newest opset that the ONNX parser reads. Beyond 10.1 no ceiling is published; INT4 needs 21, FP4 23.
OPSET = {(8, 5): 17, (8, 6): 17, (10, 3): 21, (10, 13): 23, (11, 1): 23}


class Enum:
    """A member of a pybind enum: it has a name and becomes an int when asked; it is none, so 1 << member fails."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __int__(self):
        return self.value

    def __repr__(self):
        return f"<{type(self).__name__}.{self.name}: {self.value}>"


def enum(kind, version):
    """Return an enum as this version has it."""
    made = type(kind, (Enum,), {})
    for count, (name, span, *value) in enumerate(ENUMS[kind]):
        if within(version, span):
            setattr(made, name, made(name, value[0] if value else count))
    return made


def cut(cls, version, name=None):
    """Return a class without the members that this version does not have."""
    name = name or cls.__name__
    kept = {
        member: value
        for member, value in vars(cls).items()
        if within(version, MEMBERS.get(f"{name}.{member}", ALL)) and member not in ("__dict__", "__weakref__")
    }
    return type(name, cls.__bases__, kept)


class Bound:
    """An object of the C++ half: setting what it does not have is an error, as it is with pybind."""

    def __setattr__(self, name, value):
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"'tensorrt.{type(self).__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)


def check(value, kind, what):
    """TypeError where an argument is of another type, as pybind's functions raise it."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{what}: incompatible function arguments: {value!r}")
