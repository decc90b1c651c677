"""Options that several commands share, and folders that they write to."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from famba import ops
from famba.errors import ConfigError, check_choice
from famba.files import write_whole
from famba.fusion import SETTINGS
from famba.fusion.schedules import PAPER, strategy_names
from famba.ops.registry import AUTO
from famba.training.devices import choose_device, make_current

CHECKPOINT = "a run folder, weights in one, a checkpoint (.pt), or a timm model"
# Fields of `Fusion` to the options that choose them.
FUSION = {"strategy": "fusion", "budget": "budget"} | {name: setting.option for name, setting in SETTINGS.items()}


def add_fusion_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that `read_fusion` reads; `default` says what holds without them."""
    group = parser.add_argument_group("fusion", f"{default}; fusion needs no training to be applied")
    helps = {
        "fusion": f"strategies: {', '.join(strategy_names())} (default: that of the training, if it had one)",
        "budget": "each with these: tokens to remove, or a share of the patches, as fusion.budget (default: the run's)",
    }
    for setting in SETTINGS.values():
        listed = f": {', '.join(setting.names)}" if setting.names else ""
        helps[setting.option] = f"each with these: {setting.help}{listed} (default: as trained)"
    for option, text in helps.items():
        group.add_argument(f"--{option}", metavar="VALUE[,VALUE...]", help=text)


def read_fusion(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the values that were asked for, by fields of `Fusion`. Raises ConfigError for what cannot be read."""
    asked: dict[str, list[Any]] = {}
    for name, option in FUSION.items():
        if (text := getattr(options, option)) is not None:
            items = [item.strip() for item in text.split(",")]
            if not all(items):
                raise ConfigError(f"--{option} is {text!r}; allowed: one value, or several with commas between them")
            asked[name] = [_value(name, item) for item in items]
    return asked


def _value(name: str, text: str) -> Any:
    """Return the value of a field that a text means."""
    option, setting = f"--{FUSION[name]}", SETTINGS.get(name)
    if names := strategy_names() if name == "strategy" else setting and setting.names:
        check_choice(option, text, names)
    try:
        if setting is not None:
            return setting.read(text)
        return text if name == "strategy" or text == PAPER else int(text) if text.isdecimal() else float(text)
    except ValueError:
        allowed = "tokens in total, a share of the patches (between 0 and 1), or paper"
        allowed = allowed if setting is None else "whole numbers from 0"
        raise ConfigError(f"{option} holds {text!r}; allowed: {allowed}") from None


def count(text: str) -> int:
    """Read an option that is a whole number from 1, as argparse's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; allowed: whole numbers from 1")
    return int(text)


def device(name: str) -> torch.device:
    """Return the device that --device names, and make it the current one. Raises ConfigError where it is not there."""
    try:
        found = choose_device(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.device", "--device")) from error
    make_current(found)
    return found


def chosen_backend(name: str) -> AbstractContextManager[None]:
    """Let the named backend compute the ops inside the block; "auto" leaves the environment's choice."""
    return nullcontext() if name == AUTO else ops.use_backend(name)


def prepare_folder(path: str | Path) -> Path:
    """Make a folder, or take the one that is there. Raises ConfigError where nothing could be written to it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        kind = "is a file" if folder.is_file() else f"cannot be written ({error.strerror})"
        raise ConfigError(f"--out {folder} {kind}; name a folder to write to") from error
    return folder


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Write files, each whole, and return them. Raises CheckpointError where the disk refuses."""
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        write_whole(folder / name, lambda path, data=data: Path(path).write_bytes(data))  # type: ignore[misc]
    return [folder / name for name in files]
