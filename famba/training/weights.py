"""Read the weights of earlier runs, and start a run from them (init_from)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from glob import escape, glob
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from famba.errors import CheckpointError, near_miss
from famba.files import read_file
from famba.models import Backbone
from famba.models import weights as files
from famba.training.checkpoint import Checkpoints
from famba.training.config import RunConfig
from famba.training.run_folder import RunFolder, finished_weights

AVERAGED = "ema:"  # begins an init_from that asks for the averaged weights of a run
_log = logging.getLogger(__name__)


def find_file(place: str) -> Path | None:
    """Return the file that a run folder, a file, or the name of a model with bundled weights means, else None."""
    if os.path.isfile(place):  # unlike Path's, it takes any name
        return Path(place)
    folder = place if os.path.isdir(place) else files.weights_folder(place) if place in bundled() else None
    return None if folder is None else finished_weights(Path(folder))


def bundled() -> list[str]:
    """List the names, with and without tags, of the models with bundled weights."""
    names = files.names_with_weights()
    return [*names, *(name.split(".")[0] for name in names)]


def class_names(content: Mapping[str, Any], file: Path) -> tuple[str, ...] | None:
    """Return the names of the classes of weights: from the checkpoint, else from the run or export that they lie in."""
    kept, exported = content.get("data"), file.with_name("config.json")
    if not isinstance(kept, Mapping):
        kept = RunFolder(file.parent, writes=False).summary
    if kept is None and exported.is_file():
        with suppress(OSError, ValueError, AttributeError):  # one of something else
            kept = {"classes": json.loads(exported.read_text()).get("label_names")}
    names = kept.get("classes") if isinstance(kept, Mapping) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def read_initial(given: str) -> tuple[Path, dict[str, Any], files.Origin, tuple[str, ...] | None]:
    """Read the weights that init_from names: a run's folder, a file, or a timm model with bundled weights.

    With "ema:" before it, these are the averaged weights of a run with recipe.ema_decay, from its folder or a
    checkpoint. Returns their file, the weights, what the file says of their network, and the names of their classes.
    Raises FambaError if nothing is there, or it is damaged or holds no such weights.
    """
    place, averaged = given.removeprefix(AVERAGED), given.startswith(AVERAGED)
    file = find_file(place)
    if file is None:
        near = near_miss(place, bundled()) or f"; these are {', '.join(files.names_with_weights())}"
        told = "is no file, no run folder and no timm model with bundled weights"
        raise CheckpointError(f"init_from={given} {told}{near}")
    if averaged and Path(place).is_dir():  # they are kept in checkpoints alone
        file = next(iter(Checkpoints(Path(place) / "checkpoints").newest_first()), file)
    content = read_file(file)
    weights = files.weights_in(content, file, averaged=averaged)
    if averaged and not weights:
        told = f"{file} holds no averaged weights; give a run with recipe.ema_decay, or leave out {AVERAGED}"
        raise CheckpointError(f"init_from={given}: {told}")
    return file, weights, files.saved_origin(content, file), class_names(content, file)


def check_initial(config: RunConfig, outline: Backbone) -> None:
    """Raise FambaError if the weights that a new run is to start from are missing or do not fit its network."""
    # A run, or one of a sweep, that has begun continues from its own checkpoint.
    begun = [*glob(f"{escape(config.run_dir)}/checkpoints"), *glob(f"{escape(config.run_dir)}/*/checkpoints")]
    if config.init_from is None or begun:
        return
    file, weights, origin, _ = read_initial(config.init_from)
    files.fit_weights(outline, weights, str(file), origin, files.has_other_head(outline, weights))


def start_from(model: Backbone, given: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Load the weights that init_from names into `model`, with a new classifier for other classes.

    classes: names of the run's classes, None if they are not known. Returns what a summary tells of the weights.
    Raises FambaError as `check_initial`.
    """
    file, weights, origin, known = read_initial(given)
    digest = weights_sha256(weights)
    others = known is not None and classes is not None and known != tuple(classes)
    is_new = others or files.has_other_head(model, weights)
    changes = files.load_weights(model, weights, file, origin, reset_head=is_new)
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
