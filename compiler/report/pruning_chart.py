"""The channels of each layer, kept against cut, as a chart: a row a layer, as long as the layer had outputs.

Drawn as those of charts.py: what was kept stands out, what was cut is quiet.
"""

from __future__ import annotations

from html import escape

from ..types import PrunedLayer, Pruning
from . import axes, text

#: Pixels: a row, the bar in it, a letter of a name, the column of figures; and the letters that a name may have.
_ROW, _BAR, _LETTER, _FIGURE = 20, 9, 7, 92
_NAME = 26


def channels(p: Pruning) -> str:
    """Return one bar a layer, as long as it had outputs: those kept, and those cut."""
    most = max((x.outputs for x in p.layers), default=0) or 1
    rows = [x for x in p.layers if x.outputs]
    drawn = "".join(_bar(x, _ROW * i, 100 / most) for i, x in enumerate(rows))
    names = "".join(_text("tick", "0", _ROW * i, _short(x.node)) for i, x in enumerate(rows))
    figures = "".join(
        _text("figure", str(_FIGURE), _ROW * i, f"{x.outputs_left} of {x.outputs}", ' text-anchor="end"')
        for i, x in enumerate(rows)
    )
    height, width = _ROW * len(rows), 14 + _LETTER * max((len(_short(x.node)) for x in rows), default=0)
    left, right = (
        f'<svg aria-hidden="true" width="{w}" height="{height}">{drawing}</svg>'
        for w, drawing in ((width, names), (_FIGURE, figures))
    )
    kept, all_ = sum(x.outputs_left for x in rows), sum(x.outputs for x in rows)
    title = f"Channels kept in each of {text.count(len(rows), 'layer')}: {kept:,} of {all_:,}"
    return f'<div class="plot three">{left}{axes.svg(title, height, drawn)}{right}</div>'


def _bar(x: PrunedLayer, top: int, scale: float) -> str:
    about = f"<title>{escape(text.clean(x.node))}: {x.outputs_left} of {x.outputs} outputs kept</title>"
    whole, left = (axes.pc(count * scale) for count in (x.outputs, x.outputs_left))
    place = f'x="0" y="{top + (_ROW - _BAR) / 2:.1f}" height="{_BAR}"'
    return f'<g>{about}<rect class="bar" {place} width="{whole}"/><rect class="bar strong" {place} width="{left}"/></g>'


def _text(kind: str, x: str, top: int, content: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{top + _ROW / 2 + 4:.1f}"{more}>{escape(content)}</text>'


def _short(name: str) -> str:
    """Return the end of a long name, which is what tells layers apart."""
    name = text.clean(name)
    return name if len(name) <= _NAME else "\u2026" + name[-_NAME + 1 :]
