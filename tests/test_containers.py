"""Test that docker/ agrees with the rest of the project, without a container engine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def joined(text: str) -> Iterator[str]:
    """Lines that say something, continued ones as one."""
    without_comments = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return (line.strip() for line in without_comments.replace("\\\n", " ").splitlines() if line.strip())


def pins(name: str) -> dict[str, str]:
    lines = (line.split("==") for line in joined((ROOT / f"docker/requirements/{name}.txt").read_text()))
    return {package.lower().replace("_", "-"): version for package, version in lines}


def test_pinned_versions_are_those_that_famba_asks_for() -> None:
    pinned = pins("torch") | pins("famba") | pins("extensions")
    asked = [Requirement(text) for text in metadata.requires("famba") or []]
    asked = [x for x in asked if x.marker is None or x.marker.evaluate({"extra": "cuda"})]
    assert {"torch", "timm", "mamba-ssm", "causal-conv1d"} <= {x.name for x in asked}
    for requirement in asked:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
