"""Build optimizer, learning rate, mixing and loss of a recipe, from timm."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from famba.errors import ConfigError, near_miss
from famba.training.config import RecipeConfig, RunConfig

# Settings of an optimizer that depend on the device, or on the step.
_FORM = ("lr", "fused", "foreach", "capturable")


def check_optimizer(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError if the optimizer cannot be built, or cannot take a step on four numbers."""
    recipe, tiny = config.recipe, nn.Linear(2, 2, bias=False, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # recommendations are shown when the run builds its own
            # timm warns of a decay by layer if there is one layer.
            optimizer = create_optimizer(tiny, replace(config, recipe=replace(recipe, layer_decay=None)))
            tiny(torch.ones(1, 2, device=device)).sum().backward()
            optimizer.step()
    except Exception as error:  # each optimizer has its own way to fail
        known = [str(name) for name in list_optimizers()]
        near = "" if recipe.optimizer in known else near_miss(recipe.optimizer, known)
        told = f"does not work with this recipe here{near} ({str(error) or type(error).__name__})"
        told = f"recipe.optimizer={recipe.optimizer} {told}; use adamw, or change recipe.betas and recipe.eps"
        raise ConfigError(told) from error


def has_fused_form(name: str) -> bool:
    """Return whether a step of an optimizer can be one kernel, which can skip it by a flag on the device."""
    return get_optimizer_class(name, bind_defaults=False) in (torch.optim.Adam, torch.optim.AdamW)


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
        lr=recipe.lr * config.trainer.batch_size / recipe.lr_batch,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        betas=tuple(recipe.betas),
        eps=recipe.eps,
        **form,
    )
    # The classifier's first: the rate of the first group is the one that is logged.
    optimizer.param_groups.sort(key=lambda group: -group.get("lr_scale", 1.0))
    for group in optimizer.param_groups if fused else ():
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    return optimizer


def portable_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint, independent of its device and form."""
    state = optimizer.state_dict()
    plain = {"fused": None, "foreach": None, "capturable": False}
    groups = [
        {**group, "lr": float(group["lr"]), **{key: value for key, value in plain.items() if key in group}}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a state of `portable_state`; the optimizer keeps its own form and learning rates."""
    own = [{key: group[key] for key in _FORM if key in group} for group in optimizer.param_groups]
    groups = [{**group, **form} for group, form in zip(saved["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for group, form in zip(optimizer.param_groups, own, strict=True):
        group.update(form)


class LearningRate:
    """Set the learning rate of each step: cosine decay after a linear warm-up, a function of the step alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: RunConfig, steps_per_epoch: int) -> None:
        recipe = config.recipe
        self._steps_per_epoch, self._per_epoch = steps_per_epoch, recipe.lr_steps == "epoch"
        self._optimizer = optimizer
        # timm's scheduler writes plain numbers, but a graph reads tensors: it gets groups of its own.
        self._groups = [
            {key: float(group[key]) for key in ("lr", "lr_scale") if key in group} for group in optimizer.param_groups
        ]
        self._schedule, _ = create_scheduler_v2(
            SimpleNamespace(param_groups=self._groups),  # type: ignore[arg-type]
            sched="cosine",
            num_epochs=config.trainer.epochs,
            warmup_epochs=recipe.warmup_epochs,  # type: ignore[arg-type]  # a part of an epoch works too
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            step_on_epochs=self._per_epoch,
            updates_per_epoch=0 if self._per_epoch else steps_per_epoch,
        )

    def set(self, step: int) -> float:
        """Set the optimizer's rates for a step, counted from 0, and return the highest, which is the recipe's."""
        if self._per_epoch:
            self._schedule.step(step // self._steps_per_epoch)
        else:
            self._schedule.step_update(step)
        for group, own in zip(self._optimizer.param_groups, self._groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(own["lr"])
            else:
                group["lr"] = own["lr"]
        return self._groups[0]["lr"]


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
