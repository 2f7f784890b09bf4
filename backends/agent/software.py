"""What is installed: L4T and JetPack, CUDA, TensorRT, ONNX Runtime, TVM. Nothing is imported into this process.

    L4T         /etc/nv_tegra_release, "# R36 (release), REVISION: 4.3, ..." -> 36.4.3; where it is missing, the version
                of the Debian package nvidia-l4t-core
    CUDA        version.json (from 11.1 on) or version.txt of /usr/local/cuda; nvcc; names of libcudart; pip's packages
    TensorRT    names of libnvinfer (libnvinfer.so.8.2.1), NvInferVersion.h, the Debian packages libnvinfer<n>

A Python module's version is that of its metadata, which costs nothing; a module that has none, and ONNX Runtime for its
providers, is imported in a process of its own: that may crash, hang or take long.
"""

import glob
import json
import os
import re
import shutil
import sys
from typing import Any, Dict, Optional

from . import reading
from .reading import Unread, maybe, paths

#: L4T -> JetPack, as in jetson_stats; the newest known one of the same series counts where a patch is not known.
JETPACKS = {
    (39, 2, 0): "7.2", (39, 0, 0): "7.2", (38, 4, 0): "7.1", (38, 2, 0): "7.0",
    (36, 5, 0): "6.2.2", (36, 4, 4): "6.2.1", (36, 4, 3): "6.2", (36, 4, 0): "6.1", (36, 3, 0): "6.0",
    (35, 6, 4): "5.1.6", (35, 6, 1): "5.1.5", (35, 6, 0): "5.1.4", (35, 5, 0): "5.1.3", (35, 4, 1): "5.1.2",
    (35, 3, 1): "5.1.1", (35, 2, 1): "5.1", (35, 1, 0): "5.0.2",
    (32, 7, 6): "4.6.6", (32, 7, 5): "4.6.5", (32, 7, 4): "4.6.4", (32, 7, 3): "4.6.3", (32, 7, 2): "4.6.2",
    (32, 7, 1): "4.6.1", (32, 6, 1): "4.6", (32, 5, 1): "4.5.1", (32, 5, 0): "4.5", (32, 4, 4): "4.4.1",
    (32, 4, 3): "4.4",
}  # fmt: skip
_CUDA = "/usr/local/cuda"
_LIBRARIES = ("/usr/lib/*-linux-gnu", _CUDA + "/lib64", _CUDA + "/targets/*/lib", "/usr/lib", "/usr/lib64")
#: Where NVIDIA's Debian packages put it, off the PATH.
TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
#: Seconds that an import has; on a Nano's SD card ONNX Runtime takes many.
_IMPORT = 60.0

#: Asked of a Python: the versions of packages by their metadata, and which modules can be found. Damaged metadata and
#: finders raise what they like, and one package's shall not hide the others: such a version is not known.
_PACKAGES = """
import json, sys
from importlib import util
try:
    from importlib import metadata
    def version(name):
        try:
            return metadata.version(name)
        except Exception:
            return None
except ImportError:
    def version(name):
        try:
            import pkg_resources
            return pkg_resources.get_distribution(name).version
        except Exception:
            return None
def found(name):
    try:
        return util.find_spec(name) is not None
    except Exception:
        return False
packages, modules = json.loads(sys.argv[1])
print(json.dumps([{n: version(n) for n in packages}, {n: found(n) for n in modules}]))
"""
_PROVIDERS = (
    "import json, onnxruntime as o; "
    "print(); print(json.dumps({'version': o.__version__, 'providers': o.get_available_providers()}))"
)
_VERSION = "import json, {0} as m; print(); print(json.dumps({{'version': m.__version__}}))"
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tvm": ("apache-tvm", "tvm"),
}
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu11")


def software(root: str, unknown: Dict[str, str]) -> Dict[str, Any]:
    """Return versions by name; what is not there or cannot be told lacks, and `unknown` says why."""
    found = {}  # type: Dict[str, Any]
    release = l4t(root)
    if release:
        found["l4t"] = release
        found["jetpack"] = jetpack(release)
        if found["jetpack"] is None:
            unknown["jetpack"] = "L4T %s is not known to edgec" % release
    packages, modules = _asked(unknown)
    found.update(_python_modules(packages, modules, unknown))
    version = cuda(root) or next((packages[name] for name in _RUNTIMES if packages.get(name)), None)
    if version:
        found["cuda"] = version
    else:
        unknown["cuda"] = "no version file, no nvcc and no libcudart where CUDA is usually installed"
    library = tensorrt_library(root)
    binary = trtexec(root)
    if library:
        found["tensorrt_library"] = library
    if library and binary and "tensorrt" not in found:
        found["tensorrt"] = library  # what trtexec builds with
        unknown.pop("tensorrt", None)
    elif "tensorrt" not in found:
        there = "libnvinfer %s alone" % library if library else "no libnvinfer where it is usually installed"
        unknown["tensorrt"] = "%s, %s" % (unknown.get("tensorrt", "no Python module"), there)
    if binary:
        found["trtexec"] = binary
    else:
        unknown["trtexec"] = "neither on the PATH nor %s" % TRTEXEC
    return found


def l4t(root: str) -> Optional[str]:
    """Return the release of Jetson Linux, 36.4.3 for example; None where this is none."""
    told = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", maybe(root, "/etc/nv_tegra_release") or "")
    if told:
        return "%s.%s" % told.groups()
    version = _debian(root, "nvidia-l4t-core")
    return version.split("-")[0] if version else None


def jetpack(release: str) -> Optional[str]:
    """Return the JetPack that a release of Jetson Linux belongs to, None where it is not known."""
    numbers = (tuple(int(part) for part in release.split(".") if part) + (0, 0))[:3]
    older = [one for one in JETPACKS if one[:2] == numbers[:2] and one <= numbers]
    return JETPACKS[max(older)] if older else None


def cuda(root: str) -> Optional[str]:
    """Return the version of the CUDA toolkit or of its runtime library, None where there is none."""
    for folder in [_CUDA] + paths(root, _CUDA + "-*"):
        try:
            return str(json.loads(maybe(root, folder + "/version.json") or "")["cuda"]["version"])
        except (ValueError, KeyError, TypeError):
            pass
        told = re.search(r"CUDA Version ([\d.]+)", maybe(root, folder + "/version.txt") or "")
        if told:
            return told.group(1)
    # a toolkit by Debian's own packages has neither file
    for compiler in (reading.under(root, _CUDA + "/bin/nvcc"), "nvcc"):
        try:
            told = re.search(r"V(\d+\.\d+\.\d+)", reading.said([compiler, "--version"]))
        except Unread:
            continue
        if told:
            return told.group(1)
    return _newest(root, "libcudart.so.")


def tensorrt_library(root: str) -> Optional[str]:
    """Return the version of libnvinfer, None where there is none in the usual places."""
    named = _newest(root, "libnvinfer.so.")
    if named and named.count(".") >= 2:
        return named
    return _header(root) or _debian(root, r"libnvinfer\d+", cut=True) or named


def _newest(root: str, prefix: str) -> Optional[str]:
    """Return the newest version in the file names of a shared library."""
    found = []
    for folder in _LIBRARIES:
        for path in paths(root, "%s/%s*" % (folder, prefix)):
            version = os.path.basename(path)[len(prefix) :]
            if re.match(r"\d+(\.\d+)*$", version):
                found.append(version)
    return max(found, key=lambda version: [int(number) for number in version.split(".")], default=None)


def _header(root: str) -> Optional[str]:
    for path in paths(root, "/usr/include/*/NvInferVersion.h") + paths(root, "/usr/include/NvInferVersion.h"):
        told = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", maybe(root, path) or ""))
        parts = [_number(told, "NV_TENSORRT_" + part) for part in ("MAJOR", "MINOR", "PATCH")]
        if all(part is not None for part in parts):
            return ".".join(str(part) for part in parts)
    return None


def _number(defined: Dict[str, str], name: str) -> Optional[str]:
    """Return the number behind a macro, which in later headers stands for another macro."""
    value = defined.get(name)
    for _ in range(3):
        if value is None or value.isdigit():
            return value
        value = defined.get(value)
    return None


def _debian(root: str, name: str, cut: bool = False) -> Optional[str]:
    """Return the version of an installed Debian package whose name matches; `cut` to three numbers."""
    for block in (maybe(root, "/var/lib/dpkg/status") or "").split("\n\n"):
        if re.match(r"Package: %s\n" % name, block) and re.search(r"^Status: \S+ \S+ installed$", block, re.MULTILINE):
            told = re.search(r"^Version: (?:\d+:)?(\S+)", block, re.MULTILINE)
            if told:
                version = told.group(1)
                return ".".join(re.findall(r"\d+", version)[:3]) if cut else version
    return None


def trtexec(root: str) -> Optional[str]:
    """Return where trtexec is, None where it is not: on the PATH, or where the Debian packages put it."""
    on_path = shutil.which("trtexec")
    if on_path:
        return on_path
    for pattern in (TRTEXEC, "/usr/local/tensorrt*/bin/trtexec", "/opt/tensorrt*/bin/trtexec"):
        for path in glob.glob(reading.under(glob.escape(root), pattern)):
            if os.access(path, os.X_OK):
                return path
    return None


# ------------------------------------------------------------------------------------------------ Python modules


def _asked(unknown: Dict[str, str]) -> Any:
    wanted = [name for names in _DISTRIBUTIONS.values() for name in names] + list(_RUNTIMES)
    asked = json.dumps([wanted, list(_DISTRIBUTIONS)])
    try:
        return json.loads(reading.said([sys.executable, "-c", _PACKAGES, asked], _IMPORT))
    except (Unread, ValueError) as error:
        unknown["python modules"] = str(error)
        return {}, {}


def _python_modules(packages: Dict[str, Any], modules: Dict[str, bool], unknown: Dict[str, str]) -> Dict[str, Any]:
    """Return the versions of tensorrt and tvm, and version and providers of onnxruntime."""
    found = {}  # type: Dict[str, Any]
    for name, names in _DISTRIBUTIONS.items():
        if not modules.get(name):
            unknown[name] = "python3 has no module %s" % name
            continue
        version = next((packages[one] for one in names if packages.get(one)), None)
        if version and name != "onnxruntime":
            found[name] = version
            continue
        told = _imported(name, _PROVIDERS if name == "onnxruntime" else _VERSION.format(name), unknown)
        if told:
            found[name] = told if name == "onnxruntime" else told["version"]
    return found


def _imported(name: str, program: str, unknown: Dict[str, str]) -> Optional[Dict[str, Any]]:
    try:
        lines = reading.said([sys.executable, "-c", program], _IMPORT).strip().splitlines()
        told = json.loads(lines[-1])
    except (Unread, ValueError, IndexError) as error:
        unknown[name] = "the module is there, but cannot be used: %s" % error
        return None
    return told if isinstance(told, dict) else None
