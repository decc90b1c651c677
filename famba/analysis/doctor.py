"""What a user and a bug report need to know about this machine: versions, devices, backends, and whether they work."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import famba
from famba.errors import BackendError
from famba.ops import (
    Direction,
    add_rms_norm,
    backends,
    bidirectional_mixer,
    causal_conv1d,
    fuse_tokens,
    match_tokens,
    registry,
    selective_scan,
    use_backend,
)
from famba.ops.native import library
from famba.training.devices import describe_device, has_bf16

WIDTH = 100
# Worst error that passes, relative to the largest value of a result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# How often an op rounds to the dtype between its input and its result, where that is more than once.
_ROUNDINGS = {"mixer": 4}
# Tokens of the scan, more than the kernels keep at once, and of the other ops. In Triton's interpreter, which is the
# one way to have Triton on a CPU, a token takes a second; and it cuts bfloat16 off where a GPU rounds.
_TOKENS, _TOKENS_INTERPRETED = (401, 33), (9, 9)

Run = Callable[..., tuple[Tensor, ...]]


def diagnose() -> tuple[str, bool]:
    """Describe this machine and check every usable backend.

    Returns:
        The report, and whether all that can be used works and the environment names nothing that cannot.
    """
    native, native_works = _native()
    choices, choices_work = _choices()
    checks = list(_checks())
    sections = [
        _pairs(_versions()),
        _pairs(_devices()),
        "Backends\n" + _pairs([*_backends(), *choices]),
        "Native kernels\n" + _pairs(native),
        "Self-check against the reference in float64, relative to the largest value\n" + _table(checks),
    ]
    works = native_works and choices_work and all(check.passed for check in checks)
    sections.append("All that can be used works." if works else "Not all works: see FAILED above.")
    return "\n\n".join(sections), works


def _versions() -> list[tuple[str, str]]:
    return [
        ("famba", famba.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("system", platform.platform()),
    ]


def _devices() -> list[tuple[str, str]]:
    cpu = torch.device("cpu")
    rows = [("CPU", f"{describe_device(cpu)}; bfloat16 {_bf16(cpu)}")]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        rows.append((f"CUDA {index}", f"{describe_device(device)}; bfloat16 {_bf16(device)}"))
    if len(rows) == 1:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        rows.append(("CUDA", f"no device (torch is built {'for ' if torch.version.cuda else ''}{built})"))
    rows.append(("MPS", "available" if torch.backends.mps.is_available() else "not available"))
    return rows


def _bf16(device: torch.device) -> str:
    return "native" if has_bf16(device) else "not native, trainer.precision=auto is fp32"


def _backends() -> Iterator[tuple[str, str]]:
    for name, obstacle in backends().items():
        if obstacle is None:
            yield name, "usable"
            continue
        reason, _, remedy = obstacle.rpartition("; ")
        yield name, f"not usable: {reason}"
        yield "", f"remedy: {remedy}"


def _choices() -> tuple[list[tuple[str, str]], bool]:
    """What serves which device, and whether the environment's choice can be followed."""
    with use_backend(registry.AUTO):
        rows = [(f"auto, {device}", registry.resolve(device)) for device in ("cpu", "cuda")]
        slow = registry.slow_choice("cuda") if torch.cuda.is_available() else None
    if slow is not None:
        rows.append(("", f"WARNING: {slow}"))
    chosen = os.environ.get(registry.ENVIRONMENT_VARIABLE)
    if not chosen:
        return rows, True
    try:
        with use_backend(chosen):
            return [*rows, (registry.ENVIRONMENT_VARIABLE, chosen)], True
    except BackendError as error:
        return [*rows, (registry.ENVIRONMENT_VARIABLE, f"FAILED: {error}")], False


def _native() -> tuple[list[tuple[str, str]], bool]:
    """Of the compiled kernels, and whether the environment's choice of instructions can be followed."""
    if library.obstacle() is not None:
        return [("instructions", "none: not usable, see above")], True
    rows = [("usable", ", ".join(library.isas())), ("threads", str(torch.get_num_threads()))]
    chosen = os.environ.get(library.ENVIRONMENT_VARIABLE)
    try:
        in_use = library.isa()
    except BackendError as error:
        return [("instructions", f"FAILED: {library.ENVIRONMENT_VARIABLE}={chosen}: {error}"), *rows], False
    origin = f"chosen by {library.ENVIRONMENT_VARIABLE}" if chosen else "the best that this processor has"
    return [("instructions", f"{in_use}, {origin}"), *rows], True


@dataclass(frozen=True)
class _Check:
    """How an op fares: its worst error, or the first line of what it raised."""

    backend: str
    device: str
    isa: str | None
    dtype: torch.dtype
    op: str
    error: float | None
    failure: str | None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= _ROUNDINGS.get(self.op, 1) * TOLERANCE[self.dtype]

    @property
    def names(self) -> list[str]:
        return [self.backend, self.device, self.isa or "-", str(self.dtype).removeprefix("torch."), self.op]


def _table(checks: Sequence[_Check]) -> str:
    """All checks, and below what those that raised have to say."""
    rows = [
        [*check.names, "-" if check.error is None else f"{check.error:.1e}", "ok" if check.passed else "FAILED"]
        for check in checks
    ]
    headers = ["backend", "device", "instructions", "dtype", "op", "worst error", "result"]
    failures = [f"{' '.join(check.names)}: {check.failure}" for check in checks if check.failure is not None]
    return "\n".join([tabulate(rows, headers=headers, disable_numparse=True), *(_wrapped(x) for x in failures)])


def _checks() -> Iterator[_Check]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    cases = [(b, d, t) for b, obstacle in backends().items() if obstacle is None for d in devices for t in TOLERANCE]
    # Triton compiles and tunes kernels meanwhile, which can take minutes.
    for backend, device, dtype in tqdm(cases, "self-check", leave=False, file=sys.stderr):
        interpreted = (backend, device) == ("triton", "cpu")
        if not _serves(backend, device, dtype) or (interpreted and dtype != torch.float32):
            continue
        for isa in library.isas() if backend == "native" else [None]:
            for op, (run, inputs) in _ops(*(_TOKENS_INTERPRETED if interpreted else _TOKENS)).items():
                yield _Check(backend, device, isa, dtype, op, *_check(backend, device, isa, dtype, run, inputs))


def _serves(backend: str, device: str, dtype: torch.dtype) -> bool:
    try:
        with use_backend(backend):
            registry.resolve(device, dtype)
    except BackendError:
        return False
    return True


def _check(
    backend: str, device: str, isa: str | None, dtype: torch.dtype, run: Run, inputs: Sequence[Tensor]
) -> tuple[float | None, str | None]:
    """The worst error of an op's outputs and gradients, or else what it raised."""
    rounded = [x.to(dtype) for x in inputs]
    try:
        with use_backend("reference"):
            wanted = _outputs_and_gradients(run, [x.double() for x in rounded])
        if isa is not None:
            library.use_isa(isa)
        with use_backend(backend):
            found = _outputs_and_gradients(run, [x.to(device) for x in rounded])
        return max(_relative_error(x, y) for x, y in zip(found, wanted, strict=True)), None
    except Exception as failure:
        # One broken backend must not hide how the others fare.
        return None, f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    finally:
        if isa is not None:
            library.use_isa(None)


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """Infinite where something is not a number."""
    error = (found.cpu().double() - wanted).abs().max() / wanted.abs().max()
    return error.item() if error.isfinite() else float("inf")


def _outputs_and_gradients(run: Run, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])
    return [x.detach() for x in (*outputs, *grads)]


def _ops(length: int, short: int) -> dict[str, tuple[Run, list[Tensor]]]:
    """Each op with inputs: channels that fill no vector, and `length` tokens, or `short` for mixer and fusing."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def scans(*x: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, D, z, bias = x
        return tuple(selective_scan(u, delta, A, B, C, D, z, bias, True, reverse) for reverse in (False, True))

    def mixer(x: Tensor, in_weight: Tensor, out_weight: Tensor, *directions: Tensor) -> tuple[Tensor, ...]:
        return (bidirectional_mixer(x, in_weight, Direction(*directions[:7]), Direction(*directions[7:]), out_weight),)

    def fuse(x: Tensor) -> tuple[Tensor, ...]:
        removed = short // 4
        places, weights, _ = match_tokens(metric.to(x.device), 1, None, None, removed, "sequence")
        return (fuse_tokens(x, places, weights, short - removed),)

    batch, channels, states, d_model, rank = 2, 19, 5, 7, 3
    metric = draw(batch, short, channels)
    u, delta, z = (draw(batch, length, channels) for _ in range(3))
    A, D, bias = -draw(channels, states).exp(), draw(channels), draw(channels)
    B, C = draw(batch, length, states), draw(batch, length, states)
    x_weight, dt_weight = draw(rank + 2 * states, channels) / channels**0.5, draw(channels, rank) / rank
    direction = [draw(channels, 4), bias, x_weight, dt_weight, bias, A, D]
    into, out = draw(2 * channels, d_model) / d_model**0.5, draw(d_model, channels) / channels**0.5
    return {
        "scan": (scans, [u, delta, A, B, C, D, z, bias]),
        "conv": (lambda x, weight, bias: (causal_conv1d(x, weight, bias, "silu"),), [u, draw(channels, 4), bias]),
        "norm": (lambda x, residual, weight: add_rms_norm(x, residual, weight, 1e-5), [u, delta, D]),
        "mixer": (mixer, [draw(batch, short, d_model), into, out, *direction, *direction]),
        "fuse": (fuse, [draw(batch, short, channels)]),
    }


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, long ones on several lines."""
    indent = " " * 15
    return "\n".join(
        textwrap.fill(value, WIDTH, initial_indent=f"{name:<{len(indent)}}", subsequent_indent=indent)
        for name, value in rows
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")
