"""What the trtexec that is none does with a model: fake_trtexec's second half, imported where it is run."""

import json
import os
import re
import struct
import sys

from fake_trtexec import Failed, say, shapes_of
from fake_trtexec_run import infer

ECHO = (
    "Failed to parse onnx file\nParsing model failed\nFailed to create engine from model or file.\nEngine set up failed"
)


def work(how, version, given):
    """Build or load, then run, as the arguments say."""
    if ("onnx" in given) == ("loadEngine" in given):
        raise Failed("Model missing or format not recognized")
    device(how, version)
    engine = build(how, version, given) if "onnx" in given else load(version, given)
    if engine["dla"] != given.get("useDLACore"):
        raise Failed("Engine deserialization failed")
    if not {"skipInference", "buildOnly"} & set(given):
        infer(how, version, given, engine)


def device(how, version):
    """Say what the GPU is."""
    if how.get("no_gpu"):
        print("Cuda failure: no CUDA-capable device is detected", file=sys.stderr)
        sys.stdout.flush()
        os._exit(1)
    say("I", "=== Device Information ===")
    if version >= (10,):
        say("I", "Available Devices: ")
        say("I", '  Device 0: "Orin" UUID: GPU-00000000-0000-0000-0000-000000000000')
    lines = [("Selected Device", how.get("device", "Orin")), ("Compute Capability", how.get("sm", 8.7)), ("SMs", 8)]
    if version < (8, 5):
        lines.append(("Compute Clock Rate", "0.625 GHz"))
    lines += [("Device Global Memory", f"{how.get('memory', 7620)} MiB"), ("Shared Memory per SM", "164 KiB")]
    lines += [("Memory Bus Width", "128 bits (ECC disabled)")]
    for key, value in lines:
        say("I", f"{key}: {value}")
    say("I", "")
    say("I", "TensorRT version: " + ".".join(map(str, version)))


# -------------------------------------------------------------------------------------------- building


def build(how, version, given):
    """Read the ONNX file, apply the rules of the version, and write an engine."""
    import onnx

    check_flags(how, version, given)
    say("I", "Start parsing network model" + ("." if version >= (8, 6) else ""))
    model = onnx.load(given["onnx"], load_external_data=False)
    opset = max(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    graph = model.graph
    check_parse(how, version, given, graph, opset)
    done = "Finish parsing network model" if version < (8, 6) else "Finished parsing network model. Parse time: 0.01"
    say("I", done)
    inputs = [described(one) for one in graph.input if one.name not in {i.name for i in graph.initializer}]
    profile = profiles(given, inputs)
    keep_cache(how, version, given)
    if how.get("signal"):
        sys.stdout.flush()
        os.kill(os.getpid(), how["signal"])
    narrow = (name for name in how.get("no_int8", ()) if reads_few_bits(graph, name))
    without = how.get("no_kernel") or next(narrow, None)
    if without:
        named = without if how.get("names", True) else "{ForeignNode[...]}"
        what = f"Could not find any implementation for node {named}."
        full = f"[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error ({what})"
        lead = "Error[10]: " if version < (8, 6) else "[TRT] 10: " if version < (10,) else "[TRT] "
        raise Failed(
            f"{lead}{full}\nEngine could not be created from network\nBuilding engine failed\nEngine set up failed"
        )
    narrow = version < (9,)
    engine = {
        "version": list(version),
        "dla": given.get("useDLACore"),
        "inputs": [narrowed(one, narrow) for one in inputs],
        "outputs": [narrowed(described(one), narrow) for one in graph.output],
        "profile": profile,
        "nodes": [node.name for node in graph.node],
        "weights": [one.name for one in graph.initializer],
        "names_only": given.get("profilingVerbosity") != "detailed",
    }
    with open(given["saveEngine"], "w") as file:
        json.dump(engine, file)
    say("I", "Engine built in 12.5 sec.")
    say("W", "[TRT] a warning of the builder")
    return engine


def reads_few_bits(graph, name):
    """Say whether a node reads what is dequantized."""
    makers = {output: node.op_type for node in graph.node for output in node.output}
    node = next((node for node in graph.node if node.name == name), None)
    return node is not None and any(makers.get(value) == "DequantizeLinear" for value in node.input)


def check_flags(how, version, given):
    """Apply what goes for flags together."""
    if "fp8" in given and "int8" in given and version >= (9,):
        raise Failed("Invalid usage, fp8 and int8 aren't allowed to be enabled together.")
    if "stronglyTyped" in given and version < (11,) and {"fp16", "int8", "fp8", "int4", "best"} & set(given):
        raise Failed(
            "precision flags in strong typing"
        )  # the real one warns and drops them: here nobody may rely on it
    core = given.get("useDLACore")
    if core is not None and core >= how.get("dla", 0):
        raise Failed(f"Cannot create DLA engine, {how.get('dla', 0)} not available")
    if "calib" in given:
        if "int8" not in given:
            raise Failed("--calib without --int8")
        check_scales(version, given["calib"])
    pool = given.get("memPoolSize", "workspace:1")
    if not re.fullmatch(r"workspace:\d+", pool):
        raise Failed(f"Unknown memory pool: {pool}")


def check_scales(version, path):
    """Read a calibration cache: its head names the version, and scales are float32 bit patterns."""
    number = version[0] * (10000 if version[0] >= 10 else 1000) + version[1] * 100 + version[2]
    with open(path) as file:
        head, *lines = file.read().splitlines()
    if head != f"TRT-{number}-EntropyCalibration2" or not lines:
        raise Failed("calibration cache of another version")
    for line in lines:
        scale = struct.unpack(">f", bytes.fromhex(line.rpartition(": ")[2]))[0]
        if not 0 < scale < 1e6:
            raise Failed(f"calibration cache: no scale: {line}")


def check_parse(how, version, given, graph, opset):
    """Stop at nodes that the version's parser does not read."""
    constants = {one.name: one for one in graph.initializer}
    for number, node in enumerate(graph.node):
        why = reason(version, given, node, opset, constants)
        if how.get("parse") == node.name:
            why = "Assertion failed: the fake was told to stop here"
        if why:
            stop(version, number, node, why)


def reason(version, given, node, opset, constants):
    """Return why a node is refused, if it is."""
    if version < (9,) and opset > 17:
        return f"Assertion failed: opset {opset} is not supported"
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    strong = version >= (11,) or "stronglyTyped" in given
    if not strong and not {"int8", "fp8", "int4"} & set(given):
        return "Assertion failed: Q/DQ need the flag of their type"
    if version < (9,) and len(node.input) != 3:
        return "Assertion failed: three inputs are needed"
    if version < (9,) and node.input[1] in constants and constants[node.input[1]].data_type != 1:
        return "Assertion failed: scales must be float32"
    if version < (10,) and node.op_type == "DequantizeLinear" and node.input[0] in constants:
        return "Assertion failed: only activation types allowed as input to this layer"
    return None


def stop(version, number, node, why):
    """Print how the parser says that it stopped."""
    at = "[TRT] ModelImporter.cpp:77"
    text = "\n".join("|" + line for line in str(node).rstrip().split("\n"))
    op, out = node.op_type, node.output[0]
    lines = [f'{at}1: While parsing node number {number} [{op} -> "{out}"]:', f"{at}2: --- Begin node ---", text]
    lines += [f"{at}3: --- End node ---", f"{at}4: ERROR: builtin_op_importers.cpp:649 In function import{op}:"]
    raise Failed("\n".join(lines) + f"\n|[8] {why}\n" + ECHO)


def described(value):
    """Return name, ONNX type number and shape with -1 for open dimensions."""
    tensor = value.type.tensor_type
    return [value.name, tensor.elem_type, [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]]


def narrowed(one, narrow):
    """Return a tensor as the engine has it."""
    name, kind, shape = one
    return [name, 6 if narrow and kind == 7 else kind, shape]


def profiles(given, inputs):
    """Return min, opt and max by input. Failed for shapes of a static model, or of inputs that it has not."""
    flags = [name for name in ("minShapes", "optShapes", "maxShapes", "shapes") if name in given]
    moving = {name: shape for name, _, shape in inputs if -1 in shape}
    if flags and not moving:
        tail = "shapes of inference tensors will be determined by the model itself"
        raise Failed(f"Static model does not take explicit shapes since the {tail}\nNetwork And Config setup failed")
    found = {}
    for name, shape in moving.items():
        told = [shapes_of(given.get(flag, "")).get(name) if flag in given else None for flag in flags[:3]]
        if len(told) != 3 or any(one is None for one in told):
            say("W", f"Dynamic dimensions required for input: {name}, but no shapes were provided. Automatically")
            told = [[1 if size == -1 else size for size in shape]] * 3
        for low, opt, high, size in zip(*told, shape, strict=True):
            if not low <= opt <= high or (size != -1 and {low, opt, high} != {size}):
                raise Failed(f"input {name}: kMIN <= kOPT <= kMAX does not hold\nNetwork And Config setup failed")
        found[name] = told
    for flag in flags:
        strange = set(shapes_of(given[flag])) - set(moving)
        if strange:
            raise Failed(
                f"Cannot find input tensor with name {sorted(strange)[0]} in the network\nEngine set up failed"
            )
    return found


def keep_cache(how, version, given):
    """Read a timing cache if it is there, and write it: it belongs to a version."""
    path, mine = given.get("timingCacheFile"), "timings of " + ".".join(map(str, version)) + "\n"
    if not path:
        return
    old = ""
    if os.path.exists(path):
        with open(path, errors="replace") as file:
            old = file.read()
        if not old.startswith(mine):
            raise Failed(
                "TimingCache creation failed"
                if version < (10,)
                else f"[TRT] Failed to create ITimingCache from file {path}"
            )
    else:
        say("W", f"Could not read timing cache from: {path}. A new timing cache will be generated and written.")
    with open(path, "w") as file:
        file.write((old or mine) + "one more build\n")


def load(version, given):
    """Read an engine. Failed for one of another version."""
    try:
        with open(given["loadEngine"]) as file:
            engine = json.load(file)
    except OSError:
        raise Failed(f"Error opening engine file: {given['loadEngine']}\nEngine set up failed") from None
    except ValueError:
        raise Failed("[TRT] 1: Serialization assertion magicTag failed\nEngine deserialization failed") from None
    if engine["version"] != list(version):
        what = "The engine plan file is not compatible with this version of TensorRT, expecting library version"
        raise Failed(f"[TRT] {what}\nEngine deserialization failed\nEngine set up failed")
    say("I", "Engine loaded in 0.5 sec.")
    return engine
