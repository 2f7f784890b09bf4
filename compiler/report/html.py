"""The report as one page that opens offline: inline style, inline SVG, no script. Everything is escaped.

The markup is XML as well as HTML, so that a test can hold it to being well-formed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import accumulate

from ..types import Layer, Report, RobustChoice
from . import (
    charts,
    device_tables,
    facts,
    layer_tables,
    low_rank_tables,
    pruning_chart,
    pruning_tables,
    robust_tables,
    robustness_chart,
    tables,
    text,
)
from .grid import Table
from .style import CSS

#: Characters up to which a cell is a name and kept on one line; longer ones are sentences.
_NAME = 28

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def render(report: Report) -> str:
    """Return the whole page."""
    parts = (
        _header(report),
        _cards(report),
        _says("Warning", report.warnings, "warning"),
        _says("Advice", report.advice, "advice"),
        _latency(report),
        _quality(report),
        _attempts(report),
        _pruning(report),
        _low_rank(report),
        _steps(report),
        _robust(report),
        _sources(report),
        _size(report),
        _layers(report),
        _passes(report),
        _refusals(report),
        _section("How this was made", _facts(facts.of_report(report))),
    )
    title = escape(f"{text.clean(report.model)}: edgec report")
    return _PAGE.format(title=title, css=CSS, body="\n".join(p for p in parts if p))


# --------------------------------------------------------------------------------------------- the top


def _header(report: Report) -> str:
    """The headline as it is written, its first claim set large."""
    claim, rest = _split(text.clean(report.headline) or text.headline(report))
    rest = f'<span class="rest">{_typeset(rest)}</span>' if rest else ""
    return (
        f'<header><p class="kicker">{escape(text.clean(report.model))} compiled by edgec</p>'
        f"<h1>{_typeset(claim)} {rest}</h1></header>"
    )


def _split(line: str) -> tuple[str, str]:
    """Part "device: claim (detail), more" into claim and "detail; more"; without brackets at the first comma."""
    start = line.find(": ") + 1  # the device's own name may hold brackets
    claim, bracket, rest = line[start:].partition(" (")
    if not bracket or ", " in claim:
        claim, _, rest = line[start:].partition(", ")
        return line[:start] + claim, rest
    depths = accumulate({"(": 1, ")": -1}.get(c, 0) for c in rest)
    end = next((i for i, depth in enumerate(depths) if depth < 0), len(rest))
    more = rest[end + 1 :].removeprefix(", ")
    return line[:start] + claim, rest[:end] + (f"; {more}" if more else "")


def _cards(report: Report) -> str:
    cards = (_speed_card, _latency_card, _quality_card, _size_card)
    return f'<div class="cards">{"".join(card(report) for card in cards)}</div>'


def _card(label: str, value: str, about: str, kind: str = "") -> str:
    """Return a card; `kind` is "lead" for the one in colour, "none" where there is no figure."""
    shown = f'<p class="value">{_typeset(value)}</p>'
    return f'<div class="card {kind}"><p>{escape(label)}</p>{shown}<p>{_typeset(about)}</p></div>'


def _speed_card(report: Report) -> str:
    gain, result = text.speedup(report), report.result
    if gain is None or text.is_baseline(report):
        return ""
    between = text.interval(result.speedup_low, result.speedup_high, 2)
    about = f"95 % interval {between}" if between else "ratio of the medians"
    return _card(f"Speed against {text.baseline_name(report)}", text.ratio(gain), about, "lead")


def _latency_card(report: Report) -> str:
    result, other = report.result, report.original if text.is_baseline(report) else report.baseline
    if result.median_ms is None:
        return _card("Latency of one call", "not measured", text.why(result), "none")
    name = "original" if other is report.original else text.baseline_name(report)
    return _card("Latency of one call", text.ms(result.median_ms), f"{name} {text.ms(other.median_ms)}")


def _quality_card(report: Report) -> str:
    f = report.fidelity
    if f is None or f.value is None:
        why = "no images to compare on" if f is None else text.why(f)
        return _card("Quality", "not judged", why, "none")
    name = text.METRICS.get(f.metric, text.clean(f.metric))
    lost = f"{text.points(f.drop)} lost of {text.points(report.budget.max_drop)} allowed"
    return _card(f"{name[0].upper()}{name[1:]}", text.percent(f.value), lost)


def _size_card(report: Report) -> str:
    before, after = report.size_before_bytes, report.size_after_bytes
    change = f", {100 * (after / before - 1):+.0f} %" if before else ""
    return _card("File size", text.size(after), f"original {text.size(before)}{change}")


def _says(label: str, lines: Sequence[str], kind: str) -> str:
    if not lines:
        return ""
    items = "".join(f"<li><b>{label}</b> {escape(text.clean(line))}</li>" for line in lines)
    return f'<ul class="says {kind}">{items}</ul>'


# --------------------------------------------------------------------------------------------- sections


def _latency(report: Report) -> str:
    table, rows = tables.latency(report), tables.latency_rows(report)
    bars = [
        charts.Bar(label, text.ms(m.median_ms), m.median_ms, m.low_ms, m.high_ms, m is rows[-1][1])
        for label, m in rows
        if m.median_ms is not None
    ]
    title = "Median latency: " + ", ".join(f"{b.label} {b.figure}" for b in bars)
    caption = "Median of one call; the whiskers are its 95 % interval."
    chart = _figure(charts.bars(title, bars), caption) if len(bars) > 1 else ""
    more = device_tables.of_report(report)
    told = _section(more.title, _table(more)) if more.rows or more.notes else ""
    return _section(table.title, chart + _table(table)) + told


def _quality(report: Report) -> str:
    table = tables.quality(report.fidelity, report.budget)
    return _section(table.title, _table(table) + _table(tables.outputs(report.fidelity)))


def _attempts(report: Report) -> str:
    if len(report.attempts) < 2:
        return ""
    table = tables.attempts(report.attempts, numbered=True)
    return _section(table.title, _scatter(report) + _table(table)) + _predictions(report)


def _scatter(report: Report) -> str:
    points = [
        charts.Point(str(i), f"{text.clean(a.name)}: {text.ms(ms)}, {text.points(drop)} lost", ms, drop, a.chosen)
        for i, a in enumerate(report.attempts, 1)
        if (ms := a.measurement.median_ms) is not None and a.fidelity and (drop := a.fidelity.drop) is not None
    ]
    if len(points) < 2:
        return ""
    base, budget = report.baseline.median_ms, report.budget.max_drop
    title = "Points lost against latency: " + "; ".join(p.about for p in points)
    chart = charts.scatter(title, points, right=base, limit=budget)
    lines = f"dashed: the budget of {text.points(budget)}"
    lines += "" if base is None else f" and {text.baseline_name(report)}, {text.ms(base)}"
    axes = "Points lost (downwards) against milliseconds of one call: best is the upper left"
    if len(points) > 2:
        lines += "; the line joins those that no other beats in both"
    caption = f"{axes}. Numbers as in the table; {lines}."
    return _figure(chart, caption)


def _predictions(report: Report) -> str:
    table = tables.predictions(report.attempts)
    return _section(table.title, _table(table)) if table.rows else ""


def _steps(report: Report) -> str:
    table = tables.steps(report.steps)
    return _section(table.title, _table(table)) if table.rows else ""


def _pruning(report: Report) -> str:
    found = pruning_tables.tables(report)
    if report.pruning is None or not report.pruning.kept:
        return "".join(_section(table.title, _table(table)) for table in found)
    sizes, *others, layers = found
    caption = "Outputs of each layer: in colour what was kept, in grey what was cut."
    drawn = _figure(pruning_chart.channels(report.pruning), caption)
    every = _details(f"All {text.count(len(layers.rows), 'layer')}", _table(layers))
    return _section(sizes.title, "".join(map(_table, (sizes, *others))) + drawn + every)


def _low_rank(report: Report) -> str:
    first, *rest = low_rank_tables.tables(report) or (None,)
    if first is None:
        return ""
    every = "".join(_details(f"All {text.count(len(t.rows), 'layer')}", _table(t)) for t in rest if t is not None)
    return _section(first.title, _table(first) + every)


def _robust(report: Report) -> str:
    found = robust_tables.tables(report.robust)
    if not found:
        return ""
    first, *rest = found
    inside = "".join(_details(table.title, _table(table)) for table in rest)
    charted = "" if report.robust is None or not report.robust.ways else _robust_charts(report.robust)
    return _section(first.title, _table(first) + charted + inside)


def _robust_charts(choice: RobustChoice) -> str:
    """The error of each way, and the figure of the task, under each condition; the way that was kept stands out."""
    ways = sorted(choice.ways, key=lambda way: way.kept)
    conditions = list(ways[0].sqnr_db)
    series = [
        robustness_chart.Series(
            f"{text.clean(way.calibration)} beside clean",
            [way.errors[c].value for c in conditions],
            [way.errors[c].low for c in conditions],
            [way.errors[c].high for c in conditions],
        )
        for way in ways
        if way.errors
    ]
    title = "Error beside clean calibration, dB, by condition"
    caption = "Error of the outputs beside clean calibration's, dB, with 95 % intervals: left of 0 is better."
    shown = _figure(robustness_chart.dots(title, conditions, series, "dB"), caption)
    if not any(way.losses for way in ways):
        return shown
    name = text.METRICS.get(ways[0].under.metric, "your metric")
    caption = f"{name[0].upper()}{name[1:]} under each condition, %, calibrated as named."
    return shown + _figure(robustness_chart.figures({way.calibration: way.under for way in ways}), caption)


def _sources(report: Report) -> str:
    found, table = layer_tables.largest_sources(report), layer_tables.sources(report)
    bars = [
        charts.Bar(text.clean(x.node), f"{text.fixed(x.share_percent, 1)} %", x.share_percent or 0.0) for x in found
    ]
    title = f"{table.title}: " + ", ".join(f"{b.label} {b.figure}" for b in bars)
    chart = _figure(
        charts.bars(title, bars, full=100.0), f"Share of the error at the outputs, the {len(bars)} largest."
    )
    return _section(table.title, chart + _table(table)) if bars else ""


def _size(report: Report) -> str:
    sizes = (
        ("original", report.size_before_bytes),
        (f"{text.precision(report.precision)} result", report.size_after_bytes),
    )
    bars = [charts.Bar(label, text.size(count), float(count), strong=i == 1) for i, (label, count) in enumerate(sizes)]
    title = "File size: " + ", ".join(f"{b.label} {b.figure}" for b in bars)
    return _section("File size", charts.bars(title, bars))


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    table = layer_tables.layers(report.layers, numbered=True)
    return _section(
        table.title,
        _layer_chart(report) + _details(f"All {text.count(len(report.layers), 'layer')}", _table(table)),
    )


def _layer_chart(report: Report) -> str:
    judged = [x for x in report.layers if x.sqnr_db is not None and not layer_tables.is_float(x)]
    if not judged:
        return ""
    worst = min(judged, key=lambda x: x.sqnr_db or 0.0)
    weakest = f"{text.clean(worst.node)}, {text.decibels(worst.sqnr_db)}"
    found = [
        charts.Column(_layer(x), x.sqnr_db, hollow=layer_tables.is_float(x), strong=x is worst) for x in report.layers
    ]
    says = f"Each layer's own SQNR in dB, in the order of execution; higher is better. Weakest: {weakest}."
    hatched = " Hatched: left in float." if any(c.hollow for c in found) else ""
    gaps = " A gap: not judged." if any(c.value is None and not c.hollow for c in found) else ""
    title = f"Own SQNR of {text.count(len(found), 'layer')}; the weakest: {weakest}"
    return _figure(charts.columns(title, found), says + hatched + gaps)


def _layer(layer: Layer) -> str:
    figure = "in float" if layer_tables.is_float(layer) else text.decibels(layer.sqnr_db)
    return f"{text.clean(layer.node)}: {figure}"


def _passes(report: Report) -> str:
    table = tables.passes(report.passes)
    return _section(table.title, _table(table)) if table.rows else ""


def _refusals(report: Report) -> str:
    table = tables.refusals(report)
    if not table.rows:
        return ""
    return _section(table.title, _details("Which, and why", _table(table)))


# --------------------------------------------------------------------------------------------- setting


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{_typeset(caption)}</figcaption></figure>"


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def _facts(lines: facts.Facts) -> str:
    return f"<dl>{''.join(f'<dt>{escape(label)}</dt><dd>{escape(line)}</dd>' for label, line in lines)}</dl>"


def _table(table: Table) -> str:
    notes = "".join(f'<p class="note">{_typeset(note)}</p>' for note in table.notes)
    if not table.rows:
        return notes
    heads = "".join(_cell("th", c.title, c.number) for c in table.columns)
    rows = "".join(_row(table, i) for i in range(len(table.rows)))
    name = escape(table.title)
    grid = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">{grid}</div>{notes}'


def _row(table: Table, index: int) -> str:
    cells = zip(table.rows[index], table.columns, strict=True)
    strong = ' class="strong"' if index == table.strong else ""
    return f"<tr{strong}>{''.join(_cell('td', content, c.number) for content, c in cells)}</tr>"


def _cell(tag: str, content: str, number: bool) -> str:
    if number:
        return f'<{tag} class="number">{_typeset(content)}</{tag}>'
    kind = "prose" if max(map(len, content.split("\n"))) > _NAME else "name"
    return f'<{tag} class="{kind}">{escape(content)}</{tag}>'


def _typeset(line: str) -> str:
    """Escape a line of ours and give it its proper signs: 1.85x, 1.80-1.90, ->, a minus."""
    for pattern, sign in _SIGNS:
        line = pattern.sub(sign, line)
    return escape(line)


_SIGNS = (
    (re.compile(r"(?<=\d)x(?![\w])"), "\u00d7"),
    (re.compile(r"(?<=\.\d\d)-(?=\d+\.)| - (?=\d)"), "\u2013"),
    (re.compile(r" \.\. "), " \u2026 "),
    (re.compile(r"->"), "\u2192"),
    (re.compile(r"(?<![\w-])-(?=\d)"), "\u2212"),
    (re.compile(r"(?<=top)-(?=\d)"), "\u2011"),
    (re.compile(r"^-$"), "\u2013"),
    (re.compile(r"(?<=\d) (?=(ms|s|k?B|MB|GB|dB|%|points?)\b|%)"), "\u00a0"),
)
