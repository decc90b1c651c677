"""The matrix products of a training step of a Vim, by themselves: the limit that the machine sets to the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from famba.models.vim import Vim, VimBlock

_BEFORE_OUTPUT = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b")


@dataclass(frozen=True)
class Linear:
    """y = x W^T with its backward: x (rows, inputs), W (outputs, inputs).

    needs_dx: whether anything before it learns.
    """

    rows: int
    inputs: int
    outputs: int
    needs_dx: bool = True

    @property
    def flops(self) -> int:
        """Operations forward and backward, two for each multiply-add."""
        return 2 * self.rows * self.inputs * self.outputs * (2 + self.needs_dx)


def step_linears(model: Vim, batch: int) -> list[Linear]:
    """List what a training step multiplies, in the order of the forward.

    Worked out from weights and schedule, not observed: an op that computes several products at once hides them.
    Similarities between tokens, where the model fuses, are not counted.
    """
    kernel = model.patch_embed.proj.weight
    linears = [Linear(batch * model.num_patches, kernel[0].numel(), kernel.shape[0], needs_dx=False)]
    tokens = model.num_tokens
    for layer, r in zip(model.layers, model.fusion, strict=True):
        assert isinstance(layer, VimBlock)
        entering, tokens = tokens, tokens - r
        early = entering if model.settings.place == "after_scan" else tokens
        linears += [_linear(layer.mixer, name, batch * early) for name in _BEFORE_OUTPUT]
        linears.append(_linear(layer.mixer, "out_proj", batch * tokens))
    if isinstance(model.head, nn.Linear):
        linears.append(Linear(batch, model.head.in_features, model.head.out_features))
    return linears


class Products:
    """The products of linears, forward in order and backward in reverse; operands and results are allocated ahead.

    All linears share one buffer per operand, so that even a long step fits in memory. That is in favour of the
    products: what one of them leaves in the cache, the next may find there.
    """

    def __init__(self, linears: list[Linear], dtype: torch.dtype, device: torch.device) -> None:
        x = max(one.rows * one.inputs for one in linears)
        y = max(one.rows * one.outputs for one in linears)
        weight = max(one.inputs * one.outputs for one in linears)
        self._buffers = {
            name: torch.randn(size, device=device).to(dtype)
            for name, size in {"x": x, "dx": x, "y": y, "dy": y, "W": weight, "dW": weight}.items()
        }
        backward = [product for one in reversed(linears) for product in self._backward(one)]
        self._calls = [*(self._forward(one) for one in linears), *backward]

    @torch.no_grad()
    def __call__(self) -> None:
        """Multiply."""
        for left, right, out in self._calls:
            torch.mm(left, right, out=out)

    def _forward(self, one: Linear) -> tuple[Tensor, Tensor, Tensor]:
        x, W = self._view("x", one.rows, one.inputs), self._view("W", one.outputs, one.inputs)
        return x, W.t(), self._view("y", one.rows, one.outputs)

    def _backward(self, one: Linear) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        x, dy = self._view("x", one.rows, one.inputs), self._view("dy", one.rows, one.outputs)
        if one.needs_dx:
            yield dy, self._view("W", one.outputs, one.inputs), self._view("dx", one.rows, one.inputs)
        yield dy.t(), x, self._view("dW", one.outputs, one.inputs)

    def _view(self, name: str, rows: int, columns: int) -> Tensor:
        return self._buffers[name][: rows * columns].view(rows, columns)


def _linear(mixer: nn.Module, name: str, rows: int) -> Linear:
    weight = mixer.get_parameter(f"{name}.weight")
    return Linear(rows, weight.shape[1], weight.shape[0])
