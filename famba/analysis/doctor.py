"""Show versions, devices and backends of this machine, and check that each backend computes what it should."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import textwrap
from collections.abc import Iterator
from itertools import product

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import famba
from famba.analysis.benchmark.ops import OPS, Case, obstacle
from famba.errors import BackendError
from famba.ops import backends, registry, use_backend
from famba.ops.native import library
from famba.training.devices import describe_device, has_bf16

WIDTH = 100
# Worst error that passes, relative to the largest value of a result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# How often an op rounds to the dtype between its input and its result, where that is more than once.
_ROUNDINGS = {"bidirectional_mixer": 4}
# Tokens of the scan, more than the kernels keep at once, and of the other ops.
_LONG, _SHORT = 401, 33
_DIRECTED = ("selective_scan", "causal_conv1d")
_CHANNELS, _STATES = 19, 5  # which fill no vector


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe `famba doctor`, which has no options."""
    parser.description = f"{__doc__} The exit status is 1 where something fails."


def run(options: argparse.Namespace) -> int:
    """Print versions, devices and checks; return 0 where all that can be used, or that the environment names, works."""
    rows = [*_machine(), *_backends()]
    checks, raised = [], []
    for *case, found in _checks():
        allowed = _ROUNDINGS.get(case[-1], 1) * TOLERANCE[getattr(torch, case[-2])]
        passed = not isinstance(found, str) and found <= allowed
        checks.append([*case, "-" if isinstance(found, str) else f"{found:.1e}", "ok" if passed else "FAILED"])
        if isinstance(found, str):
            raised.append(textwrap.fill(f"{' '.join(case)}: {found}", WIDTH, subsequent_indent="  "))
    headers = ["backend", "device", "instructions", "dtype", "op", "worst error", "result"]
    works = not any("FAILED" in cell for row in [*rows, *checks] for cell in row)
    print(tabulate(rows, tablefmt="plain", disable_numparse=True, maxcolwidths=[None, WIDTH - 15]))
    print("\nSelf-check against the reference in float64, relative to the largest value\n")
    print("\n".join([tabulate(checks, headers=headers, disable_numparse=True), *raised]))
    print("\nAll that can be used works." if works else "\nNot all works: see FAILED above.")
    return 0 if works else 1


def _machine() -> Iterator[tuple[str, str]]:
    """Yield names and values of versions and devices."""
    yield "famba", famba.__version__
    yield "Python", platform.python_version()
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield "torch", f"{torch.__version__}, built {built}"
    yield "system", platform.platform()
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in map(torch.device, devices):
        bf16 = "native" if has_bf16(device) else "not native, trainer.precision=auto is fp32"
        yield str(device).upper(), f"{describe_device(device)}; bfloat16 {bf16}"
    yield "MPS", "available" if torch.backends.mps.is_available() else "not available"


def _backends() -> Iterator[tuple[str, str]]:
    """Yield names and values of backends, of the native kernels, and of what the environment chooses."""
    for name, hindrance in backends().items():
        reason, _, remedy = (hindrance or "").rpartition("; ")
        yield name, "usable" if hindrance is None else f"not usable: {reason}"
        if hindrance is not None:
            yield "", f"remedy: {remedy}"
    with use_backend(registry.AUTO):
        yield from ((f"auto, {device}", registry.resolve(device)) for device in ("cpu", "cuda"))
        if torch.cuda.is_available() and (slow := registry.slow_choice("cuda")) is not None:
            yield "", f"WARNING: {slow}"
    if chosen := os.environ.get(registry.ENVIRONMENT_VARIABLE):
        try:
            with use_backend(chosen):
                yield registry.ENVIRONMENT_VARIABLE, chosen
        except BackendError as error:
            yield registry.ENVIRONMENT_VARIABLE, f"FAILED: {error}"
    if library.obstacle() is None:
        try:
            yield "instructions", f"{library.isa()} of {', '.join(library.isas())}; {torch.get_num_threads()} threads"
        except BackendError as error:
            yield library.ENVIRONMENT_VARIABLE, f"FAILED: {error}"


def _checks() -> Iterator[tuple[str, str, str, str, str, float | str]]:
    """Yield backend, device, instructions, dtype and op, and its worst error or the first line of what it raised."""
    devices = map(torch.device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    cases = [case for case in product(backends(), devices, TOLERANCE) if obstacle(*case) is None]
    # Triton compiles and tunes kernels meanwhile, which can take minutes.
    for backend, device, dtype in tqdm(cases, "self-check", leave=False, file=sys.stderr):
        for isa, op in product(library.isas() if backend == "native" else [None], OPS):
            error = _error(op, backend, device.type, isa, dtype)
            yield backend, device.type, isa or "-", str(dtype).removeprefix("torch."), op, error


def _error(op: str, backend: str, device: str, isa: str | None, dtype: torch.dtype) -> float | str:
    """Return the worst error of an op's outputs and gradients, or else what it raised; reversed too if directed."""
    built = Case(op, 2, _LONG if op in _DIRECTED else _SHORT, _CHANNELS, _STATES).built()
    ways = [{}, {"reverse": True}] if op in _DIRECTED else [{}]
    given = [x.to(dtype) for x in built.learned or built.fixed]
    others = built.fixed if built.learned else []

    def results(name: str, x: list[Tensor], where: str) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_(bool(built.learned)) for leaf in x]
        with use_backend(name):
            found = [built.run(*leaves, *(one.to(where) for one in others), **way) for way in ways]
            outputs = [y for one in found for y in ([one] if isinstance(one, Tensor) else one)]
            grads = torch.autograd.grad(outputs, leaves, [y.detach() for y in outputs]) if built.learned else ()
        return [y.detach().cpu().double() for y in (*outputs, *grads)]

    try:
        wanted = results("reference", [x.double() for x in given], "cpu")
        if isa is not None:
            library.use_isa(isa)
        found = results(backend, [x.to(device) for x in given], device)
        errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(found, wanted, strict=True)]
        return max(error.item() if error.isfinite() else float("inf") for error in errors)
    except Exception as failure:
        # One broken backend must not hide how the others fare.
        return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    finally:
        if isa is not None:
            library.use_isa(None)
