"""A model as a folder in Hugging Face's layout, which timm loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from famba.export.card import model_card
from famba.export.description import Description
from famba.training.build import model_arguments

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
_SAID_ABOVE = ("num_classes", "classes")
_SAID_ELSEWHERE = ("fusion_", "drop_path_rate", "num_classes")


def write_folder(description: Description, folder: Path) -> str:
    """Write config.json, model.safetensors and README.md to a folder that is there; return what there is to say.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` builds a Vim from them, after `import famba`. Of a vision
    transformer that fuses, timm builds the transformer, and `famba.models.apply_tome` takes what config.json has under
    "famba" to fuse again.
    """
    (folder / CONFIG).write_text(json.dumps(_config(description), indent=2) + "\n")
    weights = {name: weight.contiguous() for name, weight in description.model.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / CARD).write_text(model_card(description))
    return f"{len(weights):,} tensors, {sum(weight.numel() for weight in weights.values()):,} values"


def _config(description: Description) -> dict[str, Any]:
    """What timm reads, in timm's layout, and under "famba" what it passes over."""
    model, names = description.model, description.trained.class_names
    said = description.as_dict()
    return {
        "architecture": description.architecture,
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        **({} if names is None else {"label_names": names}),
        "model_args": _arguments(description),
        "pretrained_cfg": {
            **description.preprocessing(),
            "fixed_input_size": True,
            "num_classes": model.num_classes,
            "pool_size": None,
        },
        "famba": {name: said[name] for name in said if name not in (*description.preprocessing(), *_SAID_ABOVE)},
    }


def _arguments(description: Description) -> dict[str, Any]:
    """Arguments of timm.create_model with which it builds this network, or the one that it wraps."""
    model, config = description.model, description.trained.config
    built = {} if config is None else model_arguments(config, model.num_classes)
    chosen = {name: value for name, value in built.items() if not name.startswith(_SAID_ELSEWHERE)}
    fusion: dict[str, Any] = {}
    if not model.wraps_timm:
        settings = model.settings.settings()
        fusion = {"fusion": list(model.fusion), **{f"fusion_{name}": value for name, value in settings.items()}}
    return {**chosen, **model.timm_arguments(), **fusion}
