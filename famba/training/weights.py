"""Read the weights of earlier runs: to start a run from (init_from), or as a trained network (`load_trained`)."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from famba import data
from famba.errors import CheckpointError, FambaError, near_miss
from famba.files import read_file
from famba.fusion import Fusion
from famba.fusion.schedules import ADAPTIVE, NONE
from famba.models import Backbone
from famba.models.backbone import network_names
from famba.models.weights import (
    Origin,
    fit_weights,
    load_weights,
    names_with_weights,
    saved_origin,
    weights_folder,
    weights_in,
)
from famba.training import checkpoint
from famba.training.build import augmentation, build_model, check_model, model_arguments, reading
from famba.training.checkpoint import Checkpoints
from famba.training.config import RunConfig, parse, with_added_keys
from famba.training.run_folder import CONFIG, RunFolder, finished_weights
from famba.training.summary import SUMMARY

AVERAGED = "ema:"
"""Prefix of init_from that asks for the averaged weights of a run."""
_log = logging.getLogger(__name__)


def _find_file(place: str) -> Path | None:
    """Return the file that a run folder, a file, or the name of a model with bundled weights means, else None."""
    if os.path.isdir(place):  # unlike Path's, it takes any name
        return finished_weights(Path(place))
    if os.path.isfile(place):
        return Path(place)
    folder = weights_folder(place) if place in _bundled() else None
    return None if folder is None else finished_weights(folder)


def _bundled() -> list[str]:
    """List the names, with and without tags, of the models with bundled weights."""
    names = names_with_weights()
    return [*names, *(name.split(".")[0] for name in names)]


def _class_names(content: Mapping[str, Any], file: Path) -> tuple[str, ...] | None:
    """Return the names of the classes of weights: from the checkpoint, else from the summary beside the file."""
    kept: Any = content.get("data")
    if not isinstance(kept, Mapping):
        kept = RunFolder(file.parent, writes=False).summary
    names = kept.get("classes") if isinstance(kept, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


# Weights that a run starts from


@dataclass(frozen=True)
class Initial:
    """Hold weights that init_from names, with their file, what it says of their network, and names of classes."""

    given: str
    file: Path
    weights: dict[str, Any]
    origin: Origin
    classes: tuple[str, ...] | None


def read_initial(given: str) -> Initial:
    """Read the weights that init_from names: a run's folder, a file, or a timm model with bundled weights.

    With "ema:" before it, these are the averaged weights of a run with recipe.ema_decay, from its folder or a
    checkpoint. Raises FambaError if nothing is there, or it is damaged or holds no such weights.
    """
    place = given.removeprefix(AVERAGED)
    averaged = place != given
    file = _find_file(place)
    if file is None:
        near = near_miss(place, _bundled()) or f"; these are {', '.join(names_with_weights())}"
        raise CheckpointError(
            f"init_from={given} is no file, no run folder and no timm model with bundled weights{near}"
        )
    if averaged and Path(place).is_dir():
        # Averaged weights are kept in checkpoints alone.
        file = next(iter(Checkpoints(Path(place) / "checkpoints").newest_first()), file)
    content = read_file(file)
    weights = weights_in(content, file, averaged=averaged)
    if averaged and not weights:
        raise CheckpointError(
            f"init_from={given}: {file} holds no averaged weights; give a run with recipe.ema_decay, or leave out "
            f"{AVERAGED}"
        )
    return Initial(given, file, weights, saved_origin(content, file), _class_names(content, file))


def check_initial(config: RunConfig, outline: Backbone) -> None:
    """Raise FambaError if the weights that a new run is to start from are missing or do not fit its network."""
    # A run, or one of a sweep, that has begun continues from its own checkpoint.
    begun = [*glob(f"{escape(config.run_dir)}/checkpoints"), *glob(f"{escape(config.run_dir)}/*/checkpoints")]
    if config.init_from is None or begun:
        return
    initial = read_initial(config.init_from)
    fit_weights(outline, initial.weights, str(initial.file), initial.origin, _has_other_head(outline, initial.weights))


def start_from(model: Backbone, given: str, classes: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Load the weights that init_from names into `model`, with a new classifier for other classes.

    classes: names of the run's classes, None if they are not known. Returns what a summary tells of the weights:
    init_from, their SHA-256, and whether the classifier is new. Raises FambaError as `check_initial`.
    """
    initial = read_initial(given)
    digest = weights_sha256(initial.weights)
    others = initial.classes is not None and classes is not None and initial.classes != classes
    is_new = others or _has_other_head(model, initial.weights)
    changes = load_weights(model, initial.weights, initial.file, initial.origin, reset_head=is_new)
    changes.append("with a new classifier, for other classes" if is_new else "with their classifier")
    _log.info("%s", "; ".join([f"weights start from {given} (SHA-256 {digest[:12]})", *changes]))
    return {"init_from": given, "weights_sha256": digest, "new_classifier": is_new}


def weights_sha256(weights: Mapping[str, Any]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values: the same for every kind of file."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _has_other_head(model: Backbone, weights: Mapping[str, Any]) -> bool:
    """Return whether the file's classifier is missing or has another number of classes than the model's."""
    own, head = model.state_dict().get("head.weight"), weights.get("head.weight")
    return own is not None and (not isinstance(head, Tensor) or head.shape[:1] != own.shape[:1])


# Trained networks


@dataclass(frozen=True)
class Trained:
    """Hold a network as training left it, in eval mode on the CPU, with its last schedule.

    config: of its run, None for a timm model. source: where it comes from, for a reader. image_size: pixels. mean, std:
    of RGB in [0, 1]. scaling: how evaluation scales images. class_names: by number, None if unknown.
    """

    model: Backbone
    config: RunConfig | None
    source: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scaling: data.Augmentation
    class_names: tuple[str, ...] | None = None

    @property
    def schedule(self) -> tuple[int, ...]:
        """Tokens that each layer removes."""
        return self.model.fusion

    @property
    def fusion(self) -> Fusion:
        """Return how it was trained to fuse; without a configuration the strategy is "none" or "custom"."""
        if self.config is not None:
            return self.config.fusion
        return self.model.settings if any(self.schedule) else replace(self.model.settings, strategy=NONE, layers=None)

    @property
    def strategy(self) -> str:
        """Name of the strategy that it was trained with."""
        return self.fusion.strategy

    @property
    def reading(self) -> data.Reading:
        """Return how images are read, as in training."""
        return data.Reading() if self.config is None else reading(self.config)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.model.num_classes


def load_trained(path: str | Path) -> Trained:
    """Load a trained network; its training data is not needed.

    path: a run folder or its model.safetensors, a checkpoint (.pt) of a run with weights and schedule of that step, or
    the name of a timm model with weights. Raises CheckpointError if nothing is there, it is damaged, of another release
    or does not describe its network, ConfigError if its configuration cannot be built here.
    """
    file = _find_file(str(path))
    if file is None:
        return _from_timm(str(path))
    if file.suffix != ".safetensors":
        content = checkpoint.load(file)
        source = f"checkpoint {file}, step {content['step']}"
        return _from_run(content["config"], content["model"], content["schedule"], file, source, content)
    folder = RunFolder(file.parent, writes=False)
    values, summary = folder.config, folder.summary
    if values is None or (summary is None and values.get("fusion", {}).get("strategy") == ADAPTIVE):
        raise CheckpointError(
            f"{file} lies beside no {CONFIG if values is None else SUMMARY}, which describes its network"
        )
    source = f"{path}, which comes with the package" if str(path) in _bundled() else f"run {folder.path}"
    schedule = None if summary is None else summary["schedule"]
    return _from_run(values, read_file(file), schedule, file, source, {})


def _from_run(
    values: Any, weights: dict[str, Any], schedule: Any, file: Path, source: str, content: Mapping[str, Any]
) -> Trained:
    head = weights.get("head.weight")
    try:
        config = parse(with_added_keys(values))
        check_model(config)
        model = build_model(config.model.name, model_arguments(config, len(head) if isinstance(head, Tensor) else 0))
        model.set_fusion(config.fusion if schedule is None else schedule)
        scaling = augmentation(config)
    except (FambaError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: its run cannot be set up by this installation: {error}. Install the package that adds what is "
            "missing, or name its file in FAMBA_PLUGINS, or install the release of famba that trained it"
        ) from error
    load_weights(model, weights, file, Origin(config.model.cls_position, model.grid_size))
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    names = _class_names(content, file)
    return Trained(model.eval(), config, source, model.image_size[0], mean, std, scaling, names)  # type: ignore[arg-type]


def _from_timm(name: str) -> Trained:
    known = network_names()
    if name.split(".")[0] not in known:
        raise CheckpointError(f"no run folder, checkpoint or timm model is called {name!r}{near_miss(name, known)}")
    try:
        model = build_model(name, {"pretrained": True}).eval()
    except FambaError:
        raise
    except Exception as error:  # the client of each host has its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise CheckpointError(f"there are no weights of {name}, or they cannot be fetched ({reason})") from error
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    plain: dict[str, Any] = {"crop_padding": 0, "hflip": 0.0, "color_jitter": 0.0, "random_erasing": 0.0}
    plain |= {"kind": "batch", "auto_augment": None, "erasing_mode": "const", "interpolation": cfg["interpolation"]}
    scaling = data.Augmentation(eval_crop=cfg["crop_pct"], **plain)
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    return Trained(model, None, f"timm model {name}", model.image_size[0], mean, std, scaling)
