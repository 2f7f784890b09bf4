"""The test suite inside the onnx package: whatever ONNX Runtime passes alone must pass after the exact passes too.

A case goes file -> load -> raise opset, normalise, fold BatchNormalization -> save -> ONNX Runtime, and must give the
outputs that the suite expects. Each node case runs a second time with all inputs but the first made constant, since
that is where folding has something to do.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
from edgec.compiler import model as model_io
from edgec.passes.fold_batch_norm import FoldBatchNorm
from edgec.passes.normalise import Normalise
from edgec.passes.raise_opset import RaiseOpset
from equivalence import session
from onnx.backend.test.loader import load_model_tests
from onnxruntime.capi import onnxruntime_pybind11_state as state

DATA = Path(onnx.backend.test.__file__).parent / "data"

#: What ONNX Runtime raises for models it does not know, and for inputs that its Python interface cannot take.
UNABLE = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class Case:
    name: str
    proto: onnx.ModelProto
    data: Sequence[tuple[Sequence[object], Sequence[object]]]
    rtol: float
    atol: float


def outputs_of(model: bytes, case: Case) -> list[list[object]]:
    opened = session(model)
    names = [value.name for value in opened.get_inputs()]
    return [opened.run(None, dict(zip(names, inputs, strict=False))) for inputs, _ in case.data]


def is_close(got: object, want: object, case: Case) -> bool:
    if isinstance(want, (list, tuple)):
        return isinstance(got, list) and all(is_close(g, w, case) for g, w in zip(got, want, strict=True))
    if want is None or not isinstance(got, np.ndarray):
        return got is want
    want = np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if want.dtype.kind not in "fc":
        return np.array_equal(got, want)
    return np.allclose(got, want, rtol=case.rtol, atol=case.atol, equal_nan=True)


def matches(results: list[list[object]], case: Case) -> bool:
    return all(
        len(got) == len(want) and all(is_close(g, w, case) for g, w in zip(got, want, strict=True))
        for got, (_, want) in zip(results, case.data, strict=True)
    )


def verdict(case: Case, folder: Path) -> str:
    """What becomes of a case: passed, or one of two reasons why ONNX Runtime alone says nothing, or a regression."""
    try:
        results = outputs_of(case.proto.SerializeToString(), case)
    except UNABLE:
        return "onnxruntime cannot run it"
    if not matches(results, case):
        return "onnxruntime gives other numbers"
    path = folder / "model.onnx"
    path.write_bytes(case.proto.SerializeToString())
    model = model_io.load(path)
    for step in (RaiseOpset(), Normalise(), FoldBatchNorm()):
        step(model)
        if step(model).modified:
            return f"REGRESSION: a second run of {step.name} changes something"
    model_io.save(model, path)
    try:
        return "passed" if matches(outputs_of(path.read_bytes(), case), case) else "REGRESSION: other numbers"
    except UNABLE as error:
        return f"REGRESSION: {error}"


def node_cases() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite divides by zero on purpose
        tests = load_model_tests(kind="node")
    for test in tests:
        data = [([plain(x) for x in inputs], [plain(y) for y in outputs]) for inputs, outputs in test.data_sets]
        yield Case(test.name, test.model, data, test.rtol, test.atol)


def plain(value: object) -> object:
    """Arrays instead of the suite's scalars and protobuf tensors."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def constant_cases() -> Iterator[Case]:
    return filter(None, map(with_constants, node_cases()))


def with_constants(case: Case) -> Case | None:
    """The same case with all inputs but the first made initializers; None where they are no plain tensors."""
    inputs, outputs = case.data[0]
    graph = case.proto.graph
    rest = list(zip(graph.input, inputs, strict=False))[1:]
    simple = all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for _, array in rest)
    if len(case.data) > 1 or not rest or not simple or len(graph.input) != len(inputs):
        return None
    proto = onnx.ModelProto()
    proto.CopyFrom(case.proto)
    for value, array in rest:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return Case(f"{case.name} (constants)", proto, [(inputs[:1], outputs)], case.rtol, case.atol)


def stored_cases() -> Iterator[Case]:
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for test in load_model_tests(kind=kind):
            folder = Path(test.model_dir)
            proto = onnx.load(folder / "model.onnx")
            data = [
                (tensors(found, "input", proto.graph.input), tensors(found, "output", proto.graph.output))
                for found in sorted(folder.glob("test_data_set_*"))
            ]
            yield Case(test.name, proto, data, test.rtol, test.atol)


def tensors(folder: Path, kind: str, values: Sequence[onnx.ValueInfoProto]) -> list[object]:
    files = [folder / f"{kind}_{i}.pb" for i in range(len(list(folder.glob(f"{kind}_*.pb"))))]
    return [read(file, value.type) for file, value in zip(files, values, strict=False)]


def read(file: Path, kind: onnx.TypeProto) -> object:
    if kind.HasField("sequence_type"):
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))
    if kind.HasField("optional_type"):
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(file.read_bytes()))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


def light_cases() -> Iterator[Case]:
    """Whole networks whose weights are made by ConstantOfShape; the suite feeds them a ramp."""
    for file in sorted((DATA / "light").glob("*.onnx")):
        proto = onnx.load(file)
        initializers = {tensor.name for tensor in proto.graph.initializer}
        (value,) = (value for value in proto.graph.input if value.name not in initializers)
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        ramp = (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)
        want = onnx.TensorProto.FromString(file.with_name(f"{file.stem}_output_0.pb").read_bytes())
        yield Case(file.stem, proto, [([ramp], [onnx.numpy_helper.to_array(want)])], 2e-3, 1e-7)


@pytest.mark.slow
#: Of these onnx 1.23 and onnxruntime 1.31 pass 1398, 995, 100 and 9; other versions know other operators.
@pytest.mark.parametrize(
    ("kind", "cases", "known"),
    [
        ("node", node_cases, 1200),
        ("node, constant inputs", constant_cases, 850),
        ("stored", stored_cases, 90),
        ("light", light_cases, 9),
    ],
)
def test_what_onnxruntime_passes_passes_through_edgec(kind, cases, known, tmp_path, capsys):
    verdicts = {case.name: verdict(case, tmp_path) for case in cases()}
    counts = Counter(text.split(":")[0] for text in verdicts.values())
    with capsys.disabled():
        print(f"\nONNX backend suite, {kind}: " + ", ".join(f"{n} {text}" for text, n in counts.most_common()))
    regressions = {name: text for name, text in verdicts.items() if text.startswith("REGRESSION")}
    assert not regressions
    assert counts["passed"] >= known
