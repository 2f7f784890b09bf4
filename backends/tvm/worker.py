"""Times libraries in a process of its own, which may crash: `python -m edgec.backends.tvm.worker THREADS`.

A line of JSON in, {"library": PATH, "given": [[shape, dtype], ...], "repeats": N}; a line out, [seconds, ...] or an
error's first line as a string.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import numpy as np


def random(kinds: Sequence[tuple[Sequence[int], str]]) -> list[np.ndarray]:
    """Return random numbers of shapes and dtypes: zeros may take another time.

    Integers that may be indices are zeros: TVM's functions do not look whether there is anything where they read or
    write.
    """
    rng = np.random.default_rng(0)
    found = []
    for shape, dtype in kinds:
        most = {"bool": 2, "int8": 100, "uint8": 100}.get(dtype, 1)
        numbers = rng.random(shape) if "float" in dtype else rng.integers(0, most, shape)
        found.append(np.asarray(numbers).astype(dtype))
    return found


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what TVM says is no answer
    import tvm

    from .threads import use

    use(int(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            module = tvm.runtime.load_module(asked["library"])
            given = [tvm.runtime.tensor(array) for array in random(asked["given"])]
            timer = module.time_evaluator("main", tvm.cpu(), number=1, repeat=asked["repeats"], min_repeat_ms=1)
            answer: object = list(map(float, timer(*given).results))
        except Exception as error:  # TVM raises what it likes
            answer = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
