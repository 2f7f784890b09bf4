"""What every registered pass must keep to, on every model of the zoo.

A new pass needs a line in the registry, and one here if its constructor needs arguments.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import get_args

import onnx
import onnx_ir as ir
import pytest
import zoo
from edgec.backends import ort
from edgec.compiler import model as model_io
from edgec.compiler.types import Range, Refusal
from edgec.passes import registry
from edgec.passes.base import Pass, PassResult, Stage
from edgec.passes.placement import observed_tensors
from equivalence import assert_equivalent

#: Pass -> the arguments with which it is tried on a model.
OPTIONS: Mapping[str, Callable[[ir.Model], dict[str, object]]] = {
    "raise-opset": lambda model: {"target": 13},
    "lower-opset": lambda model: {"target": 13},
    "quantize": lambda model: {
        "ranges": {name: Range(-2.0, 2.0) for name in observed_tensors(model, ort.SUPPORTS)},
        "supports": ort.SUPPORTS,
    },
}

STAGES = get_args(Stage)


def make(name: str, model: ir.Model) -> Pass:
    return registry.load(name)(**OPTIONS.get(name, lambda model: {})(model))


def signature(model: ir.Model) -> list[tuple[object, ...]]:
    ends = [*model.graph.inputs, *model.graph.outputs]
    return [(value.name, str(value.type), str(value.shape), value.is_initializer()) for value in ends]


def raw(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.fixture(params=registry.PASSES)
def name(request):
    return request.param


@pytest.fixture(params=zoo.ZOO)
def animal(request):
    return request.param


def test_the_class_is_a_frozen_dataclass_that_says_what_it_is(name):
    cls = registry.load(name)
    assert issubclass(cls, Pass) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert cls.name == name and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert cls.stage in STAGES and isinstance(cls.exact, bool) and 0 < cls.tolerance <= 1e-3
    assert cls.__doc__ and cls.__doc__.strip()


def test_modified_is_the_truth_and_a_second_run_changes_nothing(name, animal):
    model = zoo.build(animal)
    step, before = make(name, model), raw(model)
    result = step(model)
    after = raw(model)
    assert isinstance(result, PassResult) and result.model is model
    assert result.modified == (after != before)
    assert result.rewrites >= 0 and (result.modified or not result.rewrites)
    again = make(name, model)(model)
    assert not again.modified and raw(model) == after


def test_the_result_is_valid_and_keeps_its_signature(name, animal):
    model = zoo.build(animal)
    before = signature(model)
    make(name, model)(model)
    onnx.checker.check_model(model_io.serialize(model), full_check=True)
    assert signature(model) == before


def test_an_exact_pass_keeps_the_numbers(name, animal):
    before, model = zoo.build(animal), zoo.build(animal)
    step = make(name, model)
    if not step.exact or animal in zoo.NONDETERMINISTIC:
        pytest.skip("lossy" if not step.exact else "gives other outputs at each run")
    step(model)
    assert_equivalent(before, model, rtol=step.tolerance)


def test_refusals_and_notes_are_readable(name, animal):
    model = zoo.build(animal)
    result = make(name, model)(model)
    for refusal in result.refusals:
        assert isinstance(refusal, Refusal)
        assert all(text and text == text.strip() for text in dataclasses.astuple(refusal))
    assert all(isinstance(note, str) and note for note in result.notes)


def test_the_zoo_is_valid(animal):
    onnx.checker.check_model(raw(zoo.build(animal)), full_check=True)
