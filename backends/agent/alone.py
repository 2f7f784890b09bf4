"""The program by itself, in a bundle that was carried to the device: it builds, measures and writes down what came out.

    python3 BUNDLE/edgec-device.pyz [--builds N] [--seconds S] [--profile]

recipe.json beside it says what to measure. It writes measurement.json, and model.engine where an engine was built;
`edgec bench BUNDLE` then takes the measurement into the report.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional

from . import lock, probe
from .jobs import Job

RECIPE, MEASUREMENT, ENGINE = "recipe.json", "measurement.json", "model.engine"
_TICK = 0.1


def main(words: List[str]) -> int:
    """Measure the bundle; the exit code is 0 where a measurement was written, 4 where the device cannot."""
    parser = argparse.ArgumentParser(prog="edgec-device.pyz", description="Build and measure this bundle here.")
    parser.add_argument("--builds", type=int, default=1, help="build each engine so often, for an error bar")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure")
    parser.add_argument("--profile", action="store_true", help="time each kernel as well")
    asked = parser.parse_args(words)
    folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    try:
        with open(os.path.join(folder, RECIPE)) as file:
            recipe = json.load(file)
    except (OSError, ValueError) as error:
        return _failed("%s: %s" % (RECIPE, error), "run it where edgec compile put it: in a bundle")
    if not os.access(folder, os.W_OK):
        return _failed("%s cannot be written" % folder, "copy the bundle to where you may write")
    for sign in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(sign, lambda *_: sys.exit(2))  # so that what runs is ended, and its folder removed
    recipe.update(builds=asked.builds, seconds=asked.seconds, profile=asked.profile, who=_me())
    found = probe.probe()
    _say("this device: %s" % _named(found))
    work = tempfile.mkdtemp(prefix="edgec-alone-")
    try:
        result = _done(recipe, folder, work)
        if result is None:
            return 4
        fault = result["models"][recipe["baseline"]].get("fault")
        if fault is not None:
            _failed(fault["what"], fault.get("fix"))
            return 4
        return _written(recipe, result, found, folder, work)
    except OSError as error:
        return _failed("%s: %s" % (error.filename or folder, error.strerror or error), "make room for it")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _written(recipe: Dict[str, Any], result: Dict[str, Any], found: Dict[str, Any], folder: str, work: str) -> int:
    """Write what was measured and built into the bundle, and show it."""
    kept = _keep_engine(recipe, result, folder, work)
    document = {"format": 1, "probe": found, "result": result, "sha256": _hashes(recipe, folder), "engine": kept}
    part = os.path.join(folder, MEASUREMENT + ".part")
    with open(part, "w") as file:
        json.dump(document, file, indent=1)
    os.rename(part, os.path.join(folder, MEASUREMENT))
    _show(recipe, result)
    _say("written: %s; carry the folder back, and `edgec bench` takes it into the report" % MEASUREMENT)
    return 0


def _done(recipe: Dict[str, Any], folder: str, work: str) -> Optional[Dict[str, Any]]:
    """Run the recipe as a job in a process of its own; None where it failed, which is said."""
    job = Job(os.path.join(work, "job"))
    spec = dict(recipe, folder=folder, engines=os.path.join(work, "engines"), lock=lock.path())
    job.start(spec)
    try:
        while True:
            ended = not job.alive()
            event = job.next()
            if event is None and not ended:
                time.sleep(_TICK)
                continue
            event = event or job.obituary()
            if event["event"] == "progress":
                _progress(event)
            elif event["event"] == "done":
                _clear()
                return dict(event["result"])
            else:
                _clear()
                _failed("%s %s" % (event["what"], "; ".join(event.get("said", []))), event.get("fix"))
                return None
    finally:
        job.kill()


def _keep_engine(recipe: Dict[str, Any], result: Dict[str, Any], folder: str, work: str) -> Optional[Dict[str, Any]]:
    """Put the result's engine into the bundle, with what it is tied to."""
    built = result["models"].get(recipe["models"][0]["name"], {}).get("built")
    if not built or not os.path.exists(built["engine"]):
        return None
    shutil.copyfile(built["engine"], os.path.join(folder, ENGINE + ".part"))
    os.rename(os.path.join(folder, ENGINE + ".part"), os.path.join(folder, ENGINE))
    with open(os.path.join(folder, ENGINE + ".json"), "w") as file:
        json.dump(dict(built, engine=ENGINE), file, indent=1)
    return dict(built, engine=ENGINE)


def _hashes(recipe: Dict[str, Any], folder: str) -> Dict[str, str]:
    """Return the hashes of the files that were measured, by their names in the bundle."""
    found = {}
    for model in recipe["models"]:
        for role, name in model["files"].items():
            if role != "engine":
                with open(os.path.join(folder, name), "rb") as file:
                    found[name] = hashlib.sha256(file.read()).hexdigest()
    return found


# -------------------------------------------------------------------------------------------- what is shown


def _show(recipe: Dict[str, Any], result: Dict[str, Any]) -> None:
    """Print the medians; everything else is for the report."""
    rows = [["model", "median ms", "p90 ms", "p99 ms", "calls", "by"]]
    for model in recipe["models"]:
        one = result["models"][model["name"]]
        if "fault" in one:
            rows.append([model["name"], "-", "-", "-", "0", one["fault"]["what"]])
            continue
        calls = sorted(one["calls"])
        ranks = [calls[min(int(q * len(calls)), len(calls) - 1)] for q in (0.5, 0.9, 0.99)]
        rows.append([model["name"]] + ["%.4g" % ms for ms in ranks] + [str(len(calls)), one["provider"]])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:-1], widths[1:])]
        print("  ".join(cells + [row[-1]]))
    for note in result.get("notes", []):
        print("note: %s" % note)


def _progress(event: Dict[str, Any]) -> None:
    if sys.stderr.isatty():
        total = "" if event["total"] is None else " of %d" % event["total"]
        sys.stderr.write("\r\033[K%s: %d%s" % (event["stage"], event["done"], total))
        sys.stderr.flush()


def _clear() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


def _say(text: str) -> None:
    print(text)


def _failed(what: str, fix: Optional[str]) -> int:
    sys.stderr.write("error: %s\n" % what.strip() + ("  fix: %s\n" % fix if fix else ""))
    return 2


def _named(found: Dict[str, Any]) -> str:
    parts = [found.get("model") or found.get("arch"), found.get("tensorrt") and "TensorRT %s" % found["tensorrt"]]
    return ", ".join(str(part) for part in parts if part)


def _me() -> str:
    return "%s@%s" % (os.environ.get("USER", "somebody"), os.uname().nodename)
