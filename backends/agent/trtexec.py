"""Engines built by trtexec, for devices that have no TensorRT module for Python, or TensorRT 8.2 (JetPack 4).

What is set follows the same rules as with the module (tensorrt_rules); here they become a command line, and which flags
a version takes is in _FLAGS: trtexec ends at the first one that it does not know.
"""

import os
import re
import shutil
import struct
import tempfile
import time
from typing import Dict, List, Optional, Sequence

from . import onnx_file, tensorrt_rules, trtexec_faults
from .faults import Fault
from .onnx_file import Graph
from .opened import Opened, Tell
from .tensorrt_build import Built, Request
from .tensorrt_rules import Plan, Span, Version
from .tensors import Described
from .trtexec_engine import Beside, Engine
from .trtexec_run import Device, Ran, device, find, run, shape_spec, version

__all__ = ["build", "build_command", "find", "open_engine", "version"]

#: Which versions take a flag, where not all from 8.2 on do.
_FLAGS: Dict[str, Span] = {
    "--buildOnly": (None, (8, 6)),  # still taken by 8.6, which says --skipInference
    "--skipInference": ((8, 6), None),
    "--workspace": (None, (8, 4)),
    "--memPoolSize": ((8, 4), None),
    "--builderOptimizationLevel": ((8, 6), None),
}

#: Files in the folder of a build.
_CACHE, _SCALES = "timing.cache", "scales.cache"
_MIB = 1 << 20
#: MiB of workspace at least.
_LEAST = 64


def open_engine(path: str, request_shapes: Dict[str, List[int]], binary: str, seconds_per_block: float) -> Opened:
    """Return an engine that was built here, to be run by trtexec. Fault where it was not, or by another version."""
    return Engine(path, request_shapes, binary, seconds_per_block)


def build(request: Request, tell: Tell, binary: str) -> Built:
    """Build an engine by trtexec. Fault where it does not build, with the ONNX nodes to blame as far as it says."""
    tell("looking for the GPU", 0, None)
    there = device(binary)
    plan = _plan(request, there)
    graph, notes = onnx_file.read(plan.source), _level(request, there)
    plan = _quantized(request, plan, graph, notes)
    part, began = request.engine + ".part", time.monotonic()
    folder = os.path.dirname(os.path.abspath(request.engine))
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
        command = build_command(binary, request, plan, graph, there, work)
        try:
            ran = _built(command, request, work, tell, notes)
            if ran.failed or not os.path.exists(part):
                name = tensorrt_rules.named(there.version)
                raise trtexec_faults.build_fault(ran.said, ran.text, ran.code, name, graph)
            if request.timing_cache:
                _keep(os.path.join(work, _CACHE), request.timing_cache)
            _write_beside(request, graph, there.version)
            os.replace(part, request.engine)
        finally:
            if os.path.exists(part):
                os.remove(part)
    return Built(
        engine=request.engine,
        version=tensorrt_rules.named(there.version),
        typing=plan.typing,
        source=plan.source,
        flags=list(plan.builder_flags),
        seconds=ran.said.built_in if ran.said.built_in is not None else time.monotonic() - began,
        size=os.path.getsize(request.engine),
        warnings=(list(plan.warnings) + notes + _warned(ran))[:20],
    )


def _warned(ran: Ran) -> List[str]:
    """Return trtexec's warnings, without the one that a timing cache is new."""
    return [line for line in ran.said.warnings if not ("timing cache" in line.lower() and "will be generated" in line)]


def _level(request: Request, there: Device) -> List[str]:
    if request.level is None or _takes("--builderOptimizationLevel", there.version):
        return []
    return ["TensorRT %s has no optimisation levels" % tensorrt_rules.named(there.version)]


# --------------------------------------------------------------------------------------- command line


def build_command(binary: str, request: Request, plan: Plan, graph: Graph, there: Device, folder: str) -> List[str]:
    """Return the arguments of a build in a folder. Fault where an open input has no shapes, or no name to be told."""
    some = there.version
    command = [
        binary,
        "--onnx=%s" % os.path.abspath(plan.source),
        "--saveEngine=%s.part" % os.path.abspath(request.engine),
        "--skipInference" if _takes("--skipInference", some) else "--buildOnly",
        "--profilingVerbosity=detailed",  # else the inspector tells names only
    ]
    command += ["--" + flag.lower() for flag in plan.builder_flags]
    if "STRONGLY_TYPED" in plan.network_flags:
        command.append("--stronglyTyped")
    command += _shapes(request, graph)
    size = _workspace(request.workspace, there)
    if size is not None:
        command.append(("--memPoolSize=workspace:%d" if _takes("--memPoolSize", some) else "--workspace=%d") % size)
    if request.timing_cache:
        command.append("--timingCacheFile=%s" % _CACHE)
    if request.level is not None and _takes("--builderOptimizationLevel", some):
        command.append("--builderOptimizationLevel=%d" % request.level)
    if request.dla_core is not None:
        command += ["--useDLACore=%d" % request.dla_core, "--allowGPUFallback"]
        if request.precision == "int8":
            command.append("--calib=%s" % _scales(request.ranges or {}, some, folder))
    return command


def _takes(flag: str, some: Version) -> bool:
    return tensorrt_rules.within(some, _FLAGS[flag])


def _shapes(request: Request, graph: Graph) -> List[str]:
    """Return flags for the inputs that have an open dimension: a wholly static file with any of them is refused."""
    found = []
    for one in graph.inputs:
        if -1 not in one.shape:
            continue
        if one.name not in request.shapes:
            raise Fault("input %s has an open dimension, and no shapes are given for it" % one.name)
        found.append((one.name, request.shapes[one.name]))
    if not found:
        return []
    flags = ("--minShapes", "--optShapes", "--maxShapes")
    return [shape_spec(flag, [(name, three[n]) for name, three in found]) for n, flag in enumerate(flags)]


def _workspace(asked: Optional[int], there: Device) -> Optional[int]:
    """Return MiB of workspace, None to leave it to TensorRT.

    From 8.4 on that is all of the GPU's memory, which is right where it is the GPU's alone. A Jetson shares it with
    the CPU, and a kernel that is tried with most of it gets the process killed: there a quarter of all is taken, and
    never more than half of what is free. trtexec before 8.4 would leave 16 MiB, too few for many convolutions.
    """
    if asked is not None:
        return max(1, asked // _MIB)
    free = _shared_memory()
    if free is not None:
        return max(_LEAST, min((there.memory or free) // 4, free // 2))
    return None if _takes("--memPoolSize", there.version) else max(_LEAST, (there.memory or 0) // 4)


def _shared_memory(root: str = "/") -> Optional[int]:
    """Return the MiB that are free where the GPU uses the CPU's memory; None elsewhere."""
    if not os.path.exists(os.path.join(root, "etc/nv_tegra_release")):
        return None
    try:
        with open(os.path.join(root, "proc/meminfo")) as file:
            found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) // 1024 if found else None


# ------------------------------------------------------------------------------------------------ DLA


def _plan(request: Request, there: Device) -> Plan:
    core, typing = request.dla_core, request.typing
    if core is not None:
        typing = typing or "weak"
        if not tensorrt_rules.has(there.version, "dla") or typing != "weak":
            some = tensorrt_rules.named(there.version)
            raise Fault("TensorRT %s builds no engines for the DLA here; up to 10.7 does, weakly typed" % some, _NO_DLA)
        if request.precision not in ("fp16", "int8"):
            raise Fault("the DLA computes in FP16 or INT8, not in %s" % request.precision, "use --precision fp16")
        if request.precision == "int8" and not request.ranges:
            raise Fault("INT8 on the DLA needs a range for each tensor, and none were given", "use --precision fp16")
    asked = (request.precision, there.capability, request.weak, request.strong, typing)
    return tensorrt_rules.plan(there.version, *asked)


_NO_DLA = "build for the GPU"


def _quantized(request: Request, plan: Plan, graph: Graph, notes: List[str]) -> Plan:
    """Return the plan as the file wants it. Fault where what was asked for and what the file has do not fit.

    trtexec given INT8 for a file without Q/DQ would make up ranges of its own, so the flag is left out there.
    """
    found = [node.name for node in graph.nodes if node.op in ("QuantizeLinear", "DequantizeLinear")]
    wanted = request.precision in ("int8", "fp8", "int4")
    if request.dla_core is not None:
        if found:
            raise Fault("the DLA takes no Q/DQ, and the ONNX file has some", "build it from a file without, and ranges")
        moving = [name for name, three in request.shapes.items() if len({tuple(shape) for shape in three}) > 1]
        open_ = [one.name for one in graph.inputs if -1 in one.shape and one.name in moving]
        if open_:
            raise Fault("the DLA needs static shapes, and the input %s has a range of them" % open_[0], "fix its shape")
        return plan
    if found and not wanted and plan.typing == "weak":
        fix = "compile the model with --precision %s" % request.precision
        raise Fault("the ONNX file is quantized, and %s was asked for" % request.precision, fix)
    if wanted and not found:
        notes.append("the ONNX file has no Q/DQ: built without %s" % request.precision.upper())
        kept = tuple(flag for flag in plan.builder_flags if flag not in ("INT8", "FP8", "INT4"))
        return plan._replace(builder_flags=kept)
    return plan


def _scales(ranges: Dict[str, float], some: Version, folder: str) -> str:
    """Write scales as a calibration cache, and return its name: a tensor's float32 scale as its bits in hexadecimal."""
    lines = ["TRT-%d-EntropyCalibration2" % _number(some)]
    lines += ["%s: %s" % (name, struct.pack(">f", scale).hex()) for name, scale in ranges.items()]
    with open(os.path.join(folder, _SCALES), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return _SCALES


def _number(some: Version) -> int:
    """Return a version as one number, as TensorRT writes it: 8502, 100300."""
    major, minor, patch = (tuple(some) + (0, 0))[:3]
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


# --------------------------------------------------------------------------------------------- running


def _built(command: Sequence[str], request: Request, folder: str, tell: Tell, notes: List[str]) -> Ran:
    """Run a build; one that fails at the timing cache is run again without it, and that is noted."""

    def heard(line: str) -> None:
        for words, stage in _STAGES:
            if words in line:
                tell(stage, 0, None)

    old = request.timing_cache or ""
    carried = os.path.exists(old)
    if carried:
        shutil.copyfile(old, os.path.join(folder, _CACHE))
    ran = run(command, folder, heard)
    if not (carried and ran.failed and trtexec_faults.of_cache(ran.said)):
        return ran
    os.remove(os.path.join(folder, _CACHE))
    notes.append("the timing cache is of another device or TensorRT, or damaged: begun anew")
    return run(command, folder, heard)


#: What a build's lines say of how far it is. While it times kernels it says nothing.
_STAGES = (
    ("Start parsing network model", "parsing the ONNX file"),
    ("Finish parsing network model", "timing kernels"),
    ("Finished parsing network model", "timing kernels"),
    ("Engine built in", "engine built"),
)


def _keep(cache: str, path: str) -> None:
    """Put a timing cache in its place, whole or not at all."""
    if os.path.exists(cache):
        shutil.copyfile(cache, path + ".part")
        os.replace(path + ".part", path)


def _write_beside(request: Request, graph: Graph, some: Version) -> None:
    kept = Beside(
        inputs=[_in_engine(one, some) for one in graph.inputs],
        outputs=[_in_engine(one, some) for one in graph.outputs],
        nodes=[node.name for node in graph.nodes if node.name],
        version=some,
        dla_core=request.dla_core,
    )
    kept.write(request.engine)


def _in_engine(one: Described, some: Version) -> Described:
    """Return a tensor as the engine has it: parsers before 9.0 turn INT64 inputs and outputs into INT32."""
    narrowed = one.dtype == "int64" and not tensorrt_rules.has(some, "int64_kept")
    return one._replace(dtype="int32") if narrowed else one
