"""Options that several commands share: ways of fusing to compare on one trained network, and folders to write to."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from famba.analysis.trained import Trained
from famba.errors import BackendError, ConfigError, check_choice, named
from famba.files import write_whole
from famba.fusion import RULES, SETTINGS, Fusion, labels
from famba.fusion.schedules import ADAPTIVE, CUSTOM, NONE, PAPER, strategy_names
from famba.models import Backbone
from famba.ops.registry import AUTO, ENVIRONMENT_VARIABLE, resolve, use_backend
from famba.training.devices import choose_device

CHECKPOINT = "a run folder, weights in one, a checkpoint (.pt), or a timm model"
# Fields of `Fusion` to the options that choose them.
FUSION = {"strategy": "fusion", "budget": "budget"} | {name: setting.option for name, setting in SETTINGS.items()}


def add_fusion_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that `read_fusion` reads; `default` says what holds without them."""
    group = parser.add_argument_group("fusion", f"{default}; fusion needs no training to be applied")
    helps = {
        "fusion": f"strategies: {', '.join(strategy_names())} (default: that of the training, if it had one)",
        "budget": "combined with the other options: tokens to remove, or a share of the patches (default: the run's)",
    }
    for setting in SETTINGS.values():
        listed = f": {', '.join(setting.names)}" if setting.names else ""
        helps[setting.option] = f"combined with the other options: {setting.help}{listed} (default: as trained)"
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
        allowed = "whole numbers from 0" if setting else "tokens, a share of the patches (between 0 and 1), or paper"
        raise ConfigError(f"{option} holds {text!r}; allowed: {allowed}") from None


def count(text: str) -> int:
    """Read an option that is a whole number from 1, as argparse's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; allowed: whole numbers from 1")
    return int(text)


def device(name: str) -> torch.device:
    """Return the device that --device names, and make it the current one. Raises ConfigError where it is not there."""
    try:
        return choose_device(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.device", "--device")) from error


def computing(trained: Trained, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Let the backend that FAMBA_BACKEND names, else that of the training, compute inside the block if it can there."""
    asked = os.environ.get(ENVIRONMENT_VARIABLE) or (trained.config.ops.backend if trained.config else AUTO)
    try:
        with use_backend(asked):
            resolve(device.type, dtype)
    except BackendError:
        return nullcontext()
    return use_backend(asked)


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


@dataclass(frozen=True)
class Variant:
    """Hold one way of fusing, as the network carries it out; two that do the same are equal.

    schedule: tokens to remove in each layer. own: whether the network was trained with it.
    """

    fusion: Fusion
    schedule: tuple[int, ...]
    own: bool

    @property
    def removed(self) -> int:
        """Count the tokens removed by all layers together."""
        return sum(self.schedule)

    def put_into(self, model: Backbone) -> None:
        """Let a network fuse this way; without fusion no other setting matters."""
        model.set_fusion(self.schedule, **({} if self.fusion.strategy == NONE else self.fusion.settings()))


def own(trained: Trained) -> Variant:
    """Return the way of fusing that a network was trained with."""
    return Variant(trained.fusion.resolved(trained.schedule), trained.schedule, own=True)


def unfused(trained: Trained) -> Variant:
    """Return the network with all of its tokens."""
    return Variant(Fusion(budget=0), (0,) * len(trained.schedule), own=trained.fusion.strategy == NONE)


def label_variants(compared: Sequence[Variant]) -> list[str]:
    """Name each variant by its strategy and by its differences to the others, except the budget."""
    return labels([one.fusion for one in compared], ignore=["budget"])


def variants(trained: Trained, asked: Mapping[str, Sequence[Any]]) -> list[Variant]:
    """Return what was asked for, in its order and each once: every combination of the settings.

    A network with attention that was trained without fusion attends in proportion unless asked otherwise, as ToMe does
    off the shelf. The network's own strategy without a budget is its own schedule, whatever it came from. Raises
    ConfigError, with the option at fault, where something does not fit the network.
    """
    if not asked:
        return []
    if trained.fusion.strategy == NONE and "strategy" not in asked:
        raise ConfigError("the network was trained without fusion: name the strategies to fuse by, by --fusion")
    usual = replace(trained.fusion, layers=None, adapt_at=None, adapt_images=None)
    if trained.fusion.strategy == NONE:
        usual = replace(usual, proportional=trained.model.has_attention)
    if isinstance(usual.budget, tuple):  # counts are good for one strategy alone, their sum for all
        usual = replace(usual, budget=sum(trained.schedule) or Fusion().budget)
    values = {name: asked.get(name, [getattr(usual, name)]) for name in ("strategy", *SETTINGS, "budget")}
    found = []
    with named({name: f"--{option}" for name, option in FUSION.items()}):
        for chosen in itertools.product(*values.values()):
            changes = dict(zip(values, chosen, strict=True))
            if "guard" not in asked and not RULES[changes["rule"]].guards:
                changes["guard"] = 0
            if changes["mode"] == "prune":
                # A token holds one patch or nothing, without a size: weighting and attention have no effect.
                changes |= {name: getattr(trained.fusion, name) for name in ("weighting", "proportional")}
            found.append(_variant(trained, replace(usual, **changes), asked))
    return list(dict.fromkeys(found))


def _variant(trained: Trained, fusion: Fusion, asked: Mapping[str, Sequence[Any]]) -> Variant:
    """Return one way of fusing, in the layers of the training where its strategy is that of the training."""
    model, mine, strategy = trained.model, own(trained), fusion.strategy
    if strategy == NONE:
        return unfused(trained)
    model.check_fusion(fusion)
    if strategy == trained.fusion.strategy and "budget" not in asked:
        fusion = replace(mine.fusion, **fusion.settings())
        counts = fusion.fitted(trained.schedule, model.num_tokens, model.protected, model.grid_size)
    else:
        if strategy == ADAPTIVE or (strategy == CUSTOM and strategy != trained.fusion.strategy):
            raise ConfigError(
                f"--fusion {strategy} is no fixed schedule: it comes with the training. This network was trained with "
                f"{trained.fusion.strategy}; name another strategy, or leave out --budget where it was trained so"
            )
        fusion = replace(fusion, layers=trained.fusion.layers if strategy == trained.fusion.strategy else None)
        counts = model.schedule_of(fusion)
    one = Variant(fusion.resolved(counts), counts, own=True)
    return one if one == mine else replace(one, own=False)
