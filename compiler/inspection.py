"""inspect(): what a file holds. A bundle or report.json gives its Report; an ONNX file gives an Inspection."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from .errors import DataError
from .types import Inspection, Report


def inspect(path: str | Path) -> Report | Inspection:
    """Return the report of a bundle or of a report.json, or the inspection of an ONNX file.

    Raises ModelError or DataError where the file is none of these.
    """
    from . import bundle

    path = Path(path)
    if path.is_dir():
        bundle.read_manifest(path)
        return _report(path / "report.json")
    return _report(path) if path.suffix == ".json" else _inspection(path)


def _report(path: Path) -> Report:
    from .report import serial

    try:
        return serial.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="compile again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not a report of edgec: {error}",
            where=str(path),
            fix="give a bundle, its report.json or an ONNX file",
        ) from error


def _inspection(path: Path) -> Inspection:
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    from . import layers
    from . import model as model_io

    model = model_io.load(path)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    parameters = sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)
    if model_io.weights_bytes(model) < 1 << 30:
        ShapeInferencePass()(model)
    described = layers.describe(model)
    macs = [layer.macs for layer in described]
    assert isinstance(model, ir.Model)
    return Inspection(
        path=str(path),
        size_bytes=model_io.size_bytes(path),
        ir_version=model.ir_version,
        opset=model.opset_imports.get("", 0),
        inputs=model_io.input_specs(model),
        outputs=tuple(model_io.output_names(model)),
        operators=dict(operators.most_common()),
        parameters=parameters,
        macs=None if any(m is None for m in macs) else sum(m for m in macs if m is not None),
        layers=described,
    )
