"""The Vim models under their timm names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from famba.errors import ConfigError
from famba.models.checkpoints import fitting_weights, read_file
from famba.models.vim import Vim

# Keys of a run's configuration that are arguments of Vim, with "fusion_" before them.
_WAYS = ("order", "weighting", "place", "mode")
_WEIGHTS = Path(__file__).parent / "weights"


def weights_folder(name: str) -> Path | None:
    """Return the run folder that a model's weights come from: weights, configuration and summary; None without any."""
    folder = _WEIGHTS / name.split(".")[0]
    return folder if folder.is_dir() else None


def _cfg(size: int, **more: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **more,
    }


def _shipped(name: str, size: int, num_classes: int) -> dict[str, Any]:
    """The configuration of a model whose weights come with the package."""
    file = _WEIGHTS / name / "model.safetensors"
    return _cfg(size, num_classes=num_classes, crop_pct=1.0, license="apache-2.0", file=str(file))


default_cfgs = generate_default_cfgs(
    {
        "vim_micro_patch4_32.famba_cifar100": _shipped("vim_micro_patch4_32", 32, num_classes=100),
        "vim_tiny_patch16_224": _cfg(224),
        "vim_small_patch16_224": _cfg(224),
        "vim_base_patch16_224": _cfg(224),
        "vit_micro_patch4_32": _cfg(32),
    }
)


def create_vim(variant: str, pretrained: bool, shape: dict[str, Any], chosen: dict[str, Any]) -> nn.Module:
    """Build a registered variant: `shape` is what makes it, `chosen` what the caller of timm.create_model asked for.

    With pretrained weights that lie in their run's folder, such as those that come with the package, it fuses as it did
    in training, in the arguments of `Vim` on fusion that are not chosen. timm passes no None on: fusion=[0] * depth is
    no fusion.

    Returns a Vim; with features_only=True timm's FeatureGetterNet of one, which gives maps of features. Raises
    ConfigError where the schedule of training does not fit the size of image or patch that is chosen.
    """
    trained = _fusion_of_training(variant, shape, chosen) if pretrained else {}
    try:
        return build_model_with_cfg(
            Vim,
            variant,
            pretrained,
            pretrained_filter_fn=fitting_weights,
            # With features_only=True: by forward_intermediates, of the last three layers as timm's ViTs have it.
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **{**shape, **trained, **chosen},
        )
    except ConfigError as error:
        if error.argument != "counts" or "fusion" not in trained or "fusion" in chosen:
            raise
        raise ConfigError(
            f"the weights of {variant} were trained to fuse by {trained['fusion']}, which does not fit what was asked "
            f"for: {error}; give fusion= a schedule that does, such as [0] * {len(trained['fusion'])} for no fusion",
            "fusion",
        ) from error


def _fusion_of_training(variant: str, shape: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return how pretrained weights were trained to fuse, as arguments of Vim, by their run; nothing without a run."""
    file = resolve_pretrained_cfg(variant, chosen.get("pretrained_cfg"), chosen.get("pretrained_cfg_overlay")).file
    # Where timm loads a folder, this is the folder, and its config.json says how the network fuses.
    if not file or not Path(file).is_file():
        return {}
    config, summary = Path(file).with_name("config.yaml"), Path(file).with_name("summary.json")
    if config.is_file() and summary.is_file():
        ways, schedule = yaml.safe_load(config.read_text())["fusion"], json.loads(summary.read_text())["schedule"]
    elif {"config", "schedule"} <= (content := read_file(file)).keys():  # a checkpoint of a run
        ways, schedule = content["config"]["fusion"], content["schedule"]
    else:
        return {}
    if len(schedule) != {**shape, **chosen}["depth"]:
        return {}  # the weights do not fit either, which says more
    return {"fusion": schedule, **{f"fusion_{way}": ways[way] for way in _WAYS if way in ways}}


@register_model
def vim_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A Vim for CPUs and tests, 0.3 M parameters, for 32 x 32 images; with weights of CIFAR-100."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 8}
    return create_vim("vim_micro_patch4_32", pretrained, shape, kwargs)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti, 7 M parameters (arXiv 2401.09417)."""
    return create_vim("vim_tiny_patch16_224", pretrained, {"embed_dim": 192, "depth": 24}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S, 26 M parameters (arXiv 2401.09417)."""
    return create_vim("vim_small_patch16_224", pretrained, {"embed_dim": 384, "depth": 24}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B, 98 M parameters (arXiv 2401.09417)."""
    return create_vim("vim_base_patch16_224", pretrained, {"embed_dim": 768, "depth": 24}, kwargs)


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A vision transformer of vim_micro's depth, width and number of parameters, for 32 x 32 images."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 8, "num_heads": 4, "mlp_ratio": 3}
    return build_model_with_cfg(VisionTransformer, "vit_micro_patch4_32", pretrained, **{**shape, **kwargs})
