"""The guard: which of the candidates is handed over, and why the others are not.

What is left to `auto` is chosen among the candidates inside the budget: the fastest one that is *shown* to be faster
than the float baseline (the whole 95 % interval of the speed-up above MARGIN), else the baseline; among those that are
as fast, the closest to the original. A lossy candidate that could not be judged is never taken by `auto`. Where nothing
could be measured, of the first setting's candidates inside the budget the one is taken that has most work on integers
(and is the closest of these), and that is said.

A stated latency is fast enough: with `--max-latency` the closest to the original is taken of all that hold it; so it is
with `--max-size` where a precision is named.

What the user names is obeyed. Of several candidates of that precision the closest to the original is taken that is as
fast as the plain one (AS_PLAIN of its speed) and faster than the float baseline (MARGIN), where any is that fast. Where
none holds a stated --max-drop, the one that loses least is the best attempt.

"As fast" is asked twice: of the medians of all calls, and of the fastest twentieth of them, which nobody disturbed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from .types import Attempt, Budget

#: Two runs of the same file differ by up to about 1 % in the median of their ratios (tests/test_timing.py).
MARGIN = 1.02
#: Speeds in this ratio count as the same; to what a plain candidate of a named precision would give, in this one.
AS_FAST, AS_PLAIN = 0.97, 0.985


def choose(attempts: Sequence[Attempt], budget: Budget, *, named: str | None, unasked: int = 0) -> tuple[Attempt, ...]:
    """Return the attempts with exactly one chosen and a verdict on each.

    The first attempt is the float baseline. `named` is the precision that the user asked for, None for auto. The first
    `unasked` attempts are not what was asked for otherwise (they are whole, and a cut was named); what follows them is
    the float attempt to fall back on.
    """
    if unasked:
        others = (replace(a, chosen=False, verdict="the baseline: not what was asked for") for a in attempts[:unasked])
        return (*others, *_choose(attempts[unasked:], budget, named, True))
    return _choose(attempts, budget, named, False)


def _choose(attempts: Sequence[Attempt], budget: Budget, named: str | None, cut: bool) -> tuple[Attempt, ...]:
    problems = [_problem(a, budget) for a in attempts]
    if named is None:
        problems = [p or (_unjudged(a) if i else None) for i, (p, a) in enumerate(zip(problems, attempts, strict=True))]
    enough = budget.max_latency_ms is not None
    winner = _fastest(attempts, problems, budget) if named is None else _named(attempts, problems, named, budget)
    return tuple(
        replace(a, chosen=i == winner, verdict=_verdict(attempts, i, winner, problems[i], named, cut, enough))
        for i, a in enumerate(attempts)
    )


def broken(attempt: Attempt, budget: Budget) -> str | None:
    """Return which stated or default budget the attempt breaks, or None."""
    return _problem(attempt, budget)


def _unjudged(attempt: Attempt) -> str | None:
    judged = attempt.fidelity is not None and attempt.fidelity.drop is not None
    return None if judged else "its quality was not judged (no images), so auto does not take it"


def _problem(attempt: Attempt, budget: Budget) -> str | None:
    f, m = attempt.fidelity, attempt.measurement
    if f is not None and f.drop is not None and not f.drop <= budget.max_drop:  # NaN is outside every budget
        slow = "" if m.speedup is None or shown_faster(attempt) else ", and is not shown to be faster"
        return f"loses {f.drop:.2f} points of {f.metric}, more than {budget.max_drop:g}{slow}"
    if budget.max_latency_ms is not None and m.median_ms is not None and m.median_ms > budget.max_latency_ms:
        return f"takes {m.median_ms:.3g} ms, more than {budget.max_latency_ms:g} ms"
    if budget.max_size_bytes is not None and attempt.size_bytes > budget.max_size_bytes:
        return f"is {attempt.size_bytes / 1e3:.4g} kB, more than {budget.max_size_bytes / 1e3:.4g} kB"
    return None


def _named(attempts: Sequence[Attempt], problems: Sequence[str | None], named: str, budget: Budget) -> int:
    """Choose among the attempts of the named precision: those inside the budget, if any."""
    of_it = [i for i, a in enumerate(attempts) if a.precision == named]
    stated = budget if budget.drop_stated else replace(budget, max_drop=math.inf)
    holding = [i for i in of_it if _problem(attempts[i], stated) is None]
    inside = [i for i in of_it if problems[i] is None] or holding
    if inside and (budget.max_latency_ms is not None or budget.max_size_bytes is not None):
        return _closest(attempts, inside)
    if not inside and budget.drop_stated and of_it:
        return min(of_it, key=lambda i: _drop(attempts[i]))
    inside = inside or of_it
    if not inside:
        return 0
    known = [i for i in inside if attempts[i].measurement.speedup is not None]
    if len(known) < len(inside):
        return inside[0] if known else _most_integers(attempts, inside)
    plain = of_it[0]
    found = []
    for speeds in _views(attempts, [plain, *inside]):
        fastest = max(speeds[i] for i in inside)
        floor = max(AS_PLAIN * min(speeds[plain] or fastest, fastest), min(MARGIN, fastest))
        found.append([i for i in inside if speeds[i] >= floor])
    return _closest(attempts, _both(found))


def _drop(attempt: Attempt) -> float:
    drop = None if attempt.fidelity is None else attempt.fidelity.drop
    return math.inf if drop is None or math.isnan(drop) else drop


def _nearest(attempts: Sequence[Attempt], budget: Budget) -> int:
    """Return the best attempt where none is inside the budget: the fastest of those that only take too long."""
    late = replace(budget, max_latency_ms=None)
    among = [i for i, a in enumerate(attempts) if _problem(a, late) is None and a.measurement.median_ms is not None]
    judged = [i for i in among if i == 0 or _unjudged(attempts[i]) is None]
    return min(judged, key=lambda i: attempts[i].measurement.median_ms or math.inf, default=0)


def _fastest(attempts: Sequence[Attempt], problems: Sequence[str | None], budget: Budget) -> int:
    inside = [i for i, a in enumerate(attempts) if problems[i] is None]
    if not inside:
        return _nearest(attempts, budget)
    if attempts[0].measurement.median_ms is None:
        return _most_integers(attempts, [i for i in inside if i] or inside)
    faster = [i for i in inside if shown_faster(attempts[i])]  # a baseline is not faster than itself
    if not faster and 0 in inside:
        return 0
    among = faster or inside
    if budget.max_latency_ms is not None:
        return _closest(attempts, among)
    views = _views(attempts, among)
    return _closest(attempts, _both([[i for i in among if v[i] >= AS_FAST * max(v.values())] for v in views]))


def _views(attempts: Sequence[Attempt], among: Sequence[int]) -> list[dict[int, float]]:
    """Return the speed-ups over the baseline as measured, and those of a machine that nobody else uses, if known.

    Neighbours slow integers more than floats: ResNet-20 with five layers in float is 1 to 3 % slower than plain INT8
    on a busy machine, and 6 % on a quiet one. The fastest twentieth of the calls shows the latter on the former.
    """
    paired = {i: attempts[i].measurement.speedup or 0.0 for i in among}  # medians drift apart
    baseline = attempts[0].measurement.p5_ms
    times = {i: attempts[i].measurement.p5_ms for i in among}
    quiet = {i: baseline / ms for i, ms in times.items() if ms is not None and baseline is not None}
    return [paired, quiet] if len(quiet) == len(paired) else [paired]


def _both(found: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return what is fast enough in all views; where nothing is, what is as measured."""
    return [i for i in found[0] if all(i in others for others in found[1:])] or found[0]


def _most_integers(attempts: Sequence[Attempt], among: Sequence[int]) -> int:
    """Return the closest of those with most work on integers, which stands for speed where nothing is measured.

    The first one's precision is kept to: settings are tried in the order of what they promise.
    """
    alike = {i: attempts[i].integer_macs for i in among if attempts[i].precision == attempts[among[0]].precision}
    shares = {i: 1.0 if share is None else share for i, share in alike.items()}
    return _closest(attempts, [i for i, share in shares.items() if share >= max(shares.values()) - 1e-9])


def _closest(attempts: Sequence[Attempt], among: Sequence[int]) -> int:
    """Return the one whose worst output is closest to the original's; the fastest where nothing tells them apart."""

    return max(among, key=lambda i: (_decibels(attempts[i]), attempts[i].measurement.speedup or 0.0))


def _decibels(attempt: Attempt) -> float:
    """Return the SQNR of the worst output; 0 where nothing was judged."""
    outputs = attempt.fidelity.outputs if attempt.fidelity is not None else ()
    return min((math.inf if o.sqnr_db is None else o.sqnr_db for o in outputs), default=0.0)


def shown_faster(attempt: Attempt) -> bool:
    """Say whether the whole 95 % interval of the speed-up over the baseline lies above MARGIN."""
    low = attempt.measurement.speedup_low
    return low is not None and low > MARGIN


def _verdict(
    attempts: Sequence[Attempt], i: int, winner: int, problem: str | None, named: str | None, cut: bool, enough: bool
) -> str:
    """Say why the attempt was chosen or not; the first one is the baseline, or what was cut as asked."""
    attempt = attempts[i]
    if problem is not None:
        return f"asked for, but {problem}" if i == winner and (named or cut) else problem
    if i == winner:
        return _reason(attempts, i, named, cut, enough)
    if i == 0:
        return "inside the budget" if cut else "the baseline"
    if attempt.measurement.median_ms is None:
        return "inside the budget"
    if winner == 0:
        return f"not shown to be faster than {attempts[0].precision.upper()}"
    fast, faster = (a.measurement.speedup or 0.0 for a in (attempt, attempts[winner]))
    if fast >= AS_FAST * faster:
        if _decibels(attempt) > _decibels(attempts[winner]):
            return "closer to the original, but not as fast"
        return "as fast as the chosen one, but no closer to the original"
    return "inside the budget, but slower than the chosen one"


def _reason(attempts: Sequence[Attempt], winner: int, named: str | None, cut: bool, enough: bool) -> str:
    attempt = attempts[winner]
    if named:
        return "asked for" if attempt.precision == named else "only exact passes ran"
    if cut:
        return "asked for" if winner == 0 else "the fastest of what was asked for, inside the budget"
    if attempt.measurement.median_ms is None:
        return "inside the budget; speed not measured"
    if winner == 0:
        return "nothing else is faster inside the budget"
    fastest = max((a.measurement.speedup or 0.0 for a in attempts if a.measurement.speedup), default=0.0)
    if enough:
        return "the closest to the original inside the budget"
    alone = (attempt.measurement.speedup or 0.0) >= fastest
    return "the fastest inside the budget" if alone else "the closest to the original of the fastest inside the budget"
