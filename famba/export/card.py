"""The model card: what a reader of the hub wants to know, in Markdown."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from famba.data import Reading
from famba.export.description import Description

_TAGS = ("image-classification", "timm", "famba", "token-fusion")
_CITATIONS = {
    "zhu2024vision": """\
@inproceedings{zhu2024vision,
  title={Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model},
  author={Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and Wang, Xinlong and Liu, Wenyu and Wang, Xinggang},
  booktitle={International Conference on Machine Learning},
  year={2024}
}""",
    "shen2024famba": """\
@article{shen2024famba,
  title={Famba-V: Fast Vision Mamba with Cross-Layer Token Fusion},
  author={Shen, Hui and Wan, Zhongwei and Wang, Xin and Zhang, Mi},
  journal={arXiv preprint arXiv:2409.09808},
  year={2024}
}""",
    "bolya2023token": """\
@inproceedings{bolya2023token,
  title={Token Merging: Your {ViT} but Faster},
  author={Bolya, Daniel and Fu, Cheng-Yang and Dai, Xiaoliang and Zhang, Peizhao and Feichtenhofer, Christoph and
          Hoffman, Judy},
  booktitle={International Conference on Learning Representations},
  year={2023}
}""",
}
_OF_THE_MATCHING = "bolya2023token"


def model_card(description: Description) -> str:
    """Write README.md for a model folder, with the header that the hub reads."""
    sections = [_header(), _title(description), _use(description), _fusion(description), _results(description)]
    sections += [_training(description), _provenance(description), f"## Citation\n\n{_citation(description)}"]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header() -> str:
    tags = "\n".join(f"- {tag}" for tag in _TAGS)
    return f"---\ntags:\n{tags}\nlibrary_name: timm\npipeline_tag: image-classification\n---"


def _title(description: Description) -> str:
    channels, height, width = description.shape
    model = description.model
    fusion = description.fusion()
    removed = sum(fusion["schedule"])
    does = "drops" if fusion["mode"] == "prune" else "fuses away"
    said = f"{does} {removed} of {model.num_patches} patches ({fusion['strategy']})" if removed else "fuses nothing"
    return (
        f"# {description.architecture}\n\n"
        f"An image classifier of {model.num_classes} classes for {channels} x {height} x {width} images, exported by "
        f"Famba {description.as_dict()['exported_by'].split()[-1]}. It {said}."
    )


def _use(description: Description) -> str:
    lines = ["import timm", "import famba  # registers the network with timm"]
    if description.model.wraps_timm:
        lines = ["import json", "from pathlib import Path", "import timm", "import famba"]
        lines += [
            "",
            'vit = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
            'fusion = json.loads(Path("FOLDER/config.json").read_text())["famba"]["fusion"]',
            "names = famba.fusion.SETTINGS",
            'model = famba.models.apply_tome(vit, fusion["schedule"], **{name: fusion[name] for name in names})',
        ]
    else:
        lines += ["", 'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()']
    described = "vit" if description.model.wraps_timm else "model"
    lines.append(f"transform = timm.data.create_transform(**timm.data.resolve_model_data_config({described}))")
    imported, opened = _opening(description.trained.reading)
    lines.insert(lines.index(""), imported)
    lines.append(f"logits = model(transform({opened}).unsqueeze(0))")
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _opening(reading: Reading) -> tuple[str, str]:
    """Return an import and an expression that read an image file as in training."""
    if reading.colour is None:
        return "from PIL import Image", 'Image.open("IMAGE").convert("RGB")'
    return "from famba.data import open_image", f'open_image("IMAGE", background="{reading.background}")'


def _fusion(description: Description) -> str:
    fusion = description.fusion()
    rows: dict[str, str] = {
        "strategy": fusion["strategy"],
        "tokens removed in each layer": ", ".join(map(str, fusion["schedule"])),
        "tokens after each layer": ", ".join(map(str, fusion["tokens_per_layer"])),
    }
    if any(fusion["schedule"]):
        rows |= {name: str(value) for name, value in description.model.settings.settings().items()}
    note = "" if description.own else "\n\nThis is not the schedule that the network was trained with."
    return f"## Fusion\n\n{_table(rows)}{note}"


def _results(description: Description) -> str:
    found = description.results()
    if found is None:
        return "## Results\n\nNone are known of these very weights: no summary of a finished run lies with them."
    rows = {
        f"Top-1 on the test images of {found['data']}": f"{found['top1']:.2f} %",
        f"Top-5 on the test images of {found['data']}": f"{found['top5']:.2f} %",
        "parameters": f"{found['parameters']:,}",
        "multiply-adds per image": f"{found['macs_per_image']:,}",
    }
    note = "One run, one seed. These are the weights of the last step."
    if not description.own:
        trained = ", ".join(map(str, (description.summary or {}).get("schedule") or ()))
        note += f" They were tested with the schedule of training ({trained}), not with the one of this folder."
    return f"## Results\n\n{_table(rows)}\n\n{note}"


def _training(description: Description) -> str:
    config = description.trained.config
    if config is None:
        return ""
    recipe, trainer = config.recipe, config.trainer
    found = description.results()
    rows = {
        "data": config.data.name,
        "epochs": f"{trainer.epochs:,}",
        "batch size": f"{trainer.batch_size:,}",
        "optimizer": f"{recipe.optimizer}, learning rate {recipe.lr:g} for {recipe.lr_batch} images, "
        f"weight decay {recipe.weight_decay:g}",
        "augmentation": f"{recipe.auto_augment or recipe.augmentation}, mixup {recipe.mixup:g}, "
        f"cutmix {recipe.cutmix:g}, label smoothing {recipe.label_smoothing:g}",
        "fusion in training": config.fusion.strategy,
        "seed": str(config.seed),
    }
    if config.data.subset is not None:
        rows["data"] += f", {config.data.subset:,} training images of it"
    if found is not None:
        rows["steps"] = f"{found['steps']:,}"
        rows["training time"] = f"{found['train_time_s']:,.0f} s"
        rows["precision"] = found["precision"]
    return f"## Training\n\n{_table(rows)}"


def _provenance(description: Description) -> str:
    known = description.provenance()
    if known is None:
        return ""
    packages = known.pop("packages") or {}
    rows = {name.replace("_", " "): str(value) for name, value in known.items() if value is not None}
    return f"## Provenance of the training\n\n{_table(rows | packages)}"


def _table(rows: dict[str, Any]) -> str:
    return tabulate(list(rows.items()), headers=["", ""], tablefmt="github", disable_numparse=True)


def _citation(description: Description) -> str:
    entries = "\n".join(_CITATIONS[key] for key in (*description.model.papers, _OF_THE_MATCHING))
    return f"```bibtex\n{entries}\n```"
