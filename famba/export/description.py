"""Describe an exported network: what it takes, how it fuses, what it came to, and where it comes from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import famba
from famba.data.augment import evaluation_scaling
from famba.errors import CheckpointError
from famba.files import sha256
from famba.fusion import tokens_per_layer
from famba.models import Backbone
from famba.models.weights import weights_folder
from famba.training.summary import SUMMARY, Summary
from famba.training.trained import Trained

# Of the run's summary and its provenance what says something to others; arguments and folders do not.
_RESULTS = ("data", "top1", "top5", "epochs", "steps", "train_time_s", "parameters", "macs_per_image", "precision")
_PROVENANCE = ("started", "famba", "git_commit", "python", "packages", "platform", "device", "cuda", "seed")


@dataclass(frozen=True)
class Description:
    """Describe a trained network as it is exported.

    architecture: its timm name. strategy: that made the schedule. own: whether it is exported with the fusion of its
    training. trained: the network, which fuses as it is exported, and what it takes. summary: of the run that made
    these very weights, None where that is not known.
    """

    architecture: str
    strategy: str
    own: bool
    trained: Trained
    summary: dict[str, Any] | None

    @property
    def model(self) -> Backbone:
        """The network."""
        return self.trained.model

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.model.in_chans, *self.model.image_size

    def preprocessing(self) -> dict[str, Any]:
        """Say how an image becomes input, in timm's words."""
        size, scaling = self.trained.image_size, self.trained.scaling
        side, crop = evaluation_scaling(scaling, size).side, scaling.eval_crop
        return {
            "input_size": list(self.shape),
            "interpolation": scaling.interpolation,
            # timm rounds down, and scales images as evaluation does by this share.
            "crop_pct": crop if math.floor(size / crop) == side else size / (side + 0.5),
            "crop_mode": "center",
            "mean": list(self.trained.mean),
            "std": list(self.trained.std),
        }

    def fusion(self) -> dict[str, Any]:
        """Say how the network fuses."""
        schedule = list(self.model.fusion)
        return {
            "strategy": self.strategy,
            "schedule": schedule,
            **self.model.settings.settings(),
            "tokens": self.model.num_tokens,
            "tokens_per_layer": list(tokens_per_layer(schedule, self.model.num_tokens)),
            "as_trained": self.own,
        }

    def results(self) -> dict[str, Any] | None:
        """Return what training came to, on test images: percent, seconds, counts; None where it is not known."""
        return None if self.summary is None else {name: self.summary.get(name) for name in _RESULTS}

    def provenance(self) -> dict[str, Any] | None:
        """Return versions, commit, machine and seed of the training; None where they are not known."""
        known = None if self.summary is None else self.summary.get("provenance") or {}
        return None if known is None else {name: known.get(name) for name in _PROVENANCE}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "exported_by": f"famba {famba.__version__}",
            "architecture": self.architecture,
            "num_classes": self.model.num_classes,
            "classes": self.trained.class_names,
            **self.preprocessing(),
            "reading": asdict(self.trained.reading),
            "fusion": self.fusion(),
            "results_of_training": self.results(),
            "provenance_of_training": self.provenance(),
        }

    def as_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(self.as_dict(), indent=2)


def find_summary(checkpoint: str) -> dict[str, Any] | None:
    """Find the summary of the run that made weights, as `load_trained` takes their name.

    None where there is none, or it is of other weights: a checkpoint of some step, weights that were replaced, or a run
    that did not finish.

    Raises CheckpointError where it cannot be read.
    """
    place = Path(checkpoint)
    at_hand = place if place.is_dir() else place.parent
    folder = at_hand if place.exists() else weights_folder(checkpoint)
    if folder is None or place.suffix == ".pt" or not (folder / SUMMARY).is_file():
        return None
    try:
        summary = Summary.parse((folder / SUMMARY).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / SUMMARY} cannot be read ({error}); mend it or move it away") from error
    weights = place if place.is_file() else folder / "model.safetensors"
    digest = summary.weights_sha256
    return summary.values() if digest is not None and digest == sha256(weights) else None
