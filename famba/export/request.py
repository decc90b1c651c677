"""What is exported to where, checked before any work."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from famba.analysis.folders import prepare_folder
from famba.analysis.fusion_options import read_options
from famba.analysis.variants import Asked, label_variants, variants
from famba.errors import ConfigError, near_miss
from famba.export.description import Description, find_summary
from famba.export.formats import FORMATS
from famba.training.weights import Trained, load_trained


@dataclass(frozen=True)
class Request:
    """An export that can begin. target: a name of `FORMATS`. out: the file or folder to write."""

    target: str
    out: Path
    description: Description


def check(options: argparse.Namespace) -> Request:
    """Load the network, let it fuse as asked, and see to it that its file can be written.

    Raises FambaError for what cannot work.
    """
    target = options.format
    if target not in FORMATS:
        raise ConfigError(f"--format is {target!r}{near_miss(target, FORMATS)}; allowed: {', '.join(FORMATS)}")
    if target == "onnx":
        from famba.export.onnx_graph import check_packages

        check_packages()
    asked = read_options(options)
    out = _place(target, options.out)
    trained = load_trained(options.checkpoint)
    strategy, is_own = _fuse(trained, asked)
    summary = find_summary(options.checkpoint)
    architecture = _architecture(trained, options.checkpoint)
    return Request(target, out, Description(architecture, strategy, is_own, trained, summary))


def _place(target: str, out: Path) -> Path:
    """Where to write, in a folder that can be written to."""
    suffix = FORMATS[target]
    if suffix is None:
        if out.suffix in (*FORMATS.values(), ".safetensors"):
            raise ConfigError(f"--out {out} ends like a file; --format {target} writes a folder")
        return prepare_folder(out)
    if out.suffix != suffix:
        raise ConfigError(f"--out is {out}; --format {target} writes a file whose name ends in {suffix}")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, such as {out / ('model' + suffix)}")
    prepare_folder(out.parent)
    return out


def _architecture(trained: Trained, checkpoint: str) -> str:
    """The network's timm name without a tag of weights."""
    name = checkpoint if trained.config is None else trained.config.model.name
    return name.split(".")[0]


def _fuse(trained: Trained, asked: Asked) -> tuple[str, bool]:
    """Let the network fuse as asked; return the name of the strategy, and whether it is as it was trained."""
    if not asked:
        return trained.strategy, True
    found = variants(trained, asked)
    if len(found) != 1:
        raise ConfigError(
            f"the options ask for {len(found)} ways of fusing ({'; '.join(label_variants(found)[:4])}); a file holds "
            "one: name one strategy, one budget, and one of each other option"
        )
    found[0].put_into(trained.model)
    return found[0].fusion.strategy, found[0].own
