"""Which unit may run in which precision, and what a choice costs: the problem that program.py solves.

A choice x gives every unit one precision. Everything that a choice costs is a term: amounts (milliseconds, bytes,
error energy, …) that are due once, as soon as one of its cases holds, a case being a conjunction of "unit u has one of
the precisions P":

    a unit's own latency, its bytes, its weights' error      one case of one literal
    the rounding of a tensor                                 a case for each unit that causes it; where a reader does
                                                             so for itself, that and a producer that does not
    a conversion between units                               a case for each pair of differing precisions

    cost of x in measure m = sum of amount[t,m] over the terms t with a case that x fulfils

Precisions are FLOAT, INTEGER, and NARROW: integers with weights of 4 bits, which differ from INTEGER in their bytes
and in their weights' error, not in time: the one backend that has both kinds (backends/ort.py) unpacks them when it
loads the model, and its 8-bit kernels run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .contributions import Contributions
from .costs import Costs
from .units import Link, Wiring

#: "This unit has one of these precisions."
Literal = tuple[str, frozenset[str]]

FLOAT, INTEGER, NARROW = "float", "int8", "int4"
_FLOATS, _INTEGERS = frozenset({FLOAT}), frozenset({INTEGER, NARROW})


@dataclass(frozen=True)
class Term:
    """Amounts, none negative, by measure; due once if at least one of the cases (conjunctions) holds.

    Without cases they are always due.
    """

    amounts: Mapping[str, float]
    cases: tuple[tuple[Literal, ...], ...] = ()


@dataclass(frozen=True)
class Need:
    """`unit` may have one of `precisions` only where at least one of the literals holds."""

    unit: str
    precisions: frozenset[str]
    any_of: tuple[Literal, ...]


@dataclass(frozen=True)
class Problem:
    """The precisions that each unit may have, the terms that a choice among them costs, and what it must heed."""

    choices: Mapping[str, tuple[str, ...]]
    terms: tuple[Term, ...]
    needs: tuple[Need, ...] = ()

    def amounts(self, choice: Mapping[str, str]) -> dict[str, float]:
        """Return what a choice (unit -> precision) costs, by measure."""
        found = {measure: 0.0 for term in self.terms for measure in term.amounts}
        for term in self.terms:
            if not term.cases or any(all(choice[u] in ks for u, ks in case) for case in term.cases):
                for measure, amount in term.amounts.items():
                    found[measure] += amount
        return found

    def allows(self, choice: Mapping[str, str]) -> bool:
        """Say whether a choice heeds the needs."""
        return all(
            choice[need.unit] not in need.precisions or any(choice[u] in ks for u, ks in need.any_of)
            for need in self.needs
        )


@dataclass(frozen=True)
class Assignment:
    """A precision for every unit, and what it is predicted to cost, by measure."""

    precision: Mapping[str, str]
    predicted: Mapping[str, float] = field(default_factory=dict)

    def having(self, *precisions: str) -> frozenset[str]:
        """Return the units with one of these precisions."""
        return frozenset(unit for unit, chosen in self.precision.items() if chosen in precisions)


def mixed_problem(
    wiring: Wiring,
    costs: Costs,
    contributions: Contributions,
    extra: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    *,
    narrow: Mapping[str, float] | None = None,
    floats: bool = True,
) -> Problem:
    """Return the choice of a precision for every unit. Measures: `ms`, `error`, and those of `extra`.

    `error` is what the sources' own errors add up to; Contributions has what to expect of such a sum, and the reverse.
    `extra` maps a measure to unit -> precision -> amount: bytes, or MACs left in float. `narrow` is the error that each
    unit's weights add at 4 bits; units that are not in it have no such weights. Without `floats` every unit runs on
    integers.
    """
    narrow = narrow or {}
    terms = [term for link in wiring.links for term in _link_terms(link, costs)]
    for source, energy in zip(contributions.sources, contributions.alone, strict=True):
        weights = source.kind == "weight"
        at_work = {unit: frozenset({INTEGER}) if weights and unit in narrow else _INTEGERS for unit in source.units}
        other: tuple[Literal, ...] = () if source.unless is None else ((source.unless, _FLOATS),)
        terms.append(Term({"error": float(energy)}, tuple(((unit, on), *other) for unit, on in at_work.items())))
    terms += [Term({"error": energy}, (((unit, frozenset({NARROW})),),)) for unit, energy in narrow.items()]
    for measure, table in (extra or {}).items():
        for unit, amounts in table.items():
            terms += [Term({measure: amount}, (((unit, frozenset({k})),),)) for k, amount in amounts.items()]
    handed_on = {link.tensor for link in wiring.links if link.producer}
    fixed = Term({"ms": sum(ms for home, ms in costs.float_ms.items() if home not in handed_on)})
    due = [term for term in terms if term.cases and any(term.amounts.values())]
    needs = [
        Need(u.name, _INTEGERS, tuple((n, _INTEGERS) for n in some))
        for u in wiring.units
        for some in (u.needs, u.feeds)
        if some
    ]
    always = (FLOAT, INTEGER) if floats else (INTEGER,)
    choices = {u.name: (*always, NARROW) if u.name in narrow else always for u in wiring.units}
    return Problem(choices, (fixed, *due), tuple(needs))


def _link_terms(link: Link, costs: Costs) -> list[Term]:
    """Return what a link costs in time: itself, and the steps from float to integers and back."""
    tensor, producer = link.tensor, link.producer
    readers = [r for r in link.readers if r is not None]
    if producer is None:
        return [Term({"ms": costs.enter_ms[tensor]}, tuple(((r, _INTEGERS),) for r in readers))]
    back: list[tuple[Literal, ...]] = [((producer, _INTEGERS), (r, _FLOATS)) for r in readers]
    if None in link.readers:
        back = [((producer, _INTEGERS),)]
    return [
        Term({"ms": costs.float_ms[tensor]}, (((producer, _FLOATS),),)),
        Term({"ms": costs.integer_ms[tensor]}, (((producer, _INTEGERS),),)),
        Term({"ms": costs.enter_ms[tensor]}, tuple(((producer, _FLOATS), (r, _INTEGERS)) for r in readers)),
        Term({"ms": costs.leave_ms[tensor]}, tuple(back)),
    ]
