"""Options of commands that choose how a trained network fuses, read into the fields of `Fusion`."""

from __future__ import annotations

import argparse
from typing import Any

from famba.errors import ConfigError, check_choice
from famba.fusion import SETTINGS
from famba.fusion.schedules import PAPER, strategy_names

OPTIONS = {"strategy": "fusion", "budget": "budget", "layers": "layers"} | {k: s.option for k, s in SETTINGS.items()}
"""Map fields of `Fusion` to the options that choose them."""


def add_fusion_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that `read_options` reads; `default` says what holds without them."""
    group = parser.add_argument_group("fusion", f"{default}; fusion needs no training to be applied")
    helps = {
        "fusion": f"strategies: {', '.join(strategy_names())} (default: that of the training, if it had one); adaptive "
        "where the network was trained so",
        "budget": "each with these: tokens to remove, or a share of the patches, as fusion.budget (default: the run's)",
        "layers": "how many layers fuse in lower and upper (default: as the run, else three quarters); which ones, "
        "counted from 0, in custom",
    }
    for setting in SETTINGS.values():
        listed = f": {', '.join(setting.names)}" if setting.names else ""
        helps[setting.option] = f"each with these: {setting.help}{listed} (default: as trained)"
    for option, text in helps.items():
        group.add_argument(f"--{option}", metavar="VALUE[,VALUE...]", help=text)


def read_options(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Read what was asked for. Raises ConfigError for what cannot be read."""
    asked: dict[str, list[Any]] = {}
    for name, option in OPTIONS.items():
        if (text := getattr(options, option)) is not None:
            items = [item.strip() for item in text.split(",")]
            if not all(items):
                raise ConfigError(f"--{option} is {text!r}; allowed: one value, or several with commas between them")
            asked[name] = [_read(name, item) for item in items]
    return asked


def _read(name: str, text: str) -> Any:
    """Return the value of a field that a text means."""
    option, setting = f"--{OPTIONS[name]}", SETTINGS.get(name)
    if name == "strategy" or (setting is not None and setting.names):
        check_choice(option, text, strategy_names() if setting is None else setting.names)
    if name in ("budget", "layers"):
        try:
            return text if text == PAPER and name == "budget" else int(text) if text.isdecimal() else float(text)
        except ValueError:
            allowed = {"budget": "tokens in total, a share of the patches (between 0 and 1), or paper"}
            told = allowed.get(name, "whole numbers from 0, such as 3, or 2,5,8 for custom")
            raise ConfigError(f"{option} holds {text!r}; allowed: {told}") from None
    return text if setting is None else setting.value(text)
