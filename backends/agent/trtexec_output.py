"""What trtexec prints and writes, read: its console, and the JSON files of times, profiles and outputs.

Its console keeps one form from 8.2 to 11; lines are "[date] [I] text", and W, E and F likewise. Names in its files are
not escaped and numbers may be nan or inf, so profiles and outputs are read by their own form, not as JSON.
"""

import json
import re
import struct
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .faults import Fault
from .tensors import SIZES, Tensor

_LINE = re.compile(r"^\[[^\]]*\] \[([VIWEF])\] ?(.*?)\s*$")
_MARK = re.compile(r"^&&&& (\w+) \S+ \[TensorRT v(\d+)\]", re.MULTILINE)
_SUMMARY = re.compile(r"^([A-Z][\w \-]*): (min = .*)$")
_FIGURE = re.compile(r"(min|max|mean|median|percentile\(([\d.]+)%\)) = (\S+) ms")
_RATE = re.compile(r"^Throughput: (\S+) qps$")
_CAPABILITY = re.compile(r"^(\d+)\.(\d+)$")
_BUILT = re.compile(r"^Engine built in (\S+) sec")


class Console(NamedTuple):
    """A run's console: what it says of the version, the device and the calls.

    `version` is empty where it is not told; `verdict` is the last of RUNNING, PASSED, FAILED. `summary` has "Latency",
    "GPU Compute Time" and others, each a dictionary of milliseconds by "min", "max", "mean", "median" and "99%".
    """

    version: Tuple[int, ...]
    verdict: str
    device: Dict[str, str]
    capability: Optional[Tuple[int, int]]
    summary: Dict[str, Dict[str, float]]
    throughput: Optional[float]
    built_in: Optional[float]
    warnings: List[str]
    errors: List[str]


class Query(NamedTuple):
    """One call: milliseconds of its kernels, of the call with its copies, and when its kernels began."""

    compute: float
    latency: float
    began: float


class Timed(NamedTuple):
    """One layer of a profile: milliseconds a call; TensorRT 8.2 tells no median."""

    name: str
    average: float
    median: Optional[float]


class Profile(NamedTuple):
    """So many calls, and the layers in the order in which they ran."""

    runs: int
    layers: List[Timed]


# -------------------------------------------------------------------------------------------- console


def console(text: str) -> Console:
    """Return what a run's output says; it may end early."""
    marks = _MARK.findall(text)
    told, warnings, errors = [], [], []  # type: List[str], List[str], List[str]
    for line in text.split("\n"):  # not splitlines: names hold control bytes at which it would split
        found = _LINE.match(line)
        if found:
            {"W": warnings, "E": errors, "F": errors}.get(found.group(1), told).append(found.group(2))
    device = _device(told)
    capability = _CAPABILITY.match(device.get("Compute Capability", ""))
    return Console(
        version=_version(marks[0][1], told) if marks else _version("", told),
        verdict=marks[-1][0] if marks else "",
        device=device,
        capability=(int(capability.group(1)), int(capability.group(2))) if capability else None,
        summary=_summary(told),
        throughput=_number(_RATE, told),
        built_in=_number(_BUILT, told),
        warnings=list(dict.fromkeys(line for line in warnings if line)),
        errors=list(dict.fromkeys(line for line in errors if line)),
    )


def _version(number: str, told: Sequence[str]) -> Tuple[int, ...]:
    """Return the version; its one number was major*1000+minor*100+patch up to 9, and major*10000+... from 10 on."""
    if number:
        value = int(number)
        major = 10000 if value >= 10000 else 1000
        return value // major, value % major // 100, value % 100
    for line in told:
        if line.startswith("TensorRT version: "):
            return tuple(int(part) for part in re.findall(r"\d+", line)[:3])
    return ()


def _device(told: Sequence[str]) -> Dict[str, str]:
    found, inside = {}, False  # type: Dict[str, str], bool
    for line in told:
        if line.startswith("=== "):
            inside = line == "=== Device Information ==="
        elif line.startswith("TensorRT version"):
            break
        elif inside and ": " in line:
            key, value = line.split(": ", 1)
            found[key.strip()] = value.strip()
    return found


def _summary(told: Sequence[str]) -> Dict[str, Dict[str, float]]:
    found = {}
    for line in told:
        row = _SUMMARY.match(line)
        if row:
            figures = _FIGURE.findall(row.group(2))
            found[row.group(1)] = {percent + "%" if percent else key: float(ms) for key, percent, ms in figures}
    return found


def _number(pattern: Any, told: Sequence[str]) -> Optional[float]:
    for line in told:
        found = pattern.match(line)
        if found:
            return float(found.group(1))
    return None


# ---------------------------------------------------------------------------------------------- files


def times(text: str, warm_up: float = 0.0) -> List[Query]:
    """Return the calls of --exportTimes whose kernels began at `warm_up` milliseconds or later.

    TensorRT 8.2 writes those of the warm-up as well, later versions leave them out. ValueError where it is none.
    """
    try:
        calls = [Query(q["computeMs"], q["latencyMs"], q["startComputeMs"]) for q in json.loads(text)]
    except (KeyError, TypeError) as error:
        raise ValueError("no file of --exportTimes: %r" % error) from None
    return [call for call in calls if call.began >= warm_up]


_LAYER = re.compile(
    r'"name"\s*:\s*"(.*?)"\s*,\s*"timeMs"\s*:\s*[^,]+,\s*"averageMs"\s*:\s*([^,\s]+)\s*,'
    r'(?:\s*"medianMs"\s*:\s*([^,\s]+)\s*,)?\s*"percentage"'
)
_OUTPUT = re.compile(r'"name"\s*:\s*"(.*?)"\s*,\s*"dimensions"\s*:\s*"([^"]*)"\s*,\s*"values"\s*:\s*\[([^\]]*)\]\s*\}')


def profile(text: str) -> Profile:
    """Return a file of --exportProfile. ValueError where it is none."""
    count = re.search(r'\{\s*"count"\s*:\s*(\d+)\s*\}', text)
    if count is None:
        raise ValueError("no file of --exportProfile: it has no count")
    some = [Timed(name, float(mean), float(median) if median else None) for name, mean, median in _LAYER.findall(text)]
    return Profile(int(count.group(1)), some)


def outputs(text: str) -> Dict[str, Tuple[List[int], List[float]]]:
    """Return shapes and values of --exportOutput by the outputs' names; numbers have six digits.

    Integers come as integers, all else as floats. ValueError where a value is no number.
    """
    found = {}
    for name, dimensions, values in _OUTPUT.findall(text):
        listed = [value.strip() for value in values.split(",") if value.strip()]
        found[name] = ([int(size) for size in re.findall(r"\d+", dimensions)], [_value(one) for one in listed])
    return found


def _value(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return float(text)


# -------------------------------------------------------------------------------------------- tensors

#: How struct calls the types that trtexec takes and gives.
_CODES = {
    "float32": "f",
    "float64": "d",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint8": "B",
    "bool": "?",
}


def packed(name: str, dtype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """Return values as a tensor. Fault where they do not fit its type, or trtexec has no such type."""
    code = _CODES.get(dtype)
    if code is None:
        raise Fault("trtexec neither reads nor writes tensors of type %s, as %s is" % (dtype or "unknown", name))
    whole = code not in "fde"
    try:
        plain = [int(value) for value in values] if whole else [float(value) for value in values]
        return Tensor(dtype, list(shape), struct.pack("<%d%s" % (len(plain), code), *plain))
    except (OverflowError, ValueError, struct.error) as error:
        raise Fault("%s has a value that %s cannot hold: %s" % (name, dtype, error)) from None


def converted(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor in another type. Fault where a value does not fit it, or the bytes are not the shape's."""
    code = _CODES.get(tensor.dtype)
    if tensor.dtype == dtype:
        return tensor
    if code is None or dtype not in _CODES:
        raise Fault("%s is %s, which cannot be turned into %s" % (name, tensor.dtype, dtype or "an unknown type"))
    count = len(tensor.data) // int(SIZES[tensor.dtype])
    return packed(name, dtype, tensor.shape, struct.unpack("<%d%s" % (count, code), tensor.data))
