"""TVM modules on a device over SSH: built here, run and measured there by the device's own TVM."""

import json

import numpy as np
import pytest
import sshd
from edgec.backends import targets
from edgec.backends.base import load
from edgec.compiler import bundle, evaluation

pytestmark = [
    pytest.mark.skipif(load("tvm").unavailable() is not None, reason='needs pip install "edgec[tvm]"'),
    pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING)),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    with sshd.running(folder) as one:
        one.environment = {"EDGEC_SSH": one.command, "TMPDIR": str(folder)}
        yield one


def test_compile_and_bench(server, tiny, tmp_path, edgec, monkeypatch):
    out = tmp_path / "out"
    done = edgec(
        "compile", tiny / "model.onnx", "-o", out, "--backend", "tvm", "--target", "ssh://device", "--tune", 0,
        "--calib", tiny / "images", "--threads", 1, "--json", env=server.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["target"] == "ssh://device" and report["result"]["provider"] == "TVM, llvm"
    assert report["original"]["median_ms"] > 0, "ONNX Runtime is there, too"
    benched = edgec("bench", out, "--target", "ssh://device", "--seconds", 0.5, "--json", env=server.environment)
    assert benched.returncode == 0, benched.stderr
    assert json.loads(benched.stdout)["measurements"][0]["median_ms"] > 0
    assert server.gone(), server.left()

    monkeypatch.setenv("EDGEC_SSH", server.command)
    monkeypatch.setenv("TMPDIR", server.environment["TMPDIR"])
    here = bundle.open_bundle(out, 1)
    there = targets.of("ssh://device")
    runner = evaluation.open_there(out, there, 1)
    spec = here.runner.inputs[0]
    shape = [d or 1 for d in spec.shape]
    feed = {spec.name: np.random.default_rng(0).normal(size=shape).astype(spec.dtype)}
    assert all(np.array_equal(value, here.run(feed)[name]) for name, value in runner.run(feed).items())
    there.close()
