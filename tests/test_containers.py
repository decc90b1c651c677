"""Test that docker/ agrees with the rest of the project, without a container engine."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from famba.cli import _parser
from famba.training.compose import compose

ROOT = Path(__file__).parents[1]
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]


def joined(text: str) -> Iterator[str]:
    """Lines that say something, continued ones as one."""
    without_comments = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return (line.strip() for line in without_comments.replace("\\\n", " ").splitlines() if line.strip())


def instructions(path: str) -> list[tuple[str, str]]:
    parts = (line.partition(" ") for line in joined((ROOT / path).read_text()))
    return [(word, rest.strip()) for word, _, rest in parts]


def pins(name: str) -> dict[str, str]:
    lines = (line.split("==") for line in joined((ROOT / f"docker/requirements/{name}.txt").read_text()))
    return {package.lower().replace("_", "-"): version for package, version in lines}


def sources(path: str) -> list[str]:
    """List the paths that a Dockerfile copies from the checkout."""
    copied = [rest.split()[:-1] for word, rest in instructions(path) if word == "COPY" and "--from" not in rest]
    bound = re.findall(r"--mount=type=bind,source=([^,]+)", (ROOT / path).read_text())
    return [name for names in copied for name in names] + bound


def test_pinned_versions_are_those_that_famba_asks_for() -> None:
    pinned = pins("torch") | pins("famba") | pins("extensions")
    asked = [Requirement(text) for text in metadata.requires("famba") or []]
    asked = [x for x in asked if x.marker is None or x.marker.evaluate({"extra": "cuda"})]
    assert {"torch", "timm", "mamba-ssm", "causal-conv1d"} <= {x.name for x in asked}
    for requirement in asked:
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


@pytest.mark.parametrize("path", DOCKERFILES)
def test_what_is_copied_is_there_and_not_ignored(path: str) -> None:
    kept = {line[1:] for line in joined((ROOT / ".dockerignore").read_text()) if line.startswith("!")}
    assert sources(path)
    for source in sources(path):
        assert (ROOT / source).exists()
        assert Path(source).parts[0] in kept


def commands(text: str) -> list[list[str]]:
    """Arguments of each call of famba or train.py, as the famba command takes them."""
    found = []
    for line in joined(text):
        words = shlex.split(line, comments=True)
        places = [i for i, word in enumerate(words) if re.fullmatch(r"famba|(/famba/)?train\.py|famba\.sif", word)]
        if places and "build" not in words:
            *_, last = places
            found.append((["train"] if words[last].endswith("train.py") else []) + words[last + 1 :])
    return found


DOCUMENT = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "docs/containers.md").read_text(), re.DOTALL))
DEFAULTS = [shlex.join(json.loads(rest)) for x in DOCKERFILES for word, rest in instructions(x) if word == "CMD"]
CALLS = [(ROOT / "docker/check_image.sh").read_text(), DOCUMENT, "\n".join(DEFAULTS)]


@pytest.mark.parametrize("text", CALLS, ids=["check", "document", "default"])
def test_commands_exist(text: str) -> None:
    calls = commands(text)
    assert calls
    for command, *arguments in calls:
        if command == "train":
            compose([x for x in arguments if "=" in x])
        else:
            _parser([command]).parse_args([command, *arguments])
