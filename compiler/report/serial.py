"""Contract types <-> JSON data, driven by the dataclasses' own type hints.

None stays null. NaN and infinities, which JSON does not have, become null; where the type asks for a float,
null reads back as NaN. Paths become strings. Fields that this version does not know are ignored, missing ones
take their default, so that fields may be added without a new schema number.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from ..errors import UserError
from ..types import Report
from .layer_tables import arithmetic, is_float

if TYPE_CHECKING:
    from ..types import Inspection

#: Raised only when old readers would misunderstand the data.
SCHEMA = 1

_FIX = "give the report.json of a bundle, or compile again"


def to_json(obj: object) -> dict[str, Any]:
    """Return a contract type as JSON data: `plain(obj)` with the schema's number in front."""
    return {"schema": SCHEMA, **plain(obj)}


def plain(value: Any) -> Any:
    """Return nested dataclasses, tuples and mappings as dicts and lists that `json.dumps` takes as they are.

    Raises TypeError for what has no place in a report, an array for example.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return _plain_nested(value)


def _plain_nested(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be part of a report")


def from_json(data: Any) -> Report:
    """Return the report that `to_json` wrote. UserError if it is none, is damaged, or of a newer schema."""
    if not isinstance(data, Mapping) or not isinstance(data.get("schema"), int):
        raise UserError("this is not an edgec report: it has no schema number", fix=_FIX)
    if data["schema"] > SCHEMA:
        raise UserError(
            f"the report has schema {data['schema']}, and this edgec reads up to {SCHEMA}",
            fix="install a newer edgec (pip install --upgrade edgec)",
        )
    report: Report = _dataclass(Report, data, "report")
    return report


def summary(found: Report | Inspection) -> dict[str, Any]:
    """Return the few figures by which two reports or ONNX files are compared, flat; None where not known."""
    layers = arithmetic(found.layers)
    shared = {
        "size_bytes": found.size_bytes if not isinstance(found, Report) else found.size_after_bytes,
        "macs": None if None in (macs := [x.macs for x in found.layers]) else sum(m or 0 for m in macs),
        "layers": len(layers),
        "integer_layers": sum(not is_float(x) for x in layers),
    }
    if not isinstance(found, Report):
        nodes = sum(found.operators.values())
        return {
            "name": found.path,
            "opset": found.opset,
            "nodes": nodes,
            "parameters": found.parameters,
            **shared,
        }
    return {
        "name": found.model,
        "device": found.device.name,
        "precision": found.precision,
        "latency_ms": found.result.median_ms,
        "speedup": found.result.speedup,
        "quality_drop": found.fidelity.drop if found.fidelity else None,
        "nodes": found.passes[-1].nodes_after if found.passes else None,
        **shared,
    }


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, localns={"Path": Path})


def _dataclass(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _damaged(where, "an object", data)
    hints = _hints(cls)
    given = {}
    for field in dataclasses.fields(cls):
        if field.name in data:
            given[field.name] = _read(hints[field.name], data[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError("the report is damaged: this field is missing", where=f"{where}.{field.name}", fix=_FIX)
    return cls(**given)


def _read(hint: Any, data: Any, where: str) -> Any:
    """Return `data` as the type `hint` says."""
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), data, where)
    origin = typing.get_origin(hint)
    if origin is not None:
        return _READERS[origin](typing.get_args(hint), data, where)
    if hint is float and data is None:
        return math.nan
    accepted = _SCALARS[hint]
    if not isinstance(data, accepted) or (isinstance(data, bool) and hint is not bool):
        raise _damaged(where, hint.__name__, data)
    return hint(data)


def _optional(args: tuple[Any, ...], data: Any, where: str) -> Any:
    (hint,) = (a for a in args if a is not type(None))
    return None if data is None else _read(hint, data, where)


def _tuple(args: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise _damaged(where, "a list", data)
    hints = (args[0],) * len(data) if args[-1] is Ellipsis else args
    if len(hints) != len(data):
        raise _damaged(where, f"{len(hints)} values", data)
    return tuple(_read(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, data, strict=True)))


def _mapping(args: tuple[Any, ...], data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise _damaged(where, "an object", data)
    return {str(key): _read(args[1], item, f"{where}.{key}") for key, item in data.items()}


def _literal(args: tuple[Any, ...], data: Any, where: str) -> Any:
    if data not in args:
        raise _damaged(where, f"one of {', '.join(map(str, args))}", data)
    return data


def _damaged(where: str, wanted: str, found: object) -> UserError:
    return UserError(f"the report is damaged: expected {wanted}, found {str(found)[:40]!r}", where=where, fix=_FIX)


_SCALARS: dict[type, tuple[type, ...]] = {
    bool: (bool,), int: (int,), float: (int, float), str: (str,), Path: (str,),
}  # fmt: skip

_READERS = {
    Union: _optional,
    types.UnionType: _optional,
    tuple: _tuple,
    Mapping: _mapping,
    Literal: _literal,
}
