"""Which layer becomes what: one choice for each, the least sum of errors within a limit, as an integer program.

    minimise    sum over l, j of e_lj x_lj
    subject to  sum over j of x_lj = 1 for each l,      sum over l, j of c_lj x_lj <= limit,      x_lj in {0, 1}

(multiple-choice knapsack; HiGHS solves it by branch and bound.) Errors of layers are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .menu import Item

#: An error of so many times the signal is noise, however large: a few of them would hide the others from the solver.
_NOISE = 4.0


def allocate(menu: Mapping[str, Sequence[Item]], cost: Callable[[Item], float], limit: float) -> dict[str, Item] | None:
    """Return an item for each layer so that the cost is at most `limit`; None where nothing is that cheap."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # heavy

    items = [(name, item) for name, offered in menu.items() for item in offered]
    if not items:
        return None
    costs = np.array([cost(item) for _, item in items])
    errors = np.minimum([item.error for _, item in items], _NOISE)
    layers = list(menu)
    one = np.array([[float(name == layer) for name, _ in items] for layer in layers])
    scale = max(float(costs.sum()), 1e-12)
    found = milp(
        errors / max(float(errors.max(initial=0.0)), 1e-12),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(costs[None] / scale, -np.inf, limit / scale)],
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        options={"time_limit": 20.0, "mip_rel_gap": 1e-4},
    )
    if found.x is None:
        return None
    return {name: item for (name, item), taken in zip(items, found.x, strict=True) if taken > 0.5}
