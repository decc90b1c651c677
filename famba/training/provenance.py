"""Record where a run's numbers come from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import famba
from famba.ops.registry import resolve
from famba.training.config import without_credentials
from famba.training.devices import describe_device

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "hydra-core", "triton", "mamba-ssm", "causal-conv1d")


def provenance(device: torch.device, seed: int, world_size: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return versions, machine, commit, seed and backend of this run; no names of users or hosts."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "started": now(),
        "famba": famba.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "device": describe_device(device),
        "processes": world_size,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "backend": resolve(device.type, dtype),
        "seed": seed,
        "arguments": [without_credentials(item) for item in sys.argv[1:]],
    }


def git_commit() -> str | None:
    """Return the commit of famba's checkout, with "-dirty" if it is changed; outside of one $FAMBA_COMMIT."""
    root = Path(famba.__file__).resolve().parents[1]
    # The checkout has to be famba's own, not one that a virtual environment happens to lie in.
    if (root / "pyproject.toml").is_file():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
    return os.environ.get("FAMBA_COMMIT") or None


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
