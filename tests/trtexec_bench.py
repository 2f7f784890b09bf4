"""A folder with a trtexec that is none, ONNX files, and an engine to come: for the tests of what trtexec does."""

import os
import struct

import fake_trtexec
import onnx
import pytest
from edgec.backends.agent import trtexec
from edgec.backends.agent.tensorrt_build import Request
from edgec.backends.agent.tensors import Tensor

VERSIONS = fake_trtexec.VERSIONS
IDS = [".".join(map(str, version)) for version in VERSIONS]
each_version = pytest.mark.parametrize("version", VERSIONS, ids=IDS)
#: Those that build weakly typed by themselves.
WEAK = VERSIONS[:4]

PLAIN = "{ a = Relu(x) b = Sigmoid(a) y = Neg(b) }"
QUANTIZED = """<float s = {0.1}, int8 z = {0}>
    { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }"""


def save(path, body=PLAIN, x="float[1, 3, 8, 8] x", y="float[1, 3, 8, 8] y", opset=13):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g ({x}) => ({y}) {body}')
    for n, node in enumerate(model.graph.node):
        node.name = f"/{node.op_type}_{n}"
    onnx.save(model, path)
    return str(path)


class Bench:
    """A folder with a trtexec of a version, ONNX files, and an engine to come."""

    def __init__(self, folder, version, **how):
        self.folder, self.version = folder, version
        self.binary = fake_trtexec.make(folder / "bin", version, **how)
        self.engine = str(folder / "engines" / "m.engine")
        os.makedirs(folder / "engines")
        self.told = []

    def request(self, precision="fp32", body=PLAIN, x="float[1, 3, 8, 8] x", y="float[1, 3, 8, 8] y", **more):
        weak = save(self.folder / "weak.onnx", body, x, y)
        strong = save(self.folder / "strong.onnx", body, x, y)
        return Request(**{**dict(weak=weak, strong=strong, precision=precision, engine=self.engine, shapes={}), **more})

    def build(self, *args, **more):
        return trtexec.build(self.request(*args, **more), lambda *one: self.told.append(one), self.binary)

    def open(self, shapes=None, seconds=2.0):
        return trtexec.open_engine(self.engine, shapes or {}, self.binary, seconds)

    def calls(self, flag):
        """Return the arguments of the runs that had a flag."""
        return [one for one in fake_trtexec.calls(self.binary) if any(a.partition("=")[0] == flag for a in one)]

    def built_with(self):
        (one,) = self.calls("--onnx")
        return {arg.partition("=")[0]: arg.partition("=")[2] for arg in one}


def image(shape=(1, 3, 8, 8), dtype="float32", code="f"):
    count = 1
    for size in shape:
        count *= size
    return Tensor(dtype, list(shape), struct.pack(f"<{count}{code}", *range(count)))
