"""Provenance of a run's numbers."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
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
    return {
        "started": now(),
        "famba": famba.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "platform": platform.platform(),
        "device": describe_device(device),
        "processes": world_size,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "backend": resolve(device.type, dtype),
        "seed": seed,
        "arguments": [without_credentials(item) for item in sys.argv[1:]],
    }


def _versions() -> Iterator[tuple[str, str]]:
    """Yield installed packages and their versions."""
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def git_commit() -> str | None:
    """Return the commit of the checkout that famba is imported from, with "-dirty" where it is changed.

    Outside a checkout, as in a container: the environment variable FAMBA_COMMIT, None where that is not set.
    """
    folder = Path(famba.__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return os.environ.get("FAMBA_COMMIT") or None
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _git(folder: Path, *arguments: str) -> str | None:
    # The checkout has to be famba's own, not one that a virtual environment happens to lie in.
    if not (folder.parent / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(folder), *arguments],  # noqa: S607 - the user's git
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
