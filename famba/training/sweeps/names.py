"""Names of a sweep's folder and of those of its runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import OmegaConf

from famba.training.checkpoint import differences
from famba.training.run_folder import SWEEP

ONLY_RUN = "run"  # of a sweep whose runs differ in nothing
_OTHER = re.compile(r"[^A-Za-z0-9_.,=+@:\[\]-]+")
_LONGEST = 200  # bytes; file systems allow 255
_DIGITS = 8


def folder_name(overrides: Sequence[str], excluded: Iterable[str] = ()) -> str:
    """Return the name of a run's folder: its overrides but those of the `excluded` keys, as one plain file name.

    What a file name should not hold becomes "_"; a name that was changed or shortened ends with a hash of the whole.
    """
    without = set(excluded)
    lines = sorted(line for line in overrides if _key(line) not in without)
    whole = ",".join(lines)
    if not whole:
        return ONLY_RUN
    name = _OTHER.sub("_", whole)[:_LONGEST]
    return name if name == whole else f"{name}-{short_hash(whole)}"


def sweep_name(experiment: str | None, fixed: Iterable[str], swept: Iterable[str]) -> str:
    """Return the name of a sweep's folder, from what its runs share and from the keys in which they differ.

    The values that they differ in are left out, so that a sweep can grow in its folder; so are settings that change no
    weights, such as data.root.
    """
    shared = sorted(line for line in fixed if _counts(_key(line)))
    return f"{experiment or 'sweep'}-{short_hash(json.dumps([shared, sorted(swept)]))}"


def run_name(overrides: Sequence[str], excluded: Iterable[str] = (), sweep: str | None = None) -> str:
    """Return the name of a run's folder in a sweep's: the one that a run of equal overrides has there, if any.

    Where there is none, its folder_name, with the keys too in which the runs that are there differ.
    """
    there = [(run["folder"], _what_counts(run["overrides"])) for run in (recorded(Path(sweep)) if sweep else [])]
    own = _what_counts(overrides)
    for folder, others in there:
        if others == own:
            return folder
    differing = {_key(line) for _, others in there for line in others ^ there[0][1]}
    return folder_name(overrides, set(excluded) - differing)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that a sweep's folder knows of, each with its folder's name and its overrides.

    A damaged entry is left out, and so is a folder that is not inside the sweep's.
    """
    try:
        runs = json.loads((folder / SWEEP).read_text())["runs"]
        found: list[dict[str, Any]] = [
            {"folder": str(run["folder"]), "overrides": [str(line) for line in run["overrides"]]} for run in runs
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [run for run in found if _is_inside(run["folder"])]


def short_hash(text: str) -> str:
    """Eight hexadecimal digits of the SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def register_resolvers() -> None:
    """Let configurations say ${run_name:OVERRIDES,EXCLUDED,SWEEP}."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def _is_inside(folder: str) -> bool:
    path = PurePosixPath(folder)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in folder


def _what_counts(overrides: Iterable[str]) -> frozenset[str]:
    """Overrides without their order, and without the folder that they stand in."""
    return frozenset(line for line in overrides if _key(line) != "run_dir" and not _key(line).startswith("hydra"))


def _key(override: str) -> str:
    """The key or group of an override: x of x=1, +x=1, ~x and x@package=1."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def _counts(key: str) -> bool:
    """Whether a key, or a group of this name, changes the weights that come out."""
    return bool(differences({key: 0}, {key: 1}) and differences({key: {"": 0}}, {key: {"": 1}}))
