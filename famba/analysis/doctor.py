"""Show versions, devices and backends of this machine, and check that each backend computes what it should."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import famba
from famba.analysis.benchmark.ops import OPS, Built, Case
from famba.errors import BackendError
from famba.ops import backends, registry, use_backend
from famba.ops.native import library
from famba.training.devices import describe_device, has_bf16

WIDTH = 100
# Worst error that passes, relative to the largest value of a result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# How often an op rounds to the dtype between its input and its result, where that is more than once.
_ROUNDINGS = {"bidirectional_mixer": 4}
# Tokens of the scan, more than the kernels keep at once, and of the other ops. In Triton's interpreter, which is the
# one way to have Triton on a CPU, a token takes a second; and it cuts bfloat16 off where a GPU rounds.
_TOKENS, _TOKENS_INTERPRETED = (401, 33), (9, 9)
_SHORT = ("bidirectional_mixer", "match_tokens", "fuse_tokens")
_DIRECTED = ("selective_scan", "causal_conv1d")
_CHANNELS, _STATES = 19, 5  # which fill no vector
_Rows = list[tuple[str, str]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe `famba doctor`, which has no options."""
    parser.description = (
        "Show versions, devices and backends, and check each backend that can be used against the reference. The exit "
        "status is 1 where something fails."
    )


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    report, works = diagnose()
    print(report)
    return 0 if works else 1


def diagnose() -> tuple[str, bool]:
    """Describe this machine and check every usable backend.

    Returns the report, and whether all that can be used works and the environment names nothing that cannot be used.
    """
    native, native_works = _native()
    choices, choices_work = _choices()
    checks = list(_checks())
    works = native_works and choices_work and all(check.passed for check in checks)
    versions = {"famba": famba.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    sections = [
        _pairs([*versions.items(), ("system", platform.platform())]),
        _pairs(_devices()),
        "Backends\n" + _pairs([*_backends(), *choices]),
        "Native kernels\n" + _pairs(native),
        "Self-check against the reference in float64, relative to the largest value\n" + _table(checks),
        "All that can be used works." if works else "Not all works: see FAILED above.",
    ]
    return "\n\n".join(sections), works


def _devices() -> _Rows:
    found = {"CPU": torch.device("cpu")}
    found |= {f"CUDA {index}": torch.device("cuda", index) for index in range(torch.cuda.device_count())}
    rows = []
    for name, device in found.items():
        bf16 = "native" if has_bf16(device) else "not native, trainer.precision=auto is fp32"
        rows.append((name, f"{describe_device(device)}; bfloat16 {bf16}"))
    if len(rows) == 1:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        rows.append(("CUDA", f"no device (torch is built {built})"))
    return [*rows, ("MPS", "available" if torch.backends.mps.is_available() else "not available")]


def _backends() -> Iterator[tuple[str, str]]:
    for name, obstacle in backends().items():
        reason, _, remedy = (obstacle or "").rpartition("; ")
        yield name, "usable" if obstacle is None else f"not usable: {reason}"
        if obstacle is not None:
            yield "", f"remedy: {remedy}"


def _choices() -> tuple[_Rows, bool]:
    """Return the backend that serves each device, and whether the environment's choice can be followed."""
    with use_backend(registry.AUTO):
        rows = [(f"auto, {device}", registry.resolve(device)) for device in ("cpu", "cuda")]
        slow = registry.slow_choice("cuda") if torch.cuda.is_available() else None
    rows += [] if slow is None else [("", f"WARNING: {slow}")]
    chosen = os.environ.get(registry.ENVIRONMENT_VARIABLE)
    if not chosen:
        return rows, True
    try:
        with use_backend(chosen):
            return [*rows, (registry.ENVIRONMENT_VARIABLE, chosen)], True
    except BackendError as error:
        return [*rows, (registry.ENVIRONMENT_VARIABLE, f"FAILED: {error}")], False


def _native() -> tuple[_Rows, bool]:
    """Describe the compiled kernels, and tell whether the environment's choice of instructions can be followed."""
    if library.obstacle() is not None:
        return [("instructions", "none: not usable, see above")], True
    rows = [("usable", ", ".join(library.isas())), ("threads", str(torch.get_num_threads()))]
    chosen = os.environ.get(library.ENVIRONMENT_VARIABLE)
    try:
        origin = f"chosen by {library.ENVIRONMENT_VARIABLE}" if chosen else "the best that this processor has"
        return [("instructions", f"{library.isa()}, {origin}"), *rows], True
    except BackendError as error:
        return [("instructions", f"FAILED: {library.ENVIRONMENT_VARIABLE}={chosen}: {error}"), *rows], False


class _Check(NamedTuple):
    """Hold how an op fares: its worst error, or the first line of what it raised."""

    backend: str
    device: str
    instructions: str
    dtype: str
    op: str
    found: float | str

    @property
    def passed(self) -> bool:
        allowed = _ROUNDINGS.get(self.op, 1) * TOLERANCE[getattr(torch, self.dtype)]
        return not isinstance(self.found, str) and self.found <= allowed


def _table(checks: Sequence[_Check]) -> str:
    """Return a table of all checks, and below it what failed ones raised."""
    raised = [check for check in checks if isinstance(check.found, str)]
    rows = [
        [*one[:5], "-" if one in raised else f"{one.found:.1e}", "ok" if one.passed else "FAILED"] for one in checks
    ]
    table = tabulate(rows, headers=[*_Check._fields[:5], "worst error", "result"], disable_numparse=True)
    said = (textwrap.fill(f"{' '.join(one[:5])}: {one.found}", WIDTH, subsequent_indent="  ") for one in raised)
    return "\n".join([table, *said])


def _checks() -> Iterator[_Check]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    cases = [(b, d, t) for b, obstacle in backends().items() if obstacle is None for d in devices for t in TOLERANCE]
    # Triton compiles and tunes kernels meanwhile, which can take minutes.
    for backend, device, dtype in tqdm(cases, "self-check", leave=False, file=sys.stderr):
        interpreted = (backend, device) == ("triton", "cpu")
        if not _serves(backend, device, dtype) or (interpreted and dtype != torch.float32):
            continue
        long, short = _TOKENS_INTERPRETED if interpreted else _TOKENS
        for isa, op in product(library.isas() if backend == "native" else [None], OPS):
            built = Case(op, 2, short if op in _SHORT else long, _CHANNELS, _STATES, "fp32").built()
            runs: list[Callable[..., Any]] = [built.run]
            runs += [partial(built.run, reverse=True)] if op in _DIRECTED else []
            error = _error(built, runs, backend, device, isa, dtype)
            yield _Check(backend, device, isa or "-", str(dtype).removeprefix("torch."), op, error)


def _serves(backend: str, device: str, dtype: torch.dtype) -> bool:
    try:
        with use_backend(backend):
            registry.resolve(device, dtype)
    except BackendError:
        return False
    return True


def _error(
    built: Built, runs: Sequence[Callable[..., Any]], backend: str, device: str, isa: str | None, dtype: torch.dtype
) -> float | str:
    """Return the worst error of an op's outputs and gradients, run in several ways, or else what it raised."""
    given = [x.to(dtype) for x in built.learned or built.fixed]
    others = built.fixed if built.learned else []

    def results(name: str, x: list[Tensor], where: str) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_(bool(built.learned)) for leaf in x]
        with use_backend(name):
            found = [run(*leaves, *(one.to(where) for one in others)) for run in runs]
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


def _pairs(rows: _Rows) -> str:
    """Return names and what they are, long ones on several lines."""
    indent = " " * 15
    return "\n".join(
        textwrap.fill(value, WIDTH, initial_indent=f"{name:<{len(indent)}}", subsequent_indent=indent)
        for name, value in rows
    )
