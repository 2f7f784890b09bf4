"""A trtexec that is none, one for each version: strict about its flags, and it computes nothing.

`make` writes an executable file. It takes the flags that its version documents and no others, reads the ONNX file as
far as the rules go that it enforces, writes "engines" that only it reads, and files and lines in the documented forms.
All outputs are zeros. Its calls are kept in <file>.calls, one JSON list of arguments a line.
"""

import json
import os
import stat
import sys

VERSIONS = ((8, 2, 1), (8, 5, 2), (8, 6, 2), (10, 3, 0), (10, 13, 3), (11, 1, 0))

#: Flags that all versions take, by what their value is: nothing, a number, or text.
EVERYWHERE = {
    None: "noTF32 useSpinWait useCudaGraph noDataTransfers separateProfileRun allowGPUFallback dumpProfile "
    "dumpLayerInfo dumpOutput verbose help",
    int: "iterations avgRuns avgTiming warmUp idleTime useDLACore device",
    float: "duration",
    str: "onnx saveEngine loadEngine shapes minShapes optShapes maxShapes timingCacheFile profilingVerbosity "
    "percentile exportTimes exportProfile exportLayerInfo exportOutput loadInputs inputIOFormats outputIOFormats",
}
#: Flags of some versions: from, up to but without, kind of value.
SPANS = {
    "explicitBatch": (None, (10,), None),
    "workspace": (None, (10,), int),
    "buildOnly": (None, (10,), None),
    "nvtxMode": (None, (10,), str),
    "memPoolSize": ((8, 4), None, str),
    "skipInference": ((8, 6), None, None),
    "builderOptimizationLevel": ((8, 6), None, int),
    "hardwareCompatibilityLevel": ((8, 6), None, str),
    "versionCompatible": ((8, 6), None, None),
    "infStreams": ((8, 6), None, int),
    "fp16": (None, (11,), None),
    "int8": (None, (11,), None),
    "best": (None, (11,), None),
    "calib": (None, (11,), str),
    "precisionConstraints": (None, (11,), str),
    "fp8": ((8, 6), (11,), None),
    "bf16": ((9,), (11,), None),
    "int4": ((10, 1), (11,), None),
    "stronglyTyped": ((9,), None, None),
    "noSpinWait": ((11,), None, None),
    "noCudaGraph": ((11,), None, None),
    "includeDataTransfers": ((11,), None, None),
}


def flags_of(version):
    """Return what each flag's value is, for a version."""
    found = {name: kind for kind, names in EVERYWHERE.items() for name in names.split()}
    for name, (first, end, kind) in SPANS.items():
        if (first is None or version >= first) and (end is None or version < end):
            found[name] = kind
    return found


def make(folder, version, **how):
    """Write a trtexec of a version into a folder and return its path.

    `sm` (8.7), `device`, `memory` (MiB), `dla` cores; `ms` a call. What goes wrong: `no_gpu`, `parse` (a node's name at
    which the parser stops), `no_kernel` (a layer's name as the log has it), `no_int8` (names of nodes that have no
    kernel once they are quantized; with `names` False the log does not say which), `no_capture`, `signal`.
    """
    os.makedirs(str(folder), exist_ok=True)
    path = os.path.join(str(folder), "trtexec")
    told = dict(how, version=list(version))
    here = os.path.dirname(os.path.abspath(__file__))
    with open(path, "w") as file:
        file.write(f"#!{sys.executable}\nimport json, sys\nsys.path.insert(0, {here!r})\nimport fake_trtexec\n")
        file.write(f"sys.exit(fake_trtexec.main(json.loads({json.dumps(told)!r}), sys.argv, {path!r}))\n")
    os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)
    return path


def calls(path):
    """Return the arguments of all runs of a fake trtexec so far."""
    try:
        with open(path + ".calls") as file:
            return [json.loads(line) for line in file]
    except OSError:
        return []


class Failed(Exception):
    """Ends a run: errors as they are printed."""


def say(letter, text):
    """Print a line as trtexec does: warnings and errors go to stderr."""
    for out in (sys.stdout, sys.stderr):
        out.flush()
    print(f"[01/02/2026-03:04:05] [{letter}] {text}", file=sys.stdout if letter in "IV" else sys.stderr)


def mark(version, word, argv):
    """Print one of the lines that a test's start and end are known by."""
    number = version[0] * (10000 if version[0] >= 10 else 1000) + version[1] * 100 + version[2]
    build = " [b9]" if version >= (10, 13) else ""
    print(f"&&&& {word} TensorRT.trtexec [TensorRT v{number}]{build} # {' '.join(argv)}")


def parse(argv, version):
    """Return the arguments as a dictionary. Failed for one that the version does not take, or a value of no use."""
    known, found = flags_of(version), {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        name = key[2:] if key.startswith("--") else key
        if not key.startswith("--") or name not in known:
            raise Failed(f"Unknown option: {key} {value}")
        kind = known[name]
        if kind is None and equals:
            raise Failed(f"{key} takes no value")
        try:
            found[name] = True if kind is None else _whole(name, value, version) if kind is not str else value
        except ValueError:
            raise Failed(f"{key}: conversion failure of {value!r}") from None
        if kind is str and not value:
            raise Failed(f"{key} needs a value")
    return found


def _whole(name, value, version):
    # 8.2 keeps the duration as a whole number and drops what stands behind the point
    if name == "duration" and version >= (8, 6):
        return float(value)
    return int(value)


def shapes_of(text):
    """Return shapes by name; names with commas are cut, as in the real one, and quotes go."""
    found = {}
    for part in text.split(","):
        name, _, dims = part.rpartition(":")
        found[name.replace("'", "")] = [int(size) for size in dims.split("x")]
    return found


def main(how, argv, path):
    """Be trtexec."""
    with open(path + ".calls", "a") as file:
        file.write(json.dumps(argv[1:]) + "\n")
    version = tuple(how["version"])
    mark(version, "RUNNING", argv)
    if "--help" in argv:
        print("=== Model Options ===\n  --onnx=<file>               ONNX model")
        return 0
    try:
        from fake_trtexec_model import work

        work(how, version, parse(argv[1:], version))
    except Failed as failure:
        for line in str(failure).split("\n"):
            if line.startswith("|"):
                print(line[1:], file=sys.stderr)
            else:
                say("E", line)
        mark(version, "FAILED", argv)
        return 1
    mark(version, "PASSED", argv)
    return 0
