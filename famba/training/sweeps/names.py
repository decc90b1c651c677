"""Names of a sweep's folder and of those of its runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from omegaconf import OmegaConf

from famba.training.checkpoint import differences

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


def short_hash(text: str) -> str:
    """Eight hexadecimal digits of the SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def register_resolvers() -> None:
    """Let configurations say ${run_name:OVERRIDES,EXCLUDED}."""
    OmegaConf.register_new_resolver("run_name", folder_name, replace=True)


def _key(override: str) -> str:
    """The key or group of an override: x of x=1, +x=1, ~x and x@package=1."""
    return override.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def _counts(key: str) -> bool:
    """Whether a key, or a group of this name, changes the weights that come out."""
    return bool(differences({key: 0}, {key: 1}) and differences({key: {"": 0}}, {key: {"": 1}}))
