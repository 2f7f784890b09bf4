"""What a Reshape does to an array that does not depend on some of its axes.

Such an array has size 1 along those axes, whatever the tensor's dimension there (which may be unknown). A row-major
reshape splits into independent blocks wherever the products of the dimensions before a cut, or behind it, are equal:

    (N, 48, H, W) -> (N, 2, 24, HW)      N | 48 | H W      ->      N | 2 24 | HW

A block along whose axes nothing depends stays so. The others must be written out, for which their dimensions have to
be known; where they are not, the array must be made independent of the block's axes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: A dimension: known, a name (equal names are equal numbers), or nothing known.
Dim = int | str | None

#: Arrays are written out up to this many elements.
LARGEST = 1 << 22


class Reshaping(NamedTuple):
    """How to reshape: make the array independent of the axes `tied`, write it out to `full`, then reshape to `new`."""

    tied: tuple[int, ...]
    full: tuple[int, ...]
    new: tuple[int, ...]


def plan(sizes: Sequence[int], before: Sequence[Dim], after: Sequence[Dim]) -> Reshaping:
    """Plan the reshape of an array of shape `sizes`, each 1 or the dimension in `before`, to dimensions `after`."""
    before = [size if size > 1 else dim for size, dim in zip(sizes, before, strict=True)]
    tied: list[int] = []
    full, new = [1] * len(before), [1] * len(after)
    for ins, outs in _blocks(before, after):
        if all(sizes[i] == 1 for i in ins):
            continue
        written = _written_out([before[i] for i in ins], [after[j] for j in outs])
        if written is None:
            tied.extend(ins)
            continue
        for i, size in zip(ins, written[0], strict=True):
            full[i] = size
        for j, size in zip(outs, written[1], strict=True):
            new[j] = size
    if math.prod(full) > LARGEST:
        return Reshaping(tuple(range(len(before))), (1,) * len(before), (1,) * len(after))
    return Reshaping(tuple(tied), tuple(full), tuple(new))


def shrink(array: np.ndarray) -> np.ndarray:
    """Return `array` with size 1 along every axis on which it does not depend."""
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else None
        if first is not None and (array == first).all():
            array = first
    return array


def _written_out(before: Sequence[Dim], after: Sequence[Dim]) -> tuple[list[int], list[int]] | None:
    """Return both shapes of a block as numbers, one unknown of the second found by division; None if that fails."""
    ins = [dim for dim in before if isinstance(dim, int)]
    known = math.prod(dim for dim in after if isinstance(dim, int))
    missing = sum(not isinstance(dim, int) for dim in after)
    total = math.prod(ins)
    if len(ins) != len(before) or missing > 1 or known == 0 or total % known or (not missing and total != known):
        return None
    return ins, [dim if isinstance(dim, int) else total // known for dim in after]


def _blocks(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Split the axes of both shapes, dimensions of 1 left out, into the smallest blocks that correspond."""
    ins = [i for i, dim in enumerate(before) if dim != 1]
    outs = [j for j, dim in enumerate(after) if dim != 1]
    front = _cuts(_products([before[i] for i in ins]), _products([after[j] for j in outs]))
    back = _cuts(_products([before[i] for i in reversed(ins)]), _products([after[j] for j in reversed(outs)]))
    cuts = {*front, *((len(ins) - i, len(outs) - j) for i, j in back), (len(ins), len(outs))}
    found, start = [], (0, 0)
    for i, j in sorted(cuts):
        if j >= start[1]:  # crossing cuts would contradict each other: a dimension that is 1 at run time
            found.append((ins[start[0] : i], outs[start[1] : j]))
            start = (i, j)
    return found


def _products(dims: Sequence[Dim]) -> list[tuple[int, tuple[str, ...]] | None]:
    """Return the product of the first 1, 2, … dimensions as a number times names; None once one is unknown."""
    found: list[tuple[int, tuple[str, ...]] | None] = []
    number, names, known = 1, [], True
    for dim in dims:
        known = known and dim is not None and dim != 0
        if isinstance(dim, int):
            number *= dim
        elif dim is not None:
            names.append(dim)
        found.append((number, tuple(sorted(names))) if known else None)
    return found


def _cuts(
    before: Sequence[tuple[int, tuple[str, ...]] | None], after: Sequence[tuple[int, tuple[str, ...]] | None]
) -> list[tuple[int, int]]:
    places = {product: j for j, product in enumerate(after, 1) if product is not None}
    return [(i, places[product]) for i, product in enumerate(before, 1) if product in places]
