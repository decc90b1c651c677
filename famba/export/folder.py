"""Write a model as a folder in Hugging Face's layout, which timm loads, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from safetensors.torch import save
from tabulate import tabulate

from famba.export.description import Description
from famba.training.setup import model_arguments

FILES = ("config.json", "model.safetensors", "README.md")
_SAID_ABOVE = ("num_classes", "classes")
_SAID_ELSEWHERE = ("fusion_", "drop_path_rate", "num_classes")
_MATCHING = "bolya2023token"


def write_folder(described: Description, folder: Path) -> str:
    """Write config.json, model.safetensors and README.md to a folder that is there; return what there is to say.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` builds a Vim from them, after `import famba`. Of a vision
    transformer that fuses, timm builds the transformer, and `famba.models.apply_tome` takes what config.json has under
    "famba" to fuse again.
    """
    weights = {name: weight.contiguous() for name, weight in described.model.state_dict().items()}
    config = json.dumps(_config(described), indent=2) + "\n"
    contents = (config.encode(), save(weights, metadata={"format": "pt"}), model_card(described).encode())
    for name, content in zip(FILES, contents, strict=True):
        (folder / name).write_bytes(content)
    return f"{len(weights):,} tensors, {sum(weight.numel() for weight in weights.values()):,} values"


def _config(described: Description) -> dict[str, Any]:
    """Return what timm reads, in timm's layout, and under "famba" what it passes over."""
    model, names, said = described.model, described.trained.class_names, described.as_dict()
    taken = described.preprocessing()
    return {
        "architecture": described.architecture,
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        **({} if names is None else {"label_names": names}),
        "model_args": _arguments(described),
        "pretrained_cfg": {**taken, "fixed_input_size": True, "num_classes": model.num_classes, "pool_size": None},
        "famba": {name: said[name] for name in said if name not in (*taken, *_SAID_ABOVE)},
    }


def _arguments(described: Description) -> dict[str, Any]:
    """Return arguments of timm.create_model with which it builds this network, or the one that it wraps."""
    model, config = described.model, described.trained.config
    built = {} if config is None else model_arguments(config, model.num_classes)
    chosen = {name: value for name, value in built.items() if not name.startswith(_SAID_ELSEWHERE)}
    fusion: dict[str, Any] = {}
    if not model.wraps_timm:
        settings = model.settings.settings()
        fusion = {"fusion": list(model.fusion), **{f"fusion_{name}": value for name, value in settings.items()}}
    return {**chosen, **model.timm_arguments(), **fusion}


def model_card(described: Description) -> str:
    """Write what a reader of the hub wants to know, as Markdown with the header that the hub reads."""
    model, said, reading = described.model, described.as_dict(), described.trained.reading
    fusion, results = said["fusion"], described.results()
    opening = "from PIL import Image", 'Image.open("IMAGE").convert("RGB")'
    if reading.colour is not None:
        opening = "from famba.data import open_image", f'open_image("IMAGE", background="{reading.background}")'
    rows = {
        "strategy": fusion["strategy"],
        "tokens removed in each layer": ", ".join(map(str, fusion["schedule"])),
        "tokens after each layer": ", ".join(map(str, fusion["tokens_per_layer"])),
        **(model.settings.settings() if any(model.fusion) else {}),
    }
    origin = described.provenance() or {}
    packages = origin.pop("packages", None) or {}
    entries = (Path(__file__).with_name("citations.bib")).read_text().strip().split("\n\n")
    papers = [entry for key in (*model.papers, _MATCHING) for entry in entries if f"{{{key}," in entry]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, keep_trailing_newline=True)  # noqa: S701 - Markdown, not HTML
    environment.filters["table"] = _table
    template = Path(__file__).with_name("card.md").read_text()
    return environment.from_string(template).render(
        said=said,
        model=model,
        fusion=fusion,
        fusion_rows=rows,
        removed=sum(model.fusion),
        opening=opening,
        results=results,
        trained_schedule=(described.summary or {}).get("schedule") or (),
        config=described.trained.config,
        origin={name.replace("_", " "): value for name, value in origin.items()} | packages,
        citations="\n".join(papers),
    )


def _table(rows: dict[str, Any]) -> str:
    """Return names and values as a table of Markdown, without those that are None or left out."""
    known = [(name, value) for name, value in rows.items() if value is not None and value != ""]
    return tabulate(known, headers=["", ""], tablefmt="github", disable_numparse=True)
