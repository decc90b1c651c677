"""A training step and an inference of a model by its timm name, on random images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from famba.analysis.benchmark.machine import PRECISIONS, SEED
from famba.fusion import schedule
from famba.models import Backbone, create_network
from famba.ops import use_backend

BUDGET = 6 / 7
"""Share of the patches that a strategy removes, as `configs/fusion` has it."""
_RATE = 1e-6
# Graphs that torch.compile keeps of one function: a model's in training and evaluation, times all contestants.
_GRAPHS = 64


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, the strategy by which it fuses, and on what.

    image_size: pixels a side. precision: a key of PRECISIONS. device: a torch device by name. backend: of the ops,
    None for the process's choice. compiled: by torch.compile, in one graph.
    """

    model: str
    strategy: str
    batch: int
    image_size: int
    precision: str
    device: str
    backend: str | None = None
    compiled: bool = False

    def build(self) -> Backbone:
        """Build the model with seeded random weights; attention is not proportional, as in training."""
        torch.manual_seed(SEED)
        model = create_network(self.model, img_size=self.image_size)
        counts = schedule(self.strategy, model.depth, model.num_tokens, BUDGET, protected=model.protected)
        model.set_fusion(counts, proportional=False)
        return model.to(self.device)

    @contextlib.contextmanager
    def chosen_backend(self) -> Iterator[None]:
        """Let ops inside the block be computed by the subject's backend."""
        with contextlib.nullcontext() if self.backend is None else use_backend(self.backend):
            yield


class Step:
    """Training steps (forward, cross-entropy, backward, AdamW) and inferences of a subject."""

    def __init__(self, subject: Subject) -> None:
        self.model = subject.build()
        self._subject = subject
        self._forward = _compiled(self.model) if subject.compiled else self.model
        device, size = torch.device(subject.device), subject.image_size
        generator = torch.Generator().manual_seed(SEED)
        self._images = torch.randn(subject.batch, 3, size, size, generator=generator).to(device)
        classes = self.model.num_classes
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
        with self._subject.chosen_backend():
            with self._autocast:
                loss = nn.functional.cross_entropy(self._forward(self._images), self._labels)
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def infer(self) -> None:
        """One inference; the model has to be in evaluation mode."""
        with self._subject.chosen_backend(), torch.no_grad(), self._autocast:
            self._forward(self._images)


def _compiled(model: nn.Module) -> Callable[..., torch.Tensor]:
    # By the name that every torch release since 2.6 knows.
    torch._dynamo.config.cache_size_limit = _GRAPHS
    # Shapes are fixed, as in `trainer.compile`.
    return torch.compile(model, fullgraph=True, dynamic=False)
