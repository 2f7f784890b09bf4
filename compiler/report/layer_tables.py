"""The tables on layers: what each of them is and does, and where the error comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..types import Layer, Range, Report
from . import text
from .grid import Table, columns

#: What a layer that computes in floating point is called; 8-bit floats are not among them.
FLOATS = ("float32", "float16", "bfloat16", "float64", "double", "fp32", "fp16", "bf16")
#: How many layers are named as the sources of error.
SOURCES = 5

_PLAIN = "plain rounding: no outlier, nothing clipped; a smaller --max-drop keeps such layers in float"


# ------------------------------------------------------------------------------------------ which run on what


def is_float(layer: Layer) -> bool:
    """Tell whether a layer computes in floating point, weights and all."""
    return layer.precision.lower().split(" ")[0] in FLOATS


def arithmetic(found: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the layers that multiply and add; the others only join tensors, or are an input."""
    return tuple(x for x in found if x.macs != 0)


def floats(report: Report) -> tuple[Layer, ...]:
    """The layers left in float where others are not."""
    left = tuple(x for x in arithmetic(report.layers) if is_float(x))
    return left if len(left) < len(arithmetic(report.layers)) else ()


def in_integers(found: Sequence[Layer]) -> str:
    """Return how much of the model has few bits, by layers and by multiply-accumulates."""
    found = arithmetic(found)
    left = [x for x in found if is_float(x)]
    macs = sum(x.macs or 0 for x in found)
    done = f"{len(found) - len(left)} of {len(found)} {_few_bits(found)}"
    if not macs or any(x.macs is None for x in found):
        return done
    share = 100 * (1 - sum(x.macs or 0 for x in left) / macs)
    return f"{done}, {'over 99.9' if left and share > 99.9 else f'{share:.1f}'} % of the multiply-accumulates"


def _few_bits(found: Sequence[Layer]) -> str:
    kinds = [x.precision.lower() for x in found if not is_float(x)]
    if any(kind.startswith("float8") for kind in kinds):
        return "in 8-bit floats"
    return "with weights of few bits" if kinds and all(kind.startswith("weights") for kind in kinds) else "on integers"


# ------------------------------------------------------------------------------------------ every layer


@dataclass(frozen=True)
class _Field:
    """A column: its heading, how a cell is written, and whether the layer has anything to say there."""

    title: str
    write: Callable[[Layer], str]
    known: Callable[[Layer], bool]


_ALWAYS: Callable[[Layer], bool] = lambda x: True  # noqa: E731  # a row of the table below

#: The order is that of the columns; one that no layer has anything to say in is left out.
_FIELDS: tuple[_Field, ...] = (
    _Field("node", lambda x: text.clean(x.node), _ALWAYS),
    _Field("op", lambda x: text.clean(x.op), _ALWAYS),
    _Field("precision", lambda x: text.clean(x.precision.replace("float8", "")), _ALWAYS),
    _Field("#ms", lambda x: text.fixed(x.latency_ms, 4), lambda x: x.latency_ms is not None),
    _Field("#range", lambda x: _range(x.output_range), _ALWAYS),
    _Field("#scale", lambda x: text.MISSING if x.scale is None else f"{x.scale:.3g}", _ALWAYS),
    _Field("#clipped\n%", lambda x: text.fixed(x.clipped_percent, 3), lambda x: x.clipped_percent is not None),
    _Field("#SQNR\nin dB", lambda x: text.fixed(x.sqnr_in_db, 1), lambda x: x.sqnr_in_db is not None),
    _Field("#SQNR\nout dB", lambda x: text.fixed(x.sqnr_out_db, 1), lambda x: x.sqnr_out_db is not None),
    _Field("#own\nSQNR dB", lambda x: text.fixed(x.sqnr_db, 1), lambda x: x.sqnr_db is not None),
    _Field("#share of\nerror %", lambda x: text.fixed(x.share_percent, 1), lambda x: x.share_percent is not None),
    _Field("#MACs", lambda x: text.si(x.macs) if x.macs else text.MISSING, _ALWAYS),
)
#: Left out where there are too many others.
_ROOM = "#range"

#: Heading -> what it means, said beneath where the column is there.
_MEANINGS = {
    "#clipped\n%": "clipped: elements of the output outside the represented range, over all calibration images",
    "#SQNR\nout dB": "SQNR in, out: of what a layer reads and gives, with the errors of all layers before it",
    "#own\nSQNR dB": "own SQNR: only that layer is quantized",
    "#share of\nerror %": "share of error: at the network's outputs, by its weights and the tensor it hands on, each "
    "rounding alone",
}


def layers(found: Sequence[Layer], *, numbered: bool = False) -> Table:
    """One row a layer, in the order of execution; reasons are gathered beneath."""
    shown = [f for f in _FIELDS if any(f.known(x) for x in found)]
    if any(x.sqnr_out_db is not None for x in found):
        shown = [f for f in shown if f.title != _ROOM]
    titles = [*(["##"] if numbered else []), *(f.title for f in shown)]
    rows = tuple((*([str(i)] if numbered else []), *(f.write(x) for f in shown)) for i, x in enumerate(found, 1))
    reasons: dict[str, list[str]] = {}
    for x in found:
        if x.reason:
            reasons.setdefault(text.clean(x.reason), []).append(text.clean(x.node))
    notes = tuple(f"{', '.join(nodes)}: {why}" for why, nodes in reasons.items())
    said = tuple(_MEANINGS[f.title] for f in shown if f.title in _MEANINGS)
    return Table(f"Layers: {in_integers(found)}", columns(*titles), rows, (*said, *notes))


def _range(span: Range | None) -> str:
    return text.MISSING if span is None else f"{span.min:.3g} .. {span.max:.3g}"


# ------------------------------------------------------------------------------------------ where errors come from


def largest_sources(report: Report) -> tuple[Layer, ...]:
    """Return the layers with the largest shares of the error, the largest first."""
    shared = [x for x in report.layers if x.share_percent]
    return tuple(sorted(shared, key=lambda x: -(x.share_percent or 0.0))[:SOURCES])


def sources(report: Report) -> Table:
    """The layers with the largest shares of the error: the likely cause, and what was done or can be.

    Advice that holds for all of them is said once, beneath.
    """
    found = largest_sources(report)
    advice = {x.remedy for x in found}
    each = len(advice) > 1
    rows = tuple(
        (
            text.clean(x.node),
            text.fixed(x.share_percent, 1),
            text.fixed(x.weights_percent, 1),
            text.clean(x.cause or text.MISSING),
            *([text.clean(x.remedy or text.MISSING)] if each else []),
        )
        for x in found
    )
    titles = columns("layer", "#share\n%", "#weights\n%", "likely cause", *(["done, or to do"] if each else []))
    tried = all(is_float(x) for x in arithmetic(report.layers))
    title = f"Where the error {'of what was tried would come' if tried else 'comes'} from"
    shared = sum(x.share_percent or 0.0 for x in found)
    plain = any(x.cause and x.remedy is None for x in found)
    notes = (
        f"shares of the error at the outputs; these {len(found)} make {shared:.0f} % of it (all: inspect --layers)",
        *([] if each else (text.clean(a) for a in advice if a)),
        *([_PLAIN] if plain else []),
    )
    return Table(title, titles, rows, notes if rows else ())
