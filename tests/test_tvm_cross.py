"""TVM's modules for Arm processors, built here and run under qemu: they give what ONNX Runtime gives here."""

import re
import shutil
import subprocess
from collections import Counter

import emulated
import numpy as np
import pytest
import zoo
from edgec.backends.base import Lowering
from edgec.backends.ort import Session
from edgec.backends.tvm import Tvm
from edgec.compiler import devices
from edgec.compiler import model as model_io

installed = pytest.mark.skipif(Tvm().unavailable() is not None, reason='needs pip install "edgec[tvm]"')
runs = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
DIGITS = emulated.ROOT / "examples/digits/digits.onnx"

#: A step of the last Q, seen through the last layer, is about 0.5 % of the largest output: none may differ.
NO_STEP = 1e-4


def quantized(kind):
    """Return Q/DQ layers of every form: channels that no vector divides, strides, groups, depthwise, rows of 486."""
    rng = np.random.default_rng(0)
    zero = {"uint8": 3, "int8": -125}[kind]
    layers = ("w1", (16, 3, 3, 3)), ("w2", (22, 16, 3, 3)), ("w3", (22, 11, 1, 1)), ("w4", (22, 1, 3, 3))
    given = {"sx": np.array(0.03), "zx": np.array(zero + 120), "sh": np.array(0.02), "zh": np.array(zero)}
    for name, shape in (*layers, ("w5", (10, 550))):
        given[name] = rng.integers(-128, 128, shape)
        given["s" + name] = rng.uniform(0.5, 1, shape[0]) / 30 / np.sqrt(np.prod(shape[1:]))
        given["z" + name] = np.zeros(shape[0])
    kept = [f"float sx, {kind} zx, float sh, {kind} zh"]
    kept += [f"int8[{', '.join(map(str, s))}] {n}, float[{s[0]}] s{n}, int8[{s[0]}] z{n}" for n, s in layers]
    body, name = "", "x"
    attributes = ("pads = [1,1,1,1], strides = [2,2]", "pads = [1,1,1,1]", "group = 2", "pads = [1,1,1,1], group = 22")
    for i, ((w, _), said) in enumerate(zip(layers, attributes, strict=True)):
        by = "sh, zh" if i else "sx, zx"
        body += f"""
            q{i} = QuantizeLinear ({name}, {by})
            d{i} = DequantizeLinear (q{i}, {by})
            k{i} = DequantizeLinear <axis = 0> ({w}, s{w}, z{w})
            c{i} = Conv <{said}> (d{i}, k{i})
            r{i} = Relu (c{i})"""
        name = f"r{i}"
    text = f"""g (float[1,3,9,9] x) => (float[1,10] y)
        <{", ".join(kept)}, int8[10,550] w5, float[10] sw5, int8[10] zw5> {{{body}
            f = Flatten ({name})
            q = QuantizeLinear (f, sh, zh)
            d = DequantizeLinear (q, sh, zh)
            k = DequantizeLinear <axis = 0> (w5, sw5, zw5)
            y = Gemm <transB = 1> (d, k)
        }}"""
    return zoo.model(text, given)


def built(path, profile, threads=1):
    """Compile without tuning."""
    from edgec.backends.tvm import building

    library, _ = building.build(path, devices.find(profile), Lowering(tune=0, threads=threads))
    return library


def written(folder, model):
    model_io.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def errors(program, library, path, profile, feed=None):
    """Return each output's largest difference from ONNX Runtime's, relative to its largest value."""
    feed = feed or model_io.sample_inputs(model_io.input_specs(model_io.load(path)), seed=0)
    wanted = Session(path, threads=1, optimise=False).run(feed)
    given = emulated.run(program, library, emulated.CPUS[profile], feed, wanted)
    return [float(np.abs(given[n] - a.astype(np.float64)).max() / np.abs(a).max()) for n, a in wanted.items()]


def assembly(path, profile):
    """Return how often each instruction stands in a network's assembly; no linker is asked."""
    from edgec.backends.tvm import network, targets

    inputs = model_io.input_specs(model_io.load(path))
    net = network.prepared(path, inputs, targets.target_of(devices.find(profile), 1))
    (code,) = network.built(net, {}).mod.imports
    # an instruction may be told to be encoded in some way: {vex} vpdpbusd
    return Counter(re.findall(r"^\s+(?:{\w+}\s+)?([a-z]\w*)", code.inspect_source("asm"), re.M))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return emulated.runner(tmp_path_factory.mktemp("runner"))


@installed
@pytest.mark.parametrize(
    ("profile", "has", "lacks"),
    [
        ("raspberry-pi-5", "sdot", "smull"),
        ("arm64-dotprod", "sdot", "smull"),
        ("raspberry-pi-4", "smull", "sdot"),
        ("arm64-neon", "sadalp", "sdot"),
        ("x86-avx512-vnni", "vpdpbusd", "vpmaddwd"),
        ("x86-avx-vnni", "vpdpbusd", "vpmaddubsw"),
        ("x86-avx2", "vpmaddwd", "vpmaddubsw"),
    ],
)
def test_bytes_are_multiplied_by_the_processors_own_instructions(tmp_path, profile, has, lacks):
    text = """g (float[1,8,6,6] x) => (float[1,16,6,6] y)
        <float s, uint8 z, int8[16,8,3,3] w, float[16] t, int8[16] n> {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            k = DequantizeLinear <axis = 0> (w, t, n)
            y = Conv <pads = [1,1,1,1]> (d, k)
        }"""
    given = {"s": np.array(0.02), "z": np.array(128), "w": np.arange(16 * 8 * 9).reshape(16, 8, 3, 3) % 255 - 127}
    given |= {"t": np.full(16, 0.01), "n": np.zeros(16)}
    found = assembly(written(tmp_path, zoo.model(text, given)), profile)
    assert found[has] and not found[lacks]


@installed
@runs
@pytest.mark.parametrize("profile", emulated.CPUS)
def test_the_demo_model_in_floats(tmp_path, program, profile):
    path = written(tmp_path, model_io.load(DIGITS))
    assert max(errors(program, built(path, profile), path, profile)) <= 1e-4


@installed
@runs
@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("profile", emulated.CPUS)
def test_a_quantized_network(tmp_path, program, profile, kind):
    path = written(tmp_path, quantized(kind))
    library = built(path, profile)
    dot = "sdot" if emulated.CPUS[profile] == "cortex-a76" else "smull"
    assert dot in emulated.instructions(library, "aarch64")
    assert max(errors(program, library, path, profile)) <= NO_STEP


@installed
@runs
@pytest.mark.parametrize("profile", ["raspberry-pi-4", "raspberry-pi-5"])
def test_sums_of_the_largest_products_are_exact(tmp_path, program, profile):
    """Two of (-128)² are more than 16 bits hold."""
    text = """g (int8[1,12,64] x) => (float[1,12,8] y) <float s, int8 z, int8[64,8] w, float t> {
        d = DequantizeLinear (x, s, z)
        k = DequantizeLinear (w, t, z)
        y = MatMul (d, k)
    }"""
    given = {"s": np.array(1.0), "t": np.array(1.0), "z": np.array(0), "w": np.full((64, 8), -128)}
    path = written(tmp_path, zoo.model(text, given))
    feed = {"x": np.full((1, 12, 64), -128, np.int8)}
    assert errors(program, built(path, profile), path, profile, feed) == [0.0]


@installed
@runs
def test_more_threads_give_the_same(tmp_path, program):
    path = written(tmp_path, quantized("uint8"))
    assert max(errors(program, built(path, "raspberry-pi-5", threads=4), path, "raspberry-pi-5")) <= NO_STEP


@installed
@runs
def test_objects_alone_are_left_without_a_linker_and_linked_by_hand(tmp_path, program, monkeypatch):
    path = written(tmp_path, quantized("uint8"))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("tar", "gzip"):  # TVM packs with these
        (tools / name).symlink_to(shutil.which(name))
    with monkeypatch.context() as bare:
        bare.setenv("PATH", str(tools))
        archive = built(path, "raspberry-pi-5")
    assert archive.name == "model.tar" and (tmp_path / "model.tar.json").is_file()
    subprocess.run(["tar", "-xf", archive], cwd=tmp_path, check=True)
    library = tmp_path / "by_hand.so"
    subprocess.run([emulated.LINKER, "-shared", "-o", library, *tmp_path.glob("*.o")], check=True)
    assert max(errors(program, library, path, "raspberry-pi-5")) <= NO_STEP
