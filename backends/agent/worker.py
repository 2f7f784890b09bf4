"""One job, in a process of its own: a runtime may crash here and take nothing else with it.

What happens is appended to events.jsonl in the job's folder, one JSON object a line. The last one is "done" with the
result, "fault" with what the person can do about it, or "bug".
"""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from typing import Any, Callable, Dict, List, Optional

from . import engines, measuring, onnx_runtime, power, probe, tvm_module
from .faults import Fault
from .folders import locked
from .lock import BoardLock
from .lock import path as lock_path
from .opened import Opened, Tell
from .tensors import Tensor

#: Seconds without an owner after which a job ends by itself and takes its session's folder with it.
_ORPHANED = 30.0

#: How a model is opened, by the runtime that its entry names.
RUNTIMES: Dict[str, Callable[[Dict[str, Any], Dict[str, Any], Tell], Opened]] = {
    "onnxruntime": onnx_runtime.open_model,
    "tensorrt": engines.open_model,
    "tvm": tvm_module.open_model,
}


class Events:
    """The job's events; progress is told a few times a second at most."""

    def __init__(self, folder: str) -> None:
        self._file = open(os.path.join(folder, "events.jsonl"), "a")  # noqa: SIM115  # open to the end
        self._last, self._stage = 0.0, ""

    def add(self, event: Dict[str, Any]) -> None:
        """Write an event so that it can be read at once."""
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def tell(self, stage: str, done: int, total: Optional[int]) -> None:
        """Tell how far something is."""
        now = time.monotonic()
        if stage == self._stage and now - self._last < 0.3:
            return
        self._last, self._stage = now, stage
        self.add({"event": "progress", "stage": stage, "done": done, "total": total})


def work(folder: str) -> int:
    """Do the job whose folder this is."""
    lock = locked(os.path.join(folder, "worker.lock"))
    events = Events(folder)
    try:
        with open(os.path.join(folder, "job.json")) as file:
            job = json.load(file)
        folder = os.path.abspath(folder)
        os.chdir(job.get("session") or job.get("folder") or os.getcwd())  # a job's files are named from there
        if "session" in job:
            threading.Thread(target=_watch, args=(job["session"],), daemon=True).start()
        result = KINDS[job["kind"]](job, folder, events)
        events.add({"event": "done", "result": result})
    except Fault as fault:
        events.add(dict(fault.message(), event="fault"))
    except MemoryError:
        what = "the device's memory is not enough for it"
        events.add({"event": "fault", "what": what, "fix": "stop other programs there", "nodes": []})
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the device's disk is full" if full else "%s: %s" % (error.filename, error.strerror or error)
        events.add({"event": "fault", "what": what, "fix": "make room on the device" if full else None, "nodes": []})
    except Exception:  # a fault of ours: the other end raises it with this traceback
        events.add({"event": "bug", "what": traceback.format_exc()})
        return 1
    finally:
        if lock is not None:
            lock.close()
    return 0


def _watch(session: str) -> None:
    """End with the session: where nobody owns its folder for a while, nobody will come for the result."""
    alone = 0
    while alone < _ORPHANED:
        time.sleep(1)
        free = locked(os.path.join(session, "owner.lock")) if os.path.isdir(session) else None
        if free is not None:
            free.close()
        alone = alone + 1 if free is not None or not os.path.isdir(session) else 0
    shutil.rmtree(session, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # with what it started, a trtexec that builds


# ------------------------------------------------------------------------------------------------ kinds


def _probe(job: Dict[str, Any], folder: str, events: Events) -> Dict[str, Any]:
    return probe.probe()


def _measure(job: Dict[str, Any], folder: str, events: Events) -> Dict[str, Any]:
    """Build and open the models, and measure what opened; a model that does not is said, and the others go on."""
    with _board(job, events):
        sensors = power.Sensors()
        opened, entries = _opened(job, events)
        before = sensors.state()
        try:
            for name, fault in _feed(job, opened).items():
                entries[name] = {"fault": fault.message()}
                opened.pop(name).close()
            if opened:
                entries.update(measuring.measure(opened, job, sensors, events.tell))
            for name, seconds in _again(job, opened, events):
                entries[name].setdefault("builds", []).append(seconds)
        finally:
            for one in opened.values():
                one.close()
        after = sensors.state()
    notes = [measuring.state_in_words(before, after)] + power.compare(before, after)
    files = engines.timings(job, folder)
    notes = [note for note in notes if note]
    return {"models": entries, "before": before, "after": after, "notes": notes, "files": files}


def _board(job: Dict[str, Any], events: Events) -> BoardLock:
    return BoardLock(job.get("lock") or lock_path(), job.get("who", "somebody"), events.tell)


def _opened(job: Dict[str, Any], events: Events) -> Any:
    opened: Dict[str, Opened] = {}
    entries: Dict[str, Any] = {}
    for model in job["models"]:
        try:
            opened[model["name"]] = RUNTIMES[model["runtime"]](model, job, events.tell)
        except Fault as fault:
            entries[model["name"]] = {"fault": fault.message()}
    return opened, entries


def _again(job: Dict[str, Any], opened: Dict[str, Opened], events: Events) -> List[Any]:
    """Build engines anew and measure those, as often as asked: no two builds choose the same kernels."""
    found = []
    for n in range(1, int(job.get("builds", 1))):
        for model in job["models"]:
            if model["runtime"] != "tensorrt" or model["name"] not in opened:
                continue
            try:
                one = engines.open_model(dict(model, build=n), job, events.tell)
            except Fault:
                continue  # for want of memory: all are open already
            try:
                if not _feed(job, {model["name"]: one}):
                    found.append((model["name"], measuring.median_of(one, float(job.get("seconds", 4.0)) / 4)))
            finally:
                one.close()
    return found


def _run(job: Dict[str, Any], folder: str, events: Events) -> Dict[str, Any]:
    """Run one model once and write its outputs."""
    (model,) = job["models"]
    with _board(job, events):
        one = RUNTIMES[model["runtime"]](model, job, events.tell)
        try:
            for fault in _feed(job, {model["name"]: one}).values():
                raise fault
            found = one.read()
        finally:
            one.close()
    outputs: List[Dict[str, Any]] = []
    for n, (name, tensor) in enumerate(sorted(found.items())):
        with open(os.path.join(folder, "output-%d.bin" % n), "wb") as file:
            file.write(tensor.data)
        outputs.append({"name": name, "dtype": tensor.dtype, "shape": tensor.shape, "file": "output-%d.bin" % n})
    return {"outputs": outputs, "provider": one.provider, "files": [o["file"] for o in outputs]}


def _build(job: Dict[str, Any], folder: str, events: Events) -> Dict[str, Any]:
    """Build engines only, to see whether they build; each with what it was built from, or why it was not."""
    with _board(job, events):
        found: Dict[str, Any] = {}
        files: List[str] = []
        for model in job["models"]:
            try:
                found[model["name"]] = facts = engines.built(model, job, events.tell)
                if job.get("keep"):
                    os.link(facts["engine"], os.path.join(folder, model["name"]))
                    files.append(model["name"])
            except Fault as fault:
                found[model["name"]] = {"fault": fault.message()}
    return {"models": found, "files": files + engines.timings(job, folder)}


def _feed(job: Dict[str, Any], opened: Dict[str, Opened]) -> Dict[str, Fault]:
    """Give all their input and run each once; return what went wrong, by model."""
    tensors = {}
    for name, said in job["feed"].items():
        with open(said["file"], "rb") as file:
            tensors[name] = Tensor(said["dtype"], said["shape"], file.read())
    faults = {}
    for name, one in opened.items():
        try:
            one.feed(tensors)
            one.call()
        except Fault as fault:
            faults[name] = fault
    return faults


KINDS: Dict[str, Callable[[Dict[str, Any], str, Events], Dict[str, Any]]] = {
    "probe": _probe,
    "measure": _measure,
    "run": _run,
    "build": _build,
}


def main() -> int:
    """Do the job in the folder that the command line names."""
    return work(sys.argv[2])
