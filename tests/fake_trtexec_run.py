"""How the trtexec that is none runs an engine: times out of the air, zeros for outputs, files in the true forms."""

import json
import os

from fake_trtexec import Failed, say, shapes_of

#: Bytes of an element by ONNX's number of its type.
BYTES = {1: 4, 6: 4, 7: 8, 9: 1, 10: 2, 3: 1, 2: 1}
#: Milliseconds that copies take, in and out.
IN, OUT = 0.25, 0.125
#: Calls of a block behind its warm-up, and in it.
CALLS, WARMING = 20, 5


def infer(how, version, given, engine):
    """Run, measure, and write the files that were asked for."""
    shapes = shapes_in(given, engine)
    load_inputs(given, engine, shapes)
    graph = "noCudaGraph" not in given if version >= (11,) else "useCudaGraph" in given
    if graph and engine["dla"] is not None:
        raise Failed("CUDA graphs and DLA offloading are not simultaneously supported.")
    if graph and how.get("no_capture"):
        say("W", "The built TensorRT engine contains operations that are not permitted under CUDA graph capture mode.")
        say("W", "The specified --useCudaGraph flag has been ignored.")
    profiled = "exportProfile" in given
    together = profiled and version < (11,) and "separateProfileRun" not in given
    if "exportLayerInfo" in given:
        write(given["exportLayerInfo"], layer_info(version, engine))
    copies = "includeDataTransfers" in given if version >= (11,) else "noDataTransfers" not in given
    if not together:  # with a profiler at work nothing else is reported
        report(how, version, given, copies, graph)
    if "exportOutput" in given:
        write(given["exportOutput"], outputs(engine, shapes))
    if profiled:
        write(given["exportProfile"], profile(version, given, engine))


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def shapes_in(given, engine):
    """Return the inputs' shapes: open dimensions are 1 where nothing is told, as in the real one, with a warning."""
    told = shapes_of(given["shapes"]) if "shapes" in given else {}
    strange = set(told) - {name for name, _, _ in engine["inputs"]}
    if strange:
        raise Failed("Invalid tensor names found in --shapes flag.\nInference set up failed")
    found = {}
    for name, _, shape in engine["inputs"]:
        if -1 not in shape:
            if told.get(name, shape) != shape:
                raise Failed(
                    f"The engine was built with static shapes for input tensor {name}\nInference set up failed"
                )
            found[name] = shape
            continue
        if name not in told:
            say("W", f"Shape missing for input with dynamic shape: {name}Automatically setting shape to: 1")
        found[name] = told.get(name, [1 if size == -1 else size for size in shape])
        low, _, high = engine["profile"][name]
        if not all(a <= b <= c for a, b, c in zip(low, found[name], high, strict=True)):
            raise Failed(f"[TRT] 3: input {name} is outside of its optimization profile\nInference set up failed")
    return found


def load_inputs(given, engine, shapes):
    """Look at the files for inputs: their sizes must be those of the tensors, or twice that."""
    for part in given.get("loadInputs", "").split(",") if "loadInputs" in given else ():
        name, _, path = part.rpartition(":")
        kinds = {one[0]: one[1] for one in engine["inputs"]}
        if name not in kinds:  # quotes are part of the name here
            raise Failed("Invalid tensor names found in --loadInputs flag.\nInference set up failed")
        size = BYTES[kinds[name]]
        for one in shapes[name]:
            size *= one
        if not os.path.exists(path) or os.path.getsize(path) not in (size, 2 * size):
            raise Failed(f"Unexpected file size for input file: {path}. Note: Input binding size is: {size}")


def report(how, version, given, copies, graph):
    """Print the summary and write the times."""
    ms, warm_up = how.get("ms", 1.5), given.get("warmUp", 200)
    calls = []
    first = 0.0 if version < (8, 5) else float(warm_up)  # 8.2 writes the calls of its warm-up, too
    for n in range((WARMING if first < warm_up else 0) + CALLS):
        began = n * warm_up / WARMING if first < warm_up and n < WARMING else warm_up + n
        slow = 10.0 if began < warm_up else 1.0 + 0.01 * (n % 5) + (0.0 if graph else 0.5)
        calls.append(call(began, ms * slow, copies))
    if "exportTimes" in given:
        text = "[\n"
        for n, one in enumerate(calls):
            text += ("  " if n == 0 else ", ") + "{ " + ", ".join(f'"{k}" : {v:.6g}' for k, v in one.items()) + " }\n"
        write(given["exportTimes"], text + "]\n")
    say("I", "")
    say("I", "=== Performance summary ===")
    say("I", f"Throughput: {(1000 / ms) * 1.25:.6g} qps")
    rows = ["Latency", "End-to-End Host Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency"]
    percent = given.get("percentile", "99" if version < (8, 5) else "90,95,99").split(",")
    for row in rows if version < (8, 5) else rows[:1] + rows[2:]:
        more = ", ".join(f"percentile({p}%) = {ms * 1.04:.6g} ms" for p in percent)
        say(
            "I",
            f"{row}: min = {ms:.6g} ms, max = {ms * 1.04:.6g} ms, mean = {ms * 1.02:.6g} ms, median = {ms} ms, {more}",
        )
    say("I", "Total Host Walltime: 2.00123 s")
    say("I", "Total GPU Compute Time: 1.99 s")
    say("W", "* GPU compute time is unstable, with coefficient of variance = 1.4%.")


def call(began, ms, copies):
    """Return one call as the times have it."""
    into, out = (IN, OUT) if copies else (0, 0)
    stamps = {"startEnqMs": began, "endEnqMs": began, "startH2dMs": began - into, "endH2dMs": began}
    stamps.update(startComputeMs=began, endComputeMs=began + ms, startD2hMs=began + ms, endD2hMs=began + ms + out)
    return dict(stamps, h2dMs=into, computeMs=ms, d2hMs=out, latencyMs=into + ms + out)


def outputs(engine, shapes):
    """Return zeros as --exportOutput has them; open dimensions are those of the first input."""
    sizes = next(iter(shapes.values()))
    text = "[\n"
    for n, (name, _, shape) in enumerate(engine["outputs"]):
        real = [sizes[i] if size == -1 else size for i, size in enumerate(shape)]
        count = 1
        for size in real:
            count *= size
        lead = "  " if n == 0 else ", "
        text += f'{lead}{{ "name" : "{name}"\n  , "dimensions" : "{"x".join(map(str, real))}"\n'
        text += '  , "values" : [ ' + ", ".join(["0"] * count) + " ]\n  }\n"
    return text + "]\n"


# ------------------------------------------------------------------------------------------------ layers


def layers(version, engine):
    """Return layers as (name, metadata): nodes in pairs, whose names from 10 on are the generator's own."""
    nodes = engine["nodes"]
    pairs = [nodes[n : n + 2] for n in range(0, len(nodes), 2)]
    if version < (8, 6):  # the first one's name has the weights in it, as names then had
        return [(" + ".join((engine["weights"] if n == 0 else []) + pair), None) for n, pair in enumerate(pairs)]
    joint = "\x1e"  # written raw, as the real one does
    metadata = [joint.join(f"[ONNX Layer: {node}]" for node in pair) for pair in pairs]
    if version < (10,):
        return [(" + ".join(pair), said) for pair, said in zip(pairs, metadata, strict=True)]
    return [(f"__myl_Fused_myl0_{n}", said) for n, said in enumerate(metadata)]


def layer_info(version, engine):
    """Return the inspector's JSON, control bytes raw."""
    if engine["names_only"]:
        entries = [f'"{name}"' for name, _ in layers(version, engine)]
    else:
        entries = []
        for name, said in layers(version, engine):
            more = "" if said is None else f',\n  "Metadata": "{said}"'
            entries.append(f'{{\n  "Name": "{name}",\n  "LayerType": "CaskConvolution"{more}\n}}')
    text = '{"Layers": [' + ",".join(entries) + "],\n"
    if version >= (11,):
        return text + '"I/O Tensors": ' + json.dumps([{"Name": name} for name, _, _ in engine["inputs"]]) + "}\n"
    return text + '"Bindings": ' + json.dumps([one[0] for one in engine["inputs"] + engine["outputs"]]) + "}\n"


def profile(version, given, engine):
    """Return a profile: each layer takes as many tenths of a millisecond as its place."""
    text = f'[\n  {{ "count" : {given.get("iterations", 10)} }}\n'
    for n, (name, _) in enumerate(layers(version, engine), 1):
        median = f', "medianMs" : {n / 10:.6g}' if version >= (8, 4) else ""
        mean = f'"timeMs" : {n}, "averageMs" : {n / 10 + 0.01:.6g}{median}'
        text += f', {{ "name" : "{name}", {mean}, "percentage" : 5 }}\n'
    return text + "]\n"
