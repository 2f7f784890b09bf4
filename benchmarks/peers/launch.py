"""Run a command under a time limit and note what it took.

    python launch.py LIMIT_S RESULT_JSON COMMAND…

Writes {"exit", "wall_s", "cpu_s", "peak_mb"}; exit is null where the limit was reached. It is a process of its own
because Linux counts what the parent had in memory towards the child's peak: this one has next to nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Run the command in a session of its own, which is killed as a whole when the time is over."""
    limit, result, command = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    wall = time.perf_counter() - start
    with contextlib.suppress(ProcessLookupError):  # also what the command may have left running
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"exit": code, "wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
