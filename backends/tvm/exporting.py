"""From an executable to a file that a device can load."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from ...compiler import devices

logger = logging.getLogger(__name__)

#: What links for a processor that is not this machine's, by the triple's first part; Debian's package of it.
_LINKERS = {"aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")}


def exported(executable: Any, stem: Path, triple: str) -> Path:
    """Write stem.so, or stem.tar if only the device can link it, and return it."""
    library, archive = stem.with_suffix(".so"), stem.with_suffix(".tar")
    arch = triple.partition("-")[0]
    if arch == devices.machine_arch():
        executable.export_library(str(library))
        return library
    linker, package = _LINKERS.get(arch, ("", ""))
    if shutil.which(linker):
        executable.export_library(str(library), cc=linker)
        return library
    logger.info("%s is not here (Debian: %s): objects alone, which are linked on the device", linker, package)
    executable.export_library(str(archive))
    return archive
