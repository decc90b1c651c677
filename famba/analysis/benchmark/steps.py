"""A training step and an inference of a model by its timm name, on random images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from famba.analysis.benchmark.machine import PRECISIONS, SEED
from famba.fusion import schedule
from famba.models.vim import Vim

BUDGET = 6 / 7
"""Share of the patches that a strategy removes, as `configs/fusion` has it."""
_RATE = 1e-6


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, the strategy by which it fuses (None where it is no Vim), and on what.

    image_size: pixels a side. precision: a key of PRECISIONS. device: a torch device by name.
    """

    model: str
    strategy: str | None
    batch: int
    image_size: int
    precision: str
    device: str

    def build(self) -> nn.Module:
        """Build the model with seeded random weights."""
        torch.manual_seed(SEED)
        chosen: dict[str, Any] = {"img_size": self.image_size}
        model = timm.create_model(self.model, **chosen)
        if isinstance(model, Vim) and self.strategy not in (None, "none"):
            counts = schedule(self.strategy, len(model.layers), model.num_tokens, BUDGET)
            model = timm.create_model(self.model, **chosen, fusion=counts)
        return model.to(self.device)


class Step:
    """Training steps (forward, cross-entropy, backward, AdamW) and inferences of a subject."""

    def __init__(self, subject: Subject) -> None:
        self.model = subject.build()
        device, size = torch.device(subject.device), subject.image_size
        generator = torch.Generator().manual_seed(SEED)
        self._images = torch.randn(subject.batch, 3, size, size, generator=generator).to(device)
        classes: int = self.model.get_classifier().out_features  # type: ignore[operator]
        self._labels = torch.randint(classes, (subject.batch,), generator=generator).to(device)
        dtype = PRECISIONS[subject.precision]
        self._autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        # Weights hardly move: the steps of a long measurement do the same work.
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=_RATE)

    def allocate(self) -> None:
        """Bring gradients and the optimizer's state into being, which any step needs."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()

    def train(self) -> None:
        """One training step; the model has to be in training mode."""
        with self._autocast:
            loss = nn.functional.cross_entropy(self.model(self._images), self._labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def infer(self) -> None:
        """One inference; the model has to be in evaluation mode."""
        with torch.no_grad(), self._autocast:
            self.model(self._images)
