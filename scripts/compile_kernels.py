"""Compile every Triton kernel ahead of time, without a GPU, and list the resources of each configuration.

Usage: python scripts/compile_kernels.py [--kernel NAME] [--target 80] [--dtype bfloat16] [--first] [--json FILE]

Exit with 1 if a configuration spills registers to a stack, which no kernel needs for anything else. The sizes are
those of Vim-Small at 224 x 224. This takes minutes; Triton's cache keeps what was compiled before.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from famba.ops import triton as ops
from famba.ops.availability import interpreted
from famba.ops.inputs import Direction, MixerInputs, ScanInputs
from famba.ops.triton.launch import Configuration, Launch, noted

TARGETS = (80, 90)
BATCH, LENGTH, D_MODEL, D_INNER, D_STATE, DT_RANK, WIDTH, FUSED = 2, 197, 384, 768, 16, 24, 4, 8
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Compiled:
    """Hold the resources of a compiled kernel: registers and bytes of stack of a thread, bytes of shared memory."""

    call: str
    kernel: str
    dtype: str
    configuration: str
    target: str
    registers: int
    shared: int
    stack: int


def _scan(x: Draw) -> ScanInputs:
    tokens, states = (BATCH, LENGTH, D_INNER), (BATCH, LENGTH, D_STATE)
    A, D, bias = torch.randn(D_INNER, D_STATE), torch.randn(D_INNER), torch.randn(D_INNER)
    return ScanInputs(x(*tokens), x(*tokens), A, x(*states), x(*states), D, x(*tokens), bias, True, True)


def _conv(x: Draw) -> list[Any]:
    return [x(BATCH, LENGTH, D_INNER), torch.randn(D_INNER, WIDTH), torch.randn(D_INNER), True, True]


def _mixer(x: Draw) -> MixerInputs:
    direction = Direction(
        torch.randn(D_INNER, WIDTH),
        torch.randn(D_INNER),
        x(DT_RANK + 2 * D_STATE, D_INNER),
        x(D_INNER, DT_RANK),
        torch.randn(D_INNER),
        torch.randn(D_INNER, D_STATE),
        torch.randn(D_INNER),
    )
    return MixerInputs(x(BATCH, LENGTH, D_MODEL), x(2 * D_INNER, D_MODEL), direction, direction, x(D_MODEL, D_INNER))


def _mixer_backward(x: Draw) -> None:
    inputs = _mixer(x)
    shapes, _ = ops.mixer_kept_shapes(inputs)
    ops.mixer_backward(x(BATCH, LENGTH, D_MODEL), inputs, [x(*shape) for shape in shapes])


def _norm_backward(x: Draw) -> None:
    total = torch.randn(BATCH, LENGTH, D_MODEL)
    ops.add_rms_norm_backward(x(BATCH, LENGTH, D_MODEL), total, total, torch.randn(D_MODEL), 1e-5)


def _places() -> tuple[Tensor, Tensor]:
    return torch.zeros(BATCH, LENGTH, dtype=torch.int64), torch.ones(BATCH, LENGTH)


# The calls whose launches are compiled, by the name in the table.
CALLS: dict[str, Callable[[Draw], object]] = {
    "selective_scan": lambda x: ops.selective_scan(_scan(x)),
    "selective_scan_backward": lambda x: ops.selective_scan_backward(
        x(BATCH, LENGTH, D_INNER), _scan(x), torch.empty(0)
    ),
    "causal_conv1d": lambda x: ops.causal_conv1d(*_conv(x)),
    "causal_conv1d_backward": lambda x: ops.causal_conv1d_backward(x(BATCH, LENGTH, D_INNER), *_conv(x)),
    "mixer": lambda x: ops.mixer(_mixer(x), False),
    "mixer with measures": lambda x: ops.mixer(_mixer(x), True),
    "mixer_backward": _mixer_backward,
    "add_rms_norm": lambda x: ops.add_rms_norm(
        x(BATCH, LENGTH, D_MODEL), torch.randn(BATCH, LENGTH, D_MODEL), torch.randn(D_MODEL), 1e-5
    ),
    "add_rms_norm_backward": _norm_backward,
    "match_tokens": lambda x: ops.match_tokens(x(BATCH, LENGTH, D_MODEL), 1, None, None, FUSED, "sequence"),
    "match_tokens with guards and sizes": lambda x: ops.match_tokens(
        x(BATCH, LENGTH, D_MODEL), 0, torch.zeros(BATCH, 1, dtype=torch.int64), _places()[1], FUSED, "tome"
    ),
    "fuse_tokens": lambda x: ops.fuse_tokens(x(BATCH, LENGTH, D_MODEL), *_places(), LENGTH - FUSED),
    "fuse_tokens_backward": lambda x: ops.fuse_tokens_backward(x(BATCH, LENGTH - FUSED, D_MODEL), *_places()),
}


def main() -> None:
    """Compile, print the table, and exit with 1 if a configuration spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", help="only kernels of this name")
    parser.add_argument("--target", type=int, choices=TARGETS, help="only this compute capability, times ten")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="only activations of this dtype")
    parser.add_argument("--first", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET=1 is set, so nothing is compiled; unset it")

    names = [options.dtype] if options.dtype else ["float32", "bfloat16", "float16"]
    rows = []
    for dtype in names:
        for call, launch in launches(getattr(torch, dtype)):
            if options.kernel not in (None, launch.kernel.name):
                continue
            for configuration in launch.kernel.configurations[: 1 if options.first else None]:
                for target in [options.target] if options.target else TARGETS:
                    row = compile_launch(call, dtype, launch, configuration, target)
                    rows.append(row)
                    print(f"{row.kernel} {row.dtype} {row.configuration} {row.target}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(tabulate([asdict(row) for row in rows], headers="keys"))
    spilled = sum(row.stack > 0 for row in rows)
    if not rows or spilled:
        sys.exit(f"{spilled} of {len(rows)} spill" if rows else f"no kernel is named {options.kernel!r}")


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Yield each different launch of the ops for activations of a dtype, with the first call that makes it."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    seen = set()
    for call, run in CALLS.items():
        with noted() as found:
            run(draw)
        for launch in found:
            key = (launch.kernel.name, repr(_signature(launch.arguments, launch.kernel.constants)))
            if key not in seen:
                seen.add(key)
                yield call, launch


def compile_launch(call: str, dtype: str, launch: Launch, configuration: Configuration, target: int) -> Compiled:
    """Compile a launch in one configuration for a compute capability, times ten."""
    function = launch.kernel.jit
    signature, constants, aligned = _signature({**launch.arguments, **configuration.constants}, launch.kernel.constants)
    places = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in function.arg_names},
        constexprs=constants,
        attrs=places,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={**configuration.options(), "enable_fp_fusion": True},
    )
    registers, stack = _resources(compiled.asm["cubin"])
    chosen = ", ".join(f"{name} {value}" for name, value in configuration.constants.items())
    return Compiled(
        call=call,
        kernel=launch.kernel.name,
        dtype=dtype,
        configuration=f"{chosen or '-'}, {configuration.warps} warps",
        target=f"sm_{target}",
        registers=registers,
        shared=compiled.metadata.shared,
        stack=stack,
    )


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


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - no user input
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {text}")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
