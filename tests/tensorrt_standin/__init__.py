"""Strict stand-ins for TensorRT's Python module, one a version, and for CUDA's runtime under it.

They are built from NVIDIA's published API: a name, a flag, an argument, its type or an order of calls that a version
does not have fails as it would there. They compute nothing: outputs are zeros, and times are made up. What they prove
is that the calls are right, not that an engine is.

    trt = make("10.3.0", sm=8.7)          a module; trt.standin has what was done, and .libcudart beside it
    path_for("8.6.2", no_int8_for=["c2"]) a folder for PYTHONPATH, in which `import tensorrt` finds one
"""

import contextlib
import json
import os
import tempfile
import types
from dataclasses import asdict, dataclass, field

from . import building, engines, network, tables
from .libcudart import LibCudart

VERSIONS = ("8.5.2", "8.6.2", "10.3.0", "10.13.3", "11.1.0")
#: Overrides for options in another process, as JSON.
VARIABLE = "STANDIN_TENSORRT"


@dataclass
class Options:
    """The device, and what shall fail."""

    sm: float = 8.7
    dla_cores: int = 0
    total: int = 8 << 30
    integrated: bool = True
    #: name of a node that the parser stops at
    parse_fails: str = ""
    #: nodes without a kernel: at all, or behind Q/DQ only; `silent`: the log does not name them
    no_kernel_for: list = field(default_factory=list)
    no_int8_for: list = field(default_factory=list)
    silent: bool = False
    #: "build" or "run": the process ends there
    crash: str = ""
    capture_fails: bool = False
    steps: int = 4
    step_seconds: float = 0.0
    #: milliseconds of a call by the fewest bits in it
    ms: dict = field(default_factory=lambda: {"fp32": 1.0, "fp16": 0.6, "int8": 0.4, "fp8": 0.4, "int4": 0.5})


class Standin:
    """What one module shares, and what was done with it."""

    def __init__(self, trt, version, options):
        self.trt, self.version, self.options = trt, version, options
        cuda = tables.CUDA[version[:2]]
        self.libcudart = LibCudart(cuda, options.sm, options.total, options.integrated, options.capture_fails)
        self.violations, self.seen, self.runs, self.steps = [], {}, 0, 0
        self.config, self.network_flags, self._loggers, self._said = None, [], [], []

    def device(self):
        return {"tensorrt": self.trt.__version__, "sm": self.options.sm}

    def milliseconds(self, said):
        """Return what a call of an engine takes, by the fewest bits in it."""
        half = "FP16" in said["flags"] or (said["strong"] and said["half"])
        return self.options.ms[said["stored"][0] if said["stored"] else "fp16" if half else "fp32"]

    def check_base(self, thing, base):
        """TypeError where a subclass did not call its base's __init__, without which there is no C++ half."""
        if not isinstance(thing, base) or not getattr(thing, "_made", False):
            raise TypeError(f"{base.__name__}.__init__() must be called when overriding __init__")

    def check_logger(self, logger):
        self.check_base(logger, self.trt.ILogger)
        if logger not in self._loggers:
            self._loggers.append(logger)
        if len(self._loggers) > 1:
            self.violations.append("a second logger: the first one stays in use")

    def log(self, severity, message):
        for logger in self._loggers[:1]:
            with contextlib.suppress(Exception):  # as the real one does
                logger.log(getattr(self.trt.ILogger.Severity, severity), message)


def _base(name):
    def made(self, *_):
        self._made = True

    return type(name, (), {"__init__": made})


_CUT = (
    building.Builder,
    building.IBuilderConfig,
    building.IOptimizationProfile,
    building.ITimingCache,
    network.INetworkDefinition,
    network.ITensor,
    network.ILayer,
    network.OnnxParser,
    network.ParserError,
    engines.Runtime,
    engines.ICudaEngine,
    engines.IExecutionContext,
    engines.EngineInspector,
)


def make(version, **options):
    """Return a module as `import tensorrt` gives it in this version; `options` are those of Options."""
    numbers = tuple(int(part) for part in version.split("."))
    trt = types.ModuleType("tensorrt", f"a stand-in for TensorRT {version}")
    trt.__version__ = version
    trt.standin = Standin(trt, numbers, Options(**options))
    for kind in tables.ENUMS:
        made = tables.enum(kind, numbers)
        if kind != "Severity" and any(isinstance(m, made) for m in vars(made).values()):
            setattr(trt, kind, made)
    for name in ("ILogger", "IProfiler", "IProgressMonitor", "IInt8EntropyCalibrator2"):
        if tables.within(numbers, tables.MEMBERS.get(f"tensorrt.{name}", tables.ALL)):
            setattr(trt, name, _base(name))
    trt.ILogger.Severity = tables.enum("Severity", numbers)
    for cls in _CUT:
        setattr(trt, cls.__name__, tables.cut(cls, numbers))
        if cls.__name__ in ("Builder", "Runtime", "OnnxParser"):
            getattr(trt, cls.__name__)._module = trt

    class Logger(trt.ILogger):
        def __init__(self, min_severity=None):
            trt.ILogger.__init__(self)

        def log(self, severity, msg):
            print(f"[TRT] [{severity.name[0]}] {msg}")

    trt.Logger = Logger

    def init_libnvinfer_plugins(logger, namespace):
        tables.check(namespace, str, "init_libnvinfer_plugins")
        trt.standin.check_logger(logger)
        return True

    trt.init_libnvinfer_plugins = init_libnvinfer_plugins
    return trt


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_MODULE = '''"""A stand-in for TensorRT, see tests/tensorrt_standin."""
import sitecustomize
import sys
sys.modules[__name__] = sitecustomize.standin()
'''
_SITE = '''"""Lets this process find stand-ins for TensorRT and for libcudart."""
import ctypes
import json
import os
import sys

_made = []
_CDLL = ctypes.CDLL


def standin():
    if not _made:
        sys.path.append({tests!r})
        from tensorrt_standin import VARIABLE, make
        said = dict(json.loads({options!r}), **json.loads(os.environ.get(VARIABLE, "{{}}")))
        _made.append(make(said.pop("version"), **said))
    return _made[0]


class CDLL(_CDLL):
    def __new__(cls, name=None, *args, **named):
        if "libcudart" not in str(name):
            return _CDLL(name, *args, **named)
        library = standin().standin.libcudart
        if not str(name).endswith({suffix!r}):
            raise OSError(name + ": cannot open shared object file")
        return library


ctypes.CDLL = CDLL
'''


def path_for(version, folder=None, **options):
    """Return a folder for PYTHONPATH: `import tensorrt` gives the stand-in there, and libcudart is the stand-in's.

    The variable STANDIN_TENSORRT overrides options: '{"sm": 8.9}'.
    """
    folder = folder or tempfile.mkdtemp(prefix="tensorrt-")
    cuda = tables.CUDA[tuple(int(part) for part in version.split("."))[:2]]
    suffix = f".so.{cuda[0]}" if cuda[0] > 11 else f".so.{cuda[0]}.0"
    said = json.dumps({"version": version, **asdict(Options(**options))})
    texts = {"tensorrt.py": _MODULE, "sitecustomize.py": _SITE.format(tests=_HERE, options=said, suffix=suffix)}
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    return str(folder)
