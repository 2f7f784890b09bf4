"""Which channels to cut, and the weights that make up for it, from sums over calibration images. Pure numpy, float64.

Algebra. A layer reads rows of X (n, in) and shall give the rows of Y (n, out). For its weight V (out, in)

    |Y - X V'|^2 + r |V - W|^2  =  tr (V - T) H (V - T)'  +  what no V can change
    H = X'X + r I        T = W + (Y'X - W X'X) H^-1        r = ridge * mean of X'X's diagonal

so X'X (`gram`) and Y'X (`cross`) are all that is needed of the images (about the means of X and Y where the layer has
a bias, which then takes care of the mean; compiler/quantization/gram.py). W is the weight it had, or 0. Y is not what
the layer itself gave: it is what makes the sum behind a residual Add equal to the unpruned network's, and X is read
behind all cuts that were made before, so that each layer makes up for the errors in front of it.

Cutting a channel s takes its columns from X: V_s = 0. With B = H^-1, the best of the other weights and the price are

    V <- V - V_s B_ss^-1 B_s:           rise = tr V_s B_ss^-1 V_s'          B <- B - B_:s B_ss^-1 B_s:

(structured second-order elimination: Hassibi, Stork 1993, "Second order derivatives for network pruning"; Frantar,
Alistarh 2022, "Optimal Brain Compression"; Kurtic, Frantar, Alistarh 2023, "ZipLM"). The channel with the least rise
goes, until none is left: an order, and the error after each cut. Where several layers read the channel, their rises
are added up. At every point V is exactly what least squares gives for the channels left (`refit`).

Only V_s'V_s and B_ss are needed to find the least rise; with B_ss = L L',

    u = B_:s L^-T    p = V_s L^-T       B <- B - u u'       V <- V - p u'
    V_g'V_g <- V_g'V_g - c_g u_g' - u_g c_g' + u_g p'p u_g'         c = V'p

so B and V are brought up to date for many cuts in one product, and what was cut is left out from then on. Rows of V
count by V'V alone, so of more outputs than inputs only the triangle of V = Q R is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

#: Pull towards the old weight. ResNet-20 at half its MACs, 500 images: 0.001 and 0.01 are alike, 0.1 is a little worse.
RIDGE = 1e-2
#: Ridges to choose from on held-out images: a layer with few rows, or few images behind them, wants a strong one.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: The least ridge: a Gram matrix of few images, or of channels that are always 0, has no inverse.
_LEAST = 1e-10
#: Columns of u that wait for one product.
_PENDING = 256
#: How many steps ahead the allocation looks for the best price: a curve may have a hump.
_AHEAD = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the channels to choose from.

    `gram` X'X (in, in), `cross` Y'X (out, in); `channels` (in,) says which channel each column belongs to, -1 for
    columns that stay. `importance` is what a unit of this layer's squared error counts. `weight` W (out, in), 0 if
    None. A grouped convolution is one reader per group.
    """

    gram: np.ndarray
    cross: np.ndarray
    channels: np.ndarray
    importance: float = 1.0
    weight: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Elimination:
    """The channels in the order in which they go, and the error: `errors[k]` is the rise after k cuts, `errors[0]` 0.

    `errors` (cuts + 1,) float64, in units of the readers' squared error summed over rows; it never falls.
    """

    order: np.ndarray
    errors: np.ndarray

    def kept(self, count: int, cuts: int) -> np.ndarray:
        """Return which of `count` channels are left after so many cuts, ascending."""
        return np.setdiff1d(np.arange(count), self.order[:cuts])


def eliminate(
    readers: Sequence[Reader],
    count: int,
    *,
    lost: np.ndarray | None = None,
    cuts: int | None = None,
    order: Sequence[int] | None = None,
    ridge: float = RIDGE,
) -> Elimination:
    """Cut `cuts` (default: all) of `count` channels one by one, always the one whose loss raises the error least.

    With an `order`, which another criterion may have made, channels go in that.

    `lost` (count,): what cutting each channel costs besides, at readers that cannot be refitted (a residual Add).
    """
    walks = [(_Walk(reader, count, ridge), reader.importance) for reader in readers]
    base = np.zeros(count) if lost is None else lost.astype(np.float64)
    left = np.ones(count, dtype=bool)
    gone, errors = [], [0.0]
    for number in range(count if cuts is None else cuts):
        rises = sum((weight * walk.rises() for walk, weight in walks), base)
        channel = int(np.argmin(np.where(left, rises, np.inf))) if order is None else order[number]
        left[channel] = False
        gone.append(channel)
        errors.append(errors[-1] + float(rises[channel]))
        for walk, _ in walks:
            walk.cut(channel)
    return Elimination(np.array(gone, dtype=np.intp), np.array(errors))


def refit(
    gram: np.ndarray, cross: np.ndarray, kept: np.ndarray, ridge: float = RIDGE, weight: np.ndarray | None = None
) -> np.ndarray:
    """Return the best weights (out, len(kept)) of the columns `kept`, the others being cut.

    `gram` (in, in), `cross` and `weight` (out, in) are those of all columns. The least of
    |Y - X_kept V'|^2 + r |V - W_kept|^2.
    """
    part = gram[np.ix_(kept, kept)]
    old = np.zeros((len(cross), len(kept))) if weight is None else weight[:, kept].astype(np.float64)
    pull = cross[:, kept] - old @ part
    shift: np.ndarray = np.linalg.solve(part + _pull(gram, ridge) * np.eye(len(kept)), pull.T).T
    shift += old
    return shift


def squared_error(gram: np.ndarray, cross: np.ndarray, weight: np.ndarray, energy: float = 0.0) -> float:
    """Return |Y - X V'|^2 from the sums; without `energy`, |Y|^2, it is that less |Y|^2."""
    return float(((weight @ gram - 2 * cross) * weight).sum()) + energy


def choose_ridge(
    fitted: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    kept: np.ndarray,
    weight: np.ndarray | None = None,
    ridges: Iterable[float] = RIDGES,
) -> float:
    """Return the ridge whose refit errs least on other images. `fitted` and `held_out` are (gram, cross) of the two."""
    ridges = tuple(ridges)
    return ridges[int(np.argmin(held_out_errors(fitted, held_out, kept, weight, ridges)))]


def held_out_errors(
    fitted: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    kept: np.ndarray,
    weight: np.ndarray | None = None,
    ridges: Iterable[float] = RIDGES,
) -> np.ndarray:
    """Return what the refit to `fitted` errs on other images with each ridge, less |Y|^2 of those."""
    gram, cross = held_out[0][np.ix_(kept, kept)], held_out[1][:, kept]
    return np.array([squared_error(gram, cross, refit(*fitted, kept, ridge, weight)) for ridge in ridges])


# ------------------------------------------------------------------------------------------- allocation


def measured_curve(errors: np.ndarray, cuts: Sequence[int], losses: Sequence[float]) -> np.ndarray:
    """Return what the network loses after each number of cuts, `errors` of one group scaled to measured `losses`.

    The loss (such as the mean squared error of the logits) is nearly a multiple of the group's own error; the factor
    is interpolated between the numbers of `cuts` at which it was measured. Never falls.
    """
    at = errors[np.asarray(cuts)]
    known = at > 0
    if not known.any():
        return np.zeros_like(errors)
    rising = np.argsort(at[known], kind="stable")
    factors = np.asarray(losses, dtype=np.float64)[known] / at[known]
    curve = errors * np.interp(errors, at[known][rising], factors[rising])
    return np.maximum.accumulate(np.maximum(curve, 0.0))


def allocate(
    curves: Sequence[np.ndarray],
    cost: Callable[[Sequence[int]], float],
    budget: float,
    *,
    steps: Sequence[int] | None = None,
    least: Sequence[int] | None = None,
) -> list[int]:
    """Return how many channels to cut of each group so that `cost` is at most `budget`, or as near as it goes.

    `curves[i][k]` is the loss after k cuts in group i; losses of groups are added up. `cost` takes the cuts of all
    groups. `steps` are the multiples in which a group is cut, `least` how many channels must stay (1 each). Greedy by
    loss per saving, looking ahead over humps of a curve and steps that save nothing; a cut that saves nothing within
    sight is not made.
    """
    sizes = steps or [1] * len(curves)
    most = [len(c) - 1 - stay for c, stay in zip(curves, least or [1] * len(curves), strict=True)]
    cuts = [0] * len(curves)
    now = cost(cuts)
    while now > budget:
        moves = ((i, cuts[i] + ahead * size) for i, size in enumerate(sizes) for ahead in _AHEAD)
        rated = [(_price(curves[i], cuts, i, to, now, cost), to, i) for i, to in moves if to <= most[i]]
        price, to, group = min(rated, default=(np.inf, 0, 0))
        if not np.isfinite(price):
            break
        cuts[group] = to
        now = cost(cuts)
    return cuts


def _price(
    curve: np.ndarray, cuts: list[int], group: int, to: int, now: float, cost: Callable[[Sequence[int]], float]
) -> float:
    saved = now - cost([to if i == group else k for i, k in enumerate(cuts)])
    return float(curve[to] - curve[cuts[group]]) / saved if saved > 0 else np.inf


# ------------------------------------------------------------------------------------------- the walk


class _Walk:
    """B and V of one reader while channels go. Columns: channel after channel, each of `width`, then those that stay.

    A channel with fewer columns than the widest is filled up with columns that nothing depends on.
    """

    def __init__(self, reader: Reader, count: int, ridge: float) -> None:
        counts = np.bincount(reader.channels[reader.channels >= 0], minlength=count)
        self._width = int(counts.max(initial=0))
        columns = np.argsort(reader.channels, kind="stable")
        staying, columns = np.split(columns, [len(columns) - counts.sum()])
        owners = reader.channels[columns]
        first = np.cumsum(counts) - counts
        at = owners * self._width + np.arange(len(columns)) - first[owners]
        at = np.concatenate([at, count * self._width + np.arange(len(staying))]).astype(np.intp)
        columns = np.concatenate([columns, staying])
        inverse, target = _solved(reader, ridge)
        size = count * self._width + len(staying)
        self._inverse, self._target = np.eye(size), np.zeros((len(target), size))
        self._inverse[np.ix_(at, at)] = inverse[np.ix_(columns, columns)]
        self._target[:, at] = target[:, columns]
        self._place = np.arange(count)  # a channel's place among the blocks; -1 when it is gone
        self._forget()

    def rises(self) -> np.ndarray:
        """Return what cutting each channel would add to the squared error; of no meaning for those that are gone."""
        found = np.trace(np.linalg.solve(self._blocks, self._energy), axis1=1, axis2=2)
        return np.where(self._place >= 0, np.maximum(found, 0.0)[self._place], 0.0)

    def cut(self, channel: int) -> None:
        """Take a channel out, the other weights making up for it."""
        place, width = int(self._place[channel]), self._width
        part = slice(place * width, (place + 1) * width)
        u, p = self._u[:, : self._used], self._p[:, : self._used]
        column = self._inverse[:, part] - u @ u[part].T
        factor = np.linalg.cholesky(column[part])
        new_u = np.linalg.solve(factor, column.T).T
        new_p = np.linalg.solve(factor, (self._target[:, part] - p @ u[part].T).T).T
        shared = self._target.T @ new_p - u @ (p.T @ new_p)
        mine, theirs = (a[: self._blocks[:, 0].size].reshape(-1, width, width) for a in (new_u, shared))
        back = mine.swapaxes(1, 2)
        self._blocks -= mine @ back
        crossed = theirs @ back
        self._energy += mine @ (new_p.T @ new_p) @ back - crossed - crossed.swapaxes(1, 2)
        self._blocks[place], self._energy[place] = np.eye(width), 0.0
        self._u[:, self._used : self._used + width], self._p[:, self._used : self._used + width] = new_u, new_p
        self._used += width
        self._place[channel] = -1
        if self._used + width > self._u.shape[1]:
            self._catch_up()

    def _catch_up(self) -> None:
        """Bring B and V up to date, without the channels that are gone."""
        channels = np.flatnonzero(self._place >= 0)
        channels = channels[np.argsort(self._place[channels])]
        blocks = self._place[channels, None] * self._width + np.arange(self._width)
        rest = np.arange(len(self._blocks) * self._width, len(self._inverse))
        stay = np.concatenate([blocks.ravel(), rest])
        u, p = self._u[stay, : self._used], self._p[:, : self._used]
        inverse = self._inverse[np.ix_(stay, stay)]
        inverse -= u @ u.T
        self._inverse, self._target = inverse, self._target[:, stay] - p @ u.T
        self._place[channels] = np.arange(len(channels))
        self._forget()

    def _forget(self) -> None:
        """Start with nothing pending: B and V as they are."""
        count, width = int((self._place >= 0).sum()), self._width
        each = np.arange(count)
        self._target = _rows(self._target)
        inner = self._inverse[: count * width, : count * width].reshape(count, width, count, width)
        self._blocks = inner[each, :, each, :].copy()
        parts = self._target[:, : count * width].reshape(len(self._target), count, width).swapaxes(0, 1)
        self._energy = parts.swapaxes(1, 2) @ parts
        room = max(_PENDING // max(width, 1), 1) * width
        self._u, self._p = np.zeros((len(self._inverse), room)), np.zeros((len(self._target), room))
        self._used = 0


def _solved(reader: Reader, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Return H^-1 and T."""
    old = 0.0 if reader.weight is None else reader.weight.astype(np.float64)
    inverse = np.linalg.inv(reader.gram + _pull(reader.gram, ridge) * np.eye(len(reader.gram)))
    inverse = (inverse + inverse.T) / 2
    owed = reader.cross if reader.weight is None else reader.cross - old @ reader.gram
    return inverse, old + owed @ inverse


def _rows(target: np.ndarray) -> np.ndarray:
    """Return a matrix with the same V'V and no more rows than columns."""
    rows, columns = target.shape
    return target if rows <= columns else np.asarray(np.linalg.qr(target, mode="r"))


def _pull(gram: np.ndarray, ridge: float) -> float:
    """Return r; 1 for a layer that reads nothing but zeros, where any weight is as good."""
    energy = float(np.trace(gram)) / len(gram)
    return max(ridge, _LEAST) * energy if energy > 0 else 1.0
