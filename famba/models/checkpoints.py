"""Weights from files into a network, refused as a whole where they do not fit."""

from __future__ import annotations

import argparse
import errno
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from famba.errors import CheckpointError, DamagedError
from famba.files import read_seal
from famba.models.fused import FusedNetwork, check_choice
from famba.models.tome import ToMe
from famba.models.vim import CLS_POSITIONS, Vim

_PATCHES = "patch_embed.proj.weight"
_MIDDLE = "midclstok"  # in names of official models
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


def load_vim_checkpoint(
    model: Vim, path: str | Path, *, cls_position: str | None = None, reset_head: bool = False
) -> Vim:
    """Load weights into a Vim: the official files with unchanged names, or those of a run.

    The position embedding is resized to the model's grid, the class token's own row left as it is; the patch embedding
    is resampled to the model's patches.

    Args:
        model: changed in place, and only where everything fits.
        path: .pth, .pt (weights at the top, or under "model" or "state_dict") or .safetensors.
        cls_position: where the file's class token stands; as in the model where None. The official files of
            Vim have it in the "middle".
        reset_head: keep the model's own classifier, for another set of classes.

    Returns:
        The model.

    Raises:
        CheckpointError: missing or damaged file, or the list of all that does not fit.
    """
    load_weights(model, weights_in(read_file(path)), path, cls_position=cls_position, reset_head=reset_head)
    return model


def load_weights(
    model: FusedNetwork,
    weights: dict[str, Any],
    path: str | Path,
    *,
    cls_position: str | None = None,
    reset_head: bool = False,
) -> None:
    """Load weights that were read from a path, as `load_vim_checkpoint` does, into a network of any kind."""
    model.load_state_dict(_fitted(model, weights, str(path), cls_position, reset_head))


def check_weights(
    model: FusedNetwork,
    weights: dict[str, Any],
    path: str | Path,
    *,
    cls_position: str | None = None,
    reset_head: bool = False,
) -> None:
    """Raise CheckpointError where `load_weights` would; the model stays as it is and may be without memory."""
    _fitted(model, weights, str(path), cls_position, reset_head)


def fitting_weights(weights: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """Return weights that come with a model as this one takes them, its own classifier where it has other classes.

    Raises CheckpointError with the list of all that does not fit.
    """
    head, own = weights.get("head.weight"), model.state_dict().get("head.weight")
    other_head = own is None or not isinstance(head, Tensor) or head.shape[:1] != own.shape[:1]
    return _fitted(model, weights, "what comes with the model", None, other_head)


def _fitted(
    model: FusedNetwork, weights: dict[str, Any], source: str, cls_position: str | None, reset_head: bool
) -> dict[str, Tensor]:
    fitted, misfits = _fit(model, weights, cls_position, reset_head)
    if misfits:
        listed = "\n  ".join(misfits)
        raise CheckpointError(f"{source} does not fit this model; nothing was loaded:\n  {listed}")
    return fitted


def saved_cls_position(content: dict[str, Any], path: str | Path) -> str | None:
    """Where the class token of a file's weights stands, as their run says; None where nothing does.

    Args:
        content: what was read from the file, as `read_file` has it.
        path: the file. A run's weights have their configuration beside them, its checkpoints within; the official files
            of Vim hold the name of their model.

    Raises:
        CheckpointError: the configuration beside the file cannot be read.
    """
    official = getattr(content.get("args"), "model", None)
    if isinstance(official, str):
        return "middle" if _MIDDLE in official else None
    beside = Path(path).parent / "config.yaml"
    config = content.get("config")
    if config is None and beside.is_file():
        config = _read_config(beside)
    model = config.get("model") if isinstance(config, dict) else None
    position = model.get("cls_position") if isinstance(model, dict) else None
    return position if position in CLS_POSITIONS else None


def _read_config(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path}, which would say where the class token of the weights beside it stands, cannot be read "
            f"({type(error).__name__}); mend it, or move the weights to another folder"
        ) from error


def weights_in(content: dict[str, Any]) -> dict[str, Any]:
    """Return the weights in what was read from a file: at the top, or under "model" or "state_dict"."""
    return next((content[key] for key in _WEIGHT_KEYS if isinstance(content.get(key), dict)), content)


def _fit(
    model: FusedNetwork, weights: dict[str, Any], cls_position: str | None, reset_head: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights for every parameter of the model, and what does not fit."""
    own = model.state_dict()
    weights = {str(name): value for name, value in weights.items()}
    given = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    misfits = [f"{name}: not a tensor" for name, value in weights.items() if not isinstance(value, Tensor)]
    if reset_head:
        given = {name: value for name, value in given.items() if not name.startswith(_HEADS)}
        given |= {name: value for name, value in own.items() if name.startswith(_HEADS)}
    given |= _fit_patch_embed(given, own)
    if "pos_embed" in given and given["pos_embed"].ndim == 3 and given["pos_embed"].shape[0] == 1:
        resized = _fit_pos_embed(model, given["pos_embed"], cls_position)
        if isinstance(resized, str):
            misfits.append(resized)
            resized = own["pos_embed"]
        given["pos_embed"] = resized
    misfits += [f"{name}: missing in the file" for name in own if name not in given]
    unknown = [name for name in given if name not in own]
    misfits += [f"{name}: not in the model{_HEAD_HINT if name.startswith('head.') else ''}" for name in unknown]
    for name in own.keys() & given.keys():
        if own[name].shape != given[name].shape:
            hint = _HEAD_HINT if name.startswith(_HEADS) else ""
            shapes = f"{tuple(given[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            misfits.append(f"{name}: {shapes}{hint}")
    return given, sorted(misfits)


def _fit_patch_embed(given: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's patch embedding for patches of the model's size, where it is one for others: by name, if any."""
    kernel, wanted = given.get(_PATCHES), own[_PATCHES].shape
    if kernel is None or kernel.ndim != 4 or kernel.shape[:2] != wanted[:2] or 0 in kernel.shape:
        return {}
    return {_PATCHES: resample_patch_embed(kernel, list(wanted[2:]))}


def _fit_pos_embed(model: FusedNetwork, embed: Tensor, cls_position: str | None) -> Tensor | str:
    if isinstance(model, Vim):
        return _fit_to_vim(model, embed, cls_position or model.cls_position)
    assert isinstance(model, ToMe)
    return _fit_to_transformer(model, embed)


def _fit_to_transformer(model: ToMe, embed: Tensor) -> Tensor | str:
    """The file's position embedding on the transformer's grid; the rows of its other tokens as they are."""
    prefix = 0 if model.vit.no_embed_class else model.protected
    patches, width = embed.shape[1] - prefix, embed.shape[2]
    if width != model.embed_dim:
        return f"pos_embed: width {width} in the file, {model.embed_dim} in the model"
    if patches == model.num_patches:
        return embed
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return f"pos_embed: {embed.shape[1]} rows in the file are no square grid of patches behind {prefix} others"
    return resample_abs_pos_embed(embed, list(model.vit.patch_embed.grid_size), num_prefix_tokens=prefix)


def _fit_to_vim(model: Vim, embed: Tensor, cls_position: str) -> Tensor | str:
    """The file's position embedding on the model's grid with the class token's row in the model's place."""
    check_choice("cls_position", cls_position, CLS_POSITIONS)
    rows, width = embed.shape[1:]
    has_cls = cls_position != "none"
    patches = rows - has_cls
    grid = model.patch_embed.grid_size
    if width != model.embed_dim:
        return f"pos_embed: width {width} in the file, {model.embed_dim} in the model"
    if has_cls != (model.cls_position != "none"):
        return f"pos_embed: class token {cls_position!r} in the file, {model.cls_position!r} in the model"
    if patches < 1:
        return f"pos_embed: {rows} rows in the file are no grid of patches with class token {cls_position!r}"
    old_grid = grid if patches == model.num_patches else (math.isqrt(patches),) * 2
    if old_grid[0] * old_grid[1] != patches:
        return f"pos_embed: {rows} rows in the file are no square grid of patches with class token {cls_position!r}"

    index = {"head": 0, "middle": patches // 2, "none": patches}[cls_position]
    cls = embed[:, index : index + 1]
    grid_rows = torch.cat([embed[:, :index], embed[:, index + 1 :]], dim=1)
    if list(old_grid) != list(grid):
        grid_rows = resample_abs_pos_embed(grid_rows, list(grid), list(old_grid), num_prefix_tokens=0)
    if model.cls_index is None:
        return grid_rows
    return torch.cat([grid_rows[:, : model.cls_index], cls, grid_rows[:, model.cls_index :]], dim=1)
