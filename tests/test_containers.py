"""Test that docker/ agrees with the rest of the project, without a container engine."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from runs import ROOT


def test_pinned_versions_are_those_that_famba_asks_for() -> None:
    pinned: dict[str, str] = {}
    for name in ("torch", "famba", "extensions"):
        text = (ROOT / f"docker/requirements/{name}.txt").read_text()
        found = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
        pinned |= {canonicalize_name(package): version for package, version in found}
    asked = [Requirement(text) for text in metadata.requires("famba") or []]
    asked = [x for x in asked if x.marker is None or x.marker.evaluate({"extra": "cuda"})]
    assert {"torch", "timm", "mamba-ssm", "causal-conv1d"} <= {x.name for x in asked}
    for requirement in asked:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
