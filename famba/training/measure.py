"""Count the costs of a training step: multiply-adds, and bytes kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from famba.fusion import tokens_per_layer
from famba.models import Backbone


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Both products of attention; shapes (b, heads, l, channels)."""
    batch, heads, length, channels = query
    return 2 * batch * heads * length * key[2] * (channels + value[3])


# Attention as torch has it on a CPU: its own counter knows those of GPUs alone.
_NOT_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
# Autograd keeps the same for any batch besides what it keeps of each image: two sizes tell the two apart.
_FEW, _MANY = 2, 4


@dataclass(frozen=True)
class LayerCost:
    """Hold the costs of a layer per image; entering and leaving count the tokens around its fusion."""

    entering: int
    leaving: int
    macs: int
    saved_bytes: int


@dataclass(frozen=True)
class Cost:
    """Hold the costs of a model with its schedule, per image; embedding and head as (macs, saved bytes)."""

    layers: tuple[LayerCost, ...]
    embedding: tuple[int, int]
    head: tuple[int, int]

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass, which papers call FLOPs; norms, activations and sums do not count."""
        return sum(layer.macs for layer in self.layers) + self.embedding[0] + self.head[0]

    @property
    def saved_bytes(self) -> int:
        """Bytes that autograd keeps of a forward pass for the backward, parameters not counted."""
        return sum(layer.saved_bytes for layer in self.layers) + self.embedding[1] + self.head[1]

    @property
    def token_layers(self) -> int:
        """Tokens left after each layer's fusion, summed over the layers."""
        return sum(layer.leaving for layer in self.layers)


def cost(model: Backbone, autocast: torch.dtype | None = None) -> Cost:
    """Count what each layer of a model costs in training, exactly, on any device, a fake one too."""
    few, many = (_marks(model, batch, model.image_size, autocast) for batch in (_FEW, _MANY))
    more = _MANY - _FEW
    # Operations count multiplications and additions apart.
    marks = [((b[0] - a[0]) // more // 2, (b[1] - a[1]) // more) for a, b in zip(few, many, strict=True)]
    parts = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise([(0, 0), *marks])]
    left = [model.num_tokens, *tokens_per_layer(model.fusion, model.num_tokens)]
    layers = [LayerCost(*tokens, *part) for tokens, part in zip(pairwise(left), parts[1:-1], strict=True)]
    return Cost(tuple(layers), parts[0], parts[-1])


def macs_per_image(model: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of one image's forward pass, as `Cost.macs` has them."""
    was_training, device = model.training, next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(was_training)
    return counter.get_total_flops() // 2


def saved_bytes_per_image(model: nn.Module, image_size: int, autocast: torch.dtype | None) -> int:
    """Count the bytes that one more image makes autograd keep for the backward, the same on every device."""
    few, many = (_marks(model, batch, (image_size, image_size), autocast)[-1][1] for batch in (_FEW, _MANY))
    return (many - few) // (_MANY - _FEW)


def _marks(
    model: nn.Module, batch: int, image_size: tuple[int, int], autocast: torch.dtype | None
) -> list[tuple[int, int]]:
    """Return operations and bytes of a batch up to each layer of a backbone, and up to its end."""
    device = next(model.parameters()).device
    parameters = {_address(parameter) for parameter in model.parameters()}
    # Keeping the tensors keeps their addresses apart.
    kept: dict[int, Tensor] = {}
    marks: list[tuple[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[_address(tensor)] = tensor
        return tensor

    def mark() -> None:
        saved = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
        marks.append((counter.get_total_flops(), saved))

    was_training = model.training
    model.train()
    channels = model.in_chans if isinstance(model, Backbone) else 3
    images = torch.zeros(batch, channels, *image_size, device=device)
    with (
        FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        _autocasting(device.type, autocast),
    ):
        if isinstance(model, Backbone):
            model.classify(model.run(images, mark=mark))
        else:
            model(images)
        mark()
    model.train(was_training)
    return marks


def _address(tensor: Tensor) -> int:
    # Not data_ptr, which is 0 for every tensor without data.
    return tensor.untyped_storage()._cdata


@contextmanager
def _autocasting(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast as torch.autocast does, also for a kind of device that is not on this machine."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
