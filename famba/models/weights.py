"""Load weights from files into a network, or refuse them as a whole where they do not fit."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv, resolve_pretrained_cfg
from torch import Tensor

from famba.errors import CheckpointError, check_choice, some
from famba.files import read_file
from famba.fusion.config import SETTINGS
from famba.models.backbone import BACKBONES, CLS_POSITIONS, Backbone, create_network, network_names

WEIGHTS = Path(__file__).parent / "weights"  # run folders of the bundled weights, by the names of their models
_PATCHES = "patch_embed.proj.weight"
_OFFICIAL_MIDDLE = re.compile("midclstok|middle_cls_token")  # in names of official models
_log = logging.getLogger(__name__)
_HEADS = ("head.", "head_dist.")
# Keys under which files of others keep weights, the first that is there is taken: last weights before averaged ones.
_HOLDERS = ("model", "state_dict", "model_state_dict", "net", "network", "module", "weights")
_AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "teacher")
# What wrappers and larger networks put before the names of weights, in the order in which one of several is taken.
_PREFIXES = ("module", "model", "net", "network", "backbone", "encoder", *_AVERAGES, "student")
_FRONT = re.compile(rf"^(?:(?:{'|'.join(_PREFIXES)})\.)+")
# What torch.compile, FSDP and recomputation put anywhere into them.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ALONE, _MOST_LISTED = 3, 10  # misfits of a layer that are listed one by one; lines of misfits


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
        path: .pth, .pt or .safetensors, with the weights as `weights_in` finds them.
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
    if changes := load_weights(model, weights_in(content, path), path, origin, reset_head=reset_head):
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
    weights = weights_in(weights, "pretrained weights")
    origin = _origin_by_timm(weights, model)
    other_head = "head.weight" not in model.state_dict() or has_other_head(model, weights)
    fit = fit_weights(model, weights, "what comes with the model", origin, other_head)
    if fit.changes:
        _log.info("pretrained weights: %s", "; ".join(fit.changes))
    for doubt in fit.doubts:
        _log.warning("pretrained weights: %s", doubt)
    # timm itself makes it one of other channels, and refuses or warns where that is done.
    return fit.weights if fit.rgb is None else {**fit.weights, _PATCHES: fit.rgb}


def has_other_head(model: Backbone, weights: Mapping[str, Any]) -> bool:
    """Return whether a model's classifier is missing in weights, or has another number of classes there."""
    own, head = model.state_dict().get("head.weight"), weights.get("head.weight")
    return own is not None and (not isinstance(head, Tensor) or head.shape[:1] != own.shape[:1])


def weights_in(content: Mapping[str, Any], path: str | Path, *, averaged: bool = False) -> dict[str, Any]:
    """Return the weights in what was read from a path, by the names that a network of `BACKBONES` gives them.

    They may lie at the top or under a usual key, such as "model_ema", and bear the prefixes of wrappers, such as
    "module.backbone."; what is taken off is logged. averaged: only those of an average, {} where there is none.
    """
    found, keys = dict(content), list[str]()
    holders: Sequence[str] = _AVERAGES if averaged else (*_HOLDERS, *_AVERAGES, "student")
    while key := next((k for k in holders if isinstance(found.get(k), Mapping) and _holds_weights(found[k])), None):
        found, holders = dict(found[key]), (*_HOLDERS, *_AVERAGES, "student")
        keys.append(key)
    if averaged and not keys:
        return {}
    bare, told = _without_prefixes(found)
    if told := [f"under {'.'.join(keys)!r}"] * bool(set(keys) - {"model", "state_dict"}) + told:
        _log.info("%s: weights are taken %s", path, ", ".join(told))
    return bare


def _holds_weights(content: Any) -> bool:
    return any(map(_holds_weights, content.values())) if isinstance(content, Mapping) else isinstance(content, Tensor)


def _without_prefixes(weights: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return weights without the prefixes that hide the layers of a network, and what was done, in words."""
    wrappers = sorted({repr(found) for name in weights for found in _WRAPPERS.findall(str(name))})
    # Averages by torch.optim.swa_utils also count.
    named = {_WRAPPERS.sub("", str(name)): value for name, value in weights.items() if name != "n_averaged"}
    bare = {name: _FRONT.sub("", name) for name in named}
    fronts = {name: name.removesuffix(rest) for name, rest in bare.items()}
    layers = tuple(f"{kind.layers_name}." for kind in BACKBONES)
    found = {fronts[name] for name, rest in bare.items() if rest.startswith(layers)}
    if not found or any(name.startswith(layers) for name in named):
        return named, [f"without {some(wrappers)}"] if wrappers else []
    chosen, *others = sorted(found, key=lambda front: [_PREFIXES.index(part) for part in front.split(".")[:-1]])
    strange = {other.split(".")[0] for other in others} - {chosen.split(".")[0]}
    kept = [name for name, front in fronts.items() if front not in others and front.split(".")[0] not in strange]
    told = [f"without {some([*wrappers, repr(chosen)])}", *([f"not those under {some(others)}"] if others else [])]
    return {bare[name]: named[name] for name in kept}, told


def saved_origin(content: dict[str, Any], path: str | Path) -> Origin:
    """Return what the content of a file, or what lies beside its path, says of the network that its weights come from.

    A run's weights have their configuration beside them, its checkpoints within; exported weights have a config.json
    beside them; the official files of Vim hold the name of their model. Raises CheckpointError where a configuration
    beside the file cannot be read.
    """
    arguments = content.get("args")
    official = arguments.get("model") if isinstance(arguments, dict) else getattr(arguments, "model", None)
    if isinstance(official, str) and "_stride" in official:
        raise CheckpointError(f"{path} is of {official}, whose patches overlap; Famba has no such network")
    if isinstance(official, str) and _OFFICIAL_MIDDLE.search(official):
        return Origin("middle")
    said = _origin(content["config"]) if content.get("config") is not None else _beside(Path(path).parent)
    return Origin("middle") if said == Origin() and _OFFICIAL_MIDDLE.search(Path(path).name) else said


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
            f"{file} describes the network of the weights beside it, but cannot be read "
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
    rgb: Tensor | None = None  # the patch embedding before it was made one of other channels


def fit_weights(model: Backbone, weights: dict[str, Any], source: str, origin: Origin, reset_head: bool) -> Fit:
    """Return weights for every parameter of a model, which may be without memory, changed as in `load_vim_checkpoint`.

    Raises CheckpointError with the list of all that does not fit.
    """
    own, kept = model.state_dict(), _HEADS if reset_head else ()
    named = {str(name): value for name, value in weights.items() if not str(name).startswith(kept)}
    given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if given and not any(name.startswith(f"{model.layers_name}.") for name in own.keys() & given.keys()):
        there, here = some(sorted(given)), some(sorted(own))
        raise CheckpointError(f"{source} is of another network: it holds {there}; this model has {here}")
    fit = Fit(given, [f"{name}: not a tensor" for name in named.keys() - given.keys()])
    for name in given.keys() & own.keys():
        if given[name].is_floating_point() and not given[name].float().isfinite().all():
            fit.misfits.append(f"{name}: holds NaN or infinity; take weights from before training failed")
    given |= {name: value for name, value in own.items() if name.startswith(kept)}
    _fit_patch_embed(fit, own)
    embed = given.get("pos_embed")
    if embed is not None and embed.ndim == 3 and embed.shape[0] == 1:
        try:
            given["pos_embed"] = fit_pos_embed(fit, model, embed, origin)
        except CheckpointError as misfit:
            fit.misfits.append(f"pos_embed: {misfit}")
            given["pos_embed"] = own["pos_embed"]
    fit.misfits += [
        line for name in own.keys() | given.keys() if (line := _misfit(name, given.get(name), own.get(name)))
    ]
    if fit.misfits:
        listed = "\n  ".join(_in_short(fit.misfits))
        raise CheckpointError(f"{source} does not fit this model; nothing was loaded:\n  {listed}")
    return fit


def _misfit(name: str, given: Tensor | None, own: Tensor | None) -> str | None:
    """Say why a tensor of a file does not fit that of the model; None where it does."""
    hint = "; reset_head=True keeps the model's own" if name.startswith(_HEADS) else ""
    if given is None:
        return f"{name}: missing in the file"
    if own is None:
        return f"{name}: not in the model{hint}"
    if own.shape == given.shape:
        return None
    return f"{name}: {tuple(given.shape)} in the file, {tuple(own.shape)} in the model{hint}"


def _in_short(misfits: Sequence[str]) -> list[str]:
    """Return a line for each misfit, or for many of one layer with one reason; the first ones of very many."""
    groups: dict[tuple[str, str], list[str]] = {}
    for misfit in sorted(misfits, key=lambda misfit: (any(map(str.isdigit, misfit.split(".")[:2])), misfit)):
        name, _, reason = misfit.partition(": ")
        groups.setdefault((".".join(name.split(".")[:2]), reason), []).append(misfit)
    lines = list[str]()
    for (layer, reason), members in groups.items():
        lines += members if len(members) <= _ALONE else [f"{layer}: {reason} ({len(members)} of its weights)"]
    more = [f"and {len(lines) - _MOST_LISTED} more lines of this kind"] if len(lines) > _MOST_LISTED else []
    return [*lines[:_MOST_LISTED], *more]


def _fit_patch_embed(fit: Fit, own: dict[str, Tensor]) -> None:
    """Resample the file's patch embedding where it is one for patches of another size, or for other channels."""
    kernel = fit.weights.get(_PATCHES)
    if kernel is None or _PATCHES not in own or kernel.ndim != 4 or 0 in kernel.shape:
        return
    wanted = own[_PATCHES].shape
    is_rgb = kernel.shape[1] == 3 != wanted[1]
    if kernel.shape[0] != wanted[0] or not (is_rgb or kernel.shape[1] == wanted[1]):
        return
    if kernel.shape[2:] != wanted[2:]:
        fit.changes.append(f"the patch embedding is resampled from {_by(kernel.shape[2:])} to {_by(wanted[2:])} pixels")
        kernel = resample_patch_embed(kernel, list(wanted[2:]))
    if is_rgb:
        told = "summed" if wanted[1] == 1 else "repeated and scaled"
        fit.changes.append(f"the patch embedding goes from 3 to {wanted[1]} input channels: they are {told}")
        fit.rgb, kernel = kernel, adapt_input_conv(wanted[1], kernel)
    fit.weights[_PATCHES] = kernel


def fit_pos_embed(fit: Fit, model: Backbone, embed: Tensor, origin: Origin) -> Tensor:
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
        moved = f"the class token moves from {position} to {own}"
        fit.doubts.append(f"{moved}, where the weights have not learnt it; cls_position={position!r} keeps its place")
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
            f"its {count} patches are taken to lie {_by(old)}, since nothing says their grid; the model's grid is "
            f"{_by(own)}. If the file has the same grid, give load_vim_checkpoint grid={own}"
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


def arguments_of_training(variant: str, shape: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return fusion and class token's place of pretrained weights, as arguments of Vim; nothing without their run."""
    file = resolve_pretrained_cfg(variant, chosen.get("pretrained_cfg"), chosen.get("pretrained_cfg_overlay")).file
    # Where timm loads a folder, this is the folder, and its config.json says how the network fuses.
    if not file or not Path(file).is_file():
        return {}
    config, summary = Path(file).with_name("config.yaml"), Path(file).with_name("summary.json")
    if config.is_file() and summary.is_file():
        values, schedule = yaml.safe_load(config.read_text()), json.loads(summary.read_text())["schedule"]
    elif {"config", "schedule"} <= (content := read_file(file)).keys():  # a checkpoint of a run
        values, schedule = content["config"], content["schedule"]
    else:
        return {}
    if len(schedule) != {**shape, **chosen}["depth"]:
        return {}  # the weights do not fit either, which says more
    fusion = {f"fusion_{name}": values["fusion"][name] for name in SETTINGS if name in values["fusion"]}
    return {"fusion": schedule, "cls_position": values["model"]["cls_position"], **fusion}
