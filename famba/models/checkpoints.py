"""Weights from files into a network, refused as a whole where they do not fit."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from famba.errors import CheckpointError, DamagedError
from famba.files import read_seal
from famba.models.fused import FusedNetwork, check_choice
from famba.models.networks import vim_names, vit_names
from famba.models.tome import ToMe
from famba.models.vim import CLS_POSITIONS, Vim

_PATCHES = "patch_embed.proj.weight"
_MIDDLE = "midclstok"  # in names of official models
_log = logging.getLogger(__name__)
_HEAD_HINT = "; reset_head=True keeps the model's own"
_HEADS = ("head.", "head_dist.")
_WEIGHT_KEYS = ("model", "state_dict")
# Where the machine fails; damage leads parsers to other numbers, such as that of an invalid seek.
_OF_THE_MACHINE = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ETIMEDOUT, errno.EMFILE)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read what a .pth or .safetensors file holds, without running any code that it may hold.

    Raises CheckpointError where the file is missing, of another kind or damaged, as its seal tells where it bears one.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a .pth, .pt or .safetensors file")
    try:
        if read_seal(path) is False:
            raise DamagedError(f"{path} is damaged: it is not what was written (its SHA-256 differs)")
        if path.suffix == ".safetensors":
            return load_file(path)
        # The official files hold their command line's namespace beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # parsers raise whatever a damaged file leads them to
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _OF_THE_MACHINE:
            raise CheckpointError(f"{path} cannot be read: {error or 'no memory'}; try again") from error
        raise CheckpointError(
            f"{path} is truncated or no checkpoint ({type(error).__name__}); fetch or save it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of weights")
    return content


class Origin(NamedTuple):
    """Hold what is known of the network that weights come from; None where nothing says it.

    cls_position: where its class token stands, as in `Vim`. grid: its rows and columns of patches.
    """

    cls_position: str | None = None
    grid: tuple[int, int] | None = None


def load_vim_checkpoint(
    model: Vim,
    path: str | Path,
    *,
    cls_position: str | None = None,
    grid: tuple[int, int] | None = None,
    reset_head: bool = False,
) -> Vim:
    """Load weights into a Vim: the official files with unchanged names, or those of a run.

    The position embedding is resampled to the model's grid, and the class token's own row goes to the model's place;
    the patch embedding is resampled to the model's patches. What was changed is logged.

    Args:
        model: changed in place, and only where everything fits.
        path: .pth, .pt (weights at the top, or under "model" or "state_dict") or .safetensors.
        cls_position: where the file's class token stands. None: where its run or export says, or the name in an
            official file ("middle"); as in the model where nothing says it.
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
    changes = load_weights(model, weights_in(content), path, origin, reset_head=reset_head)
    if changes:
        _log.info("%s: %s", path, "; ".join(changes))
    return model


def load_weights(
    model: FusedNetwork,
    weights: dict[str, Any],
    path: str | Path,
    origin: Origin = Origin(),  # noqa: B008 - it cannot be changed
    *,
    reset_head: bool = False,
) -> list[str]:
    """Load weights that were read from a path, as `load_vim_checkpoint` does, into a network of any kind.

    Returns what is not as the file has it, for a reader.
    """
    fit = _fitted(model, weights, str(path), origin, reset_head)
    for doubt in fit.doubts:
        _log.warning("%s: %s", path, doubt)
    model.load_state_dict(fit.weights)
    return fit.changes


def check_weights(
    model: FusedNetwork,
    weights: dict[str, Any],
    path: str | Path,
    origin: Origin = Origin(),  # noqa: B008 - it cannot be changed
    *,
    reset_head: bool = False,
) -> None:
    """Raise CheckpointError where `load_weights` would; the model stays as it is and may be without memory."""
    _fitted(model, weights, str(path), origin, reset_head)


def fitting_weights(weights: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """Return weights that come with a model as this one takes them, its own classifier where it has other classes.

    timm calls it, and has put what it knows of the weights into model.pretrained_cfg. Raises CheckpointError with the
    list of all that does not fit.
    """
    head, own = weights.get("head.weight"), model.state_dict().get("head.weight")
    other_head = own is None or not isinstance(head, Tensor) or head.shape[:1] != own.shape[:1]
    fit = _fitted(model, weights, "what comes with the model", _origin_by_timm(weights, model), other_head)
    if fit.changes:
        _log.info("pretrained weights: %s", "; ".join(fit.changes))
    return fit.weights


def _origin_by_timm(weights: Mapping[str, Any], model: Vim) -> Origin:
    """Return what timm knows of the network that weights come from: by the file's folder, else by its own records."""
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if cfg.get("file"):
        place = Path(cfg["file"])  # timm calls a folder so, too
        said = saved_origin(read_file(place), place) if place.is_file() else _beside(place)
        if said != Origin():
            return said
    arguments: Mapping[str, Any] = getattr(model, "pretrained_model_args", {})
    return Origin(arguments.get("cls_position"), _grid_by_size(weights, cfg["input_size"][1:]))


def _grid_by_size(weights: Mapping[str, Any], image: Sequence[int]) -> tuple[int, int] | None:
    """Return the grid of the weights' patches on images of a size, None where they are of images of another one."""
    kernel, embed = weights.get(_PATCHES), weights.get("pos_embed")
    if not isinstance(kernel, Tensor) or not isinstance(embed, Tensor) or kernel.ndim != 4 or embed.ndim != 3:
        return None
    height, width = (max(1, side) for side in kernel.shape[2:])
    grid = image[0] // height, image[1] // width
    return grid if grid[0] * grid[1] == embed.shape[1] - ("cls_token" in weights) else None


@dataclass
class _Fit:
    """Hold weights as a model takes them.

    misfits: why it cannot. changes: what is not as the file has it. doubts: what was assumed and may be wrong.
    """

    weights: dict[str, Tensor]
    misfits: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def _fitted(model: FusedNetwork, weights: dict[str, Any], source: str, origin: Origin, reset_head: bool) -> _Fit:
    fit = _fit(model, weights, origin, reset_head)
    if fit.misfits:
        listed = "\n  ".join(sorted(fit.misfits))
        raise CheckpointError(f"{source} does not fit this model; nothing was loaded:\n  {listed}")
    return fit


def saved_origin(content: dict[str, Any], path: str | Path) -> Origin:
    """Return what a file, or what lies beside it, says of the network that its weights come from.

    Args:
        content: what was read from the file, as `read_file` has it.
        path: the file. A run's weights have their configuration beside them, its checkpoints within; exported weights
            have a config.json beside them; the official files of Vim hold the name of their model.

    Raises:
        CheckpointError: the configuration beside the file cannot be read.
    """
    arguments = content.get("args")
    official = arguments.get("model") if isinstance(arguments, dict) else getattr(arguments, "model", None)
    if isinstance(official, str):
        return Origin("middle" if _MIDDLE in official else None)
    config = content.get("config")
    said = _beside(Path(path).parent) if config is None else _of_run(config)
    return Origin("middle") if said == Origin() and _MIDDLE in Path(path).name else said


def _beside(folder: Path) -> Origin:
    """Return what a folder's files say of the network that its weights come from."""
    run, exported = folder / "config.yaml", folder / "config.json"
    if run.is_file():
        return _of_run(_read_config(run))
    if exported.is_file():
        return _of_export(_read_config(exported))
    return Origin()


def _of_export(config: Any) -> Origin:
    arguments = _part(config, "model_args")
    sizes = {key: arguments.get(key) for key in ("img_size", "patch_size")}
    return _origin(config.get("architecture") if arguments else None, sizes, arguments.get("cls_position"))


def _of_run(config: Any) -> Origin:
    model = _part(config, "model")
    sizes = {"img_size": _part(config, "data").get("image_size"), "patch_size": model.get("patch_size")}
    return _origin(model.get("name"), sizes, model.get("cls_position"))


def _part(config: Any, name: str) -> dict[str, Any]:
    """Return a group of a configuration; an empty one where it is none, as in files of other programs."""
    group = config.get(name) if isinstance(config, dict) else None
    return group if isinstance(group, dict) else {}


def _origin(name: Any, sizes: Mapping[str, Any], cls_position: Any) -> Origin:
    """Return what a model's timm name and the arguments img_size and patch_size say, those that are not None."""
    position = cls_position if cls_position in CLS_POSITIONS else None
    if name not in (*vim_names(), *vit_names()):
        return Origin(position)
    # JSON has no tuples.
    given: dict[str, Any] = {key: tuple(size) if isinstance(size, list) else size for key, size in sizes.items()}
    with torch.device("meta"):
        network: Any = timm.create_model(name, depth=1, num_classes=0, **given)
    rows, columns = network.patch_embed.grid_size
    return Origin(position, (rows, columns))


def _read_config(path: Path) -> Any:
    try:
        return (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path}, which would say what network the weights beside it are of, cannot be read "
            f"({type(error).__name__}); mend it, or move the weights to another folder"
        ) from error


def weights_in(content: dict[str, Any]) -> dict[str, Any]:
    """Return the weights in what was read from a file: at the top, or under "model" or "state_dict"."""
    return next((content[key] for key in _WEIGHT_KEYS if isinstance(content.get(key), dict)), content)


def _fit(model: FusedNetwork, weights: dict[str, Any], origin: Origin, reset_head: bool) -> _Fit:
    """Return weights for every parameter of the model, with what does not fit."""
    own = model.state_dict()
    weights = {str(name): value for name, value in weights.items()}
    given = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    fit = _Fit(given, [f"{name}: not a tensor" for name, value in weights.items() if not isinstance(value, Tensor)])
    if reset_head:
        for name in [name for name in given if name.startswith(_HEADS)]:
            del given[name]
        given |= {name: value for name, value in own.items() if name.startswith(_HEADS)}
    _fit_patch_embed(fit, own)
    embed = given.get("pos_embed")
    if embed is not None and embed.ndim == 3 and embed.shape[0] == 1:
        try:
            given["pos_embed"] = _fit_pos_embed(fit, model, embed, origin)
        except _MisfitError as misfit:
            fit.misfits.append(f"pos_embed: {misfit}")
            given["pos_embed"] = own["pos_embed"]
    fit.misfits += [f"{name}: missing in the file" for name in own if name not in given]
    unknown = [name for name in given if name not in own]
    fit.misfits += [f"{name}: not in the model{_HEAD_HINT if name.startswith('head.') else ''}" for name in unknown]
    for name in own.keys() & given.keys():
        if own[name].shape != given[name].shape:
            hint = _HEAD_HINT if name.startswith(_HEADS) else ""
            shapes = f"{tuple(given[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            fit.misfits.append(f"{name}: {shapes}{hint}")
    return fit


def _fit_patch_embed(fit: _Fit, own: dict[str, Tensor]) -> None:
    """Resample the file's patch embedding where it is one for patches of another size."""
    kernel, wanted = fit.weights.get(_PATCHES), own[_PATCHES].shape
    if kernel is None or kernel.ndim != 4 or kernel.shape[:2] != wanted[:2] or 0 in kernel.shape:
        return
    if kernel.shape != wanted:
        fit.changes.append(f"the patch embedding is resampled from {_by(kernel.shape[2:])} to {_by(wanted[2:])} pixels")
    fit.weights[_PATCHES] = resample_patch_embed(kernel, list(wanted[2:]))


class _MisfitError(Exception):
    """Says why a model cannot take something of a file."""


def _fit_pos_embed(fit: _Fit, model: FusedNetwork, embed: Tensor, origin: Origin) -> Tensor:
    """Return the file's position embedding (1, rows, width) on the model's grid; other tokens keep their rows."""
    if embed.shape[2] != model.embed_dim:
        raise _MisfitError(f"width {embed.shape[2]} in the file, {model.embed_dim} in the model")
    if isinstance(model, Vim):
        return _fit_to_vim(fit, model, embed, origin)
    assert isinstance(model, ToMe)
    others = 0 if model.vit.no_embed_class else model.protected
    patches = _on_grid(fit, embed[:, others:], model.grid_size, origin.grid, f"behind {others} others")
    return torch.cat([embed[:, :others], patches], dim=1)


def _fit_to_vim(fit: _Fit, model: Vim, embed: Tensor, origin: Origin) -> Tensor:
    """Return the file's position embedding on the model's grid with the class token's row in the model's place."""
    position = origin.cls_position or model.cls_position
    check_choice("cls_position", position, CLS_POSITIONS)
    if (position != "none") != (model.cls_position != "none"):
        raise _MisfitError(f"class token {position!r} in the file, {model.cls_position!r} in the model")
    told = f"with class token {position!r}"
    if model.cls_index is None:
        return _on_grid(fit, embed, model.grid_size, origin.grid, told)
    if origin.cls_position is None:
        fit.changes.append(f"the class token is taken to stand at {position}, since nothing says where")
    elif position != model.cls_position:
        fit.changes.append(f"the class token moves from {position} to {model.cls_position}")
    at = {"head": 0, "middle": (embed.shape[1] - 1) // 2}[position]
    others = torch.cat([embed[:, :at], embed[:, at + 1 :]], dim=1)
    patches = _on_grid(fit, others, model.grid_size, origin.grid, told)
    return torch.cat([patches[:, : model.cls_index], embed[:, at : at + 1], patches[:, model.cls_index :]], dim=1)


def _on_grid(fit: _Fit, patches: Tensor, own: tuple[int, int], given: tuple[int, int] | None, told: str) -> Tensor:
    """Return rows of patches (1, n, width) for a model's own grid. given: that of the file, where it is known."""
    count = patches.shape[1]
    side = math.isqrt(count)
    old = given or ((side, side) if side * side == count else own)
    if count < 1 or old[0] * old[1] != count:
        shape = "square grid" if given is None else f"grid of {_by(old)}"
        raise _MisfitError(f"{count} patches in the file are no {shape}, {told}")
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
