"""Samples in batches: decoded by a pool of threads, a bounded number ahead of the consumer."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .box_labels import BoxLabels
from .sources import Feed, Item

#: More threads than this decode no faster than a model can run on the same machine.
_MOST_WORKERS = 8

#: One sample as it was read: a feed for each way of preparing it.
Read = tuple[Item, tuple[Feed, ...]]


@dataclass(eq=False)
class Batch:
    """`count` samples: `feed` maps input names to arrays whose first dimension is the batch, of `rows` rows.

    Where the model's batch is fixed, or padding was asked for, there may be more rows than `count`: the last sample
    repeated. `labels` (int64, `count`) is None for folders without classes; `names` are the items' names, by which
    `box_labels` has the objects on the images, where it was asked for and there is any.
    """

    feed: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    names: tuple[str, ...]
    count: int
    rows: int
    box_labels: BoxLabels | None = None


def decoded(
    read: Callable[[Sequence[Item]], list[Read]], items: Sequence[Item], size: int, workers: int
) -> Iterator[Read]:
    """Yield what `read` makes of the items, in order; it is called in threads, for `size` items at once.

    At most `workers` + 2 times `size` samples are held.
    """
    chunks = (items[i : i + size] for i in range(0, len(items), size))
    pending: deque[Future[list[Read]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="edgec-decode") as pool:
        try:
            for chunk in itertools.islice(chunks, workers + 1):
                pending.append(pool.submit(read, chunk))
            while pending:
                ready = pending.popleft().result()
                pending.extend(pool.submit(read, chunk) for chunk in itertools.islice(chunks, 1))
                yield from ready
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def grouped(reads: Iterable[Read], size: int) -> Iterator[list[Read]]:
    """Yield up to `size` samples at a time: fewer at the end, and where the arrays' shapes change."""
    group: list[Read] = []
    for read in reads:
        if group and _shapes(group[0]) != _shapes(read):
            yield group
            group = []
        group.append(read)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def stacked(feeds: Sequence[Feed], rows: int) -> dict[str, np.ndarray]:
    """Return the feeds in one; where there are fewer than `rows`, the last one is repeated."""
    padded = [*feeds, *[feeds[-1]] * (rows - len(feeds))]
    if len(padded) == 1:
        return dict(padded[0])
    return {name: np.concatenate([feed[name] for feed in padded]) for name in padded[0]}


def workers_of(asked: int | None) -> int:
    """Return how many threads decode."""
    return asked or min(cores(), _MOST_WORKERS)


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shapes(read: Read) -> list[dict[str, tuple[int, ...]]]:
    return [{name: array.shape for name, array in feed.items()} for feed in read[1]]
