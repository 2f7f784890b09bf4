"""The report's tables as data: cells are text, ready to be set by the terminal or by the HTML view.

A column holds one kind of number, its unit in the heading; measured and predicted figures never share one.
What is the same in all rows (threads, runs, provider) is said once beneath the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..types import Attempt, Budget, Fidelity, Measurement, PassRecord, Proof, Refusal, Report, StepRecord
from . import text
from .grid import Table, columns
from .layer_tables import floats

# ------------------------------------------------------------------------------------------ latency

#: What is usually alike in all rows: attribute, heading, and how it reads in the sentence beneath.
_SHARED: tuple[tuple[str, str, str], ...] = (
    ("target", "target", "on {}"),
    ("provider", "provider", "{}"),
    ("batch", "#batch", "batch {}"),
    ("threads", "#threads", "{} thread(s)"),
    ("runs", "#runs", "{} runs each"),
)


def latency_rows(report: Report) -> list[tuple[str, Measurement]]:
    """The original as given, the baseline after the exact passes, the result; the result is the last."""
    base, result = text.baseline_name(report), text.precision(report.precision)
    rows = [("original", report.original), (f"{base} baseline", report.baseline)]
    return [*(rows[:1] if text.is_baseline(report) else rows), (f"{result} result", report.result)]


def latency(report: Report) -> Table:
    """What `latency_rows` measured."""
    rows = latency_rows(report)
    table = timings("Latency of one call, ms", rows)
    base = text.baseline_name(report)
    against = (f"speed-up is against the {base} baseline, from pairs of runs",) if _has_speedup(rows) else ()
    return replace(table, notes=(*table.notes, *against, *_latency_budget(report)), strong=len(rows) - 1)


def _latency_budget(report: Report) -> tuple[str, ...]:
    limit, median = report.budget.max_latency_ms, report.result.median_ms
    if limit is None or median is None:
        return ()
    return (f"{'within' if median <= limit else 'over'} the budget of {text.ms(limit)}, as stated",)


def timings(title: str, rows: Sequence[tuple[str, Measurement]]) -> Table:
    """A table of measurements; those that were not made are sentences with their reasons."""
    made = [m for _, m in rows if m.median_ms is not None]
    places = text.column_decimals(m.median_ms for m in made)
    shared, differing = _split_shared(made)
    titles = ["", "#median", "#95 % interval", "#p90", "#p99"]
    titles += ["#speed-up", "#95 % interval"] if _has_speedup(rows) else []
    titles += [heading for _, heading, _ in differing]
    cells = []
    for label, m in rows:
        row = [text.clean(label), *_timing(m, places)]
        row += [*_speedup(m)] if _has_speedup(rows) else []
        row += [_short(_attribute(m, name)) if m.median_ms is not None else "" for name, _, _ in differing]
        cells.append(tuple(row))
    return Table(title, columns(*titles), tuple(cells) if made else (), (*shared, *_not_measured(rows)))


def _timing(m: Measurement, places: int) -> tuple[str, ...]:
    if m.median_ms is None:
        return ("not measured", "", "", "")
    return (
        text.fixed(m.median_ms, places),
        text.interval(m.low_ms, m.high_ms, places),
        text.fixed(m.p90_ms, places),
        text.fixed(m.p99_ms, places),
    )


def _speedup(m: Measurement) -> tuple[str, str]:
    return text.ratio(m.speedup) if m.speedup else "", text.interval(m.speedup_low, m.speedup_high, 2)


def _has_speedup(rows: Sequence[tuple[str, Measurement]]) -> bool:
    return any(m.speedup is not None for _, m in rows)


def _short(value: str) -> str:
    """Return an execution provider by the runtime that has it: its own name fills a third of a terminal's line."""
    found = value.removesuffix("ExecutionProvider")
    return value if found == value else f"ORT {found}"


def _attribute(m: Measurement, name: str) -> str:
    return text.clean(str(getattr(m, name) or text.MISSING))


def _split_shared(made: Sequence[Measurement]) -> tuple[tuple[str, ...], list[tuple[str, str, str]]]:
    """Return the sentence of what all rows share, and the attributes in which they differ."""
    said, differing = [], []
    for row in _SHARED:
        values = {_attribute(m, row[0]) for m in made} - {text.MISSING}
        if len(values) > 1:
            differing.append(row)
        elif values:
            value = values.pop()
            said.append(row[2].format(value).replace("(s)", "" if value == "1" else "s"))
    return (", ".join(said),) if said else (), differing


def _not_measured(rows: Sequence[tuple[str, Measurement]]) -> tuple[str, ...]:
    """One sentence a reason, with the rows that it holds for."""
    reasons: dict[str, list[str]] = {}
    for label, m in rows:
        if m.median_ms is None:
            reasons.setdefault(text.why(m), []).append(text.clean(label))
    return tuple(f"{', '.join(labels)}: not measured, {why}" for why, labels in reasons.items())


# ------------------------------------------------------------------------------------------ quality


def quality(fidelity: Fidelity | None, budget: Budget | None = None) -> Table:
    """The figure that the budget bounds, for the original and for the result."""
    if fidelity is None:
        return Table("Quality", (), (), ("not judged: there were no images to compare on",))
    title = f"Quality on {text.count(fidelity.images, 'image' if budget is None else 'held-out image')}"
    if fidelity.value is None:
        return Table(title, (), (), (f"not judged: {text.why(fidelity)}",))
    titles = columns("", "#original %", "#result %", "#lost, points", "#95 % interval")
    lost = text.interval(fidelity.drop_low, fidelity.drop_high, 2)
    name = text.METRICS.get(fidelity.metric, text.clean(fidelity.metric))
    rows = [(name, *_points(fidelity.reference, fidelity.value, fidelity.drop), lost)]
    if fidelity.top5 is not None and fidelity.reference_top5 is not None:
        drop = fidelity.reference_top5 - fidelity.top5
        rows.append(("top-5", *_points(fidelity.reference_top5, fidelity.top5, drop), ""))
    rows += [(*row, "") for row in _precision(fidelity)]
    return Table(title, titles, tuple(rows), (*judged_by(fidelity), *_budget(fidelity, budget)))


def _precision(fidelity: Fidelity) -> list[tuple[str, ...]]:
    """Average precision, for the original and for the result, and what was lost of it."""
    b = fidelity.boxes
    if b is None or b.ap is None:
        return []
    pairs = {"AP at IoU 0.5": (b.reference_ap50, b.ap50), "AP, IoU 0.5-0.95": (b.reference_ap, b.ap)}
    return [(name, *_points(before, after, _difference(before, after))) for name, (before, after) in pairs.items()]


def judged_by(fidelity: Fidelity) -> tuple[str, ...]:
    """Say which boxes are the true ones."""
    b = fidelity.boxes
    if b is None:
        return ()
    found = f"{text.count(fidelity.images, 'image')}, {text.count(b.boxes, 'box')}"
    if b.truth == "original":
        return (f"judged by the original's boxes: {found}",)
    return (f"judged by box labels: {found} ({text.clean(b.truth)})",)


def _points(*values: float | None) -> tuple[str, ...]:
    return tuple(text.fixed(value, 2) for value in values)


def _budget(fidelity: Fidelity, budget: Budget | None) -> tuple[str, ...]:
    if budget is None or fidelity.drop is None:
        return ()
    held = "within" if fidelity.drop <= budget.max_drop else "over"
    origin = "as stated" if budget.drop_stated else "the default"
    return (f"{held} the budget of {text.points(budget.max_drop)}, {origin}",)


def outputs(fidelity: Fidelity | None) -> Table:
    """How close each output is to the original's, over all held-out images."""
    found = fidelity.outputs if fidelity else ()
    agree = any(o.agreement is not None for o in found)
    titles = columns("output", "#SQNR dB", "#cosine", *(["#top-1 agreement %"] if agree else []))
    rows = (
        (text.clean(o.name), text.sqnr(o), text.fixed(o.cosine, 5), *(_points(o.agreement) if agree else ()))
        for o in found
    )
    return Table("Outputs against the original's", titles, tuple(rows))


def attempts(found: Sequence[Attempt], *, numbered: bool = False) -> Table:
    """Every candidate that was built and judged; its precision where the name does not say it."""
    places = text.column_decimals(a.measurement.median_ms for a in found)
    hidden = any(not a.name.lower().startswith(a.precision.lower()) for a in found)
    titles = ("##" if numbered else "", "candidate", *(["precision"] if hidden else []))
    rows = (
        (
            str(i) if numbered else "*" if a.chosen else "",
            text.clean(a.name),
            *([text.precision(a.precision)] if hidden else []),
            _timing(a.measurement, places)[0],
            "not judged" if a.fidelity is None or a.fidelity.drop is None else text.fixed(a.fidelity.drop, 2),
            text.size(a.size_bytes),
            text.clean(a.verdict),
        )
        for i, a in enumerate(found, 1)
    )
    strong = next((i for i, a in enumerate(found) if a.chosen), None)
    notes = _not_measured([(a.name, a.measurement) for a in found])
    marked = ("* is what you got",) if strong is not None and not numbered else ()
    headings = columns(*titles, "#median ms", "#lost, points", "#size", "verdict")
    return Table("Candidates", headings, tuple(rows), (*marked, *notes), strong)


def predictions(found: Sequence[Attempt]) -> Table:
    """What mixed precision foretold of the candidates, beside what was measured of them."""
    told = [a for a in found if a.predicted_ms is not None or a.predicted_db is not None]
    places = text.column_decimals(a.measurement.median_ms for a in found)
    titles = ("candidate", "#predicted ms", "#measured ms", "#off %", "#predicted dB", "#measured dB", "#off dB")
    rows = tuple(
        (
            text.clean(a.name),
            text.fixed(a.predicted_ms, places),
            text.fixed(a.measurement.median_ms, places),
            text.signed(_relative(a.predicted_ms, a.measurement.median_ms), 0),
            text.fixed(a.predicted_db, 1),
            text.fixed(a.calibration_db, 1),
            text.signed(_difference(a.predicted_db, a.calibration_db), 1),
        )
        for a in told
    )
    notes = ("dB: SQNR of the outputs on calibration images; off: predicted less measured",) if rows else ()
    return Table("Predicted and measured", columns(*titles), rows, notes)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _relative(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else 100 * (a / b - 1)


# ------------------------------------------------------------------------------------------ steps


def steps(records: Sequence[StepRecord]) -> Table:
    """The steps of quantization: what each chose, what it gained on calibration images, whether it was kept."""
    titles = columns("step", "chosen", "#before dB", "#after dB", "#gain dB", "#time", "")
    rows = tuple(
        (
            text.clean(r.name),
            text.clean(r.detail),
            text.fixed(r.sqnr_before_db, 1),
            text.fixed(r.sqnr_after_db, 1),
            text.signed(_difference(r.sqnr_after_db, r.sqnr_before_db), 1),
            text.seconds(r.seconds),
            "kept" if r.kept else "taken back",
        )
        for r in records
    )
    meaning = "SQNR of the worst output, on calibration images; what gains nothing is taken back"
    left_out = "edgec compile --without STEP leaves one out"
    return Table("Steps to few bits", titles, rows, (meaning, left_out) if rows else ())


# ------------------------------------------------------------------------------------------ passes


def passes(records: Sequence[PassRecord]) -> Table:
    """What each pass did, what it left alone, and the proof of the exact ones."""
    titles = columns("pass", "kind", "#rewrites", "#refused", "#nodes", "#time", "#proof error")
    rows = tuple(
        (
            text.clean(r.name),
            "exact" if r.exact else "lossy",
            f"{r.rewrites:,}",
            f"{len(r.refusals):,}",
            str(r.nodes_after) if r.nodes_after == r.nodes_before else f"{r.nodes_before} -> {r.nodes_after}",
            text.seconds(r.seconds),
            _proof(r),
        )
        for r in records
    )
    said = tuple(f"{text.clean(r.name)}: {text.clean(note)}" for r in records for note in r.notes)
    unproven: dict[str, list[str]] = {}
    for r in records:
        if r.proof and r.proof.reason:
            unproven.setdefault(text.clean(r.proof.reason), []).append(text.clean(r.name))
    reasons = tuple(f"{', '.join(names)}: no proof, {why}" for why, names in unproven.items())
    return Table("Passes", titles, rows, (*_proof_meaning(records), *said, *reasons))


def _proof(record: PassRecord) -> str:
    proof = record.proof
    if proof is None:
        return "unchanged" if record.exact and not record.modified else text.MISSING
    if proof.error is None:
        return "not proven"
    if not proof.error <= proof.tolerance:
        return "failed"
    return f"{proof.error:.1e}" if proof.error else "0"


def _proof_meaning(records: Sequence[PassRecord]) -> tuple[str, ...]:
    made: list[Proof] = [r.proof for r in records if r.proof and r.proof.error is not None]
    if not made:
        return ()
    return (
        "proof error: largest difference to the original's outputs, relative to their largest magnitude; "
        f"at most {max(p.tolerance for p in made):.0e} is allowed",
    )


# ---------------------------------------------------------------------------------------- what was left alone


def left_alone(report: Report) -> tuple[Refusal, ...]:
    """Every node that kept its form, once: refusals, then layers left in float."""
    smaller = [found.refusals for found in (report.pruning, report.low_rank) if found is not None]
    of_passes = (record.refusals for record in report.passes)
    found = dict.fromkeys(r for refused in (report.refusals, *of_passes, *smaller) for r in refused)
    named = {r.node for r in found}
    layers = (x for x in floats(report) if x.reason and x.node not in named)
    return (*found, *(Refusal(x.node, "layer-in-float", x.reason or "") for x in layers))


def refusals(report: Report, limit: int | None = None) -> Table:
    """Nodes by rule and reason, with their count; the first `limit` of each are named, or all."""
    found = left_alone(report)
    groups: dict[tuple[str, str], list[str]] = {}
    for r in sorted(found, key=lambda r: r.rule):
        groups.setdefault((text.clean(r.rule), text.clean(r.why)), []).append(text.clean(r.node))
    rows = tuple((str(len(nodes)), rule, _first(nodes, limit), why) for (rule, why), nodes in groups.items())
    cut = limit is not None and any(len(nodes) > limit for nodes in groups.values())
    title = f"Left as it was: {text.count(len(found), 'node') if found else 'nothing'}"
    hint = ("all of them: edgec inspect --why",) if cut else ()
    return Table(title, columns("#count", "rule", "node", "why"), rows, hint)


def _first(nodes: Sequence[str], limit: int | None) -> str:
    shown = nodes[:limit]
    rest = [f"and {len(nodes) - len(shown):,} more"] if len(nodes) > len(shown) else []
    return "\n".join((*shown, *rest))
