"""What runs on the device is Python 3.6, standard library, one folder: by its syntax, its calls, and its imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from edgec.backends import agent

FOLDER = Path(agent.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
#: Modules that runtimes bring; each is imported where it is used.
RUNTIMES = {"numpy", "onnxruntime", "tensorrt", "tvm"}
#: What newer Pythons have, and 3.6 has not.
NEWER = {"capture_output", "text", "removeprefix", "removesuffix", "dirs_exist_ok", "missing_ok"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_the_syntax_is_python_3_6(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.NamedExpr)]
    keywords = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    assert not keywords & NEWER


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_what_is_imported_is_the_standard_library_or_a_runtime_where_it_is_used(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, "no import from outside this folder: it is packed alone"
            continue
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in (n.partition(".")[0] for n in names):
            assert name in sys.stdlib_module_names or (name in RUNTIMES and node not in top), name


def _vermin(folder):
    """Run vermin, which knows when each call came; the exit code is not 0 where something is newer than 3.6."""
    pytest.importorskip("vermin", reason="needs vermin, which the extra dev installs")
    command = [sys.executable, "-c", "from vermin import main; main()", "-q", "--target=3.6-", "--violations", folder]
    return subprocess.run(command, capture_output=True, text=True)


def test_nothing_newer_than_python_3_6_is_called():
    done = _vermin(FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_vermin_would_find_it(tmp_path):
    (tmp_path / "newer.py").write_text("import math\nmath.prod([1])\n")
    done = _vermin(tmp_path)
    assert done.returncode != 0 and "math.prod" in done.stdout
