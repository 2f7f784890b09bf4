"""What each TensorRT version wants: the tables first, then what follows from them for one build.

Versions are tuples of numbers, (10, 3, 0). A span (first, end) holds from `first` on and no longer at `end`; None is
open. The tables follow the Python bindings, headers and parsers that NVIDIA publishes with each release. Where a
release is not pinned down there, the first one known to have a thing is written, and the module itself is asked too.

Flags are named here, never numbered: STRONGLY_TYPED is bit 1 in 9 and 10 but bit 0 in 11, where bit 1 is another flag.
"""

import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from .faults import Fault

Version = Tuple[int, ...]
Span = Tuple[Optional[Version], Optional[Version]]

#: From here on the types of the ONNX graph are kept (strong typing); before, flags of the builder choose them.
STRONG_FROM = (10, 12)
#: The strongly typed mode itself came with 9.0; the weak one went with 11.0.
STRONG: Span = ((9, 0), None)
WEAK: Span = (None, (11, 0))

#: What a version has: attributes, flags, and habits.
FEATURES: Dict[str, Span] = {
    "EXPLICIT_BATCH": (None, (10, 0)),  # must be asked for; in 10 it does nothing, in 11 it has no name
    "named_tensors": ((8, 5), None),
    "memory_pool_limit": ((8, 4), None),  # before: config.max_workspace_size
    "builder_optimization_level": ((8, 6), None),
    "progress_monitor": ((9, 0), None),
    "max_aux_streams": ((8, 6), None),
    "version_compatible": ((8, 6), None),
    "dla": (None, (10, 8)),  # back in 11.4.1 in another form, which is not supported here
    "int8_initializers": ((10, 0), None),  # INT8 constant -> DequantizeLinear
    "float16_scales": ((10, 0), None),  # earlier parsers read every scale as float32
    "int64_kept": ((9, 0), None),  # earlier parsers turn INT64 inputs and outputs into INT32
    "json_control_bytes": ((8, 6), None),
}

#: BuilderFlag names by version. They choose types in weak typing and are refused in strong typing.
PRECISION_FLAGS: Dict[str, Span] = {
    "FP16": (None, (11, 0)),
    "INT8": (None, (11, 0)),
    "FP8": ((8, 6), (11, 0)),
    "BF16": ((9, 0), (11, 0)),
    "INT4": ((10, 1), (11, 0)),
}

#: Flags to set for a precision. Below float32 the rest runs in float16; trtexec refuses INT8 together with FP8.
WEAK_FLAGS: Dict[str, Tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("FP16",),
    "int8": ("INT8", "FP16"),
    "fp8": ("FP8", "FP16"),
    "int4": ("INT4", "FP16"),
}

#: TensorRT and compute capability from which a precision runs. FP8's flag in 8.6 is for plugins only, and whether 10.1
#: and 10.2 have INT4 is asked of the module.
PRECISIONS: Dict[str, Tuple[Version, Tuple[int, int]]] = {
    "fp32": ((0,), (0, 0)),
    "fp16": ((0,), (5, 3)),
    "int8": ((0,), (7, 2)),
    "fp8": ((10, 0), (8, 9)),
    "int4": ((10, 1), (8, 0)),
}


class Plan(NamedTuple):
    """How to build: which file, and the names of the flags."""

    typing: str
    source: str
    builder_flags: Tuple[str, ...]
    network_flags: Tuple[str, ...]
    warnings: Tuple[str, ...]


def parse(text: str) -> Version:
    """Return the numbers of a version as `tensorrt.__version__` or a package writes it: "10.3.0.26" or "8.5.2-1".

    Fault where it has none.
    """
    found = re.match(r"\s*v?(\d+(?:\.\d+)*)", text)
    if found is None:
        raise Fault("%r is no version of TensorRT" % text)
    return tuple(int(part) for part in found.group(1).split("."))


def named(version: Version) -> str:
    """Return a version in words."""
    return ".".join(str(part) for part in version)


def within(version: Version, span: Span) -> bool:
    """Say whether a version lies in a span."""
    first, end = span
    return (first is None or version >= first) and (end is None or version < end)


def has(version: Version, feature: str) -> bool:
    """Say whether a version has a feature of FEATURES. KeyError where the table does not know it."""
    return within(version, FEATURES[feature])


def typing_of(version: Version, override: Optional[str] = None) -> str:
    """Return "weak" or "strong": weak before 10.12, strong from there on, or what is asked for instead.

    Fault where the version does not have what is asked for.
    """
    if override is None:
        return "strong" if version >= STRONG_FROM else "weak"
    if override not in ("weak", "strong"):
        raise Fault("typing is weak or strong, not %r" % override)
    if not within(version, STRONG if override == "strong" else WEAK):
        fix = "leave the typing to edgec"
        raise Fault("TensorRT %s has no %s typing" % (named(version), override), fix)
    return override


def check_precision(version: Version, precision: str, sm: Tuple[int, int]) -> None:
    """Raise Fault where this version, or this compute capability (major, minor), has no kernels for a precision."""
    if precision not in PRECISIONS:
        raise Fault("TensorRT has no precision %r" % precision, "one of %s" % ", ".join(sorted(PRECISIONS)))
    first, capability = PRECISIONS[precision]
    instead = "fp16" if precision == "int8" else "int8"
    if sm < capability:
        if precision == "int8" or sm < PRECISIONS["int8"][1]:
            instead = "fp16" if sm >= PRECISIONS["fp16"][1] else "fp32"
        what = "%s needs compute capability %d.%d, and this device has %d.%d"
        raise Fault(what % ((precision.upper(),) + capability + sm), "use --precision %s" % instead)
    if version < first:
        what = "TensorRT %s has no %s in explicit quantization, which came with %s"
        raise Fault(what % (named(version), precision.upper(), named(first)), "use --precision %s" % instead)


def plan(
    version: Version,
    precision: str,
    sm: Tuple[int, int],
    weak: Optional[str],
    strong: Optional[str],
    typing: Optional[str] = None,
) -> Plan:
    """Return how to build on this version and compute capability, from the files that are there.

    `weak` is in float32 with float32 scales, `strong` has float16 types. Where only the other file came along and the
    version can use it, it is used. Fault where it cannot, and where there are no kernels for the precision.
    """
    check_precision(version, precision, sm)
    chosen = typing_of(version, typing)
    warnings: List[str] = []
    if typing is None:
        chosen = _by_files(version, precision, chosen, weak, strong, warnings)
    source = strong if chosen == "strong" and precision != "fp32" else weak
    if source is None and chosen == "strong":
        source = _untyped(version, precision, weak, warnings)
    if source is None:
        kind = "float32" if chosen == "weak" or precision == "fp32" else "float16"
        raise Fault("the ONNX file in %s is missing, which TensorRT %s builds from" % (kind, named(version)), _AGAIN)
    flags = WEAK_FLAGS[precision] if chosen == "weak" else ()
    network: Tuple[str, ...] = ("EXPLICIT_BATCH",) if has(version, "EXPLICIT_BATCH") else ()
    if chosen == "strong" and version < (11, 0):
        network += ("STRONGLY_TYPED",)
    return Plan(chosen, source, flags, network, tuple(warnings))


_AGAIN = "compile the model again: the bundle then has both files"


def _by_files(
    version: Version, precision: str, chosen: str, weak: Optional[str], strong: Optional[str], warnings: List[str]
) -> str:
    """Return the typing that the files at hand allow, the version's own where both do."""
    if precision == "fp32":
        return chosen  # float32 is the same file in both
    if chosen == "strong" and strong is None and weak is not None and within(version, WEAK):
        warnings.append("there is no ONNX file in float16: built weakly typed, which TensorRT 10.12 deprecates")
        return "weak"
    if chosen == "weak" and weak is None and strong is not None and has(version, "float16_scales"):
        warnings.append("there is no ONNX file in float32: built strongly typed")
        return "strong"
    return chosen


def _untyped(version: Version, precision: str, weak: Optional[str], warnings: List[str]) -> Optional[str]:
    """Return the float32 file where strong typing can still make use of it: Q/DQ keep their types, the rest float32."""
    if weak is None:
        return None
    if precision == "fp16":
        what = "TensorRT %s keeps the types of the ONNX file, and the one in float16 is missing"
        raise Fault(what % named(version), _AGAIN)
    warnings.append("there is no ONNX file in float16: what is not quantized runs in float32")
    return weak


def bits(enum: Any, names: Tuple[str, ...], version: Version) -> int:
    """Return flags of an enum as a bit mask. Fault where this TensorRT does not have one of them."""
    mask = 0
    for name in names:
        mask |= 1 << int(member(enum, name, version))
    return mask


def member(enum: Any, name: str, version: Version) -> Any:
    """Return a member of an enum by name. Fault where this TensorRT does not have it."""
    found = getattr(enum, name, None)
    if found is None:
        kind = getattr(enum, "__name__", "enum")
        raise Fault("TensorRT %s has no %s.%s" % (named(version), kind, name))
    return found
