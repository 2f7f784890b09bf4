"""TensorRT engines on the device: built by the Python module or by trtexec, whichever is there, and kept for a session.

An engine belongs to the TensorRT version, the GPU and the driver that it was built with. One that comes with a model is
opened only where all of these are the same; else the reason is said and it is built anew from the ONNX file.
"""

import hashlib
import json
import os
import shutil
from typing import Any, Dict, List, Optional

from . import tensorrt_build, tensorrt_engine, tensorrt_identity, tensorrt_rules, trtexec, trtexec_engine, trtexec_run
from .faults import Fault
from .folders import digest
from .opened import Opened, Tell

#: Where engines lie, in the session's folder, and beside them the timing cache that all builds of a session share.
FOLDER, TIMINGS = "engines", "timing.cache"
#: Seconds that trtexec measures in one block.
_BLOCK = 2.0
_NEITHER = "the device has neither a TensorRT for its python3 nor trtexec"
_INSTALL = "on a Jetson: sudo apt install nvidia-jetpack; on a desktop: python3 -m pip install tensorrt"


def open_model(model: Dict[str, Any], job: Dict[str, Any], tell: Tell) -> Opened:
    """Return an opened engine, built where it is not there yet. Fault where it does not build or open."""
    facts = built(model, job, tell)
    shapes = {name: said["shape"] for name, said in job.get("feed", {}).items()}
    tell("opening %s" % model["name"], 0, None)
    one: Any = None
    if facts["with"] == "python":
        core = model.get("options", {}).get("dla_core")
        one = tensorrt_engine.open_engine(facts["engine"], shapes, tell, dla_core=core)
    else:
        binary = _binary()
        one = trtexec.open_engine(facts["engine"], shapes, binary, _BLOCK)
    one.facts = {"built": facts}
    opened: Opened = one
    return opened


def built(model: Dict[str, Any], job: Dict[str, Any], tell: Tell) -> Dict[str, Any]:
    """Return what is to be known of a model's engine, which is built unless it is there. Fault where that fails."""
    folder = job.get("engines") or FOLDER
    os.makedirs(folder, exist_ok=True)
    key = _key(model)
    path, said = os.path.join(folder, key + ".engine"), os.path.join(folder, key + ".json")
    if os.path.exists(said) and os.path.exists(path):
        with open(said) as file:
            kept: Dict[str, Any] = json.load(file)
        return kept
    way = _way(model)
    here = _identity(way)
    # another build is asked for to see how builds differ: what came along is one of them already
    carried = None if model.get("build") else _carried(model, way, here)
    if carried is True:
        shutil.copyfile(model["files"]["engine"], path)
        if way == "trtexec":
            trtexec_engine.Beside.of(model["options"]["carried"]["beside"]).write(path)
        facts: Dict[str, Any] = {"engine": path, "with": way, "identity": here, "carried": True}
        facts.update(seconds=0.0, bytes=os.path.getsize(path))
    else:
        facts = _build(model, path, way, os.path.join(folder, TIMINGS), tell)
        facts.update(identity=here, rebuilt=carried)
        if way == "trtexec":
            facts["beside"] = trtexec_engine.beside(path)._asdict()
    with open(said + ".part", "w") as file:
        json.dump(facts, file)
    os.rename(said + ".part", said)
    return facts


def _build(model: Dict[str, Any], path: str, way: str, timings: str, tell: Tell) -> Dict[str, Any]:
    options, files = model.get("options", {}), model["files"]
    cache = files.get("timings")
    if cache and not os.path.exists(timings) and os.path.exists(cache):
        shutil.copyfile(cache, timings)
    request = tensorrt_build.Request(
        weak=files.get("weak"),
        strong=files.get("strong"),
        precision=options.get("precision", "fp32"),
        engine=path,
        shapes={name: (s[0], s[1], s[2]) for name, s in options.get("shapes", {}).items()},
        workspace=options.get("workspace"),
        # another build of the same model shall time its kernels itself: the cache would repeat the first one's choice
        timing_cache=None if model.get("build") else timings,
        typing=options.get("typing"),
        level=options.get("level"),
        dla_core=options.get("dla_core"),
        ranges=options.get("ranges"),
    )

    def named(stage: str, done: int, total: Optional[int]) -> None:
        tell("building %s: %s" % (model["name"], stage), done, total)

    done = tensorrt_build.build(request, named) if way == "python" else trtexec.build(request, named, _binary())
    return {
        "engine": done.engine,
        "with": way,
        "version": done.version,
        "typing": done.typing,
        "source": os.path.basename(done.source),
        "sha256": digest(done.source),
        "precision": request.precision,
        "shapes": options.get("shapes", {}),
        "flags": done.flags,
        "seconds": done.seconds,
        "bytes": done.size,
        "warnings": done.warnings,
    }


def timings(job: Dict[str, Any], folder: str) -> List[str]:
    """Put the timing cache of what was built into a job's folder; return its name there, nothing where none is."""
    path = os.path.join(job.get("engines") or FOLDER, TIMINGS)
    if not os.path.exists(path):
        return []
    shutil.copyfile(path, os.path.join(folder, TIMINGS))
    return [TIMINGS]


def _identity(way: str) -> Dict[str, Any]:
    """Return what engines that are built here are tied to."""
    if way == "python":
        return dict(tensorrt_build.identity())
    found = trtexec_run.device(_binary())
    return dict(tensorrt_identity.of_gpu(tensorrt_rules.named(found.version), found.capability))


def _carried(model: Dict[str, Any], way: str, here: Dict[str, Any]) -> Any:
    """Return True where the engine that came along can be opened here, why not, or None where none came along."""
    saved = model.get("options", {}).get("carried")
    if not model["files"].get("engine") or not saved:
        return None
    if saved.get("shapes", {}) != model["options"].get("shapes", {}):
        return "the engine was built for inputs of other shapes"
    if way == "trtexec" and "beside" not in saved:
        return "the engine was not built by trtexec, which cannot tell what it reads"
    compared = {key: value for key, value in saved["identity"].items() if key in here}
    return tensorrt_build.mismatch(compared, {key: here[key] for key in compared}) or True


def _way(model: Dict[str, Any]) -> str:
    """Return how engines are built here: `python`, or `trtexec` where only that is there. Fault where neither is."""
    asked = model.get("options", {}).get("with")
    if asked in ("python", "trtexec"):
        return str(asked)
    try:
        version = tensorrt_rules.parse(tensorrt_identity.imported().__version__)
        why = None if tensorrt_rules.has(version, "named_tensors") else "its Python module is older than 8.5"
    except Fault as fault:
        why = fault.what
    if why is None:
        return "python"
    if trtexec.find() is not None:
        return "trtexec"
    raise Fault("%s (%s)" % (_NEITHER, why), _INSTALL)


def _binary() -> str:
    found = trtexec.find()
    if found is None:
        raise Fault("the device has no trtexec", _INSTALL)
    return str(found)


def _key(model: Dict[str, Any]) -> str:
    """Return what tells engines of a session apart: the content of the files, whatever they are called, and options.

    Weights outside an ONNX file lie in its folder, which is named by the content of all that lies there.
    """
    files = {role: path for role, path in model["files"].items() if role != "timings"}
    content = {role: [digest(path), _outside(path, list(files.values()))] for role, path in files.items()}
    told = json.dumps([content, model.get("options", {}), model.get("build", 0)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:20]


def _outside(path: str, files: List[str]) -> List[str]:
    """Return the hashes of what lies beside a model in a session's folder of it."""
    folder, known = os.path.dirname(path), {os.path.basename(one) for one in files}
    if not folder.startswith("files" + os.sep):
        return []
    return [digest(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if name not in known]
