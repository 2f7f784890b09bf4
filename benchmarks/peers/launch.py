"""Run a command under a time limit and note what it took.

    python launch.py LIMIT_S RESULT_JSON COMMAND…

The limit is of CPU time, since the machine may be shared; of wall time, three times as much. Writes {"exit", "cpu_s",
"peak_mb"}; exit is null where the limit was reached. It is a process of its own because Linux counts what the parent
had in memory towards the child's peak: this one has next to nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the command in a session of its own, which is killed as a whole at the end."""
    limit, result, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # inherited; this process itself needs next to none
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    code = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(3 * limit)
    finally:  # an interrupt too ends the command, and all that it may have left running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    stopped = code is None or code in (-signal.SIGXCPU, -signal.SIGKILL) and cpu >= limit - 1
    found = {"exit": None if stopped else code, "cpu_s": cpu, "peak_mb": used.ru_maxrss / 1024}
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
