"""The text of `python train.py --help`: groups, choices and keys, from the configuration files themselves."""

from __future__ import annotations

from pathlib import Path

import yaml

from famba.training.compose import LAUNCHER, config_dir, groups

_HEAD = """\
Train a Vision Mamba with cross-layer token fusion.

Usage
  python train.py [GROUP=CHOICE ...] [KEY=VALUE ...]     one run
  python train.py -m fusion=none,upper seed=0,1,2        a run for each combination; once more: what is left of them
  python train.py --cfg job [...]                        print the configuration and end

Examples
  python train.py model=vim_s fusion=upper
  python train.py model=vim_micro recipe=light fusion=all fusion.budget=0.5 data.root=/data/cifar100
  python train.py experiment=demo
  python train.py -m experiment=paper_table hydra/launcher=slurm
  python train.py run_dir=runs/mine                      once more: goes on where it stopped
  famba status runs                                      how far runs are

Data ahead of time, for machines without network: famba download cifar100
"""

# Each group's meaning, and the files that hold its keys with what stands before them.
_GROUPS = {
    "model": ("the network; model.KEY=null leaves a value as the model has it", {"_base": "model."}),
    "fusion": ("which layers fuse tokens; fusion.budget is the total removed by any strategy", {"_base": "fusion."}),
    "data": ("the images; data.root is the folder that holds them", {"_base": "data."}),
    "recipe": ("augmentation, optimizer and schedule; keys with the paper's values", {"paper": "", "_base": "recipe."}),
    "logger": ("where metrics go besides the run folder", {"none": "logger."}),
    "experiment": ("several choices under one name; those of several values need -m", {}),
    LAUNCHER: (
        f"with -m, where the runs go; your own: a file in DIR/{LAUNCHER}/ with --config-dir DIR",
        {"local": "hydra.launcher.", "slurm": "hydra.launcher."},
    ),
}


def help_text() -> str:
    """Explain every group, choice and key."""
    entries = yaml.safe_load((config_dir() / "config.yaml").read_text())["defaults"]
    chosen = {
        key.removeprefix("override "): name for entry in entries if entry != "_self_" for key, name in entry.items()
    }
    sections = [_HEAD.rstrip()]
    for group, (meaning, files) in _GROUPS.items():
        folder = config_dir() / group
        lines = [f"{group}: {meaning}" + (f" (default: {chosen[group]})" if chosen[group] else "")]
        lines += [f"  {group}={choice:12} {_comment(folder / f'{choice}.yaml')}" for choice in groups()[group]]
        for file, prefix in files.items():
            lines += [
                f"  keys of {group}={file}" if group == LAUNCHER else "  keys",
                *_keys(folder / f"{file}.yaml", prefix),
            ]
        sections.append("\n".join(lines))
    sections.append("\n".join(["Keys of their own", *_keys(config_dir() / "config.yaml", "")]))
    return "\n\n".join(sections) + "\n"


def _comment(path: Path) -> str:
    comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return next((line for line in comments if not line.startswith("@")), "")


def _keys(path: Path, prefix: str) -> list[str]:
    """Return the lines of a file that set a key, with their comments, by the key's whole name."""
    lines, section = [], ""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if not key.startswith(" "):
            section = f"{key}." if not value.strip() else ""
        if value.strip() and not key.lstrip().startswith(("#", "-", "_")):
            lines.append(f"    {prefix}{section}{line.strip()}")
    return lines
