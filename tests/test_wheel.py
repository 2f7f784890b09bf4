"""The wheel holds exactly the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILER = ("explanation", "fitting", "latency", "low_rank", "mixed_precision", "pruning", "quantization", "report")
FOLDERS = (
    "backends",
    "backends/agent",
    "backends/targets",
    "backends/tensorrt",
    "backends/tvm",
    "backends/tvm/lowering",
    "backends/tvm/spaces",
    "calib",
    "compiler",
    *(f"compiler/{name}" for name in COMPILER),
    "passes",
)


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    # the build backend itself, without isolation: no network is needed
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    source = tmp_path / "source"
    ignored = (".git", ".venv", "build", "dist", "out", ".mypy_cache", ".ruff_cache", ".hypothesis")
    import shutil

    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored, "*.egg-info", "__pycache__", "calib_images"))
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {f"edgec/{p.name}" for p in ROOT.glob("*.py")} | {"edgec/devices.yaml"}
    expected |= {f"edgec/{p.relative_to(ROOT).as_posix()}" for folder in FOLDERS for p in (ROOT / folder).glob("*.py")}
    assert names == expected
