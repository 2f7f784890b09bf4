"""backends/agent as one file that any python3 runs: a zip with a __main__ (PEP 441); same source, same bytes."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

from .. import agent

#: What the file is called in a bundle.
NAME = "edgec-device.pyz"
_PACKAGE = "edgec_device"
_MAIN = f"import sys\n\nfrom {_PACKAGE}.main import main\n\nsys.exit(main())\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@functools.cache
def packed() -> bytes:
    """Return the file's content."""
    folder = Path(str(agent.__file__)).parent
    files = {f"{_PACKAGE}/{path.name}": path.read_bytes() for path in sorted(folder.glob("*.py"))}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"__main__.py": _MAIN.encode(), **files}.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED, 9)
    return b"#!/usr/bin/env python3\n" + out.getvalue()
