"""Describe an exported network, and write it as a folder in Hugging Face's layout, which timm loads, with a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from safetensors.torch import save
from tabulate import tabulate

import famba
from famba.analysis.options import Variant
from famba.analysis.trained import Trained
from famba.files import sha256
from famba.fusion import tokens_per_layer
from famba.training.build import model_arguments
from famba.training.run_folder import RunFolder
from famba.training.weights import find_file

FILES = ("config.json", "model.safetensors", "README.md")
_SAID_ABOVE = ("num_classes", "classes")
_SAID_ELSEWHERE = ("fusion_", "drop_path_rate", "num_classes")
_MATCHING = "bolya2023token"
# What is said of how an image becomes input, in timm's words.
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
# Of the run's summary and its provenance what says something to others; arguments and folders do not.
_RESULTS = ("data", "top1", "top5", "epochs", "steps", "train_time_s", "parameters", "macs_per_image", "precision")
_PROVENANCE = ("started", "famba", "git_commit", "python", "packages", "platform", "device", "cuda", "seed")


def describe(trained: Trained, architecture: str, fused: Variant, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return as plain values what an exported file says of itself; architecture: timm name of the network."""
    model, scaling = trained.model, trained.scaling
    origin = None if summary is None else summary.get("provenance") or {}
    return {
        "exported_by": f"famba {famba.__version__}",
        "architecture": architecture,
        "num_classes": model.num_classes,
        "classes": trained.class_names,
        "input_size": [model.in_chans, *model.image_size],
        "interpolation": scaling.interpolation,
        "crop_pct": scaling.eval_crop,
        "crop_mode": "center",
        "mean": list(trained.mean),
        "std": list(trained.std),
        "reading": asdict(trained.reading),
        "fusion": {
            "strategy": fused.fusion.strategy,
            "schedule": list(fused.schedule),
            **model.settings.settings(),
            "tokens": model.num_tokens,
            "tokens_per_layer": list(tokens_per_layer(fused.schedule, model.num_tokens)),
            "as_trained": fused.own,
        },
        "results_of_training": None if summary is None else {name: summary.get(name) for name in _RESULTS},
        "provenance_of_training": None if origin is None else {name: origin.get(name) for name in _PROVENANCE},
    }


def find_summary(checkpoint: str) -> dict[str, Any] | None:
    """Find the summary of the run that made weights, as `load_trained` takes their name.

    None where there is none, or it is of other weights: a checkpoint of some step, weights that were replaced, or a run
    that did not finish. Raises CheckpointError where it cannot be read.
    """
    file = find_file(checkpoint)
    if file is None or file.suffix != ".safetensors":
        return None
    summary = RunFolder(file.parent, writes=False).summary
    return summary if summary is not None and summary["weights_sha256"] == sha256(file) else None


def write_folder(trained: Trained, said: Mapping[str, Any], summary: Mapping[str, Any] | None, folder: Path) -> str:
    """Write config.json, model.safetensors and README.md to a folder that is there; return what there is to say.

    said: as `describe` returns it; summary: as `find_summary` does.
    """
    weights = {name: weight.contiguous() for name, weight in trained.model.state_dict().items()}
    config = json.dumps(_config(trained, said), indent=2) + "\n"
    contents = (config.encode(), save(weights, metadata={"format": "pt"}), _card(trained, said, summary).encode())
    for name, content in zip(FILES, contents, strict=True):
        (folder / name).write_bytes(content)
    return f"{len(weights):,} tensors, {sum(weight.numel() for weight in weights.values()):,} values"


def _config(trained: Trained, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm reads, in timm's layout, and under "famba" what it passes over."""
    model, names, config = trained.model, trained.class_names, trained.config
    built = {} if config is None else model_arguments(config, model.num_classes)
    arguments = {name: value for name, value in built.items() if not name.startswith(_SAID_ELSEWHERE)}
    arguments |= model.timm_arguments()
    if not model.wraps_timm:
        settings = model.settings.settings()
        arguments |= {"fusion": list(model.fusion), **{f"fusion_{name}": value for name, value in settings.items()}}
    taken = {name: said[name] for name in _PREPROCESSING}
    return {
        "architecture": said["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        **({} if names is None else {"label_names": names}),
        "model_args": arguments,
        "pretrained_cfg": {**taken, "fixed_input_size": True, "num_classes": model.num_classes, "pool_size": None},
        "famba": {name: value for name, value in said.items() if name not in (*_PREPROCESSING, *_SAID_ABOVE)},
    }


def _card(trained: Trained, said: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    """Return what a reader of the hub wants to know, as Markdown with the header that the hub reads."""
    model, reading, fusion = trained.model, trained.reading, said["fusion"]
    opening = "from PIL import Image", 'Image.open("IMAGE").convert("RGB")'
    if reading.colour is not None:
        opening = "from famba.data import open_image", f'open_image("IMAGE", background="{reading.background}")'
    rows = {
        "strategy": fusion["strategy"],
        "tokens removed in each layer": ", ".join(map(str, fusion["schedule"])),
        "tokens after each layer": ", ".join(map(str, fusion["tokens_per_layer"])),
        **(model.settings.settings() if any(model.fusion) else {}),
    }
    origin = dict(said["provenance_of_training"] or {})
    packages = origin.pop("packages", None) or {}
    entries = Path(__file__).with_name("citations.bib").read_text().strip().split("\n\n")
    papers = [entry for key in (*model.papers, _MATCHING) for entry in entries if f"{{{key}," in entry]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - Markdown
    environment.filters["table"] = _table
    return environment.from_string(Path(__file__).with_name("card.md").read_text()).render(
        said=said,
        model=model,
        fusion=fusion,
        fusion_rows=rows,
        removed=sum(model.fusion),
        opening=opening,
        results=said["results_of_training"],
        trained_schedule=(summary or {}).get("schedule") or (),
        config=trained.config,
        origin={name.replace("_", " "): value for name, value in origin.items()} | packages,
        citations="\n".join(papers),
    )


def _table(rows: Mapping[str, Any]) -> str:
    """Return names and values as a table of Markdown, without those that are None."""
    known = [(name, value) for name, value in rows.items() if value is not None]
    return tabulate(known, headers=["", ""], tablefmt="github", disable_numparse=True)
