"""Load trained networks from run folders, from checkpoints and from timm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from famba import data
from famba.errors import CheckpointError, FambaError, near_miss
from famba.files import read_file
from famba.fusion import Fusion
from famba.fusion.schedules import ADAPTIVE, NONE
from famba.models import Backbone
from famba.models.backbone import network_names
from famba.models.weights import Origin, load_weights
from famba.training import checkpoint
from famba.training.build import augmentation, build_model, check_model, model_arguments
from famba.training.config import RunConfig, parse, with_added_keys
from famba.training.records import SUMMARY
from famba.training.run_folder import CONFIG, RunFolder
from famba.training.weights import bundled, class_names, find_file


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
    def reading(self) -> data.Reading:
        """Return how images are read, as in training."""
        if self.config is None:
            return data.Reading()
        return data.Reading(self.config.data.version, self.config.data.background)

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
    file = find_file(str(path))
    if file is None:
        return _from_timm(str(path))
    content: dict[str, Any] = {}
    if file.suffix != ".safetensors":
        content = checkpoint.load(file)
        values, weights, schedule = content["config"], content["model"], content["schedule"]
        source = f"checkpoint {file}, step {content['step']}"
    else:
        folder = RunFolder(file.parent, writes=False)
        values, summary = folder.config, folder.summary
        if values is None or (summary is None and values.get("fusion", {}).get("strategy") == ADAPTIVE):
            lacking = CONFIG if values is None else SUMMARY
            raise CheckpointError(f"{file} lies beside no {lacking}, which describes its network")
        weights, schedule = read_file(file), None if summary is None else summary["schedule"]
        source = f"{path}, which comes with the package" if str(path) in bundled() else f"run {folder.path}"
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
    names = class_names(content, file)
    names = names and (*names, *(f"class {number}" for number in range(len(names), model.num_classes)))
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
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"there are no weights of {name}, or they cannot be fetched ({reason})") from error
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    plain: dict[str, Any] = {"crop_padding": 0, "hflip": 0.0, "color_jitter": 0.0, "random_erasing": 0.0}
    plain |= {"kind": "batch", "auto_augment": None, "erasing_mode": "const", "interpolation": cfg["interpolation"]}
    scaling = data.Augmentation(eval_crop=cfg["crop_pct"], **plain)
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    return Trained(model, None, f"timm model {name}", model.image_size[0], mean, std, scaling)
