"""Shared fixtures: a tiny classifier with images, and the command line as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgec.compiler import delivery
from edgec.compiler.latency.shapes import shapes
from edgec.compiler.latency.table import Timed
from PIL import Image

CLASSES = 4


@pytest.fixture(scope="session")
def edgec():
    """Run the command line as a process: edgec("compile", …) -> CompletedProcess with text output."""

    def run(*args, cwd=None, env=None, timeout=300):
        command = [sys.executable, "-m", "edgec", *map(str, args)]
        full = {**os.environ, "COLUMNS": "100", **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=full, timeout=timeout)

    return run


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the tests' caches away from the user's."""
    old = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = old


@pytest.fixture
def by_shape(monkeypatch):
    """Stand in for the stop-watch of layers: a node takes what it reads times what it writes."""

    def timed(models, feed, axes, **_):
        found = []
        for model in models:
            rows = [(s.family, *s.amounts({}), 1e-3 * np.prod(s.amounts({})), 1) for s in shapes(model, feed, axes)]
            found.append(Timed(rows, sum(row[3] for row in rows)))
        return found

    monkeypatch.setattr(delivery, "time_networks", timed)


def classifier(seed: int = 0) -> onnx.ModelProto:
    """Conv-BN-ReLU, Conv-BN, Add, ReLU, pool, Gemm on 3x16x16, dynamic batch, BatchNormalization unfolded."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[N, 3, 16, 16] image) => (float[N, 4] logits) {
      c1 = Conv <pads = [1, 1, 1, 1]> (image, w1)
      n1 = BatchNormalization (c1, s1, b1, m1, v1)
      r1 = Relu (n1)
      c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
      n2 = BatchNormalization (c2, s2, b2, m2, v2)
      a = Add (n2, r1)
      r2 = Relu (a)
      p = GlobalAveragePool (r2)
      f = Flatten (p)
      logits = Gemm <transB = 1> (f, w3, b3)
    }"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)

    def add(name, array):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))

    add("w1", rng.normal(size=(16, 3, 3, 3)) * 0.3)
    add("w2", rng.normal(size=(16, 16, 3, 3)) * 0.1)
    add("w3", rng.normal(size=(CLASSES, 16)))
    add("b3", rng.normal(size=CLASSES))
    for i in "12":
        add("s" + i, rng.uniform(0.5, 1.5, 16))
        add("b" + i, rng.normal(size=16) * 0.1)
        add("m" + i, rng.normal(size=16) * 0.1)
        add("v" + i, rng.uniform(0.5, 1.5, 16))
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with model.onnx and images/<class>/NN.png, 80 of them."""
    folder = tmp_path_factory.mktemp("tiny")
    onnx.save(classifier(), folder / "model.onnx")
    (folder / "model.preprocess.yaml").write_text("size: [16, 16]\nmean: [0.5, 0.5, 0.5]\nstd: [0.25, 0.25, 0.25]\n")
    rng = np.random.default_rng(1)
    for label in range(CLASSES):
        place = folder / "images" / f"class{label}"
        place.mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(place / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def bundle(tiny, tmp_path_factory, edgec) -> Path:
    """The tiny classifier compiled to INT8 as asked, through the command line."""
    out = tmp_path_factory.mktemp("bundles") / "tiny.edgec"
    done = edgec(
        "compile", tiny / "model.onnx", "-o", out, "--calib", tiny / "images", "--precision", "int8", "--threads", 1
    )
    assert done.returncode == 0, done.stderr
    return out


def document(done: subprocess.CompletedProcess) -> dict:
    """Return the one JSON document on stdout."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
