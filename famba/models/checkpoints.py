"""Weights from files into a Vim, refused as a whole where they do not fit."""

from __future__ import annotations

import argparse
import errno
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from famba.errors import CheckpointError, DamagedError
from famba.files import read_seal
from famba.models.vim import CLS_POSITIONS, Vim, check_choice

_HEAD_HINT = "; reset_head=True keeps the model's own"
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

    The position embedding is resized to the model's grid, the class token's own row left as it is.

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
    return load_weights(model, _read_weights(path), path, cls_position=cls_position, reset_head=reset_head)


def load_weights(
    model: Vim,
    weights: dict[str, Any],
    path: str | Path,
    *,
    cls_position: str | None = None,
    reset_head: bool = False,
) -> Vim:
    """Load weights that were read from a path, as `load_vim_checkpoint` does."""
    model.load_state_dict(_fitted(model, weights, str(path), cls_position or model.cls_position, reset_head))
    return model


def fitting_weights(weights: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """Return weights that come with a model as this one takes them, its own classifier where it has other classes.

    Raises CheckpointError with the list of all that does not fit.
    """
    head, own = weights.get("head.weight"), model.state_dict().get("head.weight")
    other_head = own is None or not isinstance(head, Tensor) or head.shape[:1] != own.shape[:1]
    return _fitted(model, weights, "what comes with the model", model.cls_position, other_head)


def _fitted(model: Vim, weights: dict[str, Any], source: str, cls_position: str, reset_head: bool) -> dict[str, Tensor]:
    fitted, misfits = _fit(model, weights, cls_position, reset_head)
    if misfits:
        listed = "\n  ".join(misfits)
        raise CheckpointError(f"{source} does not fit this model; nothing was loaded:\n  {listed}")
    return fitted


def has_other_head(model: Vim, path: str | Path) -> bool:
    """Whether a file's classifier is for another number of classes than the model's."""
    head = _read_weights(path).get("head.weight")
    own = model.state_dict().get("head.weight")
    return isinstance(head, Tensor) and own is not None and head.shape[:1] != own.shape[:1]


def saved_cls_position(path: str | Path) -> str | None:
    """Where a file's class token stands, as its run's configuration says, in the file or beside it; else None."""
    beside = Path(path).parent / "config.yaml"
    content = read_file(path)
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


def _read_weights(path: str | Path) -> dict[str, Any]:
    content = read_file(path)
    return next((content[key] for key in _WEIGHT_KEYS if isinstance(content.get(key), dict)), content)


def _fit(
    model: Vim, weights: dict[str, Any], cls_position: str, reset_head: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights for every parameter of the model, and what does not fit."""
    check_choice("cls_position", cls_position, CLS_POSITIONS)
    own = model.state_dict()
    weights = {str(name): value for name, value in weights.items()}
    given = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    misfits = [f"{name}: not a tensor" for name, value in weights.items() if not isinstance(value, Tensor)]
    if reset_head:
        given = {name: value for name, value in given.items() if not name.startswith("head.")}
        given |= {name: value for name, value in own.items() if name.startswith("head.")}
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
            hint = _HEAD_HINT if name.startswith("head.") else ""
            shapes = f"{tuple(given[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            misfits.append(f"{name}: {shapes}{hint}")
    return given, sorted(misfits)


def _fit_pos_embed(model: Vim, embed: Tensor, cls_position: str) -> Tensor | str:
    """The file's position embedding on the model's grid with the class token's row in the model's place."""
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
