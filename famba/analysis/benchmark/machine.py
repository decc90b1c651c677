"""What a benchmark runs on: threads, device, precisions, and what a reader has to know of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from famba.errors import ConfigError
from famba.ops.native import library
from famba.training.devices import choose_device, has_bf16
from famba.training.provenance import provenance

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
"""Name to the dtype of autocast, None for no autocast."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Name to the dtype of activations."""
SEED = 0
_CONTESTANTS = ("mambapy", "mamba-ssm")


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, threads, instruction set, versions, commit and date."""
    found = provenance(device, seed=SEED, world_size=1)
    for package in _CONTESTANTS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["packages"][package] = metadata.version(package)
    obstacle = library.obstacle()
    found["threads"] = torch.get_num_threads()
    found["native_isa"] = library.isa() if obstacle is None else f"none ({obstacle})"
    return found


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "mps" into a device. Raises ConfigError for one that is not here."""
    try:
        return choose_device(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.device", "--device")) from error


def default_precisions(device: torch.device) -> list[str]:
    """Name float32, and bfloat16 where the device computes in it."""
    return ["fp32", "bf16"] if has_bf16(device) else ["fp32"]


def precision_notes(precisions: list[str], device: torch.device) -> list[str]:
    """What to know of the chosen precisions on this device."""
    if "bf16" not in precisions or has_bf16(device):
        return []
    return [
        "this processor has no bfloat16 instructions; torch emulates them, slowly, so times in bf16 here say nothing "
        "about a processor that has them"
    ]


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside the block; as many as it likes for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_bytes() -> int:
    """Memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
