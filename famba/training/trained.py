"""A trained network, by the name of its run folder, of its weights, or of a timm model that comes with weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.models import get_pretrained_cfg
from torch import Tensor

from famba import data
from famba.errors import CheckpointError, ConfigError, FambaError, near_miss
from famba.files import read_file
from famba.fusion import Fusion
from famba.fusion.schedules import ADAPTIVE, NONE
from famba.models import Backbone
from famba.models.backbone import network_names
from famba.models.weights import Origin, load_weights, names_with_weights, weights_folder
from famba.training import checkpoint
from famba.training.checks import check_model
from famba.training.config import RunConfig, parse, with_added_keys
from famba.training.run_folder import finished_weights
from famba.training.setup import augmentation, build_model, model_arguments, reading
from famba.training.summary import SUMMARY, Summary
from famba.training.trained_on import saved_classes

Colours = tuple[float, float, float]

_CONFIG = "config.yaml"
# What `famba export` makes.
_EXPORTED, _EXPORTED_CONFIG = (".onnx", ".pt2"), "config.json"


@dataclass(frozen=True)
class Trained:
    """A network as training left it, and what it takes.

    model: in eval mode, on the CPU, with the schedule that it had last. config: of its run; None for a timm model,
    whose weights come with none. source: where it comes from, for a reader. image_size: pixels. mean, std: of RGB in
    [0, 1]. scaling: how evaluation scales images; the rest of it is of no use here. class_names: in the order of the
    class numbers; None where nothing tells them.
    """

    model: Backbone
    config: RunConfig | None
    source: str
    image_size: int
    mean: Colours
    std: Colours
    scaling: data.Augmentation
    class_names: tuple[str, ...] | None = None

    @property
    def schedule(self) -> tuple[int, ...]:
        """Tokens that each layer removes."""
        return self.model.fusion

    @property
    def fusion(self) -> Fusion:
        """How it was trained to fuse; without a configuration its strategy is "none", or "custom" where it fuses."""
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
        """Classes that the weights tell apart."""
        return self.model.num_classes


def load_trained(path: str | Path) -> Trained:
    """Load a network that was trained; its training data is not looked for.

    Args:
        path: a run folder, of which the last step's raw weights are taken; the model.safetensors in one; a checkpoint
            (.pt) of a run, with its weights and its schedule of that step; or the name of a timm model with weights.

    Raises:
        CheckpointError: nothing is there, it is damaged, of another release, or does not say what it is weights of.
        ConfigError: what the run was configured with cannot be built here, such as a model that is not registered.
    """
    place = Path(path)
    if place.suffix in _EXPORTED or (place / _EXPORTED_CONFIG).is_file():
        raise CheckpointError(f"{place} was exported, for others to load; give the run or checkpoint that it came from")
    if place.is_dir():
        return _from_weights(finished_weights(place))
    if place.suffix == ".safetensors" and place.is_file():
        return _from_weights(place)
    if place.is_file():
        return _from_checkpoint(place)
    return _from_timm(str(path))


def _from_weights(file: Path) -> Trained:
    """Weights in a run folder, whose other files say what they are weights of."""
    folder = file.parent
    config_file, summary_file = folder / _CONFIG, folder / SUMMARY
    if not config_file.is_file():
        raise CheckpointError(
            f"{file} lies beside no {_CONFIG}, which would say what network and data it is of; give a run folder"
        )
    config = _parsed(_read(config_file, yaml.safe_load), config_file)
    counts = (
        _read(summary_file, lambda text: Summary.parse(text).values())["schedule"] if summary_file.is_file() else None
    )
    if counts is None and config.fusion.strategy == ADAPTIVE:
        raise CheckpointError(f"{folder} has no {SUMMARY} with the schedule that training ended with; give a .pt file")
    content = read_file(file)
    return _built(config, content, counts, file, f"run {folder}", saved_classes(content, file))


def _from_checkpoint(file: Path) -> Trained:
    content = read_file(file)
    if not {"format", "config", "model", "schedule"} <= content.keys():
        raise CheckpointError(
            f"{file} is no checkpoint of a run: it does not say what network and data it is of; "
            "load weights alone by famba.models.load_vim_checkpoint, or train from them with init_from"
        )
    content = checkpoint.check_content(content, file)
    config = _parsed(content["config"], file)
    source, classes = f"checkpoint {file}, step {content['step']}", saved_classes(content, file)
    return _built(config, content["model"], content["schedule"], file, source, classes)


def _from_timm(name: str) -> Trained:
    known = network_names()
    if name.split(".")[0] not in known:
        raise CheckpointError(
            f"no run folder, no checkpoint and no timm model is called {name!r}{near_miss(name, known)}; "
            "give a run folder, its model.safetensors, a checkpoint (.pt), or the name of a timm model with weights"
        )
    with_weights = timm.list_models(f"{name.split('.')[0]}*", pretrained=True)
    if "." in name and name not in with_weights:
        raise CheckpointError(f"{name} is not known{near_miss(name, with_weights)}; known: {', '.join(with_weights)}")
    folder = weights_folder(name)
    if folder is not None:
        return replace(_from_weights(finished_weights(folder)), source=f"{name}, which comes with the package")
    found = get_pretrained_cfg(name, allow_unregistered=False)
    if found is None or not found.has_weights:
        raise CheckpointError(
            f"{name} comes without weights; with weights come {', '.join(names_with_weights())}, and most of timm's "
            "transformers"
        )
    model = _downloaded(name)
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    scaling = _plain_scaling(cfg["interpolation"], cfg["crop_pct"])
    return Trained(
        model, None, f"timm model {name}", model.image_size[0], tuple(cfg["mean"]), tuple(cfg["std"]), scaling
    )


def _downloaded(name: str) -> Backbone:
    """A timm model with the weights that it has on the net, or in the cache that they were fetched to."""
    try:
        return build_model(name, {"pretrained": True}).eval()
    except FambaError:
        raise
    except Exception as error:  # the client of each host has its own
        raise CheckpointError(
            f"the weights of {name} cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]}); fetch "
            "them on a machine with network, and copy its cache of the Hugging Face hub"
        ) from error


def _plain_scaling(interpolation: Any, eval_crop: float) -> data.Augmentation:
    nothing: dict[str, Any] = {"crop_padding": 0, "hflip": 0.0, "color_jitter": 0.0, "random_erasing": 0.0}
    return data.Augmentation(
        kind="batch",
        auto_augment=None,
        erasing_mode="const",
        interpolation=interpolation,
        eval_crop=eval_crop,
        **nothing,
    )


def _built(
    config: RunConfig,
    weights: dict[str, Any],
    counts: Any,
    file: Path,
    source: str,
    class_names: tuple[str, ...] | None,
) -> Trained:
    head = weights.get("head.weight")
    if not isinstance(head, Tensor):
        raise CheckpointError(f"{file} holds no classifier (head.weight), so it tells no classes apart")
    try:
        check_model(config)
        model = build_model(config.model.name, model_arguments(config, len(head)))
        model.set_fusion(config.fusion if counts is None else counts)
        scaling = augmentation(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}", error.argument) from error
    load_weights(model, weights, file, Origin(config.model.cls_position, model.grid_size))
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    return Trained(model.eval(), config, source, model.image_size[0], mean, std, scaling, class_names)  # type: ignore[arg-type]


def _summary(content: bytes) -> dict[str, Any]:
    return Summary.parse(content).values()


def _read(file: Path, parser: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        content = parser(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} cannot be read ({reason}); mend it, or give a checkpoint (.pt) of the run, which needs it not"
        ) from error
    return content


def _parsed(values: Any, file: Path) -> RunConfig:
    try:
        return parse(with_added_keys(values))
    except (FambaError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} holds no configuration of this release: {error}") from error
