"""Do one optimizer step: gradients of micro-batches, clipping, the update, and the average of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from famba.data.draws import Stream
from famba.training.checkpoint import TrainingState
from famba.training.config import RunConfig
from famba.training.devices import seed_generators
from famba.training.distributed import Process
from famba.training.optimizer import create_loss, create_mixing

Infer = Callable[[Tensor], Tensor]
"""Images (b, 3, h, w) to logits (b, classes)."""


class Step:
    """Do the steps of one process, kernel by kernel as the host calls them.

    state is changed by the steps. forward is the model as it is called, compiled or shared between processes. autocast
    is the dtype of the matrix products, None for float32.
    """

    masks = False
    """True if a step whose loss or gradient is not finite leaves the state of the step before it."""
    changing = False
    """True from where a step begins to change the state until it is counted."""
    data_s = once_s = 0.0
    """Seconds of the last step: for its data, and for what no other step does, such as the capture of a graph."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainingState,
        forward: nn.Module,
        process: Process,
        autocast: torch.dtype | None,
    ) -> None:
        self.state, self.forward, self.process, self.autocast = state, forward, process, autocast
        self.device, self.parts = process.device, config.trainer.accumulation
        self.seed, self.clip_grad = config.seed, config.recipe.clip_grad
        self.mix = create_mixing(config.recipe, state.model.num_classes)
        self.loss = create_loss(config.recipe)
        # Processes exchange gradients once per step, with the last micro-batch.
        self._keep_gradients = forward.no_sync if isinstance(forward, DistributedDataParallel) else nullcontext

    def gradients(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute the gradients of the next step; return loss and norm, float32 (2,) on the device."""
        self.data_s = 0.0
        loss = torch.zeros((), device=self.device)
        for part in range(self.parts):
            images, labels = (x.to(self.device, non_blocking=True) for x in self.next_batch(batches))
            self.seed_draws(part)
            targets = labels
            if self.mix is not None:
                images, targets = self.mix(images, labels)
            with nullcontext() if part == self.parts - 1 else self._keep_gradients():
                loss += self.backward(images, targets)
        return torch.stack([loss, self.clipped_norm()])

    def update(self) -> None:
        """Take the optimizer's step, and average the weights."""
        state, self.changing = self.state, True
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model, state.step)

    def infer(self, model: nn.Module) -> Infer:
        """Return a function that evaluates a model in eval mode."""
        return partial(self._call, model)

    def _call(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return model(images)

    def schedule_changes(self) -> None:
        """Prepare for another schedule."""

    def next_batch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the next micro-batch, and add the time that it took to `data_s`."""
        began = time.perf_counter()
        batch = next(batches)
        self.data_s += time.perf_counter() - began
        return batch

    def seed_draws(self, part: int) -> None:
        """Seed the draws in a micro-batch by its place in the run."""
        seed_generators(Stream.STEP, self.seed, self.state.step, part, self.process.rank)

    def backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of one micro-batch; return its share of the step's loss."""
        loss = self.loss(self._call(self.forward, images).float(), targets) / self.parts
        self.state.scaler.scale(loss).backward()
        return loss.detach()

    def clipped_norm(self) -> Tensor:
        """Unscale the gradients and clip them if the recipe does; return the norm before clipping, float32."""
        self.state.scaler.unscale_(self.state.optimizer)
        parameters = [p for p in self.state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        return norm.float()
