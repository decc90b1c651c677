"""Estimate the time of a sweep on the GPUs of the paper, as far as that can be told beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from famba import data
from famba.models import Vim
from famba.models.cost import cost
from famba.models.networks import vim_names
from famba.training.config import RunConfig
from famba.training.setup import Setup, build_model

# The one time in print (arXiv 2409.09808): Vim-Ti with interleaved fusion in under 4 hours on A100s, 300 epochs of
# 50,000 images, by `cost` 0.903 G multiply-adds each. The released scripts start four processes; the text does not say.
_PRINTED_MACS = 300 * 50_000 * 0.903e9
_PRINTED_HOURS, _MOST_GPUS = 4, 4
_WORTH_SAYING_HOURS = 1.0


@dataclass(frozen=True)
class Alike:
    """Runs of a sweep that differ in their seeds alone: their configuration, what it comes to, and how many."""

    config: RunConfig
    setup: Setup
    runs: int


def estimate(asked: Sequence[Alike]) -> str:
    """Return a line on a sweep's GPU-hours.

    It is empty where it is little, the number of images is not known, or a network is none of the paper's kind.
    """
    total = 0.0
    for one in asked:
        if one.config.model.name not in vim_names():
            return ""
        images = one.config.data.subset or data.training_images_of(one.config.data.name)
        if images is None:
            return ""
        kept = images - data.held_out(images, one.config.data.val_fraction)
        trainer = one.config.trainer
        seen = trainer.epochs * kept
        if trainer.max_steps is not None:
            seen = min(seen, trainer.max_steps * trainer.batch_size)
        total += one.runs * seen * _macs(one)
    hours = total / _PRINTED_MACS * _PRINTED_HOURS
    if hours < _WORTH_SAYING_HOURS:
        return ""
    return (
        f"about {hours:,.0f} to {_MOST_GPUS * hours:,.0f} GPU-hours on A100s: {total:.1e} multiply-adds forward, "
        "at the rate of the one time that the paper prints, had it been on one GPU or on four\n"
    )


def _macs(one: Alike) -> int:
    with torch.device("meta"):
        model = build_model(one.config.model.name, one.setup.model_arguments)
    assert isinstance(model, Vim)
    # Multiply-adds are the same by every backend.
    return cost(model, "reference", torch.float32).macs
