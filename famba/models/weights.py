"""Load weights from files into a network, or refuse them as a whole where they do not fit."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import resolve_pretrained_cfg
from torch import Tensor

from famba.errors import CheckpointError, check_choice
from famba.files import read_file
from famba.fusion.config import SETTINGS
from famba.models.backbone import CLS_POSITIONS, Backbone, create_network, network_names

WEIGHTS = Path(__file__).parent / "weights"
"""Run folders of the bundled weights, by the names of their models."""
_PATCHES = "patch_embed.proj.weight"
_MIDDLE = "midclstok"  # in names of official models
_log = logging.getLogger(__name__)
_HEADS = ("head.", "head_dist.")
_LISTED = 20  # tensors that an error lists


class Origin(NamedTuple):
    """Hold what is known of the network that weights come from; None where nothing says it."""

    cls_position: str | None = None  # the class token's place, as in `Vim`
    grid: tuple[int, int] | None = None  # rows and columns of patches


def load_vim_checkpoint(
    model: Backbone,
    path: str | Path,
    *,
    cls_position: str | None = None,
    grid: tuple[int, int] | None = None,
    reset_head: bool = False,
) -> Backbone:
    """Load weights into a Vim: the official files with unchanged names, or those of a run.

    The position embedding is resampled to the model's grid, and the class token's own row goes to the model's place;
    the patch embedding is resampled to the model's patches. Changes are logged.

    Args:
        model: changed in place, and only where everything fits.
        path: .pth, .pt (weights at the top, or under "model" or "state_dict") or .safetensors.
        cls_position: place of the file's class token. None: as its run or export says, or the name in an official file
            ("middle"); as in the model where nothing says it.
        grid: rows and columns of the file's patches. None: as its run or export says; a square where nothing says it
            and their number is one, as in the official files; else as in the model.
        reset_head: keep the model's own classifier, for another set of classes.

    Returns:
        The model.

    Raises:
        CheckpointError: missing or damaged file, or the list of all that does not fit.
    """
    content = read_file(path)
    said = saved_origin(content, path)
    origin = Origin(cls_position or said.cls_position, grid or said.grid)
    if changes := load_weights(model, weights_in(content), path, origin, reset_head=reset_head):
        _log.info("%s: %s", path, "; ".join(changes))
    return model


def load_weights(
    model: Backbone,
    weights: dict[str, Any],
    path: str | Path,
    origin: Origin = Origin(),  # noqa: B008 - it cannot be changed
    *,
    reset_head: bool = False,
) -> list[str]:
    """Load weights that were read from a path into any network, and return what was changed, in sentences."""
    fit = fit_weights(model, weights, str(path), origin, reset_head)
    for doubt in fit.doubts:
        _log.warning("%s: %s", path, doubt)
    model.load_state_dict(fit.weights)
    return fit.changes


def fitting_weights(weights: dict[str, Any], model: Backbone) -> dict[str, Tensor]:
    """Return pretrained weights as a model takes them, with its own classifier where it has other classes.

    timm calls it, with its records of the weights in model.pretrained_cfg. Raises CheckpointError as `fit_weights`.
    """
    head, own = weights.get("head.weight"), model.state_dict().get("head.weight")
    other_head = own is None or not isinstance(head, Tensor) or head.shape[:1] != own.shape[:1]
    fit = fit_weights(model, weights, "what comes with the model", _origin_by_timm(weights, model), other_head)
    if fit.changes:
        _log.info("pretrained weights: %s", "; ".join(fit.changes))
    return fit.weights


def weights_in(content: dict[str, Any]) -> dict[str, Any]:
    """Return the weights in what was read from a file: at the top, or under "model" or "state_dict"."""
    return next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)


def saved_origin(content: dict[str, Any], path: str | Path) -> Origin:
    """Return what the content of a file, or what lies beside its path, says of the network that its weights come from.

    A run's weights have their configuration beside them, its checkpoints within; exported weights have a config.json
    beside them; the official files of Vim hold the name of their model. Raises CheckpointError where a configuration
    beside the file cannot be read.
    """
    arguments = content.get("args")
    official = arguments.get("model") if isinstance(arguments, dict) else getattr(arguments, "model", None)
    if isinstance(official, str):
        return Origin("middle" if _MIDDLE in official else None)
    said = _origin(content["config"]) if content.get("config") is not None else _beside(Path(path).parent)
    return Origin("middle") if said == Origin() and _MIDDLE in Path(path).name else said


def _origin_by_timm(weights: Mapping[str, Any], model: Backbone) -> Origin:
    """Return what timm knows of the network that weights come from, by the file's folder or by its own records."""
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if cfg.get("file"):
        place = Path(cfg["file"])  # timm calls a folder so, too
        said = saved_origin(read_file(place), place) if place.is_file() else _beside(place)
        if said != Origin():
            return said
    arguments: Mapping[str, Any] = getattr(model, "pretrained_model_args", {})
    grid, kernel, embed = None, weights.get(_PATCHES), weights.get("pos_embed")
    if isinstance(kernel, Tensor) and isinstance(embed, Tensor) and kernel.ndim == 4 and embed.ndim == 3:
        rows, columns = (
            size // max(1, side) for size, side in zip(cfg["input_size"][1:], kernel.shape[2:], strict=True)
        )
        # Otherwise the weights are of images of another size.
        grid = (rows, columns) if rows * columns == embed.shape[1] - ("cls_token" in weights) else None
    return Origin(arguments.get("cls_position"), grid)


def _beside(folder: Path) -> Origin:
    """Return what the configuration in a folder, of a run or an export, says of the network of its weights."""
    file = next((folder / name for name in ("config.yaml", "config.json") if (folder / name).is_file()), None)
    if file is None:
        return Origin()
    try:
        config = (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{file}, which would say what network the weights beside it are of, cannot be read "
            f"({type(error).__name__}); mend it, or move the weights to another folder"
        ) from error
    return _origin(config)


def _origin(config: Any) -> Origin:
    """Return what the configuration of a run, or the config.json of an export, says; nothing for that of others."""
    groups = config if isinstance(config, dict) else {}
    model, data, export = (g if isinstance(g := groups.get(k), dict) else {} for k in ("model", "data", "model_args"))
    known = {"img_size": data.get("image_size"), **model}
    if export:
        known = {**export, "name": groups.get("architecture")}
    position = known.get("cls_position") if known.get("cls_position") in CLS_POSITIONS else None
    if known.get("name") not in network_names():
        return Origin(position)
    sizes = {key: known.get(key) for key in ("img_size", "patch_size")}
    # JSON has no tuples.
    given: dict[str, Any] = {key: tuple(size) if isinstance(size, list) else size for key, size in sizes.items()}
    with torch.device("meta"):
        return Origin(position, create_network(known["name"], depth=1, **given).grid_size)


@dataclass
class Fit:
    """Hold weights as a model takes them, and sentences: why it cannot, what was changed, what may be wrong."""

    weights: dict[str, Tensor]
    misfits: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def fit_weights(model: Backbone, weights: dict[str, Any], source: str, origin: Origin, reset_head: bool) -> Fit:
    """Return weights for every parameter of a model, which may be without memory, changed as in `load_vim_checkpoint`.

    Raises CheckpointError with the list of all that does not fit.
    """
    own, named = model.state_dict(), {str(name): value for name, value in weights.items()}
    given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    fit = Fit(given, [f"{name}: not a tensor" for name in named.keys() - given.keys()])
    if reset_head:
        for name in [name for name in given if name.startswith(_HEADS)]:
            del given[name]
        given |= {name: value for name, value in own.items() if name.startswith(_HEADS)}
    _fit_patch_embed(fit, own)
    embed = given.get("pos_embed")
    if embed is not None and embed.ndim == 3 and embed.shape[0] == 1:
        try:
            given["pos_embed"] = _fit_pos_embed(fit, model, embed, origin)
        except CheckpointError as misfit:
            fit.misfits.append(f"pos_embed: {misfit}")
            given["pos_embed"] = own["pos_embed"]
    for name in own.keys() | given.keys():
        hint = "; reset_head=True keeps the model's own" if name.startswith(_HEADS) else ""
        if name not in given:
            fit.misfits.append(f"{name}: missing in the file")
        elif name not in own:
            fit.misfits.append(f"{name}: not in the model{hint}")
        elif own[name].shape != given[name].shape:
            shapes = f"{tuple(given[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            fit.misfits.append(f"{name}: {shapes}{hint}")
    if fit.misfits:
        more = [f"and {len(fit.misfits) - _LISTED} more"] if len(fit.misfits) > _LISTED else []
        by_depth = sorted(fit.misfits, key=lambda line: (line.split(":")[0].count("."), line))
        listed = "\n  ".join([*by_depth[:_LISTED], *more])
        raise CheckpointError(f"{source} does not fit this model; nothing was loaded:\n  {listed}")
    return fit


def _fit_patch_embed(fit: Fit, own: dict[str, Tensor]) -> None:
    """Resample the file's patch embedding where it is one for patches of another size."""
    kernel = fit.weights.get(_PATCHES)
    if kernel is None or _PATCHES not in own or kernel.ndim != 4 or 0 in kernel.shape:
        return
    wanted = own[_PATCHES].shape
    if kernel.shape[:2] == wanted[:2] and kernel.shape != wanted:
        fit.changes.append(f"the patch embedding is resampled from {_by(kernel.shape[2:])} to {_by(wanted[2:])} pixels")
        fit.weights[_PATCHES] = resample_patch_embed(kernel, list(wanted[2:]))


def _fit_pos_embed(fit: Fit, model: Backbone, embed: Tensor, origin: Origin) -> Tensor:
    """Return the file's position embedding (1, rows, width) on the model's grid; other tokens keep their rows."""
    if embed.shape[2] != model.embed_dim:
        raise CheckpointError(f"width {embed.shape[2]} in the file, {model.embed_dim} in the model")
    position = None if model.cls_position is None else _cls_position(fit, model.cls_position, origin)
    special = model.special_rows(embed.shape[1], position)
    others = f", behind {len(special)} others" if special else ""
    told = others if position is None else f", with class token {position!r}"
    if len(special) >= embed.shape[1]:
        raise CheckpointError(f"{embed.shape[1]} rows in the file hold no patches{told}")
    patches = _on_grid(fit, embed[:, _others(special, embed.shape[1])], model.grid_size, origin.grid, told)
    rows = patches.shape[1] + len(special)
    own, fitted = model.special_rows(rows, None), patches.new_empty(1, rows, embed.shape[2])
    fitted[:, list(own)], fitted[:, _others(own, rows)] = embed[:, list(special)], patches
    return fitted


def _others(special: Collection[int], rows: int) -> list[int]:
    return [row for row in range(rows) if row not in special]


def _cls_position(fit: Fit, own: str, origin: Origin) -> str:
    """Return the place of the file's class token, for a model that has its own there."""
    position = origin.cls_position or own
    check_choice("cls_position", position, CLS_POSITIONS)
    if (position != "none") != (own != "none"):
        raise CheckpointError(f"class token {position!r} in the file, {own!r} in the model")
    if position != "none" and origin.cls_position is None:
        fit.changes.append(f"the class token is taken to stand at {position}, since nothing says where")
    elif position != own:
        fit.changes.append(f"the class token moves from {position} to {own}")
    return position


def _on_grid(fit: Fit, patches: Tensor, own: tuple[int, int], given: tuple[int, int] | None, told: str) -> Tensor:
    """Return rows of patches (1, n, width) on a model's own grid. given: that of the file, where it is known."""
    count, side = patches.shape[1], math.isqrt(patches.shape[1])
    old = given or ((side, side) if side * side == count else own)
    if count < 1 or old[0] * old[1] != count:
        shape = "square grid" if given is None else f"grid of {_by(old)}"
        raise CheckpointError(f"{count} patches in the file are no {shape}{told}")
    if old == own:
        return patches
    if given is None and own[0] * own[1] == count:
        fit.doubts.append(
            f"its {count} patches are taken to lie {_by(old)}, since nothing says how they do, and the model's lie "
            f"{_by(own)}; where the file's do too, give load_vim_checkpoint grid={own}"
        )
    fit.changes.append(f"the position embedding is resampled from {_by(old)} to {_by(own)} patches")
    return resample_abs_pos_embed(patches, list(own), list(old), num_prefix_tokens=0)


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def weights_folder(name: str) -> Path | None:
    """Return the run folder that a model's bundled weights come from, with configuration and summary; None without."""
    folder = WEIGHTS / name.split(".")[0]
    return folder if folder.is_dir() else None


def names_with_weights() -> list[str]:
    """List the timm names, with their tags, of the models with bundled weights."""
    return [n for folder in sorted(WEIGHTS.iterdir()) for n in timm.list_models(f"{folder.name}*", pretrained=True)]


def fusion_of_training(variant: str, shape: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return how pretrained weights were trained to fuse, as arguments of Vim, by their run; nothing without a run."""
    file = resolve_pretrained_cfg(variant, chosen.get("pretrained_cfg"), chosen.get("pretrained_cfg_overlay")).file
    # Where timm loads a folder, this is the folder, and its config.json says how the network fuses.
    if not file or not Path(file).is_file():
        return {}
    config, summary = Path(file).with_name("config.yaml"), Path(file).with_name("summary.json")
    if config.is_file() and summary.is_file():
        fusion, schedule = yaml.safe_load(config.read_text())["fusion"], json.loads(summary.read_text())["schedule"]
    elif {"config", "schedule"} <= (content := read_file(file)).keys():  # a checkpoint of a run
        fusion, schedule = content["config"]["fusion"], content["schedule"]
    else:
        return {}
    if len(schedule) != {**shape, **chosen}["depth"]:
        return {}  # the weights do not fit either, which says more
    return {"fusion": schedule, **{f"fusion_{name}": fusion[name] for name in SETTINGS if name in fusion}}
