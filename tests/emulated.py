"""Runs modules for Arm on this machine: TVM's runtime for aarch64, Debian's cross compiler, and qemu's user mode.

`make aarch64` brings all three. qemu plays one processor, so an instruction that it does not have is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
#: Where the wheels of TVM and tvm-ffi for aarch64 lie, unpacked.
RUNTIME = Path(os.environ.get("EDGEC_AARCH64_TVM") or ROOT / ".venv/aarch64")
#: Profiles, and the processors that qemu plays.
CPUS = {
    "arm64-neon": "cortex-a53",
    "raspberry-pi-4": "cortex-a72",
    "raspberry-pi-5": "cortex-a76",
    "arm64-dotprod": "cortex-a76",
}
LINKER = "aarch64-linux-gnu-gcc"
_SYSTEM = "/usr/aarch64-linux-gnu"
_PROGRAMS = (LINKER, "aarch64-linux-gnu-g++", "qemu-aarch64")
_LIBRARIES = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so")


def missing() -> str | None:
    """Return what is not here of all that is needed, None where nothing is."""
    lacks = [name for name in _PROGRAMS if shutil.which(name) is None]
    lacks += [f"{name} for aarch64 in {RUNTIME}" for name in _LIBRARIES if not (RUNTIME / name).is_file()]
    return f"not here: {', '.join(lacks)} (make aarch64)" if lacks else None


def runner(folder: Path) -> Path:
    """Compile cross/run.cc into a folder and return the program."""
    program, folders = folder / "run", [RUNTIME / Path(name).parent for name in _LIBRARIES]
    command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O1", ROOT / "tests/cross/run.cc", "-o", program]
    command += [f"-I{RUNTIME / 'tvm_ffi/include'}", *(f"-L{one}" for one in folders)]
    # nothing of tvm_runtime is called by name: it registers itself when it is loaded
    command += ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", f"-Wl,-rpath,{':'.join(map(str, folders))}"]
    subprocess.run(command, check=True)
    return program


def run(
    program: Path, library: Path, cpu: str, feed: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Run a module once; outputs have the names, types and shapes of `like`, both in the network's order."""
    command = ["qemu-aarch64", "-cpu", cpu, "-L", _SYSTEM, program, library, library.with_suffix(".out")]
    for i, array in enumerate(feed.values()):
        file = library.with_suffix(f".in.{i}")
        array.tofile(file)
        command += [array.dtype.name, ",".join(map(str, array.shape)), file]
    subprocess.run(command, check=True)
    files = [library.with_suffix(f".out.{i}") for i in range(len(like))]
    return {
        name: np.fromfile(file, array.dtype).reshape(array.shape)
        for file, (name, array) in zip(files, like.items(), strict=True)
    }


def instructions(library: Path, arch: str) -> list[str]:
    """Return the name of each instruction of a library, as objdump has them."""
    tool = "aarch64-linux-gnu-objdump" if arch == "aarch64" else "objdump"
    said = subprocess.run([tool, "-d", "--no-show-raw-insn", library], check=True, capture_output=True, text=True)
    return re.findall(r"^\s*[0-9a-f]+:\s+(\w+)", said.stdout, re.M)
