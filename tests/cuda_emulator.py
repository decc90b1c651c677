"""The CUDA kernels on a CPU: their sources compiled by g++ with cuda_emulator.h, and launched from there."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from famba.ops.cuda.launch import SOURCES, Launch

HEADER = Path(__file__).with_name("cuda_emulator.h")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-attributes"]
# By which types and sizes of arrays are made. All other constants are variables here: a build serves many of them.
STRUCTURAL = ("T", "BLOCK", "CHUNK", "ROOM", "FORWARD_TILE", "BACKWARD_TILE", "FORWARD_THREADS", "WIDTH", "LANES")

obstacle = None if shutil.which("g++") else "g++ is not installed"


def run(launch: Launch) -> None:
    """Do what `Launch.run` does on a GPU, for tensors on a CPU."""
    structural = tuple((k, v) for k, v in launch.constants.items() if k in STRUCTURAL)
    others = {k: v for k, v in launch.constants.items() if k not in STRUCTURAL}
    function = getattr(_library(launch.file, structural, tuple(others)), f"run_{launch.kernel}")
    values = (ctypes.c_double * 32)(*(float(str(v).rstrip("f")) if isinstance(v, str) else v for v in others.values()))
    function(launch.packed(), values, *map(ctypes.c_uint, (*launch.grid, launch.threads)))


@functools.cache
def _library(file: str, structural: tuple[tuple[str, object], ...], others: tuple[str, ...]) -> ctypes.CDLL:
    text = (SOURCES / file).read_text()
    macros = [f"#define {name} {value}" for name, value in structural]
    for i, name in enumerate(others):
        kind = "float" if name == "SCALE" else "long"
        macros.append(f"#define {name} (({kind})emulator::values[{i}])")
    kernels = re.findall(r"__launch_bounds__\(.*?\) (\w+)\(const", text)
    runs = [
        f'extern "C" void run_{kernel}(const void *a, const double *v, unsigned x, unsigned y, unsigned t) '
        f"{{ emulator::launch({kernel}, a, v, x, y, t); }}"
        for kernel in kernels
    ]
    whole = "\n".join([f'#include "{HEADER}"', *macros, f'#include "{file}"', *runs]) + "\n"
    flags = [*FLAGS, *os.environ.get("FAMBA_EMULATOR_FLAGS", "").split()]
    sources = b"".join(path.read_bytes() for path in (HEADER, *sorted(SOURCES.iterdir())))
    name = hashlib.sha256(whole.encode() + sources + repr(flags).encode()).hexdigest()[:32]
    built = Path(tempfile.gettempdir()) / f"famba-emulator-{os.getuid()}" / f"{name}.so"
    if not built.exists():
        built.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            source, out = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
            source.write_text(whole)
            command = ["g++", *flags, f"-I{SOURCES}", str(source), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:6000]
            out.replace(built)
    return ctypes.CDLL(str(built))
