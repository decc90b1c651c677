"""Weights that a run starts from: where they lie, whether they fit, and what is told of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from famba.errors import CheckpointError, ConfigError, near_miss
from famba.files import read_file
from famba.models import BACKBONES, Backbone
from famba.models.weights import (
    Origin,
    fit_weights,
    load_weights,
    names_with_weights,
    saved_origin,
    weights_folder,
    weights_in,
)
from famba.training.config import RunConfig
from famba.training.run_folder import RunFolder, finished_weights
from famba.training.trained_on import class_differences, saved_classes

AVERAGED = "ema:"
"""What init_from begins with where the averaged weights of a run are meant."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Initial:
    """Weights as a file has them, by name.

    given: as configured. file: where they were found. origin: what the file says of the network that they are of.
    classes: names of the classes that they tell apart, None where nothing says them.
    """

    given: str
    file: Path
    weights: dict[str, Any]
    origin: Origin
    classes: tuple[str, ...] | None


def read_initial(given: str) -> Initial:
    """Read the weights that init_from means.

    Args:
        given: a run's folder, of which the last step's raw weights are taken; a .safetensors, .pt or .pth file with
            weights; or the timm name of a model whose weights come with the package. With "ema:" before it, the
            averaged weights of a run with recipe.ema_decay, from its folder or a checkpoint.

    Raises:
        CheckpointError: nothing is there, or it is damaged or holds no such weights.
        ConfigError: the path cannot even be looked up.
    """
    averaged = given.startswith(AVERAGED)
    file = _find(given, averaged)
    content = read_file(file)
    known = saved_origin(content, file), saved_classes(content, file)
    if not averaged:
        return Initial(given, file, weights_in(content), *known)
    average = content.get("ema")
    if not isinstance(average, dict):
        raise CheckpointError(
            f"init_from={given}: {file} holds no averaged weights, which runs with recipe.ema_decay have in their "
            f"checkpoints; give such a run, or leave out {AVERAGED}"
        )
    return Initial(given, file, average, *known)


def check_initial(config: RunConfig, outline: Backbone) -> None:
    """Raise FambaError where the weights that a run is to start from are missing or do not fit its network.

    Nothing is read for a run that has begun: it goes on from its own checkpoint. `outline` may be without memory.
    """
    if config.init_from is None or _has_begun(Path(config.run_dir)):
        return
    initial = read_initial(config.init_from)
    _check_shape(outline, initial)
    other_head = _has_other_head(outline, initial.weights)
    fit_weights(outline, initial.weights, str(initial.file), initial.origin, other_head)


def start_from(model: Backbone, given: str, classes: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Load the weights that init_from means, with a new classifier for other classes.

    Args:
        model: the network, changed in place.
        given: see `read_initial`.
        classes: names of the classes that the run trains on, None where they are not known.

    Returns:
        What a summary tells of them: init_from; the SHA-256 of the weights, whatever kind of file they come in; and
        whether the classifier is new.

    Raises:
        FambaError: as `check_initial`; nothing is loaded then.
    """
    initial = read_initial(given)
    _check_shape(model, initial)
    others = _other_classes(initial, classes)
    new_head = bool(others) or _has_other_head(model, initial.weights)
    digest = weights_sha256(initial.weights)
    changes = load_weights(model, initial.weights, initial.file, initial.origin, reset_head=new_head)
    told = [
        f"weights start from {given} (SHA-256 {digest[:12]})",
        *changes,
        _head(model, initial, others),
    ]
    _log.info("%s", "; ".join(told))
    return {"init_from": given, "weights_sha256": digest, "new_classifier": new_head}


def weights_sha256(weights: Mapping[str, Any]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in hexadecimal: the same whatever kind of file holds them."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _find(given: str, averaged: bool) -> Path:
    place = given.removeprefix(AVERAGED)
    path = Path(place)
    if _asked(Path.is_dir, given, path):
        weights = finished_weights(path)
        latest = RunFolder(path, writes=False).checkpoints.latest
        # Averaged weights lie in checkpoints alone.
        return latest if averaged and latest is not None else weights
    if _asked(Path.is_file, given, path):
        return path
    shipped = names_with_weights()
    names = [*shipped, *(name.split(".")[0] for name in shipped)]
    folder = weights_folder(place) if place in names else None
    if folder is None:
        raise CheckpointError(
            f"init_from={given} is no file, no run folder and no timm model whose weights come with the package"
            f"{near_miss(place, names)}; give a finished run's folder, a .safetensors, .pt or .pth file, or one of: "
            f"{', '.join(shipped)}"
        )
    return finished_weights(folder)


def _asked(question: Callable[[Path], bool], given: str, path: Path) -> bool:
    try:
        return question(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from={given} cannot be looked up ({error}); give another path") from error


def _has_begun(run_dir: Path) -> bool:
    """Whether there are checkpoints to go on from, of a run or, in its folder, of a sweep."""
    try:
        return (run_dir / "checkpoints").is_dir() or next(run_dir.glob("*/checkpoints"), None) is not None
    except (OSError, ValueError):
        return False  # what is wrong with it is said by the check of run_dir itself


def _has_other_head(model: Backbone, weights: Mapping[str, Any]) -> bool:
    """Whether the file's classifier does not tell as many classes apart as the model's, or is missing."""
    own, head = model.state_dict().get("head.weight"), weights.get("head.weight")
    return own is not None and (not isinstance(head, Tensor) or head.shape[:1] != own.shape[:1])


def _check_shape(model: Backbone, initial: Initial) -> None:
    """Raise CheckpointError where the file is of a network of another shape, by the keys that make it."""
    here, there = _shape(model.state_dict()), _shape(initial.weights)
    differs = {key for key in here if there.get(key) is not None and here[key] != there[key]}
    if "model.name" in differs:
        raise CheckpointError(
            f"init_from={initial.given}: the weights in {initial.file} are of {there['model.name']}, this run's "
            f"network is {here['model.name']}; choose the model that they are of"
        )
    if differs:
        listed = ", ".join(f"{key} is {here[key]} here, {there[key]} in the file" for key in sorted(differs))
        advice = " ".join(f"{key}={_to_set(key, there[key])}" for key in sorted(differs))
        raise CheckpointError(
            f"init_from={initial.given} does not fit: {listed} ({initial.file}); set {advice}, or start from others"
        )


def _to_set(key: str, value: object) -> object:
    return "head (or middle)" if (key, value) == ("model.cls_position", "a class token") else value


def _shape(weights: Mapping[str, Any]) -> dict[str, object]:
    """What weights say of the configuration's keys; None where they do not say it."""
    kind = next((kind for kind in BACKBONES if kind.recognizes(weights)), None)
    depth = None
    if kind is not None:
        layers = [str(name).removeprefix(f"{kind.layers_name}.").split(".")[0] for name in weights]
        depth = max((int(number) + 1 for number in layers if number.isdecimal()), default=None)
    patches = weights.get("patch_embed.proj.weight")
    own: dict[str, object] = {} if kind is None else kind.keys_of(weights)
    return {
        "model.name": None if kind is None else kind.kind,
        "model.depth": depth,
        "model.embed_dim": len(patches) if isinstance(patches, Tensor) and patches.ndim else None,
        **{f"model.{key}": value for key, value in own.items()},
    }


def _other_classes(initial: Initial, classes: tuple[str, ...] | None) -> list[str]:
    """List in words how the classes of the weights differ from those of the run; nothing where one is not known."""
    known = initial.classes is not None and classes is not None
    return class_differences(initial.classes, classes) if known else []  # type: ignore[arg-type]


def _head(model: Backbone, initial: Initial, others: list[str]) -> str:
    classes, theirs = (_shape_of(w, "head.weight")[:1] for w in (model.state_dict(), initial.weights))
    if classes == theirs and others:
        return f"with a new classifier of {classes[0]} classes, since theirs are others ({'; '.join(others)})"
    if classes == theirs:
        return f"with the classifier that comes with them, of {classes[0]} classes"
    return f"with a new classifier of {classes[0]} classes, theirs is of {theirs[0] if theirs else 'none'}"


def _shape_of(weights: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = weights.get(name)
    return tuple(value.shape) if isinstance(value, Tensor) else ()
