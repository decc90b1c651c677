"""Estimate the time of a sweep on the GPUs of the paper, as far as that can be told beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from famba import data
from famba.models.backbone import backbone_of
from famba.training.config import RunConfig
from famba.training.measure import macs_per_image
from famba.training.setup import Setup, build_model

_MOST_GPUS = 4
_WORTH_SAYING_HOURS = 1.0


@dataclass(frozen=True)
class Alike:
    """Runs of a sweep that differ in their seeds alone: their configuration, what it comes to, and how many."""

    config: RunConfig
    setup: Setup
    runs: int


def estimate(asked: Sequence[Alike]) -> str:
    """Return a line on a sweep's GPU-hours.

    It is empty where it is little, the number of images is not known, or no time of such a network is in print.
    """
    total = hours = 0.0
    for one in asked:
        rate = backbone_of(one.config.model.name).printed_rate
        if rate is None:
            return ""
        images = one.config.data.subset or data.training_images_of(one.config.data.name)
        if images is None:
            return ""
        kept = images - data.held_out(images, one.config.data.val_fraction)
        trainer = one.config.trainer
        seen = trainer.epochs * kept
        if trainer.max_steps is not None:
            seen = min(seen, trainer.max_steps * trainer.batch_size)
        macs = one.runs * seen * _macs(one)
        total, hours = total + macs, hours + macs / rate
    if hours < _WORTH_SAYING_HOURS:
        return ""
    return (
        f"about {hours:,.0f} to {_MOST_GPUS * hours:,.0f} GPU-hours on A100s: {total:.1e} multiply-adds forward, "
        "at the rate of the one time that the paper prints, had it been on one GPU or on four\n"
    )


def _macs(one: Alike) -> int:
    with torch.device("meta"):
        model = build_model(one.config.model.name, one.setup.model_arguments)
    return macs_per_image(model, one.setup.image_size)
