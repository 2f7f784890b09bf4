"""Reading and writing ONNX files: every wrong file is a ModelError, every right one comes back unchanged."""

from __future__ import annotations

import io
import logging
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from edgec.compiler import external_data, model_checks
from edgec.compiler import model as model_io
from edgec.compiler.errors import ModelError, OutputError
from edgec.compiler.types import InputSpec
from onnx import TensorProto, numpy_helper, parser

SMALL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> { a = Add(x, w) y = Relu(a) }
"""

RICH = """
<ir_version: 10, opset_import: ["": 18, "loc": 1, "com.microsoft": 1]>
g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
    a = Add(x, w)
    b = loc.Triple(a)
    d = If(c) <then_branch = t () => (float[N, 4] z) { z = Relu(b) },
               else_branch = e () => (float[N, 4] q) <float[1] s = {2}> { q = Mul(b, s) }>
    y = com.microsoft.Gelu(d)
}
<domain: "loc", opset_import: ["": 18]>
Triple (a) => (b) { three = Constant<value = float[1] {3}>() b = Mul(a, three) }
"""


def proto(text: str = SMALL) -> onnx.ModelProto:
    return parser.parse_model(text)


def put(folder: Path, content: onnx.ModelProto | bytes | str = SMALL, name: str = "m.onnx") -> Path:
    """Write a model given as text, as a message, or as raw bytes."""
    message = proto(content) if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(message if isinstance(message, bytes) else message.SerializeToString())
    return path


def external(folder: Path, location: str = "w.bin", offset: object = 0, length: object = 16) -> Path:
    """Write SMALL with its weight outside the file, where `location`, `offset` and `length` say."""
    message = proto()
    tensor = message.graph.initializer[0]
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = "w", TensorProto.FLOAT, TensorProto.EXTERNAL
    tensor.dims.append(4)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return put(folder, message)


def run(source: bytes | Path, **feeds: np.ndarray) -> list[np.ndarray]:
    """Run with ONNX Runtime, its optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def refusal(path: Path) -> str:
    """Load what must not load; return the message, after checking that it says what, where and how to fix."""
    with pytest.raises(ModelError) as caught:
        model_io.load(path)
    error, text = caught.value, str(caught.value)
    assert error.what and error.fix and error.where == str(path) and path.name in text
    assert not any(word in text for word in ("Traceback", "SerdeError", "Exception", "Decode"))
    return text


@pytest.fixture(autouse=True)
def no_warnings_on_the_way(caplog):
    """A wrong file is one message: nothing else is logged about it."""
    yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


# ------------------------------------------------------------------------------------------- not ONNX at all


def torch_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"hello\n", "text"),
        (b"<!DOCTYPE html><html>404</html>", "download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (torch_zip(), "torch.onnx.export"),
        (pickle.dumps({"w": 1}, protocol=2), "torch.onnx.export"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "JPEG"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(40), "TensorFlow Lite"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "Keras"),
        (b"\x1f\x8b\x08" + bytes(40), "gunzip"),
        (b"ptrt" + bytes(40), "TensorRT"),
        (b'\x40\x00\x00\x00\x00\x00\x00\x00{"w":{}}', "safetensors"),
        (bytes(range(256)), "no ONNX file"),
        (b"\x08\x01\x12\x03abc", "cut short"),
    ],
)
def test_other_files_are_told_apart(tmp_path, content, words):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert words in refusal(path)


def test_missing_file_names_its_neighbours(tmp_path):
    put(tmp_path, name="model_v2.onnx")
    text = refusal(tmp_path / "model.onnx")
    assert "no such file" in text and "model_v2.onnx" in text


def test_missing_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere" / "m.onnx")


def test_folder(tmp_path):
    assert "is a folder" in refusal(tmp_path)


def test_endless_file():
    assert "no regular file" in refusal(Path("/dev/zero"))


def test_name_that_is_too_long(tmp_path):
    assert "cannot be read" in refusal(tmp_path / ("n" * 5000 + ".onnx"))


def test_file_over_two_gigabytes(tmp_path):
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: takes no space
    assert "external data" in refusal(path)


# ------------------------------------------------------------------------------------------- damaged


def raw_weight(message: onnx.ModelProto, data: bytes) -> None:
    message.graph.initializer[0].ClearField("float_data")
    message.graph.initializer[0].raw_data = data


def sparse_weight(message: onnx.ModelProto) -> None:
    weight = message.graph.initializer.pop()
    message.graph.sparse_initializer.add().values.CopyFrom(weight)


Change = Callable[[onnx.ModelProto], object]
FAULTS: dict[str, tuple[Change, str]] = {
    "no graph": (lambda m: m.ClearField("graph"), "cut short"),
    "no opset": (lambda m: m.ClearField("opset_import"), "no operator set"),
    "no IR version": (lambda m: m.ClearField("ir_version"), "IR version 0"),
    "IR version too new": (lambda m: setattr(m, "ir_version", 99), "IR version 99"),
    "opset too new": (lambda m: setattr(m.opset_import[0], "version", 99), "uses opset 99"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "no outputs"),
    "output of nothing": (lambda m: setattr(m.graph.output[0], "name", "zz"), "'zz'"),
    "input of nothing": (lambda m: m.graph.node[0].input.__setitem__(0, "zz"), "'zz' of Add node"),
    "two initializers of a name": (
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
        "'w' more than once",
    ),
    "two inputs of a name": (lambda m: m.graph.input.append(m.graph.input[0]), "'x' more than once"),
    "two nodes make a value": (lambda m: m.graph.node.append(m.graph.node[0]), "'a' more than once"),
    "a cycle": (lambda m: m.graph.node[0].input.__setitem__(0, "y"), "cycle"),
    "too few raw bytes": (lambda m: raw_weight(m, bytes(15)), "15 bytes where 16 are due"),
    "too many raw bytes": (lambda m: raw_weight(m, bytes(17)), "17 bytes where 16 are due"),
    "too few values": (lambda m: m.graph.initializer[0].float_data.pop(), "3 values where 4 are due"),
    "negative dimension": (lambda m: m.graph.initializer[0].dims.__setitem__(0, -4), "negative"),
    "no element type": (lambda m: m.graph.initializer[0].ClearField("data_type"), "element type"),
    "sparse weights": (sparse_weight, "sparse"),
    "attribute without a type": (lambda m: m.graph.node[0].attribute.add(name="k"), "'k' of Add node"),
}


@pytest.mark.parametrize("change, words", FAULTS.values(), ids=FAULTS)
def test_damage_is_named(tmp_path, change, words):
    message = proto()
    change(message)
    assert words in refusal(put(tmp_path, message))


def test_text_that_is_no_utf8(tmp_path):
    data = proto().SerializeToString().replace(b"Relu", b"R\xfflu")
    assert "op_type" in refusal(put(tmp_path, data))


def test_inner_graph_may_not_hand_back_an_outer_value(tmp_path):
    message = proto(RICH)
    message.graph.node[2].attribute[0].g.output[0].name = "b"
    assert "'b'" in refusal(put(tmp_path, message))


@pytest.mark.parametrize("text", [SMALL, RICH], ids=["small", "rich"])
def test_cut_anywhere_is_caught(tmp_path, text):
    """No prefix of these files is a model, whatever the protobuf parser makes of it."""
    data = proto(text).SerializeToString()
    for length in range(len(data)):
        refusal(put(tmp_path, data[:length]))


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_random_damage_never_escapes(tmp_path, kind):
    """200 random cuts, 200 random bytes: a model or a ModelError, and in a model everything can be asked."""
    rng = random.Random(kind)
    data = proto(RICH).SerializeToString()
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(200):
        damaged = bytearray(data)
        if kind == "cut":
            start = rng.randrange(len(data))
            del damaged[start : start + rng.randrange(1, 9)]
        else:
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            loaded = model_io.load(put(tmp_path, bytes(damaged)))
        except ModelError as error:
            outcomes["refused"] += 1
            assert error.fix
        else:
            outcomes["loaded"] += 1
            model_io.fingerprint(model_io.copy(loaded))
    assert outcomes["refused"] > 50, outcomes
    assert kind == "cut" or outcomes["loaded"] > 5, outcomes


# ------------------------------------------------------------------------------------------- operators, versions


def chain(ops: str, imports: str = '"": 17') -> str:
    return f"<ir_version: 8, opset_import: [{imports}]> g (float[1] x) => (float[1] y) {{ {ops} }}"


@pytest.mark.parametrize(
    "text, words",
    [
        (chain("y = Relo(x)"), ["Relo", "nearest: Relu"]),
        (chain("a = Relo(x) b = Qwxyz(a) y = Tanhh(b)"), ["Relo", "Qwxyz", "Tanhh"]),
        (chain("y = Gelu(x)", '"": 13'), ["Gelu", "not in version 13"]),
        (chain("y = Upsample<scales = [1.0]>(x)", '"": 10'), ["Upsample", "removed in opset 10"]),
        (chain("y = acme.Relu(x)", '"": 17, "acme": 1'), ["acme::Relu", "'acme'"]),
        (chain("y = ai.onnx.ml.Scaler(x)"), ["ai.onnx.ml::Scaler", "not import"]),
        (chain("y = com.microsoft.Geluu(x)", '"": 17, "com.microsoft": 1'), ["Geluu", "Gelu"]),
        (chain("y = Relu(x)", '"": 3'), ["Relu", "9 to"]),
    ],
)
def test_unknown_operators_are_all_named(tmp_path, text, words):
    message = refusal(put(tmp_path, text))
    assert all(word in message for word in words), message


def test_unknown_operator_in_an_inner_graph_and_in_a_function(tmp_path):
    message = proto(RICH)
    message.graph.node[2].attribute[0].g.node[0].op_type = "Relo"
    message.functions[0].node[1].op_type = "Mull"
    text = refusal(put(tmp_path, message))
    assert "Relo" in text and "Mull" in text


@pytest.mark.parametrize("opset", [7, 8, *range(9, model_checks.newest_opset() + 1)])
def test_opsets_load(tmp_path, opset):
    loaded = model_io.load(put(tmp_path, chain("y = Relu(x)", f'"": {opset}')))
    assert loaded.opset_imports[""] == opset
    (y,) = run(model_io.serialize(loaded), x=np.float32([-1]))
    assert y == 0


def test_newest_opset_is_the_newest(tmp_path):
    newest = model_checks.newest_opset()
    assert 21 <= newest <= onnx.defs.onnx_opset_version()
    assert f"newest for the installed onnxruntime is {newest}" in refusal(
        put(tmp_path, chain("y = Relu(x)", f'"": {newest + 1}'))
    )


@pytest.mark.parametrize(
    "text",
    [
        chain("y = ai.onnx.Relu(x)", '"ai.onnx": 17'),
        chain("y = com.microsoft.Gelu(x)"),
        chain("y = ai.onnx.ml.Scaler<offset = [0.0], scale = [1.0]>(x)", '"": 17, "ai.onnx.ml": 3'),
        chain("y = Relu(x)", '"": 17, "acme": 3'),
        chain("y = Relu(a) a = Neg(x)"),
        chain("y = Relu(x)", '"": 6'),
    ],
    ids=["ai.onnx", "no import of com.microsoft", "ai.onnx.ml", "unused import", "unsorted", "opset 6"],
)
def test_lenient_where_onnxruntime_is(tmp_path, text):
    path = put(tmp_path, text)
    x = np.float32([0.5])
    expected = run(path.read_bytes(), x=x)
    np.testing.assert_array_equal(run(model_io.serialize(model_io.load(path)), x=x), expected)


def test_functions_and_inner_graphs_come_through(tmp_path):
    path = put(tmp_path, RICH)
    feeds = {"x": np.float32([[-2, -1, 1, 2]]), "c": np.array(False)}
    expected = run(path.read_bytes(), **feeds)
    (saved,) = model_io.save(model_io.load(path), tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(saved, **feeds), expected)


def test_weights_listed_as_inputs_are_constants_before_ir_version_4(tmp_path):
    text = '<ir_version: {}, opset_import: ["": 8]> g (float[1] x, float[1] w) => (float[1] y) {{ y = Add(x, w) }}'
    specs = {}
    for version in (3, 4):
        message = proto(text.format(version))
        message.graph.initializer.append(numpy_helper.from_array(np.float32([2]), "w"))
        loaded = model_io.load(put(tmp_path, message))
        assert [spec.name for spec in model_io.input_specs(loaded)] == ["x"]
        specs[version] = [value.name for value in loaded.graph.inputs]
    assert specs == {3: ["x"], 4: ["x", "w"]}


# ------------------------------------------------------------------------------------------- external data


def test_external_data_stays_outside_until_asked_for(tmp_path):
    path = external(tmp_path, offset=4, length=16)
    (tmp_path / "w.bin").write_bytes(np.float32([0, 1, 2, 3, 4]).tobytes())
    weight = model_io.load(path).graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor) and weight.raw is None
    np.testing.assert_array_equal(weight.numpy(), [1, 2, 3, 4])


def test_external_data_is_found_from_any_working_folder(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    external(tmp_path / "models")
    (tmp_path / "models" / "w.bin").write_bytes(bytes(16))
    monkeypatch.chdir(tmp_path)
    loaded = model_io.load(Path("models/m.onnx"))
    monkeypatch.chdir("/")
    assert len(model_io.fingerprint(loaded)) == 64


@pytest.mark.parametrize("location", ["/etc/hostname", "../w.bin", "sub/../../w.bin", "link.bin", "folder/w.bin"])
def test_external_data_outside_the_folder(tmp_path, location):
    inner, outside = tmp_path / "inner", tmp_path / "outside"
    for folder in (inner, inner / "sub", outside):
        folder.mkdir()
    for path in (tmp_path / "w.bin", outside / "w.bin"):
        path.write_bytes(bytes(16))
    (inner / "link.bin").symlink_to(tmp_path / "w.bin")
    (inner / "folder").symlink_to(outside)
    text = refusal(external(inner, location))
    assert "outside the model's folder" in text and location in text


def test_external_data_outside_is_said_even_if_missing(tmp_path):
    assert "outside" in refusal(external(tmp_path, "../nowhere/w.bin"))


def test_external_data_that_vanishes_later_is_not_blamed_on_the_output(tmp_path, monkeypatch):
    monkeypatch.setattr(model_io, "INLINE_LIMIT", 0)
    monkeypatch.setattr(external_data, "INLINE_BYTES", 0)
    (tmp_path / "w.bin").write_bytes(bytes(16))
    loaded = model_io.load(external(tmp_path))
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="no longer be read"):
        model_io.save(loaded, tmp_path / "out" / "m.onnx")
    assert not (tmp_path / "out").exists()


def test_links_inside_the_folder_are_fine(tmp_path):
    (tmp_path / "blob").write_bytes(bytes(16))
    (tmp_path / "w.bin").symlink_to("blob")
    os.link(tmp_path / "blob", tmp_path / "hard.bin")
    model_io.load(external(tmp_path))
    model_io.fingerprint(model_io.load(external(tmp_path, "hard.bin")))


def test_download_cache_of_links(tmp_path):
    """Model and data are both links into one folder of blobs, as download caches lay them out."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    external(blobs)
    (blobs / "abc").write_bytes(bytes(16))
    (snapshot / "m.onnx").symlink_to(blobs / "m.onnx")
    (snapshot / "w.bin").symlink_to(blobs / "abc")
    model_io.fingerprint(model_io.load(snapshot / "m.onnx"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"location": "gone.bin"}, "no such file"),
        ({"location": ""}, "no such file"),
        ({"location": "nul\0.bin"}, "no such file"),
        ({"location": "n" * 5000}, "no such file"),
        ({"offset": 4}, "only 16 bytes"),
        ({"offset": -4}, "offset -4"),
        ({"offset": "many"}, "no number"),
        ({"length": 12}, "needs 16 bytes"),
        ({"length": 20}, "needs 16 bytes"),
    ],
)
def test_external_data_that_does_not_fit(tmp_path, change, words):
    (tmp_path / "w.bin").write_bytes(bytes(16))
    text = refusal(external(tmp_path, **change))
    assert words in text and "initializer 'w'" in text


def test_external_data_cut_short(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(15))
    text = refusal(external(tmp_path, length=None, offset=None))
    assert "only 15 bytes" in text and "cut short" in text


def test_external_attributes_are_brought_in(tmp_path):
    message = proto(chain("c = Constant<value = float[1] {5}>() y = Add(x, c)"))
    tensor = message.graph.node[0].attribute[0].t
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="c.bin")
    (tmp_path / "c.bin").write_bytes(np.float32([5]).tobytes())
    (y,) = run(model_io.serialize(model_io.load(put(tmp_path, message))), x=np.float32([1]))
    assert y == 6


# ------------------------------------------------------------------------------------------- saving


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> Path:
    """A model with weights outside (one tensor of each kind that packs differently), and limits set low."""
    monkeypatch.setattr(model_io, "EXTERNAL_LIMIT", 1000)
    monkeypatch.setattr(external_data, "_CHUNK", 1000)  # several chunks a tensor
    rng = np.random.default_rng(0)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    for name, array in {
        "f32": rng.standard_normal((40, 30)).astype(np.float32),
        "f16": rng.standard_normal(700).astype(np.float16),
        "i64": rng.integers(-9, 9, (3, 300)),
        "scale": np.float32(0.5),
        "none": np.zeros((0, 4), np.float32),
    }.items():
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    packed = ir.Tensor(rng.integers(-8, 8, 2501).astype(ir.DataType.INT4.numpy()), name="i4")
    graph.register_initializer(ir.Value(name="i4", const_value=packed))
    scale = graph.initializers["scale"]
    for value in list(graph.initializers.values()):
        node = ir.node("DequantizeLinear", [value, scale]) if value.name == "i4" else ir.node("Identity", [value])
        node.outputs[0].name = f"{value.name}_out"
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.onnx"
    ir.save(ir.Model(graph, ir_version=10), path, external_data="m.bin", size_threshold_bytes=0)
    return path


def weights(path: Path) -> dict[str, bytes]:
    return {v.name: v.const_value.numpy().tobytes() for v in ir.load(path).graph.initializers.values()}


def test_external_weights_are_streamed_to_a_new_file(tmp_path, mixed):
    loaded = model_io.load(mixed)
    written = model_io.save(loaded, tmp_path / "out" / "model.onnx")
    assert [path.name for path in written] == ["model.onnx", "model.onnx.data"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert weights(written[0]) == weights(mixed) and len(weights(mixed)) == 6
    assert model_io.fingerprint(model_io.load(written[0])) == model_io.fingerprint(loaded)
    assert all(
        value.const_value.raw is None  # never mapped, and still where it was
        for value in loaded.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    )
    run(written[0])


def test_new_weights_go_out_beside_the_old(tmp_path, mixed):
    loaded = model_io.load(mixed)
    doubled = loaded.graph.initializers["f32"].const_value.numpy() * 2
    loaded.graph.initializers["f32"].const_value = ir.tensor(doubled, name="f32")
    path, data = model_io.save(loaded, tmp_path / "out.onnx")
    assert weights(path)["f32"] == doubled.tobytes() and weights(path)["i4"] == weights(mixed)["i4"]
    tensors = [v.const_value for v in ir.load(path).graph.initializers.values()]
    outside = {t.name: t for t in tensors if isinstance(t, ir.ExternalTensor)}
    assert set(outside) == {"f32", "f16", "i64", "i4"}  # small ones stay in the file
    assert all(t.offset % external_data.ALIGNMENT == 0 for t in outside.values())
    assert data.stat().st_size == max(t.offset + t.nbytes for t in outside.values())


def test_few_external_weights_are_brought_in(tmp_path, mixed, monkeypatch):
    monkeypatch.setattr(model_io, "EXTERNAL_LIMIT", 10**6)
    (path,) = model_io.save(model_io.load(mixed), tmp_path / "out.onnx")
    assert weights(path) == weights(mixed)
    assert model_io.size_bytes(path) == path.stat().st_size


def test_many_weights_go_out(tmp_path, monkeypatch):
    monkeypatch.setattr(model_io, "INLINE_LIMIT", 10)
    monkeypatch.setattr(external_data, "INLINE_BYTES", 10)
    loaded = model_io.load(put(tmp_path, RICH))
    path, data = model_io.save(loaded, tmp_path / "out.onnx")
    assert data.stat().st_size == 16 and model_io.size_bytes(path) == path.stat().st_size + 16
    feeds = {"x": np.float32([[-2, -1, 1, 2]]), "c": np.array(True)}
    np.testing.assert_array_equal(run(path, **feeds), run(put(tmp_path, RICH), **feeds))


def test_save_leaves_the_model_alone(tmp_path, mixed):
    loaded = model_io.load(mixed)
    tensors = [value.const_value for value in loaded.graph.initializers.values()]
    model_io.save(loaded, tmp_path / "out.onnx")
    model_io.serialize(loaded)
    assert loaded.opset_imports == {"": 21}
    assert all(v.const_value is t for v, t in zip(loaded.graph.initializers.values(), tensors, strict=True))


def test_save_over_its_own_weights_is_refused(mixed):
    path, data = model_io.save(model_io.load(mixed), mixed.parent / "copy.onnx")
    before = data.read_bytes()
    with pytest.raises(OutputError, match="read from there"):
        model_io.save(model_io.load(path), path)
    assert data.read_bytes() == before


def test_save_over_its_own_file_works_without_external_data(tmp_path):
    path = put(tmp_path)
    before = model_io.fingerprint(model_io.load(path))
    model_io.save(model_io.load(path), path)
    assert model_io.fingerprint(model_io.load(path)) == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_broken_off_save_leaves_nothing(tmp_path, mixed, monkeypatch, fault):
    def breaks(plan, file):
        file.write(b"half")
        raise fault(28, "No space left on device")

    monkeypatch.setattr(external_data, "write", breaks)
    with pytest.raises(OutputError if fault is OSError else fault) as caught:
        model_io.save(model_io.load(mixed), tmp_path / "out" / "m.onnx")
    assert fault is KeyboardInterrupt or "the disk is full" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "text, version",
    [
        (chain("y = Relu(x)", '"": 8'), 4),
        (chain("y = Relu(x)", '"": 11'), 6),
        (chain("y = Relu(x)", '"": 17, "acme": 9'), 8),
        (chain("y = com.microsoft.Gelu(x)", '"": 11, "com.microsoft": 1'), 6),
        (chain("y = Relu(x)", '"": 21'), 10),
        (RICH.replace('"": 18', '"": 13'), 8),  # functions came with 8
    ],
)
def test_lowest_versions_are_written(tmp_path, text, version):
    message = proto(text)
    message.ir_version = onnx.IR_VERSION  # newer than onnxruntime may take
    (path,) = model_io.save(model_io.load(put(tmp_path, message)), tmp_path / "out.onnx")
    saved = onnx.load(path)
    assert saved.ir_version == version
    used = {node.domain for node in saved.graph.node}
    assert {entry.domain for entry in saved.opset_import} == used | {""}
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_new_element_types_raise_the_ir_version(tmp_path):
    message = proto(chain("y = Relu(x)", '"": 13'))
    message.graph.initializer.append(onnx.helper.make_tensor("q", TensorProto.INT4, [2], [1, 2]))
    assert model_io.load(put(tmp_path, message)).ir_version == 8
    (path,) = model_io.save(model_io.load(put(tmp_path, message)), tmp_path / "out.onnx")
    assert onnx.load(path).ir_version == 10


@pytest.mark.parametrize("limit", [10**6, 0])
def test_session_source(tmp_path, mixed, monkeypatch, limit):
    monkeypatch.setattr(model_io, "BYTES_LIMIT", limit)
    loaded = model_io.load(mixed)
    sources = [model_io.session_source(loaded, tmp_path) for _ in range(2)]
    assert all(isinstance(source, Path if limit == 0 else bytes) for source in sources)
    assert limit or sources[0] != sources[1]
    expected = [v.const_value.numpy() for v in ir.load(mixed).graph.initializers.values()][:3]
    for found, wanted in zip(run(sources[0])[:3], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


# ------------------------------------------------------------------------------------------- fingerprint, copy


def test_fingerprint_is_of_content_not_of_place(tmp_path):
    (tmp_path / "a").mkdir()
    inside = proto()
    raw_weight(inside, np.float32([1, 2, 3, 4]).tobytes())
    outside = external(tmp_path, offset=8)
    (tmp_path / "w.bin").write_bytes(bytes(8) + np.float32([1, 2, 3, 4]).tobytes())
    paths = [outside, put(tmp_path, name="other.onnx"), put(tmp_path / "a", inside)]
    assert len({model_io.fingerprint(model_io.load(path)) for path in paths}) == 1


def test_fingerprint_is_the_same_in_another_process(tmp_path):
    path = put(tmp_path, RICH)
    code = "import sys; from edgec.compiler import model; print(model.fingerprint(model.load(sys.argv[1])))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code, str(path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
    assert found == model_io.fingerprint(model_io.load(path))


def one_bit(message: onnx.ModelProto) -> None:
    data = bytearray(np.float32([1, 2, 3, 4]).tobytes())
    data[5] ^= 1
    raw_weight(message, bytes(data))


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        lambda m: setattr(m.graph.node[1], "op_type", "Neg"),
        lambda m: setattr(m.opset_import[0], "version", 16),
        lambda m: raw_weight(m, np.float32([1, 2, 4, 3]).tobytes()),
    ],
)
def test_fingerprint_sees_every_change(tmp_path, change):
    before = model_io.fingerprint(model_io.load(put(tmp_path)))
    message = proto()
    change(message)
    assert model_io.fingerprint(model_io.load(put(tmp_path, message))) != before


def test_copy_is_independent_down_to_the_types(tmp_path):
    original = model_io.load(put(tmp_path, RICH))
    before = model_io.fingerprint(original)
    twin = model_io.copy(original)
    assert model_io.fingerprint(twin) == before
    inner = twin.graph.node(2).attributes["else_branch"].as_graph()
    function = next(iter(twin.functions.values()))
    for value in (twin.graph.inputs[0], twin.graph.node(0).outputs[0], inner.node(0).outputs[0]):
        value.dtype = ir.DataType.FLOAT16
        value.shape = ir.Shape([1])
    for graph in (twin.graph, inner, function):
        graph[0].outputs[0].name += "_renamed"
        graph[0].attributes["extra"] = ir.AttrInt64("extra", 1)
    twin.graph.initializers["w"].const_value = ir.tensor(np.float32([0, 0, 0, 0]), name="w")
    twin.opset_imports[""] = 19
    assert model_io.fingerprint(original) == before != model_io.fingerprint(twin)


def test_copy_shares_the_weights(tmp_path):
    original = model_io.load(put(tmp_path))
    weight = original.graph.initializers["w"].const_value
    assert model_io.copy(original).graph.initializers["w"].const_value is weight


def test_sizes(tmp_path, mixed):
    assert model_io.size_bytes(mixed) == mixed.stat().st_size + (mixed.parent / "m.bin").stat().st_size
    expected = 40 * 30 * 4 + 700 * 2 + 900 * 8 + 4 + 1251
    assert model_io.weights_bytes(model_io.load(mixed)) == expected
    assert model_io.weights_bytes(model_io.load(put(tmp_path, RICH))) == 16 + 4 + 4  # two weights, a Constant


# ------------------------------------------------------------------------------------------- inputs


def test_input_specs_are_of_real_inputs(tmp_path):
    text = '<ir_version: 8, opset_import: ["": 17]> g (float16[N, 3, H, 8] x, int64 k) => (int64 y) { y = Abs(k) }'
    loaded = model_io.load(put(tmp_path, text))
    expected = (InputSpec("x", "float16", (None, 3, None, 8)), InputSpec("k", "int64", ()))
    assert model_io.input_specs(loaded) == expected
    assert model_io.output_names(loaded) == ("y",)


@pytest.mark.parametrize("kind, words", [("seq(float[1])", "no tensor"), ("float[]", "no shape")])
def test_inputs_that_cannot_be_fed(tmp_path, kind, words):
    message = proto(chain("y = Relu(x)").replace("float[1] x", f"{kind} x"))
    if kind == "float[]":
        message.graph.input[0].type.tensor_type.ClearField("shape")
    loaded = model_io.load(put(tmp_path, message))
    with pytest.raises(ModelError, match=words) as caught:
        model_io.input_specs(loaded)
    assert "'x'" in str(caught.value) and caught.value.fix


def test_sample_inputs():
    specs = (
        InputSpec("image", "float32", (None, None, None, 20)),
        InputSpec("pixels", "uint8", (1, 9, 9, 3)),
        InputSpec("tokens", "int64", (None, None)),
        InputSpec("flag", "bool", ()),
        InputSpec("half", "bfloat16", (2, 0)),
        InputSpec("text", "object", (2,)),
    )
    feeds = model_io.sample_inputs(specs, seed=7, batch=2)
    assert {name: array.shape for name, array in feeds.items()} == {
        "image": (2, 3, 64, 20),
        "pixels": (1, 9, 9, 3),
        "tokens": (2, 16),
        "flag": (),
        "half": (2, 0),
        "text": (2,),
    }
    assert [feeds[spec.name].dtype.name for spec in specs] == [spec.dtype for spec in specs]
    assert abs(feeds["image"].std() - 1) < 0.05 and feeds["pixels"].max() > 200
    assert set(np.unique(feeds["tokens"])) <= {0, 1, 2, 3}
    again, other = (model_io.sample_inputs(specs, seed=seed, batch=2) for seed in (7, 8))
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)
    assert not np.array_equal(feeds["image"], other["image"])
