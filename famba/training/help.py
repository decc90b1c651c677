"""What `python train.py --help` prints: the groups and their choices, from the configuration files themselves."""

from __future__ import annotations

from pathlib import Path

import yaml

from famba.training.compose import config_dir, groups

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

Data ahead of time, for machines without network: famba download cifar100
"""

_GROUPS = {
    "model": "the network; model.KEY=null leaves a value as the model has it",
    "fusion": "which layers fuse tokens; fusion.budget is the total removed, the same for every strategy",
    "data": "the images; data.root is the folder that holds them",
    "recipe": "augmentation, optimizer and schedule, with trainer.epochs, trainer.batch_size and trainer.precision",
    "logger": "where metrics go besides the run folder",
    "experiment": "several choices under one name; those of several values need -m",
}
_LAUNCHER = "hydra/launcher"


def help_text() -> str:
    """Explain every group, choice and key."""
    entries = yaml.safe_load((config_dir() / "config.yaml").read_text())["defaults"]
    chosen = {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}
    sections = [_HEAD.rstrip()]
    for group, meaning in _GROUPS.items():
        folder = config_dir() / group
        default = f" (default: {chosen[group]})" if chosen[group] else ""
        lines = [f"{group}: {meaning}{default}"]
        lines += [f"  {group}={choice:12} {_first_comment(folder / f'{choice}.yaml')}" for choice in groups()[group]]
        shared = folder / ("_base.yaml" if (folder / "_base.yaml").is_file() else "none.yaml")
        if group != "recipe" and shared.is_file():
            lines += ["  keys", *(f"    {group}.{line}" for line in _keys(shared))]
        sections.append("\n".join(lines))
    sections.append(_launchers(chosen[f"override {_LAUNCHER}"]))
    recipe = (config_dir() / "recipe" / "paper.yaml").read_text().split("recipe:\n")[1].splitlines()
    recipe += _keys(config_dir() / "recipe" / "_base.yaml")
    sections.append("\n".join(["recipe: keys, with the paper's values", *(f"    recipe.{x.strip()}" for x in recipe)]))
    sections.append("Keys of their own\n" + "\n".join(f"  {line}" for line in _plain_keys()))
    return "\n\n".join(sections) + "\n"


def _launchers(default: str) -> str:
    lines = [
        f"{_LAUNCHER}: with -m, where the runs go (default: {default})",
        *(f"  {_LAUNCHER}={choice:16} {_first_comment(_launcher_file(choice))}" for choice in groups()[_LAUNCHER]),
        f"  one's own: --config-dir DIR with a file in DIR/{_LAUNCHER}/. `famba status FOLDER` shows how far runs are",
    ]
    for choice in ("local", "slurm"):
        # The class is no choice.
        keys = [line for line in _keys(_launcher_file(choice)) if not line.startswith("_")]
        lines += [f"  keys of {choice}", *(f"    hydra.launcher.{line}" for line in keys)]
    return "\n".join(lines)


def _launcher_file(choice: str) -> Path:
    return config_dir() / _LAUNCHER / f"{choice}.yaml"


def _first_comment(path: Path) -> str:
    comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    comments = [line for line in comments if not line.startswith("@")]
    return comments[0] if comments else ""


def _keys(path: Path) -> list[str]:
    return [
        line for line in path.read_text().splitlines() if ":" in line and not line.startswith(("#", "defaults", " "))
    ]


def _plain_keys() -> list[str]:
    """Keys of config.yaml outside the groups, with their comments."""
    lines, section = [], ""
    for line in (config_dir() / "config.yaml").read_text().splitlines():
        if line.startswith("hydra:"):
            break
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "-", "defaults")):
            continue
        if not line.startswith(" "):
            section = ""
            if stripped.endswith(":"):
                section = f"{stripped[:-1]}."
                continue
        lines.append(f"{section}{stripped}")
    values = yaml.safe_load((config_dir() / "recipe" / "paper.yaml").read_text())["trainer"]
    return [
        *lines,
        *(f"trainer.{key}: {value}  # the paper's recipe; each recipe has its own" for key, value in values.items()),
    ]
