"""Compile the kernels for NVIDIA GPUs without a GPU, and list the resources of each.

Usage: python scripts/compile_kernels.py triton|cuda [--target 80] [--dtype bfloat16] [--kernel NAME] [--json FILE]

Compiles each configuration of the Triton kernels that tuning may choose, or the CUDA kernels for 16 and 256 states. The
sizes are those of Vim-Small at 224 x 224. Exit with 1 if a kernel spills registers to a stack, which none needs for
anything else; with 256 states it may. This takes minutes; Triton's cache keeps what was compiled before.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from famba.ops import triton as triton_ops
from famba.ops.availability import interpreted
from famba.ops.cuda import backend as cuda
from famba.ops.cuda import launch as cuda_launch
from famba.ops.inputs import Direction, MixerInputs, ScanInputs
from famba.ops.triton.launch import Configuration, Launch, noted

TARGETS, DTYPES = (80, 90), ("float32", "bfloat16", "float16")
BATCH, LENGTH, D_MODEL, D_INNER, D_STATE, DT_RANK, WIDTH, FUSED = 2, 197, 384, 768, 16, 24, 4, 8
MANY_STATES = 256
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_TYPES |= {torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}
# Triton brings this tool of NVIDIA's.
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

Draw = Callable[..., Tensor]


class Job(NamedTuple):
    """Hold a kernel to compile; `make` returns, for a target, the cubin and the bytes of shared memory beside it."""

    kernel: str
    configuration: str
    make: Callable[[int], tuple[bytes, int]]


class Compiled(NamedTuple):
    """Hold the resources of a compiled kernel: registers and bytes of stack of a thread, bytes of shared memory."""

    kernel: str
    configuration: str
    dtype: str
    target: str
    registers: int
    stack: int
    shared: int


def main() -> None:
    """Compile, print the table, and exit with 1 if a configuration spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("triton", "cuda"))
    parser.add_argument("--kernel", help="only kernels of this name")
    parser.add_argument("--target", type=int, choices=TARGETS, help="only this compute capability, times ten")
    parser.add_argument("--dtype", choices=DTYPES, help="only activations of this dtype")
    parser.add_argument("--first", action="store_true", help="only the first configuration of each Triton kernel")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET=1 is set, so nothing is compiled; unset it")

    rows = []
    for dtype in [options.dtype] if options.dtype else DTYPES:
        draw = partial(torch.zeros, dtype=getattr(torch, dtype))
        for job in cuda_jobs(draw) if options.backend == "cuda" else triton_jobs(draw, options.first):
            if options.kernel not in (None, job.kernel):
                continue
            for target in [options.target] if options.target else TARGETS:
                cubin, shared = job.make(target)
                registers, stack, own = resources(cubin, job.kernel)
                rows.append(Compiled(*job[:2], dtype, f"sm_{target}", registers, stack, shared + own))
                print(*rows[-1][:4], file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    print(tabulate([row._asdict() for row in rows], headers="keys"))
    spilled = sum(row.stack > 0 and row.configuration != f"{MANY_STATES} states" for row in rows)
    if not rows or spilled:
        sys.exit(f"{spilled} of {len(rows)} spill" if rows else f"no kernel is named {options.kernel!r}")


def mixer_inputs(x: Draw, states: int) -> MixerInputs:
    """Make the inputs of a mixer, with parameters in float32 where they stay so."""
    direction = Direction(
        torch.zeros(D_INNER, WIDTH),
        torch.zeros(D_INNER),
        x(DT_RANK + 2 * states, D_INNER),
        x(D_INNER, DT_RANK),
        torch.zeros(D_INNER),
        torch.zeros(D_INNER, states),
        torch.zeros(D_INNER),
    )
    return MixerInputs(x(BATCH, LENGTH, D_MODEL), x(2 * D_INNER, D_MODEL), direction, direction, x(D_MODEL, D_INNER))


def cuda_jobs(x: Draw) -> Iterator[Job]:
    """Yield each different launch of a mixer, forward, backward and with measures."""
    found: list[cuda_launch.Launch] = []
    cuda_launch.Launch.run = lambda made: found.append(made)  # type: ignore[method-assign, assignment]
    for states in (D_STATE, MANY_STATES):
        found.clear()
        inputs = mixer_inputs(x, states)
        out, _, *kept = cuda.mixer(inputs, False)
        cuda.mixer_backward(out, inputs, kept)  # type: ignore[arg-type]
        cuda.mixer(inputs, True)
        for one in {(made.kernel, repr(made.constants)): made for made in found}.values():
            yield Job(one.kernel, f"{states} states", partial(compile_cuda, one))


def compile_cuda(launch: cuda_launch.Launch, target: int) -> tuple[bytes, int]:
    """Compile a launch for a compute capability, times ten; all its shared memory is told by the cubin."""
    return cuda_launch.compile_for(launch.file, launch.constants, target), 0


def kernel_calls(ops: Any, x: Draw) -> list[Callable[[], object]]:
    """List calls of a backend that make every launch of its kernels."""
    tokens, stream, wide = x(BATCH, LENGTH, D_MODEL), torch.zeros(BATCH, LENGTH, D_MODEL), x(BATCH, LENGTH, D_INNER)
    states, weight, channels = x(BATCH, LENGTH, D_STATE), torch.zeros(D_MODEL), torch.zeros(D_INNER)
    scan = ScanInputs(
        wide, wide, torch.zeros(D_INNER, D_STATE), states, states, channels, wide, channels, True, True
    )  # fmt: skip
    conv = (wide, torch.zeros(D_INNER, WIDTH), channels, True, True)
    mixer = mixer_inputs(x, D_STATE)
    kept = [x(*shape) for shape in ops.mixer_kept_shapes(mixer)[0]]
    places, sizes = torch.zeros(BATCH, LENGTH, dtype=torch.int64), torch.ones(BATCH, LENGTH)
    return [
        lambda: ops.selective_scan(scan),
        lambda: ops.selective_scan_backward(wide, scan, torch.empty(0)),
        lambda: ops.causal_conv1d(*conv),
        lambda: ops.causal_conv1d_backward(wide, *conv),
        lambda: ops.mixer(mixer, False),
        lambda: ops.mixer(mixer, True),
        lambda: ops.mixer_backward(tokens, mixer, kept),
        lambda: ops.add_rms_norm(tokens, stream, weight, 1e-5),
        lambda: ops.add_rms_norm_backward(tokens, stream, stream, weight, 1e-5),
        lambda: ops.match_tokens(tokens, 1, None, None, FUSED, "sequence"),
        lambda: ops.match_tokens(tokens, 0, places[:, :1], sizes, FUSED, "tome"),
        lambda: ops.fuse_tokens(tokens, places, sizes, LENGTH - FUSED),
        lambda: ops.fuse_tokens_backward(tokens[:, FUSED:].contiguous(), places, sizes),
    ]


def triton_jobs(x: Draw, first: bool) -> Iterator[Job]:
    """Yield each different launch in each configuration, or in the first."""
    seen = set()
    for call in kernel_calls(triton_ops, x):
        with noted() as found:
            call()
        for launch in found:
            key = (launch.kernel.name, repr(_signature(launch.arguments, launch.kernel.constants)))
            if key in seen:
                continue
            seen.add(key)
            for one in launch.kernel.configurations[: 1 if first else None]:
                chosen = ", ".join(f"{name} {value}" for name, value in one.constants.items())
                compiled = partial(compile_triton, launch, one)
                yield Job(launch.kernel.name, f"{chosen or '-'}, {one.warps} warps", compiled)


def compile_triton(launch: Launch, configuration: Configuration, target: int) -> tuple[bytes, int]:
    """Compile a launch in one configuration for a compute capability, times ten."""
    function = launch.kernel.jit
    signature, constants, aligned = _signature({**launch.arguments, **configuration.constants}, launch.kernel.constants)
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in function.arg_names},
        constexprs=constants,
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {**configuration.options(), "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def _signature(
    arguments: Mapping[str, Any], constants: frozenset[str]
) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Return the types of arguments as Triton sees them, the values of constants, and the names of aligned tensors."""
    types, values, aligned = {}, {}, []
    for name, value in arguments.items():
        if name in constants or value is None:
            types[name], values[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = _TYPES[value.dtype]
            aligned += [name] if value.data_ptr() % 16 == 0 else []
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
    return types, values, aligned


def resources(cubin: bytes, kernel: str) -> list[int]:
    """Return registers, bytes of stack and bytes of shared memory of a kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - no user input
    found = re.search(rf"Function _?{kernel}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers of {kernel}: {text}")
    return [int(number) for number in found.groups()]


if __name__ == "__main__":
    main()
