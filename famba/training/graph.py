"""Do a whole step as one CUDA graph, so that the GPU never waits for the host.

What changes from step to step lies at fixed places in the device's memory. Draws follow the generators' seeds.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from famba.errors import FambaError, TrainingError
from famba.training.config import RunConfig
from famba.training.devices import out_of_memory, reset_peak_memory
from famba.training.optimizer import has_fused_form
from famba.training.step import Infer, Step

_WARM_UPS = 3
Memory = tuple[Any, torch.cuda.Stream]
"""A pool for the memory of graphs, and the stream that they are captured on."""
_DEVICES = ["cuda"]  # that graphs are made for; tests add the CPU, which does the same without graphs


def obstacle(config: RunConfig, device: torch.device, processes: int, backend: str) -> str | None:
    """Return why a run's steps cannot be graphs, None if they can; without graphs, steps are slower, not wrong."""
    if config.trainer.cuda_graphs is False:
        return "trainer.cuda_graphs=false"
    if device.type not in _DEVICES:
        return f"the device is {device.type}"
    if processes > 1:
        return f"{processes} processes exchange their gradients"
    if not has_fused_form(config.recipe.optimizer):
        return f"recipe.optimizer={config.recipe.optimizer} looks at numbers on the host; adamw and adam do not"
    if config.trainer.grad_checkpointing:
        return "trainer.grad_checkpointing keeps the state of the generators, which a graph cannot ask for"
    return "the ops are computed by the reference, in too many kernels" if backend == "reference" else None


class GraphStep(Step):
    """Do the steps as graphs: one for the whole step, or one for its micro-batches and one for the update.

    A step whose loss is not finite changes nothing, nor does any after it; with float16 a gradient that is not finite
    skips its own step alone. The optimizer must be in its fused form, with learning rates on the device.
    """

    masks = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        shapes: list[tuple[int, ...]] = [(), (), (), (2,), (0,), (0,)]
        self._loss, self._ema_weight, self._held, self._reported, self._images, self._targets = (
            torch.zeros(shape, device=self.device) for shape in shapes
        )
        self._evaluations: dict[nn.Module, _Evaluation] = {}
        self._is_tuned = False
        self.schedule_changes()

    def gradients(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Do the next step; `update` has nothing left to do."""
        self.data_s = self.once_s = 0.0
        if self.state.ema is not None:
            self._ema_weight.fill_(1 - self.state.ema.get_decay(self.state.step))
        for part in range(self.parts):
            images, labels = self.next_batch(batches)
            self.seed_draws(part)
            self._load(images, labels)
            if self._finish is None:
                began = time.perf_counter()
                self._capture()
                self.once_s = time.perf_counter() - began
                self.seed_draws(part)
                self._load(images, labels)
            if self._add is not None:
                self._add()
        self.replay()
        return self._reported.clone()

    def replay(self) -> None:
        """Replay the graph that ends a step; with one micro-batch that is all of the step."""
        assert self._finish is not None, "the first call of `gradients` captures it"
        self.changing = True
        self._finish()

    def update(self) -> None:
        """Do nothing: `gradients` has done the step."""

    def infer(self, model: nn.Module) -> Infer:
        """Return what evaluates a model in eval mode, as a graph for batches of the first one's size."""
        if model not in self._evaluations:
            self._evaluations[model] = _Evaluation(super().infer(model), self._captured)
        return self._evaluations[model]

    def schedule_changes(self) -> None:
        """Forget the graphs, and give their memory back; the next step is captured anew."""
        self._add: Callable[[], None] | None = None
        self._finish: Callable[[], None] | None = None
        self._evaluations.clear()
        self._memory = graph_memory(self.device)

    def _load(self, images: Tensor, labels: Tensor) -> None:
        """Put a micro-batch, mixed if the recipe mixes, where the graph reads it."""
        if self._finish is None:
            self._images = torch.empty(images.shape, device=self.device)
        assert images.shape == self._images.shape, "every micro-batch has the same size"
        self._images.copy_(images, non_blocking=True)
        targets = labels.to(self.device, non_blocking=True)
        if self.mix is not None:
            _, targets = self.mix(self._images, targets)  # in place
        if self._finish is None:
            self._targets = torch.empty_like(targets)
        self._targets.copy_(targets)

    def _capture(self) -> None:
        """Capture the graphs without a trace in weights, optimizer, average, scaler or generators."""
        state = self.state
        scale, held = state.scaler.state_dict(), self._held.clone()
        self._held.fill_(1)
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*step\\(\\) is running without CUDA graph capture")
                if not self._is_tuned:  # tuning takes memory that no step takes
                    warm_up(self._whole if self.parts == 1 else self._micro_batch, self._memory)
                    reset_peak_memory(self.device)
                    self._is_tuned = True
                if self.parts == 1:
                    self._finish = self._captured(self._whole)
                else:
                    # Gradients get fixed places.
                    for parameter in state.model.parameters():
                        if parameter.grad is not None:
                            parameter.grad = torch.zeros_like(parameter.grad)
                    self._add = self._captured(self._micro_batch)
                    self._finish = self._captured(self._update)
        finally:
            self._held.copy_(held)
            self._loss.zero_()
            state.scaler.load_state_dict(scale)
            state.optimizer.zero_grad(set_to_none=self._add is None)

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return a function as a graph. Raises TrainingError if it cannot be captured; the device is lost then."""
        warm_up(function, self._memory)
        try:
            return captured(function, self._memory)
        except FambaError:
            raise
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            told = f"the step cannot be captured as a CUDA graph ({reason}); use trainer.cuda_graphs=false"
            raise TrainingError(told) from error

    def _whole(self) -> None:
        self._micro_batch()
        self._update()

    def _micro_batch(self) -> None:
        self._loss += self.backward(self._images, self._targets)

    def _update(self) -> None:
        """Take the step unless something is not finite, average the weights, and clear what the step added up."""
        state = self.state
        norm = self.clipped_norm()
        finite_norm, finite = norm.isfinite(), self._loss.isfinite()
        if not state.scaler.is_enabled():
            finite = finite & finite_norm
        self._held.copy_(torch.maximum(self._held, (~finite).float()))
        skipped = torch.maximum(self._held, (~finite_norm).float())
        optimizer: Any = state.optimizer
        # The fused optimizers take this from a GradScaler: one where a step is to be left out.
        optimizer.grad_scale, optimizer.found_inf = None, skipped
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        if state.scaler.is_enabled():
            state.scaler.update()
        if state.ema is not None:
            average(state.ema.module, state.model, self._ema_weight * (1 - skipped))
        optimizer.zero_grad(set_to_none=self.parts == 1)
        self._reported.copy_(torch.stack([self._loss, norm]))
        self._loss.zero_()


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """Move the weights of an average towards a model's, by a share of the way that lies on the device, ()."""
    old_values, new_values = (
        [value for value in one.state_dict().values() if value.is_floating_point()] for one in (averaged, model)
    )
    ways = torch._foreach_sub(new_values, old_values)
    torch._foreach_mul_(ways, weight)
    torch._foreach_add_(old_values, ways)


def graph_memory(device: torch.device) -> Memory | None:
    """Return memory for graphs, which those that take turns may share; None without GPU."""
    return (torch.cuda.graph_pool_handle(), _capture_stream(device)) if device.type == "cuda" else None


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all runs: cuBLAS keeps memory for each stream that it has seen


def warm_up(function: Callable[[], None], memory: Memory | None) -> None:
    """Call a function that is to be captured a few times: kernels are compiled, tuned and given their memory."""
    if memory is None:
        for _ in range(_WARM_UPS):
            function()
        return
    _, stream = memory
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream(stream.device).wait_stream(stream)
    # The graph has memory of its own: what the warm-up used is given back first.
    gc.collect()


def captured(function: Callable[[], None], memory: Memory | None) -> Callable[[], None]:
    """Return what replays a function as a CUDA graph, or the function itself if memory is None.

    The function, called by `warm_up` before, reads and writes tensors that stay where they are. memory: of
    `graph_memory`.
    """
    if memory is None:
        return function
    pool, stream = memory
    graph, failure = torch.cuda.CUDAGraph(), None
    try:
        # Other threads, such as the one that pins batches, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                function()
            except Exception as error:
                failure = error
                raise
    except RuntimeError:
        if failure is not None:  # after which the end of the capture fails, too
            raise failure from None
        raise
    return graph.replay


class _Evaluation:
    """Evaluate batches of the first one's shape by a graph, and others as they come."""

    def __init__(self, infer: Infer, captured: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        self._infer, self._captured = infer, captured
        self._images = self._logits = torch.empty(0)
        self._replay: Callable[[], None] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (b, classes); the next call may overwrite them."""
        if self._replay is None:
            self._images = images.clone()
            self._replay = self._captured(self._call)
        if images.shape != self._images.shape:
            return self._infer(images)
        self._images.copy_(images)
        self._replay()
        return self._logits

    def _call(self) -> None:
        self._logits = self._infer(self._images)
