"""Build optimizer, learning rate, mixing and loss of a recipe, from timm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn

from famba.errors import ConfigError, near_miss
from famba.training.config import RecipeConfig, RunConfig

# Settings of an optimizer that depend on the device, as a checkpoint holds them.
_FORM: dict[str, Any] = {"fused": None, "foreach": None, "capturable": False}


def check_optimizer(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError if the optimizer cannot be built, or cannot take a step on four numbers."""
    name, tiny = config.recipe.optimizer, nn.Linear(2, 2, bias=False, device=device)
    one_layer = replace(config, recipe=replace(config.recipe, layer_decay=None))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # recommendations are shown when the run builds its own
            optimizer = create_optimizer(tiny, one_layer)
            tiny(torch.ones(1, 2, device=device)).sum().backward()
            optimizer.step()
    except Exception as error:  # each optimizer has its own way to fail
        told = f"does not work with this recipe here{near_miss(name, map(str, list_optimizers()))}"
        told += f" ({str(error) or type(error).__name__}); use adamw, or change recipe.betas and recipe.eps"
        raise ConfigError(f"recipe.optimizer={name} {told}") from error


def has_fused_form(name: str) -> bool:
    """Return whether a step of an optimizer can be one kernel, which can skip it by a flag on the device."""
    fused = (torch.optim.Adam, torch.optim.AdamW)
    return name in list_optimizers() and get_optimizer_class(name, bind_defaults=False) in fused


def _highest_rate(config: RunConfig) -> float:
    return config.recipe.lr * config.trainer.batch_size / config.recipe.lr_batch


def create_optimizer(model: nn.Module, config: RunConfig, fused: bool = False) -> torch.optim.Optimizer:
    """Build the optimizer; one-dimensional parameters and those of `no_weight_decay` do not decay.

    With layer_decay, the classifier's rate is the recipe's, and that of each layer before it is layer_decay times that
    of the next, down to the patch embedding's (Bao et al. 2021, arXiv 2106.08254). If `fused`, the optimizer is in its
    fused form with its learning rates on the device, as a CUDA graph needs it.
    """
    device, recipe = next(model.parameters()).device, config.recipe
    form: dict[str, Any] = {"fused": True, "capturable": device.type == "cuda"} if fused else {}
    optimizer = create_optimizer_v2(
        model,
        opt=recipe.optimizer,
        lr=_highest_rate(config),
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        betas=tuple(recipe.betas),
        eps=recipe.eps,
        **form,
    )
    # The classifier's first, as checkpoints have them.
    optimizer.param_groups.sort(key=lambda group: -group.get("lr_scale", 1.0))
    for group in optimizer.param_groups if fused else ():
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    return optimizer


def portable_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint, independent of its device and form."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"lr": float(group["lr"]), **{key: value for key, value in _FORM.items() if key in group}}
    return state


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a state of `portable_state`; the optimizer keeps its own form and learning rates."""
    kept = ("lr", *_FORM)
    pairs = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    groups = [{**group, **{key: own[key] for key in kept if key in own}} for group, own in pairs]
    optimizer.load_state_dict({**saved, "param_groups": groups})


def learning_rate(config: RunConfig, steps_per_epoch: int, step: int) -> float:
    """Return the recipe's learning rate for a step, counted from 0: cosine decay after a linear warm-up.

    The numbers are those of timm's CosineLRScheduler, bit by bit.
    """
    recipe, top = config.recipe, _highest_rate(config)
    stride, unit = (steps_per_epoch, 1) if recipe.lr_steps == "epoch" else (1, steps_per_epoch)
    warmup, end, now = recipe.warmup_epochs * unit, config.trainer.epochs * unit, step // stride
    if now < warmup:
        return recipe.warmup_lr + now * ((top - recipe.warmup_lr) / warmup)
    if now < end:
        return recipe.min_lr + 0.5 * (top - recipe.min_lr) * (1 + math.cos(math.pi * now / end))
    return recipe.min_lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rates of all groups; `rate` is the highest of them."""
    for group in optimizer.param_groups:
        own = rate * group.get("lr_scale", 1.0)
        group["lr"] = group["lr"].fill_(own) if isinstance(group["lr"], Tensor) else own


def create_mixing(recipe: RecipeConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Return a function of images and labels that mixes them, drawing from numpy's generator; None for no mixing."""
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return None
    switch, smoothing = recipe.mixup_switch, recipe.label_smoothing
    return Mixup(recipe.mixup, recipe.cutmix, switch_prob=switch, label_smoothing=smoothing, num_classes=num_classes)


def create_loss(recipe: RecipeConfig) -> nn.Module:
    """Return the loss for soft targets if images are mixed, else for labels, with the recipe's smoothing."""
    if recipe.mixup > 0 or recipe.cutmix > 0:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(recipe.label_smoothing) if recipe.label_smoothing > 0 else nn.CrossEntropyLoss()
