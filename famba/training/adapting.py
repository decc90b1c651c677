"""The schedule of fusion=adaptive: measured on training images at steps known beforehand, fixed in between."""

from __future__ import annotations

import logging

import torch

from famba import data
from famba.errors import ConfigError
from famba.fusion.schedules import Adapted
from famba.models import Backbone
from famba.training.build import load_images
from famba.training.config import RunConfig
from famba.training.distributed import Process
from famba.training.setup import Setup

_log = logging.getLogger(__name__)


class Adapting:
    """When a run measures its schedule anew, and on which images. A run of another strategy never does.

    The images are a sample of the training set with every class in proportion, as evaluation would see them; which they
    are depends on the data alone. In several processes the main one measures, and all take its schedule.
    """

    def __init__(self, config: RunConfig, setup: Setup, train: data.Source | data.StreamSource, steps: int) -> None:
        shares, count = config.fusion.adapt_at, config.fusion.adapt_images
        self.budget = sum(setup.schedule)
        self.autocast = setup.autocast
        self.steps: frozenset[int] = frozenset()
        if shares is None or count is None:
            return
        if isinstance(train, data.StreamSource):
            raise ConfigError(
                f"fusion=adaptive measures on training images, and {train.name!r} is a stream without random access; "
                "choose another strategy, or data in files"
            )
        self.steps = frozenset(int(share * steps) for share in shares)
        last = config.trainer.max_steps
        if last is not None and last <= max(self.steps):
            # Not shares of max_steps: a run that goes on with more of them would have measured at other steps.
            _log.warning(
                "fusion=adaptive measures after steps %s of the %d in all epochs; trainer.max_steps=%d ends before",
                sorted(self.steps),
                steps,
                last,
            )
        chosen = data.sample(train, min(count, len(train)), config.data.version)
        self._images = load_images(config, setup, chosen)

    def measure(self, model: Backbone, process: Process) -> Adapted:
        """Work out the schedule that this model has now."""
        if not process.is_main:
            return process.from_main(None)
        was_training = model.training
        model.eval()
        device = process.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            adapted = model.adapted_fusion(self._images.to(device), self.budget)
        model.train(was_training)
        return process.from_main(adapted)
