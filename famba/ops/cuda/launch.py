"""Launch the kernels: compiled for their constants at the first call, and kept on disk as cubins."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from famba.errors import CheckpointError
from famba.files import write_whole
from famba.ops.cuda import driver, nvrtc

SOURCES = Path(__file__).with_name("src")
ENVIRONMENT_VARIABLE = "FAMBA_CUBINS"
# Names of activations' dtypes in the sources.
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

Constants = Mapping[str, int | float | str]

_log = logging.getLogger(__name__)
_loaded: dict[tuple[object, ...], c_void_p] = {}


@dataclass(frozen=True)
class Launch:
    """Hold a call of a kernel.

    constants: macros of the source. grid: blocks along x and y. arguments: what the kernel's one structure holds, field
    by field: tensors, None, or whole numbers, of 8 bytes each.
    """

    file: str
    kernel: str
    constants: Constants
    grid: tuple[int, int]
    threads: int
    arguments: Sequence[Tensor | int | None]

    def packed(self) -> bytes:
        """Return the structure as it lies in memory."""
        numbers = (x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in self.arguments)
        return struct.pack(f"{len(self.arguments)}q", *numbers)

    def run(self) -> None:
        """Launch on the device of the tensors, on torch's current stream."""
        device = next(x.device for x in self.arguments if isinstance(x, Tensor))
        with torch.cuda.device(device):
            key = (self.file, self.kernel, device.index, *self.constants.values())
            if key not in _loaded:
                architecture = nvrtc.architecture(torch.cuda.get_device_capability(device))
                compiled = cubin(self.file, self.constants, architecture)
                _loaded[key] = driver.load(compiled, self.kernel, device.index)
            driver.launch(_loaded[key], device.index, self.grid, self.threads, self.packed())


def text_of(file: str, constants: Constants) -> str:
    """Return what the compiler reads: the constants, then the source."""
    # Not as options, which would come before the compiler's own declarations, where such names mean something else.
    macros = (f"#define {name} {int(value) if isinstance(value, bool) else value}" for name, value in constants.items())
    return "\n".join([*macros, f'#include "{file}"\n'])


def compile_for(file: str, constants: Constants, architecture: int) -> bytes:
    """Compile a source into a cubin for constants and a compute capability, times ten."""
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", f"--include-path={SOURCES}"]
    return nvrtc.compile_source(text_of(file, constants), f"launched_{file}", options)


def cubin(file: str, constants: Constants, architecture: int) -> bytes:
    """Compile a source for constants and a compute capability (times ten), or find what was compiled before.

    Cubins have names made of sources, constants, architecture and version. Processes may do this at the same time.
    """
    known = (text_of(file, constants), _sources(), nvrtc.version(), architecture)
    name = hashlib.sha256(repr(known).encode()).hexdigest()
    path = folder() / f"{Path(file).stem}-sm_{architecture}-{name[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        made = compile_for(file, constants, architecture)
    try:
        write_whole(path, lambda part: Path(part).write_bytes(made))
    except CheckpointError as error:
        _log.warning("compiled kernels cannot be kept in %s, and are compiled in each process: %s", folder(), error)
    return made


def folder() -> Path:
    """Return the folder of compiled kernels: $FAMBA_CUBINS, else ~/.cache/famba/cubins."""
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "famba" / "cubins"


@functools.cache
def _sources() -> str:
    """Return a digest of all sources."""
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256(b"".join(texts)).hexdigest()
