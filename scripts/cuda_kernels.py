"""Compile the CUDA kernels by NVRTC, without a GPU, and list what each takes.

Usage: python scripts/cuda_kernels.py [--target 90] [--dtype bfloat16] [--states 16] [--json FILE] [--cubin FILE ...]

Lists registers of a thread, bytes of stack and of shared memory, and how many instructions the innermost loop has for a
step of the sequence; in the backward of the scan for a state of a tile of 16 steps. Cubins that something else has
compiled are listed below. The sizes are those of a mixer of Vim-Ti at 224 x 224. Exits with 1 where a kernel of 16
states spills registers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from tabulate import tabulate

from famba.ops.cuda import launch, nvrtc
from famba.ops.cuda.backend import mixer, mixer_backward
from famba.ops.cuda.launch import Launch
from famba.ops.inputs import Direction, MixerInputs

TARGETS = (80, 90)
BATCH, LENGTH, D_MODEL, CHANNELS, RANK, WIDTH = 2, 197, 192, 384, 12, 4
# Triton brings this tool of NVIDIA's.
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_EXPONENTIALS_BESIDE_STATES = 2  # in a step of the scan: of softplus and of the gate


@dataclass(frozen=True)
class Compiled:
    """Hold what a kernel takes; loop: instructions for a step, or a state of a tile; None where it has none."""

    kernel: str
    dtype: str
    states: int
    target: str
    registers: int
    stack: int
    shared: int
    loop: int | None


def main() -> None:
    """Compile, print the table, and fail on a spill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, help=f"only this compute capability, times ten (else {TARGETS})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="only activations of this dtype")
    parser.add_argument("--states", type=int, action="append", help="this number of states (else 8, 16 and 64)")
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--cubin", type=Path, nargs="*", default=(), help="list these too, as of 16 states")
    options = parser.parse_args()
    dtypes = [options.dtype] if options.dtype else ["float32", "bfloat16", "float16"]
    rows = []
    for dtype in dtypes:
        for states in options.states or (8, 16, 64):
            for name, made in launches(getattr(torch, dtype), states):
                for target in [options.target] if options.target else TARGETS:
                    cubin = launch.compile_for(made.file, made.constants, target)
                    rows += [row for row in listed(cubin, dtype, states, name) if row.kernel in (name, made.kernel)]
    for path in options.cubin:
        rows += listed(path.read_bytes(), path.stem, 16)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"NVRTC {'.'.join(map(str, nvrtc.version()))}")
    print(tabulate([asdict(row) for row in rows], headers="keys"))
    spilled = [row for row in rows if row.states == 16 and row.stack and row.dtype in dtypes]
    sys.exit(f"{len(spilled)} kernels spill" if spilled else 0)


def launches(dtype: torch.dtype, states: int) -> Iterator[tuple[str, Launch]]:
    """Yield each different launch of a mixer, with a name that tells the two uses of the forward scan apart."""
    found: list[Launch] = []
    Launch.run = lambda made: found.append(made)  # type: ignore[method-assign, assignment]
    A, weight, vector = torch.empty(CHANNELS, states), torch.empty(CHANNELS, WIDTH), torch.empty(CHANNELS)
    x_weight, dt_weight = torch.empty(RANK + 2 * states, CHANNELS), torch.empty(CHANNELS, RANK)
    side = Direction(weight, vector, x_weight, dt_weight, vector, A, vector)
    x = torch.empty(BATCH, LENGTH, D_MODEL, dtype=dtype)
    inputs = MixerInputs(x, torch.empty(2 * CHANNELS, D_MODEL), side, side, torch.empty(D_MODEL, CHANNELS))
    out, _, *kept = mixer(inputs, False)
    mixer_backward(out, inputs, kept)  # type: ignore[arg-type]
    mixer(inputs, True)
    seen = set()
    for made in found:
        measures = "scan_forward, measures" if made.constants.get("MEASURE") else made.kernel
        name = "scan_replay" if made.constants.get("REPLAY") else measures
        if name not in seen:
            seen.add(name)
            yield name, made


def listed(cubin: bytes, dtype: str, states: int, name: str | None = None) -> Iterator[Compiled]:
    """Say of each kernel of a cubin what it takes; `name` is for the forward scan."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_told(option, file.name) for option in ("--dump-resource-usage", "--dump-sass"))
    target = re.search(r"sm_\d+", code)
    bodies = dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", code, re.DOTALL))
    for kernel, registers, stack, shared in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        numbers = int(registers), int(stack), int(shared)
        named = name if kernel == "scan_forward" and name else kernel
        yield Compiled(
            named, dtype, states, target[0] if target else "", *numbers, loop_of(kernel, bodies[kernel], states)
        )


def loop_of(kernel: str, code: str, states: int) -> int | None:
    """Count the instructions of the loop in which a kernel spends its time."""
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code)]
    places = {address: i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (address, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.* (0x[0-9a-f]+)$", text)
        if jump and int(jump[1], 16) < address:
            loops.append([text for _, text in lines[places[int(jump[1], 16)] : i + 1]])
    if kernel.startswith("scan_b"):
        # Each state of a tile takes 31 exchanges; the shortest such loop is that of a full tile.
        whole = [len(loop) for loop in loops if sum("SHFL" in text for text in loop) == 31]
        return min(whole, default=None)
    if kernel.startswith("scan"):
        steps = [
            (sum("MUFU.EX2" in t for t in loop) / (states + _EXPONENTIALS_BESIDE_STATES), len(loop)) for loop in loops
        ]
    else:
        steps = [(sum("STG" in t for t in loop) / (2 if kernel == "conv_forward" else 1), len(loop)) for loop in loops]
    most = max(steps, default=(0, 0))
    return round(most[1] / most[0]) if most[0] >= 1 and "sum" not in kernel else None


def _told(option: str, file: str) -> str:
    command = [str(_CUOBJDUMP), option, file]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - no user input


if __name__ == "__main__":
    main()
