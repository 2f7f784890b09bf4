"""TVM's threads in this process."""

from __future__ import annotations

import os

from ...compiler import devices


def use(threads: int) -> int:
    """Let TVM's functions here run on so many threads, 0: all cores; return how many they are.

    TVM takes half of an x86 machine's CPUs at most, since two may be one core, unless this variable says otherwise.
    """
    import tvm

    count = threads or devices.usable_cores()
    os.environ.setdefault("TVM_NUM_THREADS", str(max(count, devices.usable_cores())))
    tvm.get_global_func("runtime.config_threadpool")(1, count)
    return int(tvm.get_global_func("runtime.NumThreads")())
