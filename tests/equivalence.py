"""Do two models compute the same? ONNX Runtime decides, with its optimisations off on both sides.

At higher levels it folds BatchNormalization and constants itself: a fold would be compared with a fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
from edgec.compiler import model as model_io

Feed = Mapping[str, np.ndarray]

#: What a dynamic dimension becomes: 2 for the first, so that samples can be mixed up, and 8 for others.
BATCH, LENGTH = 2, 8


def assert_equivalent(
    before: ir.Model | bytes,
    after: ir.Model | bytes,
    *,
    rtol: float,
    seeds: Sequence[int] = (0, 1),
    inputs: Feed | Sequence[Feed] | None = None,
) -> None:
    """Fail unless both models have the same outputs: names, types, shapes, and values.

    Values may differ by `rtol` times the largest magnitude of the reference output, or not at all where they
    are no floats; what is not finite must be so on both sides. Inputs are random, one set a seed (at least
    two), unless `inputs` gives them.
    """
    reference, changed = session(before), session(after)
    if inputs is None:
        assert len(set(seeds)) >= 2, "one sample proves too little"
        inputs = [sample(reference, seed) for seed in seeds]
    names = [value.name for value in reference.get_outputs()]
    assert [value.name for value in changed.get_outputs()] == names
    for feed in [inputs] if isinstance(inputs, Mapping) else inputs:
        for name, want, got in zip(names, reference.run(None, feed), changed.run(None, feed), strict=True):
            compare(name, want, got, rtol)


def session(model: ir.Model | bytes) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime with all optimisations off."""
    data = model if isinstance(model, bytes) else model_io.serialize(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def sample(model: onnxruntime.InferenceSession, seed: int) -> dict[str, np.ndarray]:
    """Return random inputs: standard normal floats, integers from 0 to 3, booleans."""
    rng = np.random.default_rng(seed)
    return {value.name: _array(value.type, _concrete(value.shape), rng) for value in model.get_inputs()}


def _concrete(shape: Sequence[int | str | None]) -> list[int]:
    return [d if isinstance(d, int) else LENGTH if axis else BATCH for axis, d in enumerate(shape)]


def _array(kind: str, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    assert kind.startswith("tensor("), f"give inputs of type {kind} by hand"
    name = kind.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype({"float": "float32", "double": "float64"}.get(name, name))
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 4, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def compare(name: str, want: object, got: object, rtol: float) -> None:
    """Fail unless `got` is `want` within the tolerance; lists (sequences) element by element."""
    if isinstance(want, list):
        assert isinstance(got, list) and len(got) == len(want), name
        for a, b in zip(want, got, strict=True):
            compare(name, a, b, rtol)
        return
    want, got = np.asarray(want), np.asarray(got)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), name
    if want.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, err_msg=name)
        return
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
    a, b = want[finite].astype(np.float64), got[finite].astype(np.float64)
    scale, error = np.abs(a).max(initial=0.0), np.abs(b - a).max(initial=0.0)
    assert error <= rtol * scale, f"{name}: differs by {error:.3g}, its largest magnitude is {scale:.3g}"
