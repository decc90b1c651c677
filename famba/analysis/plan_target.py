"""What a plan is for: a device, a precision and a backend, none of which need be on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from famba.errors import ConfigError, FambaError, near_miss
from famba.ops.registry import AUTO, backends, resolve
from famba.training.checks import check_backend, check_cuda_graphs
from famba.training.config import RunConfig
from famba.training.devices import choose_device, choose_precision
from famba.training.setup import Setup, prepare

_DEVICES = ("cuda", "mps")
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Target:
    """Where a run would compute. autocast: None for float32. obstacle: why it cannot do so here, None where it can."""

    device: torch.device
    autocast: torch.dtype | None
    backend: str
    obstacle: str | None


def target(config: RunConfig, backend: str | None = None) -> Target:
    """Work out where a configuration would compute; `backend` overrules its own.

    What "auto" leaves open is chosen as on this machine, and for a GPU that is not here as on most: bfloat16, by the
    Triton kernels. Raises FambaError for what no machine has.
    """
    option, asked = ("ops.backend", config.ops.backend) if backend is None else ("--backend", backend)
    chosen = asked
    if chosen not in (AUTO, *backends()):
        allowed = [*backends(), AUTO]
        raise ConfigError(f"unknown {option} {chosen!r}{near_miss(chosen, allowed)}; allowed: {', '.join(allowed)}")
    device, is_here = _device(config.trainer.device)
    autocast = _autocast(config.trainer.precision, device, is_here)
    if chosen == AUTO and not is_here and device.type == "cuda" and find_spec("triton"):
        chosen = "triton"
    if chosen == AUTO:
        chosen = resolve(device.type, autocast or torch.float32)
    check_cuda_graphs(config, device, 1, chosen)
    obstacle = _obstacle(config, asked)
    return Target(device, autocast, chosen, obstacle and obstacle.replace("ops.backend", option))


def prepare_for(config: RunConfig, where: Target) -> Setup:
    """Check a configuration as `famba.training.setup.prepare` does, but for what depends on this machine."""
    trainer = replace(config.trainer, device="cpu", precision="fp32", cuda_graphs="auto")
    setup = prepare(replace(config, trainer=trainer, ops=replace(config.ops, backend=AUTO)), processes=1)
    return replace(setup, device=where.device, autocast=where.autocast)


def _device(name: str) -> tuple[torch.device, bool]:
    """The device, and whether it is on this machine."""
    try:
        return choose_device(name), True
    except ConfigError:
        kind = name.partition(":")[0]
        if kind not in _DEVICES:
            raise
        return torch.device(kind), False


def _autocast(precision: str, device: torch.device, is_here: bool) -> torch.dtype | None:
    if precision == "auto":
        on_gpu = torch.bfloat16 if device.type == "cuda" else None
        return choose_precision(precision, device) if is_here else on_gpu
    if precision == "fp16":
        choose_precision(precision, device)  # which some kinds of device have on no machine
    return _PRECISIONS[precision]


def _obstacle(config: RunConfig, backend: str) -> str | None:
    """Why a run could not start here."""
    try:
        device = choose_device(config.trainer.device)
        check_backend(backend, device, choose_precision(config.trainer.precision, device) or torch.float32)
    except FambaError as error:
        return str(error)
    return None
