"""One module, from an ONNX file to a library beside it: tuned, compiled, exported, and held against ONNX Runtime."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...compiler import devices
from ...compiler import model as model_io
from ...compiler.errors import ModelError, UnavailableError, UserError
from ...compiler.types import DeviceProfile, InputSpec
from ..base import Lowering, Runner
from ..ort import Session
from ..targets.rpc import RpcTarget
from . import clock, cuda, exporting, network, records, targets, tuning
from .board import Board
from .lowering import layers
from .remote import Remote
from .runner import Facts, Module, opened

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

_LAYERS = ("Conv", "Gemm", "MatMul")
_ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
#: How far a module's outputs may be off (_off): in float32, and where integers are rounded (20 dB).
_IN_FLOATS, _IN_INTEGERS = 1e-4, 0.1


def build(model: Path, profile: DeviceProfile, how: Lowering) -> tuple[Path, bool]:
    """Write the library beside the ONNX file and return it: model.so, or model.tar if only the device can link it.

    Also whether tuning was interrupted.
    """
    graph = model_io.load(model)
    inputs = model_io.input_specs(graph)
    rounds = any(node.op_type in _ROUNDING for node in graph.graph.all_nodes())
    board = how.target.board if isinstance(how.target, RpcTarget) else None
    here = board is None and devices.is_this_machine(profile)
    target = targets.target_of(profile, how.threads)
    facts: dict[str, Any] = {
        "inputs": [[spec.name, spec.dtype, spec.shape] for spec in inputs],
        "outputs": [value.name for value in graph.graph.outputs],
        "target": str(target.export()),
        "device": "cuda" if str(target.kind.name) == "cuda" else "cpu",
        "tvm": metadata.version("apache-tvm"),
        "arch": targets.cpu_of(profile).triple.partition("-")[0],
        "threads": how.threads,
    }
    interrupted = False
    try:
        if facts["device"] == "cuda":
            executable = cuda.built(model, inputs, target)
        else:
            net = network.prepared(model, inputs, target, fixed_point=how.fixed_point)
            found = _tuned(net, how, here, board)
            executable = network.built(net, found.choices)
            facts |= _told(net, found, graph)
            interrupted = found.interrupted
    except UserError:
        raise
    except Exception as error:  # TVM raises what it likes; --backend tvm is a wish that another program cannot fulfil
        logger.debug("TVM failed", exc_info=True)
        why = f"TVM cannot build it: {' '.join(str(error).strip().splitlines()[:1])}"
        raise UnavailableError(why, where="backend tvm", fix="use --backend ort") from error
    cpu = targets.cpu_of(profile)
    library = exporting.exported(executable, model, cpu.triple)
    library.with_suffix(library.suffix + ".json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if board is None and not here and profile.kind == "cpu":
        _rehearsed(model, inputs, how, rounds)
    if here or board is not None:
        module = opened(library, how.threads) if board is None else Remote(library, board, how.threads)
        _proven(model, module, how, rounds)
    return library, interrupted


def _tuned(net: network.Network, how: Lowering, here: bool, board: Board | None) -> tuning.Tuned:
    tune = functools.partial(tuning.tune, net, records.Records(net.target), progress=how.progress)
    if board is None and not here:
        return tune(None, how.tune)
    make = clock.Here(net.target, how.threads) if board is None else clock.There(net.target, how.threads, board)
    with make as watch:
        return tune(watch, how.tune)


def _told(net: network.Network, found: tuning.Tuned, graph: ir.Model) -> dict[str, Any]:
    """Return what a module is made of: each call with the ONNX node whose weights it has, each function's schedule."""
    nodes = _nodes_by_weight(graph)
    chosen = {t.function.name: t for t in found.tasks}
    functions = {}
    for name, task in chosen.items():
        best = task.best
        functions[name] = {
            "space": None if task.function.space is None else task.function.space.name,
            "schedule": None if best is None else dict(best.choice),
            "us": None if best is None else round(1e6 * best.seconds, 3),
            "calls": task.function.calls,
        }
    return {
        "schedules tried": found.trials,
        "schedules that failed": found.failed,
        "functions": functions,
        "calls": [[name, nodes.get(weight) if weight else None] for name, weight in net.calls],
    }


def _nodes_by_weight(graph: ir.Model) -> dict[str, str]:
    """Return ONNX nodes by the hash of their weights, as layers.py has them before it lays them out."""
    found = {}
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type in _LAYERS and len(node.inputs) > 1 else None
        before = None if weight is None else weight.producer()
        if before is not None and before.op_type == "DequantizeLinear":
            weight = before.inputs[0]
        if weight is None or weight.const_value is None:
            continue
        array = weight.const_value.numpy()
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif "transB" in node.attributes and node.attributes["transB"].as_int():
            array = array.T
        found[layers.hashed(array)] = node.name or node.outputs[0].name or node.op_type
    return found


def _rehearsed(model: Path, inputs: Sequence[InputSpec], how: Lowering, rounds: bool) -> None:
    """Prove a module for another processor by one for this one: the same passes. Errors as of _proven."""
    profile = devices.local_profile()
    net = network.prepared(model, inputs, targets.target_of(profile, 1), fixed_point=how.fixed_point)
    outputs = tuple(value.name or "" for value in model_io.load(model).graph.outputs)
    _proven(model, Module(network.built(net, {}), Facts(tuple(inputs), outputs, "cpu", "", ()), 1), how, rounds)


def _proven(model: Path, module: Runner, how: Lowering, rounds: bool) -> None:
    """Compare the module's outputs with ONNX Runtime's, optimisations off, and those of two images where it takes many.

    UnavailableError where they differ: in float32 by the largest difference, where integers are rounded by its energy,
    since a tie that falls the other way is a step of a Q, and grows.
    """
    session = Session(model, threads=min(how.threads, devices.usable_cores()), optimise=False)
    many = any(spec.shape[:1] == (None,) for spec in module.inputs)
    for batch in (1, 2) if many else (1,):
        feed = model_io.sample_inputs(module.inputs, how.seed, batch)
        try:
            wanted = session.run(feed)
        except ModelError:
            if batch == 1:
                raise
            return  # it declares any batch, and fails on two images itself
        try:
            found = module.run(feed)
        except ValueError as error:  # outputs without a batch
            why = f"TVM's module takes no batch: {error}"
            raise UnavailableError(why, where="backend tvm", fix="use --backend ort") from error
        for name, given in found.items():
            off, most = _off(given, wanted[name], rounds), _IN_INTEGERS if rounds else _IN_FLOATS
            if not off <= most:
                what = "a batch is not its images one by one" if batch > 1 else "it gives other numbers"
                why = (
                    f"TVM's module is not what ONNX Runtime runs: {what} ({name} is off by {off:.1e}, {most:g} allowed)"
                )
                raise UnavailableError(why, where="backend tvm", fix="use --backend ort, and report it with the model")


def _off(given: np.ndarray, wanted: np.ndarray, rounds: bool) -> float:
    """Return how far an output is off, relative to its largest magnitude, or as root mean square to that of itself."""
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return float("inf")
    if wanted.dtype.kind in "fc":
        same = ~np.isfinite(wanted) & ((given == wanted) | (np.isnan(given) & np.isnan(wanted)))
        given, wanted = np.where(same, 0, given), np.where(same, 0, wanted)
    difference = given.astype(np.float64) - wanted
    if rounds:
        return float(np.sqrt((difference**2).sum() / max(float((wanted.astype(np.float64) ** 2).sum()), 1e-30)))
    return float(np.abs(difference).max(initial=0.0)) / (float(np.abs(wanted).max(initial=0.0)) or 1.0)
