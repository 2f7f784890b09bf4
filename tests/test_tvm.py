"""The TVM backend: what it refuses without TVM, and, where apache-tvm is installed, what it builds."""

from importlib.util import find_spec

import numpy as np
import onnxruntime as ort
import pytest
import zoo
from edgec.backends import base
from edgec.backends.tvm import Tvm, support
from edgec.compiler import api, devices
from edgec.compiler import model as model_io
from edgec.compiler.errors import UnavailableError, UserError

installed = pytest.mark.skipif(Tvm().unavailable() is not None, reason='needs pip install "edgec[tvm]"')
LOCAL = devices.find("local")
NET = """g (float[N,3,8,8] x) => (float[N,5] y) <float[8,3,3,3] w, float[8] b, float[5,8] v> {
    c = Conv <pads = [1,1,1,1]> (x, w, b)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, v)
}"""


def written(folder, text=NET, name="model.onnx"):
    folder.mkdir(exist_ok=True)
    model_io.save(zoo.model(text), folder / name)
    return folder / name


# ------------------------------------------------------------------------------------------- without TVM


def test_what_the_importer_lacks_is_refused_by_name(tmp_path):
    model = zoo.model("g (float[2,4] x) => (float[2,4] y) { h = Relu (x)\n y = Bernoulli (h) }")
    found = tuple(support.refusals(model))
    assert [r.why for r in found] == ["TVM's importer has no Bernoulli"] and found[0].rule == "tvm"
    path = tmp_path / "model.onnx"
    model_io.save(model, path)
    with pytest.raises(UserError, match="not installed|no Bernoulli"):
        api.compile(path, tmp_path / "out", backend="tvm", precision="fp32")
    assert not (tmp_path / "out").exists()


def test_integers_are_refused_with_what_to_do():
    schemes = base.load("tvm").schemes(LOCAL)
    assert set(schemes) == set(base.SCHEMED) and "--backend ort" in schemes["int8"]


@pytest.mark.skipif(find_spec("tvm") is not None, reason="TVM is installed here")
def test_without_tvm_it_says_how_to_get_it(tmp_path):
    with pytest.raises(UnavailableError, match="TVM is not installed") as caught:
        api.compile(written(tmp_path), tmp_path / "out", backend="tvm")
    assert "edgec[tvm]" in caught.value.fix


# ------------------------------------------------------------------------------------------- with TVM


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@installed
def test_the_table_is_that_of_the_installed_version():
    from tvm.relax.frontend.onnx import onnx_frontend

    assert set(onnx_frontend._get_convert_map()) == support.OPERATORS


@installed
def test_a_bundle_gives_what_onnx_runtime_gives_and_takes_any_batch(tmp_path, cache):
    path = written(tmp_path)
    report = api.compile(path, tmp_path / "out", backend="tvm", precision="fp32", tune=4, threads=1)
    assert report.backend == "tvm" and report.result.provider == "TVM, llvm" and report.original.provider != "TVM, llvm"
    assert (tmp_path / "out" / "model.so").is_file() and not list(tmp_path.glob("*.so"))
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    (found,) = api.open_bundle(tmp_path / "out").run({"x": x}).values()
    expected = ort.InferenceSession(path).run(None, {"x": x})[0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@installed
def test_a_second_compile_starts_from_the_records_of_the_first(tmp_path, cache):
    from edgec.backends.tvm import module, tuning

    path = written(tmp_path)
    target = module.target_of(module.host_cpu(1))
    network = module.imported(path, model_io.input_specs(model_io.load(path)), target)
    first = tuning.tune(network, 6.0, folder=tmp_path / "records")
    again = tuning.tune(network, 0.0, folder=tmp_path / "records")
    assert first.trials > 0 and again.trials == 0
    known = {task.name: task.best for task in first.tasks if task.best < float("inf")}
    assert known and {task.name: task.best for task in again.tasks if task.name in known} == pytest.approx(known)


@installed
def test_a_second_network_with_the_same_layers_has_their_records(tmp_path, cache):
    """Weights are no part of the key."""
    from edgec.backends.tvm import module, tuning

    target = module.target_of(module.host_cpu(1))
    paths = [written(tmp_path / "one"), written(tmp_path / "two")]
    other = model_io.load(paths[1])
    weight = next(v for v in other.graph.initializers.values() if v.name == "w")
    weight.const_value = model_io.ir.tensor(weight.const_value.numpy() * 2, name="w")
    model_io.save(other, paths[1])
    specs = model_io.input_specs(other)
    tuning.tune(module.imported(paths[0], specs, target), 6.0, folder=tmp_path / "records")
    again = tuning.tune(module.imported(paths[1], specs, target), 0.0, folder=tmp_path / "records")
    assert any(task.best < float("inf") for task in again.tasks)


@installed
@pytest.mark.parametrize(("option", "given"), [("prune", "latency:20%"), ("low_rank", "latency:20%")])
def test_layers_are_not_timed_here(tmp_path, option, given):
    with pytest.raises(UserError, match="ONNX Runtime's profiler only"):
        api.compile(written(tmp_path), tmp_path / "out", backend="tvm", calib=tmp_path, **{option: given})


@installed
def test_other_machines_are_refused(tmp_path):
    with pytest.raises(UnavailableError, match="this machine only"):
        api.compile(written(tmp_path), tmp_path / "out", backend="tvm", device="raspberry-pi-5", precision="fp32")
