"""From an ONNX file to a TVM executable, by passes over Relax:

    import -> Q/DQ in integers -> polynomials -> constants -> NHWC -> layers of our own -> legalise, fuse (TVM)
           -> a schedule for each function -> llvm

A batch that may be any is built as 1, for which there are schedules; runner.py takes more images one after another.
Everything here imports tvm, which takes half a second and 200 MB: only what builds or runs does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir import Op
from tvm.relax import transform
from tvm_ffi import structural_hash

from ...compiler.types import InputSpec
from . import spaces
from .lowering import constants, functions, importer, integers, layers
from .spaces.machine import Machine, machine_of

logger = logging.getLogger(__name__)

#: From the layouts of ONNX to those with channels last.
_LAYOUTS = {"relax.nn.conv2d": ["NHWC", "HWIO"], "relax.nn.conv2d_transpose": ["NCHW", "IOHW"]}


@dataclass(frozen=True, eq=False)
class Function:
    """One function of a network: its name there, what it computes (a PrimFunc), and how often it is called.

    `key` is the same for the same function of another network, whatever its weights. `space` is None where a schedule
    cannot be chosen.
    """

    name: str
    body: Any
    calls: int
    key: str
    space: spaces.Space | None


@dataclass(frozen=True, eq=False)
class Network:
    """A network in Relax, fused and ready for schedules: `module` is an IRModule, `target` a tvm.target.Target."""

    module: Any
    target: Any
    machine: Machine
    functions: tuple[Function, ...] = ()
    #: For each function that is called, in this order: its name, and the hash of its weights as they were, where it
    #: has some.
    calls: tuple[tuple[str, str | None], ...] = field(default=())


def prepared(path: Path, inputs: Sequence[InputSpec], target: Any, *, fixed_point: bool = False) -> Network:
    """Import an ONNX file and rewrite it for the target. ModelError where TVM's importer fails.

    `fixed_point`: quantized layers are requantized by integers alone (fixed_point.py).
    """
    machine = machine_of(target)
    module = transform.CanonicalizeBindings()(constants.folded(importer.imported(path, inputs)))
    module = integers.in_integers(module, machine, fixed_point=fixed_point)
    module = constants.folded(transform.DecomposeOpsForInference()(functions.vectorizable(module)))
    tidy = [transform.CanonicalizeBindings(), transform.DeadCodeElimination(["main"])]
    module = tvm.ir.transform.Sequential([transform.FoldConstant(), *tidy])(module)
    module = _channels_last(module)
    module = tvm.ir.transform.Sequential(tidy)(constants.folded(module))
    module, was = layers.specialised(module, machine)
    with target:
        fused = [tidy[1], relax.get_pipeline("zero"), tidy[1]]
        module = tvm.ir.transform.Sequential(fused)(module)
    calls = tuple(_calls(module, was))
    return Network(module, target, machine, tuple(_functions(module, machine, [name for name, _ in calls])), calls)


def _channels_last(module: Any) -> Any:
    """Return the module in NHWC around its convolutions; as it is where there are none, or TVM cannot do it."""
    if "R.nn.conv2d(" not in module.script(show_meta=False):
        return module
    try:
        return transform.ConvertLayout(_LAYOUTS)(module)
    except Exception as error:  # TVM raises what it likes: its pass does not know some operators' layouts
        logger.warning("layers stay in NCHW, and are slow: %s", str(error).splitlines()[:1])
        return module


def _functions(module: Any, machine: Machine, called: Sequence[str]) -> list[Function]:
    found = []
    for variable, body in module.functions_items():
        if isinstance(body, tirx.PrimFunc):
            space = spaces.space_of(s_tir.Schedule(body), machine)
            name = variable.name_hint
            found.append(Function(name, body, called.count(name), f"{structural_hash(body):x}", space))
    return found


def _calls(module: Any, was: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """Return the calls of functions as the network makes them, with the hash that their weights had."""
    found = []
    call_tir = Op.get("relax.call_tir")
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if getattr(call, "op", None) == call_tir:
                known = [layers.hashed(a) for a in map(constants.number, call.args[1]) if a is not None]
                found.append((call.args[0].name_hint, next((was[h] for h in known if h in was), None)))
    return found


def scheduled(function: Function, choice: spaces.Choice) -> Any:
    """Return the function's body with a schedule. Raises what TVM raises where the schedule is not possible."""
    assert function.space is not None
    schedule = s_tir.Schedule(function.body)
    function.space.apply(schedule, choice)
    return schedule.mod["main"].without_attr("global_symbol")


def built(network: Network, choices: Mapping[str, spaces.Choice]) -> Any:
    """Return the executable; functions that have no choice by their name take their space's first that is possible."""
    module = tvm.IRModule(dict(network.module.functions_items()))
    for function in network.functions:
        body = with_schedule(function, choices.get(function.name))
        if body is not None:
            module.update_func(network.module.get_global_var(function.name), body)
    return tvm.compile(module, target=network.target)


def with_schedule(function: Function, choice: spaces.Choice | None) -> Any:
    """Return the function's body with this choice, or the first that is possible; None where none is."""
    if function.space is None:
        return None
    for one in [choice] if choice is not None else function.space.choices():
        try:
            return scheduled(function, one)
        except Exception as error:  # TVM raises what it likes
            logger.debug("%s: %s is not possible: %s", function.name, one, str(error).splitlines()[:1])
    return None
